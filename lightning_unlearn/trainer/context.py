"""Context of a fit for the steps of the method: batches in index order, and logits of the user's module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.attribution import ForwardTrace, trace_forward
from lightning_unlearn.data.loaders import batch_count, batch_size, check_iterates_in_order, iterate_indices
from lightning_unlearn.data.task_format import IGNORED, TaskFormat
from lightning_unlearn.trainer.compat import has_forward
from lightning_unlearn.trainer.layouts import settle_layout
from lightning_unlearn.trainer.progress import shown
from lightning_unlearn.trainer.protocols import PartitionSource, keyed_of
from lightning_unlearn.trainer.row_counts import check_batch, check_number
from lightning_unlearn.trainer.running_fit import RunningFit

# Largest number of samples whose inputs are hashed, which takes 720 MB on every rank.
_MOST_HASHED = 10_000_000


@dataclass(frozen=True, eq=False)
class IndexedBatch:
    """One batch of a pass in index order.

    Args:
        index: (B,) int64 on the CPU.
        weight: (B,) float32 on the batch's device, 0 for padding.
        x: the model's input.
        label: (U,) int64, class labels of the batch's rows, -1 for ignored ones; rows are samples except in a
            multi-label task (see :class:`~lightning_unlearn.data.task_format.TaskFormat`).
    """

    index: Tensor
    weight: Tensor
    x: Any
    label: Tensor


@dataclass(frozen=True, eq=False)
class FitContext(RunningFit):
    """Context of a fit with a partition: one object, created in setup and dropped when the fit has ended.

    Args:
        source: the callback that publishes the partition and holds the task format.
    """

    source: PartitionSource

    @property
    def task_format(self) -> TaskFormat:
        """How batches, outputs and labels are read."""
        return cast("TaskFormat", self.source.task_format)

    @property
    def keyed(self) -> Any:
        """Reader of the keys of training batches, a ``KeyedBatches``; None if samples have a dataset index."""
        return keyed_of(self.source)

    @property
    def partners(self) -> list[Any]:
        """The callbacks that act on the partition."""
        return [callback for callback in self.callbacks if getattr(callback, "acts_on_partition", False)]

    @property
    def hashes_inputs(self) -> bool:
        """Whether inputs are hashed, because a callback shows samples with their duplicates; not for large datasets."""
        return self.total <= _MOST_HASHED and any(
            getattr(callback, "shows_samples", False) for callback in self.callbacks
        )

    def output(self, x: Any) -> Tensor:
        """Return the logits that ``forward`` returns, (B, K).

        Raises:
            TypeError: if the module has no ``forward``, or it takes another input or returns something else.
        """
        if not has_forward(self.pl_module):
            raise TypeError(
                f"Expected {type(self.pl_module).__name__} to have a forward that returns logits, but it has none; add"
                " `def forward(self, x): return self.net(x)`, which training_step may call too."
            )
        return self.task_format.output(self.pl_module, x)

    def logits(self, x: Any) -> Tensor:
        """Return rows (U, C) of class logits; see :class:`~lightning_unlearn.data.task_format.TaskFormat`."""
        return self.task_format.logits(self.output(x))

    def probe(self) -> tuple[ForwardTrace, IndexedBatch]:
        """Return one forward pass over the first samples; see :func:`probe`."""
        return probe(self)

    def batches(self, loader: DataLoader[Any], title: str, absent: set[int] | None = None) -> Iterator[IndexedBatch]:
        """Yield this rank's shard of a loader's data set in index order; see :func:`in_index_order`."""
        return in_index_order(self, loader, title, absent)


def shared_context(
    trainer: Trainer, pl_module: LightningModule, source: PartitionSource, known: Iterable[FitContext | None]
) -> FitContext:
    """Return the context of the fit that is being set up, with the memory of the one that there is, if there is one.

    Args:
        trainer: of the fit.
        pl_module: the user's.
        source: of the partition; where two callbacks publish one each, each has a context of its own.
        known: those of the other callbacks. One of a fit that has begun was left behind by a fit that ended otherwise
            than in a teardown or an exception.
    """
    here = [fit for fit in known if fit is not None and fit.trainer is trainer and not fit.memory.has_begun]
    if not here:
        return FitContext(trainer, pl_module, source)
    return next((fit for fit in here if fit.source is source), None) or replace(here[0], source=source)


def probe(fit: FitContext) -> tuple[ForwardTrace, IndexedBatch]:
    """Run a forward pass over the first samples, to trace the layers and to fail before hours of training.

    If samples are identified by a key, the pass uses the current training batch.
    """
    if fit.keyed is not None:
        return _probe_in_hand(fit)
    with fit.isolated_eval(keep=False):
        _ = fit.scoring_loader
    with fit.isolated_eval(), torch.no_grad():
        check_iterates_in_order(fit.train_loader)
        loader = fit.scoring_loader
        size = min(batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
        absent: set[int] = set()
        indices, batch = next(iterate_indices(loader, torch.arange(size), probing=True, absent=absent))
        check_batch(loader, batch, len(indices))
        task_format, batch = fit.task_format, fit.to_device(batch)

        def traced(value: Any) -> ForwardTrace:
            return trace_forward(fit.model, fit.output, value)

        trace, x, label = settle_layout(task_format, fit.model, batch, len(indices), traced)
    label = without(absent, indices, task_format, task_format.labels(label, len(indices)))
    return trace, IndexedBatch(indices, _is_there(absent, indices).float().to(label.device), x, label)


def _probe_in_hand(fit: FitContext) -> tuple[ForwardTrace, IndexedBatch]:
    batch, keys, task_format = fit.keyed.batch, fit.keyed.keys, fit.task_format
    if keys is None:
        raise RuntimeError("There is no training batch to look at; this is an error in lightning_unlearn.")
    with fit.isolated_eval(), torch.no_grad():

        def traced(value: Any) -> ForwardTrace:
            return trace_forward(fit.model, fit.output, value)

        trace, x, label = settle_layout(task_format, fit.model, batch, len(keys), traced)
        label = task_format.labels(label, len(keys))
    return trace, IndexedBatch(torch.arange(len(keys)), torch.ones(len(keys), device=label.device), x, label)


def without(absent: set[int], indices: Tensor, task_format: TaskFormat, label: Tensor) -> Tensor:
    """Return the labels (U,) of a batch, with those of absent samples set to ignored."""
    gone = ~_is_there(absent, indices)
    return label.masked_fill(task_format.repeat_per_row(gone).to(label.device), IGNORED) if gone.any() else label


def _is_there(absent: set[int], indices: Tensor) -> Tensor:
    return torch.tensor([index not in absent for index in indices.tolist()], dtype=torch.bool)


@torch.no_grad()
def in_index_order(
    fit: FitContext, loader: DataLoader[Any], title: str, absent: set[int] | None = None
) -> Iterator[IndexedBatch]:
    """Yield this rank's shard of a loader's dataset in index order. Use inside ``isolated_eval``.

    A sample that is None in the dataset has a weight of 0 and no label.

    Args:
        fit: the running fit.
        loader: a loader whose samples have a dataset index.
        title: title of the progress bar.
        absent: receives the indices of such samples; indices that it already holds are treated likewise.

    Yields:
        batches, the same number on every rank.
    """
    task_format = fit.task_format
    index, weight = fit.shard(len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
    absent = set() if absent is None else absent
    done, batches = 0, batch_count(loader, len(index))
    for indices, batch in shown(fit, title, batches, iterate_indices(loader, index, absent=absent)):
        x, label = task_format.split(fit.to_device(batch))
        check_number(loader, label, len(indices))
        label = without(absent, indices, task_format, task_format.labels(label, len(indices), int(indices[0])))
        counts = weight[done : done + len(indices)] * _is_there(absent, indices)
        yield IndexedBatch(indices, counts.to(label.device), x, label)
        done += len(indices)
