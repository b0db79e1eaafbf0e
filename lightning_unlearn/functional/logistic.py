"""Which neurons carry the noise, by logistic regression: coefficients of the log-odds of being clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_unlearn.functional.sensitivity import Sensitivity, check_rows, is_varying
from lightning_unlearn.functional.standardize import weighted_mean
from lightning_unlearn.utilities.reduce import Reduce, no_reduce, reduce_together

# Newton's method has converged when no component of the mean gradient is larger; it takes about six steps to.
_FLAT = 1e-9
_STEPS = 50
_HALVINGS = 30
# Rows that are standardized in double precision at a time.
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class LogisticSums:
    """The logistic loss of P parameters and its derivatives, summed over samples; they add over batches and ranks.

    Args:
        loss: () float64, cross-entropy in nats.
        gradient: (P,) float64.
        hessian: (P, P) float64.
    """

    loss: Tensor
    gradient: Tensor
    hessian: Tensor

    def __add__(self, other: LogisticSums) -> LogisticSums:
        return LogisticSums(self.loss + other.loss, self.gradient + other.gradient, self.hessian + other.hessian)


def logistic_sums(parameters: Tensor, z: Tensor, target: Tensor, weight: Tensor) -> LogisticSums:
    """The sums of one batch.

    Args:
        parameters: (P,) float64.
        z: (B, P) float64; a column of ones makes an intercept.
        target: (B,) float64 in [0, 1].
        weight: (B,) float64, 0 for a row that does not count.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> sums = logistic_sums(0 * one, one[None], one, one)
        >>> sums.loss, sums.gradient
        (tensor(0.6931, dtype=torch.float64), tensor([-0.5000], dtype=torch.float64))
        >>> sums.hessian
        tensor([[0.2500]], dtype=torch.float64)
    """
    logit = z @ parameters
    probability = logit.sigmoid()
    curvature = weight * probability * (1 - probability)
    return LogisticSums(
        binary_cross_entropy_with_logits(logit, target, weight, reduction="sum"),
        z.T @ (weight * (probability - target)),
        (z * curvature.unsqueeze(1)).T @ z,
    )


def gradient_scatter(parameters: Tensor, z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(P, P), the outer products of the samples' own gradients, summed; arguments as :func:`logistic_sums`."""
    own = z * ((z @ parameters).sigmoid() - target).unsqueeze(1)
    return (own * weight.unsqueeze(1)).T @ own


def fit_logistic(
    activation: Tensor, target: Tensor, weight: Tensor, reduce: Reduce = no_reduce, ridge: float = 0.0
) -> Sensitivity:
    """Standardised coefficients of ``logit p(clean) = X w + b``, and how sure they are.

    Newton's method on this rank's rows; only sums cross ranks. The standard errors are the robust ones (the sandwich),
    since a probability scatters less about its mean than the zeros and ones that the curvature has in mind.

    Args:
        activation: (n, D), of this rank's samples.
        target: (n,) in [0, 1], the probability of being clean.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.
        ridge: L2 penalty on the standardized coefficients, per sample: half of it times their squares is added to the
            mean loss. With 0, samples that the neurons separate perfectly have no finite coefficients.

    Returns:
        coefficients of the log-odds, for one standard deviation of the neuron more; 0 for one that is constant.
    """
    check_rows(activation, target, weight)
    problem = _Problem(activation, target, weight, reduce)
    found = Sensitivity.unknown(problem.is_live)
    if not found.is_live.any():
        return found
    penalty = torch.full((int(found.is_live.sum()) + 1,), ridge * problem.count, dtype=torch.float64)
    penalty[-1] = 0  # the intercept is free
    parameters, here = _minimise(problem.sums, penalty, problem.count)
    found.coefficient[found.is_live] = parameters[:-1]
    freedom = problem.count - len(parameters)
    if freedom >= 1:
        bread = torch.linalg.pinv(here.hessian + torch.diag(penalty), hermitian=True)
        variance = (bread @ problem.scatter(parameters) @ bread).diagonal() * problem.count / freedom
        found.standard_error[found.is_live] = variance.clamp(min=torch.finfo(torch.float64).tiny).sqrt()[:-1]
    return found


class _Problem:
    """A regression on standardized live neurons and a column of ones, whose rows lie on several ranks."""

    def __init__(self, activation: Tensor, target: Tensor, weight: Tensor, reduce: Reduce) -> None:
        self._rows = [torch.split(rows, _ROWS) for rows in (activation, target, weight)]
        self._reduce = reduce
        self._mean, count = weighted_mean(activation, weight, reduce)
        self.count = count.item()
        squares = sum(w.double() @ (a.double() - self._mean).square() for a, _, w in zip(*self._rows, strict=True))
        variance = reduce(squares + torch.zeros_like(self._mean)) / count
        self.is_live = is_varying(variance, variance + self._mean.square())
        self._scale = variance.clamp(min=0).sqrt()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        live = self.is_live

        def columns(activation: Tensor) -> Tensor:
            z = ((activation.double() - self._mean) / self._scale)[:, live]
            return torch.cat([z, z.new_ones(len(z), 1)], dim=1)

        return ((columns(a), t.double(), w.double()) for a, t, w in zip(*self._rows, strict=True))

    def sums(self, parameters: Tensor) -> LogisticSums:
        """Over all ranks."""
        square = torch.zeros(len(parameters), len(parameters), dtype=torch.float64)
        total = LogisticSums(square.sum(), square.sum(dim=0), square)
        for z, target, weight in self._batches():
            total = total + logistic_sums(parameters, z, target, weight)
        return LogisticSums(*reduce_together(self._reduce, total.loss, total.gradient, total.hessian))

    def scatter(self, parameters: Tensor) -> Tensor:
        """Over all ranks."""
        total = torch.zeros(len(parameters), len(parameters), dtype=torch.float64)
        for z, target, weight in self._batches():
            total += gradient_scatter(parameters, z, target, weight)
        return self._reduce(total)


def _minimise(sums: Callable[[Tensor], LogisticSums], penalty: Tensor, count: float) -> tuple[Tensor, LogisticSums]:
    """Newton's method, with steps halved where a whole one leads up. Every rank takes the same ones."""
    parameters = torch.zeros_like(penalty)
    here = sums(parameters)
    for _ in range(_STEPS):
        gradient = here.gradient + penalty * parameters
        if gradient.abs().max() <= _FLAT * count:
            break
        step = torch.linalg.pinv(here.hessian + torch.diag(penalty), hermitian=True) @ gradient
        least = here.loss + 0.5 * penalty @ parameters.square()
        for halving in range(_HALVINGS):
            there = parameters - step / 2**halving
            found = sums(there)
            if found.loss + 0.5 * penalty @ there.square() < least:
                break
        else:
            break  # as low as rounding allows
        parameters, here = there, found
    return parameters, here
