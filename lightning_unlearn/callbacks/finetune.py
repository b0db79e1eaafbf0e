"""When to swap the training data, and what is trained from then on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import override

from lightning_unlearn.callbacks._base import PartitionConsumer, probe, train_loader
from lightning_unlearn.callbacks._lightning import (
    TrainDataSwap,
    limited_batches,
    next_epoch,
    planned_epochs,
    rewrap_ddp,
)
from lightning_unlearn.capture import ForwardTrace, resolve_layer
from lightning_unlearn.data import CleanSubsetSampler, NarrowedLoaders, batch_size, check_loader, shuffles
from lightning_unlearn.types import MaskSource

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class CleanSubsetFinetuneCallback(PartitionConsumer):
    """From the partition on, trains on the clean subset only (RLAP, step 5).

    The loader stays the user's own (class, workers, collate function, transforms); only the indices it draws from
    change. Lightning recomputes the number of batches, the validation interval and the progress bar's total. After the
    fit, or an exception, loader, ``requires_grad`` and modes are as they were.

    Args:
        mode: ``"full"`` trains everything (the paper's F-FT), ``"layers"`` only some layers (L-FT); the rest is frozen,
            statistics of its batch norms included.
        layers: with ``mode="layers"``: dotted paths of the modules to train; by default the layer that the
            SensitivityPruneCallback prunes and those that ``forward`` calls after it.
        lr: with a value, ``configure_optimizers`` (or ``optimizer``) makes a fresh optimizer with this constant
            learning rate; its own schedulers are dropped. Without, the optimizer and its schedule go on as they are.
        optimizer: makes the optimizer from the trainable parameters, in YAML as ``class_path`` and ``init_args``.
        lr_scheduler: makes the schedule from the optimizer, stepped once per epoch.
        restart_optimizer: without ``lr`` and ``optimizer``: run the module's ``configure_optimizers`` again, so that
            its schedule starts anew and is planned for the epochs and batches that remain.

    Raises:
        ValueError: for arguments that do not fit, here; for an unknown layer when the fit is set up.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.
        TypeError: for a train loader whose sampler a subset would silently replace, when training starts.
    """

    def __init__(
        self,
        mode: Literal["full", "layers"] = "full",
        *,
        layers: list[str] | None = None,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        lr_scheduler: MakeScheduler | None = None,
        restart_optimizer: bool = False,
    ) -> None:
        if mode not in ("full", "layers"):
            raise ValueError(f"Expected mode to be 'full' or 'layers', but got '{mode}'.")
        if mode == "full" and layers is not None:
            raise ValueError(f"Expected layers only with mode='layers', but got mode='full' and layers={layers}.")
        if layers is not None and not layers:
            raise ValueError("Expected layers to name at least one module, but got an empty list.")
        if lr is not None and lr <= 0:
            raise ValueError(f"Expected lr to be greater than 0, but got {lr}.")
        if lr_scheduler is not None and lr is None and optimizer is None:
            raise ValueError("Expected lr or optimizer beside lr_scheduler, which schedules a fresh optimizer.")
        if restart_optimizer and (lr is not None or optimizer is not None):
            raise ValueError(
                "Expected restart_optimizer without lr and optimizer, which make a fresh optimizer anyway."
            )
        self.mode = mode
        self.layers = layers
        self.lr = lr
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.restart_optimizer = restart_optimizer
        self._swap = TrainDataSwap()
        self._narrowed = NarrowedLoaders()
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        self._masks: MaskSource | None = None
        self._clean: Tensor | None = None
        self._frozen: dict[str, list[str]] = {"parameters": [], "norms": []}
        self._remaining: int | None = None
        self._done = False
        self._order = {"shuffle": True, "seed": 0}
        self._thawed: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def is_active(self) -> bool:
        """Whether training draws from the clean subset."""
        return self._clean is not None

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        self._masks = next((callback for callback in callbacks if isinstance(callback, MaskSource)), None)
        _check_schedule(self.lr_scheduler)
        for name in self.layers or ():
            if not any(True for _ in resolve_layer(pl_module, name).parameters()):
                raise ValueError(f"Expected layers to name modules with parameters, but '{name}' has none.")
        if self.mode == "layers" and self.layers is None and self._masks is None:
            raise MisconfigurationException(
                "CleanSubsetFinetuneCallback(mode='layers') needs to know which layers to train: name them with"
                " layers=[...], or add a SensitivityPruneCallback, whose layer and those after it are trained."
            )

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_active:
            # The seed that Lightning gives its own samplers.
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
            loader = train_loader(trainer)
            self._order = {"shuffle": shuffles(loader), "seed": seed}
            _check_batch_sampler(loader)
        if self._makes_optimizer and not self.restart_optimizer and len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                "CleanSubsetFinetuneCallback can make a fresh optimizer in place of one, but the module has"
                f" {len(trainer.optimizers)}; leave out lr, optimizer and lr_scheduler to keep them."
            )

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        partition = self.source.pull_partition(trainer, pl_module)
        if not self._done and partition is not None:
            if self._masks is not None:
                self._masks.pull_mask(trainer, pl_module)
            if partition.is_actionable:
                self._start(trainer, pl_module, partition.clean_indices())
            self._done = True
        self._hold_modes(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After a resume; before the state of the optimizer is restored, which must find the optimizer that it belongs
        # to.
        if self.is_active:
            self._attach(trainer)
            self._train_from_here(trainer, pl_module)
            self._swap.ask_again(trainer)

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.detach(trainer)
        self._narrowed.restore()
        # The first entry of each is the oldest, and has the last word.
        for parameter, requires_grad in reversed(self._thawed):
            parameter.requires_grad_(requires_grad)
        for module, training in reversed(self._modes):
            module.training = training
        self._thawed, self._modes = [], []

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, 8 bytes per clean sample."""
        return {
            "done": self._done,
            "clean": self._clean,
            "frozen": {kind: list(names) for kind, names in self._frozen.items()},
            "remaining": self._remaining,
            "order": dict(self._order),
        }

    @property
    @override
    def has_acted(self) -> bool:
        return self._clean is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self._clean = state["clean"]
        self._frozen = {kind: list(names) for kind, names in state["frozen"].items()}
        self._remaining = state["remaining"]
        self._order = dict(state["order"])

    @property
    def _makes_optimizer(self) -> bool:
        return self.lr is not None or self.optimizer is not None or self.restart_optimizer

    def _start(self, trainer: Trainer, pl_module: LightningModule, clean: Tensor) -> None:
        batches = self._batches_after(trainer, clean)
        if batches == 0:
            rank_zero_warn(
                f"The {len(clean)} clean samples do not fill one batch on each rank (drop_last, limit_train_batches),"
                " so training goes on with all the data."
            )
            return
        if self.mode == "layers":
            self._frozen = self._names_to_freeze(trainer, pl_module)
        before = trainer.num_training_batches
        self._clean = clean
        max_epochs = trainer.max_epochs
        self._remaining = None if max_epochs in (None, -1) else max_epochs - trainer.current_epoch
        self._attach(trainer)
        self._train_from_here(trainer, pl_module)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rank_zero_info(
            f"Fine-tuning from epoch {trainer.current_epoch} on {len(clean):,} clean samples,"
            f" {trainer.num_training_batches} batches per epoch instead of {before}; {trained:,} parameters are"
            " trained."
        )

    def _batches_after(self, trainer: Trainer, clean: Tensor) -> int:
        loader = train_loader(trainer)
        batch_sampler: Any = loader.batch_sampler
        per_rank = len(self._sampler(trainer, loader, clean))
        size: int = batch_sampler.batch_size
        return limited_batches(trainer, per_rank // size if batch_sampler.drop_last else -(-per_rank // size))

    def _sampler(self, trainer: Trainer, loader: DataLoader[Any], clean: Tensor) -> CleanSubsetSampler:
        batch_sampler: Any = loader.batch_sampler
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in trainer.lightning_module.modules())
        return CleanSubsetSampler(
            clean,
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
            shuffle=bool(self._order["shuffle"]),
            seed=self._order["seed"],
            leave_no_single=batch_sampler.batch_size if norms else None,
        )

    def _attach(self, trainer: Trainer) -> None:
        clean = self._clean
        if clean is None or self._swap.is_attached:
            return

        def narrow(loaders: Any) -> DataLoader[Any]:
            loader = check_loader(loaders)
            sampler = self._sampler(trainer, loader, clean)
            # A loader that a reload has replaced is not held on to.
            self._narrowed.restore()
            # Before Lightning makes an iterator, whose workers draw the first batches at once.
            sampler.set_epoch(next_epoch(trainer))
            return self._narrowed.narrow(loader, sampler)

        self._swap.attach(trainer, narrow)

    def _names_to_freeze(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[str]]:
        parameters = [name for name, _ in pl_module.named_parameters()]
        norms = [
            name for name, module in pl_module.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
        ]
        if self.layers is not None:
            inside = tuple(f"{name}." for name in self.layers)
            frozen = [name for name in parameters if not name.startswith(inside)]
            return {"parameters": frozen, "norms": [n for n in norms if not f"{n}.".startswith(inside)]}
        if self._masks is None:
            raise RuntimeError("There is no layer to train from; this is an error in lightning_unlearn.")
        trace, _ = probe(trainer, pl_module, self.source)
        trained = _TrainedFrom(trace, self._masks.target_layer())
        frozen = [name for name in parameters if not trained.has(name.rpartition(".")[0])]
        return {"parameters": frozen, "norms": [name for name in norms if not trained.has(name)]}

    def _train_from_here(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        for name in self._frozen["parameters"]:
            self._thawed.append((named[name], named[name].requires_grad))
            named[name].requires_grad_(False)
            named[name].grad = None
        modules = dict(pl_module.named_modules())
        self._modes += [(modules[name], modules[name].training) for name in self._frozen["norms"]]
        self._hold_modes(pl_module)
        if self._frozen["parameters"]:
            rewrap_ddp(trainer)
        if self._makes_optimizer:
            self._make_optimizer(trainer, pl_module)

    def _hold_modes(self, pl_module: LightningModule) -> None:
        """Keeps frozen batch norms in eval mode; modes are not in a checkpoint, and Lightning sets them at its will."""
        for module, _ in self._modes:
            module.eval()

    def _make_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.optimizer is None:
            with planned_epochs(trainer, self._remaining):
                trainer.strategy.setup_optimizers(trainer)
        else:
            trained = [p for p in pl_module.parameters() if p.requires_grad]
            trainer.strategy.optimizers = [self.optimizer(trained)]
        if self.restart_optimizer:
            return
        optimizer = trainer.strategy.optimizers[0]
        _forget_schedule(optimizer)
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        schedulers = []
        if self.lr_scheduler is not None:
            schedulers.append(LRSchedulerConfig(self.lr_scheduler(optimizer)))
        trainer.strategy.lr_scheduler_configs = schedulers


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


def _forget_schedule(optimizer: Optimizer) -> None:
    """Undoes what a scheduler that is dropped has written into the optimizer when it was made.

    OneCycleLR and CyclicLR also set the momentum; it goes back to what the optimizer was made with.
    """
    for group in optimizer.param_groups:
        if group.get("max_momentum") is not None:
            group.update({key: optimizer.defaults[key] for key in ("momentum", "betas") if key in optimizer.defaults})
        for key in ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"):
            group.pop(key, None)


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
    # Its class and not its type: while training steps are read, it is the user's with a memory.
    batch_sampler: Any = loader.batch_sampler
    if not (hasattr(batch_sampler, "batch_size") and hasattr(batch_sampler, "drop_last")):
        raise TypeError(
            "Expected the train loader's batch sampler to have .batch_size and .drop_last, as torch's BatchSampler has,"
            f" but {batch_sampler.__class__.__name__} has not, so the batches of the clean subset could not be counted."
        )
    if batch_sampler.__class__.__iter__ is BatchSampler.__iter__:
        return
    # Whether it draws what its sampler gives it, seen on a copy that is given one batch of samples.
    few = list(range(batch_size(loader)))
    trial = copy.copy(batch_sampler)
    trial.sampler = few
    with isolate_rng():
        drawn = {index for batch in trial for index in batch}
    if not drawn <= set(few):
        raise TypeError(
            "Expected a batch sampler that draws what its .sampler gives it, but"
            f" {batch_sampler.__class__.__name__} draws other samples too, so it cannot be narrowed to the clean"
            " subset; use DataLoader(shuffle=...)."
        )
