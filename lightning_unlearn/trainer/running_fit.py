"""Access to a fit that is being set up or running."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import has_own
from lightning_unlearn.trainer.fit_loop import (
    compute_device,
    limited_batches,
    live_iterator,
    live_loaders,
    log_values,
    next_epoch,
    rewrap_ddp,
    validation_loaders,
)
from lightning_unlearn.trainer.isolation import isolated_eval
from lightning_unlearn.trainer.limits import TrainingLimits, limits_of, monitored
from lightning_unlearn.trainer.memory import FitMemory
from lightning_unlearn.trainer.scoring_loader import offers_scoring_loader, scoring_loader, train_loader
from lightning_unlearn.trainer.strategies import shards_weights
from lightning_unlearn.trainer.train_data import to_device, users_sampler
from lightning_unlearn.utilities.distributed import run_on_rank_zero, sum_over_ranks
from lightning_unlearn.utilities.exchange import Exchange, exchange_over_ranks
from lightning_unlearn.utilities.reduce import Reduce

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class RunningFit:
    """Interface of a fit that is being set up or running, used in place of Lightning's objects.

    Args:
        trainer: the Trainer.
        pl_module: the user's LightningModule.
        memory: state shared between hooks.
    """

    trainer: Trainer
    pl_module: LightningModule
    memory: FitMemory = field(default_factory=FitMemory, kw_only=True)

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.pl_module

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self.trainer.current_epoch

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return self.trainer.global_step

    @property
    def limits(self) -> TrainingLimits:
        """Progress and limits of the fit."""
        return limits_of(self.trainer)

    @property
    def batches_per_epoch(self) -> int | float:
        """Number of training batches in an epoch."""
        return self.trainer.num_training_batches

    @property
    def monitored(self) -> float:
        """A monitored metric; see :func:`~lightning_unlearn.trainer.limits.monitored`."""
        return monitored(self.trainer)

    @property
    def device(self) -> torch.device:
        """Device of the fit."""
        return compute_device(self.trainer)

    @property
    def rank(self) -> int:
        """Rank of this process, counted from 0."""
        return self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.trainer.world_size

    @property
    def is_sharded(self) -> bool:
        """Whether weights are sharded, so that every forward pass is a collective operation."""
        return shards_weights(self.trainer)

    @property
    def strategy_name(self) -> str:
        """The name of the strategy's class."""
        return type(self.trainer.strategy).__name__

    @property
    def reduce(self) -> Reduce:
        """Function that sums tensors over the ranks."""
        return sum_over_ranks(self.trainer.strategy)

    @property
    def exchange(self) -> Exchange:
        """Function that sends a part to each rank and receives one from each."""
        return exchange_over_ranks(self.trainer.strategy.root_device, self.world_size)

    def agree(self, decision: bool, *, of_all: bool) -> bool:
        """Return whether the decision is True on all ranks, or on any. Every rank must call it."""
        return self.trainer.strategy.reduce_boolean_decision(decision, all=of_all)

    def broadcast(self, value: _Value) -> _Value:
        """Return rank 0's value. Every rank must call it."""
        return self.trainer.strategy.broadcast(value)

    def on_rank_zero(self, function: Callable[[], _Value]) -> _Value:
        """Call a function on rank 0; return its result or raise its error on all ranks. Every rank must call it."""
        return run_on_rank_zero(self.trainer.strategy, function)

    @property
    def callbacks(self) -> list[Any]:
        """All callbacks of the Trainer."""
        return callbacks_of(self.trainer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Optimizers of the fit, once it has started."""
        return self.trainer.optimizers

    @property
    def schedules(self) -> list[Any]:
        """Learning rate schedules in Lightning's configuration, with ``scheduler``, ``interval`` and ``frequency``."""
        return list(self.trainer.lr_scheduler_configs)

    @property
    def optimizes_automatically(self) -> bool:
        """Whether Lightning steps the optimizers."""
        return self.pl_module.automatic_optimization

    @property
    def steps_own_schedules(self) -> bool:
        """Whether the module overrides ``lr_scheduler_step``, which other schedules may not fit."""
        return has_own(self.pl_module, "lr_scheduler_step")

    def rewrap_ddp(self) -> None:
        """Tell DDP that ``requires_grad`` has changed; see :func:`~lightning_unlearn.trainer.fit_loop.rewrap_ddp`."""
        rewrap_ddp(self.trainer)

    @property
    def given_loaders(self) -> Any:
        """The train loader, or the collection of several, as the user gave it."""
        return self.trainer.train_dataloader

    @property
    def train_loader(self) -> DataLoader[Any]:
        """The loader that the fit draws from, if its samples have an index."""
        return train_loader(self.trainer)

    @property
    def scoring_loader(self) -> DataLoader[Any]:
        """The loader whose dataset, transforms and collate function evaluation passes use."""
        return scoring_loader(self)

    @property
    def offers_scoring_loader(self) -> bool:
        """Whether the user provides a loader for evaluation passes."""
        return offers_scoring_loader(self.trainer)

    @property
    def total(self) -> int:
        """Number of training samples, N."""
        return len(self.train_loader.dataset)  # type: ignore[arg-type]  # its length has been checked

    def shard(self, total: int) -> tuple[Tensor, Tensor]:
        """Return this rank's shard of ``total`` samples; see :func:`~lightning_unlearn.data.loaders.shard_indices`."""
        return shard_indices(total, self.rank, self.world_size)

    @property
    def validates(self) -> bool:
        """Whether the fit has validation."""
        return self.trainer.enable_validation

    @property
    def has_validation_data(self) -> bool:
        """Whether its validation data have been loaded."""
        return self.trainer.val_dataloaders is not None

    def validation_loaders(self) -> list[tuple[Any, int | None]]:
        """Return its validation loaders; see :func:`~lightning_unlearn.trainer.fit_loop.validation_loaders`."""
        return validation_loaders(self.trainer)

    def live_loaders(self) -> list[Any]:
        """Return the train loaders in use; see :func:`~lightning_unlearn.trainer.fit_loop.live_loaders`."""
        return live_loaders(self.trainer)

    def live_iterator(self) -> tuple[Any, int]:
        """Return where the batch in hand came from; see :func:`~lightning_unlearn.trainer.fit_loop.live_iterator`."""
        return live_iterator(self.trainer)

    @property
    def next_epoch(self) -> int:
        """The epoch that Lightning gives the samplers next."""
        return next_epoch(self.trainer)

    def limited_batches(self, batches: int) -> int:
        """Return how many batches of a train loader are used in an epoch."""
        return limited_batches(self.trainer, batches)

    def users_sampler(self, loader: DataLoader[Any], drawn_from: Any, own: Any) -> tuple[Any, bool]:
        """Return what a loader draws from; see :func:`~lightning_unlearn.trainer.train_data.users_sampler`."""
        return users_sampler(self.trainer, loader, drawn_from, own)

    def to_device(self, batch: Any) -> Any:
        """Convert and transfer a batch as for ``training_step``."""
        return to_device(self.trainer, self.pl_module, batch)

    def isolated_eval(self, *, keep: bool = True) -> AbstractContextManager[None]:
        """Run a pass that leaves the fit as it was; see :func:`~lightning_unlearn.trainer.isolation.isolated_eval`."""
        return isolated_eval(self, keep=keep)

    def log(self, values: dict[str, float]) -> None:
        """Log scalars that are equal on every rank, through the Trainer's loggers."""
        log_values(self.pl_module, values)
