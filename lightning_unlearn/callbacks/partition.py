"""When to gather evidence and when to draw the partition."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION, Attributor, ForwardTrace, check_method, resolve_layer
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.callbacks.base import PartitionConsumer, UnlearnCallback
from lightning_unlearn.data.batch import shown_path
from lightning_unlearn.data.loaders import rank_share
from lightning_unlearn.data.naming import files_in
from lightning_unlearn.data.task_format import Reading, SoftLabels, Task
from lightning_unlearn.evidence.early_epochs import EarlyEpochs
from lightning_unlearn.evidence.eval_pass import EvidencePass, make_attributor
from lightning_unlearn.evidence.frozen_features import FrozenFeatures
from lightning_unlearn.evidence.label_field import LabelWatch
from lightning_unlearn.evidence.step_reader import TrainingPassReader
from lightning_unlearn.evidence.training_dynamics import Trajectory
from lightning_unlearn.evidence.validation_watch import ValidationWatch
from lightning_unlearn.partitioning.apply_recipe import (
    judge_share,
    share_memorised,
    share_predicted,
    validation_accuracy,
    weight_of_copies,
)
from lightning_unlearn.partitioning.build import Cut, Judged, assemble, notes_of, objection_of
from lightning_unlearn.partitioning.checks import (
    attributed_point,
    check_classifies,
    check_samples_first,
    check_several_labels,
    early_points,
)
from lightning_unlearn.partitioning.messages import (
    class_names_of,
    report_partition,
    report_round,
    say_absent,
    warn_of_probabilities,
)
from lightning_unlearn.partitioning.non_finite import check_rows_left_out
from lightning_unlearn.partitioning.resuming import what_holds
from lightning_unlearn.partitioning.review import check_agrees, fit_to_data, open_review
from lightning_unlearn.partitioning.summary import summarise
from lightning_unlearn.partitioning.validation_set import ValidationJudge, check_validates
from lightning_unlearn.partitioning.when import DrawTime, monitored
from lightning_unlearn.recipes import RECIPES, Recipe, get_recipe
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.recipes.users import checking, trial
from lightning_unlearn.results.finding import epochs_in_words
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied, fit_record, provenance, settings_of, write_provenance
from lightning_unlearn.results.review import Decided, Review
from lightning_unlearn.results.review_csv import Table
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.results.summary import PartitionRound, RepairSummary
from lightning_unlearn.trainer.callback_order import callbacks_of, move_behind_averages
from lightning_unlearn.trainer.context import IndexedBatch, probe
from lightning_unlearn.trainer.data_checks import (
    Recognised,
    check_same_labels,
    check_same_size,
    recognise_data,
    same_task,
)
from lightning_unlearn.trainer.divergence import ADVICE, not_finite
from lightning_unlearn.trainer.early_stopping import EarlyEnd, go_on, has_fired
from lightning_unlearn.trainer.fit_loop import compute_device, is_fast_dev_run, log_values
from lightning_unlearn.trainer.isolation import undisturbed
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.row_checks import check_ranks, establish_rows_again
from lightning_unlearn.trainer.sample_rows import locate_samples, no_rows
from lightning_unlearn.trainer.scoring_loader import forget_scoring_loader, train_loader
from lightning_unlearn.trainer.strategies import shards_weights
from lightning_unlearn.trainer.validation import forget_score, score_validation
from lightning_unlearn.utilities.checks import (
    check_choice,
    check_flag,
    check_number,
    check_path,
    check_text,
    check_whole,
)
from lightning_unlearn.utilities.distributed import sum_over_ranks

_PATH = "the dotted path of a layer, or None"
_ONE_EPOCH = (
    "it was drawn after a single epoch, in which most of what a network says is not learned yet; let training go on for"
    " two or more"
)


class AttributionPartitionCallback(UnlearnCallback):
    """Attributes every training sample and gives it a probability of being clean (RLAP, steps 2 and 3).

    Evidence is gathered over training, because what has been memorized no longer shows: from the outputs of the
    training steps themselves, at no cost (at the head's input, the sum of gradient x activation of a class's logit is
    that logit less the bias). Where a row's output does not belong to one sample and its label (MixUp, CutMix, two
    views, several forward calls in a step), this is noticed, said in the log, and replaced by passes over the training
    set after every ``evidence_every_n_epochs`` epochs.

    When ``at_epoch`` epochs on all the data are complete, there is one such pass in any case: in index order, in eval
    mode, sharded over the ranks, with the DataModule's transforms and transfer hooks. It takes the attribution of the
    given label's margin at a layer. It changes nothing: the weights after the fit are bit for bit those of a fit
    without it, until another callback acts on the partition.

    Where the training set has random augmentation, the scores are those of augmented samples, which is said once. A
    DataModule (or LightningModule) may offer a method ``attribution_dataloader()`` that returns a loader of the same
    samples, in the same order, without augmentation: the passes draw from it then.

    With ``every_n_epochs`` the partition is drawn again as the model gets cleaner, from what was seen before the first
    one and from a new pass, until hardly a sample changes sides.

    When the fit ends, :attr:`summary` says what was found and done and whether it helped.

    Args:
        layer: dotted path of the layer whose output is attributed; by default the input of the last Linear with an
            output per class that ``forward`` calls.
        at_epoch: when the partition is drawn, and training on the clean subset can begin. ``"auto"``: once the evidence
            has peaked, as the ranking of the samples hardly changes any more, or training steps predict more of the
            labels than validation does, or that gets worse; after epoch 2 at the earliest, after two thirds of what
            the Trainer allows (epochs, steps, time) at the latest. A whole number: after so many epochs. A float in
            (0, 1): after that share of ``max_epochs``. In any case where EarlyStopping would end training, which goes
            on with what the partition leaves then; and where a fit ends before.
        every_n_epochs: draw the partition again after so many further epochs, and again; None for once.
        stable_share: it is not drawn again once less than this share of the samples has changed sides.
        recipe: ``"auto"``: wrong labels and corrupted inputs, each only if there is a sign of any; ``"label"`` or
            ``"input"``: one of the two; ``"rlap"``: the paper's, blind to the given label; ``"loss"``, ``"aum"``,
            ``"argmax"``: baselines; or the dotted path of a function from evidence to p(clean), or that function (see
            :func:`~lightning_unlearn.recipes.get_recipe`).
        evidence: ``"training"``: read the training steps, and fall back where that is not possible; ``"passes"``: only
            passes in eval mode.
        evidence_every_n_epochs: how often there is a pass before ``at_epoch``, where training steps are not read. It
            costs about as much as a validation pass over the training set.
        method: of attribution, one of ``lightning_unlearn.attribution.ATTRIBUTION_METHODS``.
        input_layer: dotted path of the early layer whose output shows corrupted inputs; by default what the first block
            makes of the input.
        suspect_precision: suspects are the longest list of which at least this share is expected to be wrong: higher
            for fewer and surer ones. In [.5, 1); no sample that is less than .3 likely to be wrong is among them. A
            recipe that does not estimate how many are wrong (a function of yours, and ``"loss"``, ``"aum"``,
            ``"argmax"``, ``"rlap"``, ``"input"``) goes by p(clean) below .5 instead.
        min_class_share: share of each class's samples that is kept in any case, the likeliest; rounded up.
        action: ``"report"`` for a dry run: the partition is drawn, but nothing is pruned or fine-tuned; the log says
            what would be, and what it would cost. Without another callback of ours, ``at_epoch`` may be ``max_epochs``
            then: the whole training is judged.
        review: a table of :meth:`Partition.to_csv <lightning_unlearn.Partition.to_csv>` in which a person has
            filled ``decision`` (and mended ``suggested_label``). It holds for those samples, whatever the recipe says:
            ``keep``: clean for certain; ``drop``: not trained on, not even for ``min_class_share``; ``relabel``:
            trained on under the suggested label with ``CleanSubsetFinetuneCallback(on_noisy="relabel")``, else
            dropped. Rank 0 reads it when the fit is set up; checkpoints keep it.
        task: ``"multiclass"``; ``"binary"``, one logit; ``"multilabel"``, a logit for each label, of which a sample may
            have several, and each of which is judged by itself; or ``"auto"``: as the first batch looks.
        soft_labels: ``"refuse"`` labels that are probabilities, or take the class of the largest (``"argmax"``). Labels
            with a single 1 in each row are taken as they are.
        ignore_index: a label that means none, as in ``torch.nn.functional.cross_entropy``: such a sample is not judged,
            and stays in training as it is; may be NaN; None for no such label.
        batch_to_xy: from a batch on the device to ``(x, y)``: the input of ``forward`` (a tensor, or a tuple or dict
            of its arguments) and the labels. By default a batch is ``(x, y)``, ``(x1, x2, ..., y)``, or a dict, named
            tuple or dataclass with labels under a usual name (see :func:`~lightning_unlearn.data.batch.split_batch`);
            what fits ``forward`` besides is found, such as ``(labels, text, offsets)``.
        logits_from: from what ``forward`` returns to logits; by default that itself, its ``logits``, or the first of
            a tuple.
        judge_validation: judge the samples of the validation loader too, by one pass when those of training are judged
            (``validation_partition``). Nothing acts on it; but wrong labels there count in the accuracy.
        check_data: refuse to resume on training data of which more than a quarter of 16 sampled items have another
            content than in the fit that wrote the checkpoint or ``review`` (not compared under random augmentation).
            Their number and labels are checked in any case.

    Raises:
        ValueError: for arguments out of range, here; for an unknown layer, or a ``review`` that is not as written,
            when the fit is set up; for a layer that is not reached, labels out of range, or a ``review`` of other data,
            when training starts.
        TypeError: for a dataset without index or length, or a batch that is not ``(x, y)``, when training starts.
        MisconfigurationException: if ``at_epoch`` is not before the Trainer's ``max_epochs``, or a share of none, or
            for a strategy that is not supported, when the fit is set up.

    Example:
        >>> AttributionPartitionCallback(at_epoch=20).partition
        Traceback (most recent call last):
        RuntimeError: There is no partition yet: it is drawn when 20 epochs are complete.
    """

    state_version = 3

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        layer: str | None = None,
        *,
        at_epoch: int | float | Literal["auto"] = "auto",
        every_n_epochs: int | None = None,
        stable_share: float = 0.01,
        recipe: str | Callable[..., Any] = "auto",
        evidence: Literal["training", "passes"] = "training",
        evidence_every_n_epochs: int = 1,
        method: str = GRADIENT_X_ACTIVATION,
        input_layer: str | None = None,
        suspect_precision: float = 0.85,
        min_class_share: float = 0.1,
        action: Literal["act", "report"] = "act",
        review: str | PathLike[str] | None = None,
        task: Task = "auto",
        soft_labels: SoftLabels = "refuse",
        ignore_index: float | None = -100,
        batch_to_xy: Callable[[Any], tuple[Any, Tensor]] | None = None,
        logits_from: Callable[[Any], Tensor] | None = None,
        judge_validation: bool = False,
        check_data: bool = True,
    ) -> None:
        self.layer = None if layer is None else check_text("layer", layer, _PATH)
        self.at_epoch = at_epoch
        self.action: str = check_choice("action", action, ("act", "report"))
        self.every_n_epochs: int | None = None
        if every_n_epochs is not None:
            self.every_n_epochs = check_whole(
                "every_n_epochs", every_n_epochs, least=1, meaning="or None for one partition"
            )
        self.stable_share = check_number("stable_share", stable_share, least=0, below=1)
        self.recipe: Recipe = get_recipe(recipe)
        if self.recipe not in RECIPES.values():
            self.recipe = checking(self.recipe)
        self.evidence: str = check_choice("evidence", evidence, ("training", "passes"))
        self.evidence_every_n_epochs = check_whole("evidence_every_n_epochs", evidence_every_n_epochs, least=1)
        self.method = check_method(method)
        self.input_layer = None if input_layer is None else check_text("input_layer", input_layer, _PATH)
        self.suspect_precision = check_number("suspect_precision", suspect_precision, least=0.5, below=1)
        self.min_class_share = check_number("min_class_share", min_class_share, least=0, below=1)
        self.review = None if review is None else check_path("review", review, "a table of decisions")
        self.reading = Reading(
            task=task,
            soft_labels=soft_labels,
            ignore_index=ignore_index,
            batch_to_xy=batch_to_xy,
            logits_from=logits_from,
        )
        self.judge_validation = check_flag("judge_validation", judge_validation)
        self.check_data = check_flag("check_data", check_data)
        self._reader = TrainingPassReader(reading=self.reading, sink=self)
        self._watch = LabelWatch(self.reading)
        self._validation_watch = ValidationWatch(self.reading)
        self._end = EarlyEnd()
        self.reset()

    @override
    def reset(self) -> None:
        self._point: LayerPoint | None = None
        self._early: LayerPoint | None = None
        self.reading.forget()
        # What a checkpoint's labels were taken for; empty before the first batch.
        self._task, self._fingerprint = "", ""
        # What the file holds; and that, once it has been found to fit the data, or what a checkpoint has of it.
        self._table: Table | None = None
        self._review: Review | None = None
        # What earlier epochs showed, the same on every rank; None before the first and once no partition is to follow.
        self._trajectory: Trajectory | None = None
        self._forget_epochs()
        self._when.reset()
        self._partition: Partition | None = None
        self._features, self._validation = FrozenFeatures(), ValidationJudge()
        # Not in a checkpoint: neurons are ranked when a partition is drawn.
        self.sample_weight: Tensor | None = None
        self._rounds: list[PartitionRound] = []
        # Late: drawn when training had ended.
        self._is_stable = self._is_late = False
        self._memorised: float | None = None
        self._accuracy: dict[str, float | None] = {"before": None, "after": None, "gap": None}
        self._summary: RepairSummary | None = None
        # Those that act upon the partition, the fits that led to it, and what a checkpoint says of where it comes from.
        self._partners: list[PartitionConsumer] = []
        self._fits: list[dict[str, Any]] = []
        self._recorded: dict[str, Any] | None = None
        self._has_said_fallback = self._has_said_cost = False
        # How long the last epoch took, for who asks what a pass will cost.
        self._epoch_started: float | None = None
        self._epoch_seconds: float | None = None
        self._reader.reset()
        self._watch.detach()

    def _forget_epochs(self) -> None:
        self._epochs_seen: list[int] = []
        self._early_epochs = EarlyEpochs()
        self._when.forget()

    @property
    def at_epoch(self) -> int | float | str:
        """When the partition is drawn, as asked for; see the class."""
        return self._when.asked

    @at_epoch.setter
    def at_epoch(self, value: Any) -> None:
        self._when = DrawTime(value)

    @property
    def partition(self) -> Partition:
        """The partition of the training set.

        Raises:
            RuntimeError: before it is drawn, saying when it will be.
        """
        if self._partition is None:
            raise RuntimeError(f"There is no partition yet: it is drawn {self._when}.")
        return self._partition

    @property
    def validation_partition(self) -> Partition:
        """The partition of the validation set, by the index in the validation loader's data set.

        Samples that the loader's sampler leaves out are not judged, and have the label -1. ``limit_val_batches`` does
        not limit it.

        Raises:
            RuntimeError: without ``judge_validation``; before that of the training set is drawn; where the validation
                data could not be read then.
        """
        return self._validation.found(self.judge_validation)

    @property
    def rounds(self) -> tuple[PartitionRound, ...]:
        """Every drawing of the partition so far, the first one first."""
        return tuple(self._rounds)

    @property
    def summary(self) -> RepairSummary:
        """What was found, done and gained.

        Raises:
            RuntimeError: before the fit has ended.
        """
        if self._summary is None:
            raise RuntimeError("There is no summary yet: it is made when a fit that has drawn a partition ends.")
        return self._summary

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the result comes from, in primitives; checkpoints hold it too.

        ``fits`` (versions, seed, settings of all callbacks of ours, for each fit or resumed part of one), ``data``,
        ``partition`` and ``validation`` (with the indices of all suspects), ``review`` (what a person has decided),
        ``done`` (for each callback: the indices that were dropped, those that were re-labeled with both labels, the
        pruned neurons of each layer) and ``accuracy``.

        Raises:
            RuntimeError: before the partition is drawn.
        """
        if self._recorded is not None:
            return dict(copied(self._recorded))
        return provenance(
            self.partition,
            fits=self._fits,
            rounds=self._rounds,
            review=self._review,
            done={type(partner).__name__: partner.record(self.partition) for partner in self._partners},
            accuracy=self._accuracy,
            validation=self._validation.record(),
        )

    def save_provenance(self, path: str | PathLike[str]) -> None:
        """Writes :attr:`provenance` as JSON.

        Args:
            path: file to write; folders are made, and what was there is replaced in one step.

        Raises:
            RuntimeError: before the partition is drawn.
        """
        write_provenance(self.provenance, path)

    @override
    def settings(self) -> dict[str, Any]:
        reading = {
            "task": self.reading.wanted,
            "soft_labels": self.reading.soft_labels,
            "ignore_index": self.reading.ignore_index,
            "batch_to_xy": self.reading.batch_to_xy,
            "logits_from": self.reading.logits_from,
        }
        return settings_of(self, recipe=self.recipe.name, **reading)

    @property
    def memorised(self) -> float | None:
        """Of the labels suspected to be wrong, how many the network predicted when that was found; None without any."""
        return self._memorised

    @property
    def accuracy_gap(self) -> float | None:
        """Share of the training labels that the network predicted then, less that of the validation labels.

        None without enough validation samples.
        """
        return self._accuracy["gap"]

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing is pruned or fine-tuned, only reported."""
        return self.action == "report"

    @property
    def regresses_on_probability(self) -> bool:
        """Whether neurons are regressed on the probability, not (as the paper does) on the two clusters."""
        return self.recipe.soft

    def gathers_evidence(self, epoch: int) -> bool:
        """Whether a pass is due when ``epoch`` epochs are complete."""
        if self._partition is not None:
            return self._is_next_due(epoch)
        if epoch < 1:
            return False
        if self._when.is_due(epoch):
            return True
        return self.recipe.averages and epoch not in self._epochs_seen and epoch % self.evidence_every_n_epochs == 0

    def _is_next_due(self, epoch: int) -> bool:
        # A checkpoint of a fit with one partition holds nothing to draw another one from.
        if self.every_n_epochs is None or self._trajectory is None or not self._rounds:
            return False
        return epoch >= self._rounds[-1].epoch + self.every_n_epochs

    @property
    def _reads_training(self) -> bool:
        return self.evidence == "training" and self.recipe.averages and self._partition is None

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        move_behind_averages(trainer, self)
        forget_scoring_loader(trainer)
        forget_score(trainer)
        self._partners = _consumers(trainer)
        self._when.settle(trainer, may_be_last=self.is_dry_run and not self._partners)
        self._table = open_review(trainer, self.review)
        if self.judge_validation:
            check_validates(trainer)
        if self._reads_training:
            self._reader.attach(trainer)

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        for layer in (self.layer, self.input_layer):
            if layer is not None:
                resolve_layer(pl_module, layer)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace, first = probe(trainer, pl_module, self)
        self._choose_points(trainer, pl_module, trace, first)
        self._task = same_task(self._task, self.reading.task)
        warn_of_probabilities(trace.output)
        total, rows = len(train_loader(trainer).dataset), self.reading.rows_per_sample  # type: ignore[arg-type]
        check_ranks(trainer, total)
        self._warn_where_no_round_follows()
        known = self._known_labels(first, total)
        data = recognise_data(trainer, pl_module, self, known, self._fingerprint if self.check_data else None)
        self._fingerprint = data.fingerprint
        self._take_review(trainer, pl_module)
        self._note_fit(trainer)
        self._say_what_is_lost()
        if self._trajectory is None and self._partition is None:
            self._trajectory = self._new_trajectory(total * rows)
            if self.reading.label_at is None:
                self._watch.start(pl_module, trace.logit_maker(self.reading.num_outputs))
        if self._trajectory is not None and self._asks_unseen:
            self._features.start(trainer, pl_module, self, trace, first)
        self._watch_validation(pl_module, trace)
        self._rehearse(trainer, pl_module, first)
        self._try_recipe(trainer, total)
        self._begin_validation(trainer, pl_module)
        if self._reads_training:
            self._start_reading(trainer, pl_module, trace, data, first)

    def _begin_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.judge_validation:
            return
        if self._trajectory is not None:
            self._validation.begin(trainer, pl_module, self, self._fingerprint)
        elif self._validation.partition is None:
            rank_zero_warn(
                "judge_validation=True has no effect here: the partition of the checkpoint was drawn without it; start"
                " again without the checkpoint, or from one of before the partition."
            )

    def _watch_validation(self, pl_module: LightningModule, trace: ForwardTrace) -> None:
        maker = trace.logit_maker(self.reading.num_outputs)
        if self._partition is None and self._when.is_open and maker is not None:
            self._validation_watch.start(resolve_layer(pl_module, maker))

    def _known_labels(self, first: IndexedBatch, total: int) -> Tensor | None:
        """The labels of all rows that a checkpoint has, if it fits the first batch; None in a fit from the start."""
        known = self._trajectory.label if self._trajectory is not None else None
        if self._partition is not None:
            known = self._partition.label.flatten()
        if known is not None:
            check_same_size(len(known) // self.reading.rows_per_sample, total)
            there = (self.reading.by_row(first.weight) > 0).cpu()
            check_same_labels(known[self.reading.row_indices(first.index)[there]], first.label.cpu()[there])
        return known

    def _choose_points(
        self, trainer: Trainer, pl_module: LightningModule, trace: ForwardTrace, first: IndexedBatch
    ) -> None:
        if self.layer is None:
            check_classifies(trainer, pl_module, trace)
        point, batch = attributed_point(trace, self.layer, self.reading.num_outputs), len(first.index)
        # Whether an input is corrupted is not asked of the labels of a multi-label task, each by itself.
        is_multilabel = self.reading.task == "multilabel"
        asks_of_input = self.recipe.needs_response and not is_multilabel
        early = early_points(trace, batch, self.input_layer) if asks_of_input else []
        self._point, *found = locate_samples(trainer, pl_module, self, first, [point, *early])
        self._early = next((one for one in found if one is not None), None)
        for one, is_found in ((point, self._point), *((one, self._early) for one in early if self.input_layer)):
            if is_found is None and not is_multilabel:
                raise ValueError(no_rows(one, batch))
        check_samples_first(self._point, self.method)
        if is_multilabel:
            check_several_labels(self.layer, self.method, self.recipe)

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, first: IndexedBatch) -> None:
        if self._trajectory is None or self.reading.task == "multilabel":
            return
        with undisturbed(trainer, pl_module):
            self._attributor(trainer, pl_module).rehearse(
                first.x, first.label.clamp(min=0), rows=self.recipe.needs_rows
            )

    def _try_recipe(self, trainer: Trainer, total: int) -> None:
        if self._trajectory is None or self.recipe in RECIPES.values():
            return
        index, _ = rank_share(total, trainer.global_rank, trainer.world_size)
        with isolate_rng():
            fault = trial(self.recipe, self._trajectory.basis, index, compute_device(trainer))
        # Together, as the others would wait for a rank that has given up.
        if trainer.strategy.reduce_boolean_decision(bool(fault), all=False):
            raise ValueError(fault or f"Expected recipe '{self.recipe.name}' to judge, but it fails on another rank.")

    def _take_review(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._table is None:
            return
        review = fit_to_data(trainer, pl_module, self, self._table, self._fingerprint, content=self.check_data)
        if not len(review):
            rank_zero_warn(
                f"Nothing is decided in {review.path}: its column 'decision' is empty, so the recipe decides; write"
                " keep, drop or relabel there, or leave out review."
            )
            if self._review is None:
                return
        if self._partition is not None:
            check_agrees(self._review, review)
        self._review = review if len(review) else None

    def _note_fit(self, trainer: Trainer) -> None:
        """Notes what this fit is made with, once."""
        self._remember_files(trainer)
        settings = {type(one).__name__: one.settings() for one in (self, *self._partners)}
        size = getattr(train_loader(trainer).batch_sampler, "batch_size", None)
        fit = fit_record(trainer.current_epoch, trainer.world_size, size if isinstance(size, int) else None, settings)
        # Another callback may have asked first.
        if self._fits[-1:] == [fit]:
            return
        self._say_what_holds(fit)
        self._fits.append(fit)

    def _say_what_holds(self, fit: dict[str, Any]) -> None:
        if not self._fits:
            return
        said = what_holds(
            self._fits[-1],
            fit,
            partition=self._partition,
            epochs_seen=len(self._epochs_seen),
            may_be_drawn_again=self.every_n_epochs is not None and self._trajectory is not None,
        )
        if said:
            rank_zero_info(said)

    def _decided(self, judged: Sequence[Judged], label: Tensor) -> Decided | None:
        """What a person has decided of each sample; None where nobody has."""
        if self._review is None:
            return None
        decided = self._review.laid_over(label)
        if decided.stale:
            rank_zero_warn(
                f"{decided.stale:,} decisions of {self._review.path} do not count: the labels of their samples are no"
                " longer what given_label says."
            )
        if objection := objection_of(judged):
            rank_zero_warn(
                f"All samples of which {self._review.path} decides nothing are taken for clean: {objection}."
            )
        return decided

    def _warn_where_no_round_follows(self) -> None:
        if self.every_n_epochs is not None and self.has_acted and self._trajectory is None and not self._is_stable:
            rank_zero_warn(
                f"every_n_epochs={self.every_n_epochs} has no effect here: the checkpoint is of a fit without it, which"
                " kept nothing to draw the partition again from; start again without the checkpoint."
            )

    def _say_what_is_lost(self) -> None:
        """Says once that a checkpoint lacks what the training steps of an epoch that had not ended have shown."""
        if self._partition is None and self._reader.left_open:
            rank_zero_info(
                "The checkpoint was written before an epoch had ended: what its training steps had shown by then is not"
                " kept, so the partition may differ from that of a fit that was not interrupted; checkpoints of the end"
                " of an epoch (save_on_train_epoch_end=True), or evidence='passes', have all of it."
            )
        self._reader.left_open = False

    def _start_reading(
        self, trainer: Trainer, pl_module: LightningModule, trace: ForwardTrace, data: Recognised, first: IndexedBatch
    ) -> None:
        maker = trace.logit_maker(self.reading.num_outputs)
        if data.train_fault:
            self._reader.give_up(data.train_fault)
        elif maker is not None:
            known = self._trajectory_in_use.label.clone()
            for index, label in ((first.index, first.label.cpu()), (data.rows.index, data.rows.label.flatten())):
                known[self.reading.row_indices(index)] = label
            self._reader.start(trainer, pl_module, maker, known)
            if self._looks_early(trainer.current_epoch + 1):
                self._reader.positions = torch.zeros(len(train_loader(trainer).dataset), dtype=torch.uint8)  # type: ignore[arg-type]
        else:
            self._reader.give_up("no module of the model returns what forward returns as logits")
        if self._reader.reason:
            self._say_fallback()

    def _say_fallback(self) -> None:
        if self._has_said_fallback:
            return
        self._has_said_fallback = True
        every = self.evidence_every_n_epochs
        rank_zero_info(
            f"Label evidence is not read from the training steps ({self._reader.reason}); instead there is a pass over"
            f" the training set {'after every epoch' if every == 1 else f'every {every} epochs'}."
        )

    def observe(self, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Takes rows of the training steps.

        Args:
            index: (B,) int64 on the CPU.
            logits: (B, C).
            label: (B,) int64.
        """
        if self._trajectory is not None:
            self._trajectory.observe(index, logits, label)

    def forget(self) -> None:
        """Drops what the training steps showed: it cannot be trusted."""
        self._forget_epochs()
        if self._trajectory is not None:
            self._trajectory.forget()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if not self._has_said_cost:
            self._epoch_started = time.perf_counter()
        if self._end.release(trainer):
            # The fit loop takes this for its end.
            raise StopIteration
        if self._reads_training:
            self._reader.start_epoch(trainer)
        else:
            self._reader.detach()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_watch.begin()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation_watch.start_batch(batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation_watch.end_batch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.start_batch(batch)
        if self._reads_training:
            batches = trainer.num_training_batches
            self._reader.start_batch(trainer, batch, min(batch_idx / batches, 0.999) if batches else 0.0)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of several backward passes the first may be of a part of the loss.
        if pl_module.automatic_optimization:
            self._follow_loss(trainer, pl_module, trained=True)

    def _follow_loss(self, trainer: Trainer, pl_module: LightningModule, *, trained: bool) -> None:
        """Takes the labels from where the loss takes them, once the first steps have shown where that is."""
        path = self._watch.end_batch(sum_over_ranks(trainer.strategy), trained=trained)
        if path is None:
            return
        self.reading.forget()
        self.reading.label_at = path
        self._trajectory, self._task = None, ""
        self._forget_epochs()
        self._reader.begin_again()
        rank_zero_info(f"Labels are read from {shown_path(path)}, the field that the loss follows.")
        for callback in callbacks_of(trainer):
            if isinstance(callback, UnlearnCallback):
                callback.begin(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow_loss(trainer, pl_module, trained=not pl_module.automatic_optimization)
        if self._reads_training:
            self._reader.end_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_started is not None:
            self._epoch_seconds = time.perf_counter() - self._epoch_started
        if self._partition is None and self._partners and not self.is_dry_run:
            self._end.hold(trainer)
        self._note_validation(trainer)
        if not self._reads_training or self._trajectory is None:
            return
        if not self._reader.end_epoch(trainer):
            self._say_fallback()
            return
        self._look_early(trainer)
        # Counted in complete epochs: what epoch 0 shows is known when one is complete.
        if self._merge(trainer, pl_module, trainer.current_epoch + 1, self._reader.rows_read) > 0:
            self._epochs_seen.append(trainer.current_epoch + 1)

    @property
    def _asks_unseen(self) -> bool:
        return self.recipe.needs_unseen and self.reading.rows_per_sample == 1

    def _note_validation(self, trainer: Trainer) -> None:
        """Notes how validation has gone, where that tells when the partition is due."""
        if self._partition is not None or not self._when.is_open:
            return
        shown = self._validation_watch.result(monitored(trainer), sum_over_ranks(trainer.strategy))
        self._when.note(trainer.current_epoch + 1, **shown)

    def _looks_early(self, epoch: int) -> bool:
        """Whether the training steps of the ``epoch``-th epoch are looked at by themselves."""
        return self._asks_unseen and not self._when.is_due(epoch - 1) and self._early_epochs.is_due(epoch)

    def _look_early(self, trainer: Trainer) -> None:
        positions, epoch = self._reader.positions, trainer.current_epoch + 1
        if positions is None or not self._looks_early(epoch):
            return
        self._early_epochs.look(
            self._trajectory_in_use,
            positions,
            trainer.num_training_batches,
            rank_share(len(positions), trainer.global_rank, trainer.world_size),
            compute_device(trainer),
            sum_over_ranks(trainer.strategy),
        )
        self._reader.positions = positions.zero_() if self._looks_early(epoch + 1) else None

    def _merge(self, trainer: Trainer, pl_module: LightningModule, epoch: int, rows: int) -> int:
        """Adds what this rank observed in an epoch, and returns how many rows that all ranks observed are finite."""
        trajectory, reduce = self._trajectory_in_use, sum_over_ranks(trainer.strategy)
        left_out, total = (int(x) for x in reduce(torch.tensor([trajectory.rows_left_out, rows]).double()).tolist())
        phase, width = self._when.phase(epoch)
        with self._when.noting(epoch, trajectory, reduce, of_steps=self._reader.is_reading):
            trajectory.merge(trajectory.make_room(phase, width), reduce)
        if said := check_rows_left_out(pl_module, left_out, total, epoch, reduce):
            rank_zero_warn(said)
        return total - left_out

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reader.detach()
        self._watch.detach()
        self._validation_watch.detach()
        self._end.release(trainer)
        # The user's loader, whose collate function may lead back to the Trainer.
        forget_scoring_loader(trainer)

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pull_partition(trainer, pl_module)

    def pull_partition(self, trainer: Trainer, pl_module: LightningModule) -> Partition | None:
        """The partition, drawn now if it is due, or None if it is not due yet."""
        if self._point is not None and self._trajectory is not None:
            establish_rows_again(trainer, pl_module, self.reading)
        if self._partition is None:
            self._decide(trainer)
        if self.gathers_evidence(trainer.current_epoch):
            with self.timed():
                self._gather(trainer, pl_module)
        return self._partition

    def _decide(self, trainer: Trainer) -> None:
        """Looks whether the partition is due."""
        epoch = trainer.current_epoch
        self._when.decide(
            trainer,
            is_settled=not (self._reader.is_reading and self._looks_early(epoch + 1)),
            is_stopped=has_fired(trainer, epoch - 1),
            reduce=sum_over_ranks(trainer.strategy),
        )

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, started = trainer.current_epoch, time.perf_counter()
        if self._point is None:
            self.begin(trainer, pl_module)
        is_first = self._partition is None and self._when.is_due(epoch)
        if is_first and self._when.why:
            rank_zero_info(f"The partition is drawn after {epochs_in_words(epoch)}: {self._when.why}.")
        self._say_cost(trainer)
        # A pass that failed, in a fit that goes on, is not counted besides this one.
        self._trajectory_in_use.drop()
        if self._is_before_the_first(epoch):
            share = self._observe_pass(trainer, pl_module)
            self._merge(trainer, pl_module, epoch, len(share["label"]))
        else:
            validation = self._judged_validation(trainer, pl_module)
            self._draw(trainer, pl_module, started)
            self._validation = validation
            validation.report(pl_module)
        if epoch not in self._epochs_seen:
            self._epochs_seen.append(epoch)
        log_values(pl_module, {"unlearn/seconds_pass": time.perf_counter() - started})

    def _is_before_the_first(self, epoch: int) -> bool:
        """Whether no partition is to be drawn yet; one of a checkpoint may be older than ``at_epoch``."""
        return self._partition is None and not self._when.is_due(epoch)

    def _say_cost(self, trainer: Trainer) -> None:
        """Says before the first pass what bounds its time; other methods pass through the network many times."""
        if self._epoch_seconds is None or self.method != GRADIENT_X_ACTIVATION:
            return
        samples: int = len(train_loader(trainer).dataset)  # type: ignore[arg-type]
        rank_zero_info(
            f"A pass over {samples:,} training samples begins. It takes about as long as validation on them, less than"
            f" the last epoch of training, which took {self._epoch_seconds:.1f} s."
        )
        self._has_said_cost = True
        self._epoch_started = self._epoch_seconds = None

    def _check_reader(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops what the training steps showed if it were not the logits, as where an adapter has grown beside."""
        if not self._reader.is_reading:
            return
        trace, _ = probe(trainer, pl_module, self)
        reads_logits = trace.makes_logits(self._reader.head)
        if not trainer.strategy.reduce_boolean_decision(reads_logits, all=True):
            rank_zero_warn(
                f"What '{self._reader.head}' returns is no longer what forward returns as logits, so the evidence of"
                " the training steps is dropped; set evidence='passes' to have passes over the training set instead."
            )
            self.forget()

    def _draw(self, trainer: Trainer, pl_module: LightningModule, started: float) -> None:
        self._check_reader(trainer, pl_module)
        self._reader.detach()
        share = self._observe_pass(trainer, pl_module)
        judged, label = judge_share(
            trainer,
            pl_module,
            share,
            self._trajectory_in_use,
            self.reading,
            self.recipe,
            partial(self._with_unseen, trainer, pl_module),
        )
        decided, is_new = self._decided(judged, label), self._partition is None
        drawn, seconds = self._made(trainer, judged, label, decided), time.perf_counter() - started
        changed = self._publish(trainer, pl_module, judged, drawn)
        if is_new:
            self._validation_watch.detach()
            if self._when.is_stopped and self._acts(trainer, drawn):
                go_on(trainer)
            self._report(pl_module, judged, seconds)
        else:
            report_round(pl_module, drawn, changed, self._is_stable)

    def _publish(
        self, trainer: Trainer, pl_module: LightningModule, judged: Sequence[Judged], drawn: Partition
    ) -> float:
        """Makes a partition known, and returns the share of the samples that have changed sides."""
        before = self._partition
        changed = 1.0 if before is None else (before.is_clean != drawn.is_clean).float().mean().item()
        # The one that others act upon first, or the first of all until there is one.
        is_first = before is None or (drawn.is_actionable and not before.is_actionable)
        memorised, accuracy, gap = self._memorised, self._accuracy["before"], self._accuracy["gap"]
        if is_first:
            memorised = share_memorised(judged, drawn, sum_over_ranks(trainer.strategy))
            if drawn.is_actionable and _consumers(trainer):
                given = validation_accuracy(trainer, pl_module, self)
                gap = None if given is None else share_predicted(judged, sum_over_ranks(trainer.strategy)) - given
        if is_first and self._acts(trainer, drawn):
            accuracy = self._validate(trainer, pl_module, "before")
        # After all that may fail, and all at once.
        self._rounds.append(PartitionRound(drawn.epoch, len(drawn.suspect_indices()), drawn.noise_rate, changed))
        self._is_stable = not is_first and changed < self.stable_share and _tells(drawn)
        self._memorised, self._accuracy["before"], self._accuracy["gap"] = memorised, accuracy, gap
        # A later partition that cannot be acted upon does not undo what an earlier one has led to.
        if is_first or drawn.is_actionable:
            self._partition = drawn
            self._remember_files(trainer)
            self.sample_weight = weight_of_copies(judged, len(drawn))
        if self.every_n_epochs is None or self._is_stable:
            self._trajectory, self._features = None, FrozenFeatures()
        return changed

    def _judged_validation(self, trainer: Trainer, pl_module: LightningModule) -> ValidationJudge:
        judge = ValidationJudge()
        if not self.judge_validation:
            return judge

        def make(judged: Sequence[Judged], label: Tensor, fingerprint: str) -> Partition:
            return self._made(trainer, judged, label, validation=fingerprint)

        judge.draw(trainer, pl_module, self._evidence_pass(trainer, pl_module, is_last=True), self.recipe, make)
        return judge

    def _with_unseen(self, trainer: Trainer, pl_module: LightningModule, evidence: Evidence) -> Evidence:
        if not self._asks_unseen:
            return evidence
        accuracy = validation_accuracy(trainer, pl_module, self)
        unseen = OutOfSample(self._early_epochs.rate, self._early_epochs.drawn, accuracy)
        return self._features.added_to(replace(evidence, unseen=unseen), sum_over_ranks(trainer.strategy))

    def _acts(self, trainer: Trainer, partition: Partition) -> bool:
        """Whether another callback is to act on the partition."""
        acts = partition.is_actionable and not (self.is_dry_run or self._is_late)
        return acts and bool(_consumers(trainer))

    def _validate(self, trainer: Trainer, pl_module: LightningModule, when: str) -> float | None:
        score = score_validation(trainer, pl_module, self)
        if score is None:
            return None
        log_values(pl_module, {f"unlearn/val_accuracy_{when}": score.accuracy})
        return score.accuracy

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end.release(trainer)
        if self._partition is None and not is_fast_dev_run(trainer) and trainer.current_epoch >= 1:
            self._draw_at_the_end(trainer, pl_module)
        if self._partition is None:
            return
        for callback in _consumers(trainer):
            callback.confirm(trainer, pl_module)
        self._summarise(trainer, pl_module, self._partition)

    def _draw_at_the_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the partition of a fit that ends before it is due, or with the epoch after which it is."""
        epoch, self._is_late = trainer.current_epoch, True
        is_early = not self._when.is_due(epoch)
        due = f", due {self._when}," if is_early else ""
        late = f"Training has ended after {epochs_in_words(epoch)}: the partition{due}"
        if self._partners and not self.is_dry_run:
            rank_zero_warn(
                f"{late} is drawn now, too late to prune or fine-tune; give training more epochs, or at_epoch a smaller"
                " value."
            )
        elif is_early:
            rank_zero_info(f"{late} is drawn now.")
        if is_early:
            self._when.decide_now(epoch, "training has ended")
        self.advance(trainer, pl_module)

    def _summarise(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        diverged = not_finite(trainer, pl_module)
        if diverged:
            rank_zero_warn(f"Training has diverged since the partition: {diverged} are NaN or infinite; {ADVICE}.")
        elif self._acts(trainer, partition) and self._accuracy["before"] is not None:
            self._accuracy["after"] = self._validate(trainer, pl_module, "after")
        done = [callback.describe() for callback in _consumers(trainer)]
        self._summary = summarise(
            partition,
            memorised=self._memorised,
            done=tuple(clause for clause in done if clause),
            accuracy=(self._accuracy["before"], self._accuracy["after"]),
            is_dry_run=self.is_dry_run,
            diverged=diverged,
            validation=self._validation.said,
        )
        rank_zero_info(self._summary.advice)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.conclude(trainer, pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the summary of a fit that goes on from its last checkpoint and has no step left.

        Lightning then calls no hook of training, and has torn the strategy down. Every rank must call it; a second call
        does nothing.
        """
        seen = bool(self._epochs_seen) or (self.is_dry_run and self._when.is_due(trainer.current_epoch))
        is_due = self._partition is not None or (seen and not is_fast_dev_run(trainer))
        if self._summary is not None or not is_due or shards_weights(trainer):
            return
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        try:
            self.begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        finally:
            self._reader.detach()
            pl_module.to(device)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives.

        While evidence is gathered, ``16 r + 40`` bytes per sample with ``r = C - 1``, or ``r = 9`` of more than 129
        classes, and four of features; 35 once the partition is drawn, and both as long as it may be drawn again; about
        140 bytes for the fingerprint; in the provenance up to 10 bytes for each suspect that is dropped, 35 for one
        that is re-labeled.
        A checkpoint that is written within an epoch lacks what the training steps of that epoch have shown so far.
        """
        return {
            "version": self.state_version,
            "task": self._task,
            "label_at": None if self.reading.label_field is None else list(self.reading.label_field),
            "epochs_seen": list(self._epochs_seen),
            "trajectory": None if self._trajectory is None else self._trajectory.state_dict(),
            "partition": None if self._partition is None else copied(self._partition.state_dict()),
            "reader": self._reader.state_dict(),
            "early": self._early_epochs.state_dict(),
            "features": self._features.state_dict(),
            "fingerprint": self._fingerprint,
            "when": self._when.state_dict(),
            "rounds": [vars(drawn) | {} for drawn in self._rounds],
            "is_stable": self._is_stable,
            "memorised": self._memorised,
            "accuracy_gap": self._accuracy["gap"],
            "accuracy_before": self._accuracy["before"],
            "validation": self._validation.state_dict(),
            "review": None if self._review is None else copied(self._review.state_dict()),
            "fits": copied(self._fits),
            "provenance": None if self._partition is None else self.provenance,
        }

    @property
    @override
    def has_acted(self) -> bool:
        return self._partition is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._task = state["task"]
        # Absent in checkpoints of before it was looked which field the loss follows.
        if (path := state.get("label_at")) is not None and self.reading.layout is None:
            self.reading.label_at = tuple(path)
        self._epochs_seen = list(state["epochs_seen"])
        trajectory, partition = state["trajectory"], state["partition"]
        self._trajectory = None if trajectory is None else self._trajectory_of(trajectory)
        self._partition = None if partition is None else Partition.from_state_dict(copied(partition))
        self._reader.load_state_dict(state["reader"])
        self._early_epochs = EarlyEpochs.from_state_dict(state["early"])
        self._features = FrozenFeatures.from_state_dict(state.get("features"))
        self._when.load_state_dict(state.get("when"))
        self._fingerprint = state["fingerprint"]
        if self._partition is not None:
            # It watches since setup, and would make the loader forget the batches that are to be re-labeled.
            self._reader.detach()
        self._rounds = [PartitionRound(**drawn) for drawn in state["rounds"]]
        self._is_stable = state["is_stable"]
        self._memorised = state["memorised"]
        self._accuracy["gap"] = state["accuracy_gap"]
        self._accuracy["before"] = state["accuracy_before"]
        # Absent in checkpoints of before validation samples were judged.
        self._validation = ValidationJudge.from_state_dict(state.get("validation"))
        self._review = None if state["review"] is None else Review(**copied(state["review"]))
        self._fits = copied(state["fits"])
        # In a fit there is more to come; elsewhere those that acted are not here.
        self._recorded = None if self._fitting else copied(state["provenance"])

    def _new_trajectory(self, rows: int) -> Trajectory:
        # A recipe of a user may look at the attributions of however many classes.
        keeps = self.recipe not in RECIPES.values()
        return Trajectory(rows, self.reading.num_classes, keeps_coordinates=keeps)

    def _trajectory_of(self, state: dict[str, Any]) -> Trajectory | None:
        try:
            return Trajectory.from_state_dict(state)
        except ValueError as error:
            if self._fitting:
                raise
            rank_zero_warn(f"{error} Weights are not affected.")
            return None

    @property
    def _trajectory_in_use(self) -> Trajectory:
        if self._trajectory is None:
            raise RuntimeError("No evidence is being gathered; this is an error in lightning_unlearn.")
        return self._trajectory

    def _attributor(
        self, trainer: Trainer, pl_module: LightningModule, watch: tuple[LayerPoint, ...] = ()
    ) -> Attributor:
        if self._point is None:
            raise RuntimeError("The layer to attribute at is not resolved; this is an error in lightning_unlearn.")
        return make_attributor(trainer, pl_module, self, self._point, self.method, watch)

    def _observe_pass(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Passes over this rank's share of the training set; see :meth:`EvidencePass.run`."""
        is_last = not self._is_before_the_first(trainer.current_epoch)
        total = len(self._trajectory_in_use)
        # The margins of several labels are those of the logits, for which no layer is watched.
        watches = is_last and self.reading.task != "multilabel"
        features = self._features if watches and self._features.hold(trainer, pl_module, self, total) else None
        found = self._evidence_pass(trainer, pl_module, is_last=is_last, features=features)
        share = found.run(trainer, pl_module)
        if is_last and self._partition is None:
            say_absent(trainer, len(found.absent), len(self._trajectory_in_use) // self.reading.rows_per_sample)
        return share

    def _evidence_pass(
        self, trainer: Trainer, pl_module: LightningModule, *, is_last: bool, features: FrozenFeatures | None = None
    ) -> EvidencePass:
        early = self._early if is_last else None
        watched = (early, None if features is None else features.point)
        attributor = self._attributor(trainer, pl_module, tuple(point for point in watched if point is not None))
        return EvidencePass(self, attributor, self._trajectory_in_use, is_last, self.recipe.needs_rows, early, features)

    def _made(
        self,
        trainer: Trainer,
        judged: Sequence[Judged],
        label: Tensor,
        decided: Decided | None = None,
        validation: str | None = None,
    ) -> Partition:
        """The partition of the training set, or of the validation set with this fingerprint."""
        drawn = assemble(
            judged,
            label,
            # Of validation samples none are to be kept for training.
            Cut(self.suspect_precision, self.min_class_share if validation is None else 0),
            sum_over_ranks(trainer.strategy),
            recipe=self.recipe.name,
            layer=str(self._point),
            epoch=trainer.current_epoch,
            fingerprint=self._fingerprint if validation is None else validation,
            relabel_threshold=max((getattr(one, "relabel_threshold", 0.0) for one in self._partners), default=0.0)
            or None,
            decided=decided,
        )
        drawn = replace(drawn, class_names=tuple(class_names_of(trainer, self.reading.num_classes)))
        is_early = self._partition is None and drawn.epoch == 1 and bool(self._when.why)
        if is_early and drawn.status is PartitionStatus.OK:
            return replace(drawn, status=PartitionStatus.TOO_EARLY, warning=_ONE_EPOCH)
        return drawn

    def _remember_files(self, trainer: Trainer) -> None:
        if self._partition is not None:
            files = files_in(train_loader(trainer).dataset)
            self._partition.remember_files(files if len(files) == len(self._partition) else ())

    def _report(self, pl_module: LightningModule, judged: Sequence[Judged], seconds: float) -> None:
        partition = self.partition
        evidence = f"evidence of {epochs_in_words(len(self._epochs_seen))} and a pass of {seconds:.1f} s"
        reviewed = [] if self._review is None else [self._review.counts()]
        notes = [*reviewed, *notes_of(judged, partition)]
        report_partition(pl_module, partition, evidence, notes, self._memorised)


def _tells(partition: Partition) -> bool:
    """Whether it tells noise from clean samples, or finds no noise: what could not be told may be told later."""
    return partition.status in (PartitionStatus.OK, PartitionStatus.ALL_CLEAN, PartitionStatus.REVIEW_ONLY)


def _consumers(trainer: Trainer) -> list[PartitionConsumer]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PartitionConsumer)]
