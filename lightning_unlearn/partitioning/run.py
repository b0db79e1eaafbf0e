"""Steps 2 and 3 from beginning to end: collect evidence when it is due, and compute the partition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION
from lightning_unlearn.data.fingerprint import fingerprint_of_keys
from lightning_unlearn.evidence.collector import EvidenceCollector
from lightning_unlearn.evidence.keyed_collector import KeyedCollector
from lightning_unlearn.evidence.rank_share import RankShare
from lightning_unlearn.partitioning.apply_recipe import (
    apply_recipe,
    hashes_of_inputs,
    memorized_fraction,
    share_predicted,
    validation_accuracy,
    weight_of_copies,
)
from lightning_unlearn.partitioning.build import CleanCriteria, build_partition, gate_messages
from lightning_unlearn.partitioning.by_key import review_by_key
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.partitioning.messages import (
    class_names_of,
    report_partition,
    report_round,
    say_absent,
    say_cost,
    say_late,
)
from lightning_unlearn.partitioning.probabilities import average_probabilities
from lightning_unlearn.partitioning.review import decided_of
from lightning_unlearn.partitioning.start import begin, remember_files
from lightning_unlearn.partitioning.state import AtFirst, PartitionState
from lightning_unlearn.partitioning.summary import Accuracies, summarize
from lightning_unlearn.partitioning.validation_set import ValidationJudge
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.results.finding import epochs_in_words
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review import AppliedReview
from lightning_unlearn.results.review_csv import Table
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.divergence import ADVICE, not_finite
from lightning_unlearn.trainer.early_stopping import go_on, has_fired
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.trainer.row_checks import establish_rows_again
from lightning_unlearn.trainer.validation import Score, score_validation

_ONE_EPOCH = "it was computed after a single epoch, before the network has learned much; train for two or more"


class Partitioning:
    """Collects evidence and computes the partition, once and in later rounds.

    Args:
        settings: object with the settings of ``AttributionPartitionCallback`` as attributes.
        collector: collects the evidence.

    Attributes:
        state: the results so far.
        table: contents of the file of decisions, before it was compared with the data; None without one.
        partners: the callbacks that act on the partition.
        epoch_seconds: duration of the last epoch; None if unknown or already logged.
    """

    def __init__(self, settings: Any, collector: EvidenceCollector) -> None:
        self.settings, self.collector = settings, collector
        self.reset()

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.state = PartitionState()
        self.table: Table | None = None
        self.partners: Sequence[Any] = ()
        self.has_said_cost = False
        self.epoch_seconds: float | None = None
        self.collector.reset()

    @property
    def may_be_recomputed(self) -> bool:
        """Whether other partitions are to follow."""
        return self.settings.every_n_epochs is not None and self.collector.trajectory is not None

    def is_due(self, epoch: int) -> bool:
        """Return whether a pass is due when ``epoch`` epochs are complete."""
        if self.state.partition is None:
            return self.collector.is_pass_due(epoch)
        # A checkpoint of a fit with one partition holds nothing to compute another one from.
        if not self.may_be_recomputed or not self.state.rounds:
            return False
        return epoch >= self.state.rounds[-1].epoch + (self.settings.every_n_epochs or 0)

    def decide(self, fit: FitContext) -> None:
        """Look whether the first partition is due, at the start of an epoch. Every rank must call it."""
        collector = self.collector
        if collector.point is not None and collector.trajectory is not None and fit.keyed is None:
            establish_rows_again(fit)
        if self.state.partition is None:
            is_settled = not (collector.reader.is_reading and collector.looks_early(fit.epoch + 1))
            is_stopped = has_fired(fit, fit.epoch - 1)
            collector.when.decide(fit.limits, is_settled=is_settled, is_stopped=is_stopped, reduce=fit.reduce)

    def begin(self, fit: FitContext) -> None:
        """Determine, before the first step, what only the loaders and a forward pass show. Every rank must call it."""
        callbacks = (self.settings, *self.partners)
        settings = {type(one).__name__: one.settings() for one in callbacks}
        begin(fit, self.settings, self.state, self.collector, self.table, settings)

    def gather(self, fit: FitContext) -> None:
        """Run a pass over the training set, and compute the partition if it is due. Every rank must call it."""
        collector, epoch, started = self.collector, fit.epoch, time.perf_counter()
        if collector.point is None and fit.keyed is None:
            self.begin(fit)
        if self.state.partition is None and collector.when.is_due(epoch) and collector.when.why:
            rank_zero_info(f"The partition is computed after {epochs_in_words(epoch)}: {collector.when.why}.")
        self._say_cost(fit)
        # A pass that failed, in a fit that goes on, is not counted besides this one.
        if collector.trajectory is not None:
            collector.trajectory.drop()
        if collector.is_before_the_first(epoch):
            share = self._observe_pass(fit)
            collector.merge(fit, epoch, len(share["label"]))
        else:
            validation = self._judged_validation(fit)
            self.compute(fit, started)
            self.state.validation = validation
            validation.report(fit)
        if epoch not in collector.epochs_seen:
            collector.epochs_seen.append(epoch)
        fit.log({"unlearn/seconds_pass": time.perf_counter() - started})

    def _say_cost(self, fit: FitContext) -> None:
        """Say before the first pass what bounds its time; other methods pass through the network many times."""
        is_bound = self.settings.recipe.attribution_method == GRADIENT_X_ACTIVATION and fit.keyed is None
        if self.epoch_seconds is not None and is_bound:
            say_cost(fit, self.epoch_seconds)
            self.has_said_cost, self.epoch_seconds = True, None

    def _observe_pass(self, fit: FitContext) -> dict[str, Tensor]:
        """Run a pass over this rank's shard of the training set; see :meth:`ScoringPass.run`."""
        share, absent = self.collector.pass_over(fit)
        if self.state.partition is None and self.collector.when.is_due(fit.epoch):
            say_absent(fit, len(absent), self.collector.by_index.total)
        return share

    def compute(self, fit: FitContext, started: float) -> None:
        """Compute and publish the partition.

        Args:
            fit: the running fit.
            started: start time of the pass, in seconds of ``time.perf_counter``.
        """
        collector, state, settings = self.collector, self.state, self.settings
        collector.check_steps(fit)
        collector.reader.detach()
        of_rank, share, keys = self._share_of_rank(fit)

        def with_unseen(evidence: Evidence) -> Evidence:
            if not collector.uses_out_of_sample:
                return evidence
            return collector.with_unseen(fit, evidence, validation_accuracy(fit))

        judged, label = apply_recipe(fit, share, collector.in_use, of_rank, settings.recipe, with_unseen)
        new = self._made(fit, judged, label, decided_of(state.review, judged, label))
        if keys:
            new = replace(new, keys=keys, fingerprint=fingerprint_of_keys(keys))
        if settings.keep_probabilities:
            state.probabilities = average_probabilities(judged[0], len(new), fit.reduce)
        if not keys and fit.hashes_inputs:
            fit.memory.inputs = hashes_of_inputs(share, judged[0], len(new), fit.reduce)
        is_new, seconds = state.partition is None, time.perf_counter() - started
        changed = self._publish(fit, judged, new)
        if is_new:
            collector.validation_watch.detach()
            if collector.when.is_stopped and self.acts(fit, new):
                go_on(fit)
            self.report(fit, judged, seconds)
        else:
            report_round(fit, new, changed, state.is_stable)

    def _share_of_rank(self, fit: FitContext) -> tuple[RankShare, dict[str, Tensor], tuple[Any, ...]]:
        """Return the samples that this rank judges, their evidence, and the keys of all samples."""
        if not isinstance(self.collector, KeyedCollector):
            return self.collector.share_of_rank(fit), self._observe_pass(fit), ()
        of_rank, share, keys = self.collector.share(fit)
        if self.table is not None:
            self.state.review = review_by_key(self.table, keys, fit.task_format)
        return of_rank, share, keys

    def _publish(self, fit: FitContext, judged: Sequence[ShardResult], new: Partition) -> float:
        """Publish a partition, and return the share of the samples that changed group."""
        state = self.state
        found = self._at_first(fit, judged, new) if state.is_first(new) else state.at_first
        # After all that may fail, and all at once.
        changed, is_taken = state.publish(new, found, self.settings.min_change)
        if is_taken:
            remember_files(fit, new)
            state.sample_weight = weight_of_copies(judged, len(new))
        self.collector.close(forever=self.settings.every_n_epochs is None or state.is_stable)
        return changed

    def _at_first(self, fit: FitContext, judged: Sequence[ShardResult], new: Partition) -> AtFirst:
        """Return measurements of the network at the first partition that is acted on."""
        memorized, known = memorized_fraction(judged, new, fit.reduce), self.state.at_first
        gap, accuracy, best = known.accuracy_gap, known.accuracy, known.best_accuracy
        if new.is_actionable and fit.partners:
            given = validation_accuracy(fit)
            gap = None if given is None else share_predicted(judged, fit.reduce) - given
        if self.acts(fit, new):
            score, best = self.validate(fit, "before"), self.collector.when.best_accuracy
            accuracy = None if score is None else score.accuracy
        return AtFirst(memorized, accuracy, gap, best)

    def _made(
        self,
        fit: FitContext,
        judged: Sequence[ShardResult],
        label: Tensor,
        decided: AppliedReview | None = None,
        validation: str | None = None,
    ) -> Partition:
        """Return the partition of the training set, or of the validation set with this fingerprint."""
        recipe, when = self.settings.recipe, self.collector.when
        new = build_partition(
            judged,
            label,
            # Of validation samples none are to be kept for training.
            CleanCriteria(self.settings.suspect_precision, recipe.min_class_fraction if validation is None else 0),
            fit.reduce,
            recipe=recipe.name,
            layer=self.collector.layer,
            epoch=fit.epoch,
            fingerprint=self.state.fingerprint if validation is None else validation,
            relabel_threshold=max((getattr(one, "relabel_threshold", 0.0) for one in self.partners), default=0.0)
            or None,
            decided=decided,
        )
        new = replace(new, class_names=tuple(class_names_of(fit, fit.task_format.num_classes)))
        is_early = self.state.partition is None and new.epoch == 1 and bool(when.why)
        if is_early and new.status is PartitionStatus.OK:
            return replace(new, status=PartitionStatus.TOO_EARLY, warning=_ONE_EPOCH)
        return new

    def _judged_validation(self, fit: FitContext) -> ValidationJudge:
        judge = ValidationJudge()
        if not self.settings.judge_validation:
            return judge

        def make(judged: Sequence[ShardResult], label: Tensor, fingerprint: str) -> Partition:
            return self._made(fit, judged, label, validation=fingerprint)

        judge.compute(self.collector.evidence_pass(fit, is_last=True), self.settings.recipe, make)
        return judge

    def acts(self, fit: FitContext, partition: Partition) -> bool:
        """Return whether another callback is to act on the partition."""
        acts = partition.is_actionable and not (self.settings.dry_run or self.state.is_late)
        return acts and bool(fit.partners)

    def validate(self, fit: FitContext, when: str) -> Score | None:
        """Score the validation data, log the result and return it; None without any. Every rank must call it."""
        score = score_validation(fit)
        if score is not None:
            fit.log({f"unlearn/val_accuracy_{when}": score.accuracy})
        return score

    def report(self, fit: FitContext, judged: Sequence[ShardResult], seconds: float) -> None:
        """Say what the first partition found."""
        partition, review = self.state.partition, self.state.review
        if partition is None:
            return
        seen = epochs_in_words(len(self.collector.epochs_seen))
        notes = [*([] if review is None else [review.counts()]), *gate_messages(judged, partition)]
        evidence = f"evidence of {seen}" + ("" if fit.keyed is not None else f" and a pass of {seconds:.1f} s")
        report_partition(fit, partition, evidence, notes)

    def decide_at_the_end(self, fit: FitContext) -> None:
        """Compute the partition of a fit that ends before it is due, or with the epoch after which it is."""
        epoch, when, self.state.is_late = fit.epoch, self.collector.when, True
        is_early = not when.is_due(epoch)
        due = str(when) if is_early and not (when.is_open and when.may_be_last) else ""
        say_late(epoch, due, acts=bool(self.partners) and not self.settings.dry_run)
        if is_early:
            when.decide_now(epoch, "training has ended")

    def summarize(self, fit: FitContext, partition: Partition) -> None:
        """Log the summary of a fit that has ended. Every rank must call it."""
        state, diverged, samples = self.state, not_finite(fit), None
        if diverged:
            rank_zero_warn(f"Training has diverged since the partition: {diverged} are NaN or infinite; {ADVICE}.")
        elif self.acts(fit, partition) and state.accuracy_before is not None:
            score = self.validate(fit, "after")
            state.accuracy_after, samples = (None, None) if score is None else (score.accuracy, score.samples)
        done = [callback.summary_clause() for callback in fit.partners]
        state.summary = summarize(
            partition,
            memorized=state.memorized,
            done=tuple(clause for clause in done if clause),
            accuracy=Accuracies(state.accuracy_before, state.accuracy_after, state.best_accuracy_before, samples),
            dry_run=self.settings.dry_run,
            diverged=diverged,
            validation=state.validation.said,
        )
        rank_zero_info(state.summary.advice)
