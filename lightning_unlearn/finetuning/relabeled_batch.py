"""One training batch with other labels, and the samples that its rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.batch import field_at
from lightning_unlearn.data.dataset_state import unopened
from lightning_unlearn.data.task_format import IGNORED, TaskFormat
from lightning_unlearn.finetuning.companions import Companion

ADVICE = "; use on_noisy='drop' or 'reweight', which do not replace labels"


def with_labels(batch: Any, task_format: TaskFormat, new: Tensor, companions: Sequence[Companion] = ()) -> Any:
    """Return a copy of the batch with new labels.

    Args:
        batch: a tuple, list, dict, named tuple or dataclass, nested or not, that holds the tensor of labels.
        task_format: locates the labels and describes their format.
        new: (U,) int64, new classes of the rows; -1 keeps the given one.
        companions: fields that are derived from the label.

    Raises:
        TypeError: if the labels have a different format than in the first batch, or are not a tensor of the batch.

    Example:
        >>> task_format = TaskFormat()
        >>> task_format.infer_task(torch.zeros(2, 9), torch.tensor([4, 5]))
        >>> batch = (torch.zeros(2, 3), torch.tensor([4, 5]))
        >>> with_labels(batch, task_format, torch.tensor([-1, 7]))[1]
        tensor([4, 7])
    """
    label = task_format.split(batch)[1]
    try:
        given = task_format.classes(label, len(label))
    except (TypeError, ValueError) as error:
        raise TypeError(f"The labels of a training batch cannot be replaced{ADVICE}. {error}") from error
    if len(given) != len(new):
        raise TypeError(
            f"Expected labels of {len(new)} rows to be replaced in a training batch, but got {len(given)}{ADVICE}."
        )
    replaced = task_format.replaced(label, new)
    made = [(one, field_at(batch, one.path)) for one in companions]
    found = []

    def put(value: Tensor) -> Tensor:
        if value is label:
            found.append(value)
            return replaced
        one = next((one for one, field in made if field is value), None)
        return value if one is None else one.replaced(batch, value, given, new.to(value.device))

    changed = apply_to_collection(batch, Tensor, put)
    if not found:
        raise TypeError(
            "Expected the labels of a training batch to be one of its tensors, so that they can be replaced,"
            f" but batch_to_xy computes them from something else{ADVICE}."
        )
    return changed


def rows_of(batch: Any, task_format: TaskFormat, index: Tensor, given: Tensor, loader: DataLoader[Any]) -> Tensor:
    """Return the dataset indices of a batch's rows; a collate function may have removed items that are None.

    Args:
        batch: the batch as delivered by the loader.
        task_format: locates the labels.
        index: (B,) int64, the indices drawn.
        given: (N,) or (N, L), the labels of the partition, in which such samples have no label.
        loader: the loader, whose dataset is read if other samples have no label either.

    Raises:
        TypeError: if the rows do not match the indices.
    """
    rows: int = len(task_format.split(batch)[1])
    if rows == len(index):
        return index
    there = (given[index] != IGNORED).reshape(len(index), -1).any(dim=1)
    if int(there.sum()) != rows:
        pairs = zip(there, index.tolist(), strict=True)
        with unopened(loader):
            there = torch.tensor([bool(known) or loader.dataset[i] is not None for known, i in pairs])
    if int(there.sum()) != rows:
        raise TypeError(
            f"Expected labels of {len(index)} rows to be replaced in a training batch, but got {rows}, not"
            f" counting items that are None in the dataset{ADVICE}."
        )
    return index[there]


def check_given(batch: Any, task_format: TaskFormat, given: Tensor, rows: int) -> None:
    """Refuse to replace labels that are not those of the samples for which the new ones are.

    Args:
        batch: as the loader delivers it.
        task_format: finds its labels.
        given: (U,) int64, the labels of the partition for the batch's rows.
        rows: how many samples these are.

    Raises:
        ValueError: with their number.
    """
    label = task_format.classes(task_format.split(batch)[1], rows).cpu()
    wrong = int(((given >= 0) & (label != given)).sum())
    if wrong:
        raise ValueError(
            "Expected the rows of a training batch to have the labels of the partition at their dataset"
            f" indices, but {wrong} of {len(given)} differ, for example because collate_fn pads a batch, or"
            f" labels have changed since; none was replaced{ADVICE}."
        )
