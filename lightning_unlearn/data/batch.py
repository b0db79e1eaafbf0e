"""Where the input and the labels of a batch are, and how ``forward`` is called with the input."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""Where labels lie in a batch with names, the first that is there."""

Path = tuple[str | int, ...]
"""Where a field lies in a batch: keys, names of attributes, positions."""

# How deep labels are looked for.
_DEEPEST = 3
_MOST_SHOWN = 300


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """The input and the labels of a batch of a common kind.

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
    named = _named_values(batch)
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
    """Calls a model on the input that :func:`split_batch`, a :class:`Layout` or a function of the user's has found.

    A dict goes to the parameters of ``forward`` by name, what ``forward`` does not name is left out; where it takes one
    argument of another name, it gets the only value, or the whole dict.

    Args:
        module: the model.
        x: a tensor, a tuple of positional arguments, or a dict. A named tuple, such as a PackedSequence, is one
            argument where ``forward`` takes one.

    Raises:
        TypeError: if ``forward`` takes other arguments; the message names them.
    """
    signature = _signature(module)
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
        f" {', '.join(map(repr, x))}; pass batch_to_xy=... to AttributionPartitionCallback, a function from the batch"
        " to (x, y) with x a tensor, or a tuple or dict of forward's arguments."
    )


def _signature(module: nn.Module) -> inspect.Signature:
    # Of a compiled module the one inside: the wrapper's forward takes anything.
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
            f" {len(x)}; pass batch_to_xy=... to AttributionPartitionCallback, a function from the batch to (x, y)."
        )


@dataclass(frozen=True)
class Layout:
    """Which field of a batch holds the labels, and what ``forward`` is called with.

    Args:
        label: where the labels lie.
        convention: how ``forward`` is called. ``"fields"``: with some fields, each an argument (a dict alone goes by
            name); ``"one"``: with the one field as it is; ``"names"``: with what ``forward`` names, also of dicts
            within the batch; ``"rest"``: with all but the labels as one argument; ``"batch"``: with the whole batch.
        fields: those of ``"fields"`` and ``"one"``.
    """

    label: Path
    convention: Literal["fields", "one", "names", "rest", "batch"]
    fields: tuple[str | int, ...] = ()

    def fits(self, batch: Any) -> bool:
        """Whether a batch has these fields."""
        try:
            self.split(batch)
        except (KeyError, IndexError, AttributeError, TypeError):
            return False
        return True

    def split(self, batch: Any) -> tuple[Any, Any]:
        """What :func:`call_forward` takes, and the labels."""
        label = field_at(batch, self.label)
        if self.convention == "batch":
            return (batch,), label
        if self.convention in ("fields", "one"):
            values = tuple(field_at(batch, (key,)) for key in self.fields)
            return (values[0] if self.convention == "fields" and len(values) == 1 else values), label
        rest = {key: value for key, value in children_of(batch) if (key,) != self.label}
        if self.convention == "names":
            inside = {k: v for value in rest.values() for k, v in children_of(value) if isinstance(k, str)}
            return inside | rest, label
        return (rest if _named_values(batch) is not None else tuple(rest.values()),), label

    def describe(self) -> str:
        """How ``forward`` is called, as one would write it."""
        if self.convention == "batch":
            return "forward(batch)"
        if self.convention in ("fields", "one"):
            return f"forward({', '.join(shown_path((key,)) for key in self.fields)})"
        whole = "forward(batch without its labels)"
        return whole if self.convention == "rest" else "forward(fields of the batch by name)"


def layouts_of(batch: Any, size: int, module: nn.Module, label: Path | None = None) -> Iterator[Layout]:
    """Layouts that a batch may have, the usual ones first.

    Args:
        batch: as the loader delivers it.
        size: B, the number of samples.
        module: whose ``forward`` is to be called.
        label: where the labels lie, if that is known.
    """
    seen = set()
    labels = list(label_fields(batch, size)) if label is None else [label]
    usual = [one for path in labels for one in _usual_layouts(batch, path, list(_signature(module).parameters))]
    # What has other fields besides is read so where nothing else fits.
    for layout in usual + [Layout(path, "fields", _inputs(batch, path)[:1]) for path in labels]:
        if layout not in seen and (layout.fields or layout.convention not in ("fields", "one")):
            seen.add(layout)
            yield layout


def _inputs(batch: Any, label: Path) -> tuple[str | int, ...]:
    """The fields besides the labels that may be input."""
    return tuple(key for key, value in children_of(batch) if key != label[0] and _may_be_input(value))


def _usual_layouts(batch: Any, label: Path, parameters: list[str]) -> Iterator[Layout]:
    others = [key for key, _ in children_of(batch) if key != label[0]]
    tensors = list(_inputs(batch, label))
    before = [key for key in tensors if isinstance(key, int) and isinstance(label[0], int) and key < label[0]]
    one = [key for key in (before or tensors)[:1] if len(before or tensors) == 1]
    if parameters == ["batch"]:
        yield Layout(label, "batch")
    if _named_values(batch) is not None and isinstance(label[0], str):
        yield Layout(label, "names")
    else:
        is_last = label[0] == len(others)
        yield Layout(label, "fields", tuple(others if is_last else before))
        yield Layout(label, "fields", tuple(before))
        yield Layout(label, "fields", tuple(others))
    yield Layout(label, "fields", tuple(tensors))
    yield Layout(label, "one", tuple(one))
    yield Layout(label, "rest")
    yield Layout(label, "batch")


def label_fields(batch: Any, size: int) -> Iterator[Path]:
    """Where labels may lie, the usual places first.

    Of a batch with names that is under a usual one, further in if need be; else the last tensor with a row for each
    sample, then a usual name in a dict within, then the others from the last to the first.

    Args:
        batch: as the loader delivers it.
        size: B.
    """
    usual = [path for path, value in leaves_of(batch) if path[-1] in LABEL_NAMES and has_rows(value, size)]
    usual.sort(key=lambda path: (len(path), LABEL_NAMES.index(str(path[-1]))))
    if _named_values(batch) is not None and (usual or not isinstance(batch, tuple)):
        yield from usual
        return
    children = children_of(batch)
    places = [key for key, value in children if has_rows(value, size)]
    # With one field before it, at least, that may be the input.
    last = [key for key in places[-1:] if key != children[0][0]]
    is_last = last and last[0] == children[-1][0]
    yield from ((key,) for key in last if is_last)
    yield from usual
    if last:
        yield from ((key,) for key in reversed(places))


def leaves_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors in a batch, with where they lie."""
    for key, value in children_of(batch):
        if isinstance(value, Tensor):
            yield (*path, key), value
        elif len(path) + 1 < _DEEPEST:
            yield from leaves_of(value, (*path, key))


def is_given(batch: Any, layout: Layout, module: nn.Module) -> bool:
    """Whether it is clear where the labels are: under the one usual name, or after all that ``forward`` needs."""
    if isinstance(layout.label[-1], str):
        names = [path for path, _ in leaves_of(batch) if path[-1] in LABEL_NAMES]
        return names == [layout.label]
    needed = [
        p for p in _signature(module).parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    is_last = layout.label == (len(children_of(batch)) - 1,)
    return is_last and layout.convention == "fields" and len(layout.fields) == len(needed)


def field_at(batch: Any, path: Path) -> Any:
    """What lies there.

    Raises:
        KeyError, IndexError, AttributeError, TypeError: if there is nothing.
    """
    for key in path:
        batch = getattr(batch, key) if isinstance(key, str) and not isinstance(batch, Mapping) else batch[key]
    return batch


def shown_path(path: Path, batch: Any = None) -> str:
    """A field as one would write it in code; of a batch that is given, attributes with a dot.

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
    """The line to write for a batch that is not understood.

    Args:
        batch: as the loader delivers it.
        label: where the labels lie, if that is known.
        y: what to write for them instead.
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
    return f"pass batch_to_xy={shown} to AttributionPartitionCallback, a function from the batch to (x, y)"


def children_of(value: Any) -> list[tuple[str | int, Any]]:
    """The parts of a mapping, dataclass, named tuple, tuple or list, with their keys."""
    if isinstance(value, PackedSequence):
        return []
    named = _named_values(value)
    if named is not None:
        return list(named.items())
    return list(enumerate(value)) if isinstance(value, (tuple, list)) else []


def _named_values(batch: Any) -> dict[Any, Any] | None:
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return batch._asdict() if isinstance(batch, tuple) and hasattr(batch, "_asdict") else None


def has_rows(value: Any, size: int) -> bool:
    """Whether a field has a number, or a row of numbers, for each sample."""
    return isinstance(value, Tensor) and 0 < value.ndim <= 2 and value.size(0) == size


def _may_be_input(value: Any) -> bool:
    """Whether a field is more than a path or a name, or a list of such."""
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return len(value) > 0 and all(_may_be_input(inner) for inner in value)
    if isinstance(value, Mapping):
        return any(_may_be_input(inner) for inner in value.values())
    return not isinstance(value, (str, bytes, int, float)) and value is not None


def called(layout: Layout | None, x: Any) -> str:
    """How ``forward`` was called, for a message."""
    return layout.describe() if layout is not None else f"forward(x), x being {_kind(x)}"


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, Sequence) else "")
