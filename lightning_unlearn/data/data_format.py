"""User settings for the format of batches, outputs and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_unlearn.data.sample_key import check_sample_key
from lightning_unlearn.utilities.calls import check_function
from lightning_unlearn.utilities.checks import check_choice, check_flag, check_number, did_you_mean, plain, shown

Task = Literal["auto", "multiclass", "binary", "multilabel"]
"""The kinds of classification, by torchmetrics' names; ``"auto"``: inferred from the first batch."""
SoftLabels = Literal["error", "argmax"]
"""How labels that are probabilities are treated."""


@dataclass(frozen=True)
class DataFormat:
    """Describes batches, model outputs and labels.

    The defaults fit most data. In YAML, only what differs needs to be given, as a mapping (``data: {task: binary}``) or
    with ``class_path`` and ``init_args``.

    Args:
        task: ``"multiclass"``; ``"binary"`` (one logit); ``"multilabel"`` (one logit per label, any number of labels
            per sample, each judged separately); or ``"auto"``, inferred from the first batch.
        soft_labels: ``"error"`` refuses labels that are probabilities; ``"argmax"`` takes the most probable class.
            One-hot labels are always accepted.
        ignore_index: label that means "no label", as in ``torch.nn.functional.cross_entropy``. These samples are not
            judged and stay in training unchanged. May be NaN; None if there is no such label.
        batch_to_xy: function from a batch (on the device) to ``(x, y)``: the input of ``forward`` (a tensor, or a tuple
            or dict of its arguments) and the labels. By default a batch is ``(x, y)``, ``(x1, x2, ..., y)``, or a dict,
            named tuple or dataclass with labels under a usual name (see
            :func:`~lightning_unlearn.data.batch.split_batch`); other layouts that fit ``forward``, for example
            ``(labels, text, offsets)``, are detected.
        logits_from: function from the output of ``forward`` to logits. By default the output itself, its ``logits``, or
            the first element of a tuple.
        sample_key: key that identifies a sample, if it has no dataset index: for an IterableDataset, a stream, a custom
            sampler, or several train loaders. The name of a field of a training batch (``"__key__"``; with dots for
            nested fields, for example of one of several loaders: ``"images.key"``), or a function from the batch, as
            the loader delivers it, to the keys: an integer or string per row. A key must be unique to its sample and
            the same in every epoch.
        verify: compare the content of 16 training samples with the checkpoint or the ``review`` file, and refuse to
            continue if more than a quarter differ. Skipped under random augmentation. Number and labels are always
            compared.

    Raises:
        ValueError: for an invalid value, or if a function is expected and something else is given.

    Example:
        >>> DataFormat(task="binary").ignore_index
        -100
        >>> DataFormat(task="regression")
        Traceback (most recent call last):
        ValueError: Expected task to be one of 'auto', 'multiclass', 'binary', 'multilabel', but got 'regression'.
    """

    task: Task = "auto"
    soft_labels: SoftLabels = "error"
    ignore_index: float | None = -100
    batch_to_xy: Callable[[Any], tuple[Any, Tensor]] | None = None
    logits_from: Callable[[Any], Tensor] | None = None
    sample_key: str | Callable[[Any], Any] | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "task": check_choice("task", self.task, get_args(Task)),
            "soft_labels": check_choice("soft_labels", self.soft_labels, get_args(SoftLabels)),
            "ignore_index": _checked_ignore_index(self.ignore_index),
            "sample_key": check_sample_key(self.sample_key),
            "verify": check_flag("verify", self.verify),
        }
        if self.batch_to_xy is not None:
            checked["batch_to_xy"] = check_function("batch_to_xy", self.batch_to_xy, "from a batch to (x, y)")
        if self.logits_from is not None:
            what = "from what forward returns to logits"
            checked["logits_from"] = check_function("logits_from", self.logits_from, what)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def make_data_format(data: DataFormat | Mapping[str, Any] | None) -> DataFormat:
    """Convert a user's argument, an object, a mapping of its fields, or None for the defaults, to a DataFormat.

    Raises:
        TypeError: for anything else, or an unknown field.
        ValueError: see :class:`DataFormat`.

    Example:
        >>> make_data_format({"task": "binary"}).task
        'binary'
        >>> make_data_format({"batch_to_x": len})
        Traceback (most recent call last):
        TypeError: Expected data to have fields of DataFormat only, but got 'batch_to_x'. Did you mean 'batch_to_xy'?
    """
    if data is None:
        return DataFormat()
    if isinstance(data, DataFormat):
        return data
    if not isinstance(data, Mapping):
        raise TypeError(f"Expected data to be a DataFormat or a dict of its fields, but got {shown(data)}.")
    names = [field.name for field in fields(DataFormat)]
    for name in data:
        if name not in names:
            hint = did_you_mean(str(name), names)
            raise TypeError(f"Expected data to have fields of DataFormat only, but got {shown(name)}.{hint}")
    return DataFormat(**data)


def _checked_ignore_index(value: Any) -> float | None:
    """Return the value to compare labels with: whole numbers as int, since a float may not represent them exactly."""
    found = plain(value)
    if found is None or (isinstance(found, float) and math.isnan(found)):
        return found
    if isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**63:
        return int(found)
    return check_number("ignore_index", value, meaning="the label that means none, NaN, or None")
