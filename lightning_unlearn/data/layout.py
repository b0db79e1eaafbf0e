"""Possible layouts of input and labels in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_unlearn.data.batch import (
    LABEL_NAMES,
    Path,
    children_of,
    field_at,
    has_rows,
    leaves_of,
    named_values,
    shown_path,
    signature_of,
)


@dataclass(frozen=True)
class Layout:
    """Field of a batch that holds the labels, and the arguments of ``forward``.

    Args:
        label: path of the labels.
        convention: how ``forward`` is called. ``"fields"``: some fields, each as an argument (a single dict by
            keyword); ``"one"``: one field, unchanged; ``"names"``: the fields that ``forward`` accepts by name, also
            from nested dicts; ``"rest"``: all but the labels as one argument; ``"batch"``: the whole batch.
        fields: fields for ``"fields"`` and ``"one"``.
    """

    label: Path
    convention: Literal["fields", "one", "names", "rest", "batch"]
    fields: tuple[str | int, ...] = ()

    def fits(self, batch: Any) -> bool:
        """Return whether a batch has these fields."""
        try:
            self.split(batch)
        except (KeyError, IndexError, AttributeError, TypeError):
            return False
        return True

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return the input for :func:`call_forward`, and the labels."""
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
        return (rest if named_values(batch) is not None else tuple(rest.values()),), label

    def describe(self) -> str:
        """Return the call of ``forward`` as Python code."""
        if self.convention == "batch":
            return "forward(batch)"
        if self.convention in ("fields", "one"):
            return f"forward({', '.join(shown_path((key,)) for key in self.fields)})"
        whole = "forward(batch without its labels)"
        return whole if self.convention == "rest" else "forward(fields of the batch by name)"


def layouts_of(batch: Any, size: int, module: nn.Module, label: Path | None = None) -> Iterator[Layout]:
    """Yield the possible layouts of a batch, common ones first.

    Args:
        batch: as the loader delivers it.
        size: B, the number of samples.
        module: the module to call.
        label: path of the labels, if known.
    """
    seen = set()
    labels = list(label_fields(batch, size)) if label is None else [label]
    usual = [one for path in labels for one in _usual_layouts(batch, path, list(signature_of(module).parameters))]
    # Last resort: pass the first field only, and ignore the others.
    for layout in usual + [Layout(path, "fields", _inputs(batch, path)[:1]) for path in labels]:
        if layout not in seen and (layout.fields or layout.convention not in ("fields", "one")):
            seen.add(layout)
            yield layout


def _inputs(batch: Any, label: Path) -> tuple[str | int, ...]:
    """Return the fields besides the labels that may be input."""
    return tuple(key for key, value in children_of(batch) if key != label[0] and _may_be_input(value))


def _usual_layouts(batch: Any, label: Path, parameters: list[str]) -> Iterator[Layout]:
    others = [key for key, _ in children_of(batch) if key != label[0]]
    tensors = list(_inputs(batch, label))
    before = [key for key in tensors if isinstance(key, int) and isinstance(label[0], int) and key < label[0]]
    one = [key for key in (before or tensors)[:1] if len(before or tensors) == 1]
    if parameters == ["batch"]:
        yield Layout(label, "batch")
    if named_values(batch) is not None and isinstance(label[0], str):
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
    """Yield the possible paths of the labels, common ones first.

    In a batch with names, labels are fields with a common name, nested if necessary. In other batches the order is: the
    last tensor with a row per sample, a field with a common name in a nested dict, the others from last to first.

    Args:
        batch: as the loader delivers it.
        size: B.
    """
    usual = [path for path, value in leaves_of(batch) if path[-1] in LABEL_NAMES and has_rows(value, size)]
    usual.sort(key=lambda path: (len(path), LABEL_NAMES.index(str(path[-1]))))
    if named_values(batch) is not None and (usual or not isinstance(batch, tuple)):
        yield from usual
        return
    children = children_of(batch)
    places = [key for key, value in children if has_rows(value, size)]
    # At least one field must precede the labels, since it may be the input.
    last = [key for key in places[-1:] if key != children[0][0]]
    is_last = last and last[0] == children[-1][0]
    yield from ((key,) for key in last if is_last)
    yield from usual
    if last:
        yield from ((key,) for key in reversed(places))


def is_given(batch: Any, layout: Layout, module: nn.Module) -> bool:
    """Return whether the labels are unambiguous: a single common name, or a field after all that ``forward`` needs."""
    if isinstance(layout.label[-1], str):
        names = [path for path, _ in leaves_of(batch) if path[-1] in LABEL_NAMES]
        return names == [layout.label]
    needed = [
        p for p in signature_of(module).parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    is_last = layout.label == (len(children_of(batch)) - 1,)
    return is_last and layout.convention == "fields" and len(layout.fields) == len(needed)


def _may_be_input(value: Any) -> bool:
    """Return whether a field may be input, that is, not a string or a list of strings."""
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return len(value) > 0 and all(_may_be_input(inner) for inner in value)
    if isinstance(value, Mapping):
        return any(_may_be_input(inner) for inner in value.values())
    return not isinstance(value, (str, bytes, int, float)) and value is not None


def called(layout: Layout | None, x: Any) -> str:
    """Return the call of ``forward`` for an error message."""
    return layout.describe() if layout is not None else f"forward(x), x being {_kind(x)}"


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, Sequence) else "")
