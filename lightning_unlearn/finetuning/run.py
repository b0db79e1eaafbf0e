"""Step 5 from beginning to end: the subset, the starting weights, the layers and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import plain_name, resolve_layer
from lightning_unlearn.finetuning import messages
from lightning_unlearn.finetuning.by_key import KeyedSubset
from lightning_unlearn.finetuning.freezing import FrozenLayers
from lightning_unlearn.finetuning.optimizer_checks import check_steps_left
from lightning_unlearn.finetuning.optimizers import FreshOptimizer
from lightning_unlearn.finetuning.starting import Starting
from lightning_unlearn.finetuning.state import FinetuneState
from lightning_unlearn.finetuning.subset_data import SubsetData
from lightning_unlearn.finetuning.train_data import SubsetLoader
from lightning_unlearn.finetuning.training_subset import OnNoisy, TrainingSubset, make_training_subset
from lightning_unlearn.finetuning.warm_start import WarmStart
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.data_checks import check_reloaded
from lightning_unlearn.trainer.divergence import ADVICE, LossWatch, not_finite
from lightning_unlearn.trainer.incompatible import refuse_beside_finetuning
from lightning_unlearn.trainer.optimizers import keep_optimizers
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.trainer.protocols import MaskSource

_WHO = "CleanSubsetFinetuneCallback"


@dataclass(frozen=True, eq=False)
class FinetuneSettings:
    """Settings of fine-tuning; see ``CleanSubsetFinetuneCallback``.

    Args:
        mode: ``"full"`` or ``"layers"``.
        layers: layers to train; None for the pruned layer and those after it.
        warm_start: the weights that it starts from.
        on_noisy: treatment of samples that are not clean.
        lr: constant learning rate; None for none.
    """

    mode: str
    layers: Sequence[str] | None
    warm_start: WarmStart
    on_noisy: OnNoisy
    lr: float | None


class Finetuning:
    """Fine-tunes on the subset that a partition selects.

    Args:
        settings: the settings.
        fresh: creates a fresh optimizer, if needed.

    Attributes:
        state: the current state, which checkpoints store.
        masks: keeps pruned neurons at zero; None without pruning.
        partition: the current partition; None before the first one of this fit.
        seconds_per_epoch: duration of the last epoch; None before the first is complete.
    """

    def __init__(self, settings: FinetuneSettings, fresh: FreshOptimizer) -> None:
        self.settings, self.fresh = settings, fresh
        self.loader: SubsetData = SubsetLoader()
        self.frozen = FrozenLayers()
        self._threshold = 0.0
        self._losses = LossWatch()
        self.reset()

    def reset(self) -> None:
        """Discard the state of an earlier fit."""
        self.state = FinetuneState()
        self.partition: Partition | None = None
        self.seconds_per_epoch: float | None = None
        self.starting = Starting(self.settings.warm_start)
        self.masks: MaskSource | None = None
        self._data: Any = None
        self.fresh.reset()
        self.loader.reset()
        self.frozen.forget()

    @property
    def is_active(self) -> bool:
        """Whether training draws from a subset."""
        return self.state.training_subset is not None

    def may_start_later(self, fit: FitContext) -> bool:
        """Return whether fine-tuning has not started, and may start with a later partition."""
        has_rounds = getattr(fit.source, "every_n_epochs", None) is not None
        return not (self.is_active or fit.source.dry_run) and (has_rounds or self.state.partition_epoch == 0)

    def check(self, fit: FitContext, relabel_threshold: float) -> None:
        """Refuse invalid combinations of settings when the fit is set up.

        Args:
            fit: the fit that is set up.
            relabel_threshold: minimum probability of a suggested label that is used.

        Raises:
            MisconfigurationException: for an invalid combination.
        """
        one, moves = self.settings, self.starting.is_asked_for
        if (keyed := fit.keyed) is not None or self.loader.is_by_key:
            self.loader = SubsetLoader() if keyed is None else KeyedSubset(keyed)
        self._threshold, given = relabel_threshold, self.fresh.given()
        given |= {"mode='layers'": one.mode == "layers", f"warm_start='{one.warm_start}'": moves}
        refuse_beside_finetuning(fit, _WHO, **given)
        self.masks = next((callback for callback in fit.callbacks if isinstance(callback, MaskSource)), None)
        self.fresh.check()
        if one.mode == "layers" and one.layers is None and self.masks is None:
            raise MisconfigurationException(
                f"{_WHO}(mode='layers') needs the layers to train: set layers=[...], or add a"
                " SensitivityPruneCallback, whose layer and those after it are trained."
            )

    def check_layers(self, model: nn.Module) -> None:
        """Refuse unknown layers, and layers without parameters."""
        for name in self.settings.layers or ():
            if not any(True for _ in resolve_layer(model, name).parameters()):
                raise ValueError(f"Expected layers to name modules with parameters, but '{name}' has none.")

    def begin(self, fit: FitContext) -> None:
        """Run the checks that need the loaders and a forward pass, before the first step."""
        relabels = self.settings.on_noisy == "relabel"
        if not self.is_active:
            self.loader.begin(fit)
        # Also where the checkpoint re-labels and on_noisy is another now.
        goes_on = self.state.training_subset is not None and self.state.training_subset.new_label is not None
        if relabels or goes_on:
            # First, as the callback that publishes the partition may come later in the list and has inferred nothing.
            trace, _ = fit.probe()
            head = trace.logits_module(fit.task_format.num_outputs)
            self.loader.prepare_relabeling(fit, head, is_new=not goes_on)
        if self.may_start_later(fit):
            self.starting.check_is_known(fit)
        if self.is_active and self.loader.at_once(fit) != self.loader.planned_size:
            check_steps_left(fit, fit.limits.remaining_epochs, self.loader.planned_size)
            self.loader.plan(fit)
        self.fresh.check_one(fit)

    def start_batch(self, fit: FitContext, batch_idx: int) -> None:
        """Call in ``on_train_batch_start``."""
        self.loader.relabeling.start_batch(fit.model)
        if not self.is_active and self.starting.may_move:
            self.starting.remember(fit, batch_idx, is_wanted=self.may_start_later(fit))
            self.fresh.see(fit.optimizers)

    def before_backward(self, fit: FitContext, loss: Tensor) -> None:
        """Call before the backward pass of a step."""
        self.loader.before_backward(loss)
        if fit.step == 0 and not self.is_active and self.starting.may_move:
            # What only training_step calls may be made lazily by its first forward pass.
            self.starting.remember(fit, 0, is_wanted=self.may_start_later(fit))

    def after_backward(self, fit: FitContext) -> None:
        """Call after the backward pass of a step."""
        self.loader.relabeling.end_batch(fit.reduce)

    def end_batch(self, fit: FitContext, outputs: Any) -> None:
        """Call in ``on_train_batch_end``."""
        self.loader.relabeling.end_batch(fit.reduce)
        if self.is_active:
            self._losses.add(outputs)

    def check_data(self, fit: FitContext) -> None:
        """Refuse a reloaded train loader whose samples differ from those of the partition."""
        # Not where the loader is made: an error there leaves torch's DataLoader as Lightning has changed it meanwhile.
        if self._data is None or self.partition is None:
            return
        loader = fit.train_loader
        if self._data is not loader.dataset:
            check_reloaded(fit, loader, self.partition)

    def is_new(self, partition: Partition | None) -> bool:
        """Set the partition, and return whether it is new."""
        self.partition = partition
        return partition is not None and partition.epoch > self.state.partition_epoch

    def act(self, fit: FitContext) -> None:
        """Start or update fine-tuning for the partition; in a dry run, log what would be done."""
        partition = self._known_partition()
        if fit.source.dry_run:
            self._report_dry_run(fit, partition)
        elif partition.is_actionable:
            subset = make_training_subset(partition, self._what_of_noisy(fit, partition), self._threshold)
            (self._renew if self.is_active else self._start)(fit, subset)
        self.state = replace(self.state, partition_epoch=partition.epoch)
        if not self.may_start_later(fit):
            self.starting.forget()

    def hold(self, fit: FitContext) -> None:
        """Call when an epoch starts, after acting on a partition."""
        if self.is_active:
            self._data = self.loader.dataset(fit)
        self.frozen.hold_modes()

    def _what_of_noisy(self, fit: FitContext, partition: Partition) -> OnNoisy:
        """Return ``on_noisy``, or ``"drop"`` if new labels could be assigned to other samples."""
        if self.settings.on_noisy != "relabel":
            return self.settings.on_noisy
        fault = self.loader.relabeling_fault(fit, partition)
        # A data set that draws at random may show each rank another batch.
        if not fit.agree(bool(fault), of_all=False):
            return "relabel"
        fault = fault or "Another rank has batches in which labels cannot be replaced."
        rank_zero_warn(f"Suspects are dropped instead of re-labeled. {fault}")
        return "drop"

    def end_epoch(self, fit: FitContext) -> None:
        """Call in ``on_train_epoch_end``; every rank must."""
        if self.is_active:
            self._check_diverged(fit)
            self.loader.end_epoch(fit)

    def _check_diverged(self, fit: FitContext) -> None:
        """End a fit whose weights are NaN or infinite, before a ModelCheckpoint stores them."""
        was_finite, fault = self._losses.was_finite(fit), not_finite(fit)
        when = f"in epoch {fit.epoch}, trained on the clean subset since epoch {self.state.first_epoch}"
        if fault:
            rate = "" if self.settings.lr is None else f" than lr={self.settings.lr}"
            raise ValueError(
                f"Training has diverged {when}: {fault} are NaN or infinite;"
                f" {ADVICE.replace('smaller learning rate', f'smaller learning rate{rate}')}."
            )
        if not was_finite:
            rank_zero_warn(f"The loss was NaN or infinite {when}; if that goes on, {ADVICE}.")

    def resume(self, fit: FitContext) -> None:
        """Resume fine-tuning from a checkpoint."""
        self.fresh.check_goes_on()
        self.loader.detach(fit)
        self.attach(fit)
        self.frozen.freeze(fit)
        self.fresh.make_again(fit)
        self.loader.ask_again(fit)

    def undo(self, fit: FitContext) -> None:
        """Restore what was changed for the fit."""
        self.loader.detach(fit)
        self.frozen.thaw()
        self._data = None

    def _start(self, fit: FitContext, subset: TrainingSubset) -> None:
        if not self._fills_batches(fit, subset):
            return
        if self.settings.mode == "layers":
            self._choose_frozen(fit)
        before, start, moved = fit.batches_per_epoch, self.starting.choose(fit), 0
        with self._all_or_nothing(fit) as undoing:
            self.state = replace(self.state, training_subset=subset, first_epoch=fit.epoch)
            self.attach(fit)
            # Before limit_train_batches, which is applied to what a loader has whenever it is loaded again.
            self.loader.plan(fit)
            self.fresh.begin(fit, moves=start.moves)
            self.frozen.freeze(fit)
            remade = self.fresh.make(fit)
            if start.moves:
                moved = self.starting.move(fit, start.how, self.frozen.names, self.masks, undoing)
                self.state = replace(self.state, started_from=start.how)
        self.starting.say(fit, start, moved, self._known_partition().expected_precision)
        if remade:
            rank_zero_info(remade)
        self._say_started(fit, subset, before)

    def _say_started(self, fit: FitContext, subset: TrainingSubset, before: int | float) -> None:
        frozen, named = set(self.frozen.parameters), fit.model.named_parameters()
        trained = sum(p.numel() for n, p in named if p.requires_grad and plain_name(n) not in frozen)
        left = messages.left_out(self._known_partition(), subset)
        rank_zero_info(messages.started(subset, left, fit.epoch, (before, fit.batches_per_epoch), trained))

    @contextmanager
    def _all_or_nothing(self, fit: FitContext) -> Iterator[list[Callable[[], None]]]:
        """Undo every change if creating a user's optimizer or loader fails, as if fine-tuning had not started.

        A checkpoint written on this exception then matches its optimizer.

        Yields:
            a list of further functions to call in that case.
        """
        undoing: list[Callable[[], None]] = []
        put_back = keep_optimizers(fit)
        # A loader that is iterated anew has drawn from it.
        random_state = torch.get_rng_state()
        try:
            yield undoing
        except BaseException:
            for function in undoing:
                function()
            self.undo(fit)
            put_back()
            torch.set_rng_state(random_state)
            self.state = FinetuneState(self.state.partition_epoch)
            self.loader.forget_plan()
            self.fresh.forget()
            self.frozen.forget()
            raise

    def _renew(self, fit: FitContext, subset: TrainingSubset) -> None:
        """Follow a recomputed partition."""
        if not self._fills_batches(fit, subset):
            return
        self.loader.detach(fit)
        self.state = replace(self.state, training_subset=subset)
        self.attach(fit)
        rank_zero_info(messages.renewed(subset, fit.epoch, fit.batches_per_epoch))

    def _report_dry_run(self, fit: FitContext, partition: Partition) -> None:
        if not partition.is_actionable:
            return
        subset = make_training_subset(partition, self.settings.on_noisy, self._threshold)
        batches = fit.batches_per_epoch, self.loader.batches_with(fit, subset)
        start = self.starting.choose(fit, is_dry_run=True)
        rank_zero_info(messages.of_dry_run(subset, fit.limits.remaining_epochs, batches, self.seconds_per_epoch))
        rank_zero_info(f"Dry run: {messages.start_of(start)}")

    def _fills_batches(self, fit: FitContext, subset: TrainingSubset) -> bool:
        fault = self.loader.fault_of(fit, subset, keeps_plan=self.fresh.keeps_plan(fit))
        if fault:
            rank_zero_warn(
                f"The {len(subset.index)} samples to train on {fault}. Training continues on the current data."
            )
        return not fault

    def attach(self, fit: FitContext) -> None:
        """Make the loader draw from the subset, and replace labels."""
        if self.state.training_subset is not None:
            keeps_plan = partial(self.fresh.keeps_plan, fit)
            self.loader.follow(fit, self.state.training_subset, self._known_partition, keeps_plan)

    def _known_partition(self) -> Partition:
        if self.partition is None:
            raise RuntimeError("There is no partition to go by; this is an error in lightning_unlearn.")
        return self.partition

    def _choose_frozen(self, fit: FitContext) -> None:
        if self.settings.layers is not None:
            self.frozen.choose_outside(fit.model, self.settings.layers)
            return
        if self.masks is None:
            raise RuntimeError("There is no layer to train from; this is an error in lightning_unlearn.")
        trace, _ = fit.probe()
        self.frozen.choose_before(fit.model, trace, self.masks.target_layer())

    def state_dict(self, fit: FitContext | None) -> dict[str, Any]:
        """Return the state as tensors and primitives; where weights are sharded, every rank must call it.

        Args:
            fit: that is running; None outside of one.
        """
        return {
            **self.state.state_dict(),
            "frozen": self.frozen.state_dict(),
            "start_weights": copied(self.starting.state_dict(fit)),
            **self.loader.state_dict(),
            **self.fresh.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned."""
        self.state = FinetuneState.from_state_dict(state)
        self.frozen.load_state_dict(state["frozen"])
        self.starting.weights.load_state_dict(copied(state["start_weights"]))
        self.loader.load_state_dict(state)
        self.fresh.load_state_dict(state, is_active=self.is_active)
