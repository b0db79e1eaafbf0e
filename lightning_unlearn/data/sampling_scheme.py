"""Description of how a sampler draws the indices of an epoch, to draw from a subset in the same way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

_TORCHDATA = "torchdata.stateful_dataloader.sampler"

SamplingMode = Literal["evenly", "with replacement", "without replacement"]
"""``"evenly"``: each index in proportion to its weight; otherwise random, one draw after the other."""


@dataclass(frozen=True, eq=False)
class SamplingScheme:
    """Describe how the indices of an epoch are drawn.

    Args:
        index: (M,) int64, the dataset indices to draw from; an index listed twice is drawn twice as often.
        weight: (M,) float64, not negative; the probability of an index is proportional to it.
        number: number of draws in an epoch, over all ranks.
        mode: how to draw. ``"without replacement"`` is that of a WeightedRandomSampler: random, none twice.
        shuffle: whether the order is random; if not, it is that of ``index``.
        drop_last: whether to drop the remainder of a division by the number of ranks, instead of adding repeats.
        seed: seed of the order, if the sampler has its own.

    Example:
        >>> scheme = evenly(torch.tensor([3, 5, 8]))
        >>> scheme.number, scheme.draw(torch.Generator()).tolist()
        (3, [3, 5, 8])
    """

    index: Tensor
    weight: Tensor
    number: int
    mode: SamplingMode = "evenly"
    shuffle: bool = True
    drop_last: bool = False
    seed: int | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the indices of one epoch, (number,) int64; unless random, in the order of ``index``.

        Args:
            generator: source of randomness, on the CPU.
        """
        if not self.number:
            return self.index[:0]
        if self.mode != "evenly":
            places = torch.multinomial(
                self.weight, self.number, replacement=self.mode == "with replacement", generator=generator
            )
            return self.index[places]
        if self.number == len(self.index) and bool((self.weight == self.weight[0]).all()):
            return self.index
        return self.index[systematic_sample(self.weight, self.number, generator).sort().values]

    def restricted_to(self, index: Tensor, probability: Tensor | None = None, *, at_least: int = 1) -> SamplingScheme:
        """Return a scheme that draws some of the indices, each as often as before.

        The number of draws shrinks accordingly. It is rounded down if indices are drawn evenly, so that none is drawn
        more often than before, else to the nearest integer.

        Args:
            index: (K,) int64, indices to keep.
            probability: (K,) in [0, 1], factor of the weights; None for 1.
            at_least: least number of draws, to fill a batch, if an index may repeat; never more than before.

        Returns:
            the scheme; it draws nothing (``number`` is 0) if no weight is left.
        """
        size = 1 + int(torch.cat([self.index, index]).max()) if len(self.index) else 0
        kept = torch.zeros(size, dtype=torch.float64)
        kept[index] = 1.0 if probability is None else probability.double()
        share = kept[self.index]
        weight = self.weight * share
        chosen = weight > 0
        if not bool(chosen.any()):
            return replace(self, index=self.index[:0], weight=self.weight[:0], number=0)
        number = self.number * (weight.sum() / self.weight.sum()).item()
        if self.mode == "evenly":
            count = max(1, int(number + 1e-6))
        elif self.mode == "with replacement":
            count = max(1, round(number), min(self.number, at_least))
        else:
            # An index that has any weight is drawn once or not at all, and surely if all are drawn.
            possible = self.weight > 0
            number = self.number * (share[possible].sum() / possible.sum()).item()
            count = min(max(1, round(number)), int(chosen.sum()))
        return replace(self, index=self.index[chosen], weight=weight[chosen], number=count)


def evenly(index: Tensor, *, shuffle: bool = True, number: int | None = None) -> SamplingScheme:
    """Return a scheme that draws each index once, or ``number`` indices, each as equally often as possible.

    Args:
        index: (M,) int64, dataset indices.
        shuffle: whether the order is random.
        number: number of draws in an epoch; by default M.
    """
    weight = torch.ones(len(index), dtype=torch.float64)
    return SamplingScheme(index, weight, len(index) if number is None else number, shuffle=shuffle)


def scheme_of(sampler: Any, *, ranks: int = 1) -> SamplingScheme | None:
    """Return the scheme of one of torch's samplers; None for a custom sampler, whose logic is unknown.

    Args:
        sampler: a sampler, or a list of indices. A subclass that draws like its base class is accepted.
        ranks: number of processes, if each draws ``num_samples`` of its own.

    Example:
        >>> scheme = scheme_of(WeightedRandomSampler([0.0, 1.0, 3.0], num_samples=8))
        >>> scheme.weight.tolist(), scheme.number, scheme.mode
        ([0.0, 1.0, 3.0], 8, 'with replacement')
    """
    if isinstance(sampler, (list, tuple, range)):
        return _of_indices(sampler, shuffle=False)
    if _draws_as(sampler, DistributedSampler):
        scheme = evenly(torch.arange(len(sampler.dataset)), shuffle=bool(sampler.shuffle))
        return replace(scheme, drop_last=bool(sampler.drop_last), seed=int(sampler.seed))
    if _draws_as(sampler, SequentialSampler):
        return evenly(torch.arange(len(sampler.data_source)), shuffle=False)
    if _draws_as(sampler, SubsetRandomSampler):
        return _of_indices(sampler.indices)
    if _draws_as(sampler, WeightedRandomSampler):
        index, weight = torch.arange(len(sampler.weights)), sampler.weights.double()
        return _by_lot(index, weight, sampler.num_samples, sampler.replacement, ranks)
    if _draws_as(sampler, RandomSampler):
        index = torch.arange(len(sampler.data_source))
        if not sampler.replacement:
            return evenly(index, number=sampler.num_samples)
        return _by_lot(index, torch.ones(len(index), dtype=torch.float64), sampler.num_samples, True, ranks)
    return None


def _of_indices(indices: Any, *, shuffle: bool = True) -> SamplingScheme | None:
    """Return the scheme for a list of indices; None if they are keys or negative."""
    try:
        index = torch.as_tensor(list(indices), dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if bool((index < 0).any()) else evenly(index, shuffle=shuffle)


def _draws_as(sampler: Any, kind: type[Any]) -> bool:
    """Return whether a sampler draws like one of torch's (which it may be) or torchdata's resumable one."""
    definers = [
        next((base for base in type(sampler).__mro__ if name in vars(base)), object) for name in ("__iter__", "__len__")
    ]
    names = (kind.__name__, f"Stateful{kind.__name__}")
    return all(base is kind or (base.__module__ == _TORCHDATA and base.__name__ in names) for base in definers)


def _by_lot(index: Tensor, weight: Tensor, number: int, replacement: bool, ranks: int) -> SamplingScheme:
    if replacement:
        return SamplingScheme(index, weight, number * ranks, "with replacement")
    return SamplingScheme(index, weight, min(number * ranks, int((weight > 0).sum())), "without replacement")


def systematic_sample(weight: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw each item as often as its weight on average, with less than one draw more or less in any sample.

    Systematic sampling in random order (Madow 1949): the weights are laid end to end, and one point is drawn in every
    unit interval. The expected loss over the draws is therefore the weighted loss.

    Args:
        weight: (K,), not negative, at least one positive; scaled so that their sum is ``number``.
        number: number of draws.
        generator: source of randomness, on the CPU.

    Returns:
        (number,) int64, positions, in random order.

    Example:
        >>> systematic_sample(torch.tensor([1.0, 0.0, 1.0]), 2, torch.Generator().manual_seed(0)).sort().values
        tensor([0, 2])
    """
    weight = weight.double()
    order = torch.randperm(len(weight), generator=generator)
    ruler = (weight[order] * (number / weight.sum())).cumsum(dim=0)
    marks = torch.arange(number) + torch.rand(1, generator=generator, dtype=torch.float64)
    return order[torch.searchsorted(ruler, marks, right=True).clamp(max=len(weight) - 1)]
