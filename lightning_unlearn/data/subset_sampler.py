"""Which samples are trained on after the partition, how often and under which label; and loaders narrowed to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.data.index_tracking import forget_batches, remember_batches
from lightning_unlearn.data.loaders import batch_size
from lightning_unlearn.data.sampling_scheme import Drawing, drawing_of
from lightning_unlearn.results.labels import of_any_label
from lightning_unlearn.results.partition import Partition

OnNoisy = Literal["drop", "weigh", "relabel"]
"""What becomes of the samples that are not clean."""


class CleanSubsetSampler(DistributedSampler[int]):
    """Draws indices in a given way, split over the ranks; the order is a function of seed and epoch.

    Args:
        drawing: which indices are drawn in an epoch, and how many.
        num_replicas: number of ranks.
        rank: of this process.
        seed: the same on every rank; that of the drawing, where it has one, comes first.
        leave_no_single: with a batch size: leave out one index of the epoch where the last batch would hold but one,
            on which batch norm cannot be trained. The size of the subset is not the user's choice.
        at_most: with a number: no more indices than that are drawn in an epoch, of all ranks together.

    ``is_single`` says whether a batch of one cannot be left out, since it is a rank's only one.

    Example:
        >>> from lightning_unlearn.data.sampling_scheme import evenly
        >>> drawing = evenly(torch.tensor([3, 5, 8]), shuffle=False)
        >>> list(CleanSubsetSampler(drawing, num_replicas=1, rank=0, seed=0))
        [3, 5, 8]
    """

    def __init__(
        self,
        drawing: Drawing,
        *,
        num_replicas: int,
        rank: int,
        seed: int,
        leave_no_single: int | None = None,
        at_most: int | None = None,
    ) -> None:
        self.drawing = drawing
        positions: Any = range(drawing.number)
        super().__init__(
            positions,
            num_replicas=num_replicas,
            rank=rank,
            shuffle=drawing.shuffle,
            seed=seed if drawing.seed is None else drawing.seed,
            drop_last=drawing.drop_last,
        )
        # Of fewer indices than ranks none is left where the last ones are dropped; torch counts below zero.
        self.num_samples = max(0, self.num_samples)

        size = leave_no_single or 1
        single = size > 1 and self.num_samples > size and self.num_samples % size == 1
        self.count = self.num_samples - int(single)
        if at_most is not None:
            self.count = min(self.count, at_most // num_replicas)
        self.is_single = size > 1 and self.count == 1

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        # The same on every rank, each of which takes its share of it.
        drawn = self.drawing.draw(torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return (drawn[position] for position in itertools.islice(super().__iter__(), self.count))


@dataclass(frozen=True, eq=False)
class TrainingDraw:
    """Which samples are trained on, how often, and what they are called.

    Args:
        index: (K,) int64, dataset indices, ascending.
        probability: (K,) float32, with which each is drawn in an epoch; None for all in every epoch.
        new_label: (N,) int64, or (N, L) of a multi-label task, the label to train with in place of the given one, -1
            for the given one; None where no label is replaced.
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
        return none if self.new_label is None else of_any_label(self.new_label >= 0).nonzero().flatten()


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
    sure = partition.worth_relabelling(relabel_threshold)
    new_label = torch.where(sure.unsqueeze(1) if partition.is_multilabel else sure, partition.suggested_label, -1)
    return TrainingDraw((clean | sure).nonzero().flatten(), new_label=new_label)


def check_drawing(loader: DataLoader[Any], sampler: Any, *, ranks: int = 1) -> Drawing:
    """How the user's sampler draws.

    Args:
        loader: the user's, for the message.
        sampler: what its batch sampler draws from.
        ranks: see :func:`drawing_of`.

    Raises:
        TypeError: for a sampler that means something of its own, which a draw from a subset would lose.
    """
    drawing = sampler.drawing if type(sampler) is CleanSubsetSampler else drawing_of(sampler, ranks=ranks)
    if drawing is not None:
        return drawing
    # By __class__, as a RememberedBatches goes by the user's.
    batches = loader.batch_sampler.__class__.__name__
    found = type(sampler).__name__ if sampler is not None else f"{batches} without .sampler"
    if isinstance(sampler, (list, tuple)) or hasattr(sampler, "indices"):
        found += " of indices that are not all integers from 0 on"
    raise TypeError(
        "Expected the train loader to draw with one of torch's samplers (RandomSampler, SequentialSampler,"
        " SubsetRandomSampler, WeightedRandomSampler, DistributedSampler), but it draws with"
        f" {found}, which narrowing to the clean subset would silently replace; use DataLoader(shuffle=...), or a"
        " WeightedRandomSampler, whose weights are kept."
    )


def fault_of_batch_sampler(loader: DataLoader[Any]) -> str:
    """Why the batches of a subset could not be drawn and counted with the loader's batch sampler; empty if they can.

    Draws from the global random state where the batch sampler is not torch's own.
    """
    batches: Any = loader.batch_sampler
    # Its class and not its type: while training steps are read, it is the user's with a memory.
    kind = batches.__class__
    has_size = isinstance(getattr(batches, "batch_size", None), int)
    if not (has_size and hasattr(batches, "drop_last") and hasattr(kind, "__len__")):
        return (
            "Expected the train loader's batch sampler to have a length, .batch_size and .drop_last, as torch's"
            f" BatchSampler has, but {kind.__name__} has not, so the batches of the clean subset could not be counted;"
            " use DataLoader(batch_size=...), or add them."
        )
    plain = kind.__iter__ is BatchSampler.__iter__ and kind.__len__ is BatchSampler.__len__
    if plain and not hasattr(kind, "sampler"):
        return ""
    # Whether it draws what its sampler gives it, seen on a copy that is given one batch of samples and one more.
    few = list(range(batch_size(loader) + 1))
    try:
        trial = copy.copy(batches)
        trial.sampler = few
        told = len(trial)
        drawn = [{int(index) for index in batch} for batch in itertools.islice(trial, len(few))]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        return (
            f"Expected a batch sampler that draws what its .sampler gives it, but {kind.__name__} does not when it is"
            f" given another ({error}), so it cannot be narrowed to the clean subset; use DataLoader(shuffle=...)."
        )
    if not set().union(*drawn) <= set(few):
        return (
            f"Expected a batch sampler that draws what its .sampler gives it, but {kind.__name__} draws other samples"
            " too, so it cannot be narrowed to the clean subset; use DataLoader(shuffle=...)."
        )
    if told != len(drawn):
        return (
            f"Expected a batch sampler whose length is the number of its batches, but {kind.__name__} makes"
            f" {len(drawn)} of {len(few)} samples and says {told}, so the batches of the clean subset could not be"
            " counted; compute __len__ from .sampler."
        )
    return ""


class NarrowedLoaders:
    """Loaders whose samplers were replaced, and what to put back.

    The loader object stays the user's own: its workers, collate function and subclass are untouched.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[DataLoader[Any], Any, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy has borrowed nothing.
        return {"_replaced": []}

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

    def samplers_of(self, loader: DataLoader[Any]) -> tuple[Any, Any]:
        """What the user's batch sampler draws from (None if it does not say), and ``loader.sampler``.

        The user's, also while they are replaced.
        """
        replaced = (samplers for known, *samplers in self._replaced if known is loader)
        drawn_from, own = next(replaced, (getattr(loader.batch_sampler, "sampler", None), loader.sampler))
        return drawn_from, own

    def restore(self) -> None:
        """Puts the users' samplers back."""
        while self._replaced:
            loader, batch_sampler_sampler, sampler = self._replaced.pop()
            forget_batches(loader)
            restored: Any = loader.batch_sampler
            restored.sampler = batch_sampler_sampler
            loader.__dict__["sampler"] = sampler
