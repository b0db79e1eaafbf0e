"""Split batches into input and labels, and call ``forward`` with the input."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""Field names of labels, in order of precedence."""

Path = tuple[str | int, ...]
"""Path to a field of a batch: keys, attribute names, positions."""

# Depth up to which labels are searched.
_DEEPEST = 3
_MOST_SHOWN = 300


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch with a common layout into input and labels.

    Args:
        batch: ``(x, y)``; ``(x1, x2, ..., y)``, several inputs; or a mapping, dataclass or named tuple that holds the
            labels under one of :data:`LABEL_NAMES`.

    Returns:
        the input: ``x``; a tuple of several inputs; or a dict of all but the labels.

    Raises:
        TypeError: for any other batch.

    Example:
        >>> import torch
        >>> split_batch({"input_ids": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})[1]
        tensor([0, 1])
    """
    named = named_values(batch)
    if named is not None:
        name = next((name for name in LABEL_NAMES if isinstance(named.get(name), Tensor)), None)
        if name is not None:
            return {key: value for key, value in named.items() if key != name}, cast("Tensor", named[name])
        if not isinstance(batch, tuple):
            raise TypeError(
                f"Expected a batch with labels under one of the names {', '.join(map(repr, LABEL_NAMES))}, but it has"
                f" {', '.join(map(repr, named)) or 'none'}; {how_to_split(batch)}."
            )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(
        f"Expected a batch (x, y) with a tensor of labels y, or a dict with labels, but got a {found};"
        f" {how_to_split(batch)}."
    )


def call_forward(module: nn.Module, x: Any) -> Any:
    """Call a model on an input returned by :func:`split_batch`, a :class:`Layout` or ``batch_to_xy``.

    A dict is passed by keyword, without the entries that ``forward`` does not accept. If ``forward`` takes a single
    argument with another name, it gets the only value, or the whole dict.

    Args:
        module: the model.
        x: a tensor, a tuple of positional arguments, or a dict. A named tuple, such as a PackedSequence, is passed as
            one argument if ``forward`` takes one.

    Raises:
        TypeError: if ``forward`` takes other arguments; the message names them.
    """
    signature = signature_of(module)
    if isinstance(x, tuple) and not _is_one_argument(signature, x):
        _check_positional(list(signature.parameters.values()), x)
        return module(*x)
    if not isinstance(x, dict):
        return module(x)
    parameters = list(signature.parameters.values())
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return module(**x)
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    if set(required) <= set(x) and named & set(x):
        return module(**{name: value for name, value in x.items() if name in named})
    if len(required) <= 1 and named:
        return module(next(iter(x.values())) if len(x) == 1 else x)
    raise TypeError(
        f"Expected a batch with {', '.join(map(repr, required))}, which forward takes, but besides the labels it has"
        f" {', '.join(map(repr, x))}; pass data=DataFormat(batch_to_xy=...) to AttributionPartitionCallback,"
        " a function from the batch to (x, y) with x a tensor, or a tuple or dict of forward's arguments."
    )


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return the signature of ``forward``."""
    # Unwrap compiled modules, whose forward accepts any arguments.
    return inspect.signature(getattr(module, "_orig_mod", module).forward)


def _is_one_argument(signature: inspect.Signature, x: tuple[Any, ...]) -> bool:
    if not hasattr(x, "_fields"):
        return False
    try:
        signature.bind(x)
    except TypeError:
        return False
    return True


def _check_positional(parameters: list[inspect.Parameter], x: tuple[Any, ...]) -> None:
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    if len(x) < len(required) or (len(x) > len(places) and all(p.kind is not p.VAR_POSITIONAL for p in parameters)):
        raise TypeError(
            f"Expected as many inputs in a batch as forward takes, {len(required)}"
            f"{f' to {len(places)}' if len(places) > len(required) else ''}, but besides the last, the labels, it has"
            f" {len(x)}; pass data=DataFormat(batch_to_xy=...) to AttributionPartitionCallback, a function"
            " from the batch to (x, y)."
        )


def leaves_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the tensors in a batch, each with its path."""
    for key, value in children_of(batch):
        if isinstance(value, Tensor):
            yield (*path, key), value
        elif len(path) + 1 < _DEEPEST:
            yield from leaves_of(value, (*path, key))


def field_at(batch: Any, path: Path) -> Any:
    """Return the field of a batch at a path.

    Raises:
        KeyError, IndexError, AttributeError, TypeError: if there is no such field.
    """
    for key in path:
        batch = getattr(batch, key) if isinstance(key, str) and not isinstance(batch, Mapping) else batch[key]
    return batch


def shown_path(path: Path, batch: Any = None) -> str:
    """Format a path as Python code; with the batch, attributes are written with a dot.

    Example:
        >>> shown_path(("meta", 0))
        "batch['meta'][0]"
    """
    text = "batch"
    for key in path:
        is_attribute = batch is not None and isinstance(key, str) and not isinstance(batch, Mapping)
        text += f".{key}" if is_attribute else f"[{key!r}]"
        batch = None if batch is None else field_at(batch, (key,))
    return text


def how_to_split(batch: Any, label: Path | None = None, y: str | None = None) -> str:
    """Return the advice for error messages: a ``batch_to_xy`` that fits the batch.

    Args:
        batch: as the loader delivers it.
        label: path of the labels, if known.
        y: text to write for the labels instead.
    """
    fields = dict(leaves_of(batch))
    if label is None:
        whole = [path for path, value in fields.items() if value.ndim < 2 and not value.is_floating_point()]
        label = next(iter(reversed(whole[-1:] or list(fields)[-1:])), None)
    inputs = [path for path in fields if path != label and len(path) == 1]
    line = "..."
    if label is not None and inputs:
        line = f"lambda batch: ({shown_path(inputs[0], batch)}, {y or shown_path(label, batch)})"
    shown = line if len(line) < _MOST_SHOWN else "..."
    what = "a function from the batch to (x, y)"
    return f"pass data=DataFormat(batch_to_xy={shown}) to AttributionPartitionCallback, {what}"


def children_of(value: Any) -> list[tuple[str | int, Any]]:
    """Return the parts of a mapping, dataclass, named tuple, tuple or list, with their keys."""
    if isinstance(value, PackedSequence):
        return []
    named = named_values(value)
    if named is not None:
        return list(named.items())
    return list(enumerate(value)) if isinstance(value, (tuple, list)) else []


def named_values(batch: Any) -> dict[Any, Any] | None:
    """Return the values of a dict, named tuple or dataclass by name; None for anything else."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return batch._asdict() if isinstance(batch, tuple) and hasattr(batch, "_asdict") else None


def has_rows(value: Any, size: int) -> bool:
    """Return whether a field has a number, or a row of numbers, per sample."""
    return isinstance(value, Tensor) and 0 < value.ndim <= 2 and value.size(0) == size
