"""A two-component Gaussian mixture on sums that ranks can add (RLAP, step 3).

No rank needs another rank's rows: each EM step reduces the weights, first and second moments of the two components, and
every rank solves for the same parameters.

**Memory.** A fit holds nothing per sample beside the rows and weights that it is given: 4 D + 4 bytes a sample in
float32, read and never copied. Its own memory does not grow with N: three chunks of ``CHUNK`` numbers (2 MiB each in
float32; on a GPU 64 MiB, being 16 times as long and in float64) and some ten matrices of 8 D^2 bytes. ``standardise``
writes another 4 D bytes a sample; ``posterior`` returns 16.

**Time.** In an EM step each row costs D^2 multiplications for its density under both components at once (``_shared``),
and at most another 0.6 D^2 for its second moment in the lighter component; that of the heavier one is the rest of the
total. Wide float32 rows are multiplied in float32, in coordinates in which all directions matter alike, and summed in
float64. Components of very unlike shape, and a GPU, take two products for either and float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks; the identity on one process."""

CHUNK = 2**19
"""Numbers of the rows that are worked on at a time: 2,048 rows of 256, which stay in a CPU's cache."""

NARROWEST = 1e-6
"""Variance of one component in a direction, relative to both, below which they no longer share coordinates."""

SIMILAR = 1e-2
"""The same, down to which the moments of the heavier component are the difference of two sums."""


def no_reduce(total: Tensor) -> Tensor:
    """The sum over ranks where there is only one."""
    return total


def reduce_together(reduce: Reduce, *parts: Tensor) -> list[Tensor]:
    """Sums several tensors of one dtype over the ranks, each as it is, in one collective."""
    flat = reduce(torch.cat([part.flatten() for part in parts]))
    pieces = torch.split(flat, [part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


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
        chunks = [self.log_prob(chunk).softmax(dim=1) for (chunk,) in _chunks(rows)]
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
class _Coordinates:
    """Coordinates z = (x - mean) @ matrix in which the covariance of a component is diagonal.

    Args:
        matrix: (D, D) for each component, in the precision of the work; the same object where they share it.
        inverse: (D, D) float64 for each component.
        mean: (2, D) float64, of the components.
        variance: (2, D) float64, of the components along the coordinates.
        log_scale: (2,) float64, log of weight / sqrt(det of the covariance).
    """

    matrix: tuple[Tensor, Tensor]
    inverse: tuple[Tensor, Tensor]
    mean: Tensor
    variance: Tensor
    log_scale: Tensor

    @property
    def shared(self) -> bool:
        """Whether both components have the same coordinates."""
        return self.matrix[0] is self.matrix[1]

    def of(self, x: Tensor, out: Tensor) -> Tensor:
        """The coordinates (2, n, D) of rows (n, D), written to ``out``."""
        first, second = (self.mean[k].to(x.dtype) @ self.matrix[k] for k in range(2))
        torch.mm(x, self.matrix[0], out=out[0])
        if self.shared:
            torch.sub(out[0], second, out=out[1])
        else:
            torch.mm(x, self.matrix[1], out=out[1]).sub_(second)
        out[0].sub_(first)
        return out

    def log_prob(self, z: Tensor, scratch: Tensor) -> Tensor:
        """Log of weight x density of each component, (n, 2) float64; ``scratch`` (n, D) is written to."""
        scale = self.variance.reciprocal().to(z.dtype)
        distance = torch.stack([torch.mul(z[k], z[k], out=scratch) @ scale[k] for k in range(2)], dim=1)
        return self.log_scale - 0.5 * (distance.double() + z.shape[2] * math.log(2 * math.pi))


def _separate(mixture: GaussianMixture) -> _Coordinates:
    """Coordinates of its own for each component, in float64: right for any two covariances that can be factorised."""
    factor = torch.linalg.cholesky(mixture.covariance)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    matrix = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).mT.contiguous()
    log_scale = mixture.weight.log() - factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    inverse = (factor[0].T, factor[1].T)
    return _Coordinates((matrix[0], matrix[1]), inverse, mixture.mean, torch.ones_like(mixture.mean), log_scale)


def _shared(mixture: GaussianMixture, dtype: torch.dtype) -> _Coordinates | None:
    """Coordinates in which both covariances are diagonal and their weighted sum is the identity.

    One product instead of two then serves both components. None where one of them is so narrow against the other that
    its variance would be lost.
    """
    pooled = (mixture.weight.reshape(2, 1, 1) * mixture.covariance).sum(dim=0)
    factor, failed = torch.linalg.cholesky_ex(pooled)
    if failed or not pooled.isfinite().all():
        return None
    half = torch.linalg.solve_triangular(factor, mixture.covariance[0], upper=False)
    _, rotation = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    matrix = torch.linalg.solve_triangular(factor.T, rotation, upper=True)
    variance = torch.stack([((covariance @ matrix) * matrix).sum(dim=0) for covariance in mixture.covariance])
    if not variance.min() > NARROWEST:
        return None
    log_scale = mixture.weight.log() - 0.5 * variance.log().sum(dim=1) - factor.diagonal().log().sum()
    cast, inverse = matrix.to(dtype), rotation.T @ factor.T
    return _Coordinates((cast, cast), (inverse, inverse), mixture.mean, variance, log_scale)


def _coordinates(mixture: GaussianMixture, dtype: torch.dtype) -> _Coordinates:
    # On a GPU the eigenvectors would take longer than the product that they save.
    shared = _shared(mixture, dtype) if mixture.mean.device.type == "cpu" else None
    return _separate(mixture) if shared is None else shared


def _principal(covariance: Tensor, mean: Tensor, dtype: torch.dtype) -> _Coordinates:
    """Principal components, scaled to variance 1 where they have one; the last is the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    # An eigenvector's sign is the solver's choice, which another rank's library may make otherwise.
    axis = vectors[:, -1]
    vectors[:, -1] = axis * axis[axis.abs().argmax()].sign()
    scale = values.clamp(min=max(1e-6 * values[-1].item(), 1e-12)).sqrt()
    matrix, inverse = (vectors / scale).to(dtype), (vectors * scale).T
    variance = torch.ones(2, len(values), dtype=torch.float64, device=values.device)
    return _Coordinates((matrix, matrix), (inverse, inverse), mean.expand(2, -1), variance, variance.new_zeros(2))


@dataclass(frozen=True, eq=False)
class _Moments:
    """Weight, first and second moments of the components about their last means, and the log-likelihood."""

    count: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor

    def reduced(self, reduce: Reduce) -> _Moments:
        """The same, summed over the ranks in one collective."""
        return _Moments(*reduce_together(reduce, self.count, self.first, self.second, self.log_likelihood))


def _chunk_length(rows: Tensor) -> int:
    """Rows that are worked on at a time."""
    # A GPU is kept busy by more rows only.
    numbers = CHUNK if rows.device.type == "cpu" else 16 * CHUNK
    return min(max(1, len(rows)), max(1, numbers // max(1, rows[:1].numel())))


def _chunks(rows: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors, about ``CHUNK`` numbers of the first at a time."""
    length = _chunk_length(rows)
    return zip(*(torch.split(tensor, length) for tensor in (rows, *tensors)), strict=True)


def _work_dtype(rows: Tensor) -> torch.dtype:
    """Float32 for wide float32 rows on a CPU, which halves the time; else float64.

    Not where the user lets float32 products be rounded to bfloat16, found by trying, as there are several settings.
    """
    dimension = rows.shape[1]
    if rows.dtype == torch.float64 or dimension < 32 or rows.device.type != "cpu":
        return torch.float64
    fine = torch.full((256, dimension), 1 + 2.0**-12)
    return torch.float32 if (fine @ torch.eye(dimension)).equal(fine) else torch.float64


def _add_scatter(total: Tensor, z: Tensor, share: Tensor, least: float, scratch: Tensor) -> None:
    """Adds the sum of share x z z' over the rows with more than the least share to the upper triangle of (D, D).

    ``scratch`` (n, D) is written to.
    """
    block = z.shape[1]
    if z.device.type == "cpu":  # where picking rows does not have to wait for the device, and products are the cost
        block = 64
        kept = (share > least).nonzero().squeeze(1)
        share = share[kept]
        z = torch.index_select(z, 0, kept, out=scratch[: len(kept)])
    z = torch.mul(z, share.sqrt().to(z.dtype).unsqueeze(1), out=scratch[: len(z)])
    for first in range(0, z.shape[1], block):
        total[first : first + block, first:] += z[:, first : first + block].T @ z[:, first:]


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def weighted_mean(rows: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the rows of all ranks, and the sum () of their weights, in float64.

    Args:
        rows: (n, D).
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.
    """
    total = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for chunk, w in _chunks(rows, weight.double()):
        total += torch.cat([w @ chunk.double(), w.sum().reshape(1)])
    total = reduce(total)
    return total[:-1] / total[-1], total[-1]


def _total_covariance(rows: Tensor, weight: Tensor, mean: Tensor, centre: Tensor, reduce: Reduce) -> Tensor:
    """Covariance (D, D) of the rows of all ranks, in float64; the work is done from ``centre``, in its precision."""
    total = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=rows.device)
    scratch = centre.new_empty(_chunk_length(rows), len(centre))
    for chunk, w in _chunks(rows, weight):
        _add_scatter(total, chunk.to(centre.dtype) - centre, w, least=0.0, scratch=scratch[: len(chunk)])
    offset = mean - centre
    flat = reduce(torch.cat([_symmetric(total).flatten(), weight.double().sum().reshape(1)]))
    return (flat[:-1] / flat[-1]).reshape(total.shape) - torch.outer(offset, offset)


Respond = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From coordinates (2, n, D), and (n, D) to write to, to probabilities (n, 2) and log-likelihoods (n,), in float64."""


def _moved(second: Tensor, first: Tensor, count: Tensor, step: Tensor) -> Tensor:
    """The second moment (D, D) about a point ``step`` (D,) further on."""
    cross = torch.outer(first, step)
    return second - cross - cross.T + count * torch.outer(step, step)


def _difference(total: _Moments, start: Tensor, part: _Moments, mean: Tensor, rest: int) -> Tensor:
    """Second moment (D, D) of component ``rest`` about its mean, from this rank's total and the other component."""
    everything = _moved(total.second.sum(dim=0), total.first.sum(dim=0), total.count.sum(), mean[rest] - start[0])
    other = 1 - rest
    step = mean[rest] - mean[other]
    return everything - _moved(part.second[other], part.first[other], part.count[other], step)


def _moments(
    rows: Tensor,
    weight: Tensor,
    centre: Tensor,
    coordinates: _Coordinates,
    respond: Respond,
    least: Sequence[float] = (0.0, 0.0),
    only: int | None = None,
) -> _Moments:
    """Sums over this rank's rows, about the means of the coordinates.

    Shares up to ``least`` add no second moment; a component other than ``only`` gets none.
    """
    dimension, dtype = rows.shape[1], coordinates.matrix[0].dtype
    count = torch.zeros(2, dtype=torch.float64, device=rows.device)
    first, second = count.new_zeros(2, dimension), count.new_zeros(2, dimension, dimension)
    log_likelihood = count.new_zeros(1)
    # Used again by every chunk: to fetch and return this much memory each time can cost as much as the products.
    buffers = torch.empty(3, _chunk_length(rows), dimension, dtype=dtype, device=rows.device)
    for chunk, chunk_weight in _chunks(rows, weight):
        scratch = buffers[2, : len(chunk)]
        z = coordinates.of(torch.sub(chunk, centre.to(dtype), out=scratch), out=buffers[:2, : len(chunk)])
        share, log_prob = respond(z, scratch)
        w = chunk_weight.double()
        share = share * w.unsqueeze(1)
        count += share.sum(dim=0)
        log_likelihood += (log_prob * w).sum()
        for k in range(2):
            first[k] += share[:, k].to(dtype) @ z[k]
            if only in {None, k}:
                _add_scatter(second[k], z[k], share[:, k], least[k], scratch)
    # Back at once: another rank's library may have chosen other coordinates.
    inverse = torch.stack(coordinates.inverse)
    first = (first.unsqueeze(1) @ inverse).squeeze(1)
    return _Moments(count, first, inverse.mT @ _symmetric(second) @ inverse, log_likelihood)


def _maximise(moments: _Moments, mean: Tensor, reg_covar: float) -> GaussianMixture:
    """The mixture of the moments about ``mean`` (2, D)."""
    # The same guard as scikit-learn's against an empty component.
    count = moments.count + 10 * torch.finfo(torch.float64).eps
    step = moments.first / count.unsqueeze(1)
    covariance = moments.second / count.reshape(2, 1, 1) - step.unsqueeze(2) * step.unsqueeze(1)
    covariance.diagonal(dim1=1, dim2=2).add_(reg_covar)
    return GaussianMixture(weight=count / count.sum(), mean=mean + step, covariance=covariance)


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
    mean, count = weighted_mean(rows, weight, reduce)
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


def _expected(
    rows: Tensor, weight: Tensor, centre: Tensor, mixture: GaussianMixture, total: _Moments, start: Tensor
) -> _Moments:
    """This rank's moments under the posterior of the mixture.

    ``total`` are its moments of any division of the rows, about ``start`` (2, D) twice the same.
    """
    coordinates = _coordinates(mixture, centre.dtype)

    def posterior(z: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = coordinates.log_prob(z, scratch)
        return log_prob.softmax(dim=1), log_prob.logsumexp(dim=1)

    # What is left out weighs less than the rounding of the component's own weight.
    least = (mixture.weight * torch.finfo(coordinates.matrix[0].dtype).eps).tolist()
    if not (coordinates.shared and coordinates.variance.min() > SIMILAR):
        return _moments(rows, weight, centre, coordinates, posterior, least)
    # Decided and done before ranks are summed: another rank's library may round to the other side of the limit.
    heavy = int(mixture.weight.argmax())
    moments = _moments(rows, weight, centre, coordinates, posterior, least, only=1 - heavy)
    moments.second[heavy] = _difference(total, start, moments, mixture.mean, heavy)
    return moments


def _halves(rows: Tensor, weight: Tensor, mean: Tensor, centre: Tensor, reduce: Reduce) -> tuple[_Moments, Tensor]:
    """This rank's moments for each sign of the first principal component, and the means (2, D) that they are about.

    ``mean`` is the mean of all rows. What is returned is seen from ``centre``.
    """
    covariance = _total_covariance(rows, weight, mean, centre, reduce)
    principal = _principal(covariance, mean - centre, centre.dtype)

    def side(z: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        above = (z[0][:, -1] > 0).double()
        return torch.stack([1 - above, above], dim=1), torch.zeros_like(above)

    return _moments(rows, weight, centre, principal, side), principal.mean


def fit_mixture(
    rows: Tensor,
    weight: Tensor,
    *,
    reduce: Reduce = no_reduce,
    max_iter: int = 100,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
) -> GaussianMixture:
    """Fits two Gaussians with full covariance by expectation maximization.

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
    rows = rows.detach()
    mean, _ = weighted_mean(rows, weight, reduce)
    if not mean.isfinite().all():  # as NaN and infinity leave no sum finite, on any rank
        raise ValueError(
            "The mixture needs finite evidence, but some rows hold NaN or infinity: has training diverged?"
        )
    dtype = _work_dtype(rows)
    # From the mean on, since the difference of two large sums would lose the covariance. In the precision of the work,
    # so that every chunk sees the same center.
    centre = mean.to(dtype)
    total, start = _halves(rows, weight, mean, centre, reduce)
    mixture = _maximise(total.reduced(reduce), start, reg_covar)
    last = -math.inf
    for step in range(1, max_iter + 1):
        moments = _expected(rows, weight, centre, mixture, total, start).reduced(reduce)
        mean_log_likelihood = (moments.log_likelihood / moments.count.sum()).item()
        converged = abs(mean_log_likelihood - last) < tol
        last = mean_log_likelihood
        mixture = replace(
            _maximise(moments, mixture.mean, reg_covar), log_likelihood=last, n_iter=step, converged=converged
        )
        if converged:
            break
    return replace(mixture, mean=mixture.mean + centre)
