"""Dataset index <-> batch row: the pass in index order, and the sampler that can be narrowed to a subset."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_unlearn.types import REASONS, Partition

MIN_SAMPLES = 10

OnNoisy = Literal["drop", "weigh", "relabel"]
"""What becomes of the samples that are not clean."""


def check_loader(loaders: Any) -> DataLoader[Any]:
    """The one train loader, if samples can be told apart by their index.

    Raises:
        TypeError: if it is not one DataLoader over a map-style dataset with a length.
        ValueError: if it holds fewer than 10 samples, or does no batching of its own.
    """
    if not isinstance(loaders, DataLoader):
        raise TypeError(
            "Expected one torch.utils.data.DataLoader as the train loader, but got"
            f" {type(loaders).__name__}; give the loader with the noisy data alone."
        )
    dataset = loaders.dataset
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Expected a map-style dataset, but {type(dataset).__name__} is an IterableDataset, whose samples have no"
            " index to be remembered by; give a dataset with __getitem__ and __len__."
        )
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"Expected a dataset with a length, but {type(dataset).__name__} has no __len__; add one that returns the"
            " number of samples."
        )
    if len(dataset) < MIN_SAMPLES:
        raise ValueError(
            f"Expected at least {MIN_SAMPLES} training samples to partition, but the dataset has {len(dataset)}."
        )
    if loaders.batch_sampler is None:
        raise ValueError(
            "Expected a DataLoader that batches samples, but it has batch_size=None; set a batch_size, so that each"
            " item of the dataset is one sample."
        )
    return loaders


def rank_share(total: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The dataset indices that a rank scores, the same number on every rank.

    Args:
        total: N.
        rank: of this process.
        world_size: number of processes.

    Returns:
        index (n,) int64 and weight (n,) float32 with ``n = ceil(N / world_size)``; weight is 0 where the last index is
        repeated only to make the shares equal.

    Example:
        >>> rank_share(5, rank=1, world_size=2)
        (tensor([1, 3, 4]), tensor([1., 1., 0.]))
    """
    padded = -(-total // world_size) * world_size
    index = torch.arange(rank, padded, world_size)
    return index.clamp(max=total - 1), (index < total).float()


def batch_size(loader: DataLoader[Any]) -> int:
    """Samples per batch; of a batch sampler that does not say, as many as its first batch has.

    Asking it draws from the global random state.
    """
    stated = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    return int(stated) if stated else len(next(iter(loader.batch_sampler or [[0]])))


def indexed_batches(loader: DataLoader[Any], index: Tensor, *, probing: bool = False) -> Iterator[tuple[Tensor, Any]]:
    """The loader's dataset, transforms, collate function and workers, over the given samples in the given order.

    Args:
        loader: the user's; left as it is.
        index: (n,) int64, dataset indices.
        probing: only the first batch is wanted, so load it without worker processes, or, where each of them is
            initialised by a function of the user's, with one.

    Yields:
        the dataset indices of a batch, (B,) int64, and the batch.
    """
    size = batch_size(loader)
    batches = list(BatchSampler(index.tolist(), size, drop_last=False))
    ordered = copy.copy(loader)
    # Not through __init__, which a subclass may have changed; DataLoader refuses to have these set as attributes.
    ordered.__dict__.update(
        sampler=index.tolist(),
        batch_sampler=batches,
        batch_size=size,
        drop_last=False,
        generator=None,
        persistent_workers=False,
        in_order=True,
        _iterator=None,
    )
    if probing and loader.worker_init_fn is None:
        ordered.__dict__.update(num_workers=0, prefetch_factor=None, timeout=0)
    elif probing:
        ordered.__dict__.update(num_workers=min(1, loader.num_workers))
    for indices, batch in zip(batches, ordered, strict=True):
        yield torch.tensor(indices), batch


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """The input and the labels of an ``(x, y)`` batch.

    Raises:
        TypeError: for any other batch.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(
        f"Expected a batch (x, y) with a tensor of labels y, but got a {found}; pass batch_to_xy=... to"
        " AttributionPartitionCallback, a function from the batch to (x, y)."
    )


def check_labels(label: Tensor, num_rows: int, num_classes: int, first_index: int = 0) -> Tensor:
    """The labels as int64, if each names a class.

    Args:
        label: what the batch holds.
        num_rows: B.
        num_classes: C.
        first_index: dataset index of the first row, for the message.

    Raises:
        ValueError: if they are not integers of shape (B,) in [0, C).
    """
    if label.shape != (num_rows,) or label.is_floating_point() or label.is_complex():
        raise ValueError(
            f"Expected integer labels of shape ({num_rows},), one class index per sample, but got {label.dtype} of"
            f" shape {tuple(label.shape)}; pass batch_to_xy=... to AttributionPartitionCallback to convert them."
        )
    low, high = label.min().item(), label.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Expected labels in [0, {num_classes}), as the model has {num_classes} outputs, but found"
            f" {int(low if low < 0 else high)} in the batch that starts at dataset index {first_index}."
        )
    return label.long()


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


class RememberedBatches(BatchSampler):
    """Yields what the user's batch sampler yields, and remembers which indices it has handed to a DataLoader.

    In everything else it is the user's own: attributes are read and set there, and ``isinstance`` sees its class.
    Iterating makes a :class:`RememberedIteration`, so that what somebody else draws is not mixed up with the training
    epoch. A DataLoader asks for batches ahead of delivering them but delivers in the same order (unless it has workers
    and ``in_order=False``), so the k-th batch delivered is the k-th that its iteration has drawn.

    Args:
        batches: the user's batch sampler, or whatever iterable of batches stands in for one.

    Example:
        >>> batches = RememberedBatches(BatchSampler(range(5), batch_size=2, drop_last=False))
        >>> iteration = iter(batches)
        >>> next(iteration), next(iteration), batches.batch_size
        ([0, 1], [2, 3], 2)
        >>> iteration.drawn(1)
        tensor([2, 3])
    """

    def __init__(self, batches: Any) -> None:
        # Not super().__init__: there is no sampler here, and setting an attribute sets the user's.
        self.__dict__["_inner"] = batches
        self.__dict__["_remembers"] = True

    @property  # type: ignore[misc]  # isinstance asks for it: who looks for the user's class shall find it
    def __class__(self) -> type:
        return type(self._inner)

    @override
    def __iter__(self) -> RememberedIteration:
        return RememberedIteration(self, iter(self._inner))

    @override
    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        # While a copy is being made there is nothing to ask yet.
        if name == "_inner" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self._inner, name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __copy__(self) -> Any:
        # The user's own: who makes a copy to change it must not change what the fit draws from.
        return copy.copy(self._inner)

    @override
    def __reduce__(self) -> Any:
        # By name, since pickle would look at __class__.
        return RememberedBatches, (self._inner,)

    @property
    def remembers(self) -> bool:
        """Whether batches are still remembered."""
        return bool(self.__dict__["_remembers"])

    def release(self) -> Any:
        """The user's batch sampler; iterations under way go on, but remember nothing more."""
        self.__dict__["_remembers"] = False
        return self._inner


class RememberedIteration(Iterator[Any]):
    """One iteration over the batches, which keeps every batch until a later one is asked for.

    Args:
        owner: whose iteration it is.
        batches: the iterator of the user's batch sampler.
    """

    def __init__(self, owner: RememberedBatches, batches: Iterator[Any]) -> None:
        self._owner = owner
        self._batches = batches
        self._kept: deque[Any] = deque()
        self._first = 0  # the position of what has been kept longest

    @override
    def __next__(self) -> Any:
        batch = next(self._batches)
        if self._owner.remembers:
            # A copy: who yields a list may fill it again.
            self._kept.append(tuple(batch) if isinstance(batch, list) else batch)
        else:
            self._kept.clear()
        return batch

    def drawn(self, position: int) -> Tensor | None:
        """The dataset indices of a batch, (B,) int64, or None if it is not known or not made of integers.

        Args:
            position: counted from 0; positions before it are forgotten.
        """
        while self._kept and self._first < position:
            self._kept.popleft()
            self._first += 1
        if not self._kept or self._first != position:
            return None
        try:
            # By way of numpy, which reads Python's integers several times faster.
            index = torch.as_tensor(np.asarray(self._kept[0]))
        except (TypeError, ValueError, RuntimeError):
            return None
        whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
        return index.long() if whole and index.ndim == 1 else None


def remember_batches(loader: DataLoader[Any]) -> None:
    """From its next iteration on, the loader remembers its batches; see :func:`delivered_indices`."""
    if not isinstance(loader.batch_sampler, RememberedBatches):
        _put_batch_sampler(loader, RememberedBatches(loader.batch_sampler))


def forget_batches(loader: DataLoader[Any]) -> None:
    """Gives the loader the user's batch sampler again; an iteration under way is not disturbed."""
    batches = loader.batch_sampler
    if isinstance(batches, RememberedBatches):
        _put_batch_sampler(loader, batches.release())


def _put_batch_sampler(loader: DataLoader[Any], batches: Any) -> None:
    # DataLoader forbids to set it.
    loader.__dict__["batch_sampler"] = batches
    # Persistent workers belong to an iterator that is started again, not made again, and has its own reference.
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = batches


def delivered_indices(iterator: Any, waiting: int = 0) -> Tensor | None:
    """The dataset indices of the batch that a loader's iterator delivered last, in the order of its rows.

    Args:
        iterator: of a DataLoader; torch's ``_sampler_iter`` and ``_num_yielded`` are read, which have no public twin.
        waiting: how many batches, delivered later, to leave out.

    Returns:
        (B,) int64, or None where that is not known: the loader does not remember its batches, its iteration is older
        than that, or it is not torch's own.
    """
    iteration = getattr(iterator, "_sampler_iter", None)
    if not isinstance(iteration, RememberedIteration):
        return None
    return iteration.drawn(iterator._num_yielded - 1 - waiting)
