"""When to gather evidence and when to compute the partition."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION, check_method, resolve_layer
from lightning_unlearn.callbacks.base import PartitionConsumer, UnlearnCallback
from lightning_unlearn.data.batch import shown_path
from lightning_unlearn.data.data_format import DataFormat, make_data_format
from lightning_unlearn.data.fingerprint import fingerprint_of_keys
from lightning_unlearn.data.sample_key import KeyReader
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.collector import EvidenceCollector
from lightning_unlearn.evidence.keyed_collector import KeyedCollector
from lightning_unlearn.evidence.rank_share import RankShare
from lightning_unlearn.evidence.when import DrawTime
from lightning_unlearn.partitioning.apply_recipe import (
    apply_recipe,
    memorized_fraction,
    share_predicted,
    validation_accuracy,
    weight_of_copies,
)
from lightning_unlearn.partitioning.build import CleanCriteria, ShardResult, assemble, notes_of
from lightning_unlearn.partitioning.by_key import check_fit_by_key, check_reviewed, refuse_by_key, review_by_key
from lightning_unlearn.partitioning.messages import (
    class_names_of,
    report_partition,
    report_round,
    say_absent,
    say_cost,
    say_late,
    warn_of_probabilities,
)
from lightning_unlearn.partitioning.probabilities import average_probabilities, check_has_probabilities
from lightning_unlearn.partitioning.review import check_agrees, decided_of, open_review
from lightning_unlearn.partitioning.start import (
    check_known_labels,
    choose_points,
    note_fit,
    remember_files,
    take_review,
    try_recipe,
)
from lightning_unlearn.partitioning.state import AtFirst, PartitionState, PublishedPartition
from lightning_unlearn.partitioning.summary import Accuracies, summarize
from lightning_unlearn.partitioning.validation_set import ValidationJudge, check_validates
from lightning_unlearn.recipes import Recipe, get_recipe
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.recipes.registry import is_builtin, settings_of_recipe
from lightning_unlearn.recipes.users import checking
from lightning_unlearn.results.finding import epochs_in_words
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied, settings_of
from lightning_unlearn.results.review import AppliedReview
from lightning_unlearn.results.review_csv import Table
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.trainer.callback_order import callbacks_of, move_behind_averages
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.data_checks import Recognized, recognize_data, same_task
from lightning_unlearn.trainer.divergence import ADVICE, not_finite
from lightning_unlearn.trainer.early_stopping import EarlyEnd, go_on, has_fired
from lightning_unlearn.trainer.fit_loop import is_fast_dev_run
from lightning_unlearn.trainer.keyed_batches import KeyedBatches
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.protocols import PartitionSource
from lightning_unlearn.trainer.row_checks import check_ranks, establish_rows_again
from lightning_unlearn.trainer.strategies import shards_weights
from lightning_unlearn.trainer.validation import score_validation
from lightning_unlearn.utilities.checks import (
    check_flag,
    check_number,
    check_path,
    check_text,
    check_whole,
)
from lightning_unlearn.utilities.distributed import sum_over_ranks

_PATH = "the dotted path of a layer, or None"
_ONE_EPOCH = "it was computed after a single epoch, before the network has learned much; train for two or more"


class AttributionPartitionCallback(PublishedPartition, UnlearnCallback):
    """Attributes every training sample and gives it a probability of being clean (RLAP, steps 2 and 3).

    Evidence is gathered over training, because what has been memorized no longer shows: from the outputs of the
    training steps themselves, at no cost (at the head's input, the sum of gradient x activation of a class's logit is
    that logit less the bias). Where a row's output does not belong to one sample and its label (MixUp, CutMix, two
    views, several forward calls in a step), this is noticed, said in the log, and replaced by passes over the training
    set after every epoch.

    When ``at_epoch`` epochs on all the data are complete, there is one such pass in any case: in index order, in eval
    mode, sharded over the ranks, with the DataModule's transforms and transfer hooks. It takes the attribution of the
    given label's margin at a layer. It changes nothing: the weights after the fit are bit for bit those of a fit
    without it, until another callback acts on the partition.

    Where the training set has random augmentation, the scores are those of augmented samples, which is said once. A
    DataModule (or LightningModule) may offer a method ``attribution_dataloader()`` that returns a loader of the same
    samples, in the same order, without augmentation: the passes draw from it then.

    With ``every_n_epochs`` the partition is computed again as the model gets cleaner, from what was seen before the
    first one and from a new pass, until hardly a sample changes sides.

    When the fit ends, :attr:`summary` says what was found and done and whether it helped.

    Args:
        layer: dotted path of the layer whose output is attributed; by default the input of the last Linear with an
            output per class that ``forward`` calls.
        at_epoch: when the partition is computed, and training on the clean subset can begin. ``"auto"``: once the
            evidence has peaked, as the ranking of the samples hardly changes any more, or training steps predict more
            of the labels than validation does, or that gets worse; after epoch 2 at the earliest. Where another
            callback of ours is to act on it, after two thirds of what the Trainer allows (epochs, steps, time) at the
            latest, else when training ends. A whole number: after so many epochs, which may be ``max_epochs`` where no
            other callback is to act. A float in (0, 1): after that share of ``max_epochs``. In any case where
            EarlyStopping would end training, which goes on with what the partition leaves then; and where a fit ends
            before.
        every_n_epochs: recompute the partition after so many further epochs, and again; None for once.
        recipe: ``"auto"``: wrong labels and corrupted inputs, each only if there is a sign of any; ``"label"`` or
            ``"input"``: one of the two; ``"rlap"``: the paper's, blind to the given label; ``"loss"``, ``"aum"``,
            ``"argmax"``: baselines; or the dotted path of a function from evidence to p(clean), or that function.
            :func:`~lightning_unlearn.recipes.get_recipe` changes what a recipe is given, and what it always keeps.
        suspect_precision: suspects are the longest list of which at least this share is expected to be wrong: higher
            for fewer and surer ones. In [.5, 1); no sample that is less than .3 likely to be wrong is among them. A
            recipe that does not estimate how many are wrong (a function of yours, and ``"loss"``, ``"aum"``,
            ``"argmax"``, ``"rlap"``, ``"input"``) goes by p(clean) below .5 instead.
        dry_run: compute the partition, but change nothing; the log reports what would be pruned and fine-tuned, and at
            what cost.
        review: a table of :meth:`Partition.to_csv <lightning_unlearn.Partition.to_csv>` in which a person has
            filled ``decision`` (and mended ``suggested_label``). It holds for those samples, whatever the recipe says:
            ``keep``: clean for certain; ``drop``: never trained on, whatever ``min_class_fraction``; ``relabel``:
            trained on under the suggested label with ``CleanSubsetFinetuneCallback(on_noisy="relabel")``, else
            dropped. Rank 0 reads it when the fit is set up; checkpoints keep it.
        judge_validation: judge the samples of the validation loader too, by one pass when those of training are judged
            (``validation_partition``). Nothing acts on it; but wrong labels there count in the accuracy.
        keep_probabilities: keep the probabilities of the classes that training has shown, averaged over its epochs
            (``probabilities``), for tools such as cleanlab: 4 C bytes per sample. Of at most 129 classes.
        data: how batches, outputs and labels are read, a :class:`~lightning_unlearn.DataFormat` or a dict of its
            fields; by default that is inferred.

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
        RuntimeError: There is no partition yet: it is computed when 20 epochs are complete.
    """

    state_version = 3

    min_change = 0.01
    """The partition is not computed again once less than this fraction of the samples has changed group."""

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        layer: str | None = None,
        *,
        at_epoch: int | float | Literal["auto"] = "auto",
        every_n_epochs: int | None = None,
        recipe: str | Callable[..., Any] = "auto",
        suspect_precision: float = 0.85,
        dry_run: bool = False,
        review: str | PathLike[str] | None = None,
        judge_validation: bool = False,
        keep_probabilities: bool = False,
        data: DataFormat | dict[str, Any] | None = None,
    ) -> None:
        self.layer = None if layer is None else check_text("layer", layer, _PATH)
        self.dry_run = check_flag("dry_run", dry_run)
        self.every_n_epochs: int | None = None
        if every_n_epochs is not None:
            self.every_n_epochs = check_whole(
                "every_n_epochs", every_n_epochs, least=1, meaning="or None for one partition"
            )
        self.suspect_precision = check_number("suspect_precision", suspect_precision, least=0.5, below=1)
        self.review = None if review is None else check_path("review", review, "a table of decisions")
        self.data = make_data_format(data)
        self.reading = TaskFormat(self.data)
        self.judge_validation = check_flag("judge_validation", judge_validation)
        self.keep_probabilities = check_flag("keep_probabilities", keep_probabilities)
        key = self.data.sample_key
        self.keyed = None if key is None else KeyedBatches(KeyReader(key))
        self.collector = (
            EvidenceCollector(self.reading) if self.keyed is None else KeyedCollector(self.reading, self.keyed)
        )
        self.recipe = recipe
        if self.keyed is not None:
            refuse_by_key(self)
        self.at_epoch = at_epoch
        self._end = EarlyEnd()
        self.reset()

    @override
    def reset(self) -> None:
        self.state = PartitionState()
        self._has_begun = False
        self._recorded = None
        # What the file of decisions holds, before it has been found to fit the data.
        self._table: Table | None = None
        self._partners: list[PartitionConsumer] = []
        self._has_said_cost = False
        # How long the last epoch took, for who asks what a pass will cost.
        self._epoch_started: float | None = None
        self._epoch_seconds: float | None = None
        self.collector.reset()

    @property
    def at_epoch(self) -> int | float | str:
        """When the partition is computed, as asked for; see the class."""
        return self._when.asked

    @at_epoch.setter
    def at_epoch(self, value: Any) -> None:
        self.collector.when = DrawTime(value)

    @property
    def recipe(self) -> Recipe:
        """From evidence to p(clean)."""
        return self.collector.recipe

    @recipe.setter
    def recipe(self, value: Any) -> None:
        found = get_recipe(value)
        check_method(found.attribution_method)
        of_user = not is_builtin(found)
        self.collector.recipe, self.collector.keeps_coordinates = checking(found) if of_user else found, of_user

    @property
    def _when(self) -> DrawTime:
        return self.collector.when

    @override
    def _when_drawn(self) -> str:
        return str(self._when)

    @override
    def settings(self) -> dict[str, Any]:
        return settings_of(self, recipe=self.recipe.name, data=vars(self.data)) | settings_of_recipe(self.recipe)

    @property
    def uses_soft_targets(self) -> bool:
        """Whether neurons are regressed on the probability, not (as the paper does) on the two clusters."""
        return self.recipe.soft

    def gathers_evidence(self, epoch: int) -> bool:
        """Whether a pass is due when ``epoch`` epochs are complete."""
        if self.state.partition is None:
            return self.collector.is_pass_due(epoch)
        # A checkpoint of a fit with one partition holds nothing to compute another one from.
        if not self._may_be_drawn_again or not self.state.rounds:
            return False
        return epoch >= self.state.rounds[-1].epoch + (self.every_n_epochs or 0)

    @property
    def _may_be_drawn_again(self) -> bool:
        return self.every_n_epochs is not None and self.collector.trajectory is not None

    @override
    def find_source(self, trainer: Trainer) -> PartitionSource:
        return self

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        move_behind_averages(self.fit, self)
        self._partners = _consumers(trainer)
        self._when.settle(self.fit.limits, may_be_last=self.every_n_epochs is None and not self._partners)
        self._table = open_review(self.fit, self.review)
        if self.judge_validation:
            check_validates(self.fit)
        if self.keyed is not None:
            refuse_by_key(self)
            check_fit_by_key(self._partners)
            self.keyed.attach(self.fit)
            self._has_begun = False
        elif self.collector.reads_steps:
            self.collector.reader.attach(self.fit)

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        for layer in (self.layer, self.recipe.input_layer):
            if layer is not None:
                resolve_layer(pl_module, layer)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit, state, collector = self.fit, self.state, self.collector
        trace, first = fit.probe()
        collector.point, collector.early = choose_points(fit, trace, first, self.recipe, self.layer)
        state.task = same_task(state.task, self.reading.task)
        warn_of_probabilities(trace.output)
        self._check_wishes()
        data = None if isinstance(collector, KeyedCollector) else self._recognize(fit, first)
        if isinstance(collector, KeyedCollector):
            collector.check_first(fit, first.label.reshape(len(first.index), -1))
            self._check_reviewed()
        settings = {type(one).__name__: one.settings() for one in (self, *self._partners)}
        seen, again = len(collector.epochs_seen), self._may_be_drawn_again
        note_fit(fit, state, settings, seen, may_be_drawn_again=again)
        collector.say_what_is_lost()
        collector.start(fit, trace, first, is_before=state.partition is None)
        if collector.trajectory is not None and not is_builtin(self.recipe):
            try_recipe(fit, self.recipe, collector.trajectory.basis)
        self._begin_validation()
        collector.start_reading(fit, trace, data, first)

    def _recognize(self, fit: FitContext, first: IndexedBatch) -> Recognized:
        """Sees that the training set is the one that is known, and that what a person has decided is of it."""
        state = self.state
        check_ranks(fit, fit.total)
        known = None if self.collector.trajectory is None else self.collector.trajectory.label
        if state.partition is not None:
            known = state.partition.label.flatten()
        check_known_labels(fit, first, known)
        data = recognize_data(fit, known, state.fingerprint if self.data.verify else None)
        state.fingerprint = data.fingerprint
        take_review(fit, state, self._table, content=self.data.verify)
        remember_files(fit, state.partition)
        return data

    def _check_reviewed(self) -> None:
        """Refuses, of samples that are known by a key, decisions that could not be taken later."""
        if self._table is None:
            return
        check_reviewed(self._table, self.reading)
        if self.state.partition is not None:
            check_agrees(self.state.review, review_by_key(self._table, self.state.partition.keys, self.reading))

    def _check_wishes(self) -> None:
        if self.keep_probabilities:
            check_has_probabilities(self.reading)
        if self.keyed is None:
            self._warn_where_no_round_follows()

    def _begin_validation(self) -> None:
        if not self.judge_validation:
            return
        if self.collector.trajectory is not None:
            self.state.validation.begin(self.fit, self.state.fingerprint)
        elif self.state.validation.partition is None:
            rank_zero_warn(
                "judge_validation=True has no effect: the checkpoint's partition was computed without it. Train"
                " without ckpt_path, or resume from a checkpoint from before the partition."
            )

    def _warn_where_no_round_follows(self) -> None:
        is_over = self.state.is_stable or self.collector.trajectory is not None
        if self.every_n_epochs is not None and self.has_acted and not is_over:
            rank_zero_warn(
                f"every_n_epochs={self.every_n_epochs} has no effect: the checkpoint was saved without it and"
                " keeps no evidence. Train without ckpt_path to use it."
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if not self._has_said_cost:
            self._epoch_started = time.perf_counter()
        if self._end.release(trainer):
            # The fit loop takes this for its end.
            raise StopIteration
        self.collector.start_epoch(self.fit)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.keyed is not None:
            self.keyed.start_batch(batch)
            if not self._has_begun:
                self._has_begun = True
                self._begin_all(trainer, pl_module)
        self.collector.start_batch(self.fit, batch, batch_idx)

    def _begin_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in callbacks_of(trainer):
            if isinstance(callback, UnlearnCallback):
                callback.begin(trainer, pl_module)

    @property
    @override
    def waits_for_batch(self) -> bool:
        return self.keyed is not None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self.collector, KeyedCollector):
            self.collector.take_up(self.fit)
        super().on_train_start(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of several backward passes the first may be of a part of the loss.
        if pl_module.automatic_optimization:
            self._follow_loss(trainer, pl_module, trained=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow_loss(trainer, pl_module, trained=not pl_module.automatic_optimization)
        self.collector.end_batch(self.fit, batch_idx)
        if self.keyed is not None:
            self.keyed.end_batch()

    def _follow_loss(self, trainer: Trainer, pl_module: LightningModule, *, trained: bool) -> None:
        """Takes the labels from where the loss takes them, once the first steps have shown where that is."""
        path = self.collector.label_field(self.fit, trained=trained)
        if path is None:
            return
        self.state.task = ""
        rank_zero_info(f"Labels are read from {shown_path(path)}, the field that the loss follows.")
        self._begin_all(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_started is not None:
            self._epoch_seconds = time.perf_counter() - self._epoch_started
        if self.state.partition is None and self._partners and not self.dry_run:
            self._end.hold(trainer)
        self.collector.end_epoch(self.fit)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.collector.validation_watch.begin()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.collector.validation_watch.start_batch(batch)

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
        self.collector.validation_watch.end_batch()

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collector.detach()
        self._end.release(trainer)

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.get_partition(trainer, pl_module)

    def get_partition(self, trainer: Trainer, pl_module: LightningModule) -> Partition | None:
        """The partition, computed now if it is due, or None if it is not due yet."""
        if self._fit is None:
            return self.state.partition
        collector, epoch = self.collector, trainer.current_epoch
        if collector.point is not None and collector.trajectory is not None and self.keyed is None:
            establish_rows_again(self.fit)
        if self.state.partition is None:
            self._when.decide(
                self.fit.limits,
                is_settled=not (collector.reader.is_reading and collector.looks_early(epoch + 1)),
                is_stopped=has_fired(trainer, epoch - 1),
                reduce=sum_over_ranks(trainer.strategy),
            )
        if self.gathers_evidence(epoch):
            with self.timed():
                self._gather(trainer, pl_module)
        return self.state.partition

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector, epoch, started = self.collector, trainer.current_epoch, time.perf_counter()
        if collector.point is None and self.keyed is None:
            self.begin(trainer, pl_module)
        if self.state.partition is None and self._when.is_due(epoch) and self._when.why:
            rank_zero_info(f"The partition is computed after {epochs_in_words(epoch)}: {self._when.why}.")
        self._say_cost(trainer)
        # A pass that failed, in a fit that goes on, is not counted besides this one.
        if collector.trajectory is not None:
            collector.trajectory.drop()
        if collector.is_before_the_first(epoch):
            share = self._observe_pass(trainer, pl_module)
            collector.merge(self.fit, epoch, len(share["label"]))
        else:
            validation = self._judged_validation(trainer, pl_module)
            self._draw(trainer, pl_module, started)
            self.state.validation = validation
            validation.report(self.fit)
        if epoch not in collector.epochs_seen:
            collector.epochs_seen.append(epoch)
        self.fit.log({"unlearn/seconds_pass": time.perf_counter() - started})

    def _say_cost(self, trainer: Trainer) -> None:
        """Says before the first pass what bounds its time; other methods pass through the network many times."""
        if (
            self._epoch_seconds is None
            or self.keyed is not None
            or self.recipe.attribution_method != GRADIENT_X_ACTIVATION
        ):
            return
        say_cost(self.fit, self._epoch_seconds)
        self._has_said_cost = True
        self._epoch_started = self._epoch_seconds = None

    def _observe_pass(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Passes over this rank's share of the training set; see :meth:`ScoringPass.run`."""
        share, absent = self.collector.pass_over(self.fit)
        if self.state.partition is None and self._when.is_due(trainer.current_epoch):
            say_absent(self.fit, len(absent), len(self.collector.in_use) // self.reading.rows_per_sample)
        return share

    def _draw(self, trainer: Trainer, pl_module: LightningModule, started: float) -> None:
        fit, collector, state = self.fit, self.collector, self.state
        collector.check_steps(fit)
        collector.reader.detach()
        of_rank, share, keys = self._share_of_rank(trainer, pl_module)

        def with_unseen(evidence: Evidence) -> Evidence:
            if not collector.asks_unseen:
                return evidence
            return collector.with_unseen(fit, evidence, validation_accuracy(fit))

        judged, label = apply_recipe(fit, share, collector.in_use, self.recipe, with_unseen, of_rank)
        drawn = self._made(trainer, judged, label, decided_of(state.review, judged, label))
        if keys:
            drawn = replace(drawn, keys=keys, fingerprint=fingerprint_of_keys(keys))
        if self.keep_probabilities:
            state.probabilities = average_probabilities(judged[0], len(drawn), fit.reduce)
        is_new, seconds = state.partition is None, time.perf_counter() - started
        changed = self._publish(trainer, pl_module, judged, drawn)
        if is_new:
            collector.validation_watch.detach()
            if self._when.is_stopped and self._acts(trainer, drawn):
                go_on(trainer)
            self._report(pl_module, judged, seconds)
        else:
            report_round(fit, drawn, changed, state.is_stable)

    def _share_of_rank(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[RankShare | None, dict[str, Tensor], tuple[Any, ...]]:
        """Which samples this rank judges (None: every R-th index), what was seen of them, and the keys of all."""
        if not isinstance(self.collector, KeyedCollector):
            return None, self._observe_pass(trainer, pl_module), ()
        of_rank, share, keys = self.collector.share(self.fit)
        if self._table is not None:
            self.state.review = review_by_key(self._table, keys, self.reading)
        return of_rank, share, keys

    def _publish(
        self, trainer: Trainer, pl_module: LightningModule, judged: Sequence[ShardResult], drawn: Partition
    ) -> float:
        """Makes a partition known, and returns the share of the samples that have changed sides."""
        state = self.state
        found = state.at_first
        if state.is_first(drawn):
            found = self._at_first(trainer, pl_module, judged, drawn)
        # After all that may fail, and all at once.
        changed, is_taken = state.publish(drawn, found, self.min_change)
        if is_taken:
            remember_files(self.fit, drawn)
            state.sample_weight = weight_of_copies(judged, len(drawn))
        self.collector.close(forever=self.every_n_epochs is None or state.is_stable)
        return changed

    def _at_first(
        self, trainer: Trainer, pl_module: LightningModule, judged: Sequence[ShardResult], drawn: Partition
    ) -> AtFirst:
        """What is known of the network when the partition that others act upon first is drawn."""
        reduce = sum_over_ranks(trainer.strategy)
        gap, accuracy, best = self.state.accuracy_gap, self.state.accuracy_before, self.state.best_accuracy_before
        memorized = memorized_fraction(judged, drawn, reduce)
        if drawn.is_actionable and _consumers(trainer):
            given = validation_accuracy(self.fit)
            gap = None if given is None else share_predicted(judged, reduce) - given
        if self._acts(trainer, drawn):
            accuracy, best = self._validate(trainer, pl_module, "before"), self._when.best_accuracy
        return AtFirst(memorized, accuracy, gap, best)

    def _made(
        self,
        trainer: Trainer,
        judged: Sequence[ShardResult],
        label: Tensor,
        decided: AppliedReview | None = None,
        validation: str | None = None,
    ) -> Partition:
        """The partition of the training set, or of the validation set with this fingerprint."""
        drawn = assemble(
            judged,
            label,
            # Of validation samples none are to be kept for training.
            CleanCriteria(self.suspect_precision, self.recipe.min_class_fraction if validation is None else 0),
            sum_over_ranks(trainer.strategy),
            recipe=self.recipe.name,
            layer=self.collector.layer,
            epoch=trainer.current_epoch,
            fingerprint=self.state.fingerprint if validation is None else validation,
            relabel_threshold=max((getattr(one, "relabel_threshold", 0.0) for one in self._partners), default=0.0)
            or None,
            decided=decided,
        )
        drawn = replace(drawn, class_names=tuple(class_names_of(self.fit, self.reading.num_classes)))
        is_early = self.state.partition is None and drawn.epoch == 1 and bool(self._when.why)
        if is_early and drawn.status is PartitionStatus.OK:
            return replace(drawn, status=PartitionStatus.TOO_EARLY, warning=_ONE_EPOCH)
        return drawn

    def _judged_validation(self, trainer: Trainer, pl_module: LightningModule) -> ValidationJudge:
        judge = ValidationJudge()
        if not self.judge_validation:
            return judge

        def make(judged: Sequence[ShardResult], label: Tensor, fingerprint: str) -> Partition:
            return self._made(trainer, judged, label, validation=fingerprint)

        training = self.collector.evidence_pass(self.fit, is_last=True)
        judge.draw(training, self.recipe, make)
        return judge

    def _acts(self, trainer: Trainer, partition: Partition) -> bool:
        """Whether another callback is to act on the partition."""
        acts = partition.is_actionable and not (self.dry_run or self.state.is_late)
        return acts and bool(_consumers(trainer))

    def _validate(self, trainer: Trainer, pl_module: LightningModule, when: str) -> float | None:
        score = score_validation(self.fit)
        if score is None:
            return None
        self.fit.log({f"unlearn/val_accuracy_{when}": score.accuracy})
        return score.accuracy

    def _report(self, pl_module: LightningModule, judged: Sequence[ShardResult], seconds: float) -> None:
        partition, review = self.partition, self.state.review
        seen = epochs_in_words(len(self.collector.epochs_seen))
        notes = [*([] if review is None else [review.counts()]), *notes_of(judged, partition)]
        evidence = f"evidence of {seen}" + ("" if self.keyed is not None else f" and a pass of {seconds:.1f} s")
        report_partition(self.fit, partition, evidence, notes)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end.release(trainer)
        if self.state.partition is None and not is_fast_dev_run(trainer) and trainer.current_epoch >= 1:
            self._draw_at_the_end(trainer, pl_module)
        if self.state.partition is None:
            return
        for callback in _consumers(trainer):
            callback.confirm(trainer, pl_module)
        self._summarize(trainer, pl_module, self.state.partition)

    def _draw_at_the_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the partition of a fit that ends before it is due, or with the epoch after which it is."""
        epoch, self.state.is_late = trainer.current_epoch, True
        is_early = not self._when.is_due(epoch)
        due = str(self._when) if is_early and not (self._when.is_open and self._when.may_be_last) else ""
        say_late(epoch, due, acts=bool(self._partners) and not self.dry_run)
        if is_early:
            self._when.decide_now(epoch, "training has ended")
        self.advance(trainer, pl_module)

    def _summarize(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        state, diverged = self.state, not_finite(self.fit)
        if diverged:
            rank_zero_warn(f"Training has diverged since the partition: {diverged} are NaN or infinite; {ADVICE}.")
        elif self._acts(trainer, partition) and state.accuracy_before is not None:
            state.accuracy_after = self._validate(trainer, pl_module, "after")
        done = [callback.describe() for callback in _consumers(trainer)]
        state.summary = summarize(
            partition,
            memorized=state.memorized,
            done=tuple(clause for clause in done if clause),
            accuracy=Accuracies(state.accuracy_before, state.accuracy_after, state.best_accuracy_before),
            dry_run=self.dry_run,
            diverged=diverged,
            validation=state.validation.said,
        )
        rank_zero_info(state.summary.advice)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.conclude(trainer, pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the summary of a fit that goes on from its last checkpoint and has no step left.

        Lightning then calls no hook of training, and has torn the strategy down. Every rank must call it; a second call
        does nothing.
        """
        is_due = self.dry_run and self._when.is_due(trainer.current_epoch)
        seen = bool(self.collector.epochs_seen) or is_due
        has_to = self.state.partition is not None or (seen and not is_fast_dev_run(trainer))
        if self.state.summary is not None or not has_to or shards_weights(trainer):
            return
        device = next(pl_module.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        try:
            if isinstance(self.collector, KeyedCollector):
                self.collector.take_up(self.fit)
            else:
                self.begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        finally:
            self.collector.reader.detach()
            pl_module.to(device)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives.

        While evidence is gathered, ``16 r + 40`` bytes per sample with ``r = C - 1``, or ``r = 9`` of more than 129
        classes, and four of features; 35 once the partition is computed, and both as long as it may be computed again;
        about 140 bytes for the fingerprint; in the provenance up to 10 bytes for each suspect that is dropped, 35 for
        one that is re-labeled.
        A checkpoint that is written within an epoch lacks what the training steps of that epoch have shown so far.
        """
        where_from = None if self.state.partition is None else self.provenance
        own = {"version": self.state_version, "provenance": where_from}
        return own | self.state.state_dict() | self.collector.state_dict()

    @property
    @override
    def has_acted(self) -> bool:
        return self.state.partition is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.state = PartitionState.from_state_dict(state)
        self.collector.load_state_dict(state, is_closed=self.has_acted, is_fit=self._fitting)
        # In a fit there is more to come; elsewhere those that acted are not here.
        self._recorded = None if self._fitting else copied(state["provenance"])


def _consumers(trainer: Trainer) -> list[PartitionConsumer]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PartitionConsumer)]
