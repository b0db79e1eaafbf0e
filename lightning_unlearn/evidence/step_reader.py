"""Label evidence from the forward passes of training: whose row is whose, and when that can no longer be told.

Nothing of the fit is changed: the batch sampler is the user's with a memory, the head's output is copied, and the
gradient that the loss sends to it is looked at. Who drives a :class:`TrainStepReader` calls, in this order,
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

# The rows of so many batches are checked, and handed on, together: one wait for the accelerator instead of many.
WINDOW = 16
# and is taken for mixing where so many rows, and such a share of an epoch's rows so far, show it. A loss of the given
# label alone shows none; MixUp with probability 0.1 a few per cent.
_MIN_PULLED = 4
_MAX_SHARE = 0.01


class StepObserver(Protocol):
    """Who takes the evidence."""

    def observe(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Take rows of the training forward pass, of one or several batches.

        Args:
            index: (B,) int64 on the CPU, the dataset index of each row; the same index may come twice.
            logits: (B, C) float32 on the device.
            label: (B,) int64 on the device.
        """

    def forget(self) -> None:
        """Drop all that was observed in this fit: it cannot be trusted."""


class TrainStepReader:
    """Reads (dataset index, logits, given label) of every row from the forward passes of training.

    Rows reach the sink in windows of up to 16 batches, after the check of their window: until then they lie on the
    device, with their gradient (at most ``16 x B x 2C`` floats). Per sample it keeps 4 bytes on the device, the label
    last seen, to notice when an index and its label no longer belong together; where several ranks own samples, the
    owner notices.

    It gives up, for good and with a ``reason``, where a row's output no longer belongs to one sample and its label:
    several calls of the head in a step, other than one row per label, labels that are not one integer per row or that
    change for an index, rows whose loss pulls towards another class (MixUp, CutMix; see :func:`has_mixed_target`); and
    where that cannot be checked: a compiled head, no gradient at the logits, batches drawn out of order. Then
    everything is put back and the sink forgets. A single epoch whose batches cannot be told, as may happen on a resume,
    is only left out. Batches that do not train (a skipped step) are left out as well.

    ``left_open`` is whether the fit that is resumed was within an epoch of which it had rows, which are lost.
    ``by_index``, if who drives it sets it, is told how much of the epoch had passed when samples were drawn.
    ``head`` is the module that is read; ``reason`` is why it gave up, empty while it reads; ``rows_read`` is how many
    rows the sink got in the last epoch.

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
        """Forget an earlier fit."""
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
        """Whether training steps are read: it was started, and has not given up."""
        return self._module is not None

    def state_dict(self) -> dict[str, Any]:
        """Return whether it gave up, and why; and what it would give up for sooner or later."""
        return {
            "reason": self.reason,
            "unknown_epochs": self._unknown_epochs,
            "has_judged": self._has_judged,
            "is_open": self.is_reading and bool(self._held or self._epoch_rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stay disabled where the resumed fit was."""
        self.reason = str(state["reason"])
        if self.reason:
            self._tracked.detach()
        self._unknown_epochs = int(state["unknown_epochs"])
        self._has_judged = bool(state["has_judged"])
        self.left_open = bool(state.get("is_open"))

    def attach(self, fit: FitContext) -> None:
        """Watch for the train loaders. Call in ``setup`` of a fit: later, the first epoch is not read."""
        if self._keyed is None:
            self._tracked.attach(fit)

    def start(self, fit: FitContext, head: str, known: Tensor | None = None) -> None:
        """Start to read. Call in ``on_train_start``.

        Args:
            fit: that begins.
            head: dotted path of the module whose output is the logits that ``forward`` returns.
            known: (R,) int64, the labels of all rows by dataset index as far as passes have shown them, -1 for others.
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
        """Look whether the loader is still the same. Call in ``on_train_epoch_start``."""
        if self.is_reading and self._keyed is None:
            self._tracked.follow(fit.live_loaders())

    def start_batch(self, fit: FitContext, batch: Any, position: float = 0.0) -> None:
        """Note whose rows come next. Call in ``on_train_batch_start``, on the batch as it is given there.

        Args:
            fit: that is running.
            batch: of the step.
            position: in [0, 1), how much of the epoch has passed; of samples with a key, the number of the batch.
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
        """Take what the step has shown. Call in ``on_train_batch_end``."""
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
        """Return whether it goes on, alike on every rank. Every rank must call it, in ``on_train_epoch_end``."""
        if self.is_reading:
            self._close_window()
        if self.is_reading:
            self._judge_epoch()
        if not self._agreed:
            self._agreed = fit.agree(bool(self.reason), of_all=False)
            if self._agreed and not self.reason:
                self.disable("another rank gave up")
        self.rows_read = self._epoch_rows
        self._begin_epoch()
        return not self._agreed

    def begin_again(self) -> None:
        """Drop what was read, as labels lie elsewhere; :meth:`start` goes on with the batches of this epoch."""
        self._head_watch.end()
        self._module = None
        self._seen = None
        self._has_judged = False
        self._begin_epoch()

    def detach(self) -> None:
        """Restore everything and read no more. May be called at any time, and again."""
        self._tracked.detach()
        self._head_watch.end()
        self._module = None
        self._seen = None
        self._held = []

    def _labels_of(self, batch: Any, num_rows: int) -> Any:
        """Return the labels that a batch holds; None, having given up, where it has not as many as rows."""
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
        self.disable(f"the labels of a training step have another form than those of a pass ({error})")

    def _close_window(self) -> None:
        """Check the rows held back and hand them on."""
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
        """Note how much of the epoch had passed when samples were drawn."""
        known = self.by_key or self.by_index
        if known is not None:
            for step, of in zip(held, of_steps, strict=True):
                known.place(of, step.position)

    def _labeled_rows(self, held: list[Step], index: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, logits, gradients and labels of some steps, without the rows whose label is to be ignored."""
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
            return f"{num_illegal} labels of training batches name no class that '{self.head}' has an output for"
        if num_relabeled:
            return relabeled_in_training(num_relabeled)
        if self._pulled >= _MIN_PULLED and self._pulled > _MAX_SHARE * self._judged:
            return (
                f"the loss pulls {self._pulled / self._judged:.0%} of the rows towards another class than their label,"
                " as MixUp and CutMix do"
            )
        return ""

    def _relabeled(self, index: Tensor, label: Tensor) -> Tensor:
        """Return how many rows have another label than their index had before; a scalar on the device."""
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
        """Disable reading if nothing in an epoch can be checked, without gradients or indices."""
        if self._is_unknown:
            self._unknown_epochs += 1
            if self._unknown_epochs > 1:
                self.disable("the train loader's batches cannot be matched with dataset indices")
        elif self._is_blind and not self._has_judged:
            self.disable("the gradient of the loss at the logits is zero or not finite in all rows of an epoch")

    def disable(self, reason: str) -> None:
        """Read no more steps of this fit; the first reason is kept."""
        self.reason = self.reason or reason
        self.detach()
        self._sink.forget()


def relabeled_in_training(rows: int) -> str:
    """Return why rows of training steps are not those of the samples drawn."""
    return (
        f"{rows} rows have another label than the one seen before at their dataset index, as where collate_fn or a"
        " transfer hook reorders a batch"
    )
