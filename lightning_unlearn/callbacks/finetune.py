"""When to swap the training data, and what is trained from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.attribution import plain_name, resolve_layer
from lightning_unlearn.callbacks.base import PartitionConsumer
from lightning_unlearn.finetuning import freezing, messages, optimizers, relabel, train_data
from lightning_unlearn.finetuning.by_key import KeyedSubset
from lightning_unlearn.finetuning.training_subset import OnNoisy, TrainingSubset, make_training_subset
from lightning_unlearn.finetuning.warm_start import Memory, Start, StartWeights, WarmStart, choose_start
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied
from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import MisconfigurationException, is_a
from lightning_unlearn.trainer.data_checks import check_reloaded
from lightning_unlearn.trainer.divergence import ADVICE, LossWatch, not_finite
from lightning_unlearn.trainer.early_stopping import count_anew
from lightning_unlearn.trainer.incompatible import refuse_beside_finetuning
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.protocols import MaskSource
from lightning_unlearn.trainer.scoring_loader import train_loader
from lightning_unlearn.trainer.strategies import refuse_where_sharded, shards_weights
from lightning_unlearn.trainer.weight_averages import weight_copies
from lightning_unlearn.utilities.checks import check_choice, check_number
from lightning_unlearn.utilities.distributed import sum_over_ranks


class CleanSubsetFinetuneCallback(PartitionConsumer):
    """From the partition on, trains on the clean subset (RLAP, step 5), and on what can be made of the rest.

    The loader stays the user's own (class, workers, collate function, transforms); only the indices it draws from
    change, and not the way in which it draws them: of a WeightedRandomSampler the weights of the samples that are left
    count (times their probability with ``on_noisy="reweight"``), and an epoch has fewer draws by the share of weight
    that is gone. Where Lightning does not split samplers over the ranks, one that draws with replacement draws its
    number on every rank, as before. Lightning recomputes the number of batches, the validation interval and the
    progress bar's total. After the fit, or an exception, loader, ``requires_grad`` and modes are as they were. Where
    the partition is computed again in later rounds, the subset follows.

    Args:
        mode: ``"full"`` trains everything (the paper's F-FT), ``"layers"`` only some layers (L-FT); the rest is frozen,
            statistics of its batch norms included.
        layers: with ``mode="layers"``: dotted paths of the modules to train; by default the layer that the
            SensitivityPruneCallback prunes and those that ``forward`` calls after it.
        warm_start: what fine-tuning starts from. ``"keep"``: the weights as they are. ``"shrink"``: what was memorized
            is in all of the weights, so those that training has changed are moved back towards those that the fit began
            with; a tenth of the way is kept. ``"start"``: those that the fit began with. ``"auto"``: ``"shrink"`` where
            the network predicts at least half of the suspect labels, or .1 more of the training labels than of the
            validation labels, else ``"keep"``. Only what is trained from then on
            is moved; pruned neurons stay at zero, averages of the weights follow, and running statistics of norms begin
            anew from those of the start. Except with ``"keep"``, a copy of all trained parameters is kept on the CPU,
            and in checkpoints, until fine-tuning starts.
        on_noisy: what becomes of samples that are not clean, or whose label is doubtful
            (:class:`~lightning_unlearn.Partition`). ``"drop"``: they are left out. ``"reweight"``: every sample is
            drawn in an epoch with its probability of being clean. ``"relabel"``: where the label is wrong and the
            suggested one is probable enough, the sample is trained on under the suggested label, which takes the given
            one's place in the batch on its way in; the data set is not changed.
        lr: with a value, ``configure_optimizers`` (or ``optimizer``) makes a fresh optimizer with this constant
            learning rate; its own schedulers are dropped. Without, the optimizer and its schedule go on as they are;
            but where weights are moved (``warm_start``), ``configure_optimizers`` runs again, and the rate falls by a
            cosine from the highest that the fit has had to zero when it ends.
        optimizer: a function from the trainable parameters to the optimizer, in YAML as ``class_path`` and
            ``init_args``; or ``"restart"``: run the module's ``configure_optimizers`` again, so that its schedule
            starts anew, planned for the epochs and batches that remain. With frozen layers a fit resumes from its
            checkpoints only with this callback, as there is less optimizer state. The weights load anywhere.
        lr_scheduler: makes the schedule from the optimizer, stepped once per epoch.

    Raises:
        ValueError: for arguments that do not fit, here; for an unknown layer when the fit is set up.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.
        TypeError: for a train loader whose sampler a subset would silently replace, when training starts.
    """

    relabel_threshold = 0.7
    """Least probability of a suggested label with which ``on_noisy="relabel"`` trains, in (0, 1]."""

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
        self._fresh = optimizers.FreshOptimizer(self.lr, optimizer, lr_scheduler)
        self._loader: train_data.SubsetLoader | KeyedSubset = train_data.SubsetLoader()
        self._frozen = freezing.FrozenLayers()
        self._losses = LossWatch()
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        self._masks: MaskSource | None = None
        self._draw: TrainingSubset | None = None
        self._partition: Partition | None = None
        self._data: Any = None
        self._partition_epoch = 0
        self._first_epoch = 0
        self._fresh.reset()
        self._loader.reset()
        self._frozen.forget()
        # What the fit began with, until fine-tuning starts; and what that has started from.
        self._start_weights = StartWeights()
        self._started_from = "keep"
        self._epoch_started: float | None = None
        self._seconds_per_epoch: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether training draws from the clean subset."""
        return self._draw is not None

    @property
    def draw(self) -> TrainingSubset:
        """Which samples are trained on, how often, and under which labels.

        Raises:
            RuntimeError: before there is one, saying when there will be, or if the partition was not acted upon.
        """
        if self._draw is None:
            if self._partition_epoch:
                raise RuntimeError("Training goes on with all the data: the partition was not acted upon.")
            when = self.when_drawn()
            raise RuntimeError(f"Training is on all the data yet: it is narrowed {when}.")
        return self._draw

    @property
    def first_epoch(self) -> int | None:
        """The first epoch, counted from 0, on the clean subset; None before it is known."""
        return None if self._draw is None else self._first_epoch

    @override
    def describe(self) -> str:
        """What was done, in one clause; empty where nothing was."""
        if self._draw is None:
            return ""
        return messages.done(self._draw, self._first_epoch, mode=self.mode, started_from=self._started_from)

    @override
    def record(self, partition: Partition) -> dict[str, Any]:
        if self._draw is None:
            return {"from_epoch": None, "dropped": [], "relabeled": [], "weighed": False}
        dropped = torch.ones(len(partition), dtype=torch.bool)
        dropped[self._draw.index] = False
        moved, new = self._draw.relabeled, self._draw.new_label
        return {
            "from_epoch": self._first_epoch,
            "started_from": self._started_from,
            "seed": self._loader.seed,
            "dropped": dropped.nonzero().flatten(),
            # Of several labels, -1 for one that stays.
            "relabeled": []
            if new is None
            else [{"index": index, "given": partition.label[index], "new": new[index]} for index in moved.tolist()],
            # Whether each is drawn with its probability of being clean.
            "weighed": self._draw.probability is not None,
        }

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        self.relabel_threshold = check_number("relabel_threshold", self.relabel_threshold, above=0, most=1)
        if (keyed := self.fit.keyed) is not None or isinstance(self._loader, KeyedSubset):
            self._loader = train_data.SubsetLoader() if keyed is None else KeyedSubset(keyed)
        refuse_where_sharded(
            trainer,
            type(self).__name__,
            lr=self.lr is not None,
            optimizer=self.optimizer is not None,
            warm_start=self._must_move,
        )
        refuse_beside_finetuning(
            trainer,
            type(self).__name__,
            **{
                "lr": self.lr is not None,
                "optimizer": self.optimizer is not None,
                "mode='layers'": self.mode == "layers",
                f"warm_start='{self.warm_start}'": self._must_move,
            },
        )
        self._masks = next((callback for callback in callbacks_of(trainer) if isinstance(callback, MaskSource)), None)
        self._fresh.check()
        if self.mode == "layers" and self.layers is None and self._masks is None:
            raise MisconfigurationException(
                "CleanSubsetFinetuneCallback(mode='layers') needs to know which layers to train: name them with"
                " layers=[...], or add a SensitivityPruneCallback, whose layer and those after it are trained."
            )

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        for name in self.layers or ():
            if not any(True for _ in resolve_layer(pl_module, name).parameters()):
                raise ValueError(f"Expected layers to name modules with parameters, but '{name}' has none.")

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_active:
            self._loader.begin(self.fit)
            if self.on_noisy == "relabel":
                self._check_relabeling(trainer, pl_module)
        elif self.draw.new_label is not None:
            # Also where the checkpoint re-labels and on_noisy is another now.
            self._learn_labels(trainer, pl_module)
        elif self.on_noisy == "relabel":
            # The next round is to re-label, where the checkpoint did not.
            self._check_relabeling(trainer, pl_module)
        self._check_start_is_known(trainer)
        if self.is_active and self._loader.at_once(self.fit) != self._loader.planned_size:
            optimizers.check_steps_left(trainer, optimizers.remaining_epochs(trainer), self._loader.planned_size)
            self._loader.plan(self.fit)
        self._fresh.check_one(trainer)

    def _check_relabeling(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # First, as the callback that publishes the partition may come later in the list and has settled nothing yet.
        self.fit.probe()
        if isinstance(self._loader, train_data.SubsetLoader):
            relabel.check_relabeling(self.fit)
        self._learn_labels(trainer, pl_module)

    def _learn_labels(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace, _ = self.fit.probe()
        head = trace.logits_module(self.fit.reading.num_outputs)
        if isinstance(self._loader, KeyedSubset):
            self._loader.check_relabeling(self.fit, head)
        else:
            self._loader.relabeling.learn(self.fit, head)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._loader.relabeling.start_batch(pl_module)
        if self.warm_start != "keep" and not self.is_active:
            self._remember_start(trainer, pl_module, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if isinstance(self._loader, KeyedSubset):
            self._loader.before_backward(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._loader.relabeling.end_batch(sum_over_ranks(trainer.strategy))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loader.relabeling.end_batch(sum_over_ranks(trainer.strategy))
        if self.is_active:
            self._losses.add(outputs)

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_data(trainer, pl_module)
        partition = self._partition = self.source.get_partition(trainer, pl_module)
        if partition is not None and partition.epoch > self._partition_epoch:
            if self._masks is not None:
                self._masks.get_mask(trainer, pl_module)
            if self.source.dry_run:
                self._report_dry_run(trainer, pl_module, partition)
            elif partition.is_actionable:
                draw = make_training_subset(partition, self._what_of_noisy(trainer, pl_module), self.relabel_threshold)
                with self.timed():
                    (self._renew if self.is_active else self._start)(trainer, pl_module, draw)
            self._partition_epoch = partition.epoch
            if not self._may_start_later:
                self._start_weights.forget()
        if self.is_active and self.fit.keyed is None:
            self._data = train_loader(trainer).dataset
        self._frozen.hold_modes()

    def _what_of_noisy(self, trainer: Trainer, pl_module: LightningModule) -> OnNoisy:
        """``on_noisy``, but where batches turn out to be such that labels would be written on other samples' rows."""
        if self.on_noisy != "relabel" or self._partition is None or isinstance(self._loader, KeyedSubset):
            return self.on_noisy
        fault = relabel.fault_of_absent(self.fit, self._partition)
        # A data set that draws at random may show each rank another batch.
        if not trainer.strategy.reduce_boolean_decision(bool(fault), all=False):
            return "relabel"
        fault = fault or "Another rank has batches in which labels cannot be replaced."
        rank_zero_warn(f"Suspects are dropped instead of re-labeled. {fault}")
        return "drop"

    def _check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not where the loader is made: an error there leaves torch's DataLoader as Lightning has changed it meanwhile.
        if self._data is None or self._partition is None:
            return
        loader = train_loader(trainer)
        if self._data is not loader.dataset:
            check_reloaded(self.fit, loader, self._partition)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_active:
            self._check_diverged(trainer, pl_module)
            if isinstance(self._loader, KeyedSubset):
                self._loader.end_epoch(self.fit)
        # A fit that is resumed within an epoch has not seen its start.
        if self._epoch_started is not None:
            self._seconds_per_epoch = time.perf_counter() - self._epoch_started

    def _check_diverged(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a fit whose weights no further training mends; before a ModelCheckpoint writes them."""
        was_finite, fault = self._losses.was_finite(self.fit), not_finite(self.fit)
        when = f"in epoch {trainer.current_epoch}, trained on the clean subset since epoch {self._first_epoch}"
        if fault:
            rate = "" if self.lr is None else f" than lr={self.lr}"
            raise ValueError(
                f"Training has diverged {when}: {fault} are NaN or infinite;"
                f" {ADVICE.replace('smaller learning rate', f'smaller learning rate{rate}')}."
            )
        if not was_finite:
            rank_zero_warn(f"The loss was NaN or infinite {when}; if that goes on, {ADVICE}.")

    @override
    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_active:
            self.refuse_dry_run()
            self._fresh.check_goes_on()
            self._loader.detach(self.fit)
            self._attach(trainer, pl_module)
            self._frozen.freeze(trainer, pl_module)
            self._fresh.make(trainer, pl_module)
            self._fresh.check_groups(trainer)
            self._loader.ask_again(self.fit)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._fresh.load_groups(checkpoint.get("optimizer_states", ()))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._frozen.drop_gradients()

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loader.detach(self.fit)
        self._frozen.thaw()
        self._data = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, 8 bytes per clean sample; 12 per sample to reweight, 16 to re-label.

        Before fine-tuning starts, the trained parameters as the fit began with them, but with ``warm_start="keep"``.
        """
        return {
            "version": self.state_version,
            "partition_epoch": self._partition_epoch,
            "was_dry_run": self._is_dry_run,
            "first_epoch": self._first_epoch,
            "draw": None if self._draw is None else copied(self._draw.state_dict()),
            "frozen": self._frozen.state_dict(),
            "start_weights": copied(self._start_weights.state_dict()),
            "started_from": self._started_from,
            **self._loader.state_dict(),
            **self._fresh.state_dict(),
        }

    @property
    @override
    def has_acted(self) -> bool:
        return self._draw is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        # What a dry run has only spoken of is still to be done in a fit that acts.
        self._partition_epoch = 0 if state["was_dry_run"] and not self._is_dry_run else state["partition_epoch"]
        self._first_epoch = state["first_epoch"]
        self._draw = None if state["draw"] is None else TrainingSubset(**copied(state["draw"]))
        self._frozen.load_state_dict(state["frozen"])
        self._start_weights.load_state_dict(copied(state.get("start_weights")))
        self._started_from = state.get("started_from", "keep")
        self._loader.load_state_dict(state)
        self._fresh.load_state_dict(state, is_active=self.is_active)

    def _start(self, trainer: Trainer, pl_module: LightningModule, draw: TrainingSubset) -> None:
        if not self._fills_batches(trainer, draw):
            return
        if self.mode == "layers":
            self._choose_frozen(trainer, pl_module)
        before, start, moved = trainer.num_training_batches, self._chosen_start(trainer), 0
        with self._all_or_nothing(trainer, pl_module) as undoing:
            self._draw, self._first_epoch = draw, trainer.current_epoch
            self._attach(trainer, pl_module)
            # Before limit_train_batches, which is applied to what a loader has whenever it is loaded again.
            self._loader.plan(self.fit)
            self._fresh.begin(trainer, pl_module, moves=start.moves)
            self._frozen.freeze(trainer, pl_module)
            remade = self._fresh.make(trainer, pl_module)
            if start.moves:
                moved = self._move_weights(trainer, pl_module, start, undoing)
        self._say_start(trainer, start, moved)
        if remade:
            rank_zero_info(remade)
        frozen = set(self._frozen.parameters)
        named = pl_module.named_parameters()
        trained = sum(p.numel() for n, p in named if p.requires_grad and plain_name(n) not in frozen)
        batches = before, trainer.num_training_batches
        left = "" if self._partition is None else messages.left_out(self._partition, draw)
        rank_zero_info(messages.started(draw, left, trainer.current_epoch, batches, trained))

    @property
    def _must_move(self) -> bool:
        return self.warm_start in ("shrink", "start")

    def _remember_start(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Keeps the weights that the fit began with, as long as they may be asked for."""
        weights = self._start_weights
        is_time = trainer.global_step == 0 or (weights.is_known and batch_idx == 0)
        if is_time and self._may_start_later and not self._obstacle(trainer):
            weights.remember(pl_module)
        self._fresh.see(trainer.optimizers)

    def _move_weights(
        self, trainer: Trainer, pl_module: LightningModule, start: Start, undoing: list[Callable[[], None]]
    ) -> int:
        copies = weight_copies(self.fit)
        moved, undo = self._start_weights.move(pl_module, start.how, copies, self._frozen.names)
        undoing.append(undo)
        self._started_from = start.how
        if self._masks is not None:
            self._masks.silence()
        undoing.append(count_anew(trainer))
        return moved

    @property
    def _may_start_later(self) -> bool:
        """Whether fine-tuning has not started, and is to start with a partition that is computed later."""
        has_rounds = getattr(self.source, "every_n_epochs", None) is not None
        return not (self.is_active or self.source.dry_run) and (has_rounds or self._partition_epoch == 0)

    def _obstacle(self, trainer: Trainer) -> str:
        """Why weights are not moved, and the optimizer not made anew, where nobody has insisted on it."""
        if shards_weights(trainer):
            return f"under {type(trainer.strategy).__name__} every rank holds a part of them"
        other = next((callback for callback in callbacks_of(trainer) if is_a(callback, "BaseFinetuning")), None)
        return "" if other is None else f"{type(other).__name__} goes by the optimizer that it knows"

    def _chosen_start(self, trainer: Trainer) -> Start:
        obstacle = self._obstacle(trainer)
        if not obstacle and not self._start_weights.is_known:
            obstacle = "the checkpoint that the fit goes on from does not have those that it began with"
        return choose_start(self.warm_start, self._memory, obstacle)

    @property
    def _memory(self) -> Memory:
        return Memory(self.source.memorized, self.source.accuracy_gap)

    def _say_start(self, trainer: Trainer, start: Start, moved: int) -> None:
        if self._partition is not None:
            epochs, expected = optimizers.remaining_epochs(trainer), self._partition.expected_precision
            rank_zero_info(messages.prospect(self._memory, start, expected, epochs))
        if start.because or start.moves:
            rank_zero_info(messages.start_of(start, moved))

    def _check_start_is_known(self, trainer: Trainer) -> None:
        is_late = trainer.global_step > 0 and self._may_start_later
        if self._must_move and is_late and not self._start_weights.is_known:
            raise MisconfigurationException(
                f"CleanSubsetFinetuneCallback(warm_start='{self.warm_start}') needs the weights that the fit began"
                " with, but the checkpoint does not have them, as that fit had no such setting; set"
                " warm_start='keep', or start again without the checkpoint."
            )

    @contextmanager
    def _all_or_nothing(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[list[Callable[[], None]]]:
        """Where an optimizer or a loader of the user's cannot be made, the fit is as if it had not begun to be changed.

        A checkpoint that is written of the exception then fits its optimizer.

        Yields:
            a list of what more is to be called then.
        """
        undoing: list[Callable[[], None]] = []
        strategy = trainer.strategy
        made, schedules = strategy.optimizers, strategy.lr_scheduler_configs
        # A loader that is iterated anew has drawn from it.
        random_state = torch.get_rng_state()
        try:
            yield undoing
        except BaseException:
            for function in undoing:
                function()
            self.undo(trainer, pl_module)
            strategy.optimizers, strategy.lr_scheduler_configs = made, schedules
            torch.set_rng_state(random_state)
            self._draw, self._first_epoch, self._started_from = None, 0, "keep"
            self._loader.forget_plan()
            self._fresh.forget()
            self._frozen.forget()
            raise

    def _renew(self, trainer: Trainer, pl_module: LightningModule, draw: TrainingSubset) -> None:
        """Follows a partition that was computed again."""
        if not self._fills_batches(trainer, draw):
            return
        self._loader.detach(self.fit)
        self._draw = draw
        self._attach(trainer, pl_module)
        rank_zero_info(messages.renewed(draw, trainer.current_epoch, trainer.num_training_batches))

    def _report_dry_run(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        if not partition.is_actionable:
            return
        draw = make_training_subset(partition, self.on_noisy, self.relabel_threshold)
        batches: tuple[int | float, int | float] = (trainer.num_training_batches,) * 2
        if isinstance(self._loader, train_data.SubsetLoader):
            loader = train_loader(trainer)
            sampler = self._loader.sampler(self.fit, loader, draw, keeps_plan=False)
            batches = trainer.num_training_batches, train_data.batches_of(self.fit, loader, sampler)
        epochs = optimizers.remaining_epochs(trainer)
        start = choose_start(self.warm_start, self._memory, self._obstacle(trainer))
        rank_zero_info(messages.of_dry_run(draw, epochs, batches, self._seconds_per_epoch))
        rank_zero_info(f"Dry run: {messages.start_of(start)}")

    def _fills_batches(self, trainer: Trainer, draw: TrainingSubset) -> bool:
        fault = self._loader.fault_of(self.fit, draw, keeps_plan=self._fresh.keeps_plan(trainer))
        if fault:
            rank_zero_warn(
                f"The {len(draw.index)} samples to train on {fault}, so training goes on with the data it has."
            )
        return not fault

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._draw is not None and isinstance(self._loader, KeyedSubset):
            self._loader.attach_rows(self.fit, self._draw, self._known_partition)
        elif self._draw is not None and isinstance(self._loader, train_data.SubsetLoader):
            self._loader.attach(self.fit, self._draw, keeps_plan=partial(self._fresh.keeps_plan, trainer))
            if self._draw.new_label is not None:
                self._loader.relabeling.attach(self.fit, self._draw.new_label, self._given_labels)

    def _known_partition(self) -> Partition:
        if self._partition is None:
            raise RuntimeError("There is no partition to go by; this is an error in lightning_unlearn.")
        return self._partition

    def _given_labels(self) -> Tensor:
        return self._known_partition().label

    def _choose_frozen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.layers is not None:
            self._frozen.choose_outside(pl_module, self.layers)
            return
        if self._masks is None:
            raise RuntimeError("There is no layer to train from; this is an error in lightning_unlearn.")
        trace, _ = self.fit.probe()
        self._frozen.choose_before(pl_module, trace, self._masks.target_layer())
