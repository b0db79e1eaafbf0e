"""Checks of loaders, and iteration over a dataset in index order."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_unlearn.data.dataset_state import unopened
from lightning_unlearn.data.index_tracking import HandedOut

MIN_SAMPLES = 10
_AT_THE_START = {"next_iter_state": None, "_initial_iter_for_state_dict": False}


def check_loader(loaders: Any, of: str = "training") -> DataLoader[Any]:
    """Return the single loader, if its samples can be identified by dataset index.

    Args:
        loaders: the loaders of the fit.
        of: ``"training"`` or ``"validation"``.

    Raises:
        TypeError: if it is not one DataLoader over a map-style dataset with a length.
        ValueError: if it has fewer than 10 samples, or does not batch.
    """
    dataset = getattr(loaders, "dataset", loaders)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Expected a map-style dataset, but {type(dataset).__name__} is an IterableDataset, whose samples have no"
            " index; use a dataset with __getitem__ and __len__, or give each sample a key: data=DataFormat("
            "sample_key='key'), the name of a field of the batch."
        )
    if not isinstance(loaders, DataLoader):
        kind, rest = ("train", _instead_of(loaders)) if of == "training" else (of, "")
        raise TypeError(
            f"Expected one torch.utils.data.DataLoader as the {kind} loader, but got"
            f" {type(loaders).__name__}; give the loader with the noisy data alone{rest}."
        )
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            f"Expected a dataset with a length, but {type(dataset).__name__} has no __len__; add one that returns the"
            f" number of samples ({error})."
        ) from error
    if size < MIN_SAMPLES:
        raise ValueError(f"Expected at least {MIN_SAMPLES} {of} samples to partition, but the dataset has {size}.")
    if loaders.batch_sampler is None:
        raise ValueError(
            "Expected a DataLoader that batches samples, but it has batch_size=None; set a batch_size, so that each"
            " item of the dataset is one sample."
        )
    return loaders


def _instead_of(loaders: Any) -> str:
    """Return the advice for a train loader that is not supported."""
    if isinstance(loaders, (Mapping, list, tuple)):
        return (
            ", and draw from the others in training_step (`next(self.others)`, with `self.others ="
            " itertools.cycle(loader)`), or join their data sets with torch's ConcatDataset"
        )
    return ", not wrapped; what the wrapper does can be done in collate_fn or on_before_batch_transfer"


def shard_indices(total: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return the dataset indices that a rank scores, the same number on every rank.

    Args:
        total: N.
        rank: of this process.
        world_size: number of processes.

    Returns:
        index (n,) int64 and weight (n,) float32 with ``n = ceil(N / world_size)``; weight is 0 where the last index is
        repeated only to make the shares equal.

    Example:
        >>> shard_indices(5, rank=1, world_size=2)
        (tensor([1, 3, 4]), tensor([1., 1., 0.]))
    """
    padded = -(-total // world_size) * world_size
    index = torch.arange(rank, padded, world_size)
    return index.clamp(max=total - 1), (index < total).float()


def batch_size(loader: DataLoader[Any]) -> int:
    """Return the batch size; without such an attribute, the length of the batch sampler's first batch.

    Drawing that batch may use the global random state.
    """
    stated = _stated_batch_size(loader)
    return len(next(iter(loader.batch_sampler or [[0]]))) if stated is None else stated


def batch_count(loader: DataLoader[Any], samples: int) -> int | None:
    """Return the number of batches for ``samples``; None if the batch size is known only by drawing a batch."""
    stated = _stated_batch_size(loader)
    return None if stated is None else math.ceil(samples / stated)


def _stated_batch_size(loader: DataLoader[Any]) -> int | None:
    stated = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    return int(stated) if stated else None


def detached_copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy that delivers in the order drawn, with its own iterators and workers."""
    other = copy.copy(loader)
    # Not through __init__, which a subclass may have changed. DataLoader forbids setting these as attributes.
    other.__dict__.update(persistent_workers=False, in_order=True, _iterator=None)
    # What torchdata's StatefulDataLoader is to go on from is for the user's iteration.
    other.__dict__.update({name: value for name, value in _AT_THE_START.items() if name in other.__dict__})
    return other


def iterate_indices(
    loader: DataLoader[Any],
    index: Tensor,
    *,
    probing: bool = False,
    size: int | None = None,
    absent: set[int] | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Yield (indices, batch) of the given samples in the given order, through the loader's own workers and transforms.

    Args:
        loader: the user's loader, which is not changed.
        index: (n,) int64, dataset indices.
        probing: only the first batch is wanted, so load it without worker processes, or, where each of them is
            initialized by a function of the user's, with one.
        size: batch size; by default the loader's.
        absent: receives the indices of items that are None, which a collate function may drop or replace. Each is
            replaced by another item of the batch, so that the others keep their rows. By default batches are unchanged.

    Yields:
        the dataset indices of a batch, (B,) int64, and the batch.

    Raises:
        TypeError: for a subclass whose ``__iter__`` does not deliver the batches drawn, one for one.
    """
    size = size or batch_size(loader)
    batches = HandedOut(BatchSampler(index.tolist(), size, drop_last=False))
    ordered = detached_copy(loader)
    ordered.__dict__.update(
        sampler=index.tolist(), batch_sampler=batches, batch_size=size, drop_last=False, generator=None
    )
    if probing and loader.worker_init_fn is None:
        ordered.__dict__.update(num_workers=0, prefetch_factor=None, timeout=0)
    elif probing:
        ordered.__dict__.update(num_workers=min(1, loader.num_workers))
    if absent is not None and _iterates_as_torchs(loader):
        ordered.__dict__["collate_fn"] = _StandingIn(loader.collate_fn, loader.dataset)
    delivered = 0
    with unopened(loader) if ordered.num_workers == 0 else nullcontext():
        for batch in ordered:
            if delivered >= batches.handed:
                raise TypeError(_own_iteration(loader))
            indices = torch.tensor(batches.batches[delivered])
            if isinstance(batch, _WithStandIns) and absent is not None:
                absent.update(indices[batch.places].tolist())
                yield indices, batch.batch
            else:
                yield indices, batch
            delivered += 1
    if delivered < len(batches):
        raise TypeError(_own_iteration(loader))


class _WithStandIns(NamedTuple):
    """A batch with replaced items, and their positions; a named tuple, since torch can pin its memory."""

    batch: Any
    places: list[int]


class _StandingIn:
    """Wrap a collate function, and replace items that are None.

    Args:
        collate: the user's collate function.
        dataset: the user's dataset, the source of a replacement if all items of a batch are None.
    """

    def __init__(self, collate: Any, dataset: Any) -> None:
        self._collate = collate
        self._dataset = dataset

    def __call__(self, items: Any) -> Any:
        places = [place for place, item in enumerate(items) if item is None] if isinstance(items, list) else []
        if not places:
            return self._collate(items)
        known = (item for item in itertools.chain(items, map(self._dataset.__getitem__, range(len(self._dataset)))))
        other = next(item for item in known if item is not None)
        return _WithStandIns(self._collate([other if item is None else item for item in items]), places)


def _iterates_as_torchs(loader: DataLoader[Any]) -> bool:
    """Return whether the loader iterates as torch's, so that batches are what the collate function returns."""
    definer = next(base for base in type(loader).__mro__ if "__iter__" in vars(base))
    return definer is DataLoader or definer.__module__.startswith("torchdata.")


def check_iterates_in_order(loader: DataLoader[Any]) -> None:
    """Check a subclass with its own ``__iter__`` on three batches.

    Raises:
        TypeError: if it does not deliver the batches drawn, one for one.
    """
    if type(loader).__iter__ is DataLoader.__iter__:
        return
    few = min(3 * batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
    for _ in iterate_indices(loader, torch.arange(few), probing=True, absent=set()):
        pass


def _own_iteration(loader: DataLoader[Any]) -> str:
    return (
        "Expected a train loader that delivers the batches which its batch sampler draws, one for one, but"
        f" {type(loader).__name__} has its own __iter__ that does not, so samples cannot be identified; use"
        " torch's DataLoader, and move that logic to collate_fn or on_before_batch_transfer."
    )
