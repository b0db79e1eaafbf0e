"""A two-component Gaussian mixture on sums that ranks can add (RLAP, step 3).

No rank needs another rank's rows: each EM step reduces the weights, first and second moments of the two components, and
every rank solves for the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks; the identity on one process."""

CHUNK = 16_384
"""Rows that are held in double precision at a time."""


def no_reduce(total: Tensor) -> Tensor:
    """The sum over ranks where there is only one."""
    return total


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Two Gaussians with full covariance.

    Args:
        weight: (2,) float64, share of each component.
        mean: (2, D) float64.
        covariance: (2, D, D) float64.
        log_likelihood: mean log-likelihood per sample, in nats.
        n_iter: EM steps made.
        converged: whether the last step gained less than the tolerance.
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor
    log_likelihood: float = -math.inf
    n_iter: int = 0
    converged: bool = False

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log of weight x density of each component.

        Args:
            rows: (n, D).

        Returns:
            (n, 2) float64.
        """
        factor = torch.linalg.cholesky(self.covariance)
        dimension = rows.shape[1]
        out = []
        for component in range(2):
            centred = (rows.double() - self.mean[component]).T
            whitened = torch.linalg.solve_triangular(factor[component], centred, upper=False)
            half_log_det = factor[component].diagonal().log().sum()
            out.append(
                self.weight[component].log()
                - half_log_det
                - 0.5 * (dimension * math.log(2 * math.pi) + whitened.square().sum(dim=0))
            )
        return torch.stack(out, dim=1)

    def posterior(self, rows: Tensor) -> Tensor:
        """Probability of each component.

        Args:
            rows: (n, D).

        Returns:
            (n, 2) float64, rows summing to 1.
        """
        chunks = [self.log_prob(chunk).softmax(dim=1) for chunk in torch.split(rows, CHUNK)]
        return torch.cat(chunks) if chunks else rows.new_zeros(0, 2, dtype=torch.float64)

    def posterior_monotone(self, rows: Tensor, component: int) -> Tensor:
        """Probability of one component of a one-dimensional mixture, made monotone in the data.

        With unequal variances the wider component wins in *both* tails, so that the strongest evidence for one side
        would count for the other. The log-odds are a parabola; past its vertex, on the side where it turns back, they
        are held at the vertex's value.

        Args:
            rows: (n, 1).
            component: the component asked for, 0 or 1.

        Returns:
            (n,) float64, rising with the data if this component has the larger mean, else falling.
        """
        if rows.ndim != 2 or rows.shape[1] != 1:
            raise ValueError(f"Expected rows of shape (n, 1), but got {tuple(rows.shape)}.")
        x = rows.double().squeeze(1)
        other = 1 - component
        mean, variance = self.mean.squeeze(1), self.covariance.reshape(2)
        curvature = 0.5 * (1 / variance[other] - 1 / variance[component])
        if curvature != 0:
            slope = mean[component] / variance[component] - mean[other] / variance[other]
            vertex = -slope / (2 * curvature)
            rising = mean[component] > mean[other]
            # The parabola opens upwards for curvature > 0: its falling half lies below the vertex, else above it.
            turns_below = (curvature > 0) == rising
            x = x.clamp(min=vertex) if turns_below else x.clamp(max=vertex)
        log_prob = self.log_prob(x.unsqueeze(1))
        return (log_prob[:, component] - log_prob[:, other]).sigmoid()


@dataclass(frozen=True, eq=False)
class _Moments:
    """Weight, first and second moments of the components, and the log-likelihood under the last parameters."""

    count: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor

    def reduced(self, reduce: Reduce) -> _Moments:
        """The same, summed over the ranks in one collective."""
        parts = (self.count, self.first, self.second, self.log_likelihood)
        flat = reduce(torch.cat([part.flatten() for part in parts]))
        pieces = torch.split(flat, [part.numel() for part in parts])
        return _Moments(*(piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors, ``CHUNK`` at a time."""
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


def _weighted_mean(rows: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the rows of all ranks, and the sum () of their weights, in float64."""
    total = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for chunk, w in _chunks(rows, weight.double()):
        total += torch.cat([w @ chunk.double(), w.sum().reshape(1)])
    total = reduce(total)
    return total[:-1] / total[-1], total[-1]


def _moments(
    rows: Tensor, weight: Tensor, responsibility: Callable[[Tensor], tuple[Tensor, Tensor]], centre: Tensor
) -> _Moments:
    """Sums over this rank's rows, seen from ``centre``.

    ``responsibility`` maps such rows to (n, 2) probabilities and (n,) log-likelihoods.
    """
    dimension = rows.shape[1]
    count = torch.zeros(2, dtype=torch.float64, device=rows.device)
    first, second = count.new_zeros(2, dimension), count.new_zeros(2, dimension, dimension)
    log_likelihood = count.new_zeros(1)
    for chunk, chunk_weight in _chunks(rows, weight):
        x, w = chunk.double() - centre, chunk_weight.double()
        share, log_prob = responsibility(x)
        share = share * w.unsqueeze(1)
        count += share.sum(dim=0)
        first += share.T @ x
        for component in range(2):
            second[component] += (x * share[:, component : component + 1]).T @ x
        log_likelihood += (log_prob * w).sum()
    return _Moments(count, first, second, log_likelihood)


def _maximise(moments: _Moments, reg_covar: float) -> GaussianMixture:
    # The same guard as scikit-learn's against an empty component.
    count = moments.count + 10 * torch.finfo(torch.float64).eps
    mean = moments.first / count.unsqueeze(1)
    covariance = moments.second / count.reshape(2, 1, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
    covariance.diagonal(dim1=1, dim2=2).add_(reg_covar)
    return GaussianMixture(weight=count / count.sum(), mean=mean, covariance=covariance)


def standardise(rows: Tensor, weight: Tensor, reduce: Reduce = no_reduce) -> Tensor:
    """Columns with mean 0 and standard deviation 1 over all ranks; constant columns become 0.

    Args:
        rows: (n, D).
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        (n, D) in the dtype of ``rows``.

    Example:
        >>> standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.ones(2))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    mean, count = _weighted_mean(rows, weight, reduce)
    # The variance around the mean, not the difference of two large sums, which would lose small variances.
    squares = torch.zeros_like(mean)
    for chunk, w in _chunks(rows, weight.double()):
        squares += w @ (chunk.double() - mean).square()
    scale = (reduce(squares) / count).sqrt()
    scale = torch.where(scale > 1e-12 * mean.abs().clamp(min=1e-300), scale, torch.inf)
    standardised = torch.empty_like(rows)
    for chunk, out in _chunks(rows, standardised):
        out.copy_((chunk - mean) / scale)
    return standardised


def fit_mixture(
    rows: Tensor,
    weight: Tensor,
    *,
    reduce: Reduce = no_reduce,
    max_iter: int = 100,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
) -> GaussianMixture:
    """Fits two Gaussians with full covariance by expectation maximisation.

    The start is deterministic and the same for every sharding of the data: the sign of the projection on the first
    principal component, which like everything else comes from summed moments.

    Args:
        rows: (n, D), this rank's rows.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.
        max_iter: most EM steps.
        tol: gain of the mean log-likelihood, in nats, below which the fit has converged.
        reg_covar: added to the diagonal of the covariances. The defaults are those of scikit-learn.

    Returns:
        the mixture, the same on every rank.

    Raises:
        ValueError: on rows that are not finite, on every rank alike.

    Example:
        >>> rows = torch.tensor([[-2.1], [-2.0], [-1.9], [1.9], [2.0], [2.1]])
        >>> fit_mixture(rows, torch.ones(6)).mean.flatten().sort().values.round(decimals=3)
        tensor([-2.,  2.], dtype=torch.float64)
    """
    if reduce((~rows.isfinite()).any().double().reshape(1)).item() > 0:
        raise ValueError(
            "The mixture needs finite evidence, but some rows hold NaN or infinity: has training diverged?"
        )

    def whole(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_tensor([1.0, 0.0]).expand(len(x), 2), x.new_zeros(len(x))

    # From the mean on, since the difference of two large sums would lose the covariance.
    centre, _ = _weighted_mean(rows, weight, reduce)
    start = _maximise(_moments(rows, weight, whole, centre).reduced(reduce), reg_covar=0.0)
    axis = torch.linalg.eigh(start.covariance[0]).eigenvectors[:, -1]
    # An eigenvector's sign is the solver's choice, which another rank's library may make otherwise.
    axis = axis * axis[axis.abs().argmax()].sign()

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        above = (x @ axis > 0).to(x.dtype)
        return torch.stack([1 - above, above], dim=1), x.new_zeros(len(x))

    mixture = _maximise(_moments(rows, weight, halves, centre).reduced(reduce), reg_covar)
    last = -math.inf
    for step in range(1, max_iter + 1):

        def expected(x: Tensor, current: GaussianMixture = mixture) -> tuple[Tensor, Tensor]:
            log_prob = current.log_prob(x)
            return log_prob.softmax(dim=1), log_prob.logsumexp(dim=1)

        moments = _moments(rows, weight, expected, centre).reduced(reduce)
        mean_log_likelihood = (moments.log_likelihood / moments.count.sum()).item()
        converged = abs(mean_log_likelihood - last) < tol
        last = mean_log_likelihood
        updated = _maximise(moments, reg_covar)
        mixture = GaussianMixture(updated.weight, updated.mean, updated.covariance, last, step, converged)
        if converged:
            break
    return replace(mixture, mean=mixture.mean + centre)
