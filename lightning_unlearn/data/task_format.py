"""Convert batches, outputs and labels of any supported task to rows of class logits and class labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.data.batch import Path, call_forward, split_batch
from lightning_unlearn.data.data_format import DataFormat, Task
from lightning_unlearn.data.layout import Layout

IGNORED = -1
"""Class label of a row without a label."""

_ILLEGAL = -2
# Tolerance for one-hot rows, in any floating-point precision.
_ROUNDING = 1e-3


def extract_logits(output: Any) -> Any:
    """Return the logits in an output: ``output.logits``, ``output["logits"]``, the first of a tuple, or itself."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, (tuple, list)) and output else output


class TaskFormat:
    """Read batches, outputs and labels; what a :class:`DataFormat` does not set is inferred from the first batch.

    **Rows.** Everything downstream sees rows of class logits (U, C) with class labels (U,). In a multi-class task rows
    are samples. In a binary task the single logit z becomes the logits -z/2 and z/2 of two classes, whose softmax is
    the sigmoid of z. In a multi-label task each label of each sample is such a binary row, sample by sample: U = B L.

    Args:
        data: the user's settings; the defaults if omitted.

    Attributes:
        data: as given.
        num_outputs: K, number of columns that ``forward`` returns; 0 before the first batch.
        layout: layout of input and labels in a batch, once detected.
        label_at: path of the labels, once detected.
        rivals: paths of other fields that could be the labels.
        is_open: whether one of these is as likely.
    """

    def __init__(self, data: DataFormat | None = None) -> None:
        self.data = DataFormat() if data is None else data
        self.forget()

    def forget(self) -> None:
        """Discard what was inferred from an earlier model's first batch."""
        self._task: Task = "auto"
        self.num_outputs = 0
        self.layout: Layout | None = None
        self.label_at: Path | None = None
        self.rivals: tuple[Path, ...] = ()
        self.is_open = False

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Split a batch into input and labels, with ``batch_to_xy``, the inferred layout, or ``split_batch``."""
        if self.data.batch_to_xy is not None:
            return self.data.batch_to_xy(batch)
        if self.layout is not None and self.layout.fits(batch):
            return self.layout.split(batch)
        return split_batch(batch)

    @property
    def label_field(self) -> Path | None:
        """Path of the labels in a batch; None before the first batch, or with ``batch_to_xy``."""
        return self.label_at if self.layout is None else self.layout.label

    @property
    def task(self) -> Task:
        """The kind of classification.

        Raises:
            RuntimeError: before the first batch.
        """
        if self._task == "auto":
            raise RuntimeError("The task is not known yet; this is an error in lightning_unlearn.")
        return self._task

    @property
    def settled(self) -> dict[str, Any]:
        """Settings inferred from the first batch, as primitives."""
        layout = self.layout
        found = None if layout is None else [list(layout.label), layout.convention, list(layout.fields)]
        return {"task": self._task, "outputs": self.num_outputs, "layout": found}

    def settle_as(self, settled: Mapping[str, Any]) -> None:
        """Take the task from a checkpoint, before the first batch of the resumed fit."""
        self._task, self.num_outputs = settled["task"], settled["outputs"]
        if (layout := settled["layout"]) is not None:
            self.layout = Layout(tuple(layout[0]), layout[1], tuple(layout[2]))

    @property
    def num_classes(self) -> int:
        """Number of classes of a row, C."""
        return self.num_outputs if self.task == "multiclass" else 2

    @property
    def rows_per_sample(self) -> int:
        """Number of rows per sample: 1, or the number of labels in a multi-label task."""
        return self.num_outputs if self.task == "multilabel" else 1

    def output(self, model: nn.Module, x: Any) -> Tensor:
        """Return the logits that a model returns, (B, K), one column for a binary task.

        Raises:
            TypeError: if it returns something else.
        """
        returned = call_forward(model, x)
        logits: Any = (self.data.logits_from or extract_logits)(returned)
        if not isinstance(logits, Tensor) or logits.ndim not in (1, 2) or not logits.is_floating_point():
            found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"Expected forward of {type(model).__name__} to return logits (B, C), or (B,) of a binary task, or"
                f" something that holds them as 'logits', but it returned {found}; pass"
                " data=DataFormat(logits_from=...) to AttributionPartitionCallback, a function from what forward"
                " returns to the logits."
            )
        return logits.unsqueeze(1) if logits.ndim == 1 else logits

    def infer_task(self, output: Tensor, label: Any) -> None:
        """Infer the task from the first batch; later calls do nothing.

        Args:
            output: (B, K).
            label: as the batch holds it.

        Raises:
            ValueError: if the data do not fit the task that the user has set.
        """
        if self._task != "auto":
            return
        outputs = output.shape[1]
        task = self._seen_task(outputs, label) if self.data.task == "auto" else self.data.task
        if (task == "binary") != (outputs == 1) and task != "multilabel":
            kind = "one logit" if task == "binary" else "a logit for each class, at least two,"
            raise ValueError(
                f"Expected forward to return {kind} per sample with task='{task}', but it returned {outputs}; pass"
                f" data=DataFormat(task='{'multiclass' if task == 'binary' else 'binary'}')."
            )
        self._task, self.num_outputs = task, outputs

    def alike(self, output: Tensor, label: Any) -> TaskFormat:
        """Return a TaskFormat with the same settings, inferred from another first batch; see :meth:`infer_task`."""
        other = TaskFormat(replace(self.data, batch_to_xy=None, logits_from=None))
        other.infer_task(output, label)
        return other

    def _seen_task(self, outputs: int, label: Any) -> Task:
        if outputs == 1:
            return "binary"
        if not _is_dense(label) or label.ndim != 2 or label.shape[1] != outputs:
            return "multiclass"
        known = label[~self._is_ignored(label)]
        bits = bool(((known == 0) | (known == 1)).all())
        # A row with no or several ones, or with ignored entries, is not one-hot.
        return "multilabel" if bits and bool((label.sum(dim=1) != 1).any()) else "multiclass"

    def logits(self, output: Tensor) -> Tensor:
        """Return rows (U, C) of class logits.

        Args:
            output: (B, K), or (B,) in a binary task.
        """
        if self.task == "multiclass":
            return output
        half = output.reshape(-1, 1) / 2
        return torch.cat([-half, half], dim=1)

    def gradients(self, gradient: Tensor) -> Tensor:
        """Return rows (U, C): the loss gradient at the class logits, up to a factor, from that at the output."""
        if self.task == "multiclass":
            return gradient
        flat = gradient.reshape(-1, 1)
        return torch.cat([-flat, flat], dim=1)

    def row_indices(self, index: Tensor) -> Tensor:
        """Return (U,) int64, the rows of samples (B,) by their dataset index."""
        count = self.rows_per_sample
        if count == 1:
            return index
        return (index.unsqueeze(1) * count + torch.arange(count, device=index.device)).flatten()

    def repeat_per_row(self, values: Tensor) -> Tensor:
        """Repeat the values (B,) of samples for each of their rows, (U,)."""
        return values if self.rows_per_sample == 1 else values.repeat_interleave(self.rows_per_sample, dim=0)

    def classes(self, label: Any, num_samples: int) -> Tensor:
        """Return the class labels of rows without checking values, which would synchronize with the accelerator.

        Args:
            label: as the batch holds it.
            num_samples: B.

        Returns:
            (U,) int64: ``IGNORED`` for no label, and smaller numbers for invalid ones.

        Raises:
            ValueError: for a wrong shape or type.
        """
        if not _is_dense(label) or label.is_complex():
            raise ValueError(f"Expected a dense tensor of labels, but got {_kind(label)}{_CONVERT}")
        if self.task == "multiclass":
            if label.ndim == 2 and label.shape == (num_samples, self.num_outputs):
                return self._largest(label)
            return self._indices(label, num_samples)
        shapes = [(num_samples, self.num_outputs)] if self.task == "multilabel" else [(num_samples,), (num_samples, 1)]
        if tuple(label.shape) not in shapes:
            raise ValueError(
                f"Expected labels of shape {shapes[0]}, 0 or 1 for each logit, but got {_kind(label)}{_CONVERT}"
            )
        return self._bits(label.flatten())

    def classes_of_batches(self, batches: Sequence[tuple[Any, int]]) -> Tensor:
        """Return the class labels of the rows of several batches, concatenated first if their shapes allow it.

        Args:
            batches: labels and B of each batch; at least one batch.

        Returns:
            as :meth:`classes`.

        Raises:
            ValueError: as :meth:`classes`.
        """
        labels = [label for label, _ in batches]
        if all(map(_is_dense, labels)) and len({(label.dtype, label.shape[1:]) for label in labels}) == 1:
            return self.classes(torch.cat(labels), sum(size for _, size in batches))
        return torch.cat([self.classes(label, size) for label, size in batches])

    def _indices(self, label: Tensor, num_samples: int) -> Tensor:
        if tuple(label.shape) not in ((num_samples,), (num_samples, 1)) or label.is_floating_point():
            raise ValueError(
                f"Expected integer labels of shape ({num_samples},), one class index per sample, or of shape"
                f" ({num_samples}, {self.num_outputs}), a column for each class, but got {_kind(label)}{_CONVERT}"
            )
        value = label.flatten().long()
        legal = (value >= 0) & (value < self.num_outputs)
        return self._without_ignored(value.where(legal, _ILLEGAL), label.flatten())

    def _largest(self, label: Tensor) -> Tensor:
        largest, value = label.max(dim=1)
        rows = label.double()
        legal = (rows >= 0).all(dim=1) & (largest > 0) & rows.isfinite().all(dim=1)
        if self.data.soft_labels == "error":
            legal &= (rows.sum(dim=1) - 1).abs().le(_ROUNDING) & (largest.double() >= 1 - _ROUNDING)
        return value.where(legal, _ILLEGAL)

    def _bits(self, label: Tensor) -> Tensor:
        value = label.double()
        legal = (value >= 0) & (value <= 1)
        if self.data.soft_labels == "error":
            legal &= (value == 0) | (value == 1)
        return self._without_ignored((value > 0.5).long().where(legal, _ILLEGAL), label)

    def _without_ignored(self, value: Tensor, label: Tensor) -> Tensor:
        return value.masked_fill(self._is_ignored(label), IGNORED)

    def _is_ignored(self, label: Tensor) -> Tensor:
        if self.data.ignore_index is None:
            return torch.zeros_like(label, dtype=torch.bool)
        if math.isnan(self.data.ignore_index):
            return label.isnan()
        # Not as uint8, in which -100 is 156.
        return (label if label.is_floating_point() else label.long()) == self.data.ignore_index

    def labels(self, label: Any, num_samples: int, first_index: int = 0) -> Tensor:
        """Return the class labels of rows, after checking that each is a class or ignored.

        Args:
            label: as the batch holds it.
            num_samples: B.
            first_index: dataset index of the first sample, for the message.

        Returns:
            (U,) int64 in [0, C), ``IGNORED`` for no label.

        Raises:
            ValueError: if a label is not a class.
        """
        found = self.classes(label, num_samples)
        illegal = (found == _ILLEGAL).nonzero().flatten()
        if len(illegal):
            at = int(illegal[0]) // self.rows_per_sample
            raise ValueError(self._label_error(label[at], first_index))
        return found

    def _label_error(self, label: Tensor, first_index: int) -> str:
        where = f"in the batch that starts at dataset index {first_index}"
        shown = label.item() if label.numel() == 1 else [round(value, 4) for value in label.flatten()[:8].tolist()]
        if self.task == "multiclass" and label.numel() == 1:
            start = ", or number the classes from 0 (batch_to_xy)" if shown == self.num_outputs else ""
            return (
                f"Expected labels in [0, {self.num_outputs}), as the model has {self.num_outputs} outputs, but found"
                f" {shown} {where}; pass data=DataFormat(ignore_index={shown})"
                f" if it means no label{start}."
            )
        if self.task == "multiclass":
            return (
                f"Expected labels with a single 1 in each row, but found {shown} {where}; pass"
                " data=DataFormat(soft_labels='argmax') to take the class of the largest, or task='multilabel' if"
                " there may be several. Where samples are mixed (MixUp, CutMix), offer attribution_dataloader(), a"
                " loader that does not mix them."
            )
        return (
            f"Expected labels 0 or 1 of a {self.task} task, but found {shown} {where}; pass"
            " data=DataFormat(soft_labels='argmax') to round probabilities, or ignore_index= the value that means no"
            " label."
        )

    def replaced(self, label: Tensor, new: Tensor) -> Tensor:
        """Replace classes in a batch's labels, keeping their form.

        Args:
            label: as the batch holds it.
            new: (U,) int64, the new classes; -1 to keep the given one.
        """
        new = new.to(label.device)
        if self.task == "multiclass" and label.ndim == 2 and label.shape[1] == self.num_outputs:
            rows = torch.nn.functional.one_hot(new.clamp(min=0), self.num_outputs).to(label.dtype)
            return torch.where((new >= 0).unsqueeze(1), rows, label)
        return torch.where(new.reshape(label.shape) >= 0, new.reshape(label.shape).to(label.dtype), label)


_CONVERT = "; pass data=DataFormat(batch_to_xy=...) to AttributionPartitionCallback to convert them."


def _is_dense(label: Any) -> bool:
    return isinstance(label, Tensor) and label.layout == torch.strided and not label.is_nested


def _kind(label: Any) -> str:
    if not isinstance(label, Tensor):
        return type(label).__name__
    if label.is_nested:
        return "a nested tensor"
    layout = "" if label.layout == torch.strided else f"{label.layout} and "
    return f"{layout}{label.dtype} of shape {tuple(label.shape)}"
