"""Two Gaussians: densities and posterior probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.standardization import in_chunks

NARROWEST = 1e-6
"""Variance of one component in a direction, relative to both, below which they no longer share coordinates."""


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Two Gaussians with full covariance.

    Args:
        weight: (2,) float64, share of each component.
        mean: (2, D) float64.
        covariance: (2, D, D) float64.
        log_likelihood: mean log-likelihood per sample, in nats.
        n_iter: number of EM steps.
        converged: whether the last step gained less than the tolerance.
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor
    log_likelihood: float = -math.inf
    n_iter: int = 0
    converged: bool = False

    def log_prob(self, rows: Tensor) -> Tensor:
        """Return the log of weight x density of each component.

        Args:
            rows: (n, D).

        Returns:
            (n, 2) float64.
        """
        factor = torch.linalg.cholesky(self.covariance)
        dimension = rows.shape[1]
        out = []
        for component in range(2):
            centered = (rows.double() - self.mean[component]).T
            whitened = torch.linalg.solve_triangular(factor[component], centered, upper=False)
            half_log_det = factor[component].diagonal().log().sum()
            out.append(
                self.weight[component].log()
                - half_log_det
                - 0.5 * (dimension * math.log(2 * math.pi) + whitened.square().sum(dim=0))
            )
        return torch.stack(out, dim=1)

    def posterior(self, rows: Tensor) -> Tensor:
        """Return the probability of each component.

        Args:
            rows: (n, D).

        Returns:
            (n, 2) float64, rows summing to 1.
        """
        chunks = [self.log_prob(chunk).softmax(dim=1) for (chunk,) in in_chunks(rows)]
        return torch.cat(chunks) if chunks else rows.new_zeros(0, 2, dtype=torch.float64)

    def posterior_monotone(self, rows: Tensor, component: int) -> Tensor:
        """Return the probability of one component of a one-dimensional mixture, made monotone in the data.

        With unequal variances the wider component is more probable in *both* tails, so the strongest evidence for one
        component would count for the other. The log-odds are a parabola; beyond its vertex, on the side where it turns
        back, they are clamped to the value at the vertex.

        Args:
            rows: (n, 1).
            component: the component, 0 or 1.

        Returns:
            (n,) float64, increasing in the data if this component has the larger mean, else decreasing.
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
class Coordinates:
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
        """Return the coordinates (2, n, D) of rows (n, D), written to ``out``."""
        first, second = (self.mean[k].to(x.dtype) @ self.matrix[k] for k in range(2))
        torch.mm(x, self.matrix[0], out=out[0])
        if self.shared:
            torch.sub(out[0], second, out=out[1])
        else:
            torch.mm(x, self.matrix[1], out=out[1]).sub_(second)
        out[0].sub_(first)
        return out

    def log_prob(self, z: Tensor, scratch: Tensor) -> Tensor:
        """Return the log of weight x density of each component, (n, 2) float64; ``scratch`` (n, D) is written to."""
        scale = self.variance.reciprocal().to(z.dtype)
        distance = torch.stack([torch.mul(z[k], z[k], out=scratch) @ scale[k] for k in range(2)], dim=1)
        return self.log_scale - 0.5 * (distance.double() + z.shape[2] * math.log(2 * math.pi))


def _separate(mixture: GaussianMixture) -> Coordinates:
    """Return coordinates for each component, in float64: right for any two covariances that can be factorized."""
    factor = torch.linalg.cholesky(mixture.covariance)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    matrix = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).mT.contiguous()
    log_scale = mixture.weight.log() - factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    inverse = (factor[0].T, factor[1].T)
    return Coordinates((matrix[0], matrix[1]), inverse, mixture.mean, torch.ones_like(mixture.mean), log_scale)


def _shared(mixture: GaussianMixture, dtype: torch.dtype) -> Coordinates | None:
    """Return coordinates in which both covariances are diagonal and their weighted sum is the identity.

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
    return Coordinates((cast, cast), (inverse, inverse), mixture.mean, variance, log_scale)


def coordinates_of(mixture: GaussianMixture, dtype: torch.dtype) -> Coordinates:
    """Return the coordinates in which both components are evaluated: shared ones where accurate and fast."""
    # On a GPU the eigenvectors would take longer than the product that they save.
    shared = _shared(mixture, dtype) if mixture.mean.device.type == "cpu" else None
    return _separate(mixture) if shared is None else shared


def principal_coordinates(covariance: Tensor, mean: Tensor, dtype: torch.dtype) -> Coordinates:
    """Return the principal components, scaled to variance 1 where they have one; the last is the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    # An eigenvector's sign is the solver's choice, which another rank's library may make otherwise.
    axis = vectors[:, -1]
    vectors[:, -1] = axis * axis[axis.abs().argmax()].sign()
    scale = values.clamp(min=max(1e-6 * values[-1].item(), 1e-12)).sqrt()
    matrix, inverse = (vectors / scale).to(dtype), (vectors * scale).T
    variance = torch.ones(2, len(values), dtype=torch.float64, device=values.device)
    return Coordinates((matrix, matrix), (inverse, inverse), mean.expand(2, -1), variance, variance.new_zeros(2))
