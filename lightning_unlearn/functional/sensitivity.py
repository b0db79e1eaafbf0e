"""Which neurons carry the noise: least squares of the probability of being clean on the activations (RLAP, step 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A neuron whose standard deviation is below this share of its root mean square is constant up to rounding.
_CONSTANT = 1e-6


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
    """The sums of one batch.

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
    if activation.ndim != 2 or target.shape != activation.shape[:1] or weight.shape != target.shape:
        raise ValueError(
            "Expected activation (B, D), target (B,) and weight (B,), but got"
            f" {tuple(activation.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}."
        )
    z = torch.cat([activation.double(), activation.new_ones(len(activation), 1, dtype=torch.float64)], dim=1)
    y = target.double()
    weighted = z * weight.double().unsqueeze(1)
    return RegressionSums(weighted.T @ z, weighted.T @ y, (weight.double() * y * y).sum())


def solve_sensitivity(sums: RegressionSums, ridge: float = 0.0) -> Tensor:
    """Standardised coefficients of ``y = X w + b``.

    The coefficient of a neuron is multiplied with the neuron's standard deviation and divided by the target's, so that
    neurons of different scale compare. The paper ranks the raw ``|w|``; on activations of equal scale the two agree.

    Args:
        sums: over all samples.
        ridge: L2 penalty on the standardised coefficients, per sample (``R + ridge * I`` with the correlation matrix
            R); with 0 the minimum-norm solution of ordinary least squares.

    Returns:
        (D,) float64; 0 for a neuron that is constant, and everywhere if the target is constant.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> solve_sensitivity(regression_sums(x, torch.tensor([0.0, 0.5, 1.0]), torch.ones(3)))
        tensor([1., 0.], dtype=torch.float64)
    """
    count = sums.xtx[-1, -1]
    mean_x, mean_y = sums.xtx[:-1, -1] / count, sums.xty[-1] / count
    covariance = sums.xtx[:-1, :-1] / count - torch.outer(mean_x, mean_x)
    cross = sums.xty[:-1] / count - mean_x * mean_y
    variance_y = sums.yty / count - mean_y**2
    scale = covariance.diagonal().clamp(min=0).sqrt()
    alive = scale > _CONSTANT * (sums.xtx.diagonal()[:-1] / count).sqrt()
    sensitivity = torch.zeros_like(scale)
    if not alive.any() or variance_y <= _CONSTANT**2:
        return sensitivity
    scale = scale[alive]
    correlation = covariance[alive][:, alive] / torch.outer(scale, scale)
    correlation.diagonal().add_(ridge)
    with_target = cross[alive] / (scale * variance_y.sqrt())
    sensitivity[alive] = torch.linalg.pinv(correlation, hermitian=True, rtol=1e-9) @ with_target
    return sensitivity


def select_neurons(sensitivity: Tensor, amount: float) -> Tensor:
    """The neurons to keep when the ``amount`` of largest magnitude is pruned.

    The share is taken of the *live* neurons, those with a sensitivity other than 0. A ReLU layer that has memorised its
    data can have half of its neurons dead; half of all neurons would then be all that the network has left.

    Args:
        sensitivity: (D,).
        amount: share of the live neurons in (0, 1), rounded down.

    Returns:
        keep: (D,) bool.

    Raises:
        ValueError: if the amount is less than one of all D neurons.

    Example:
        >>> select_neurons(torch.tensor([0.1, -0.9, 0.0, 0.3]), amount=0.7)
        tensor([ True, False,  True, False])
    """
    neurons = len(sensitivity)
    # A whole number may come out a little too small: 0.29 * 100 is 28.999999999999996.
    rounding = 1e-9
    if amount * neurons + rounding < 1:
        raise ValueError(
            f"amount={amount} of {neurons} neurons is less than one neuron; use at least"
            f" {math.ceil(1e6 / neurons) / 1e6:g}."
        )
    count = math.floor(amount * int((sensitivity != 0).sum()) + rounding)
    keep = torch.ones_like(sensitivity, dtype=torch.bool)
    # A stable order, so that equal sensitivities are broken alike on every rank.
    keep[sensitivity.abs().argsort(descending=True, stable=True)[:count]] = False
    return keep
