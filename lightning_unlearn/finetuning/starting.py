"""Moves the weights to where fine-tuning starts, in a fit with averages, early stopping and pruned neurons."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from lightning_unlearn.attribution import plain_name
from lightning_unlearn.finetuning import messages
from lightning_unlearn.finetuning.warm_start import Memory, Start, StartWeights, WarmStart, choose_start
from lightning_unlearn.trainer.compat import MisconfigurationException, is_lightning_instance
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.early_stopping import count_anew
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.protocols import MaskSource
from lightning_unlearn.trainer.weight_averages import weight_copies


class Starting:
    """Where fine-tuning starts.

    Args:
        asked: ``warm_start``.

    Attributes:
        weights: that the fit began with, until fine-tuning starts.
    """

    def __init__(self, asked: WarmStart) -> None:
        self._asked: WarmStart = asked
        self.weights = StartWeights()

    @property
    def is_asked_for(self) -> bool:
        """Whether weights are to be moved, whatever the network shows."""
        return self._asked in ("shrink", "start")

    @property
    def may_move(self) -> bool:
        """Whether weights may be moved."""
        return self._asked != "keep"

    def check_is_known(self, fit: FitContext) -> None:
        """Refuse a checkpoint without the initial weights of the fit if they are needed.

        Raises:
            MisconfigurationException: if they are missing.
        """
        if self.is_asked_for and fit.step > 0 and not self.weights.is_known:
            raise MisconfigurationException(
                f"CleanSubsetFinetuneCallback(warm_start='{self._asked}') needs the initial weights of the fit,"
                " but the checkpoint lacks them: it was saved without this setting, or they were more than 4 GiB of"
                " shards. Set warm_start='keep', or"
                " train without ckpt_path."
            )

    def remember(self, fit: FitContext, batch_idx: int, *, is_wanted: bool) -> None:
        """Keep the initial weights of the fit as long as they may be needed. Call before each step."""
        is_time = fit.step == 0 or (self.weights.is_known and batch_idx == 0)
        if is_time and is_wanted and not _obstacle(fit):
            self.weights.remember(fit.model)

    def forget(self) -> None:
        """Keep no weights from now on."""
        self.weights.forget()

    def state_dict(self, fit: FitContext | None) -> dict[str, Tensor] | None:
        """Return the weights that the fit began with; where they are sharded, every rank must call it.

        Args:
            fit: that is running; None outside of one.
        """
        return self.weights.state_dict(fit.model if fit is not None and fit.is_sharded else None)

    def choose(self, fit: FitContext, *, is_dry_run: bool = False) -> Start:
        """Return what fine-tuning starts from."""
        obstacle = _obstacle(fit)
        if not obstacle and not self.weights.is_known and not is_dry_run:
            obstacle = "the checkpoint lacks the initial weights of the fit"
        return choose_start(self._asked, _memory(fit), obstacle)

    def move(
        self,
        fit: FitContext,
        how: str,
        frozen: Collection[str],
        masks: MaskSource | None,
        undoing: list[Callable[[], None]],
    ) -> int:
        """Move the weights and their averages.

        Args:
            fit: the running fit.
            how: ``"shrink"`` or ``"start"``.
            frozen: names of parameters and norms that are not moved.
            masks: keeps pruned neurons at zero.
            undoing: list to which functions that undo the move are appended.

        Returns:
            the number of weights that were moved.
        """
        changed, undo = self.weights.move(fit.model, how, weight_copies(fit), frozen)
        undoing.append(undo)
        flags = torch.tensor([float(is_changed) for is_changed in changed.values()])
        anywhere = dict(zip(changed, (fit.reduce(flags) if fit.is_sharded else flags) > 0, strict=True))
        own = ((plain_name(name), parameter) for name, parameter in fit.model.named_parameters())
        moved = sum(parameter.numel() for name, parameter in own if anywhere.get(name, False))
        if masks is not None:
            masks.zero_pruned()
        undoing.append(count_anew(fit))
        return moved

    def say(self, fit: FitContext, start: Start, moved: int, precision: float | None) -> None:
        """Log the expected gain, and what fine-tuning starts from.

        Args:
            fit: the running fit.
            start: the chosen start.
            moved: number of weights that were moved.
            precision: expected share of wrong samples among the suspects; None if unknown.
        """
        rank_zero_info(messages.prospect(_memory(fit), start, precision, fit.limits.remaining_epochs))
        if start.because or start.moves:
            rank_zero_info(messages.start_of(start, moved))


def _memory(fit: FitContext) -> Memory:
    return Memory(fit.source.memorized, fit.source.accuracy_gap)


def _obstacle(fit: FitContext) -> str:
    """Return why weights and optimizer are kept by default; empty if they need not be."""
    other = next((callback for callback in fit.callbacks if is_lightning_instance(callback, "BaseFinetuning")), None)
    return "" if other is None else f"{type(other).__name__} manages the current optimizer"
