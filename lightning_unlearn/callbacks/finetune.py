"""When to swap the training data, and what is trained from then on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.callbacks.base import PartitionConsumer
from lightning_unlearn.finetuning import freezing, messages, optimizers
from lightning_unlearn.finetuning.run import FinetuneSettings, Finetuning
from lightning_unlearn.finetuning.training_subset import OnNoisy, TrainingSubset
from lightning_unlearn.finetuning.warm_start import WarmStart
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.utilities.checks import check_choice, check_number
from lightning_unlearn.utilities.sharding import reshard


class CleanSubsetFinetuneCallback(PartitionConsumer):
    """Trains on the clean subset once the partition is computed (RLAP, step 5).

    The loader stays the user's own (class, workers, collate function, transforms). Only the indices it draws from
    change, not how it draws them: a WeightedRandomSampler keeps the weights of the remaining samples (times their
    probability with ``on_noisy="reweight"``), and an epoch has fewer draws in proportion to the weight removed. If
    Lightning does not split samplers over the ranks, a sampler with replacement draws all of its samples on every
    rank, as before. Lightning recomputes the number of batches, the validation interval and the progress bar's total.
    After the fit, or an exception, loader, ``requires_grad`` and modes are restored. If the partition is recomputed in
    later rounds, the subset follows.

    Args:
        mode: ``"full"`` trains all layers (the paper's F-FT), ``"layers"`` only some (L-FT); the others are frozen,
            including their batch norm statistics.
        layers: with ``mode="layers"``: dotted paths of the modules to train; by default the layer that the
            SensitivityPruneCallback prunes and those that ``forward`` calls after it.
        warm_start: the weights that fine-tuning starts from. ``"keep"``: the current weights. ``"shrink"``: memorized
            labels are stored in all of the weights, so trained weights are moved back towards their values at the start
            of the fit; a tenth of the change is kept. ``"start"``: the weights at the start of the fit. ``"auto"``:
            ``"shrink"`` if the network predicts at least half of the suspect labels, or .1 more of the training labels
            than of the validation labels, else ``"keep"``. Only parameters that are trained from then on are moved;
            pruned neurons stay at zero, averages of the weights follow, and running statistics of norms are reset to
            those of the start. Except with ``"keep"``, a copy of all trained parameters is kept on the CPU and in
            checkpoints until fine-tuning starts.
        on_noisy: treatment of samples that are not clean, or whose label is doubtful
            (:class:`~lightning_unlearn.Partition`). ``"drop"`` excludes them. ``"reweight"`` draws every sample with
            its probability of being clean. ``"relabel"`` also trains on samples with a wrong label, under the suggested
            label if it is probable enough; the label is replaced in the batch, and the dataset is not changed.
        lr: constant learning rate of a fresh optimizer, created by ``configure_optimizers`` (or ``optimizer``) without
            its schedulers. If None, the current optimizer and its schedule continue; if weights are moved
            (``warm_start``), ``configure_optimizers`` runs again, and the learning rate follows a cosine from the
            highest rate of the fit so far to zero at its end.
        optimizer: a function from the trainable parameters to the optimizer, in YAML as ``class_path`` and
            ``init_args``; or ``"restart"``: run the module's ``configure_optimizers`` again, so that its schedule
            restarts, planned for the remaining epochs and batches. With frozen layers, resuming from a checkpoint
            requires this callback, since there is less optimizer state. The weights load anywhere.
        lr_scheduler: function from the optimizer to its scheduler, stepped once per epoch.

    Raises:
        ValueError: for invalid arguments, here; for an unknown layer when the fit is set up.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.
        TypeError: for a train loader whose sampler a subset would silently replace, when training starts.
    """

    state_version = 2

    relabel_threshold = 0.7
    """Minimum probability of a suggested label with which ``on_noisy="relabel"`` trains, in (0, 1]."""

    def __init__(
        self,
        mode: Literal["full", "layers"] = "full",
        *,
        warm_start: WarmStart = "auto",
        layers: list[str] | None = None,
        on_noisy: OnNoisy = "drop",
        lr: float | None = None,
        optimizer: optimizers.MakeOptimizer | Literal["restart"] | None = None,
        lr_scheduler: optimizers.MakeScheduler | None = None,
    ) -> None:
        self.mode = check_choice("mode", mode, ("full", "layers"))
        self.warm_start: WarmStart = check_choice("warm_start", warm_start, get_args(WarmStart))
        self.layers = freezing.check_layer_names(self.mode, layers)
        self.on_noisy: OnNoisy = check_choice("on_noisy", on_noisy, get_args(OnNoisy))
        self.lr = None if lr is None else check_number("lr", lr, above=0)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        settings = FinetuneSettings(self.mode, self.layers, self.warm_start, self.on_noisy, self.lr)
        self._finetuning = Finetuning(settings, optimizers.FreshOptimizer(self.lr, optimizer, lr_scheduler))
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        self._finetuning.reset()
        self._epoch_started: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether training draws from the clean subset."""
        return self._finetuning.is_active

    @property
    def training_subset(self) -> TrainingSubset:
        """Which samples are trained on, how often, and under which labels.

        Raises:
            RuntimeError: before there is one, saying when there will be, or if the partition was not acted on.
        """
        state = self._finetuning.state
        if state.training_subset is None:
            if state.partition_epoch:
                raise RuntimeError(
                    "No training subset: the partition was not applied, and training continues on all data."
                )
            when = self.when_computed()
            raise RuntimeError(f"No training subset yet: it is created {when}.")
        return state.training_subset

    @property
    def first_epoch(self) -> int | None:
        """The first epoch, counted from 0, on the clean subset; None before it is known."""
        return self._finetuning.state.first_epoch if self.is_active else None

    @override
    def summary_clause(self) -> str:
        """Return what was done, in one clause; empty where nothing was."""
        return messages.done(self._finetuning.state, self.mode)

    @override
    def provenance_entry(self, partition: Partition) -> dict[str, Any]:
        return self._finetuning.state.record(partition, self._finetuning.loader.seed)

    @override
    def validate_setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().validate_setup(trainer, pl_module)
        self.relabel_threshold = check_number("relabel_threshold", self.relabel_threshold, above=0, most=1)
        self._finetuning.check(self.fit, self.relabel_threshold)

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        self._finetuning.check_layers(pl_module)

    @override
    def validate_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finetuning.begin(self.fit)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._finetuning.start_batch(self.fit, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._finetuning.before_backward(self.fit, loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._finetuning.after_backward(self.fit)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finetuning.end_batch(self.fit, outputs)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._finetuning.frozen.drop_gradients()
        self._finetuning.fresh.check_used(self.fit, optimizer)

    @override
    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finetuning = self._finetuning
        finetuning.check_data(self.fit)
        partition = self.source.get_partition(trainer, pl_module)
        if finetuning.is_new(partition):
            if finetuning.masks is not None:
                finetuning.masks.get_mask(trainer, pl_module)
            with self.timed():
                finetuning.act(self.fit)
        finetuning.hold(self.fit)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finetuning.end_epoch(self.fit)
        # A fit that is resumed within an epoch has not seen its start.
        if self._epoch_started is not None:
            self._finetuning.seconds_per_epoch = time.perf_counter() - self._epoch_started

    @override
    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_active:
            self.refuse_dry_run()
            self._finetuning.resume(self.fit)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._finetuning.fresh.load_groups(checkpoint.get("optimizer_states", ()))

    @override
    def restore_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finetuning.undo(self.fit)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state: 8 bytes per clean sample, 12 per sample to reweight, 16 to re-label.

        Before fine-tuning starts, the trained parameters as the fit began with them, but with ``warm_start="keep"``.
        """
        own = {"version": self.state_version, "was_dry_run": self._is_dry_run}
        if self._fit is not None:
            # A validation may have left weights whole.
            reshard(self._fit.pl_module)
        return own | self._finetuning.state_dict(self._fit)

    @property
    @override
    def has_result(self) -> bool:
        return self.is_active

    @override
    def load_fields(self, state: dict[str, Any]) -> None:
        self._finetuning.load_state_dict(state)
        if state["was_dry_run"] and not self._is_dry_run:
            # What a dry run has only spoken of is still to be done in a fit that acts.
            self._finetuning.state = replace(self._finetuning.state, partition_epoch=0)
