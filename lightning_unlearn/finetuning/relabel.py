"""Replaces labels in training batches; the dataset is not changed.

A batch is identified by the dataset indices that the loader drew for it, so workers, shuffling and DDP are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import resolve_layer
from lightning_unlearn.attribution.head_watch import HeadWatch, Step
from lightning_unlearn.data.dataset_state import unopened
from lightning_unlearn.data.index_tracking import delivered_indices, is_torchs_iterator
from lightning_unlearn.data.loaders import batch_size, iterate_indices
from lightning_unlearn.data.task_format import IGNORED, TaskFormat
from lightning_unlearn.finetuning.companions import Companion, companions_in
from lightning_unlearn.finetuning.relabeled_batch import ADVICE, check_given, rows_of, with_labels
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.data_checks import read_labels, same_labels
from lightning_unlearn.trainer.row_checks import establish_rows
from lightning_unlearn.trainer.train_data import BatchHook
from lightning_unlearn.utilities.reduce import Reduce

# Samples that are read to see which fields are made of the label, where one seems to be.
_MOST_READ = 256
# So many steps, at most, until it is clear which labels the loss follows; so many rows tell, and so many times as many.
_MOST_STEPS = 32
_FEWEST = 8
_TIMES = 3


class Relabeling:
    """Replaces labels in the training batches of a fit, from :meth:`attach` to :meth:`detach`."""

    def __init__(self) -> None:
        self._hook = BatchHook()
        self._companions: list[Companion] = []
        self._head: str | None = None
        self._reading: TaskFormat | None = None
        # Given and new classes of the batch in hand.
        self._moved: tuple[Tensor, Tensor] | None = None
        self._head_watch = HeadWatch()
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at nothing. No tensor is made here: a spawned process would find it gone.
        return {**self.__dict__, "_moved": None, "_reading": None}

    def learn(self, fit: FitContext, head: str | None) -> None:
        """Find the batch fields that are derived from the label, before the first step.

        Args:
            fit: the fit that starts.
            head: dotted path of the module that returns the logits; None if there is none.
        """
        loader, task_format, total = fit.train_loader, fit.task_format, fit.total
        with fit.isolated_eval(), torch.no_grad():
            few = iterate_indices(loader, torch.arange(min(batch_size(loader), total)), probing=True, absent=set())
            self.learn_from([batch for _, batch in few], task_format, head)
            if self._companions:
                # Of the first ones perhaps by chance.
                more = torch.linspace(0, total - 1, min(_MOST_READ, total)).long()
                read = iterate_indices(loader, more, probing=True, absent=set())
                self.learn_from([batch for _, batch in read], task_format, head)

    def learn_from(self, batches: Sequence[Any], task_format: TaskFormat, head: str | None) -> None:
        """Learn the same as :meth:`learn`, from batches as the loader delivers them."""
        self._head, self._companions = head, companions_in(batches, task_format)

    def attach(self, fit: FitContext, new_label: Tensor, given: Callable[[], Tensor]) -> None:
        """Replace labels in training batches from now on.

        Args:
            fit: the running fit, whose train loader tracks its indices.
            new_label: (N,) int64, or (N, L) in multi-label tasks; -1 keeps the given label.
            given: returns the labels of the partition, in the shape of ``new_label``; called for each batch.
        """
        task_format = fit.task_format

        def change(batch: Any) -> Any:
            index = delivered_indices(*fit.live_iterator())
            if batch is None:
                # Of items none of which is there.
                return batch
            if index is None:
                raise RuntimeError(
                    f"The dataset indices of a training batch are unknown, so it cannot be re-labeled{ADVICE}."
                )
            known = given()
            rows = rows_of(batch, task_format, index, known, fit.train_loader)
            return self.replaced(batch, new_label[rows].flatten(), known[rows].flatten(), len(rows))

        self.watch(task_format)
        self._hook.attach(fit, change)

    def watch(self, task_format: TaskFormat) -> None:
        """Check from now on that the loss follows the labels that :meth:`replaced` puts into batches."""
        self._reading = task_format
        self._is_watching = self._head is not None

    def replaced(self, batch: Any, new: Tensor, given: Tensor, rows: int) -> Any:
        """Return the batch with new labels.

        Args:
            batch: the batch as delivered by the loader.
            new: (U,) int64, new labels; -1 keeps the given one.
            given: (U,) int64, the labels of the partition; -1 if unknown.
            rows: number of samples.

        Raises:
            ValueError: if the labels in the batch differ from ``given``.
        """
        task_format = self._reading
        if task_format is None:
            raise RuntimeError("The format of the labels to replace is unknown; this is an error in lightning_unlearn.")
        check_given(batch, task_format, given, rows)
        changed = with_labels(batch, task_format, new, self._companions)
        if self._is_watching:
            self._moved = task_format.classes(task_format.split(batch)[1], rows).cpu(), new
        return changed

    def start_batch(self, model: nn.Module) -> None:
        """Watch which labels the loss of a step follows. Call in ``on_train_batch_start``."""
        self._head_watch.end()
        self._is_pending = self._is_watching
        if self._is_watching and self._head is not None and self._reading is not None and self._moved is not None:
            rows = len(self._moved[0]) // self._reading.rows_per_sample
            step = Step(range(rows), None, self._reading.num_outputs)
            self._head_watch.start(resolve_layer(model, self._head), step)

    def end_batch(self, reduce: Reduce) -> None:
        """Check that the loss follows the new labels. Call after a backward pass, on every rank.

        Args:
            reduce: sums over the ranks.

        Raises:
            RuntimeError: if it follows the given labels.
        """
        if not self._is_pending:
            return
        step, moved = self._head_watch.end(), self._moved
        self._is_pending, self._moved = False, None
        self._seen += reduce(self._followed(step, moved))
        self._steps += 1
        old, new = self._seen.tolist()
        if old >= _FEWEST and old > _TIMES * new:
            raise RuntimeError(
                f"Expected the loss to follow the new labels of re-labeled samples, but in {old:.0f} of"
                f" {old + new:.0f} rows it follows the given label: training_step reads labels from"
                f" elsewhere{ADVICE}."
            )
        self._is_watching = self._steps < _MOST_STEPS and not (new >= _FEWEST and new > _TIMES * old)

    def _followed(self, step: Step | None, moved: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return (2,), rows whose logit the loss raises for the given label, and for the new one."""
        gradient = None if step is None else step.gradient_rows()
        if self._reading is None or moved is None or gradient is None:
            return torch.zeros(2, dtype=torch.float64)
        rows = self._reading.gradients(gradient).cpu()
        given, new = moved
        changed = (new >= 0) & (given >= 0) & (new != given) & rows.isfinite().all(dim=1) & (rows != 0).any(dim=1)
        raised = rows.argmin(dim=1)[changed]
        return torch.stack([(raised == given[changed]).sum(), (raised == new[changed]).sum()]).double()

    def detach(self) -> None:
        """Leave the batches alone again."""
        self._hook.detach()
        self._head_watch.end()
        self._reading = self._moved = None
        self._is_watching = self._is_pending = False
        self._seen = torch.zeros(2, dtype=torch.float64)
        self._steps = 0


def fault_of_absent(fit: FitContext, partition: Partition) -> str:
    """Return why batches with items that may be None cannot be re-labeled; empty if they can."""
    given, loader, task_format = partition.label, fit.train_loader, fit.task_format
    unlabeled = (given == IGNORED).reshape(len(given), -1).all(dim=1)
    others = (~unlabeled).nonzero().flatten()[: max(1, batch_size(loader) - 1)]
    with fit.isolated_eval(keep=False), torch.no_grad():
        with unopened(loader):
            absent = next((i for i in unlabeled.nonzero().flatten().tolist() if loader.dataset[i] is None), None)
        if absent is None:
            return ""
        index = torch.cat([others[:1], torch.tensor([absent]), others[1:]])
        _, batch = next(iterate_indices(loader, index, probing=True, size=len(index)))
        try:
            rows = rows_of(batch, task_format, index, given, loader)
            check_given(batch, task_format, given[rows].flatten(), len(rows))
        except (TypeError, ValueError) as error:
            return str(error)
    return ""


def check_relabeling(fit: FitContext) -> None:
    """Refuse batches whose labels could not be replaced later. Call before the first step.

    Raises:
        TypeError: if labels cannot be replaced.
    """
    loader = fit.train_loader
    iterator, _ = fit.live_iterator()
    if not is_torchs_iterator(iterator) or (loader.num_workers > 0 and not getattr(loader, "in_order", True)):
        raise TypeError(
            "Re-labeling needs a train loader that delivers batches in the order drawn, but"
            f" {type(loader).__name__} does not (or training_step draws batches itself, or"
            f" in_order=False){ADVICE}."
        )
    with fit.isolated_eval(), torch.no_grad():
        size = min(batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
        first, again = (read_labels(fit, loader, torch.arange(size)) for _ in range(2))
        if not same_labels(first, again):
            raise TypeError(
                "Expected training batches to contain the labels of their samples, so that they can be replaced,"
                " but the labels differ between two reads of a sample, for example because collate_fn mixes"
                f" samples{ADVICE}."
            )
        if fit.offers_scoring_loader:
            # Else the passes draw from it too, and it has been looked at for them.
            establish_rows(fit, loader)
        _, batch = next(iterate_indices(loader, torch.arange(size), probing=True, absent=set()))
        check_arrives(fit, batch)


def check_arrives(fit: FitContext, batch: Any) -> None:
    """Check that labels that are replaced in a batch arrive in ``training_step``. Within ``isolated_eval``.

    Raises:
        TypeError: where transfer hooks change them.
    """
    task_format = fit.task_format
    given = task_format.split(batch)[1]
    new = (task_format.labels(given, len(given)) + 1) % task_format.num_classes
    _, arrived = task_format.split(fit.to_device(with_labels(batch, task_format, new)))
    if not task_format.classes(arrived, len(given)).cpu().equal(new.cpu()):
        raise TypeError(
            f"Expected replaced labels to reach training_step unchanged, but the transfer hooks change them{ADVICE}."
        )
