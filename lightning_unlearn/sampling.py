"""Which samples are trained on after the partition, how often and under which label; and loaders narrowed to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.data import forget_batches, remember_batches
from lightning_unlearn.types import REASONS, Partition

OnNoisy = Literal["drop", "weigh", "relabel"]
"""What becomes of the samples that are not clean."""


class CleanSubsetSampler(DistributedSampler[int]):
    """Draws the given dataset indices, split over the ranks; the order is a function of seed and epoch.

    Args:
        indices: (K,) int64, the dataset indices to draw from.
        num_replicas: number of ranks.
        rank: of this process.
        shuffle: whether to reshuffle in each epoch.
        seed: the same on every rank.
        leave_no_single: with a batch size: leave out one index of the epoch where the last batch would hold but one,
            on which batch norm cannot be trained. The size of the subset is not the user's choice.
        at_most: with a number: no more indices than that are drawn in an epoch, of all ranks together.
        probability: (K,) in [0, 1], with which an index is drawn in an epoch, or None for all of them. As many as
            their sum, rounded down, are drawn, none twice.

    Example:
        >>> list(CleanSubsetSampler(torch.tensor([3, 5, 8]), num_replicas=1, rank=0, shuffle=False, seed=0))
        [3, 5, 8]
    """

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        indices: Tensor,
        *,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int,
        leave_no_single: int | None = None,
        at_most: int | None = None,
        probability: Tensor | None = None,
    ) -> None:
        self.indices = indices.tolist()
        self.probability = probability
        number = len(self.indices) if probability is None else max(1, int(probability.double().sum() + 1e-6))
        positions: Any = range(number)
        super().__init__(positions, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)

        size = leave_no_single or 1
        single = size > 1 and self.num_samples > size and self.num_samples % size == 1
        self.count = self.num_samples - int(single)
        if at_most is not None:
            self.count = min(self.count, at_most // num_replicas)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        drawn = self.indices if self.probability is None else self._drawn(self.probability)
        return (drawn[position] for position in itertools.islice(super().__iter__(), self.count))

    def _drawn(self, probability: Tensor) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        chosen = draw_with_probability(probability, generator)
        return [self.indices[position] for position in chosen.sort().values.tolist()]


def draw_with_probability(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Draws each item with its own probability, none twice, and always the same number of them.

    Systematic sampling in random order (Madow 1949): the probabilities, laid end to end, are a ruler, and every unit of
    it is hit once. So the expected loss over the draws is the loss weighted with the probabilities.

    Args:
        probability: (K,) in [0, 1]; scaled down a little where their sum is not whole.
        generator: source of randomness, on the CPU.

    Returns:
        (k,) int64, positions, in random order; k is the sum of the probabilities rounded down, at least 1.

    Example:
        >>> draw_with_probability(torch.tensor([1.0, 0.0, 1.0]), torch.Generator().manual_seed(0)).sort().values
        tensor([0, 2])
    """
    weight = probability.double()
    total = weight.sum()
    number = max(1, int(total + 1e-6))
    order = torch.randperm(len(weight), generator=generator)
    ruler = (weight[order] * (number / total)).cumsum(dim=0)
    marks = torch.arange(number) + torch.rand(1, generator=generator, dtype=torch.float64)
    return order[torch.searchsorted(ruler, marks, right=True).clamp(max=len(weight) - 1)]


@dataclass(frozen=True, eq=False)
class TrainingDraw:
    """Which samples are trained on, how often, and what they are called.

    Args:
        index: (K,) int64, dataset indices, ascending.
        probability: (K,) float32, with which each is drawn in an epoch; None for all in every epoch.
        new_label: (N,) int64, the label to train with in place of the given one, -1 for the given one; None where no
            label is replaced.
    """

    index: Tensor
    probability: Tensor | None = None
    new_label: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor | None]:
        """Tensors only."""
        return {"index": self.index, "probability": self.probability, "new_label": self.new_label}

    @property
    def relabelled(self) -> Tensor:
        """(R,) int64, the dataset indices whose label is replaced."""
        none = torch.zeros(0, dtype=torch.int64)
        return none if self.new_label is None else (self.new_label >= 0).nonzero().flatten()


def training_draw(partition: Partition, on_noisy: OnNoisy, relabel_threshold: float) -> TrainingDraw:
    """What is to be trained on after the partition.

    Args:
        partition: of the training set.
        on_noisy: ``"drop"``: the clean samples; ``"weigh"``: every sample with its probability of being clean;
            ``"relabel"``: the clean ones, and those whose label is wrong with the suggested one where that is likely
            enough. A sample whose input is corrupted is not worth a new label.
        relabel_threshold: the least probability of a suggested label that is used.

    Example:
        >>> partition = Partition(
        ...     clean_probability=torch.tensor([0.9, 0.1, 0.2]),
        ...     is_clean=torch.tensor([True, False, False]),
        ...     suggested_label=torch.tensor([3, 1, 2]),
        ...     suggested_probability=torch.tensor([0.9, 0.9, 0.4]),
        ...     noise_rate=0.6,
        ...     label=torch.tensor([3, 7, 7]),
        ...     label_evidence=torch.tensor([0.9, 0.1, 0.2]),
        ...     input_evidence=torch.ones(3),
        ...     reason=torch.tensor([0, 1, 1], dtype=torch.uint8),
        ...     noise_matrix=torch.zeros(0, 0),
        ...     recipe="label",
        ...     layer="input of 'fc'",
        ...     epoch=5,
        ... )
        >>> draw = training_draw(partition, "relabel", 0.8)
        >>> draw.index, draw.new_label
        (tensor([0, 1]), tensor([-1,  1, -1]))
    """
    clean, probability = partition.is_clean, partition.clean_probability
    if on_noisy == "weigh":
        # A sample that is kept only for its class's sake still counts by half.
        weight = torch.where(clean, probability.clamp(min=0.5), probability)
        index = (weight > 0).nonzero().flatten()
        return TrainingDraw(index, weight[index])
    if on_noisy == "drop":
        return TrainingDraw(partition.clean_indices())
    wrong = ~clean & (partition.reason == REASONS.index("label"))
    # A recipe that suggests what the network predicts suggests the given label again where that was memorised.
    sure = (
        wrong & (partition.suggested_probability >= relabel_threshold) & (partition.suggested_label != partition.label)
    )
    new_label = torch.where(sure, partition.suggested_label, -1)
    return TrainingDraw((clean | sure).nonzero().flatten(), new_label=new_label)


def shuffles(loader: DataLoader[Any]) -> bool:
    """Whether the loader's sampler shuffles.

    Raises:
        TypeError: for a sampler that means something of its own, which a uniform draw from a subset would lose.
    """
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and type(sampler).__iter__ in (
        DistributedSampler.__iter__,
        CleanSubsetSampler.__iter__,
    ):
        return bool(sampler.shuffle)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return True
    if type(sampler) is SequentialSampler:
        return False
    # By __class__, as a RememberedBatches goes by the user's.
    batches = loader.batch_sampler.__class__.__name__
    found = type(sampler).__name__ if sampler is not None else f"{batches} without .sampler"
    if type(sampler) is RandomSampler:
        found += " with replacement or num_samples"
    raise TypeError(
        "Expected the train loader to draw with a RandomSampler, SequentialSampler or DistributedSampler, but it"
        f" draws with {found}, which narrowing to the clean subset would silently replace; use DataLoader(shuffle=...)."
    )


class NarrowedLoaders:
    """Loaders whose samplers were replaced, and what to put back.

    The loader object stays the user's own: its workers, collate function and subclass are untouched.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[DataLoader[Any], Any, Any]] = []

    def narrow(
        self, loader: DataLoader[Any], sampler: CleanSubsetSampler, *, remembers: bool = False
    ) -> DataLoader[Any]:
        """Lets the loader draw from ``sampler``, and remember its batches if asked to."""
        batch_sampler: Any = loader.batch_sampler
        if all(loader is not known for known, _, _ in self._replaced):
            self._replaced.append((loader, batch_sampler.sampler, loader.sampler))
        batch_sampler.sampler = sampler
        # DataLoader forbids to set it; Lightning looks here to see that the sampler is distributed already.
        loader.__dict__["sampler"] = sampler
        if remembers:
            remember_batches(loader)
        return loader

    def restore(self) -> None:
        """Puts the users' samplers back."""
        while self._replaced:
            loader, batch_sampler_sampler, sampler = self._replaced.pop()
            forget_batches(loader)
            restored: Any = loader.batch_sampler
            restored.sampler = batch_sampler_sampler
            loader.__dict__["sampler"] = sampler
