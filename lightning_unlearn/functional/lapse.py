"""How often labels differ from what a classifier says however sure it is, beside how often uncertainty explains it.

Of a sample x whose classes score s_k, a label y that is never wrong has the probability ``softmax(t s)_y``, whatever
temperature 1 / t the scores need: sure samples agree, and unsure ones differ. If a share of the labels is drawn
blindly, it is ``(1 - rate) softmax(t s)_y + rate / C``, and not even the surest samples agree more often than
``1 - rate``. In psychophysics, where observers blink, such a floor is called the lapse rate (Wichmann & Hill 2001, "The
psychometric function: I", Perception & Psychophysics 63). Both are fitted by maximum likelihood; how much likelier the
labels are with a lapse rate says whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.chunks import row_slices
from lightning_unlearn.functional.mixture import Reduce, no_reduce

_BINS = 2_048
_LOWEST = 30.0  # nats below certainty, from which on a label is as good as impossible
# Powers of two that scores are multiplied by, at first; then closer and closer around the best.
_POWERS = torch.linspace(-3, 5, 9, dtype=torch.float64)
_ROUNDS = 3
_BISECTIONS = 40


@dataclass(frozen=True)
class Lapses:
    """Labels that no uncertainty explains.

    Args:
        rate: share of the labels that are not what the sample is, at the likeliest lapse rate.
        z: how sure it is that there are any, in standard deviations: the root of twice the gain in log-likelihood.
    """

    rate: float
    z: float


def fit_lapses(
    score_of: Callable[[slice], Tensor], label: Tensor, weight: Tensor, num_classes: int, *, reduce: Reduce = no_reduce
) -> Lapses:
    """The lapse rate of labels under a classifier whose scores need a temperature that is not known.

    Args:
        score_of: from some of the rows to their scores (m, C), log-probabilities up to a temperature.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        num_classes: C.
        reduce: sums over the ranks.

    Returns:
        the same on every rank.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> score = 4 * torch.randn(2000, 3, generator=generator)
        >>> label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
        >>> fit_lapses(score.__getitem__, label, torch.ones(2000), 3).z < 2
        True
        >>> label[::5] = torch.randint(3, (400,), generator=generator)  # two thirds of these are wrong
        >>> lapses = fit_lapses(score.__getitem__, label, torch.ones(2000), 3)
        >>> round(lapses.rate, 2), lapses.z > 10
        (0.13, True)
    """
    powers, apart = _POWERS.to(label.device), (_POWERS[1] - _POWERS[0]).item()
    for last in range(1 - _ROUNDS, 1):
        counts = reduce(_histograms(score_of, label, weight, powers.exp2(), num_classes))
        never, rates, ever = _likelihoods(counts, num_classes)
        best = ever.argmax()
        if last < 0:
            apart /= 2
            around = apart * torch.arange(-2, 3, dtype=torch.float64, device=label.device)
            powers = torch.cat([powers[never.argmax()] + around, powers[best] + around])
    gain = max(0.0, (ever[best] - never.max()).item())
    return Lapses(rate=rates[best].item() * (1 - 1 / num_classes), z=math.sqrt(2 * gain))


def _histograms(
    score_of: Callable[[slice], Tensor], label: Tensor, weight: Tensor, factors: Tensor, num_classes: int
) -> Tensor:
    """(T, bins), of how surprising the labels are for each of T factors: sums that need no rank's rows."""
    counts, levels = torch.zeros(len(factors), _BINS, dtype=torch.float64, device=label.device), _levels(label.device)
    for rows in row_slices(len(label), num_classes, label.device):
        score, w = score_of(rows).double(), weight[rows].double()
        # From the largest on, looked for once, so that no power overflows.
        below = score - score.amax(dim=1, keepdim=True)
        own = below.gather(1, label[rows].unsqueeze(1)).squeeze(1)
        for factor, into in zip(factors, counts, strict=True):
            surprise = ((factor * below).exp_().sum(dim=1).log_() - factor * own).clamp_(0, _LOWEST)
            # Shared by the two levels around it, so that the mean surprise is that of the rows.
            upper = _level_above(surprise)
            part = (surprise - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
            into.index_add_(0, upper, part * w).index_add_(0, upper - 1, (1 - part) * w)
    return counts


def _level_above(surprise: Tensor) -> Tensor:
    """(n,) int64 from 1 on, the first of :func:`_levels` that is not below; computed, as a search takes long."""
    return ((surprise / _LOWEST).sqrt_() * (_BINS - 1)).ceil_().long().clamp_(min=1, max=_BINS - 1)


def _levels(device: torch.device) -> Tensor:
    """(bins,) of surprise, in nats; close to each other where a label is nearly certain, as most are."""
    return _LOWEST * torch.linspace(0, 1, _BINS, dtype=torch.float64, device=device).square()


def _likelihoods(counts: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) each: the log-likelihood without lapses, the likeliest lapse rate, and the log-likelihood with it."""
    log_probability = -_levels(counts.device)
    probability, blind = log_probability.exp(), 1 / num_classes
    low, high = torch.zeros_like(counts[:, :1]), torch.ones_like(counts[:, :1])
    # The log-likelihood is concave in the rate: where it falls, the best one is below.
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        slope = (counts * (blind - probability) / (probability + middle * (blind - probability))).sum(1, keepdim=True)
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    mixed = probability + low * (blind - probability)
    return counts @ log_probability, low.squeeze(1), (counts * mixed.log()).sum(dim=1)
