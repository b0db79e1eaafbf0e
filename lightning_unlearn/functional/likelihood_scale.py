"""How far the log-likelihoods of classes must be shrunk for the given labels to be likeliest.

Gaussians in many correlated coordinates are too sure of themselves: what they do not know then looks wrong. The scale
is fitted together with the transition matrix, as a temperature is to validation logits (Guo et al. 2017), and again
without wrong labels, so that it shows whether these are needed at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.transition import fit_transition
from lightning_unlearn.utilities.chunks import row_slices, thinning
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

MAX_NUMBERS = 2**20
"""Likelihoods that are looked at, one for each class of a row; of more rows every second, third, ... is taken."""

_STEP, _LEAST = 0.8, 0.01


@dataclass(frozen=True, eq=False)
class LikelihoodScale:
    """The fitted scale.

    Args:
        scale: factor of the log-likelihoods.
        gain: log-likelihood gain of wrong labels, in nats, over no wrong labels at its own best scale.
        gain_at_largest: the gain at the largest scale. If all samples are predicted equally well, a small scale
            explains the labels as well as noise does, and only this gain is conclusive.
    """

    scale: float
    gain: float
    gain_at_largest: float


def fit_likelihood_scale(
    log_likelihood: Tensor,
    label: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    largest: float = 1.0,
    reduce: Reduce = no_reduce,
) -> LikelihoodScale:
    """Search downward from the largest scale, in steps of a fifth, as long as the labels become likelier.

    Args:
        log_likelihood: (n, C) of the true classes.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        start: (C, C) transition matrix to start from, see :class:`~lightning_unlearn.functional.LatentClasses`.
        largest: scale.
        reduce: sums over the ranks.

    Returns:
        the same on every rank.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(2000, 3, generator=generator)
        >>> label = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        >>> fitted = fit_likelihood_scale(4 * logits, label, torch.ones(2000), torch.eye(3).double() * 0.7 + 0.1)
        >>> fitted.scale < 0.5, fitted.gain < 3
        (True, True)
    """
    total = reduce(weight.double().sum().reshape(1)).item()
    thin = thinning(total, len(start), MAX_NUMBERS)
    rows = log_likelihood[::thin].double(), label[::thin], weight[::thin].double()

    def with_errors(scale: float) -> float:
        found = fit_transition(scale * rows[0], rows[1], rows[2], start, reduce=reduce)
        return _label_log_likelihood(*rows, scale, found, reduce)

    def without(scale: float) -> float:
        return _label_log_likelihood(*rows, scale, None, reduce)

    scale, some, first = _highest(with_errors, largest)
    _, none, _ = _highest(without, largest)
    return LikelihoodScale(scale, thin * (some - none), thin * (first - none))


def _highest(value_of: Callable[[float], float], largest: float) -> tuple[float, float, float]:
    """Return the scale, its value, and that of the largest one."""
    scale, value = largest, value_of(largest)
    first = value
    while scale * _STEP > _LEAST:
        smaller = value_of(scale * _STEP)
        if smaller <= value:
            break
        scale, value = scale * _STEP, smaller
    return scale, value, first


def _label_log_likelihood(
    log_likelihood: Tensor, label: Tensor, weight: Tensor, scale: float, transition: Tensor | None, reduce: Reduce
) -> float:
    total = torch.zeros(1, dtype=torch.float64, device=label.device)
    names = None if transition is None else transition.T.contiguous()
    for rows in row_slices(len(label), log_likelihood.shape[1], label.device):
        log_share, y = (scale * log_likelihood[rows]).log_softmax(dim=1), label[rows]
        if names is None:
            likely = log_share.gather(1, y.unsqueeze(1)).squeeze(1)
        else:
            likely = (log_share.exp() * names[y]).sum(1).log()
        total += likely @ weight[rows]
    return reduce(total).item()
