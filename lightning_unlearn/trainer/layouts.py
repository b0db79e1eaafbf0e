"""How the batches of a fit are read: in the first layout that the model and the labels fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_unlearn.attribution import ForwardTrace, is_out_of_memory
from lightning_unlearn.data.batch import Path, has_rows, how_to_split, leaves_of, shown_path
from lightning_unlearn.data.layout import Layout, called, is_given, layouts_of
from lightning_unlearn.data.task_format import TaskFormat

_MOST_SAID = 300
_OURS = tuple(
    f"lightning_unlearn.{room}"
    for room in ("data.batch", "data.layout", "data.task_format", "callbacks.", "attribution.", "evidence.", "trainer.")
)


def settle_layout(
    task_format: TaskFormat, module: nn.Module, batch: Any, size: int, run: Callable[[Any], ForwardTrace]
) -> tuple[ForwardTrace, Any, Any]:
    """Return one forward pass over a batch, read in the first layout that fits, in which later batches are read too.

    A layout fits if ``forward`` can be called so, returns logits for each sample, and the labels have their form.

    Args:
        task_format: takes the layout, if it has none yet.
        module: the user's.
        batch: on the device.
        size: B.
        run: from the input to the trace of a forward pass.

    Returns:
        the trace, the input and the labels.

    Raises:
        TypeError: if ``forward`` fails; the message says how it was called, and what to write instead.
        ValueError: where the labels have another form than a task's.
    """
    if task_format.data.batch_to_xy is not None or task_format.layout is not None:
        return _as_settled(task_format, module, batch, run)
    first: Exception | None = None
    for layout in layouts_of(batch, size, module, task_format.label_at):
        try:
            trace, x, label = _tried(layout, module, batch, size, run)
            classes = task_format.alike(trace.output, label).labels(label, size)
        except (TypeError, ValueError) as error:
            first = first or error
            continue
        task_format.layout = layout
        task_format.infer_task(trace.output, label)
        task_format.rivals = tuple(_rivals(task_format, batch, size, trace, classes))
        is_known = task_format.label_at is not None or is_given(batch, layout, module)
        task_format.is_open = bool(task_format.rivals) and not is_known
        return trace, x, label
    if first is None:
        # No tensor has a row for each sample; says what is missing, or what is wrong with the labels.
        return _as_settled(task_format, module, batch, run)
    raise first


def _rivals(task_format: TaskFormat, batch: Any, size: int, trace: ForwardTrace, classes: Tensor) -> Iterator[Path]:
    """Yield other fields that could be labels: they name classes, and not the same ones."""
    for path, value in leaves_of(batch):
        if task_format.layout is None or path == task_format.layout.label or not has_rows(value, size):
            continue
        try:
            named = task_format.alike(trace.output, value).labels(value, size)
        except ValueError:
            continue
        if not named.equal(classes):
            yield path


def _as_settled(
    task_format: TaskFormat, module: nn.Module, batch: Any, run: Callable[[Any], ForwardTrace]
) -> tuple[ForwardTrace, Any, Any]:
    x, label = task_format.split(batch)
    trace = _run(run, task_format.layout, x, module, batch)
    task_format.infer_task(trace.output, label)
    return trace, x, label


def _tried(
    layout: Layout, module: nn.Module, batch: Any, size: int, run: Callable[[Any], ForwardTrace]
) -> tuple[ForwardTrace, Any, Any]:
    x, label = layout.split(batch)
    trace = _run(run, layout, x, module, batch)
    if len(trace.output) != size:
        raise TypeError(
            f"Expected forward to return a row of logits for each of the {size} samples of a batch, but"
            f" {called(layout, x)} returned {len(trace.output)}; {how_to_split(batch)}."
        )
    return trace, x, label


def _is_ours(error: Exception) -> bool:
    """Return whether this package has raised it, which says what to do."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__")).startswith(_OURS)


def _run(
    run: Callable[[Any], ForwardTrace], layout: Layout | None, x: Any, module: nn.Module, batch: Any
) -> ForwardTrace:
    try:
        return run(x)
    except Exception as error:
        # What a user's own class of exceptions says, or an accelerator, is not about our guess.
        if type(error).__module__ != "builtins" or is_out_of_memory(error) or _is_ours(error):
            raise
        said = " ".join(str(error).split())[:_MOST_SAID].rstrip(".")
        labels = f", with {shown_path(layout.label, batch)} as labels," if layout is not None else ""
        raise TypeError(
            f"Expected forward of {type(module).__name__} to take the input found in a batch, but"
            f" {called(layout, x)}{labels} raised {type(error).__name__}: {said}. If training_step calls forward"
            f" differently, {how_to_split(batch)}, with x what forward takes (a tensor, or a tuple or dict of its"
            " arguments)."
        ) from error
