"""How classes are called: the transition matrix of a noisy labeler.

Row k holds the probabilities of what a sample of class k is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_unlearn.utilities.chunks import row_slices
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

MOST_NAMES = 2_048
"""Classes up to which a partition has a matrix of what samples of each are called."""

MOST_HELD = 2**24
"""Likelihoods, one for each class of a row, that are held in double precision: 128 MiB."""

MOST_HELD_SINGLE = 2**26
"""The same in single precision, where they are too many for double: 256 MiB."""


@dataclass(frozen=True, eq=False)
class LogTransition:
    """How classes are called, as logarithms, which take as long as a good many rows.

    Args:
        transition: (C, C), see :class:`~lightning_unlearn.functional.LatentClasses`.
    """

    transition: Tensor

    @cached_property
    def _of_name(self) -> Tensor:
        """(C, C), row y the log-probabilities of that name under each true class."""
        return self.transition.clamp(min=1e-300).log().T.contiguous()

    def joint(self, log_likelihood: Tensor, label: Tensor) -> Tensor:
        """Return (n, C), log-probability of the evidence and the name of each sample under each true class."""
        return self._of_name[label].add_(log_likelihood.double())


def given_posterior(log_likelihood: Tensor, label: Tensor, transition: Tensor | LogTransition) -> Tensor:
    """Return the log-probability of each true class, given the evidence and what the sample is called.

    Args:
        log_likelihood: (n, C), see :meth:`~lightning_unlearn.functional.LatentClasses.log_likelihood`.
        label: (n,) int64.
        transition: (C, C), see :class:`~lightning_unlearn.functional.LatentClasses`; for callers with many parts, its
            logarithms.

    Returns:
        (n, C) float64, log-probabilities.
    """
    names = transition if isinstance(transition, LogTransition) else LogTransition(transition)
    return names.joint(log_likelihood, label).log_softmax(dim=1)


def log_odds_of(log_probability: Tensor, label: Tensor) -> Tensor:
    """Return the log-odds of one class against all the others.

    Args:
        log_probability: (n, C) log-probabilities, or anything that differs from them by a constant per row.
        label: (n,) int64.

    Returns:
        (n,)

    Example:
        >>> log_odds_of(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0]))
        tensor([0.])
    """
    column = label.unsqueeze(1)
    own = log_probability.gather(1, column).squeeze(1)
    return own - log_probability.scatter(1, column, -torch.inf).logsumexp(dim=1)


def smoothed(counts: Tensor) -> Tensor:
    """Count (C, C) of names and true classes as probabilities of the names of each class.

    One sample more of each class, spread over the names, so that nothing is impossible.
    """
    counts = counts.T + 1 / counts.shape[1]
    return counts / counts.sum(dim=1, keepdim=True)


def fit_transition(
    log_likelihood: Tensor | Callable[[slice], Tensor],
    label: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    reduce: Reduce = no_reduce,
    steps: int = 10,
) -> Tensor:
    """Return the transition matrix that explains the given labels best, the classes' likelihoods being known.

    Args:
        log_likelihood: (n, C) of the true classes; or a function from some rows to theirs, so that not all are held.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        start: (C, C) to start from, see :class:`~lightning_unlearn.functional.LatentClasses`.
        reduce: sums over the ranks.
        steps: of expectation maximization.

    Returns:
        (C, C) float64.
    """
    transition = start
    likelihood = _relative_likelihoods(log_likelihood, label, len(start))
    for _ in range(steps):
        counts, names = torch.zeros_like(start), transition.clamp(min=1e-300).T.contiguous()
        for rows, part in likelihood():
            share = names[label[rows]].mul_(part)
            share.mul_((weight[rows].double() / share.sum(dim=1)).unsqueeze(1))
            counts.index_add_(0, label[rows], share)
        transition = smoothed(reduce(counts))
    return transition


def _relative_likelihoods(
    log_likelihood: Tensor | Callable[[slice], Tensor], label: Tensor, num_classes: int
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Yield parts of the rows and their likelihoods over that of the likeliest class, again and again.

    They do not change from step to step, so that a step without logarithms takes a product of each. Held if not too
    many.
    """
    parts = row_slices(len(label), num_classes, label.device)

    def made(rows: slice) -> Tensor:
        ll = (log_likelihood[rows] if isinstance(log_likelihood, Tensor) else log_likelihood(rows)).double()
        return (ll - ll.amax(dim=1, keepdim=True)).exp_()

    numbers = len(label) * num_classes
    if numbers > MOST_HELD_SINGLE:
        return lambda: ((rows, made(rows)) for rows in parts)
    dtype = torch.float64 if numbers <= MOST_HELD else torch.float32
    held = [made(rows).to(dtype) for rows in parts]
    return lambda: ((rows, part.double()) for rows, part in zip(parts, held, strict=True))
