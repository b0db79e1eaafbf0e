"""Dataset index <-> batch row: the pass in index order, and which indices a batch of training has."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from typing_extensions import override

from lightning_unlearn.attributes import unopened

MIN_SAMPLES = 10
_AT_THE_START = {"next_iter_state": None, "_initial_iter_for_state_dict": False}


def check_loader(loaders: Any, of: str = "training") -> DataLoader[Any]:
    """The one train loader, if samples can be told apart by their index.

    Args:
        loaders: what the fit draws from.
        of: ``"training"`` or ``"validation"``.

    Raises:
        TypeError: if it is not one DataLoader over a map-style dataset with a length.
        ValueError: if it holds fewer than 10 samples, or does no batching of its own.
    """
    dataset = getattr(loaders, "dataset", loaders)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Expected a map-style dataset, but {type(dataset).__name__} is an IterableDataset, whose samples have no"
            " index to be remembered by; give a dataset with __getitem__ and __len__ (a stream or shards may be written"
            " out once as files, or a Hugging Face dataset)."
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
    """What to do with the rest of what was given as the train loader."""
    if isinstance(loaders, (Mapping, list, tuple)):
        return (
            ", and draw from the others in training_step (`next(self.others)`, with `self.others ="
            " itertools.cycle(loader)`), or join their data sets with torch's ConcatDataset"
        )
    return ", not wrapped; what the wrapper does can be done in collate_fn or on_before_batch_transfer"


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
    stated = _stated_batch_size(loader)
    return len(next(iter(loader.batch_sampler or [[0]]))) if stated is None else stated


def batch_count(loader: DataLoader[Any], samples: int) -> int | None:
    """How many batches ``samples`` are; None where only drawing one would tell how large they are."""
    stated = _stated_batch_size(loader)
    return None if stated is None else math.ceil(samples / stated)


def _stated_batch_size(loader: DataLoader[Any]) -> int | None:
    stated = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    return int(stated) if stated else None


def apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy that delivers in the order drawn, and whose iterations, and their workers, are its own."""
    other = copy.copy(loader)
    # Not through __init__, which a subclass may have changed; DataLoader refuses to have these set as attributes.
    other.__dict__.update(persistent_workers=False, in_order=True, _iterator=None)
    # What torchdata's StatefulDataLoader is to go on from is for the user's iteration.
    other.__dict__.update({name: value for name, value in _AT_THE_START.items() if name in other.__dict__})
    return other


def indexed_batches(
    loader: DataLoader[Any],
    index: Tensor,
    *,
    probing: bool = False,
    size: int | None = None,
    absent: set[int] | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """The loader's dataset, transforms, collate function and workers, over the given samples in the given order.

    Args:
        loader: the user's; left as it is.
        index: (n,) int64, dataset indices.
        probing: only the first batch is wanted, so load it without worker processes, or, where each of them is
            initialized by a function of the user's, with one.
        size: samples per batch; by default as many as the loader's have.
        absent: takes the indices of items that are None, which a collate function leaves out or replaces. Another item
            of the batch stands in for each, so that the others keep their rows. Without it, batches are as they come.

    Yields:
        the dataset indices of a batch, (B,) int64, and the batch.

    Raises:
        TypeError: for a subclass whose ``__iter__`` does not deliver the batches drawn, one for one.
    """
    size = size or batch_size(loader)
    batches = _HandedOut(BatchSampler(index.tolist(), size, drop_last=False))
    ordered = apart(loader)
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
    """A batch some of whose items were None, and where; a named tuple, of which torch can pin the memory."""

    batch: Any
    places: list[int]


class _StandingIn:
    """A collate function that never sees None.

    Args:
        collate: the user's.
        dataset: the user's, to look for an item where a batch has none.
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
    """Whether batches come as the collate function makes them."""
    definer = next(base for base in type(loader).__mro__ if "__iter__" in vars(base))
    return definer is DataLoader or definer.__module__.startswith("torchdata.")


def check_iteration(loader: DataLoader[Any]) -> None:
    """Tries three batches with a subclass that iterates in its own way.

    Raises:
        TypeError: if it does not deliver them one for one.
    """
    if type(loader).__iter__ is DataLoader.__iter__:
        return
    few = min(3 * batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
    for _ in indexed_batches(loader, torch.arange(few), probing=True, absent=set()):
        pass


def _own_iteration(loader: DataLoader[Any]) -> str:
    return (
        "Expected a train loader that delivers the batches which its batch sampler draws, one for one, but"
        f" {type(loader).__name__} has an __iter__ of its own that does not, so that samples cannot be told apart; use"
        " torch's DataLoader, and do in collate_fn or on_before_batch_transfer what it does."
    )


class _HandedOut:
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
        batches = iter(self._inner)
        keeps_state = all(callable(getattr(batches, name, None)) for name in ("state_dict", "load_state_dict"))
        return (_StatefulIteration if keeps_state else RememberedIteration)(self, batches)

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

    ``count`` is how many batches it has drawn.
    """

    def __init__(self, owner: RememberedBatches, batches: Iterator[Any]) -> None:
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
        """The dataset indices of a batch, (B,) int64, or None if it is not known or not made of integers.

        Args:
            position: counted from 0; positions before it are forgotten.
        """
        return as_indices(self.batch(position))

    def batch(self, position: int) -> Any:
        """The batch as it was drawn, or None; see :meth:`drawn`."""
        while self._kept and self._first < position:
            self._kept.popleft()
            self._first += 1
        return self._kept[0] if self._kept and self._first == position else None


class _StatefulIteration(RememberedIteration):
    """Of a batch sampler that can be resumed, as torchdata's: what it saves and loads is its own iterator's."""

    def state_dict(self) -> Any:
        return self._batches.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._batches.load_state_dict(state)


def as_indices(batch: Any) -> Tensor | None:
    """Dataset indices (B,) int64 of what a batch sampler drew; None where it is not made of integers."""
    try:
        # By way of numpy, which reads Python's integers several times faster.
        index = torch.as_tensor(np.asarray(batch))
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


def is_torchs_iterator(iterator: Any) -> bool:
    """Whether an iterator tells :func:`delivered_indices` what it draws."""
    return hasattr(iterator, "_sampler_iter")


def delivered_indices(iterator: Any, waiting: int = 0) -> Tensor | None:
    """The dataset indices of the batch that a loader's iterator delivered last, in the order of its rows.

    Args:
        iterator: of a DataLoader; torch's ``_sampler_iter`` and ``_num_yielded`` are read, which have no public twin.
        waiting: how many batches, delivered later, to leave out.

    Returns:
        (B,) int64, or None where that is not known: the loader does not remember its batches, its iteration is older
        than that, or it is not torch's own.
    """
    return as_indices(delivered_batch(iterator, waiting))


def delivered_batch(iterator: Any, waiting: int = 0) -> Any:
    """What :func:`delivered_indices` makes indices of, for who does so later; None where that is not known."""
    iteration = getattr(iterator, "_sampler_iter", None)
    if isinstance(iteration, itertools.islice):
        # As torchdata resumes what keeps no state of its own; it has no attribute for what it cuts.
        iteration = next((held for held in gc.get_referents(iteration) if isinstance(held, RememberedIteration)), None)
    if not isinstance(iteration, RememberedIteration):
        return None
    # What torchdata's iterator had drawn before a checkpoint, its new iteration has not.
    earlier = getattr(iterator, "_sampler_iter_yielded", iteration.count) - iteration.count
    return iteration.batch(iterator._num_yielded - 1 - waiting - earlier)
