"""Some rows of a training batch, whatever kind of collection it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_unlearn.attribution import slice_batch
from lightning_unlearn.data.batch import Path, children_of, field_at

_ADVICE = "; let the loader deliver tensors, arrays or lists with an entry for each sample"


def take_rows(batch: Any, rows: Tensor, total: int, path: Path = ()) -> Any:
    """Return a batch of some of its samples; the one given stays as it is.

    Args:
        batch: a mapping, named tuple, dataclass, tuple or list, nested or not, of tensors and arrays with a row, and
            lists with an entry, for each sample; numbers, texts and None beside them belong to all samples.
        rows: (b,) int64, which.
        total: B.
        path: where in it the samples are; what lies elsewhere stays.

    Raises:
        TypeError: for a field of another length, or of another kind.

    Example:
        >>> import torch
        >>> take_rows({"x": torch.arange(6).reshape(3, 2), "key": ["a", "b", "c"]}, torch.tensor([0, 2]), 3)
        {'x': tensor([[0, 1],
                [4, 5]]), 'key': ['a', 'c']}
    """
    if path:
        return _with(batch, path[0], take_rows(field_at(batch, path[:1]), rows, total, path[1:]))
    if not _is_container(batch):
        return _taken(batch, rows, total)
    for key, value in children_of(batch):
        batch = _with(batch, key, _taken(value, rows, total))
    return batch


def item_at(batch: Any, row: int, total: int, path: Path = ()) -> Any:
    """Return one sample of a batch, as the data set has made it before it was collated; a copy of what the batch holds.

    Args:
        batch: see :func:`take_rows`.
        row: which.
        total: B.
        path: where in the batch the samples are.

    Example:
        >>> import torch
        >>> item_at({"x": torch.arange(6).reshape(3, 2), "key": ["a", "b", "c"]}, 1, 3)
        {'x': tensor([2, 3]), 'key': 'b'}
    """
    return _without_rows(take_rows(field_at(batch, path), torch.tensor([row]), total))


def _without_rows(batch: Any) -> Any:
    """Return a batch of one sample without the dimension that counts samples."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[0] if batch.ndim else batch
    for key, value in children_of(batch) if _is_container(batch) else ():
        is_entry = isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and _has_entries(value, 1)
        batch = _with(batch, key, value[0] if is_entry else _without_rows(value))
    return batch


def _is_container(value: Any) -> bool:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Mapping, tuple, list)) or is_record


def _taken(value: Any, rows: Tensor, total: int) -> Any:
    if isinstance(value, Tensor) and value.ndim > 0:
        if value.size(0) == total:
            return slice_batch(value, rows, total)
        raise TypeError(f"Expected {total} rows, but a tensor of a batch has shape {tuple(value.shape)}{_ADVICE}.")
    if isinstance(value, np.ndarray) and value.ndim > 0:
        if len(value) == total:
            return value[rows.numpy()]
        raise TypeError(f"Expected {total} rows, but an array of a batch has shape {value.shape}{_ADVICE}.")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and _has_entries(value, total):
        return type(value)(value[row] for row in rows.tolist())
    if _is_container(value) and not isinstance(value, PackedSequence):
        return take_rows(value, rows, total)
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic, Tensor, np.ndarray)):
        return value
    raise TypeError(
        f"Expected a batch of samples that can be taken apart, but it holds a {type(value).__name__}{_ADVICE}."
    )


def _has_entries(value: Any, total: int) -> bool:
    """Return whether a list has an entry per sample, and is not a list of fields with a row per sample."""
    if len(value) != total:
        return False
    return not all(isinstance(one, (Tensor, np.ndarray)) and one.ndim > 0 and len(one) == total for one in value)


def _with(batch: Any, key: str | int, value: Any) -> Any:
    """Return the collection with another value under one of its keys."""
    if isinstance(batch, tuple):
        fields = getattr(batch, "_fields", ())
        place = fields.index(key) if isinstance(key, str) else key
        parts = [*batch[:place], value, *batch[place + 1 :]]
        return type(batch)(*parts) if fields else type(batch)(parts)
    other = copy.copy(batch)
    if isinstance(batch, (Mapping, list)):
        other[key] = value
    else:
        object.__setattr__(other, str(key), value)
    return other
