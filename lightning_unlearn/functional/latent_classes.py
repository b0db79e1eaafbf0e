"""Latent true classes: a Gaussian mixture with one component per class, observed through noisy labels.

A sample has a true class k, drawn from the prior. Its evidence x, the class attributions during training, is Gaussian
around the mean of class k, whatever its label. The given label is drawn from row k of the transition matrix.
Expectation maximization fits all parameters from ``(x, given label)`` alone, without a noise mask, a clean set or a
known noise rate.

This detects noise that margins do not show. If two in five samples of every class c are labeled c + 1, a network that
has learned this predicts both c and c + 1 for every sample of class c. The margin then does not show whether the label
is correct, but the *pair* of large classes does, and the class means capture it. Lee et al. (2019, "Robust inference
via generative classifiers") fit Gaussian classes to the features of a trained network; here the rows are class
attributions during training, and the transition matrix is fitted jointly.

Every step reduces sums over ranks: counts (C, C), first moments (C, d), and second moments (C, d, d), or (d, d) for
many classes. Per sample only the given rows, labels and weights are stored: 4 d + 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_unlearn.functional.standardization import weighted_mean
from lightning_unlearn.functional.transition import LogTransition, smoothed
from lightning_unlearn.utilities.chunks import row_chunks, rows_at_a_time, softmax
from lightning_unlearn.utilities.reduce import Reduce, no_reduce, reduce_together

OWN_COVARIANCE = 0.2
"""How far the covariance of a large class is its own; the rest is the one that all classes share."""

MOST_MOMENTS = 2**20
"""Numbers of the classes' own second moments, above which there is only the shared one."""

_RIDGE = 1e-3
# Share of the total variance below which the variance within classes is rounding.
_ROUNDING = 1e-9
_STEPS = 5


@dataclass(frozen=True, eq=False)
class LatentClasses:
    """Gaussian classes and their noise transition matrix.

    Args:
        prior: (C,) float64, share of each true class.
        mean: (C, d) float64, class means.
        factor: (C, d, d) float64, or (1, d, d) for all of them: lower Cholesky factor of the covariance.
        transition: (C, C) float64, row k holds the probabilities of each label for true class k.
    """

    prior: Tensor
    mean: Tensor
    factor: Tensor
    transition: Tensor

    def log_likelihood(self, rows: Tensor) -> Tensor:
        """Return the log of prior x density of each true class, whatever the label.

        Args:
            rows: (n, d).

        Returns:
            (n, C) float64.
        """
        out = rows.new_empty(len(rows), len(self.prior), dtype=torch.float64)
        length = rows_at_a_time(self._numbers, rows.device)
        for chunk, into in zip(torch.split(rows, length), torch.split(out, length), strict=True):
            into.copy_(self._of_chunk(chunk.double()))
        return out

    def _of_chunk(self, x: Tensor) -> Tensor:
        if len(self.factor) == 1:
            # In one product: half the squared distance is that of the two to the origin less their scalar product.
            whitened = _whiten(x, self.factor[0])
            means, constant = self._whitened
            log_density = torch.addmm(constant, whitened, means.T)
            return log_density.sub_(0.5 * whitened.square().sum(1, keepdim=True))
        # All classes in one product, with a row for each class and coordinate, along which sums are fast.
        matrix, offset = self._whitening
        squares = torch.addmm(offset, matrix, x.T).square_().reshape(*self.mean.shape, len(x)).sum(dim=1)
        return squares.mul_(-0.5).T.add_(self._constant)

    @property
    def _numbers(self) -> int:
        """How many are worked on for a row."""
        return len(self.prior) if len(self.factor) == 1 else own_numbers(*self.mean.shape)

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """(C d, d) and (C d, 1): where the covariance of each class is one, and less its mean."""
        inverse = torch.linalg.solve_triangular(self.factor, torch.eye(self.mean.shape[1]).to(self.factor), upper=False)
        return inverse.flatten(0, 1), -(inverse @ self.mean.unsqueeze(2)).flatten(0, 1)

    @cached_property
    def _constant(self) -> Tensor:
        """(C,), what does not depend on the row."""
        half_log_det = self.factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.prior.clamp(min=1e-300).log() - half_log_det - 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        """The means (C, d) where the covariance is one, and the constant less half of their squared length."""
        means = _whiten(self.mean, self.factor[0])
        return means, self._constant - 0.5 * means.square().sum(1)


def _whiten(x: Tensor, factor: Tensor) -> Tensor:
    whitened: Tensor = torch.linalg.solve_triangular(factor, x.T, upper=False).T
    return whitened


def own_numbers(num_classes: int, dimension: int) -> int:
    """Return how many numbers a row takes if classes have their own covariance: its whitened self, and squares."""
    return 2 * num_classes * dimension


def fit_latent_classes(
    rows: Tensor,
    label: Tensor,
    weight: Tensor,
    start: Callable[[Tensor], Tensor],
    num_classes: int,
    *,
    reduce: Reduce = no_reduce,
) -> LatentClasses:
    """Fit the classes by expectation maximization.

    Args:
        rows: (n, d), this rank's rows; finite.
        label: (n,) int64, the given labels.
        weight: (n,), 0 for a row that does not count.
        start: from rows (m, d) to a first guess (m, C) of the probabilities of the true classes.
        num_classes: C.
        reduce: sums over the ranks.

    Returns:
        the classes, the same on every rank.

    Raises:
        ValueError: on rows that are not finite, on every rank alike.

    Example:
        >>> rows = torch.tensor([[-1.0], [-1.2], [-0.8], [1.0], [1.2], [0.8]])
        >>> label = torch.tensor([0, 0, 1, 1, 1, 1])  # the third is wrong
        >>> sides = lambda x: torch.stack([x[:, 0] < 0, x[:, 0] > 0], dim=1).double()
        >>> fit_latent_classes(rows, label, torch.ones(6), sides, 2).transition.round(decimals=1)
        tensor([[0.6000, 0.4000],
                [0.1000, 0.9000]], dtype=torch.float64)
    """
    dimension = rows.shape[1]
    own = num_classes * dimension**2 <= MOST_MOMENTS
    # From the mean on, since the difference of two large sums would lose the covariance.
    center, _ = weighted_mean(rows, weight, reduce)
    if not center.isfinite().all():  # as NaN and infinity leave no sum finite, on any rank
        raise ValueError(
            "Latent classes need finite evidence, but some rows are NaN or infinite. Check whether training"
            " has diverged."
        )

    def first_guess(x: Tensor, y: Tensor) -> Tensor:
        return start(x + center).to(torch.float64, copy=True)  # as it is weighted in place

    classes = _maximize(_moments(rows, center, (label, weight), first_guess, num_classes, own), reduce)
    for _ in range(_STEPS - 1):
        names = LogTransition(classes.transition)

        def expected(x: Tensor, y: Tensor, current: LatentClasses = classes, names: LogTransition = names) -> Tensor:
            return softmax(names.joint(current._of_chunk(x), y))

        classes = _maximize(_moments(rows, center, (label, weight), expected, num_classes, own), reduce)
    return LatentClasses(classes.prior, classes.mean + center, classes.factor, classes.transition)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Counts (C, C) of names and true classes, first (C, d) and second (C or 1, d, d) moments."""

    counts: Tensor
    first: Tensor
    second: Tensor


def _moments(
    rows: Tensor,
    center: Tensor,
    label_and_weight: tuple[Tensor, Tensor],
    share_of: Callable[[Tensor, Tensor], Tensor],
    num_classes: int,
    own: bool,
) -> _Moments:
    """Sum over this rank's rows, seen from ``center``; ``share_of`` maps such rows and labels to (m, C)."""
    dimension = rows.shape[1]
    zeros = rows.new_zeros
    numbers = own_numbers(num_classes, dimension) if own else num_classes
    counts = zeros(num_classes, num_classes, dtype=torch.float64)
    first = zeros(num_classes, dimension, dtype=torch.float64)
    second = zeros(num_classes if own else 1, dimension, dimension, dtype=torch.float64)
    for chunk, y, w in row_chunks(numbers, rows, *label_and_weight):
        x = chunk.double() - center
        share = share_of(x, y).mul_(w.double().unsqueeze(1))
        counts.index_add_(0, y, share)
        first += share.T @ x
        # With a row for each class and coordinate, so that one product serves all classes.
        by, columns = (share.T if own else w.double().unsqueeze(0)).contiguous(), x.T.contiguous()
        second.flatten(0, 1).addmm_((by.unsqueeze(1) * columns).flatten(0, 1), columns.T)
    return _Moments(counts, first, second)


def _maximize(part: _Moments, reduce: Reduce) -> LatentClasses:
    counts, first, second = reduce_together(reduce, part.counts, part.first, part.second)
    number = counts.sum(dim=0)
    # A class without samples keeps the overall mean and covariance: nothing is drawn to it, nothing divides by zero.
    present = number > 1e-6
    mean = torch.where(present.unsqueeze(1), first / number.clamp(min=1e-6).unsqueeze(1), 0)
    dimension, samples = first.shape[1], number.sum()
    between = torch.einsum("k,kd,ke->de", number, mean, mean)
    shared = (second.sum(dim=0) - between) / samples
    # What classes that do not vary leave is the rounding of two large sums, which may be less than nothing.
    rounding = _ROUNDING * second.sum(dim=0).diagonal().abs().sum() / samples / dimension
    shared.diagonal().add_((_RIDGE * shared.trace() / dimension).clamp(min=rounding.clamp(min=1e-12)))
    covariance = shared.unsqueeze(0)
    if len(second) == len(number):
        within = second / number.clamp(min=1e-6).reshape(-1, 1, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
        trust = (OWN_COVARIANCE * number / (number + dimension)).reshape(-1, 1, 1)
        covariance = torch.where(present.reshape(-1, 1, 1), trust * within + (1 - trust) * shared, shared)
    return LatentClasses(number / samples, mean, torch.linalg.cholesky(covariance), smoothed(counts))
