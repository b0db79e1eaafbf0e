"""Identify the rows of a training batch by a key in the batch, for samples without a dataset index."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.data.batch import Path, children_of, field_at
from lightning_unlearn.utilities.calls import called, check_function
from lightning_unlearn.utilities.checks import check_text, reason_of, shown

Key = int | str
"""Key that identifies a sample."""
SampleKey = str | Callable[[Any], Any]
"""Keys in a batch: a field name, with dots for nested fields, or a function from the batch to its keys."""

_LEAST, _MOST = -(2**63), 2**63 - 1
_ADVICE = "set sample_key to a field with an integer or a text for each sample, or to a function that returns these"


def check_sample_key(value: Any) -> SampleKey | None:
    """Check that a value is a field name, a function from a batch to keys, or None.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        name = check_text("sample_key", value, "the name of a field of a batch, or a function from a batch to keys")
        if not all(name.split(".")):
            raise ValueError(f"Expected sample_key to name a field, as 'key' or 'images.key', but got {value!r}.")
        return name
    function: Callable[[Any], Any] = check_function("sample_key", value, "from a batch to the keys of its rows")
    return function


class KeyReader:
    """Read the keys of the rows of batches as the loader delivers them.

    Args:
        sample_key: field name or function, see :data:`SampleKey`.

    Example:
        >>> reader = KeyReader("__key__")
        >>> reader.read({"__key__": ["cat/1", "dog/7"], "label": torch.tensor([0, 1])})
        ['cat/1', 'dog/7']
    """

    def __init__(self, sample_key: SampleKey) -> None:
        self.sample_key = sample_key
        self._kind: type[Any] | None = None

    def container(self, batch: Any) -> Path:
        """Return the path in a batch to the container of the key and the other fields; () for the whole batch."""
        return self._path_in(batch)[:-1]

    def _path_in(self, batch: Any) -> Path:
        if not isinstance(self.sample_key, str):
            return ()
        # A field of a tar archive may be called "meta.json".
        is_whole = isinstance(batch, Mapping) and self.sample_key in batch
        if is_whole:
            return (self.sample_key,)
        path: list[str | int] = []
        for part in self.sample_key.split("."):
            # Several loaders in a list: the name is a position.
            is_place = part.isdigit() and isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
            path.append(int(part) if is_place else part)
            batch = field_at(batch, (path[-1],))
        return tuple(path)

    def read(self, batch: Any) -> list[Any]:
        """Return the keys of a batch, B integers or B strings.

        Raises:
            TypeError: if there are no keys, or keys of another type, or of another type than before.
            ValueError: if a key is missing.
        """
        keys = _listed(self._found(batch), self._said)
        kinds = {type(key) for key in keys}
        if self._kind is None and keys:
            self._kind = type(keys[0])
        if kinds - {self._kind}:
            names = " and ".join(sorted(kind.__name__ for kind in kinds | {self._kind} if kind is not None))
            raise TypeError(f"Expected keys of one kind, all integers or all texts, but {self._said} has {names}.")
        return keys

    @property
    def _said(self) -> str:
        return f"'{self.sample_key}'" if isinstance(self.sample_key, str) else f"sample_key={called(self.sample_key)}"

    def _found(self, batch: Any) -> Any:
        if isinstance(self.sample_key, str):
            try:
                return field_at(batch, self._path_in(batch))
            except (KeyError, IndexError, AttributeError, TypeError):
                raise TypeError(
                    f"Expected sample_key={self.sample_key!r} to name a field of a training batch, but there is none:"
                    f" {_fields_of(batch)}; {_ADVICE}."
                ) from None
        try:
            return self.sample_key(batch)
        except Exception as error:
            raise TypeError(
                f"Expected {self._said} to return the keys of a training batch, but it raised {reason_of(error)}; the"
                f" batch is as the loader delivers it: {_fields_of(batch)}."
            ) from error


def _fields_of(batch: Any) -> str:
    found = ", ".join(f"{key!r}: {_kind(value)}" for key, value in children_of(batch)[:12])
    return f"a {type(batch).__name__}" + (f" of {found}" if found else "")


def _kind(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")


def _listed(found: Any, said: str) -> list[Any]:
    """Convert keys to a list of Python integers or strings."""
    if isinstance(found, Tensor):
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        keys = found.tolist() if found.ndim == 1 and whole else None
    elif isinstance(found, np.ndarray):
        keys = found.tolist() if found.ndim == 1 and found.dtype.kind in "iuUO" else None
    else:
        keys = list(found) if isinstance(found, (list, tuple)) else None
    if keys is None:
        raise TypeError(
            f"Expected an integer or a text for each row in {said}, but it holds {_kind(found)}; {_ADVICE}."
        )
    if {type(key) for key in keys} <= {str} and all(keys):
        return keys
    return [_one(key, row, said) for row, key in enumerate(keys)]


def _one(key: Any, row: int, said: str) -> Key:
    if isinstance(key, (np.generic, Tensor)) and key.ndim == 0:
        key = key.item()
    if key is None or key == "":
        raise ValueError(
            f"Expected a key for each sample, but in {said} row {row} of a batch has {key!r}; give every sample a key"
            " of its own, that is the same in every epoch."
        )
    is_whole = isinstance(key, int) and not isinstance(key, bool) and _LEAST <= key <= _MOST
    if not (is_whole or isinstance(key, str)):
        raise TypeError(
            f"Expected an integer or a text for each row in {said}, but row {row} has {shown(key)}; {_ADVICE}."
        )
    return int(key) if is_whole else str(key)


def owners_of(keys: Sequence[Key], ranks: int) -> Tensor:
    """Return (n,) int64, the rank that stores the evidence of each key; the same in every process and machine.

    Example:
        >>> owners_of(["a", "b", "c", "d"], 2), owners_of([7], 1)
        (tensor([1, 1, 1, 0]), tensor([0]))
    """
    if ranks == 1:
        return torch.zeros(len(keys), dtype=torch.int64)
    # Not hash(), which differs between processes.
    return torch.tensor([zlib.crc32(str(key).encode("utf-8", "surrogatepass")) % ranks for key in keys])
