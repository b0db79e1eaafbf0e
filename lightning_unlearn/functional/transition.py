"""How classes are called: the transition matrix of a noisy labeller.

Row k holds the probabilities of what a sample of class k is called. Of very many classes it would have more entries
than there are samples to tell them: there it has one number a class, how often it goes by its own name, and all other
names are alike.
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
"""Classes up to which there is a number for every name that each may go by."""

MOST_HELD = 2**24
"""Likelihoods, one for each class of a row, that are held in double precision: 128 MiB."""

MOST_HELD_SINGLE = 2**26
"""The same in single precision, where they are too many for double: 256 MiB."""


@dataclass(frozen=True, eq=False)
class LogNames:
    """How classes are called, as logarithms, which take as long as a good many rows.

    Args:
        transition: (C, C) or (C,), see :class:`~lightning_unlearn.functional.LatentClasses`.
    """

    transition: Tensor

    @cached_property
    def _of_name(self) -> Tensor:
        """(C, C), row y the log-probabilities of that name under each true class."""
        return self.transition.clamp(min=1e-300).log().T.contiguous()

    @cached_property
    def _other_and_own(self) -> tuple[Tensor, Tensor]:
        """(C,) each: of any other name, and how much more of its own."""
        others = (1 - self.transition) / max(len(self.transition) - 1, 1)
        own, other = (x.clamp(min=1e-300).log() for x in (self.transition, others))
        return other, own - other

    def joint(self, log_likelihood: Tensor, label: Tensor) -> Tensor:
        """(n, C), log-probability of the evidence and the name of each sample under each true class."""
        if self.transition.ndim == 2:
            return self._of_name[label].add_(log_likelihood.double())
        other, more = self._other_and_own
        joint = log_likelihood.double() + other
        joint[torch.arange(len(label), device=label.device), label] += more[label]
        return joint


def given_posterior(log_likelihood: Tensor, label: Tensor, transition: Tensor | LogNames) -> Tensor:
    """Log-probability of each true class, given the evidence and what the sample is called.

    Args:
        log_likelihood: (n, C), see :meth:`~lightning_unlearn.functional.LatentClasses.log_likelihood`.
        label: (n,) int64.
        transition: (C, C) or (C,), see :class:`~lightning_unlearn.functional.LatentClasses`; for who asks of many
            parts, its logarithms.

    Returns:
        (n, C) float64, log-probabilities.
    """
    names = transition if isinstance(transition, LogNames) else LogNames(transition)
    return names.joint(log_likelihood, label).log_softmax(dim=1)


def log_odds_of(log_probability: Tensor, label: Tensor) -> Tensor:
    """Log-odds of one class against all the others.

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


def no_counts(like: Tensor, num_classes: int) -> Tensor:
    """Of true class and given name, (C, C); with very many classes of true class, and of those by its own name (C, 2).

    The names come first, as whole rows are added.
    """
    names = num_classes if num_classes <= MOST_NAMES else 2
    return like.new_zeros(names, num_classes, dtype=torch.float64)


def is_square(counts: Tensor) -> bool:
    """Whether there is a number for every name."""
    return counts.shape[0] == counts.shape[1]


def count(counts: Tensor, share: Tensor, label: Tensor) -> None:
    """Adds shares (n, C) of the true classes of samples of these names."""
    if is_square(counts):
        counts.index_add_(0, label, share)
    else:
        counts[0] += share.sum(dim=0)
        counts[1].index_add_(0, label, share.gather(1, label.unsqueeze(1)).squeeze(1))


def smoothed(counts: Tensor) -> Tensor:
    """Counts as probabilities; one sample more of each class, spread over the names, so that nothing is impossible."""
    each = 1 / counts.shape[1]
    if not is_square(counts):
        return (counts[1] + each) / (counts[0] + 1)
    counts = counts.T + each
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
    """The transition matrix that explains the given labels best, the classes' likelihoods being known.

    Args:
        log_likelihood: (n, C) of the true classes; or a function from some rows to theirs, so that not all are held.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        start: (C, C) or (C,) to start from, see :class:`~lightning_unlearn.functional.LatentClasses`.
        reduce: sums over the ranks.
        steps: of expectation maximization.

    Returns:
        float64 of the shape of ``start``.
    """
    transition = start
    likelihood = _relative_likelihoods(log_likelihood, label, len(start))
    for _ in range(steps):
        counts = start.new_zeros(len(start) if start.ndim == 2 else 2, len(start))
        names, add = transition.clamp(min=1e-300), _add_own_names
        if start.ndim == 2:
            names, add = names.T.contiguous(), _add_names
        for rows, part in likelihood():
            add(counts, part, label[rows], weight[rows].double(), names)
        transition = smoothed(reduce(counts))
    return transition


def _relative_likelihoods(
    log_likelihood: Tensor | Callable[[slice], Tensor], label: Tensor, num_classes: int
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Parts of the rows and their likelihoods over that of the likeliest class, again and again.

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


def _add_names(counts: Tensor, likelihood: Tensor, label: Tensor, weight: Tensor, names: Tensor) -> None:
    """Adds the shares of the true classes of samples to their names (C, C); ``names`` has a row for each."""
    share = names[label].mul_(likelihood)
    share.mul_((weight / share.sum(dim=1)).unsqueeze(1))
    counts.index_add_(0, label, share)


def _add_own_names(counts: Tensor, likelihood: Tensor, label: Tensor, weight: Tensor, names: Tensor) -> None:
    """Adds them to the true classes and to those by their own name (2, C); ``names`` has that one's probability."""
    other = ((1 - names) / max(len(names) - 1, 1)).clamp(min=1e-300)
    own = likelihood.gather(1, label.unsqueeze(1)).squeeze(1)
    by_name = own * names[label]
    more = by_name - own * other[label]
    each = weight / (likelihood @ other + more)
    counts[0] += (each @ likelihood) * other
    counts[0].index_add_(0, label, each * more)
    counts[1].index_add_(0, label, each * by_name)
