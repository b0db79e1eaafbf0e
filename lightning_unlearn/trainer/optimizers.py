"""Recreate and restore the optimizers and schedules of a fit, and measure its progress."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_unlearn.trainer.fit_loop import planned_epochs

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


def run_configure_optimizers(fit: RunningFit, remaining: int | None) -> None:
    """Recreate optimizers and schedules with ``configure_optimizers``.

    Args:
        fit: the running fit.
        remaining: number of epochs for which schedules are planned; None for the Trainer's.
    """
    with planned_epochs(fit.trainer, remaining):
        fit.trainer.strategy.setup_optimizers(fit.trainer)


def put_optimizers(fit: RunningFit, optimizers: Sequence[Optimizer]) -> None:
    """Replace the optimizers."""
    fit.trainer.strategy.optimizers = list(optimizers)


def put_schedules(fit: RunningFit, schedules: Sequence[LRScheduler], interval: str) -> None:
    """Replace the schedules.

    Args:
        fit: the running fit.
        schedules: schedules of the optimizers.
        interval: ``"epoch"`` or ``"step"``, how often to step them.
    """
    made = [LRSchedulerConfig(one, interval=interval) for one in schedules]
    fit.trainer.strategy.lr_scheduler_configs = made


def keep_optimizers(fit: RunningFit) -> Callable[[], None]:
    """Return a function that restores the current optimizers and schedules with their states."""
    strategy = fit.trainer.strategy
    optimizers, schedules = strategy.optimizers, strategy.lr_scheduler_configs
    held = [(one, one.state, [dict(group) for group in one.param_groups]) for one in optimizers]

    def put_back() -> None:
        strategy.optimizers, strategy.lr_scheduler_configs = optimizers, schedules
        for one, state, groups in held:
            one.state = state
            for group, before in zip(one.param_groups, groups, strict=True):
                group.clear()
                group.update(before)

    return put_back


def forget_states(optimizers: Iterable[Optimizer]) -> None:
    """Reset the states of optimizers to those before the first step."""
    for one in optimizers:
        one.state = _first_state(one)


def _first_state(optimizer: Optimizer) -> Any:
    # Some have one from the start, as Adagrad.
    try:
        return type(optimizer)([dict(group) for group in optimizer.param_groups]).state  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return defaultdict(dict)


def left_out(before: Iterable[Optimizer], now: Iterable[Optimizer]) -> int:
    """Return the number of elements of trained parameters in the optimizers before that are missing now."""
    held = {id(parameter) for one in now for group in one.param_groups for parameter in group["params"]}
    trained = {id(p): p for one in before for group in one.param_groups for p in group["params"] if p.requires_grad}
    return sum(parameter.numel() for key, parameter in trained.items() if key not in held)


def steps_needed(fit: RunningFit, epochs: int) -> int:
    """Return the number of optimizer steps in the rest of a fit.

    Args:
        fit: the fit, after its checkpoint was loaded.
        epochs: number of remaining epochs, including the current one.
    """
    trainer = fit.trainer
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = 0 if progress.is_last_batch else progress.current.completed
    accumulated = trainer.accumulate_grad_batches
    needed = epochs * math.ceil(trainer.num_training_batches / accumulated) - done // accumulated
    return min(needed, trainer.max_steps - trainer.global_step) if trainer.max_steps > 0 else needed


def share_over(fit: RunningFit, epoch: int, step: int) -> float | None:
    """Return how much is over of what was to come at a moment of the fit; None where it is not known how much that is.

    Args:
        fit: whose limits count as they are now.
        epoch: the first of what was to come, counted from 0.
        step: how many optimizer steps had been made.
    """
    return _share_over(fit.trainer, epoch, step)


def cosine(fit: RunningFit, epoch: int, step: int) -> Callable[[int], float]:
    """Return a factor that falls by a cosine from 1 to 0 when the fit ends, as :func:`share_over` counts."""
    # Not a function of this fit's, which could not be pickled, nor an object, whose state a checkpoint would have; and
    # of the Trainer, which outlives the context of a fit.
    return functools.partial(_cosine, fit.trainer, epoch, step)


def _share_over(trainer: Trainer, epoch: int, step: int) -> float | None:
    shares = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batches, done = trainer.num_training_batches, getattr(current, "processed", 0)
        # Lightning counts more where a fit goes on from a checkpoint of an exception, with the epoch before in it.
        within = min(1.0, done / batches) if batches else 0.0
        shares.append((trainer.current_epoch + within - epoch) / max(1, trainer.max_epochs - epoch))
    if trainer.max_steps > 0:
        shares.append((trainer.global_step - step) / max(1, trainer.max_steps - step))
    return min(max(*shares, 0.0), 1.0) if shares else None


def _cosine(trainer: Trainer, epoch: int, step: int, _: int) -> float:
    share = _share_over(trainer, epoch, step)
    return 1.0 if share is None else (1 + math.cos(math.pi * share)) / 2
