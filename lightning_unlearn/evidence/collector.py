"""Collects the evidence of a fit: from training steps, or by passes if these cannot be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.attribution import Attributor, ForwardTrace, resolve_layer
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.data.batch import Path
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.by_index import IndexedEvidence
from lightning_unlearn.evidence.early_epochs import EarlyEpochs
from lightning_unlearn.evidence.eval_pass import ScoringPass, make_attributor
from lightning_unlearn.evidence.frozen_features import FrozenFeatures
from lightning_unlearn.evidence.label_field import LabelWatch
from lightning_unlearn.evidence.rank_share import Ranks, RankShare
from lightning_unlearn.evidence.step_reader import TrainStepReader, relabeled_in_training
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.evidence.validation_watch import ValidationWatch
from lightning_unlearn.evidence.when import PartitionTime
from lightning_unlearn.recipes.base import Recipe
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.data_checks import Recognized, check_labels_of_ranks
from lightning_unlearn.trainer.divergence import check_rows_left_out
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn

NOT_WHOLE = (
    "The checkpoint does not hold the evidence of all samples: it was written on one of several ranks only (after an"
    " exception, or after the fit), or the evidence was too large. Collecting evidence again."
)


class EvidenceCollector:
    """Collects the evidence of every sample until the partition is computed.

    Args:
        task_format: how batches, outputs and labels are read.

    ``recipe`` declares the evidence that it needs, ``keeps_coordinates`` whether it may use attributions of any number
    of classes. ``trajectory`` holds the training dynamics of the samples that this rank owns (see ``by_index``), or of
    all samples after a checkpoint is loaded, until training starts; None before the first epoch, and once no further
    partition will be computed. ``point`` is the layer at which the margin is attributed, ``early`` the layer for
    corrupted inputs (None for none). ``is_closed`` is True from the first partition on: training steps are no longer
    read.
    """

    def __init__(self, task_format: TaskFormat) -> None:
        self.task_format = task_format
        self.by_index = IndexedEvidence()
        self.recipe: Recipe
        self.keeps_coordinates = False
        self.reader = self._make_reader()
        self.label_watch = LabelWatch(task_format)
        self.validation_watch = ValidationWatch(task_format)
        self._has_warned_of_one_class = False
        self.when = PartitionTime("auto")
        self.reset()

    def _make_reader(self) -> TrainStepReader:
        reader = TrainStepReader(task_format=self.task_format, sink=self)
        reader.by_index = self.by_index
        return reader

    def reset(self) -> None:
        """Discard the state of an earlier fit."""
        self.point: LayerPoint | None = None
        self.early: LayerPoint | None = None
        self.task_format.forget()
        self.trajectory: TrainingDynamics | None = None
        self.by_index.reset()
        self.features = FrozenFeatures()
        self.is_closed = self._has_said_fallback = False
        self.forget_epochs()
        self.when.reset()
        self.reader.reset()
        self.label_watch.detach()

    def forget_epochs(self) -> None:
        """Discard the list of epochs with evidence."""
        self.epochs_seen: list[int] = []
        self.early_epochs = EarlyEpochs()
        self.when.forget()
        self.by_index.drop()

    def detach(self) -> None:
        """Remove all hooks from the model and the loaders."""
        self.reader.detach()
        self.label_watch.detach()
        self.validation_watch.detach()
        self.by_index.ranks = None

    def close(self, *, forever: bool) -> None:
        """Stop reading training steps after the first partition; discard the evidence if it is the last one."""
        self.is_closed = True
        if forever:
            self.trajectory, self.features = None, FrozenFeatures()

    @property
    def reads_steps(self) -> bool:
        """Whether evidence is to be read from training steps."""
        return self.recipe.evidence_from == "train_steps" and self.recipe.uses_history and not self.is_closed

    @property
    def uses_out_of_sample(self) -> bool:
        """Whether the recipe needs evidence from labels that were not learned yet."""
        return self.recipe.needs_out_of_sample and self.task_format.rows_per_sample == 1

    @property
    def in_use(self) -> TrainingDynamics:
        """The training dynamics.

        Raises:
            RuntimeError: if there are none.
        """
        if self.trajectory is None:
            raise RuntimeError("No evidence is being gathered; this is an error in lightning_unlearn.")
        return self.trajectory

    def is_pass_due(self, epoch: int) -> bool:
        """Return whether a pass is due before the first partition, after ``epoch`` complete epochs."""
        if epoch < 1:
            return False
        if self.when.is_due(epoch):
            return True
        return self.recipe.uses_history and epoch not in self.epochs_seen

    def is_before_the_first(self, epoch: int) -> bool:
        """Return whether the first partition is not due yet; that of a checkpoint may be older than ``at_epoch``."""
        return not self.is_closed and not self.when.is_due(epoch)

    def start(self, fit: FitContext, trace: ForwardTrace, first: IndexedBatch, *, is_before: bool) -> None:
        """Start collecting, before the first step.

        Args:
            fit: the fit that starts.
            trace: trace of its forward pass.
            first: the batch of that forward pass.
            is_before: whether there is no partition yet, so that validation is observed.
        """
        maker = trace.logits_module(self.task_format.num_outputs)
        self._take_up(fit)
        if self.trajectory is None and not self.is_closed:
            self.trajectory = self._make_trajectory(fit)
            if self.task_format.label_at is None:
                self.label_watch.start(fit.model, maker)
        if self.trajectory is not None and self.by_index.is_shared:
            self.trajectory.rest()
        if is_before and not self.is_closed and maker is not None:
            self.validation_watch.start(resolve_layer(fit.model, maker))
        if self.trajectory is not None:
            self._rehearse_pass(fit, trace, first)

    def _take_up(self, fit: FitContext) -> None:
        """Keep the part of a checkpoint's evidence that this rank owns."""
        is_whole = self.by_index.total == 0
        self.by_index.start(Ranks.of(fit), fit.total, self.task_format.rows_per_sample)
        if self.trajectory is not None and is_whole and self.by_index.is_shared:
            self.trajectory = self.trajectory.part(self.by_index.own_rows())

    def known_labels(self, fit: FitContext) -> Tensor | None:
        """Return (N,) int64, the labels of all rows seen so far, -1 for others. Every rank must call it.

        None if there is no evidence.
        """
        if self.trajectory is None or self.by_index.total == 0:
            # Of a checkpoint, it is of all samples.
            return None if self.trajectory is None else self.trajectory.label
        self.by_index.ranks = Ranks.of(fit)
        return self.by_index.known_labels(self.trajectory)

    def _make_trajectory(self, fit: FitContext) -> TrainingDynamics:
        # A recipe of a user may look at the attributions of however many classes.
        return TrainingDynamics(
            self.by_index.rows, self.task_format.num_classes, keeps_coordinates=self.keeps_coordinates
        )

    def _rehearse_pass(self, fit: FitContext, trace: ForwardTrace, first: IndexedBatch) -> None:
        """Run the operations of a pass on the first rows, so that errors appear before the first step."""
        if self.uses_out_of_sample:
            self.features.start(fit, trace, first)
        if self.task_format.task != "multilabel":
            with fit.isolated_eval():
                self._attributor(fit).check_first_rows(
                    first.x, first.label.clamp(min=0), rows=self.recipe.needs_neuron_attribution
                )

    def start_reading(self, fit: FitContext, trace: ForwardTrace, data: Recognized | None, first: IndexedBatch) -> None:
        """Start reading training steps, or log why this is not possible.

        Args:
            fit: the fit that starts.
            trace: trace of its forward pass.
            data: the recognized training set; None if samples are identified by a key.
            first: the batch of that forward pass.
        """
        if not self.reads_steps:
            return
        maker = trace.logits_module(self.task_format.num_outputs)
        if data is not None and data.train_fault:
            self.reader.disable(data.train_fault)
        elif maker is not None and data is not None:
            index = self.task_format.row_indices(torch.cat([first.index, data.rows.index]))
            label = torch.cat([first.label.cpu(), data.rows.label.flatten()])
            if self.by_index.is_shared:
                self.by_index.probe(index, label)
                self.reader.start(fit, maker)
            else:
                known = self.in_use.label.clone()
                known[index] = label
                self.reader.start(fit, maker, known)
            self._ask_positions(fit.epoch + 1)
        else:
            self.reader.disable("no module of the model returns the logits that forward returns")
        if self.reader.reason:
            self._say_fallback()

    def _say_fallback(self) -> None:
        if self._has_said_fallback:
            return
        self._has_said_fallback = True
        rank_zero_info(
            f"Cannot collect label evidence from training steps ({self.reader.reason}). Running an evaluation pass over"
            " the training set after every epoch instead."
        )

    def say_what_is_lost(self) -> None:
        """Log once that a checkpoint lacks the evidence of an unfinished epoch."""
        if not self.is_closed and self.reader.left_open:
            rank_zero_info(
                "The checkpoint was written before an epoch had ended and lacks the evidence of its training"
                " steps, so the partition may differ slightly from that of an uninterrupted fit. To avoid this,"
                " save at the end of epochs (save_on_train_epoch_end=True) or use recipe=get_recipe('auto',"
                " evidence_from='eval_passes')."
            )
        self.reader.left_open = False

    def observe(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Receive rows of training steps.

        Args:
            index: (B,) int64 on the CPU.
            logits: (B, C).
            label: (B,) int64.
        """
        if self.trajectory is not None:
            self.by_index.note(self.trajectory, index, logits, label)

    def forget(self) -> None:
        """Discard the evidence of training steps, since it is not reliable."""
        self.forget_epochs()
        if self.trajectory is not None:
            self.trajectory.forget()

    def start_epoch(self, fit: FitContext) -> None:
        """Call in ``on_train_epoch_start``."""
        if self.reads_steps:
            self.reader.start_epoch(fit)
        else:
            self.reader.detach()

    def start_batch(self, fit: FitContext, batch: Any, batch_idx: int) -> None:
        """Call in ``on_train_batch_start``."""
        self.label_watch.start_batch(batch)
        if self.reads_steps:
            batches = fit.batches_per_epoch
            self.reader.start_batch(fit, batch, min(batch_idx / batches, 0.999) if batches else 0.0)

    def label_field(self, fit: FitContext, *, trained: bool) -> Path | None:
        """Return another batch field if the loss follows it; collecting then restarts with labels from there.

        None otherwise. Every rank must call it, after a step's backward pass and before the weights change.
        """
        path = self.label_watch.end_batch(fit.reduce, trained=trained)
        if path is not None:
            self.task_format.forget()
            self.task_format.label_at = path
            self.trajectory = None
            self.forget_epochs()
            self.reader.begin_again()
        return path

    def end_batch(self, fit: FitContext, batch_idx: int) -> None:
        """Call in ``on_train_batch_end``, on every rank."""
        if self.reads_steps:
            self.reader.end_batch()

    def end_epoch(self, fit: FitContext) -> None:
        """End the epoch. Every rank must call it in ``on_train_epoch_end``."""
        self._note_validation(fit)
        if not self.reads_steps or self.trajectory is None:
            return
        if not self.reader.end_epoch(fit) or not self._hand_over(fit):
            self._say_fallback()
            return
        self._look_early(fit)
        # Counted in complete epochs: what epoch 0 shows is known when one is complete.
        if self.merge(fit, fit.epoch + 1, self.reader.rows_read) > 0:
            self.epochs_seen.append(fit.epoch + 1)

    def _note_validation(self, fit: FitContext) -> None:
        """Record validation results until the partition."""
        if not self.is_closed and (self.when.is_open or self.validation_watch.is_on):
            shown = self.validation_watch.result(fit.monitored, fit.reduce)
            if "only_class" in shown:
                self._warn_of_one_class(**shown)
                shown = {}
            self.when.note(fit.epoch + 1, **shown)

    def _warn_of_one_class(self, only_class: float, samples: float) -> None:
        if not self._has_warned_of_one_class:
            rank_zero_warn(
                f"All {samples:.0f} validation samples are labeled as class {only_class:.0f}. Validation is not used to"
                " tell when labels are being memorized. Split the data so that validation holds every class."
            )
        self._has_warned_of_one_class = True

    def looks_early(self, epoch: int) -> bool:
        """Return whether the training steps of the ``epoch``-th epoch are evaluated separately."""
        return self.uses_out_of_sample and not self.when.is_due(epoch - 1) and self.early_epochs.is_due(epoch)

    def _hand_over(self, fit: FitContext) -> bool:
        """Send the rows of an epoch to the ranks that own the samples; return whether reading continues."""
        relabeled = self.by_index.hand_over(self.in_use)
        if not len(relabeled):
            return True
        # The ranks have different data, or it is training that gives a sample another's label.
        check_labels_of_ranks(fit, torch.unique(relabeled // self.task_format.rows_per_sample), len(relabeled))
        self.reader.disable(relabeled_in_training(len(relabeled)))
        return False

    def _ask_positions(self, epoch: int) -> None:
        asks = self.looks_early(epoch)
        rows = self.by_index.rows // self.task_format.rows_per_sample
        self.by_index.positions = torch.zeros(rows, dtype=torch.uint8) if asks else None

    def share_of_rank(self, fit: FitContext) -> RankShare:
        """Return the samples that this rank judges."""
        return RankShare.by_index(self.by_index.total, Ranks.of(fit))

    def _look_early(self, fit: FitContext) -> None:
        positions, epoch = self.by_index.positions, fit.epoch + 1
        if positions is None or not self.looks_early(epoch):
            return
        of_rank = self.share_of_rank(fit)
        share = of_rank.local, of_rank.weight
        self.early_epochs.look(self.in_use, positions, fit.batches_per_epoch, share, fit.device, fit.reduce)
        self._ask_positions(epoch + 1)

    def merge(self, fit: FitContext, epoch: int, rows: int) -> int:
        """Merge the evidence of an epoch, and return the number of finite rows that all ranks observed."""
        trajectory, reduce = self.in_use, fit.reduce
        left_out, total = (int(x) for x in reduce(torch.tensor([trajectory.rows_left_out, rows]).double()).tolist())
        phase, width = self.when.phase(epoch)
        with self.when.noting(epoch, trajectory, Ranks.of(fit), of_steps=self.reader.is_reading):
            trajectory.merge(trajectory.make_room(phase, width), reduce)
        if said := check_rows_left_out(fit.model, left_out, total, epoch, reduce):
            rank_zero_warn(said)
        return total - left_out

    def check_steps(self, fit: FitContext) -> None:
        """Discard the evidence of training steps if it was not the logits, for example with an adapter added."""
        if not self.reader.is_reading:
            return
        trace, _ = fit.probe()
        if not fit.agree(trace.makes_logits(self.reader.head), of_all=True):
            rank_zero_warn(
                f"The output of '{self.reader.head}' no longer equals the logits that forward returns. Discarding"
                " evidence from training steps. Set evidence_from='eval_passes' (get_recipe) to use evaluation passes."
            )
            self.forget()

    @property
    def layer(self) -> str:
        """The layer at which the margin is attributed, in words."""
        return str(self.point)

    def _attributor(self, fit: FitContext, watch: tuple[LayerPoint, ...] = ()) -> Attributor:
        if self.point is None:
            raise RuntimeError("The layer to attribute at is not resolved; this is an error in lightning_unlearn.")
        return make_attributor(fit, self.point, self.recipe.attribution_method, watch)

    def evidence_pass(self, fit: FitContext, *, is_last: bool, features: FrozenFeatures | None = None) -> ScoringPass:
        """Return a pass, without running it.

        Args:
            fit: the running fit.
            is_last: whether the partition is computed after it.
            features: features to collect in the pass; None for none.
        """
        early = self.early if is_last else None
        watched = (early, None if features is None else features.point)
        attributor = self._attributor(fit, tuple(point for point in watched if point is not None))
        total = self.by_index.total
        return ScoringPass(
            fit, attributor, self.in_use, is_last, self.recipe.needs_neuron_attribution, early, features, total=total
        )

    def pass_over(self, fit: FitContext) -> tuple[dict[str, Tensor], set[int]]:
        """Run a pass over this rank's shard of the training set.

        Returns:
            the evidence of the pass, see :meth:`ScoringPass.run`, and the indices of items that are None.
        """
        is_last = not self.is_before_the_first(fit.epoch)
        # The margins of several labels are those of the logits, for which no layer is watched.
        watches = is_last and self.task_format.task != "multilabel"
        holds = watches and self.features.hold(fit, self.by_index.total)
        found = self.evidence_pass(fit, is_last=is_last, features=self.features if holds else None)
        return found.run(), found.absent

    def with_unseen(self, fit: FitContext, evidence: Evidence, accuracy: float | None) -> Evidence:
        """Return the evidence with that from labels not learned yet; ``accuracy`` is the validation accuracy."""
        out_of_sample = OutOfSample(self.early_epochs.rate, self.early_epochs.drawn, accuracy)
        return self.features.added_to(replace(evidence, out_of_sample=out_of_sample), fit.reduce)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {
            "epochs_seen": list(self.epochs_seen),
            "trajectory": self._trajectory_state(),
            "reader": self.reader.state_dict(),
            "early": self.early_epochs.state_dict(),
            "features": self.features.state_dict(),
            "when": self.when.state_dict(),
            "label_at": None if self.task_format.label_field is None else list(self.task_format.label_field),
        }

    def _trajectory_state(self) -> dict[str, Any] | None:
        return None if self.trajectory is None else self.by_index.state_dict(self.trajectory)

    def load_state_dict(self, state: dict[str, Any], *, is_closed: bool, is_fit: bool) -> None:
        """Load the state that :meth:`state_dict` returned.

        Args:
            state: state in a checkpoint.
            is_closed: whether the checkpoint has a partition.
            is_fit: whether a fit resumes from it; otherwise evidence in another format is skipped with a warning.
        """
        # Absent in checkpoints from before the field of the labels was determined by the loss.
        if (path := state.get("label_at")) is not None and self.task_format.layout is None:
            self.task_format.label_at = tuple(path)
        self.epochs_seen = list(state["epochs_seen"])
        self.by_index.reset()
        trajectory = state["trajectory"] or {}
        is_part = bool(trajectory.get("is_part"))
        self.trajectory = _trajectory_of(trajectory, is_fit=is_fit) if trajectory and not is_part else None
        self.reader.load_state_dict(state["reader"])
        self.early_epochs = EarlyEpochs.from_state_dict(state["early"])
        self.features = FrozenFeatures.from_state_dict(state.get("features"))
        self.when.load_state_dict(state.get("when"))
        if is_part:
            self.forget_epochs()
            if is_fit:
                rank_zero_warn(NOT_WHOLE)
        self.is_closed = is_closed
        if is_closed:
            # It watches since setup, and would make the loader forget the batches that are to be re-labeled.
            self.reader.detach()


def _trajectory_of(state: dict[str, Any], *, is_fit: bool) -> TrainingDynamics | None:
    try:
        return TrainingDynamics.from_state_dict(state)
    except ValueError as error:
        if is_fit:
            raise
        rank_zero_warn(f"{error} Weights are not affected.")
        return None
