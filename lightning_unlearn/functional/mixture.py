"""A two-component Gaussian mixture on sums that ranks can add (RLAP, step 3).

No rank needs another rank's rows: each EM step reduces the weights, first and second moments of the two components, and
every rank solves for the same parameters.

**Memory.** A fit holds nothing per sample beside the rows and weights that it is given: 4 D + 4 bytes a sample in
float32, read and never copied. Its own memory does not grow with N: three chunks of ``CHUNK`` numbers (2 MiB each in
float32; on a GPU 64 MiB, being 16 times as long and in float64) and some ten matrices of 8 D^2 bytes. ``standardize``
writes another 4 D bytes a sample; ``posterior`` returns 16.

**Time.** In an EM step each row costs D^2 multiplications for its density under both components at once (``_shared``),
and at most another 0.6 D^2 for its second moment in the lighter component; that of the heavier one is the rest of the
total. Wide float32 rows are multiplied in float32, in coordinates in which all directions matter alike, and summed in
float64. Components of very unlike shape, and a GPU, take two products for either and float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.gaussian import Coordinates, GaussianMixture, coordinates_of, principal_coordinates
from lightning_unlearn.functional.standardization import chunk_length, in_chunks, weighted_mean, work_dtype
from lightning_unlearn.utilities.reduce import Reduce, no_reduce, reduce_together

SIMILAR = 1e-2
"""The same, down to which the moments of the heavier component are the difference of two sums."""


@dataclass(frozen=True, eq=False)
class _Moments:
    """Weight, first and second moments of the components about their last means, and the log-likelihood."""

    count: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor

    def reduced(self, reduce: Reduce) -> _Moments:
        """Return the same, summed over the ranks in one collective."""
        return _Moments(*reduce_together(reduce, self.count, self.first, self.second, self.log_likelihood))


def _add_scatter(total: Tensor, z: Tensor, share: Tensor, least: float, scratch: Tensor) -> None:
    """Add the sum of share x z z' over the rows with more than the least share to the upper triangle of (D, D).

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


def _total_covariance(rows: Tensor, weight: Tensor, mean: Tensor, center: Tensor, reduce: Reduce) -> Tensor:
    """Return the covariance (D, D) of the rows of all ranks, float64, computed around ``center`` in its precision."""
    total = torch.zeros(len(center), len(center), dtype=torch.float64, device=rows.device)
    scratch = center.new_empty(chunk_length(rows), len(center))
    for chunk, w in in_chunks(rows, weight):
        _add_scatter(total, chunk.to(center.dtype) - center, w, least=0.0, scratch=scratch[: len(chunk)])
    offset = mean - center
    flat = reduce(torch.cat([_symmetric(total).flatten(), weight.double().sum().reshape(1)]))
    return (flat[:-1] / flat[-1]).reshape(total.shape) - torch.outer(offset, offset)


Respond = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From coordinates (2, n, D), and (n, D) to write to, to probabilities (n, 2) and log-likelihoods (n,), in float64."""


def _moved(second: Tensor, first: Tensor, count: Tensor, step: Tensor) -> Tensor:
    """Return the second moment (D, D) about a point ``step`` (D,) further on."""
    cross = torch.outer(first, step)
    return second - cross - cross.T + count * torch.outer(step, step)


def _difference(total: _Moments, start: Tensor, part: _Moments, mean: Tensor, rest: int) -> Tensor:
    """Return the second moment (D, D) of component ``rest`` about its mean, from the total and the other component."""
    everything = _moved(total.second.sum(dim=0), total.first.sum(dim=0), total.count.sum(), mean[rest] - start[0])
    other = 1 - rest
    step = mean[rest] - mean[other]
    return everything - _moved(part.second[other], part.first[other], part.count[other], step)


def _moments(
    rows: Tensor,
    weight: Tensor,
    center: Tensor,
    coordinates: Coordinates,
    respond: Respond,
    least: Sequence[float] = (0.0, 0.0),
    only: int | None = None,
) -> _Moments:
    """Sum over this rank's rows, about the means of the coordinates.

    Shares up to ``least`` add no second moment; a component other than ``only`` gets none.
    """
    dimension, dtype = rows.shape[1], coordinates.matrix[0].dtype
    count = torch.zeros(2, dtype=torch.float64, device=rows.device)
    first, second = count.new_zeros(2, dimension), count.new_zeros(2, dimension, dimension)
    log_likelihood = count.new_zeros(1)
    # Used again by every chunk: to fetch and return this much memory each time can cost as much as the products.
    buffers = torch.empty(3, chunk_length(rows), dimension, dtype=dtype, device=rows.device)
    for chunk, chunk_weight in in_chunks(rows, weight):
        scratch = buffers[2, : len(chunk)]
        z = coordinates.of(torch.sub(chunk, center.to(dtype), out=scratch), out=buffers[:2, : len(chunk)])
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


def _maximize(moments: _Moments, mean: Tensor, reg_covar: float) -> GaussianMixture:
    """Return the mixture of the moments about ``mean`` (2, D)."""
    # The same guard as scikit-learn's against an empty component.
    count = moments.count + 10 * torch.finfo(torch.float64).eps
    step = moments.first / count.unsqueeze(1)
    covariance = moments.second / count.reshape(2, 1, 1) - step.unsqueeze(2) * step.unsqueeze(1)
    covariance.diagonal(dim1=1, dim2=2).add_(reg_covar)
    return GaussianMixture(weight=count / count.sum(), mean=mean + step, covariance=covariance)


def _expected(
    rows: Tensor, weight: Tensor, center: Tensor, mixture: GaussianMixture, total: _Moments, start: Tensor
) -> _Moments:
    """Return this rank's moments under the posterior of the mixture.

    ``total`` are its moments of any division of the rows, about ``start`` (2, D) twice the same.
    """
    coordinates = coordinates_of(mixture, center.dtype)

    def posterior(z: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = coordinates.log_prob(z, scratch)
        return log_prob.softmax(dim=1), log_prob.logsumexp(dim=1)

    # What is left out weighs less than the rounding of the component's own weight.
    least = (mixture.weight * torch.finfo(coordinates.matrix[0].dtype).eps).tolist()
    if not (coordinates.shared and coordinates.variance.min() > SIMILAR):
        return _moments(rows, weight, center, coordinates, posterior, least)
    # Decided and done before ranks are summed: another rank's library may round to the other side of the limit.
    heavy = int(mixture.weight.argmax())
    moments = _moments(rows, weight, center, coordinates, posterior, least, only=1 - heavy)
    moments.second[heavy] = _difference(total, start, moments, mixture.mean, heavy)
    return moments


def _halves(rows: Tensor, weight: Tensor, mean: Tensor, center: Tensor, reduce: Reduce) -> tuple[_Moments, Tensor]:
    """Return this rank's moments for each sign of the first principal component, and the means (2, D) they are about.

    ``mean`` is the mean of all rows. What is returned is seen from ``center``.
    """
    covariance = _total_covariance(rows, weight, mean, center, reduce)
    principal = principal_coordinates(covariance, mean - center, center.dtype)

    def side(z: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        above = (z[0][:, -1] > 0).double()
        return torch.stack([1 - above, above], dim=1), torch.zeros_like(above)

    return _moments(rows, weight, center, principal, side), principal.mean


def fit_mixture(
    rows: Tensor,
    weight: Tensor,
    *,
    reduce: Reduce = no_reduce,
    max_iter: int = 100,
    tol: float = 1e-3,
    reg_covar: float = 1e-6,
) -> GaussianMixture:
    """Fit two Gaussians with full covariance by expectation maximization.

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
            "The mixture needs finite evidence, but some rows are NaN or infinite. Check whether training has diverged."
        )
    dtype = work_dtype(rows)
    # From the mean on, since the difference of two large sums would lose the covariance. In the precision of the work,
    # so that every chunk sees the same center.
    center = mean.to(dtype)
    total, start = _halves(rows, weight, mean, center, reduce)
    mixture = _maximize(total.reduced(reduce), start, reg_covar)
    last = -math.inf
    for step in range(1, max_iter + 1):
        moments = _expected(rows, weight, center, mixture, total, start).reduced(reduce)
        mean_log_likelihood = (moments.log_likelihood / moments.count.sum()).item()
        converged = abs(mean_log_likelihood - last) < tol
        last = mean_log_likelihood
        mixture = replace(
            _maximize(moments, mixture.mean, reg_covar), log_likelihood=last, n_iter=step, converged=converged
        )
        if converged:
            break
    return replace(mixture, mean=mixture.mean + center)
