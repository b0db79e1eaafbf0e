"""Batch fields derived from the label (one-hot or smoothed rows of a collate_fn), which are re-labeled with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.batch import Path, field_at, has_rows, leaves_of, shown_path
from lightning_unlearn.data.task_format import TaskFormat

# Rows of classes that come again from which on a field is said to be made of the label.
_AGAIN = 8
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Companion:
    """A batch field whose row is a function of the label.

    Args:
        path: path of the field in the batch.
        table: (C, K) float64, the row of each class; NaN for an unknown class.
    """

    path: Path
    table: Tensor

    def replaced(self, batch: Any, value: Tensor, given: Tensor, new: Tensor) -> Tensor:
        """Return the field with the rows of other classes.

        Args:
            batch: the batch, for error messages.
            value: the field.
            given: (U,) int64, the given classes; -1 for none.
            new: (U,) int64, the new classes; -1 keeps the given one.

        Raises:
            RuntimeError: if the field is not derived from the label, or the row of a class is unknown.
        """
        rows, moved = value.reshape(len(given), -1), (new >= 0) & (given >= 0)
        table = self.table.to(value.device)
        before, after = table[given[moved]], table[new[moved]]
        # Of a class that is not known nothing is expected.
        differs = (rows[moved].double() - before).abs() > _ROUNDING * (1 + before.abs())
        if differs.any() or after.isnan().any():
            why = (
                "is not the same function of the label in all samples"
                if differs.any()
                else "is unknown for one of the classes"
            )
            raise RuntimeError(
                f"{shown_path(self.path, batch)}, which is derived from the label, {why}, so a training batch"
                " cannot be re-labeled. Use on_noisy='drop' or 'reweight', or derive it from the label in"
                " training_step."
            )
        changed = rows.clone()
        changed[moved] = after.to(value.dtype)
        return changed.reshape(value.shape)


def companions_in(batches: Sequence[Any], task_format: TaskFormat) -> list[Companion]:
    """Return the fields that are derived from the label.

    Args:
        batches: batches as delivered by the loader.
        task_format: locates the labels and describes their format.
    """
    labels = [task_format.split(batch)[1] for batch in batches]
    given = torch.cat([task_format.classes(label, len(label)) for label in labels])
    inputs = task_format.layout.fields if task_format.layout is not None else ()
    found = []
    for path, first in leaves_of(batches[0]):
        if first is labels[0] or (len(path) == 1 and path[0] in inputs) or not has_rows(first, len(labels[0])):
            continue
        try:
            values = torch.cat([field_at(batch, path) for batch in batches])
        except (KeyError, IndexError, AttributeError, TypeError, RuntimeError):
            continue
        if values.is_complex() or values.numel() % len(given):
            continue
        rows = values.reshape(len(given), -1).double()
        # Wider rows are embeddings, or input.
        if rows.shape[1] not in (1, task_format.num_classes):
            continue
        table = _table(rows[given >= 0], given[given >= 0], task_format.num_classes)
        if table is not None:
            found.append(Companion(path, table))
    return found


def _table(rows: Tensor, label: Tensor, num_classes: int) -> Tensor | None:
    """Return (C, K), the row of each class; None where rows are not a one-to-one function of the label."""
    classes, place, counts = torch.unique(label, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        return None
    means = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, place, rows) / counts.unsqueeze(1)
    means = means.nan_to_num(torch.inf, torch.inf, torch.inf)
    if not means.isfinite().all() or bool(((rows - means[place]).abs() > _ROUNDING * (1 + means[place].abs())).any()):
        return None
    apart = torch.pdist(means)
    made = _by_form(means, classes, num_classes)
    if bool((apart <= _ROUNDING).any()) or (made is None and len(label) - len(classes) < _AGAIN):
        return None
    table = rows.new_full((num_classes, rows.shape[1]), torch.nan)
    table[classes] = means
    return table if made is None else made


def _by_form(means: Tensor, classes: Tensor, num_classes: int) -> Tensor | None:
    """Return the rows of all classes where the known ones show the rule: one number apart, or in proportion."""
    if means.shape[1] == num_classes and num_classes > 1:
        on = means[torch.arange(len(classes)), classes].mean()
        off = (means.sum() - on * len(classes)) / (len(classes) * (num_classes - 1))
        made = off + (on - off) * torch.eye(num_classes, dtype=means.dtype)
        return made if torch.allclose(made[classes], means, rtol=_ROUNDING, atol=_ROUNDING) else None
    if means.shape[1] != 1 or len(classes) < 3:
        return None
    slope = (means[-1] - means[0]) / (classes[-1] - classes[0])
    made = means[0] + slope * (torch.arange(num_classes, dtype=means.dtype).unsqueeze(1) - classes[0])
    return made if torch.allclose(made[classes], means, rtol=_ROUNDING, atol=_ROUNDING) else None
