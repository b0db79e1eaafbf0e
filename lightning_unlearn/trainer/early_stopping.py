"""Compute the partition when EarlyStopping fires on all data, and train the clean subset for the remaining epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.progress import rank_zero_info

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


class EarlyEnd:
    """Delay the end of a fit by EarlyStopping until the start of the next epoch, when the partition is computed.

    EarlyStopping checks its metric after all other callbacks at the end of an epoch, and the fit loop ends right after
    it. ``min_epochs`` is raised by one epoch in the meantime.
    """

    def __init__(self) -> None:
        self._min_epochs: int | None = None
        self._is_held = False

    def hold(self, trainer: Trainer) -> None:
        """Prevent the fit from ending before the start of the next epoch. Call in ``on_train_epoch_end``."""
        stoppers, epoch = _stoppers(callbacks_of(trainer)), trainer.current_epoch
        # The same on every rank, unlike how often each has waited.
        is_theirs = not trainer.should_stop or any(one.stopped_epoch == epoch for one in stoppers)
        if self._is_held or not stoppers or not is_theirs:
            return
        self._is_held, self._min_epochs = True, trainer.fit_loop.min_epochs
        trainer.fit_loop.min_epochs = max(self._min_epochs or 0, epoch + 2)

    def release(self, trainer: Trainer) -> bool:
        """Return whether the fit was held and should end now. May be called at any time and repeatedly."""
        if not self._is_held:
            return False
        trainer.fit_loop.min_epochs = self._min_epochs
        self._is_held, self._min_epochs = False, None
        epochs, steps = trainer.min_epochs or 0, trainer.min_steps or 0
        return trainer.should_stop and trainer.current_epoch >= epochs and trainer.global_step >= steps


def _stoppers(callbacks: Iterable[Any]) -> list[Any]:
    return [callback for callback in callbacks if is_lightning_instance(callback, "EarlyStopping")]


def has_fired(fit: RunningFit, epoch: int) -> bool:
    """Return whether the patience of an EarlyStopping ran out in an epoch, on this rank."""
    return any(
        one.stopped_epoch == epoch and one.wait_count >= max(1, one.patience) for one in _stoppers(fit.callbacks)
    )


def may_end_early(fit: RunningFit) -> bool:
    """Return whether an EarlyStopping may end the fit before its limits do."""
    return bool(_stoppers(fit.callbacks))


def _patience_in_words(stoppers: Iterable[Any]) -> str:
    return " and ".join(f"patience={one.patience} on '{one.monitor}'" for one in stoppers)


def go_on(fit: RunningFit) -> None:
    """Continue a fit that EarlyStopping has ended."""
    stoppers = _stoppers(fit.callbacks)
    for callback in stoppers:
        callback.wait_count = 0
    fit.trainer.should_stop = False
    rank_zero_info(
        "EarlyStopping would have ended training on all data here. Training continues on the clean subset, and"
        f" EarlyStopping counts from zero again ({_patience_in_words(stoppers)})."
    )


def count_anew(fit: RunningFit) -> Callable[[], None]:
    """Reset the patience and best score of EarlyStopping after the weights have been changed.

    Changed weights are worse than the best so far at first, which would end the fit before they are trained. The best
    score of a ModelCheckpoint is kept, since it is that of the whole fit.

    Returns:
        a function that undoes the reset.
    """
    stoppers = _stoppers(fit.callbacks)
    before = [(one, one.best_score, one.wait_count) for one in stoppers]
    for one in stoppers:
        worst = torch.inf if one.monitor_op is torch.lt else -torch.inf
        one.best_score, one.wait_count = torch.full_like(torch.as_tensor(one.best_score), worst), 0

    def undo() -> None:
        for stopper, best, waited in before:
            stopper.best_score, stopper.wait_count = best, waited

    if before:
        rank_zero_info(
            f"EarlyStopping counts from zero again ({_patience_in_words(stoppers)}) without the best score so far,"
            " since moved weights are worse at first."
        )
    return undo
