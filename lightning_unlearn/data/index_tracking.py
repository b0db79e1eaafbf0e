"""Track the dataset indices of a loader's batches while it is iterated."""

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
    """Batches of indices, and how many of them a loader has drawn.

    Args:
        batches: lists of dataset indices.
    """

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches = list(batches)
        self.handed = 0
        # Subclasses that keep one iterator forever put a sampler of batches there, and count them.
        self.sampler = self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            self.handed += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


class TrackedBatchSampler(BatchSampler):
    """Wrap the user's batch sampler, and remember which indices a DataLoader has drawn from it.

    The wrapper behaves like the user's sampler: attributes are read from and set on it, and ``isinstance`` sees its
    class. Each iteration has its own :class:`TrackedBatchIterator`, so that other iterations do not interfere with the
    training epoch. A DataLoader draws batches ahead but delivers them in the same order (unless it has workers and
    ``in_order=False``), so the k-th batch delivered is the k-th that its iteration has drawn.

    Args:
        batches: the user's batch sampler, or any iterable of batches used as one.

    Example:
        >>> batches = TrackedBatchSampler(BatchSampler(range(5), batch_size=2, drop_last=False))
        >>> iteration = iter(batches)
        >>> next(iteration), next(iteration), batches.batch_size
        ([0, 1], [2, 3], 2)
        >>> iteration.drawn(1)
        tensor([2, 3])
    """

    def __init__(self, batches: Any) -> None:
        # super().__init__ is not called: it needs a sampler, and would set attributes on the user's.
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
        # While a copy is being made, _inner does not exist yet.
        if name == "_inner" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self._inner, name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __copy__(self) -> Any:
        # Copy the user's sampler, so that changes to the copy do not affect the fit.
        return copy.copy(self._inner)

    @override
    def __reduce__(self) -> Any:
        # Name the class explicitly, since pickle would use __class__, the user's.
        return TrackedBatchSampler, (self._inner,)

    @property
    def remembers(self) -> bool:
        """Whether batches are still tracked."""
        return bool(self.__dict__["_remembers"])

    def release(self) -> Any:
        """Stop tracking and return the user's batch sampler; running iterations continue untracked."""
        self.__dict__["_remembers"] = False
        return self._inner


class TrackedBatchIterator(Iterator[Any]):
    """One iteration over the batches, which keeps each batch until a later one is requested.

    Args:
        owner: the tracked batch sampler.
        batches: iterator of the user's batch sampler.

    Attributes:
        count: number of batches drawn.
    """

    def __init__(self, owner: TrackedBatchSampler, batches: Iterator[Any]) -> None:
        self._owner = owner
        self._batches: Any = batches
        self.count = 0
        self._kept: deque[Any] = deque()
        self._first = 0  # position of the oldest batch kept

    @override
    def __next__(self) -> Any:
        batch = next(self._batches)
        self.count += 1
        if self._owner.remembers:
            # A copy, since a sampler may reuse the list it yields.
            self._kept.append(tuple(batch) if isinstance(batch, list) else batch)
        else:
            self._kept.clear()
        return batch

    def drawn(self, position: int) -> Tensor | None:
        """Return the dataset indices of a batch, (B,) int64; None if unknown or not integers.

        Args:
            position: counted from 0; earlier batches are dropped.
        """
        return as_indices(self.batch(position))

    def batch(self, position: int) -> Any:
        """Return the batch as it was drawn, or None; see :meth:`drawn`."""
        while self._kept and self._first < position:
            self._kept.popleft()
            self._first += 1
        return self._kept[0] if self._kept and self._first == position else None


class _StatefulIteration(TrackedBatchIterator):
    """Iteration of a resumable batch sampler, such as torchdata's; saves and loads the state of its iterator."""

    def state_dict(self) -> Any:
        return self._batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._batches.load_state_dict(state)


def as_indices(batch: Any) -> Tensor | None:
    """Convert a batch drawn by a batch sampler to dataset indices (B,) int64; None if they are not integers."""
    try:
        # NumPy converts Python integers several times faster.
        index = torch.as_tensor(np.asarray(batch))
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    return index.long() if whole and index.ndim == 1 else None


def track_indices(loader: DataLoader[Any]) -> None:
    """Track the loader's batches from its next iteration on; see :func:`delivered_indices`."""
    if not isinstance(loader.batch_sampler, TrackedBatchSampler):
        _put_batch_sampler(loader, TrackedBatchSampler(loader.batch_sampler))


def untrack_indices(loader: DataLoader[Any]) -> None:
    """Restore the user's batch sampler in the loader; a running iteration is not affected."""
    batches = loader.batch_sampler
    if isinstance(batches, TrackedBatchSampler):
        _put_batch_sampler(loader, batches.release())


def _put_batch_sampler(loader: DataLoader[Any], batches: Any) -> None:
    # DataLoader forbids setting it as an attribute.
    loader.__dict__["batch_sampler"] = batches
    # Persistent workers belong to an iterator that is started again, not made again, and has its own reference.
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._index_sampler = batches


def is_torchs_iterator(iterator: Any) -> bool:
    """Return whether :func:`delivered_indices` can read this iterator."""
    return hasattr(iterator, "_sampler_iter")


def delivered_indices(iterator: Any, waiting: int = 0) -> Tensor | None:
    """Return the dataset indices of the batch that a loader's iterator delivered last, in the order of its rows.

    Args:
        iterator: of a DataLoader; reads torch's private ``_sampler_iter`` and ``_num_yielded``, for which there is no
            public equivalent.
        waiting: number of later batches to skip, which are prefetched but not yet used.

    Returns:
        (B,) int64; None if unknown, because the loader is not tracked, its iteration started before tracking, or the
        iterator is not torch's own.
    """
    return as_indices(last_batch_indices(iterator, waiting))


def last_batch_indices(iterator: Any, waiting: int = 0) -> Any:
    """Return the batch as drawn, which :func:`delivered_indices` converts to indices; None if unknown."""
    iteration = getattr(iterator, "_sampler_iter", None)
    if isinstance(iteration, itertools.islice):
        # As torchdata resumes what keeps no state of its own; it has no attribute for what it cuts.
        iteration = next((held for held in gc.get_referents(iteration) if isinstance(held, TrackedBatchIterator)), None)
    if not isinstance(iteration, TrackedBatchIterator):
        return None
    # What torchdata's iterator had drawn before a checkpoint, its new iteration has not.
    earlier = getattr(iterator, "_sampler_iter_yielded", iteration.count) - iteration.count
    return iteration.batch(iterator._num_yielded - 1 - waiting - earlier)
