"""Which neurons carry the noise: least squares of the probability of being clean on the activations (RLAP, step 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A neuron whose standard deviation is below this share of its root mean square is constant up to rounding.
_CONSTANT = 1e-6
# Directions of the activations with less than this share of the largest variance are rounding.
_SINGULAR = 1e-9


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What a regression of the probability of being clean on the activations of D neurons found.

    Args:
        coefficient: (D,) float64, for one standard deviation of the neuron more; below zero for a neuron that is more
            active for noise; 0 for one that is constant.
        standard_error: (D,) float64, of the coefficient; inf where the samples do not determine it.
        is_live: (D,) bool, False for a neuron that is constant.
        freedom: degrees of freedom of the residuals that the errors come from.
    """

    coefficient: Tensor
    standard_error: Tensor
    is_live: Tensor
    freedom: float = math.inf

    def p_value(self) -> Tensor:
        """Return (D,) float64, of the two-sided test that the coefficient is 0; 1 where nothing is known.

        Example:
            >>> one = torch.ones(1, dtype=torch.float64)
            >>> Sensitivity(1.96 * one, one, one.bool()).p_value()
            tensor([0.0500], dtype=torch.float64)
        """
        return self._where_known(torch.special.erfc(self._z().abs() / 2**0.5))

    def harmful_p_value(self) -> Tensor:
        """Return (D,) float64, the one-sided p-values of neurons not being more active for noise; 1 if unknown.

        Example:
            >>> one = torch.ones(2, dtype=torch.float64)
            >>> Sensitivity(torch.tensor([-1.645, 1.645]).double(), one, one.bool()).harmful_p_value()
            tensor([0.0500, 0.9500], dtype=torch.float64)
        """
        return self._where_known(torch.special.erfc(-self._z() / 2**0.5) / 2)

    def _z(self) -> Tensor:
        """Return Student's t as the normal deviate of the same probability (Wallace 1959)."""
        t = self.coefficient / self.standard_error
        if math.isinf(self.freedom):
            return t
        shrunk = (self.freedom * (t.square() / self.freedom).log1p()).sqrt()
        return t.sign() * shrunk * (8 * self.freedom + 1) / (8 * self.freedom + 3)

    def _where_known(self, p: Tensor) -> Tensor:
        return torch.where(self.is_live & self.standard_error.isfinite(), p, 1.0)

    @classmethod
    def unknown(cls, is_live: Tensor) -> Sensitivity:
        """Return the result where nothing was found."""
        nothing = torch.zeros(is_live.shape, dtype=torch.float64)
        return cls(nothing, torch.full_like(nothing, torch.inf), is_live)


@dataclass(frozen=True, eq=False)
class RegressionSums:
    """Sufficient statistics of a weighted least-squares problem with intercept; they add over batches and ranks.

    Args:
        xtx: (D + 1, D + 1) float64, ``Z^T diag(weight) Z`` with ``Z = [X, 1]``.
        xty: (D + 1,) float64, ``Z^T diag(weight) y``.
        yty: () float64.
    """

    xtx: Tensor
    xty: Tensor
    yty: Tensor

    def __add__(self, other: RegressionSums) -> RegressionSums:
        return RegressionSums(self.xtx + other.xtx, self.xty + other.xty, self.yty + other.yty)


def regression_sums(activation: Tensor, target: Tensor, weight: Tensor) -> RegressionSums:
    """Return the sums of one batch.

    Args:
        activation: (B, D).
        target: (B,), the probability of being clean.
        weight: (B,), 0 for a row that does not count.

    Example:
        >>> sums = regression_sums(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), torch.ones(2))
        >>> sums.xtx
        tensor([[10.,  4.],
                [ 4.,  2.]], dtype=torch.float64)
    """
    check_rows(activation, target, weight)
    z = torch.cat([activation.double(), activation.new_ones(len(activation), 1, dtype=torch.float64)], dim=1)
    y = target.double()
    weighted = z * weight.double().unsqueeze(1)
    return RegressionSums(weighted.T @ z, weighted.T @ y, (weight.double() * y * y).sum())


def check_rows(activation: Tensor, target: Tensor, weight: Tensor) -> None:
    """Refuse shapes other than (B, D), (B,) and (B,)."""
    if activation.ndim != 2 or target.shape != activation.shape[:1] or weight.shape != target.shape:
        raise ValueError(
            "Expected activation (B, D), target (B,) and weight (B,), but got"
            f" {tuple(activation.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}."
        )


def is_varying(variance: Tensor, mean_square: Tensor) -> Tensor:
    """Return (D,) bool, whether neurons vary by more than rounding."""
    return variance.clamp(min=0).sqrt() > _CONSTANT * mean_square.clamp(min=0).sqrt()


def solve_sensitivity(sums: RegressionSums, ridge: float = 0.0) -> Sensitivity:
    """Return the standardized coefficients of ``y = X w + b``, and how sure they are.

    The coefficient of a neuron is multiplied with the neuron's standard deviation and divided by the target's, so that
    neurons of different scale compare. The paper ranks the raw ``|w|``; on activations of equal scale the two agree.

    With ``ridge`` 0 the standard errors are those of least squares: the square root of the diagonal of
    ``s^2 / N * R^+`` with the correlation matrix R of the neurons and the residual variance s^2, on as many degrees of
    freedom as there are samples beyond the rank of the neurons and the mean. Neurons that are nearly collinear share a
    coefficient, and what cannot be told apart has a large error. With a ridge they are those of the shrunk
    coefficients, ``s^2 / N * (R + ridge I)^-1 R (R + ridge I)^-1``, which leaves out the bias towards 0.

    Args:
        sums: over all samples.
        ridge: L2 penalty on the standardized coefficients, per sample (``R + ridge * I``); with 0 the minimum-norm
            solution of ordinary least squares.

    Returns:
        coefficients, 0 for a neuron that is constant, and everywhere if the target is constant.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
        >>> found = solve_sensitivity(regression_sums(x, torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.ones(4)))
        >>> found.coefficient, found.standard_error
        (tensor([0.4472, 0.0000], dtype=torch.float64), tensor([0.6325,    inf], dtype=torch.float64))
    """
    count = sums.xtx[-1, -1]
    mean_x, mean_y = sums.xtx[:-1, -1] / count, sums.xty[-1] / count
    covariance = sums.xtx[:-1, :-1] / count - torch.outer(mean_x, mean_x)
    cross = sums.xty[:-1] / count - mean_x * mean_y
    variance_y = sums.yty / count - mean_y**2
    live = is_varying(covariance.diagonal(), sums.xtx.diagonal()[:-1] / count)
    found = Sensitivity.unknown(live)
    if not live.any() or variance_y <= _CONSTANT**2:
        return found
    scale = covariance.diagonal()[live].sqrt()
    correlation = covariance[live][:, live] / torch.outer(scale, scale)
    with_target = cross[live] / (scale * variance_y.sqrt())

    variances, axes = torch.linalg.eigh(correlation)
    variances = torch.where(variances > _SINGULAR * variances[-1], variances, 0.0)
    shrunk = torch.where(variances > 0, 1 / (variances + ridge), 0.0)
    coefficient = axes @ (shrunk * (axes.T @ with_target))
    found.coefficient[live] = coefficient

    freedom = count - 1 - (variances * shrunk).sum()
    unexplained = 1 - 2 * coefficient @ with_target + coefficient @ correlation @ coefficient
    if freedom >= 1:
        # In units of the target's variance; what is less than rounding is not known to be less.
        residual = unexplained.clamp(min=torch.finfo(torch.float64).eps) / freedom
        found.standard_error[live] = (residual * (axes.square() @ (variances * shrunk.square()))).sqrt()
        found = replace(found, freedom=freedom.item())
    return found
