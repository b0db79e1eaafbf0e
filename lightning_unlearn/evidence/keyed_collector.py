"""Gathers the evidence of samples that are known by a key: from training steps alone, as there is no pass over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_unlearn.attribution import ForwardTrace
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.by_key import KeyedEvidence, last_seen
from lightning_unlearn.evidence.collector import NOT_WHOLE, EvidenceCollector
from lightning_unlearn.evidence.key_checks import check_epoch, fault_of_first_batch, relabeled
from lightning_unlearn.evidence.rank_share import Ranks, RankShare
from lightning_unlearn.evidence.step_reader import WINDOW, TrainStepReader
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.data_checks import Recognized
from lightning_unlearn.trainer.keyed_batches import KeyedBatches
from lightning_unlearn.trainer.progress import rank_zero_warn


class KeyedCollector(EvidenceCollector):
    """What the model shows of each sample that is known by a key; its trajectory is of this rank's own samples alone.

    Args:
        task_format: how batches, outputs and labels are read.
        keyed: reads the keys of training batches.
    """

    def __init__(self, task_format: TaskFormat, keyed: KeyedBatches) -> None:
        self.keyed, self.by_key = keyed, KeyedEvidence()
        # Of a fit that is running, for what a checkpoint needs of the other ranks.
        self._ranks: Ranks | None = None
        super().__init__(task_format)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return {**self.__dict__, "_ranks": None}

    @override
    def _make_reader(self) -> TrainStepReader:
        reader = TrainStepReader(task_format=self.task_format, sink=self, keyed=self.keyed)
        reader.by_key = self.by_key
        return reader

    @override
    def reset(self) -> None:
        self._pending: dict[str, Any] | None = None
        super().reset()

    @override
    def detach(self) -> None:
        super().detach()
        self.keyed.detach()
        self._ranks = None

    @property
    @override
    def reads_steps(self) -> bool:
        return not self.is_closed

    @override
    def is_pass_due(self, epoch: int) -> bool:
        # There is no pass, but this is when the partition is computed.
        return epoch >= 1 and self.when.is_due(epoch)

    @override
    def _make_trajectory(self, fit: FitContext) -> TrainingDynamics:
        return TrainingDynamics(0, self.task_format.num_classes, keeps_coordinates=self.keeps_coordinates)

    @override
    def _take_up(self, fit: FitContext) -> None:
        """Do nothing: it was done when training started; see :meth:`take_up`."""

    @override
    def _rehearse_pass(self, fit: FitContext, trace: ForwardTrace, first: IndexedBatch) -> None: ...

    @property
    @override
    def layer(self) -> str:
        return self.by_key.layer

    def take_up(self, fit: FitContext) -> None:
        """Take of a checkpoint's evidence what this rank owns. Call when training starts, on every rank."""
        self._ranks, state = Ranks.of(fit), self._pending
        self._pending = None
        if state is None:
            return
        if not state["whole"]:
            self.forget()
            rank_zero_warn(NOT_WHOLE)
            return
        self.trajectory = self.by_key.load_state_dict(state, self._ranks)

    def check_first(self, fit: FitContext, label: Tensor) -> None:
        """Refuse keys, as the first batch has them, that cannot be those of samples. Every rank must call it.

        Args:
            fit: that begins.
            label: (B,) int64, or (B, L).

        Raises:
            ValueError: on every rank.
        """
        fault = fault_of_first_batch(self.keyed.keys or [], label)
        if fit.agree(bool(fault), of_all=False):
            raise ValueError(
                fault or "On another rank the keys of the first batch do not identify samples; see its error."
            )

    @override
    def start_reading(self, fit: FitContext, trace: ForwardTrace, data: Recognized | None, first: IndexedBatch) -> None:
        if not self.reads_steps:
            return
        self.by_key.layer = str(self.point)
        maker = trace.logits_module(self.task_format.num_outputs)
        if maker is not None:
            self.reader.start(fit, maker)
        else:
            self.reader.disable("no module of the model returns the logits that forward returns")
        self._check_reads(fit)

    def _check_reads(self, fit: FitContext) -> None:
        """End the fit on every rank where one cannot read its training steps, as nothing else tells of a sample.

        Raises:
            MisconfigurationException: saying what is in the way.
        """
        reason = self.reader.reason
        if not fit.agree(bool(reason), of_all=False):
            return
        raise MisconfigurationException(
            "With sample_key, evidence is read from training steps only, but"
            f" {reason or 'another rank cannot read them'}. Call the classifier once in training_step, on"
            " samples that are not mixed, or use a map-style dataset without sample_key."
        )

    @override
    def observe(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        if self.trajectory is not None:
            self.by_key.note(self.trajectory, index, logits, label)

    @override
    def forget_epochs(self) -> None:
        super().forget_epochs()
        self.by_key.reset()

    @override
    def forget(self) -> None:
        super().forget()
        if self.trajectory is not None:
            self.trajectory = TrainingDynamics(
                0, self.task_format.num_classes, keeps_coordinates=self.keeps_coordinates
            )

    @override
    def start_batch(self, fit: FitContext, batch: Any, batch_idx: int) -> None:
        self.label_watch.start_batch(batch)
        if self.reads_steps:
            self.reader.start_batch(fit, batch, float(batch_idx))

    @override
    def end_batch(self, fit: FitContext, batch_idx: int) -> None:
        super().end_batch(fit, batch_idx)
        # Once, early, whether all is as it should be.
        if self.reads_steps and batch_idx == WINDOW - 1 and not self.by_key.epochs:
            self._check_reads(fit)
            differ, example = self.by_key.labels()[1:]
            if fit.agree(differ > 0, of_all=False):
                raise ValueError(relabeled(differ, example))

    @override
    def end_epoch(self, fit: FitContext) -> None:
        self._note_validation(fit)
        if not self.reads_steps or self.trajectory is None:
            return
        self.reader.end_epoch(fit)
        self._check_reads(fit)
        found = self.by_key.hand_over(self.trajectory, self.task_format.rows_per_sample, Ranks.of(fit))
        check_epoch(found, self.by_key.epochs)
        self._look_early(fit)
        if self.merge(fit, fit.epoch + 1, self.reader.rows_read) > 0:
            self.epochs_seen.append(fit.epoch + 1)

    @override
    def _look_early(self, fit: FitContext) -> None:
        if self.looks_early(fit.epoch + 1):
            share = self.by_key.padded(self.in_use, 1, Ranks.of(fit))
            batches, positions = fit.batches_per_epoch, self.by_key.positions
            self.early_epochs.look(self.in_use, positions, batches, share, fit.device, fit.reduce)

    def share(self, fit: FitContext) -> tuple[RankShare, dict[str, Tensor], tuple[Any, ...]]:
        """Return what training steps showed of this rank's own samples, and the keys of all. Every rank must call it.

        Raises:
            ValueError: where there is no evidence of any sample.
        """
        if self.trajectory is None:
            self.trajectory = self._make_trajectory(fit)
        share, keys = self.by_key.share(self.trajectory, self.task_format.rows_per_sample, Ranks.of(fit))
        if not keys:
            raise ValueError(
                "No evidence was collected from training steps by the time of the partition: no batch could be"
                " read. Train for more epochs, or set a larger at_epoch."
            )
        local, index = self.task_format.row_indices(share.local), self.task_format.row_indices(share.index)
        return share, last_seen(self.in_use, local, index, self.by_key.latest), keys

    @override
    def check_steps(self, fit: FitContext) -> None:
        """Do nothing: there is no batch at hand to look at."""

    @override
    def with_unseen(self, fit: FitContext, evidence: Evidence, accuracy: float | None) -> Evidence:
        return replace(evidence, out_of_sample=OutOfSample(self.early_epochs.rate, self.early_epochs.drawn, accuracy))

    @override
    def state_dict(self) -> dict[str, Any]:
        by_key = self._pending or self.by_key.state_dict(self.trajectory, self._ranks)
        return super().state_dict() | {"by_key": by_key, "settled": self.task_format.settled}

    @override
    def _trajectory_state(self) -> None:
        """Return nothing: the evidence is kept with its keys."""

    @override
    def load_state_dict(self, state: dict[str, Any], *, is_closed: bool, is_fit: bool) -> None:
        super().load_state_dict(state, is_closed=is_closed, is_fit=is_fit)
        found = state.get("by_key")
        if found is None:
            raise MisconfigurationException(
                "Expected a checkpoint of a fit with sample_key, but its samples are identified by dataset index."
                " Leave sample_key out, or train without ckpt_path."
            )
        self._pending = None if is_closed else found
        self.by_key.layer = found["layer"]
        self.task_format.settle_as(state["settled"])
