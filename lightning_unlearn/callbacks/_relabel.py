"""Training batches with other labels than the data set gives: replaced on the way in, nothing changed at the source.

A batch is known by the dataset indices that the loader has drawn for it, so workers, shuffling and DDP make no
difference, and neither the data set nor its samples are touched.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_unlearn.callbacks._base import read_labels, same_labels
from lightning_unlearn.callbacks._lightning import BatchHook, live_iterator, to_device, undisturbed
from lightning_unlearn.callbacks._scoring import train_loader
from lightning_unlearn.data import batch_size, delivered_indices, indexed_batches, is_torchs_iterator
from lightning_unlearn.targets import Reading

_ADVICE = "; use on_noisy='drop' or 'weigh', which need no other labels"


def with_labels(batch: Any, reading: Reading, new: Tensor) -> Any:
    """The batch with other labels; the one given stays as it is.

    Args:
        batch: a tuple, list, dict, named tuple or dataclass, nested or not, that holds the tensor of labels.
        reading: finds it, and knows its form.
        new: (U,) int64, the classes of the batch's rows; -1 where the given one stays.

    Raises:
        TypeError: if the labels have not the form that the first batch had, or are not in the batch as they are but
            made of it.

    Example:
        >>> reading = Reading()
        >>> reading.settle(torch.zeros(2, 9), torch.tensor([4, 5]))
        >>> batch = (torch.zeros(2, 3), torch.tensor([4, 5]))
        >>> with_labels(batch, reading, torch.tensor([-1, 7]))[1]
        tensor([4, 7])
    """
    label = reading.split(batch)[1]
    try:
        rows = len(reading.classes(label, len(label)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"The labels of a training batch cannot be replaced{_ADVICE}. {error}") from error
    if rows != len(new):
        raise TypeError(
            f"Expected labels of {len(new)} rows to be replaced in a training batch, but got {rows}{_ADVICE}."
        )
    replaced = reading.replaced(label, new)
    found = []

    def put(value: Tensor) -> Tensor:
        if value is not label:
            return value
        found.append(value)
        return replaced

    changed = apply_to_collection(batch, Tensor, put)
    if not found:
        raise TypeError(
            "Expected the labels of a training batch to be one of its tensors, so that they can be replaced, but"
            f" batch_to_xy makes them of something else{_ADVICE}."
        )
    return changed


class Relabelling:
    """Replaces labels in the training batches of a fit, from :meth:`attach` to :meth:`detach`."""

    def __init__(self) -> None:
        self._hook = BatchHook()

    def attach(self, trainer: Trainer, pl_module: LightningModule, reading: Reading, new_label: Tensor) -> None:
        """From now on training batches have the new labels.

        Args:
            trainer: of the running fit, whose train loader remembers its batches.
            pl_module: the user's.
            reading: finds the labels in a batch as the loader delivers it.
            new_label: (N,) int64, or (N, L) of a multi-label task; -1 for the given one.
        """

        def change(batch: Any) -> Any:
            index = delivered_indices(*live_iterator(trainer))
            if index is None:
                raise RuntimeError(
                    f"The dataset indices of a training batch are not known, so it cannot be re-labelled{_ADVICE}."
                )
            return with_labels(batch, reading, new_label[index].flatten())

        self._hook.attach(trainer, pl_module, change)

    def detach(self) -> None:
        """Leaves the batches alone again."""
        self._hook.detach()


def check_relabelling(trainer: Trainer, pl_module: LightningModule, reading: Reading) -> None:
    """Refuses, before the first step, batches whose labels could not be replaced later.

    Raises:
        TypeError: saying what is in the way.
    """
    loader = train_loader(trainer)
    iterator, _ = live_iterator(trainer)
    if not is_torchs_iterator(iterator) or (loader.num_workers > 0 and not getattr(loader, "in_order", True)):
        raise TypeError(
            "Expected a train loader of torch's own iteration that delivers batches in the order drawn, so that they"
            f" can be re-labelled, but {type(loader).__name__} does not (or training_step draws batches itself, or"
            f" in_order=False){_ADVICE}."
        )
    with undisturbed(trainer, pl_module), torch.no_grad():
        size = min(batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
        first, again = (read_labels(trainer, pl_module, reading, loader, torch.arange(size)) for _ in range(2))
        if not same_labels(first, again):
            raise TypeError(
                "Expected training batches with the labels of their samples, so that they can be replaced, but they"
                f" differ from one reading to the next, as where collate_fn mixes samples{_ADVICE}."
            )
        _, batch = next(indexed_batches(loader, torch.arange(size), probing=True))
        new = (reading.labels(reading.split(batch)[1], size) + 1) % reading.num_classes
        _, arrived = reading.split(to_device(trainer, pl_module, with_labels(batch, reading, new)))
    if not reading.classes(arrived, size).cpu().equal(new.cpu()):
        raise TypeError(
            "Expected labels that are replaced in a training batch to arrive in training_step as they are, but the"
            f" transfer hooks change them{_ADVICE}."
        )
