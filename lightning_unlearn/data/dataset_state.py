"""What reading a data set in the main process leaves in it: taken out again where worker processes do the reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

# Containers, such as one of open files by path, are put back up to this many items.
_MOST_ITEMS = 10_000
# How deep objects and containers in a data set are looked into, and how many of them.
_DEPTH, _MOST_OBJECTS = 3, 1_000


@contextmanager
def unopened(loader: DataLoader[Any]) -> Iterator[None]:
    """Restore what a loader's data set makes of itself with the first item that is read, where it has workers.

    A data set may open its file (HDF5, LMDB, a zip archive) then, so that each worker has its own. One that the main
    process opens would be shared by the workers that are forked later, and cannot be sent to those that are spawned.
    Without workers nothing is put back, since the main process reads on.

    Args:
        loader: whose data set, and data sets within it, are read inside.
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
    """Attributes of data sets, of objects that came with them, and items of containers, as they were found."""

    def __init__(self) -> None:
        self.restores: list[Callable[[], None]] = []
        # What has been noted; held, so that no other object gets its id.
        self._known: dict[int, Any] = {}
        # Objects of other packages, such as images and tables, look after themselves.
        self._packages: set[str] = set()

    def note(self, value: Any, depth: int) -> None:
        """Note a value, and what is in it."""
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
    """Make attributes or items what they were, if one was made that was none, as where something was opened."""
    if isinstance(into, list):
        # Of the items that there were: what notes which samples are read goes on.
        into[: len(before)] = [
            None if value is None else now for value, now in zip(before.values(), into, strict=False)
        ]
        return
    if all(before.get(name) is not None or value is None for name, value in into.items()):
        return
    for name in into.keys() - before.keys():
        del into[name]
    into.update(before)
