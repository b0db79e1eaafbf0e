"""Undo what reading a dataset in the main process changes in it, if worker processes are to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

# Largest container, for example a dict of open files by path, that is restored.
_MOST_ITEMS = 10_000
# Largest depth and number of objects and containers in a dataset that are inspected.
_DEPTH, _MOST_OBJECTS = 3, 1_000


@contextmanager
def unopened(loader: DataLoader[Any]) -> Iterator[None]:
    """Restore attributes that a loader's dataset sets when its first item is read, if the loader has workers.

    A dataset may open its file (HDF5, LMDB, a zip archive) lazily, so that each worker has its own handle. A handle
    opened in the main process would be shared by workers forked later, and cannot be pickled for spawned ones. Without
    workers nothing is restored, since the main process continues to read.

    Args:
        loader: loader whose dataset, and datasets nested in it, are read in the context.
    """
    if loader.num_workers == 0:
        yield
        return
    found = _Found()
    found.note(loader.dataset, _DEPTH)
    try:
        yield
    finally:
        for restore in found.restores:
            restore()


class _Found:
    """Original attributes of datasets and of the objects in them, and original items of containers."""

    def __init__(self) -> None:
        self.restores: list[Callable[[], None]] = []
        # Recorded objects by id. The reference keeps an id from being reused.
        self._known: dict[int, Any] = {}
        # Packages of the datasets. Objects of other packages, such as images and tables, are not inspected.
        self._packages: set[str] = set()

    def note(self, value: Any, depth: int) -> None:
        """Record a value and its contents."""
        if depth < 0 or id(value) in self._known or len(self._known) >= _MOST_OBJECTS:
            return
        if isinstance(value, Dataset) or not self._packages:
            self._packages.add(_package(value))
        if isinstance(value, (dict, list)) and len(value) <= _MOST_ITEMS:
            into: Any = value
        elif _package(value) in self._packages and isinstance(getattr(value, "__dict__", None), dict):
            into = vars(value)
        else:
            return
        self._known[id(value)] = value
        before = dict(into) if isinstance(into, dict) else dict(enumerate(into))
        self.restores.append(lambda: _put_back(into, before))
        for part in before.values():
            self.note(part, depth if isinstance(part, Dataset) else depth - 1)


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _put_back(into: Any, before: dict[Any, Any]) -> None:
    """Restore attributes or items if one was added, or set where it was None, for example an opened file."""
    if isinstance(into, list):
        # Restore original items only, so that a dataset's own log of the samples read is kept.
        into[: len(before)] = [
            None if value is None else now for value, now in zip(before.values(), into, strict=False)
        ]
        return
    if all(before.get(name) is not None or value is None for name, value in into.items()):
        return
    for name in into.keys() - before.keys():
        del into[name]
    into.update(before)
