"""Reads label evidence from training steps, and stops when rows cannot be matched with samples.

The fit is not changed: the user's batch sampler is wrapped to track indices, the head's output is copied, and the
gradient of the loss at that output is read. The caller of a :class:`TrainStepReader` calls, in this order,
``attach`` in ``setup``, ``start`` in ``on_train_start``, ``start_epoch`` in ``on_train_epoch_start``, ``start_batch``
and ``end_batch`` in ``on_train_batch_start`` and ``on_train_batch_end``, ``end_epoch`` in ``on_train_epoch_end``, and
``detach`` in ``teardown`` and ``on_exception``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import resolve_layer
from lightning_unlearn.attribution.head_watch import HeadWatch, Step, as_columns
from lightning_unlearn.data.index_tracking import as_indices, last_batch_indices
from lightning_unlearn.data.task_format import IGNORED, TaskFormat
from lightning_unlearn.evidence.by_index import IndexedEvidence
from lightning_unlearn.evidence.by_key import KeyedEvidence
from lightning_unlearn.evidence.mixed_targets import has_mixed_target
from lightning_unlearn.evidence.tracked_loaders import TrackedLoaders, fault_of_loaders
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.keyed_batches import KeyedBatches

# Number of batches whose rows are checked and passed on together, to synchronize with the accelerator once.
WINDOW = 16
# Minimum number and share of an epoch's rows whose loss pulls towards another class to conclude that samples are mixed.
# A loss on the given labels has no such rows; MixUp with probability 0.1 has a few per cent.
_MIN_PULLED = 4
_MAX_SHARE = 0.01


class StepObserver(Protocol):
    """Receives the evidence of training steps."""

    def observe(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Receive rows of one or several training batches.

        Args:
            index: (B,) int64 on the CPU, the dataset index of each row; repetitions are allowed.
            logits: (B, C) float32 on the device.
            label: (B,) int64 on the device.
        """

    def forget(self) -> None:
        """Discard everything observed in this fit, since it is not reliable."""


class TrainStepReader:
    """Reads (dataset index, logits, given label) of every row from the forward passes of training.

    Rows are passed to the sink in windows of up to 16 batches, after a check. Until then they stay on the device with
    their gradient (at most ``16 x B x 2C`` floats). The last label of each sample (4 bytes per sample on the device) is
    kept to detect an index whose label changes; with several ranks, the rank that owns the sample does this.

    Reading is disabled for the rest of the fit, with a ``reason``, if a row cannot be attributed to one sample and its
    label: several calls of the head in a step, a number of rows other than one per label, labels that are not one
    integer per row or that change for an index, rows whose loss pulls towards another class (MixUp, CutMix; see
    :func:`has_mixed_target`); or if this cannot be checked: a compiled head, no gradient at the logits, batches out of
    order. Everything is then restored, and the sink discards its rows. A single epoch whose batches cannot be
    identified, for example after a resume, is skipped, and so are batches without a training step.

    ``head`` is the module that is read; ``reason`` is why reading was disabled, empty while it is active; ``rows_read``
    is the number of rows passed on in the last epoch; ``left_open`` is whether the resumed fit was within an epoch
    whose rows are lost. ``by_index``, if set, receives the position in the epoch at which samples were drawn.

    Args:
        task_format: how batches, outputs and labels are read.
        sink: takes the evidence.
        keyed: reads the keys of batches; None where samples have an index. The loader is left alone then, that a sample
            keeps its label is for the sink to see, and ``by_key`` numbers the keys.

    Example:
        >>> class Sink:
        ...     def observe(self, index, logits, label): ...
        ...     def forget(self): ...
        >>> TrainStepReader(task_format=TaskFormat(), sink=Sink()).is_reading
        False
    """

    def __init__(self, *, task_format: TaskFormat, sink: StepObserver, keyed: KeyedBatches | None = None) -> None:
        self._reading = task_format
        self._sink = sink
        self._keyed = keyed
        self.by_key: KeyedEvidence | None = None
        self.by_index: IndexedEvidence | None = None
        self._tracked = TrackedLoaders()
        self._module: nn.Module | None = None
        self._head_watch = HeadWatch()
        self.head = ""
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy knows what was seen, and reads nothing.
        return {**self.__dict__, "_module": None, "_seen": None, "_held": []}

    def reset(self) -> None:
        """Discard the state of an earlier fit."""
        self.detach()
        self.reason = ""
        self.rows_read = 0
        self._agreed = False
        self._size = 0
        self._seen: Tensor | None = None
        self._known: Tensor | None = None
        self._has_judged = False
        self._unknown_epochs = 0
        self.left_open = False
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._held: list[Step] = []
        self._unchecked = 0
        self._unchecked_why = ""
        self._judged = 0
        self._pulled = 0
        self._epoch_rows = 0
        self._is_unknown = False
        self._is_blind = False

    @property
    def is_reading(self) -> bool:
        """Whether training steps are read: started, and not disabled."""
        return self._module is not None

    def state_dict(self) -> dict[str, Any]:
        """Return why reading was disabled, and the state of its checks."""
        return {
            "reason": self.reason,
            "unknown_epochs": self._unknown_epochs,
            "has_judged": self._has_judged,
            "is_open": self.is_reading and bool(self._held or self._epoch_rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stay disabled if reading was disabled in the resumed fit."""
        self.reason = str(state["reason"])
        if self.reason:
            self._tracked.detach()
        self._unknown_epochs = int(state["unknown_epochs"])
        self._has_judged = bool(state["has_judged"])
        self.left_open = bool(state.get("is_open"))

    def attach(self, fit: FitContext) -> None:
        """Track the train loaders. Call in ``setup`` of a fit; if called later, the first epoch is not read."""
        if self._keyed is None:
            self._tracked.attach(fit)

    def start(self, fit: FitContext, head: str, known: Tensor | None = None) -> None:
        """Start reading. Call in ``on_train_start``.

        Args:
            fit: that begins.
            head: dotted path of the module whose output is the logits that ``forward`` returns.
            known: (R,) int64, the labels of all rows by dataset index that passes have read, -1 for others.
        """
        if self.reason:
            self.detach()
            return
        if self._keyed is None:
            loaders = fit.live_loaders()
            fault = fault_of_loaders(loaders)
            if fault:
                self.disable(fault)
                return
            self._tracked.follow(loaders)
            self._size = len(loaders[0].dataset) * self._reading.rows_per_sample
        self._module = resolve_layer(fit.model, head)
        self.head = head
        self._known, self._seen = known, None

    def start_epoch(self, fit: FitContext) -> None:
        """Follow a loader that was replaced. Call in ``on_train_epoch_start``."""
        if self.is_reading and self._keyed is None:
            self._tracked.follow(fit.live_loaders())

    def start_batch(self, fit: FitContext, batch: Any, position: float = 0.0) -> None:
        """Record the samples of the next step. Call in ``on_train_batch_start`` with its batch.

        Args:
            fit: the running fit.
            batch: the batch of the step.
            position: share of the epoch that has passed, in [0, 1); for samples with a key, the number of the batch.
        """
        self._head_watch.end()
        if self._module is None or self._is_unknown:
            return
        drawn: Any = last_batch_indices(*fit.live_iterator()) if self._keyed is None else self._keyed.keys
        if not hasattr(drawn, "__len__"):
            self._is_unknown = True
            return
        label = self._labels_of(batch, len(drawn))
        if label is not None:
            self._head_watch.start(self._module, Step(drawn, label, self._reading.num_outputs, position))

    def end_batch(self) -> None:
        """Take the output and gradient of the step. Call in ``on_train_batch_end``."""
        step = self._head_watch.end()
        if step is None or not self.is_reading:
            return
        if step.calls > 1:
            self.disable(f"training_step calls '{self.head}' {step.calls} times, not once")
        elif step.fault:
            self.disable(f"training_step calls '{self.head}', but {step.fault}")
        elif step.gradient is None:
            self._unchecked += 1
            self._unchecked_why = (
                f"a training step calls '{self.head}' without sending a gradient to its output"
                if step.calls
                else f"a training step does not call '{self.head}' with gradients, or calls it compiled"
            )
        else:
            self._held.append(step)
        if len(self._held) + self._unchecked >= WINDOW:
            self._close_window()

    def end_epoch(self, fit: FitContext) -> bool:
        """Return whether reading continues, the same on every rank.

        Every rank must call it in ``on_train_epoch_end``.
        """
        if self.is_reading:
            self._close_window()
        if self.is_reading:
            self._judge_epoch()
        if not self._agreed:
            self._agreed = fit.agree(bool(self.reason), of_all=False)
            if self._agreed and not self.reason:
                self.disable("another rank cannot read its training steps")
        self.rows_read = self._epoch_rows
        self._begin_epoch()
        return not self._agreed

    def begin_again(self) -> None:
        """Discard what was read, because labels are in another field; :meth:`start` continues within this epoch."""
        self._head_watch.end()
        self._module = None
        self._seen = None
        self._has_judged = False
        self._begin_epoch()

    def detach(self) -> None:
        """Stop reading and restore everything. May be called repeatedly, at any time."""
        self._tracked.detach()
        self._head_watch.end()
        self._module = None
        self._seen = None
        self._held = []

    def _labels_of(self, batch: Any, num_rows: int) -> Any:
        """Return the labels of a batch; None, with reading disabled, if there is not one per row."""
        try:
            label: Any = self._reading.split(batch)[1]
        except Exception as error:
            self.disable(f"the batch of a training step cannot be split into input and labels ({error})")
            return None
        try:
            labels = len(label)
        except TypeError as error:
            self._give_up_labels(error)
            return None
        if labels != num_rows:
            drawn = "dataset indices" if self._keyed is None else "keys"
            self.disable(f"a batch of {num_rows} {drawn} has {labels} rows")
            return None
        # A copy, since training_step may permute them in place.
        return label.clone() if isinstance(label, Tensor) else label

    def _give_up_labels(self, error: Exception) -> None:
        self.disable(f"the labels of a training step have a different format than those of a pass ({error})")

    def _close_window(self) -> None:
        """Check the held rows and pass them on."""
        held, unchecked = self._held, self._unchecked
        self._held, self._unchecked = [], 0
        if unchecked > len(held):
            self.disable(self._unchecked_why)
            return
        index = [as_indices(step.batch) if self.by_key is None else self.by_key.slots(step.batch) for step in held]
        known = [(step, of) for step, of in zip(held, index, strict=True) if of is not None]
        self._is_unknown |= len(known) < len(held)
        if known:
            self._check(*map(list, zip(*known, strict=True)))

    def _check(self, held: list[Step], of_steps: list[Tensor]) -> None:
        try:
            label = self._reading.classes_of_batches([(step.label, len(step.batch)) for step in held])
        except (TypeError, ValueError) as error:
            self._give_up_labels(error)
            return
        index, logits, gradient, label = self._labeled_rows(held, torch.cat(of_steps), label)
        if len(index) == 0:
            return
        if self._keyed is None and (index.min() < 0 or index.max() >= self._size):
            self.disable(f"the train loader draws indices outside [0, {self._size})")
            return
        legal = (label >= 0) & (label < logits.shape[1])
        judged, pulled = has_mixed_target(logits, gradient, label.where(legal, 0))
        counts = torch.stack([judged.sum(), pulled.sum(), (~legal).sum(), self._relabeled(index, label)])
        num_judged, num_pulled, num_illegal, num_relabeled = counts.tolist()  # a wait for the device
        self._judged += num_judged
        self._pulled += num_pulled
        fault = self._fault_of_counts(num_illegal, num_relabeled)
        if fault:
            self.disable(fault)
        elif num_judged or self._has_judged:
            self._has_judged = True
            self._epoch_rows += len(index)
            self._place(held, of_steps)
            self._sink.observe(index, logits, label)
        else:
            self._is_blind = True

    def _place(self, held: list[Step], of_steps: list[Tensor]) -> None:
        """Record the position in the epoch at which samples were drawn."""
        known = self.by_key or self.by_index
        if known is not None:
            for step, of in zip(held, of_steps, strict=True):
                known.place(of, step.position)

    def _labeled_rows(self, held: list[Step], index: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, logits, gradients and labels of some steps, without rows with an ignored label."""
        task_format = self._reading
        output = torch.cat([as_columns(step.output) for step in held if step.output is not None])
        sent = torch.cat([as_columns(step.gradient) for step in held if step.gradient is not None])
        index, logits, gradient = (
            task_format.row_indices(index),
            task_format.logits(output.float()),
            task_format.gradients(sent),
        )
        label = label.to(logits.device)
        counted = (label != IGNORED).nonzero().flatten()
        if len(counted) == len(label):
            return index, logits, gradient, label
        return index[counted.cpu()], logits[counted], gradient[counted], label[counted]

    def _fault_of_counts(self, num_illegal: int, num_relabeled: int) -> str:
        if num_illegal:
            return f"{num_illegal} labels of training batches are out of range of the outputs of '{self.head}'"
        if num_relabeled:
            return relabeled_in_training(num_relabeled)
        if self._pulled >= _MIN_PULLED and self._pulled > _MAX_SHARE * self._judged:
            return (
                f"the loss pulls {self._pulled / self._judged:.0%} of the rows towards a class other than their"
                " label, as with MixUp and CutMix"
            )
        return ""

    def _relabeled(self, index: Tensor, label: Tensor) -> Tensor:
        """Return the number of rows whose label differs from the last one at their index; a scalar on the device."""
        if self._keyed is not None or (self.by_index is not None and self.by_index.is_shared):
            return torch.zeros((), dtype=torch.int64, device=label.device)
        if self._seen is None:
            known = torch.full((self._size,), -1) if self._known is None else self._known
            self._seen = known.to(label.device, torch.int32, copy=True)
        where = index.to(label.device, non_blocking=True)
        before = self._seen[where]
        self._seen[where] = label.int()
        return ((before >= 0) & (before != label)).sum()

    def _judge_epoch(self) -> None:
        """Disable reading if nothing in an epoch can be checked because gradients or indices are missing."""
        if self._is_unknown:
            self._unknown_epochs += 1
            if self._unknown_epochs > 1:
                self.disable("the train loader's batches cannot be matched with dataset indices")
        elif self._is_blind and not self._has_judged:
            self.disable("the gradient of the loss at the logits is zero or not finite in all rows of an epoch")

    def disable(self, reason: str) -> None:
        """Disable reading for the rest of this fit; the first reason is kept."""
        self.reason = self.reason or reason
        self.detach()
        self._sink.forget()


def relabeled_in_training(rows: int) -> str:
    """Return why rows of training steps do not match the drawn samples."""
    return (
        f"{rows} rows have a different label than the one seen before at their dataset index, for example"
        " because collate_fn or a transfer hook reorders a batch"
    )
