"""Sampler that draws from a subset like the user's sampler, and its exchange in the loader."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.data.index_tracking import track_indices, untrack_indices
from lightning_unlearn.data.loaders import batch_size
from lightning_unlearn.data.sampling_scheme import SamplingScheme, scheme_of


class CleanSubsetSampler(DistributedSampler[int]):
    """Draw indices by a scheme, split over the ranks. The order depends only on seed and epoch.

    Args:
        scheme: which indices are drawn in an epoch, and how often.
        num_replicas: number of ranks.
        rank: rank of this process.
        seed: the same on every rank; the scheme's own seed takes precedence.
        leave_no_single: the batch size; drop one index of the epoch if the last batch would hold a single sample, on
            which batch norm cannot be trained. The user did not choose the size of the subset.
        at_most: largest number of indices drawn in an epoch, over all ranks.

    Attributes:
        is_single: whether a batch of a single sample cannot be avoided, because it is a rank's only one.

    Example:
        >>> from lightning_unlearn.data.sampling_scheme import evenly
        >>> scheme = evenly(torch.tensor([3, 5, 8]), shuffle=False)
        >>> list(CleanSubsetSampler(scheme, num_replicas=1, rank=0, seed=0))
        [3, 5, 8]
    """

    def __init__(
        self,
        scheme: SamplingScheme,
        *,
        num_replicas: int,
        rank: int,
        seed: int,
        leave_no_single: int | None = None,
        at_most: int | None = None,
    ) -> None:
        self.scheme = scheme
        positions: Any = range(scheme.number)
        super().__init__(
            positions,
            num_replicas=num_replicas,
            rank=rank,
            shuffle=scheme.shuffle,
            seed=seed if scheme.seed is None else scheme.seed,
            drop_last=scheme.drop_last,
        )
        # With fewer indices than ranks and drop_last, torch computes a negative number.
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
        # The same draw on every rank, each of which takes its share.
        drawn = self.scheme.draw(torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return (drawn[position] for position in itertools.islice(super().__iter__(), self.count))


def check_sampler(loader: DataLoader[Any], sampler: Any, *, ranks: int = 1) -> SamplingScheme:
    """Return the scheme of the user's sampler.

    Args:
        loader: the user's loader, for the error message.
        sampler: the sampler of its batch sampler.
        ranks: see :func:`scheme_of`.

    Raises:
        TypeError: for a custom sampler, whose logic would be lost when drawing from a subset.
    """
    scheme = sampler.scheme if type(sampler) is CleanSubsetSampler else scheme_of(sampler, ranks=ranks)
    if scheme is not None:
        return scheme
    # __class__ and not type(), since a TrackedBatchSampler reports the user's class.
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


def batch_sampler_error(loader: DataLoader[Any]) -> str:
    """Return why the loader's batch sampler cannot draw and count the batches of a subset; empty if it can.

    Uses the global random state if the batch sampler is not torch's own.
    """
    batches: Any = loader.batch_sampler
    # __class__ and not type(): while indices are tracked, it is a TrackedBatchSampler.
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
    # Check on a copy, with one batch of samples and one more, that it draws only what its sampler yields.
    few = list(range(batch_size(loader) + 1))
    try:
        trial = copy.copy(batches)
        trial.sampler = few
        told = len(trial)
        drawn = [{int(index) for index in batch} for batch in itertools.islice(trial, len(few))]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        return (
            f"Expected a batch sampler that draws from its .sampler, but {kind.__name__} fails when that is"
            f" replaced ({error}), so it cannot be narrowed to the clean subset; use DataLoader(shuffle=...)."
        )
    if not set().union(*drawn) <= set(few):
        return (
            f"Expected a batch sampler that draws only from its .sampler, but {kind.__name__} draws other"
            " samples too, so it cannot be narrowed to the clean subset; use DataLoader(shuffle=...)."
        )
    if told != len(drawn):
        return (
            f"Expected a batch sampler whose length is the number of its batches, but {kind.__name__} makes"
            f" {len(drawn)} batches of {len(few)} samples and has length {told}, so the batches of the clean"
            " subset could not be counted; compute __len__ from .sampler."
        )
    return ""


class SamplerSwap:
    """Replace samplers of loaders, and restore them.

    The loader remains the user's object: its workers, collate function and class are not changed.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[DataLoader[Any], Any, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy has replaced nothing.
        return {"_replaced": []}

    def narrow(
        self, loader: DataLoader[Any], sampler: CleanSubsetSampler, *, remembers: bool = False
    ) -> DataLoader[Any]:
        """Let the loader draw from ``sampler``, and track its batches if requested."""
        batch_sampler: Any = loader.batch_sampler
        if all(loader is not known for known, _, _ in self._replaced):
            self._replaced.append((loader, batch_sampler.sampler, loader.sampler))
        batch_sampler.sampler = sampler
        # DataLoader forbids setting it as an attribute. Lightning reads it to detect a distributed sampler.
        loader.__dict__["sampler"] = sampler
        if remembers:
            track_indices(loader)
        return loader

    def samplers_of(self, loader: DataLoader[Any]) -> tuple[Any, Any]:
        """Return the user's samplers, even while they are replaced.

        Returns:
            the sampler of the batch sampler (None without such an attribute), and ``loader.sampler``.
        """
        replaced = (samplers for known, *samplers in self._replaced if known is loader)
        drawn_from, own = next(replaced, (getattr(loader.batch_sampler, "sampler", None), loader.sampler))
        return drawn_from, own

    def restore(self) -> None:
        """Restore the user's samplers."""
        while self._replaced:
            loader, batch_sampler_sampler, sampler = self._replaced.pop()
            untrack_indices(loader)
            restored: Any = loader.batch_sampler
            restored.sampler = batch_sampler_sampler
            loader.__dict__["sampler"] = sampler
