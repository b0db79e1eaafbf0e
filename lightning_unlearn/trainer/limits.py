"""Progress, limits and monitored metric of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.fit_loop import is_fast_dev_run


@dataclass(frozen=True)
class TrainingLimits:
    """Progress and limits of a fit.

    Args:
        epoch: number of complete epochs.
        step: number of optimizer steps so far.
        max_epochs: None, or less than 0, for any number.
        max_steps: less than 1 for any number.
        share_of_time: elapsed fraction of the Trainer's ``max_time``, in [0, 1]; 0 without one.
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
        """Number of remaining epochs, including the current one; None without a limit."""
        return None if self.max_epochs in (None, -1) else self.max_epochs - self.epoch


def limits_of(trainer: Trainer) -> TrainingLimits:
    """Return the progress and limits of a Trainer's fit."""
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
