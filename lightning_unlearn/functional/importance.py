"""Other ways to rank neurons, to compare sensitivity with: statistics of one group of samples over another's.

The ratios are the paper's baselines: an importance that noisy samples give to a neuron over that which clean ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_unlearn.functional.sensitivity import is_varying
from lightning_unlearn.utilities.reduce import Reduce, reduce_together


@dataclass(frozen=True, eq=False)
class NeuronSums:
    """Sums over samples of a number that each of D neurons has for a sample; they add over batches and ranks.

    Args:
        count: () float64, how many numbers a neuron has.
        total: (D,) float64, their sum.
        magnitude: (D,) float64, the sum of their magnitudes.
        square: (D,) float64, the sum of their squares.
        positive: (D,) float64, how many are greater than 0.
    """

    count: Tensor
    total: Tensor
    magnitude: Tensor
    square: Tensor
    positive: Tensor

    def __add__(self, other: NeuronSums) -> NeuronSums:
        return NeuronSums(*(one + another for one, another in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.count, self.total, self.magnitude, self.square, self.positive

    def reduced(self, reduce: Reduce) -> NeuronSums:
        """Return the sums over the ranks."""
        return NeuronSums(*reduce_together(reduce, *self._parts()))

    def variance(self) -> Tensor:
        """Return the variance of each neuron, (D,) float64."""
        return (self.square / self.count - (self.total / self.count).square()).clamp(min=0)

    def is_live(self) -> Tensor:
        """Return (D,) bool, False for a neuron that is constant."""
        return is_varying(self.variance(), self.square / self.count)


def neuron_sums(values: Tensor, weight: Tensor) -> NeuronSums:
    """Return the sums of one batch.

    Args:
        values: (B, D), or (B, P, D) where a neuron has a number at each of P positions of a sample.
        weight: (B,), 0 for a row that does not count.

    Example:
        >>> sums = neuron_sums(torch.tensor([[1.0, -2.0], [3.0, 2.0]]), torch.ones(2))
        >>> sums.total, sums.magnitude
        (tensor([4., 0.], dtype=torch.float64), tensor([4., 4.], dtype=torch.float64))
    """
    if values.ndim not in (2, 3) or weight.shape != values.shape[:1]:
        raise ValueError(
            "Expected values (B, D) or (B, P, D) and weight (B,), but got"
            f" {tuple(values.shape)} and {tuple(weight.shape)}."
        )
    rows = values.double() if values.ndim == 3 else values.double().unsqueeze(1)
    w = weight.double()

    def summed(of: Tensor) -> Tensor:
        return w @ of.sum(dim=1)

    return NeuronSums(
        w.sum() * rows.shape[1], summed(rows), summed(rows.abs()), summed(rows.square()), summed((rows > 0).double())
    )


STATISTICS: Mapping[str, Callable[[NeuronSums], Tensor]] = MappingProxyType(
    {
        "mean_abs": lambda sums: sums.magnitude / sums.count,
        "rms": lambda sums: (sums.square / sums.count).sqrt(),
        "std": lambda sums: sums.variance().sqrt(),
        "frequency": lambda sums: sums.positive / sums.count,
        "taylor": lambda sums: sums.total.abs() / sums.count,
        "hessian": lambda sums: sums.square / sums.count,
    }
)
"""From sums to an importance (D,).

The first four are of activations a. The last two are of gradient x activation g a of the loss: what the loss would
change by if the neuron were silent, to first order (Taylor); and its mean square, the diagonal of the Hessian as the
empirical Fisher matrix has it, times the square of the activation.
"""


def importance_ratio(suspect: NeuronSums, clean: NeuronSums, statistic: str) -> Tensor:
    """Return the importance of neurons for suspect samples over that for clean ones.

    Args:
        suspect: sums over the suspect samples.
        clean: sums over the clean samples.
        statistic: one of :data:`~lightning_unlearn.functional.importance.STATISTICS`.

    Returns:
        (D,) float64; large, but finite, for a neuron that only suspect samples use; 0 for one that none uses.

    Example:
        >>> suspect = neuron_sums(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.ones(2))
        >>> clean = neuron_sums(torch.tensor([[1.0, 4.0], [1.0, -4.0]]), torch.ones(2))
        >>> importance_ratio(suspect, clean, "mean_abs")
        tensor([3.0000, 0.2500], dtype=torch.float64)
    """
    above, below = (STATISTICS[statistic](sums) for sums in (suspect, clean))
    least = torch.finfo(torch.float32).eps * below.max()
    return above / below.clamp(min=least.clamp(min=torch.finfo(torch.float64).tiny))


def magnitude(weight: Tensor, dimension: int) -> Tensor:
    """Return (D,), the norm of the weights of each neuron.

    Args:
        weight: weight of a layer.
        dimension: the dimension of the neurons.

    Example:
        >>> magnitude(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), dimension=0)
        tensor([5., 1.])
    """
    norms: Tensor = torch.linalg.vector_norm(weight.detach().float().movedim(dimension, 0).flatten(1), dim=1)
    return norms
