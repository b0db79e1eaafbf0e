"""A sampler that draws from some of the samples in the way of the user's, and loaders narrowed to them."""

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
    """Draws indices in a given way, split over the ranks; the order is a function of seed and epoch.

    Args:
        scheme: which indices are drawn in an epoch, and how many.
        num_replicas: number of ranks.
        rank: of this process.
        seed: the same on every rank; that of the drawing, where it has one, comes first.
        leave_no_single: with a batch size: leave out one index of the epoch where the last batch would hold but one,
            on which batch norm cannot be trained. The size of the subset is not the user's choice.
        at_most: with a number: no more indices than that are drawn in an epoch, of all ranks together.

    ``is_single`` says whether a batch of one cannot be left out, since it is a rank's only one.

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
        drawn = self.scheme.draw(torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        return (drawn[position] for position in itertools.islice(super().__iter__(), self.count))


def check_sampler(loader: DataLoader[Any], sampler: Any, *, ranks: int = 1) -> SamplingScheme:
    """Return how the user's sampler draws.

    Args:
        loader: the user's, for the message.
        sampler: what its batch sampler draws from.
        ranks: see :func:`scheme_of`.

    Raises:
        TypeError: for a sampler that means something of its own, which a draw from a subset would lose.
    """
    scheme = sampler.scheme if type(sampler) is CleanSubsetSampler else scheme_of(sampler, ranks=ranks)
    if scheme is not None:
        return scheme
    # By __class__, as a TrackedBatchSampler goes by the user's.
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
        """Let the loader draw from ``sampler``, and remember its batches if asked to."""
        batch_sampler: Any = loader.batch_sampler
        if all(loader is not known for known, _, _ in self._replaced):
            self._replaced.append((loader, batch_sampler.sampler, loader.sampler))
        batch_sampler.sampler = sampler
        # DataLoader forbids to set it; Lightning looks here to see that the sampler is distributed already.
        loader.__dict__["sampler"] = sampler
        if remembers:
            track_indices(loader)
        return loader

    def samplers_of(self, loader: DataLoader[Any]) -> tuple[Any, Any]:
        """Return what the user's batch sampler draws from (None if it does not say), and ``loader.sampler``.

        The user's, also while they are replaced.
        """
        replaced = (samplers for known, *samplers in self._replaced if known is loader)
        drawn_from, own = next(replaced, (getattr(loader.batch_sampler, "sampler", None), loader.sampler))
        return drawn_from, own

    def restore(self) -> None:
        """Restore the users' samplers."""
        while self._replaced:
            loader, batch_sampler_sampler, sampler = self._replaced.pop()
            untrack_indices(loader)
            restored: Any = loader.batch_sampler
            restored.sampler = batch_sampler_sampler
            loader.__dict__["sampler"] = sampler
