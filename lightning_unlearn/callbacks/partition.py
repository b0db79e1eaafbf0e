"""The callback that collects evidence and computes the partition."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_unlearn.attribution import check_method, resolve_layer
from lightning_unlearn.callbacks.base import UnlearnCallback
from lightning_unlearn.data.batch import shown_path
from lightning_unlearn.data.data_format import DataFormat, make_data_format
from lightning_unlearn.data.sample_key import KeyReader
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.collector import EvidenceCollector
from lightning_unlearn.evidence.keyed_collector import KeyedCollector
from lightning_unlearn.evidence.when import PartitionTime
from lightning_unlearn.partitioning.by_key import check_fit_by_key, refuse_by_key
from lightning_unlearn.partitioning.review import open_review
from lightning_unlearn.partitioning.run import Partitioning
from lightning_unlearn.partitioning.state import PartitionState, PublishedPartition
from lightning_unlearn.partitioning.validation_set import check_validates
from lightning_unlearn.recipes import Recipe, get_recipe
from lightning_unlearn.recipes.registry import is_builtin, settings_of_recipe
from lightning_unlearn.recipes.users import checking
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied, settings_of
from lightning_unlearn.trainer.callback_order import callbacks_of, move_behind_averages
from lightning_unlearn.trainer.early_stopping import EarlyEnd
from lightning_unlearn.trainer.fit_loop import is_fast_dev_run
from lightning_unlearn.trainer.keyed_batches import KeyedBatches
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.protocols import PartitionSource
from lightning_unlearn.trainer.strategies import shards_weights
from lightning_unlearn.utilities.checks import check_flag, check_number, check_path, check_text, check_whole

_PATH = "the dotted path of a layer, or None"


class AttributionPartitionCallback(PublishedPartition, UnlearnCallback):
    """Estimates for every training sample the probability that it is clean (RLAP, steps 2 and 3).

    It collects evidence during training, before wrong labels are memorized, from the outputs of the training steps and
    at no extra cost (at the head's input, the sum of gradient x activation of a class's logit equals that logit minus
    the bias). If a row's output does not belong to one sample and its label (MixUp, CutMix, two views, several forward
    calls in a step), it logs this and runs an evaluation pass over the training set after every epoch instead.

    After ``at_epoch`` epochs on all the data it runs one such pass: in index order, in eval mode, sharded over the
    ranks, with the DataModule's transforms and transfer hooks. The pass attributes the margin of the given label at a
    layer. Nothing is changed: until another callback acts on the partition, the weights equal those of a fit without
    this callback, bit for bit.

    With random augmentation the pass scores augmented samples, which is logged once. To score the originals, give the
    DataModule (or LightningModule) a method ``attribution_dataloader()`` that returns a loader of the same samples, in
    the same order, without augmentation.

    With ``every_n_epochs`` the partition is recomputed as the model gets cleaner, from the evidence before the first
    partition and a new pass, until hardly any sample changes group.

    When the fit ends, :attr:`summary` holds what was found, what was done and whether it helped.

    Args:
        layer: dotted path of the layer whose output is attributed; by default the input of the last Linear with an
            output per class that ``forward`` calls.
        at_epoch: when the partition is computed, and training on the clean subset can begin. ``"auto"``: once the
            evidence has peaked, that is when the ranking of the samples hardly changes any more, training accuracy
            exceeds validation accuracy, or validation gets worse; not before epoch 2, and no later than two thirds of
            what the Trainer allows (epochs, steps, time) if another callback acts on it, else at the end of
            training. A whole number: after that many epochs (``max_epochs`` only if no other callback is to act). A
            float in (0, 1): after that share of ``max_epochs``. If EarlyStopping would end training earlier, the
            partition is computed then and training continues on what it keeps; if the fit ends earlier, at its end.
        every_n_epochs: recompute the partition every N epochs after the first; None computes it once.
        recipe: ``"auto"``: wrong labels and corrupted inputs, each only with evidence of noise; ``"label"`` or
            ``"input"``: one of the two; ``"rlap"``: the paper's, which ignores the given label; ``"loss"``, ``"aum"``,
            ``"argmax"``: baselines; or the dotted path of a function from evidence to p(clean), or that function.
            :func:`~lightning_unlearn.recipes.get_recipe` changes the settings of a recipe.
        suspect_precision: suspects are the longest list of which at least this share is expected to be wrong: higher
            for fewer and more certain ones. In [.5, 1). A sample with a probability below .3 of being wrong is never
            suspect. With a recipe that does not estimate how many labels are wrong (your own function, ``"loss"``,
            ``"aum"``, ``"argmax"``, ``"rlap"``, ``"input"``), suspects are the samples with p(clean) below .5.
        dry_run: compute the partition, but change nothing; the log reports what would be pruned and fine-tuned, and at
            what cost.
        review: a table of :meth:`Partition.to_csv <lightning_unlearn.Partition.to_csv>` in which a person has
            filled ``decision`` (and corrected ``suggested_label``). The decisions override the recipe. ``keep``:
            clean; ``drop``: never trained on, whatever ``min_class_fraction``; ``relabel``: trained on under the
            suggested label with ``CleanSubsetFinetuneCallback(on_noisy="relabel")``, else dropped. Rank 0 reads the
            table when the fit is set up; checkpoints keep it.
        judge_validation: judge the samples of the validation loader too, in one pass beside that of training
            (``validation_partition``). Nothing acts on it, but wrong labels there count in the accuracy.
        keep_probabilities: keep the class probabilities of the training steps, averaged over the epochs
            (``probabilities``), for tools such as cleanlab: 4 C bytes per sample, at most 129 classes.
        data: how batches, outputs and labels are read, a :class:`~lightning_unlearn.DataFormat` or a dict of its
            fields; inferred by default.

    Raises:
        ValueError: for arguments out of range, here; for an unknown layer or an invalid ``review``, when the fit is set
            up; for a layer that is not reached, labels out of range, or a ``review`` of other data, when training
            starts.
        TypeError: for a dataset without index or length, or a batch that is not ``(x, y)``, when training starts.
        MisconfigurationException: if ``at_epoch`` is not before the Trainer's ``max_epochs``, or a share of none, or
            for a strategy that is not supported, when the fit is set up.

    Example:
        >>> AttributionPartitionCallback(at_epoch=20).partition
        Traceback (most recent call last):
        RuntimeError: No partition yet: it is computed when 20 epochs are complete.
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
        self.task_format = TaskFormat(self.data)
        self.judge_validation = check_flag("judge_validation", judge_validation)
        self.keep_probabilities = check_flag("keep_probabilities", keep_probabilities)
        key = self.data.sample_key
        self.keyed = None if key is None else KeyedBatches(KeyReader(key))
        self.collector = (
            EvidenceCollector(self.task_format) if self.keyed is None else KeyedCollector(self.task_format, self.keyed)
        )
        self.recipe = recipe
        if self.keyed is not None:
            refuse_by_key(self)
        self.at_epoch = at_epoch
        self._end = EarlyEnd()
        self._partitioning = Partitioning(self, self.collector)
        self.reset()

    @override
    def reset(self) -> None:
        self._partitioning.reset()
        self._has_begun = False
        self._recorded = None
        # When the epoch started, to tell what a pass will cost.
        self._epoch_started: float | None = None

    @property
    @override
    def state(self) -> PartitionState:
        return self._partitioning.state

    @property
    @override
    def _partners(self) -> Sequence[Any]:
        return self._partitioning.partners

    @property
    def at_epoch(self) -> int | float | str:
        """When the partition is computed, as asked for; see the class."""
        return self._when.asked

    @at_epoch.setter
    def at_epoch(self, value: Any) -> None:
        self.collector.when = PartitionTime(value)

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
    def _when(self) -> PartitionTime:
        return self.collector.when

    @override
    def _when_computed(self) -> str:
        return str(self._when)

    @override
    def settings(self) -> dict[str, Any]:
        return settings_of(self, recipe=self.recipe.name, data=vars(self.data)) | settings_of_recipe(self.recipe)

    @property
    def uses_soft_targets(self) -> bool:
        """Whether neurons are regressed on the probability, not (as the paper does) on the two clusters."""
        return self.recipe.soft_targets

    def gathers_evidence(self, epoch: int) -> bool:
        """Return whether a pass is due when ``epoch`` epochs are complete."""
        return self._partitioning.is_due(epoch)

    @override
    def find_source(self, trainer: Trainer) -> PartitionSource:
        return self

    @override
    def validate_setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        move_behind_averages(self.fit, self)
        self._partitioning.partners = self.fit.partners
        self._when.plan(self.fit.limits, may_be_last=self.every_n_epochs is None and not self._partners)
        self._partitioning.table = open_review(self.fit, self.review)
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
    def validate_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._partitioning.begin(self.fit)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if not self._partitioning.has_said_cost:
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
                callback.validate_data(trainer, pl_module)

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
        """Take the labels from where the loss takes them, once the first steps have shown where that is."""
        path = self.collector.label_field(self.fit, trained=trained)
        if path is None:
            return
        self.state.task = ""
        rank_zero_info(f"Labels are read from {shown_path(path)}, the field that the loss uses.")
        self._begin_all(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epoch_started is not None and not self._partitioning.has_said_cost:
            self._partitioning.epoch_seconds = time.perf_counter() - self._epoch_started
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
    def restore_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.collector.detach()
        self._end.release(trainer)

    @override
    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.get_partition(trainer, pl_module)

    def get_partition(self, trainer: Trainer, pl_module: LightningModule) -> Partition | None:
        """Return the partition, computed now if it is due, or None if it is not due yet."""
        if self._fit is None:
            return self.state.partition
        self._partitioning.decide(self.fit)
        if self.gathers_evidence(trainer.current_epoch):
            with self.timed():
                self._partitioning.gather(self.fit)
        return self.state.partition

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end.release(trainer)
        if self.state.partition is None and not is_fast_dev_run(trainer) and trainer.current_epoch >= 1:
            self._partitioning.decide_at_the_end(self.fit)
            self.act_if_due(trainer, pl_module)
        if self.state.partition is None:
            return
        for callback in self.fit.partners:
            callback.confirm(trainer, pl_module)
        self._partitioning.summarize(self.fit, self.state.partition)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.conclude(trainer, pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the summary of a fit that resumes from its last checkpoint and has no step left.

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
                self.validate_data(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        finally:
            self.collector.reader.detach()
            pl_module.to(device)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives.

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
    def has_result(self) -> bool:
        return self.state.partition is not None

    @override
    def load_fields(self, state: dict[str, Any]) -> None:
        self._partitioning.state = PartitionState.from_state_dict(state)
        self.collector.load_state_dict(state, is_closed=self.has_result, is_fit=self._fitting)
        # In a fit there is more to come; elsewhere those that acted are not here.
        self._recorded = None if self._fitting else copied(state["provenance"])
