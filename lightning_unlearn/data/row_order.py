"""Verify that the rows of a batch are the samples whose indices were drawn, in that order.

The same samples are fetched twice, in two orders, and some of them alone. The row of an index must be the same each
time. It is not if a collate function, a batch fetch, a transfer hook or a loader reorders, drops, repeats or adds rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.data.batch import children_of
from lightning_unlearn.data.fingerprint import digest

MOST_SAMPLES = 64
"""Number of samples to compare, in batches of the loader's size."""
ALONE = 8
"""Number of samples that are also fetched alone."""
_LEAST_SAMPLES = 16


def sample_batches(total: int, batch_size: int, attempt: int = 0) -> list[Tensor]:
    """Return batches (B,) int64 of dataset indices, spread over the dataset and unsorted.

    Args:
        total: N, length of the dataset.
        batch_size: batch size of the loader.
        attempt: selects different samples for each number.

    Example:
        >>> [batch.tolist() for batch in sample_batches(1000, 4)][0]
        [750, 625, 562, 375]
    """
    size = min(batch_size, total, MOST_SAMPLES)
    count = min(total, size * max(1, _LEAST_SAMPLES // size))
    generator = torch.Generator().manual_seed(attempt)
    step = total // count
    spread = torch.arange(count) * total // count + attempt % step
    drawn = spread[torch.randperm(count, generator=generator)]
    return [drawn[first : first + size] for first in range(0, count, size)]


def shuffled(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the same batches, each in another order that is neither sorted nor the reverse of the first."""
    generator = torch.Generator().manual_seed(1)
    return [batch[torch.randperm(len(batch), generator=generator)] for batch in batches]


@dataclass(frozen=True, eq=False)
class Rows:
    """Content of some batches, row by row.

    Args:
        index: (M,) int64, the dataset index drawn for each row.
        label: (M, L) int64, the class labels of each row.
        columns: hashes of the rows, for every part of the input that has a value for each row.
    """

    index: Tensor
    label: Tensor
    columns: dict[str, list[str]]

    def label_of(self) -> dict[int, tuple[int, ...]]:
        """Return the labels by dataset index."""
        return {index: tuple(label) for index, label in zip(self.index.tolist(), self.label.tolist(), strict=True)}


def joined(batches: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several batches, with the parts of the input that all of them have."""
    shared = set.intersection(*(set(batch.columns) for batch in batches))
    return Rows(
        torch.cat([batch.index for batch in batches]),
        torch.cat([batch.label for batch in batches]),
        {name: [row for batch in batches for row in batch.columns[name]] for name in shared},
    )


def row_hashes(x: Any, num_rows: int) -> dict[str, list[str]]:
    """Return the hashes of the rows of every tensor, array or list within an input that has a value for each row.

    Args:
        x: a tensor, or a container of tensors, arrays and lists.
        num_rows: B.

    Example:
        >>> sorted(row_hashes({"ids": torch.zeros(2, 3), "text": ["a", "b"], "scale": torch.tensor(3.0)}, 2))
        ['.ids', '.text']
    """
    return dict(_row_hashes(x, num_rows, ""))


def _row_hashes(x: Any, num_rows: int, path: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested:
        x = x.detach().cpu()
    elif isinstance(x, Tensor):
        x = list(x.unbind()) if x.is_nested else ()
    if _has_rows(x, num_rows):
        yield path, [digest(row) for row in x]
    else:
        for name, part in children_of(x):
            yield from _row_hashes(part, num_rows, f"{path}.{name}")


def _has_rows(x: Any, num_rows: int) -> bool:
    """Return whether a value is a tensor, array or list with an entry for each row of a batch."""
    if isinstance(x, (Tensor, np.ndarray)):
        return x.ndim > 0 and len(x) == num_rows
    if not isinstance(x, (list, tuple)) or len(x) != num_rows:
        return False
    # Texts, numbers, or sequences of different length; where all have that many values, it holds several inputs.
    return not all(isinstance(part, (Tensor, list, tuple)) and _length(part) == num_rows for part in x)


def _length(x: Any) -> int:
    return 0 if isinstance(x, Tensor) and x.ndim == 0 else len(x)


def lengths(x: Any) -> set[int]:
    """Return the lengths of all tensors in a container.

    Example:
        >>> lengths((torch.zeros(3, 2), {"y": torch.zeros(3), "scale": torch.tensor(1.0)}))
        {3}
    """
    if isinstance(x, Tensor):
        return {x.size(0)} if x.ndim else set()  # len(x) fails if it is nested
    return {length for _, part in children_of(x) for length in lengths(part)}


@dataclass(frozen=True)
class Comparison:
    """Two readings of the same samples in different orders.

    Args:
        labels: number of rows whose label differs from that of the same index in the other reading.
        moved: number of rows in which a part of the input equals that of another index in the other reading, if no part
            of the input stays with its index.
        tells: whether the input, or else the labels, differ between rows and stay with their index.
        kept: the parts of the input for which that holds; none under random augmentation.
    """

    labels: int
    moved: int
    tells: bool
    kept: frozenset[str]


def compare(one: Rows, other: Rows) -> Comparison:
    """Compare two readings by dataset index.

    A part of the input is conclusive only if its rows differ. Parts that depend on the position in the batch, such as
    position numbers, or that always differ, as under random augmentation, are not.

    Example:
        >>> label, index = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([7, 8, 9])
        >>> one, other = Rows(index, label, {"x": ["a", "b", "c"]}), Rows(index.flip(0), label, {"x": ["b", "c", "a"]})
        >>> compare(one, other).moved
        2
    """
    mine, yours = one.label_of(), other.label_of()
    labels = sum(mine[index] != yours[index] for index in mine)
    parts = {name: _compare_part(one, other, name) for name in one.columns.keys() & other.columns.keys()}
    kept = frozenset(name for name, moved in parts.items() if moved == 0)
    moved = max((moved or 0 for moved in parts.values()), default=0)
    tells = bool(kept) or (len(set(mine.values())) > 1 and labels == 0)
    return Comparison(labels, 0 if kept else moved, tells, kept)


def _compare_part(one: Rows, other: Rows, name: str) -> int | None:
    """Return the number of rows of a part that equal those of another index; None if it is inconclusive."""
    first, second = one.columns[name], other.columns[name]
    if len(set(first)) == 1 and len(set(second)) == 1 and first[0] == second[0]:
        return None
    by_index = dict(zip(other.index.tolist(), second, strict=True))
    differ: int = sum(row != by_index[index] for index, row in zip(one.index.tolist(), first, strict=True))
    if differ == 0 or (sorted(first) == sorted(second) and first != second):
        return differ
    return None


class ItemByItem:
    """Wrap a dataset to fetch items one by one, each with the same random augmentation every time.

    Args:
        dataset: the user's dataset, to which all other attributes are forwarded.
        seeded: False to leave the random augmentation unchanged.
    """

    def __init__(self, dataset: Any, *, seeded: bool = True) -> None:
        self.__dict__["_inner"] = dataset
        self.__dict__["_seeded"] = seeded

    def __getitem__(self, index: Any) -> Any:
        if self._seeded:
            seed = int(index)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  (the global one, which augmentation may draw from)
            torch.manual_seed(seed)
        return self._inner[index]

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        # Hide the user's __getitems__, which fetches whole batches.
        if name in ("_inner", "_seeded") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)
