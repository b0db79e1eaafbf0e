"""When to swap the training data, and what is trained from then on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_unlearn.attribution import ForwardTrace, named_layers, plain_name, resolve_layer
from lightning_unlearn.callbacks._base import PartitionConsumer, check_reloaded, probe, reading_of
from lightning_unlearn.callbacks._copies import weight_copies
from lightning_unlearn.callbacks._diverged import ADVICE, LossWatch, not_finite
from lightning_unlearn.callbacks._lightning import (
    TrainDataSwap,
    callbacks_of,
    limited_batches,
    next_epoch,
    planned_epochs,
    rewrap_ddp,
    users_sampler,
)
from lightning_unlearn.callbacks._neighbours import refuse_beside_finetuning
from lightning_unlearn.callbacks._optimizers import (
    PeakRates,
    before_schedules,
    check_groups,
    check_rates,
    check_steps_left,
    fall_to_zero,
    forget_schedule,
    groups_of,
    share_over,
)
from lightning_unlearn.callbacks._packages import MisconfigurationException, is_a
from lightning_unlearn.callbacks._provenance import copied
from lightning_unlearn.callbacks._relabel import Relabelling, check_relabelling, fault_of_absent
from lightning_unlearn.callbacks._saying import rank_zero_info
from lightning_unlearn.callbacks._scoring import train_loader
from lightning_unlearn.callbacks._strategies import refuse_where_sharded, shards_weights
from lightning_unlearn.data.loaders import check_loader
from lightning_unlearn.data.sampling_scheme import Drawing
from lightning_unlearn.data.subset_sampler import (
    CleanSubsetSampler,
    NarrowedLoaders,
    OnNoisy,
    TrainingDraw,
    check_drawing,
    fault_of_batch_sampler,
    training_draw,
)
from lightning_unlearn.finetuning.warm_start import Start, StartWeights, WarmStart, choose_start
from lightning_unlearn.pruning.masking import is_computed
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.protocols import MaskSource
from lightning_unlearn.utilities.checks import (
    check_choice,
    check_flag,
    check_function,
    check_names,
    check_number,
    check_text,
    shown,
)
from lightning_unlearn.utilities.distributed import sum_over_ranks

# What makes the optimizer where weights were moved and nothing was asked for.
_COSINE = "warm_start"
_STARTS = {"keep": "", "shrink": ", from weights moved back towards those of the start", "start": ", from the start"}

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class CleanSubsetFinetuneCallback(PartitionConsumer):
    """From the partition on, trains on the clean subset (RLAP, step 5), and on what can be made of the rest.

    The loader stays the user's own (class, workers, collate function, transforms); only the indices it draws from
    change, and not the way in which it draws them: of a WeightedRandomSampler the weights of the samples that are left
    count (times their probability with ``on_noisy="weigh"``), and an epoch has fewer draws by the share of weight that
    is gone. Where Lightning does not split samplers over the ranks, one that draws with replacement draws its number on
    every rank, as before. Lightning recomputes the number of batches, the validation interval and the progress bar's
    total. After the fit, or an exception, loader, ``requires_grad`` and modes are as they were. Where the partition is
    drawn again in later rounds, the subset follows.

    Args:
        mode: ``"full"`` trains everything (the paper's F-FT), ``"layers"`` only some layers (L-FT); the rest is frozen,
            statistics of its batch norms included.
        layers: with ``mode="layers"``: dotted paths of the modules to train; by default the layer that the
            SensitivityPruneCallback prunes and those that ``forward`` calls after it.
        warm_start: what fine-tuning starts from. ``"keep"``: the weights as they are. ``"shrink"``: what was memorized
            is in all of the weights, so those that training has changed are moved back towards those that the fit began
            with; a tenth of the way is kept. ``"start"``: those that the fit began with. ``"auto"``: ``"shrink"`` where
            the network predicts at least half of the suspect labels, else ``"keep"``. Only what is trained from then on
            is moved; pruned neurons stay at zero, averages of the weights follow, and running statistics of norms begin
            anew from those of the start. Except with ``"keep"``, a copy of all trained parameters is kept on the CPU,
            and in checkpoints, until fine-tuning starts.
        on_noisy: what becomes of samples that are not clean. ``"drop"``: they are left out. ``"weigh"``: every sample
            is drawn in an epoch with its probability of being clean. ``"relabel"``: where the label is wrong and the
            suggested one is probable enough, the sample is trained on under the suggested label, which takes the given
            one's place in the batch on its way in; the data set is not changed.
        relabel_threshold: the least probability of a suggested label that is used.
        reset_head: give the head (the last Linear with an output per class) new initial weights first.
        lr: with a value, ``configure_optimizers`` (or ``optimizer``) makes a fresh optimizer with this constant
            learning rate; its own schedulers are dropped. Without, the optimizer and its schedule go on as they are;
            but where weights are moved (``warm_start``), ``configure_optimizers`` runs again, and the rate falls by a
            cosine from the highest that the fit has had to zero when it ends.
        optimizer: makes the optimizer from the trainable parameters, in YAML as ``class_path`` and ``init_args``. With
            frozen layers a fit goes on from its checkpoints only with this callback: of fewer parameters there is less
            state. The weights load anywhere.
        lr_scheduler: makes the schedule from the optimizer, stepped once per epoch.
        restart_optimizer: without ``lr`` and ``optimizer``: run the module's ``configure_optimizers`` again, so that
            its schedule starts anew and is planned for the epochs and batches that remain.

    Raises:
        ValueError: for arguments that do not fit, here; for an unknown layer when the fit is set up.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.
        TypeError: for a train loader whose sampler a subset would silently replace, when training starts.
    """

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        mode: Literal["full", "layers"] = "full",
        *,
        warm_start: WarmStart = "auto",
        layers: list[str] | None = None,
        on_noisy: OnNoisy = "drop",
        relabel_threshold: float = 0.7,
        reset_head: bool = False,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        lr_scheduler: MakeScheduler | None = None,
        restart_optimizer: bool = False,
    ) -> None:
        self.mode = check_choice("mode", mode, ("full", "layers"))
        self.warm_start: WarmStart = check_choice("warm_start", warm_start, get_args(WarmStart))
        self.layers = _checked_layers(self.mode, layers)
        self.on_noisy: OnNoisy = check_choice("on_noisy", on_noisy, get_args(OnNoisy))
        self.relabel_threshold = check_number("relabel_threshold", relabel_threshold, above=0, most=1)
        self.reset_head = check_flag("reset_head", reset_head)
        self.lr = None if lr is None else check_number("lr", lr, above=0)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.restart_optimizer = check_flag("restart_optimizer", restart_optimizer)
        _check_optimizer_arguments(self.lr, optimizer, lr_scheduler, self.restart_optimizer)
        self._swap = TrainDataSwap()
        self._narrowed = NarrowedLoaders()
        self._relabelling = Relabelling()
        self._losses = LossWatch()
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        self._masks: MaskSource | None = None
        self._draw: TrainingDraw | None = None
        self._partition: Partition | None = None
        self._data: Any = None
        self._partition_epoch = 0
        self._first_epoch = 0
        # Batches of the first epoch after the swap, for which a schedule of steps may be planned.
        self._planned_batches = 0
        # How many samples of all ranks were a step then.
        self._planned_size = 0
        # Which argument has made the optimizer, and whether lr_scheduler its schedule; and what it looks like in the
        # checkpoint that a fit goes on from.
        self._made_by = ""
        self._is_scheduled = False
        self._saved_groups: list[list[tuple[int, set[str]]]] = []
        self._frozen: dict[str, list[str]] = {"parameters": [], "norms": []}
        self._remaining: int | None = None
        # What the fit began with, until fine-tuning starts; and what that has started from.
        self._start_weights = StartWeights()
        self._started_from = "keep"
        self._peaks = PeakRates()
        self._first_step = 0
        self._epoch_started: float | None = None
        self._seconds_per_epoch: float | None = None
        self._seed = 0
        self._thawed: list[tuple[nn.Parameter, bool]] = []
        # Frozen by having no gradient, where requires_grad is not looked at.
        self._unmoved: list[nn.Parameter] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def is_active(self) -> bool:
        """Whether training draws from the clean subset."""
        return self._draw is not None

    @property
    def draw(self) -> TrainingDraw:
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
        kind = "F-FT" if self.mode == "full" else "L-FT"
        start = _STARTS[self._started_from]
        return f"trained on {_samples_of(self._draw)} from epoch {self._first_epoch} on ({kind}{start})"

    @override
    def record(self, partition: Partition) -> dict[str, Any]:
        if self._draw is None:
            return {"from_epoch": None, "dropped": [], "relabelled": [], "weighed": False}
        dropped = torch.ones(len(partition), dtype=torch.bool)
        dropped[self._draw.index] = False
        moved, new = self._draw.relabelled, self._draw.new_label
        return {
            "from_epoch": self._first_epoch,
            "started_from": self._started_from,
            "seed": self._seed,
            "dropped": dropped.nonzero().flatten(),
            # Of several labels, -1 for one that stays.
            "relabelled": []
            if new is None
            else [{"index": index, "given": partition.label[index], "new": new[index]} for index in moved.tolist()],
            # Whether each is drawn with its probability of being clean.
            "weighed": self._draw.probability is not None,
        }

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        refuse_where_sharded(
            trainer,
            type(self).__name__,
            reset_head=self.reset_head,
            lr=self.lr is not None,
            optimizer=self.optimizer is not None,
            restart_optimizer=self.restart_optimizer,
            warm_start=self._must_move,
        )
        refuse_beside_finetuning(
            trainer,
            type(self).__name__,
            **{
                "lr": self.lr is not None,
                "optimizer": self.optimizer is not None,
                "restart_optimizer=True": self.restart_optimizer,
                "mode='layers'": self.mode == "layers",
                f"warm_start='{self.warm_start}'": self._must_move,
            },
        )
        self._masks = next((callback for callback in callbacks_of(trainer) if isinstance(callback, MaskSource)), None)
        _check_schedule(self.lr_scheduler)
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
            loader = train_loader(trainer)
            seed = self._drawing(trainer, loader).seed
            # Without one of the user's, that which Lightning gives its own samplers.
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
            _check_batch_sampler(loader)
            if self.on_noisy == "relabel" or self.reset_head:
                self._check_head_and_labels(trainer, pl_module)
        elif self.draw.new_label is not None:
            # Also where the checkpoint re-labels and on_noisy is another now.
            self._learn_labels(trainer, pl_module)
        elif self.on_noisy == "relabel":
            # The next round is to re-label, where the checkpoint did not.
            self._check_head_and_labels(trainer, pl_module)
        self._check_start_is_known(trainer)
        if self.is_active and self._at_once(trainer) != self._planned_size:
            check_steps_left(trainer, _remaining_epochs(trainer), self._planned_size)
            self._plan(trainer)
        if self._makes_optimizer and not self.restart_optimizer and len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                "CleanSubsetFinetuneCallback can make a fresh optimizer in place of one, but the module has"
                f" {len(trainer.optimizers)}; leave out lr, optimizer and lr_scheduler to keep them."
            )

    def _check_head_and_labels(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace, _ = probe(trainer, pl_module, self.source)
        classes = trace.output.shape[1]
        if self.on_noisy == "relabel":
            check_relabelling(trainer, pl_module, reading_of(self.source))
            self._learn_labels(trainer, pl_module, trace)
        if self.reset_head:
            head = trace.last_linear(classes)
            if is_computed(trace.linear(head)):
                raise ValueError(
                    f"Expected the weight and bias of the head '{head}' to be parameters where reset_head=True, but"
                    " they are computed from others (weight norm, a parametrization), which would bring the old head"
                    " back; leave out reset_head."
                )
            if self.layers is not None and not f"{head}.".startswith(_inside(self.layers)):
                raise ValueError(
                    f"Expected layers to hold the head '{head}' where reset_head=True, since new weights must be"
                    f" trained, but got {self.layers}; add '{head}'."
                )

    def _learn_labels(self, trainer: Trainer, pl_module: LightningModule, trace: ForwardTrace | None = None) -> None:
        trace = probe(trainer, pl_module, self.source)[0] if trace is None else trace
        reading = reading_of(self.source)
        self._relabelling.learn(trainer, pl_module, reading, trace.logit_maker(reading.num_outputs))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._relabelling.start_batch(pl_module)
        if self.warm_start != "keep" and not self.is_active:
            self._remember_start(trainer, pl_module, batch_idx)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._relabelling.end_batch(sum_over_ranks(trainer.strategy))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._relabelling.end_batch(sum_over_ranks(trainer.strategy))
        if self.is_active:
            self._losses.add(outputs)

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_data(trainer, pl_module)
        partition = self._partition = self.source.pull_partition(trainer, pl_module)
        if partition is not None and partition.epoch > self._partition_epoch:
            if self._masks is not None:
                self._masks.pull_mask(trainer, pl_module)
            if self.source.is_dry_run:
                self._report_dry_run(trainer, pl_module, partition)
            elif partition.is_actionable:
                draw = training_draw(partition, self._what_of_noisy(trainer, pl_module), self.relabel_threshold)
                with self.timed():
                    (self._renew if self.is_active else self._start)(trainer, pl_module, draw)
            self._partition_epoch = partition.epoch
            if not self._may_start_later:
                self._start_weights.forget()
        if self.is_active:
            self._data = train_loader(trainer).dataset
        self._hold_modes(pl_module)

    def _what_of_noisy(self, trainer: Trainer, pl_module: LightningModule) -> OnNoisy:
        """``on_noisy``, but where batches turn out to be such that labels would be written on other samples' rows."""
        if self.on_noisy != "relabel" or self._partition is None:
            return self.on_noisy
        fault = fault_of_absent(trainer, pl_module, reading_of(self.source), self._partition)
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
            check_reloaded(trainer, pl_module, self.source, loader, self._partition)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._epoch_started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_active:
            self._check_diverged(trainer, pl_module)
        # A fit that is resumed within an epoch has not seen its start.
        if self._epoch_started is not None:
            self._seconds_per_epoch = time.perf_counter() - self._epoch_started

    def _check_diverged(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a fit whose weights no further training mends; before a ModelCheckpoint writes them."""
        was_finite, fault = self._losses.was_finite(trainer), not_finite(trainer, pl_module)
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
            self._check_goes_on()
            self._leave_loader(trainer)
            self._attach(trainer, pl_module)
            self._train_from_here(trainer, pl_module)
            if self._made_by and not shards_weights(trainer):
                check_groups(trainer.optimizers, self._saved_groups)
            self._swap.ask_again(trainer)

    def _check_goes_on(self) -> None:
        """Refuses to go on without the functions that have made the checkpoint's optimizer and its schedule."""
        needed = {"optimizer": self._made_by == "optimizer" and self.optimizer is None}
        needed["lr_scheduler"] = self._is_scheduled and self.lr_scheduler is None
        missing = [name for name, is_missing in needed.items() if is_missing]
        if missing:
            raise MisconfigurationException(
                f"The checkpoint is of a fine-tuning with {' and '.join(missing)}, but CleanSubsetFinetuneCallback has"
                " none now; give the same again, or resume from a checkpoint of before the partition."
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._saved_groups = groups_of(checkpoint.get("optimizer_states", ()))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # An optimizer leaves alone what has no gradient, its weight decay and momentum included.
        for parameter in self._unmoved:
            parameter.grad = None

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_loader(trainer)
        # The first entry of each is the oldest, and has the last word.
        for parameter, requires_grad in reversed(self._thawed):
            parameter.requires_grad_(requires_grad)
        for module, training in reversed(self._modes):
            module.training = training
        self._thawed, self._unmoved, self._modes = [], [], []
        self._data = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, 8 bytes per clean sample; 12 per sample to weigh, 16 to re-label.

        Before fine-tuning starts, the trained parameters as the fit began with them, but with ``warm_start="keep"``.
        """
        return {
            "version": self.state_version,
            "partition_epoch": self._partition_epoch,
            "was_dry_run": self._is_dry_run,
            "first_epoch": self._first_epoch,
            "draw": None if self._draw is None else copied(self._draw.state_dict()),
            "planned_batches": self._planned_batches,
            "planned_size": self._planned_size,
            "made_by": self._made_by,
            "is_scheduled": self._is_scheduled,
            "frozen": {kind: list(names) for kind, names in self._frozen.items()},
            "remaining": self._remaining,
            "start_weights": copied(self._start_weights.state_dict()),
            "started_from": self._started_from,
            "peaks": self._peaks.state_dict(),
            "first_step": self._first_step,
            "seed": self._seed,
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
        self._draw = None if state["draw"] is None else TrainingDraw(**copied(state["draw"]))
        self._planned_batches = state["planned_batches"]
        self._planned_size = state.get("planned_size", 0)
        asked = self._asked_of_optimizer if self.is_active else ("", False)
        self._made_by, self._is_scheduled = state.get("made_by", asked[0]), state.get("is_scheduled", asked[1])
        self._frozen = {kind: list(names) for kind, names in state["frozen"].items()}
        self._remaining = state["remaining"]
        self._start_weights.load_state_dict(copied(state.get("start_weights")))
        self._started_from = state.get("started_from", "keep")
        self._peaks.load_state_dict(state.get("peaks", ()))
        self._first_step = state.get("first_step", 0)
        self._seed = state["seed"]

    @property
    def _makes_optimizer(self) -> bool:
        return self.lr is not None or self.optimizer is not None or self.restart_optimizer

    @property
    def _asked_of_optimizer(self) -> tuple[str, bool]:
        """Which argument makes the optimizer, empty for none; and whether ``lr_scheduler`` makes its schedule."""
        made_by = {"restart_optimizer": self.restart_optimizer, "lr": self.lr is not None}
        made_by["optimizer"] = self.optimizer is not None
        return next((name for name in reversed(made_by) if made_by[name]), ""), self.lr_scheduler is not None

    def _plan(self, trainer: Trainer) -> None:
        """Notes for how many batches of which size a schedule of steps is planned."""
        self._planned_batches, self._planned_size = len(train_loader(trainer)), self._at_once(trainer)

    def _start(self, trainer: Trainer, pl_module: LightningModule, draw: TrainingDraw) -> None:
        if not self._fills_batches(trainer, draw):
            return
        if self.mode == "layers":
            self._frozen = self._names_to_freeze(trainer, pl_module)
        before, start, moved = trainer.num_training_batches, self._chosen_start(trainer), 0
        with self._all_or_nothing(trainer, pl_module) as undoing:
            self._draw = draw
            self._first_epoch, self._first_step = trainer.current_epoch, trainer.global_step
            self._remaining = _remaining_epochs(trainer)
            self._attach(trainer, pl_module)
            # Before limit_train_batches, which is applied to what a loader has whenever it is loaded again.
            self._plan(trainer)
            self._made_by, self._is_scheduled = self._asked_of_optimizer
            if start.moves and not self._made_by:
                self._made_by = _remade_by(trainer, pl_module, (self._first_epoch, self._first_step))
            remade = self._train_from_here(trainer, pl_module)
            if start.moves:
                moved = self._move_weights(trainer, pl_module, start, undoing)
            # Last, since nothing brings the old weights back.
            if self.reset_head:
                self._reset_head(trainer, pl_module)
        for sentence in (start.said.replace(".", f" ({moved:,} parameters).") if moved else start.said, remade):
            if sentence:
                rank_zero_info(sentence)
        frozen = set(self._frozen["parameters"])
        named = pl_module.named_parameters()
        trained = sum(p.numel() for n, p in named if p.requires_grad and plain_name(n) not in frozen)
        rank_zero_info(
            f"Fine-tuning from epoch {trainer.current_epoch} on {_samples_of(draw)},"
            f" {trainer.num_training_batches} batches per epoch instead of {before}; {trained:,} parameters are"
            " trained."
        )

    @property
    def _must_move(self) -> bool:
        return self.warm_start in ("shrink", "start")

    def _remember_start(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Keeps the weights that the fit began with, as long as they may be asked for."""
        weights = self._start_weights
        is_time = trainer.global_step == 0 or (weights.is_known and batch_idx == 0)
        if is_time and self._may_start_later and not self._obstacle(trainer):
            weights.remember(pl_module)
        if not self._makes_optimizer:
            self._peaks.see(trainer.optimizers)

    def _move_weights(
        self, trainer: Trainer, pl_module: LightningModule, start: Start, undoing: list[Callable[[], None]]
    ) -> int:
        frozen = {name for names in self._frozen.values() for name in names}
        copies = weight_copies(trainer, pl_module)
        moved, undo = self._start_weights.move(pl_module, start.how, copies, frozen)
        undoing.append(undo)
        self._started_from = start.how
        if self._masks is not None:
            self._masks.silence()
        return moved

    @property
    def _may_start_later(self) -> bool:
        """Whether fine-tuning has not started, and is to start with a partition that is drawn later."""
        has_rounds = getattr(self.source, "every_n_epochs", None) is not None
        return not (self.is_active or self.source.is_dry_run) and (has_rounds or self._partition_epoch == 0)

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
        return choose_start(self.warm_start, self.source.memorised, obstacle)

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
        optimizers, schedules = strategy.optimizers, strategy.lr_scheduler_configs
        # A loader that is iterated anew has drawn from it.
        random_state = torch.get_rng_state()
        try:
            yield undoing
        except BaseException:
            for function in undoing:
                function()
            self.undo(trainer, pl_module)
            strategy.optimizers, strategy.lr_scheduler_configs = optimizers, schedules
            torch.set_rng_state(random_state)
            self._draw, self._first_epoch, self._planned_batches, self._remaining = None, 0, 0, None
            self._first_step = 0
            self._made_by, self._is_scheduled, self._started_from = "", False, "keep"
            self._frozen = {"parameters": [], "norms": []}
            raise

    def _renew(self, trainer: Trainer, pl_module: LightningModule, draw: TrainingDraw) -> None:
        """Follows a partition that was drawn again."""
        if not self._fills_batches(trainer, draw):
            return
        self._leave_loader(trainer)
        self._draw = draw
        self._attach(trainer, pl_module)
        rank_zero_info(
            f"Fine-tuning goes on from epoch {trainer.current_epoch} on {_samples_of(draw)},"
            f" {trainer.num_training_batches} batches per epoch."
        )

    def _report_dry_run(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        if not partition.is_actionable:
            return
        draw = training_draw(partition, self.on_noisy, self.relabel_threshold)
        loader = train_loader(trainer)
        before = int(trainer.num_training_batches)
        after = _batches_of(trainer, loader, self._sampler(trainer, loader, draw))
        cost, epochs = "", _remaining_epochs(trainer)
        if epochs is not None:
            cost = f", {epochs} epochs of {after} batches instead of {before}"
        if epochs is not None and self._seconds_per_epoch is not None:
            seconds = [epochs * batches * self._seconds_per_epoch / max(1, before) for batches in (after, before)]
            cost += f": at the last epoch's speed about {seconds[0]:.1f} s instead of {seconds[1]:.1f} s"
        rank_zero_info(f"Dry run: would train on {_samples_of(draw)}{cost}.")

    def _fills_batches(self, trainer: Trainer, draw: TrainingDraw) -> bool:
        loader = train_loader(trainer)
        sampler = self._sampler(trainer, loader, draw)
        if _batches_of(trainer, loader, sampler) == 0:
            why = "do not fill one batch on each rank (drop_last, limit_train_batches, weights of zero)"
        elif sampler.is_single:
            why = "leave each rank a batch of one sample, on which batch norm cannot be trained"
        else:
            return True
        rank_zero_warn(f"The {len(draw.index)} samples to train on {why}, so training goes on with the data it has.")
        return False

    def _sampler(self, trainer: Trainer, loader: DataLoader[Any], draw: TrainingDraw) -> CleanSubsetSampler:
        batch_sampler: Any = loader.batch_sampler
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in trainer.lightning_module.modules())
        replicas, rank = self._part_of(trainer, loader)
        size = batch_sampler.batch_size
        return CleanSubsetSampler(
            self._drawing(trainer, loader).narrowed(draw.index, draw.probability, at_least=size * replicas),
            num_replicas=replicas,
            rank=rank,
            seed=self._seed,
            leave_no_single=size if norms else None,
            at_most=self._most_samples(trainer, size * replicas),
        )

    def _part_of(self, trainer: Trainer, loader: DataLoader[Any]) -> tuple[int, int]:
        """Into how many parts the data are split, and which of them this rank draws."""
        own = self._narrowed.samplers_of(loader)[0]
        # The user's own may split the data over other parts than the ranks, as where some ranks share a model.
        if isinstance(own, DistributedSampler):
            return own.num_replicas, own.rank
        return trainer.world_size, trainer.global_rank

    def _at_once(self, trainer: Trainer) -> int:
        """How many samples the ranks' batches hold together."""
        loader = train_loader(trainer)
        batch_sampler: Any = loader.batch_sampler
        size: int = batch_sampler.batch_size
        return size * self._part_of(trainer, loader)[0]

    def _drawing(self, trainer: Trainer, loader: DataLoader[Any]) -> Drawing:
        """How the user's loader draws, also while it is narrowed."""
        sampler, is_split = users_sampler(trainer, loader, *self._narrowed.samplers_of(loader))
        drawing = check_drawing(loader, sampler, ranks=1 if is_split else trainer.world_size)
        # Lightning shuffles what it splits.
        return replace(drawing, shuffle=drawing.shuffle or is_split)

    def _most_samples(self, trainer: Trainer, at_once: int) -> int | None:
        """A schedule of steps was planned for the first subset: a larger one of a later round must not overrun it."""
        steps = self._made_by != _COSINE and any(c.interval == "step" for c in trainer.lr_scheduler_configs)
        # A fit that goes on with batches of another size has other steps: no sample is left out for the old ones.
        return self._planned_batches * at_once if steps and at_once == self._planned_size else None

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        draw = self._draw
        if draw is None or self._swap.is_attached:
            return
        relabels = draw.new_label is not None

        def narrow(loaders: Any) -> DataLoader[Any]:
            loader = check_loader(loaders)
            # A loader that a reload has replaced is not held on to.
            self._narrowed.restore()
            sampler = self._sampler(trainer, loader, draw)
            # Before Lightning makes an iterator, whose workers draw the first batches at once.
            sampler.set_epoch(next_epoch(trainer))
            return self._narrowed.narrow(loader, sampler, remembers=relabels)

        self._swap.attach(trainer, narrow)
        if draw.new_label is not None:
            self._relabelling.attach(trainer, pl_module, reading_of(self.source), draw.new_label, self._given_labels)

    def _given_labels(self) -> Tensor:
        if self._partition is None:
            raise RuntimeError("There is no partition to re-label by; this is an error in lightning_unlearn.")
        return self._partition.label

    def _leave_loader(self, trainer: Trainer) -> None:
        self._relabelling.detach()
        self._swap.detach(trainer)
        self._narrowed.restore()

    def _reset_head(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace, _ = probe(trainer, pl_module, self.source)
        name = trace.last_linear(trace.output.shape[1])
        head = trace.linear(name)
        # The same weights on every rank, and no draw from the user's random state.
        with isolate_rng():
            torch.manual_seed(self._seed + trainer.current_epoch)
            head.reset_parameters()
        for optimizer in trainer.optimizers:
            for parameter in head.parameters():
                optimizer.state.pop(parameter, None)
        if self._masks is not None:
            self._masks.silence()
        with torch.no_grad():
            for copy in weight_copies(trainer, pl_module):
                # Begun before, it would bring the old head back.
                for part, parameter in head.named_parameters():
                    if f"{name}.{part}" in copy:
                        copy[f"{name}.{part}"].copy_(parameter)

    def _names_to_freeze(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[str]]:
        parameters = [plain_name(name) for name, _ in pl_module.named_parameters()]
        norms = [
            name
            for name, module in named_layers(pl_module).items()
            if isinstance(module, nn.modules.batchnorm._NormBase)
        ]
        if self.layers is not None:
            inside = _inside(self.layers)
            frozen = [name for name in parameters if not name.startswith(inside)]
            return {"parameters": frozen, "norms": [n for n in norms if not f"{n}.".startswith(inside)]}
        if self._masks is None:
            raise RuntimeError("There is no layer to train from; this is an error in lightning_unlearn.")
        trace, _ = probe(trainer, pl_module, self.source)
        trained = _TrainedFrom(trace, self._masks.target_layer())
        frozen = [name for name in parameters if not trained.has(name.rpartition(".")[0])]
        return {"parameters": frozen, "norms": [name for name in norms if not trained.has(name)]}

    def _train_from_here(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Freezes layers, makes an optimizer, and returns what is to be said of it, if anything."""
        named = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        for name in self._frozen["parameters"]:
            named[name].grad = None
            if shards_weights(trainer):
                # FSDP2 has seen requires_grad when it sharded the weights, and does not look again.
                self._unmoved.append(named[name])
            else:
                self._thawed.append((named[name], named[name].requires_grad))
                named[name].requires_grad_(False)
        modules = named_layers(pl_module)
        self._modes += [(modules[name], modules[name].training) for name in self._frozen["norms"]]
        self._hold_modes(pl_module)
        if self._frozen["parameters"]:
            rewrap_ddp(trainer)
        return self._make_optimizer(trainer, pl_module) if self._made_by else ""

    def _hold_modes(self, pl_module: LightningModule) -> None:
        """Keeps frozen batch norms in eval mode; modes are not in a checkpoint, and Lightning sets them at its will."""
        for module, _ in self._modes:
            module.eval()

    def _make_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Makes a fresh optimizer, and returns what is to be said of it, if anything."""
        with before_schedules() as given:
            if self._made_by != "optimizer" or self.optimizer is None:
                with planned_epochs(trainer, self._remaining):
                    trainer.strategy.setup_optimizers(trainer)
            else:
                trained = [p for p in pl_module.parameters() if p.requires_grad]
                trainer.strategy.optimizers = [self.optimizer(trained)]
        if self._made_by == "restart_optimizer":
            return ""
        if self._made_by == _COSINE:
            return self._fall_to_zero(trainer, given)
        optimizer = trainer.strategy.optimizers[0]
        forget_schedule(optimizer, given, self.lr)
        check_rates(optimizer)
        schedulers = []
        if self._is_scheduled and self.lr_scheduler is not None:
            schedulers.append(LRSchedulerConfig(self.lr_scheduler(optimizer)))
        trainer.strategy.lr_scheduler_configs = schedulers
        return ""

    def _fall_to_zero(self, trainer: Trainer, given: Mapping[int, Mapping[str, Any]]) -> str:
        """Schedules a fresh optimizer, and returns a sentence that says so."""
        replaced = {type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs}
        peaks = self._peaks.of(trainer.strategy.optimizers)
        since = self._first_epoch, self._first_step
        trainer.strategy.lr_scheduler_configs = fall_to_zero(trainer, given, peaks, since)
        if not peaks:
            return ""
        instead = f", in place of {' and '.join(sorted(replaced))}" if replaced else ""
        return (
            "configure_optimizers has run again, since an optimizer remembers the weights that were; by a cosine, the"
            f" learning rate falls from {max(max(rates) for rates in peaks):.3g} to zero at the end of the"
            f" fit{instead}."
        )


class _TrainedFrom:
    """The modules that ``forward`` calls from one layer on, with all that they hold."""

    def __init__(self, trace: ForwardTrace, layer: str) -> None:
        called = [call.name for call in trace.calls]
        self._called = set(called)
        self._from_here = set(called[called.index(layer) :]) - set(trace.modules_before(layer))

    def has(self, name: str) -> bool:
        """Whether a module is among them; one that is not called itself goes with the nearest that holds it."""
        while name and name not in self._called:
            name = name.rpartition(".")[0]
        return name in self._from_here


def _inside(layers: list[str]) -> tuple[str, ...]:
    """What the names of all that these modules hold begin with."""
    return tuple(f"{plain_name(name)}." for name in layers)


def _batches_of(trainer: Trainer, loader: DataLoader[Any], sampler: CleanSubsetSampler) -> int:
    """How many batches an epoch of what a sampler draws has, cut as the loader cuts them."""
    batch_sampler: Any = loader.batch_sampler
    size: int = batch_sampler.batch_size
    return limited_batches(trainer, len(sampler) // size if batch_sampler.drop_last else -(-len(sampler) // size))


def _remade_by(trainer: Trainer, pl_module: LightningModule, since: tuple[int, int]) -> str:
    """How the optimizer of a fit whose weights are moved is made anew, where nothing was asked for."""
    if pl_module.automatic_optimization and share_over(trainer, *since) is not None:
        return _COSINE
    why = (
        "max_epochs and max_steps do not say how much is to come"
        if pl_module.automatic_optimization
        else "the module optimizes manually, and steps them itself"
    )
    rank_zero_info(f"configure_optimizers runs again, with its own schedules from their beginning: {why}.")
    return "restart_optimizer"


def _samples_of(draw: TrainingDraw) -> str:
    """What a draw holds, in words."""
    if draw.probability is not None:
        return f"{len(draw.index):,} samples, each drawn as often as it is likely to be clean"
    changed = len(draw.relabelled)
    kept = f"{len(draw.index) - changed:,} clean samples"
    return f"{kept} and {changed:,} re-labeled ones" if draw.new_label is not None else kept


def _remaining_epochs(trainer: Trainer) -> int | None:
    return None if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch


def _checked_layers(mode: str, layers: Any) -> list[str] | None:
    if mode == "full" and layers is not None:
        raise ValueError(f"Expected layers only with mode='layers', but got mode='full' and layers={shown(layers)}.")
    if layers is None:
        return None
    names = [layers] if isinstance(layers, str) else check_names("layers", layers, "dotted paths of modules")
    if not names:
        raise ValueError("Expected layers to name at least one module, but got an empty list.")
    return [check_text("layers", name, "a list of dotted paths of modules") for name in names]


def _check_optimizer_arguments(
    lr: float | None, optimizer: MakeOptimizer | None, lr_scheduler: MakeScheduler | None, restart_optimizer: bool
) -> None:
    if optimizer is not None:
        check_function("optimizer", optimizer, "from parameters to an optimizer, as torch.optim.AdamW")
    if lr_scheduler is not None:
        check_function("lr_scheduler", lr_scheduler, "from an optimizer to its schedule")
    if lr_scheduler is not None and lr is None and optimizer is None:
        raise ValueError("Expected lr or optimizer beside lr_scheduler, which schedules a fresh optimizer.")
    if restart_optimizer and (lr is not None or optimizer is not None):
        raise ValueError("Expected restart_optimizer without lr and optimizer, which make a fresh optimizer anyway.")


def _check_schedule(make: MakeScheduler | None) -> None:
    """Refuses early a scheduler that could not be stepped later."""
    if make is None:
        return
    try:
        trial = make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))
    except Exception:  # it may need more than a stand-in has; the real one is made when fine-tuning starts
        return
    if isinstance(trial, ReduceLROnPlateau):
        raise ValueError(
            "Expected lr_scheduler to make a scheduler that is stepped without a metric, but it makes a"
            " ReduceLROnPlateau; use another, or restart_optimizer=True with a configure_optimizers that returns one."
        )


def _check_batch_sampler(loader: DataLoader[Any]) -> None:
    with isolate_rng():
        fault = fault_of_batch_sampler(loader)
    if fault:
        raise TypeError(fault)
