"""How far a fit has come, what ends it, and what is monitored in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.fit_loop import is_fast_dev_run


@dataclass(frozen=True)
class TrainingLimits:
    """How far a fit has come, and what ends it.

    Args:
        epoch: how many epochs are complete.
        step: how many optimizer steps have been made.
        max_epochs: None, or less than 0, for any number.
        max_steps: less than 1 for any number.
        share_of_time: how much of the Trainer's ``max_time`` is over, in [0, 1]; 0 without one.
        is_trial: whether the Trainer only runs a few batches (``fast_dev_run``).
    """

    epoch: int = 0
    step: int = 0
    max_epochs: int | None = None
    max_steps: int = -1
    share_of_time: float = 0.0
    is_trial: bool = False

    @property
    def remaining_epochs(self) -> int | None:
        """How many are left, the current one among them; None without a last one."""
        return None if self.max_epochs in (None, -1) else self.max_epochs - self.epoch


def limits_of(trainer: Trainer) -> TrainingLimits:
    """Return how far a Trainer has come, and what ends its fit."""
    return TrainingLimits(
        trainer.current_epoch,
        trainer.global_step,
        trainer.max_epochs,
        trainer.max_steps,
        _share_of_time(trainer),
        is_fast_dev_run(trainer),
    )


def _share_of_time(trainer: Trainer) -> float:
    for callback in callbacks_of(trainer):
        if is_lightning_instance(callback, "Timer") and callback.time_remaining() is not None:
            elapsed, remaining = callback.time_elapsed(), callback.time_remaining()
            return float(elapsed / max(elapsed + remaining, 1e-9))
    return 0.0


def monitored(trainer: Trainer) -> float:
    """Return the metric that EarlyStopping or a ModelCheckpoint monitors, larger is better; NaN if none does."""
    found = [
        one
        for kind in ("EarlyStopping", "ModelCheckpoint")
        for one in callbacks_of(trainer)
        if is_lightning_instance(one, kind)
    ]
    for callback in found:
        value = trainer.callback_metrics.get(callback.monitor) if callback.monitor else None
        if value is not None:
            return float(value) * (1 if callback.mode == "max" else -1)
    return math.nan
