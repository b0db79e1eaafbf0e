"""Which dataset indices the batches of a loader have, remembered while it is iterated."""

from __future__ import annotations

import copy
import gc
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import override


class HandedOut:
    """Batches of indices, and how many of them a loader has asked for.

    Args:
        batches: lists of dataset indices.
    """

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches = list(batches)
        self.handed = 0
        # Subclasses that keep one iterator for ever put a sampler of batches there, and count them.
        self.sampler = self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            self.handed += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


class TrackedBatchSampler(BatchSampler):
    """Yields what the user's batch sampler yields, and remembers which indices it has handed to a DataLoader.

    In everything else it is the user's own: attributes are read and set there, and ``isinstance`` sees its class.
    Iterating makes a :class:`TrackedBatchIterator`, so that what somebody else draws is not mixed up with the training
    epoch. A DataLoader asks for batches ahead of delivering them but delivers in the same order (unless it has workers
    and ``in_order=False``), so the k-th batch delivered is the k-th that its iteration has drawn.

    Args:
        batches: the user's batch sampler, or whatever iterable of batches stands in for one.

    Example:
        >>> batches = TrackedBatchSampler(BatchSampler(range(5), batch_size=2, drop_last=False))
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
    def __iter__(self) -> TrackedBatchIterator:
        batches = iter(self._inner)
        keeps_state = all(callable(getattr(batches, name, None)) for name in ("state_dict", "load_state_dict"))
        return (_StatefulIteration if keeps_state else TrackedBatchIterator)(self, batches)

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
        return TrackedBatchSampler, (self._inner,)

    @property
    def remembers(self) -> bool:
        """Whether batches are still remembered."""
        return bool(self.__dict__["_remembers"])

    def release(self) -> Any:
        """Return the user's batch sampler; iterations under way go on, but remember nothing more."""
        self.__dict__["_remembers"] = False
        return self._inner


class TrackedBatchIterator(Iterator[Any]):
    """One iteration over the batches, which keeps every batch until a later one is asked for.

    Args:
        owner: whose iteration it is.
        batches: the iterator of the user's batch sampler.

    ``count`` is how many batches it has drawn.
    """

    def __init__(self, owner: TrackedBatchSampler, batches: Iterator[Any]) -> None:
        self._owner = owner
        self._batches: Any = batches
        self.count = 0
        self._kept: deque[Any] = deque()
        self._first = 0  # the position of what has been kept longest

    @override
    def __next__(self) -> Any:
        batch = next(self._batches)
        self.count += 1
        if self._owner.remembers:
            # A copy: who yields a list may fill it again.
            self._kept.append(tuple(batch) if isinstance(batch, list) else batch)
        else:
            self._kept.clear()
        return batch

    def drawn(self, position: int) -> Tensor | None:
        """Return the dataset indices of a batch, (B,) int64, or None if it is not known or not made of integers.

        Args:
            position: counted from 0; positions before it are forgotten.
        """
        return as_indices(self.batch(position))

    def batch(self, position: int) -> Any:
        """Return the batch as it was drawn, or None; see :meth:`drawn`."""
        while self._kept and self._first < position:
            self._kept.popleft()
            self._first += 1
        return self._kept[0] if self._kept and self._first == position else None


class _StatefulIteration(TrackedBatchIterator):
    """Of a batch sampler that can be resumed, as torchdata's: what it saves and loads is its own iterator's."""

    def state_dict(self) -> Any:
        return self._batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._batches.load_state_dict(state)


def as_indices(batch: Any) -> Tensor | None:
    """Return dataset indices (B,) int64 of what a batch sampler drew; None where it is not made of integers."""
    try:
        # By way of numpy, which reads Python's integers several times faster.
        index = torch.as_tensor(np.asarray(batch))
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    return index.long() if whole and index.ndim == 1 else None


def track_indices(loader: DataLoader[Any]) -> None:
    """Have the loader remember its batches from its next iteration on; see :func:`delivered_indices`."""
    if not isinstance(loader.batch_sampler, TrackedBatchSampler):
        _put_batch_sampler(loader, TrackedBatchSampler(loader.batch_sampler))


def untrack_indices(loader: DataLoader[Any]) -> None:
    """Give the loader the user's batch sampler again; an iteration under way is not disturbed."""
    batches = loader.batch_sampler
    if isinstance(batches, TrackedBatchSampler):
        _put_batch_sampler(loader, batches.release())


def _put_batch_sampler(loader: DataLoader[Any], batches: Any) -> None:
    # DataLoader forbids to set it.
    loader.__dict__["batch_sampler"] = batches
    # Persistent workers belong to an iterator that is started again, not made again, and has its own reference.
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = batches


def is_torchs_iterator(iterator: Any) -> bool:
    """Return whether an iterator tells :func:`delivered_indices` what it draws."""
    return hasattr(iterator, "_sampler_iter")


def delivered_indices(iterator: Any, waiting: int = 0) -> Tensor | None:
    """Return the dataset indices of the batch that a loader's iterator delivered last, in the order of its rows.

    Args:
        iterator: of a DataLoader; torch's ``_sampler_iter`` and ``_num_yielded`` are read, which have no public twin.
        waiting: how many batches, delivered later, to leave out.

    Returns:
        (B,) int64, or None where that is not known: the loader does not remember its batches, its iteration is older
        than that, or it is not torch's own.
    """
    return as_indices(last_batch_indices(iterator, waiting))


def last_batch_indices(iterator: Any, waiting: int = 0) -> Any:
    """Return what :func:`delivered_indices` makes indices of, for who does so later; None where that is not known."""
    iteration = getattr(iterator, "_sampler_iter", None)
    if isinstance(iteration, itertools.islice):
        # As torchdata resumes what keeps no state of its own; it has no attribute for what it cuts.
        iteration = next((held for held in gc.get_referents(iteration) if isinstance(held, TrackedBatchIterator)), None)
    if not isinstance(iteration, TrackedBatchIterator):
        return None
    # What torchdata's iterator had drawn before a checkpoint, its new iteration has not.
    earlier = getattr(iterator, "_sampler_iter_yielded", iteration.count) - iteration.count
    return iteration.batch(iterator._num_yielded - 1 - waiting - earlier)
