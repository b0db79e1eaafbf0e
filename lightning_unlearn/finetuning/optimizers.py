"""The fresh optimizer of fine-tuning, and its check against a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_unlearn.finetuning.optimizer_checks import check_groups, groups_of, take_over
from lightning_unlearn.finetuning.schedules import (
    PeakRates,
    before_schedules,
    fall_to_zero,
    forget_schedule,
)
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.early_stopping import may_end_early
from lightning_unlearn.trainer.optimizers import (
    cosine,
    forget_states,
    left_out,
    put_optimizers,
    put_schedules,
    run_configure_optimizers,
    share_over,
)
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.trainer.running_fit import RunningFit
from lightning_unlearn.utilities.calls import check_function

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

# What makes the optimizer where weights were moved and nothing was asked for.
_COSINE = "warm_start"
_RESTART = "restart"


class FreshOptimizer:
    """Creates a fresh optimizer for fine-tuning, if configured or if weights were moved.

    Args:
        lr: constant learning rate of a fresh optimizer; None for none.
        optimizer: function from the trainable parameters to the optimizer; None for ``configure_optimizers``;
            ``"restart"`` to rerun it with its schedules.
        lr_scheduler: function from the optimizer to its scheduler.

    Attributes:
        remaining: number of epochs that remained when fine-tuning started; None if unknown.

    Raises:
        ValueError: for incompatible arguments.
    """

    def __init__(
        self,
        lr: float | None,
        optimizer: MakeOptimizer | Literal["restart"] | None,
        lr_scheduler: MakeScheduler | None,
    ) -> None:
        restart = isinstance(optimizer, str) and optimizer == _RESTART
        make: Any = None if restart else optimizer
        if make is not None:
            check_function("optimizer", make, "from parameters to an optimizer, as torch.optim.AdamW, or 'restart'")
        if lr_scheduler is not None:
            check_function("lr_scheduler", lr_scheduler, "from an optimizer to its schedule")
        if lr_scheduler is not None and lr is None and make is None:
            raise ValueError("lr_scheduler needs lr or optimizer: it schedules a fresh optimizer.")
        if restart and lr is not None:
            raise ValueError(
                "optimizer='restart' cannot be combined with lr, which creates a fresh optimizer anyway. Leave"
                " one of them out."
            )
        self._lr, self._lr_scheduler, self._restart = lr, lr_scheduler, restart
        self._optimizer: MakeOptimizer | None = make
        self.reset()

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.peaks = PeakRates()
        self.forget()
        # What it looks like in the checkpoint that a fit goes on from.
        self._saved_groups: list[list[tuple[int, set[str]]]] = []

    def forget(self) -> None:
        """Discard the fresh optimizer."""
        # Which argument has made it, and whether lr_scheduler its schedule.
        self._made_by, self._is_scheduled = "", False
        self.remaining: int | None = None
        self._since = 0, 0
        self._has_warned = False

    @property
    def is_asked_for(self) -> bool:
        """Whether an argument asks for it."""
        return self._lr is not None or self._optimizer is not None or self._restart

    @property
    def _asked(self) -> tuple[str, bool]:
        """Which argument makes it, empty for none; and whether ``lr_scheduler`` makes its schedule."""
        made_by = {_RESTART: self._restart, "lr": self._lr is not None}
        made_by["optimizer"] = self._optimizer is not None
        return next((name for name in reversed(made_by) if made_by[name]), ""), self._lr_scheduler is not None

    def keeps_plan(self, fit: RunningFit) -> bool:
        """Return whether a schedule of steps was planned for the first subset, which later ones must not overrun."""
        return self._made_by != _COSINE and any(c.interval == "step" for c in fit.schedules)

    def see(self, optimizers: Sequence[Optimizer]) -> None:
        """Record the learning rates of the fit, unless others are configured. Call before each step."""
        if not self.is_asked_for:
            self.peaks.see(optimizers)

    def check(self) -> None:
        """Refuse early a scheduler that could not be stepped later."""
        if self._lr_scheduler is None:
            return
        try:
            trial = self._lr_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))
        except Exception:  # it may need more than a stand-in has; the real one is made when fine-tuning starts
            return
        if isinstance(trial, ReduceLROnPlateau):
            raise ValueError(
                "Expected lr_scheduler to return a scheduler that is stepped without a metric, but got a"
                " ReduceLROnPlateau. Use another scheduler, or optimizer='restart' with a configure_optimizers"
                " that returns it."
            )

    def check_one(self, fit: RunningFit) -> None:
        """Refuse to replace several optimizers by one.

        Raises:
            MisconfigurationException: with their number.
        """
        if self.is_asked_for and not self._restart and len(fit.optimizers) != 1:
            raise MisconfigurationException(
                "CleanSubsetFinetuneCallback can replace a single optimizer, but the module has"
                f" {len(fit.optimizers)}. Leave out lr, optimizer and lr_scheduler to keep them."
            )

    def begin(self, fit: RunningFit, *, moves: bool) -> None:
        """Decide how the optimizer is created when fine-tuning starts.

        Args:
            fit: the running fit.
            moves: whether weights are moved, so that the optimizer state no longer matches.
        """
        self._since, self.remaining = (fit.epoch, fit.step), fit.limits.remaining_epochs
        self._made_by, self._is_scheduled = self._asked
        if moves and not self._made_by:
            self._made_by = _remade_by(fit, self._since)

    def given(self) -> dict[str, bool]:
        """Return whether each argument was given."""
        return {"lr": self._lr is not None, "optimizer": self._optimizer is not None or self._restart}

    def make(self, fit: RunningFit) -> str:
        """Create the optimizer if decided, and return a message for the log, or an empty string."""
        if not self._made_by:
            return ""
        before, scheduled = list(fit.optimizers), _schedules_of(fit)
        with before_schedules() as given:
            if self._made_by != "optimizer" or self._optimizer is None:
                run_configure_optimizers(fit, self.remaining)
            else:
                trained = [p for p in fit.model.parameters() if p.requires_grad]
                put_optimizers(fit, [self._optimizer(trained)])
        missing = left_out(before, fit.optimizers)
        if is_kept := bool(missing) and self._made_by == _COSINE:
            put_optimizers(fit, before)
        elif missing:
            rank_zero_warn(
                f"configure_optimizers, called again for fine-tuning, leaves out {missing:,} parameters that were"
                " trained until now (a parameter group added later), so they are no longer trained. Return them"
                " from configure_optimizers too, or leave out lr and optimizer."
            )
        # A module may return the same one again.
        forget_states(one for one in before if any(one is other for other in fit.optimizers))
        if self._made_by == _RESTART:
            return ""
        if self._made_by == _COSINE:
            return self._fall_to_zero(fit, given, scheduled | _schedules_of(fit), is_kept=is_kept)
        optimizer = fit.optimizers[0]
        forget_schedule(optimizer, given, self._lr)
        _check_rates(optimizer)
        schedules = []
        if self._is_scheduled and self._lr_scheduler is not None:
            schedules.append(self._lr_scheduler(optimizer))
        put_schedules(fit, schedules, "epoch")
        return ""

    def _fall_to_zero(
        self, fit: RunningFit, given: Mapping[int, Mapping[str, Any]], replaced: set[str], *, is_kept: bool
    ) -> str:
        """Schedule a fresh optimizer, or one that is kept without its state, and return the log message."""
        peaks = self.peaks.of(fit.optimizers)
        put_schedules(fit, fall_to_zero(fit.optimizers, given, peaks, cosine(fit, *self._since)), "step")
        if not peaks:
            return ""
        instead = f", in place of {' and '.join(sorted(replaced))}" if replaced else ""
        made = "Reran configure_optimizers, since the optimizer state belongs to the old weights."
        if is_kept:
            made = (
                "The optimizer state is reset, since it belongs to the old weights; all parameter groups are kept"
                " (configure_optimizers leaves out some that were added later)."
            )
        return (
            f"{made} The learning rate follows a cosine from {max(max(rates) for rates in peaks):.3g} to zero at the"
            f" end of the fit{instead}.{_planned_in_words(fit)}"
        )

    def check_used(self, fit: RunningFit, optimizer: Optimizer) -> None:
        """Warn once if a step uses an optimizer that was replaced. Call before each step."""
        if not self._made_by or self._has_warned or any(optimizer is one for one in fit.optimizers):
            return
        self._has_warned = True
        rank_zero_warn(
            "training_step uses an optimizer that was replaced when fine-tuning started, so the learning rate"
            " and schedule of fine-tuning do not apply to it. Call self.optimizers() in training_step instead"
            " of keeping a reference."
        )

    def load_groups(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Note what the optimizers of a checkpoint look like, by their states."""
        self._saved_groups = groups_of(states)

    def check_goes_on(self) -> None:
        """Refuse to resume without the functions that created the checkpoint's optimizer and scheduler."""
        needed = {"optimizer": self._made_by == "optimizer" and self._optimizer is None}
        needed["lr_scheduler"] = self._is_scheduled and self._lr_scheduler is None
        missing = [name for name, is_missing in needed.items() if is_missing]
        if missing:
            raise MisconfigurationException(
                f"The checkpoint was fine-tuned with {' and '.join(missing)}, but CleanSubsetFinetuneCallback does"
                " not set it. Pass the same settings again, or resume from a checkpoint from before the"
                " partition."
            )

    def make_again(self, fit: RunningFit) -> None:
        """Make it for a fit that resumes, ready to take over the state that the checkpoint has.

        Raises:
            MisconfigurationException: for one that cannot.
        """
        before = list(fit.optimizers)
        self.make(fit)
        if not self._made_by:
            return
        if fit.is_sharded:
            # There Lightning restores optimizers with the weights, before this one is made.
            take_over(before, fit.optimizers)
        else:
            check_groups(fit.optimizers, self._saved_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives."""
        return {
            "made_by": self._made_by,
            "is_scheduled": self._is_scheduled,
            "remaining": self.remaining,
            "peaks": self.peaks.state_dict(),
            "first_step": self._since[1],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, is_active: bool) -> None:
        """Take over what a checkpoint has.

        Args:
            state: of the callback.
            is_active: whether fine-tuning had begun.
        """
        # Absent in checkpoints of before it was kept.
        asked = self._asked if is_active else ("", False)
        self._made_by, self._is_scheduled = state.get("made_by", asked[0]), state.get("is_scheduled", asked[1])
        self.remaining = state["remaining"]
        self.peaks.load_state_dict(state.get("peaks", ()))
        self._since = state["first_epoch"], state.get("first_step", 0)


def _remade_by(fit: RunningFit, since: tuple[int, int]) -> str:
    """Return how the optimizer is recreated by default after weights are moved."""
    obstacles = {
        "the module uses manual optimization": not fit.optimizes_automatically,
        "the module overrides lr_scheduler_step, which may not fit another schedule": fit.steps_own_schedules,
        "neither max_epochs nor max_steps gives the number of steps left": share_over(fit, *since) is None,
    }
    why = next((words for words, is_so in obstacles.items() if is_so), "")
    if not why:
        return _COSINE
    rank_zero_info(f"Reran configure_optimizers, and its schedules restart: {why}.")
    return _RESTART


def _schedules_of(fit: RunningFit) -> set[str]:
    """Return the names of the schedules' classes: those of callbacks too, as of SWA."""
    return {type(config.scheduler).__name__ for config in fit.schedules}


def _planned_in_words(fit: RunningFit) -> str:
    """Return for which end of the fit a schedule is planned, in a sentence; empty where nothing ends it sooner."""
    if not may_end_early(fit):
        return ""
    limits = {"max_epochs": fit.limits.max_epochs, "max_steps": fit.limits.max_steps}
    planned = " and ".join(f"{name}={limit}" for name, limit in limits.items() if limit is not None and limit > 0)
    return f" That is planned for {planned}: EarlyStopping may end the fit sooner, at a higher rate."


def _check_rates(optimizer: Optimizer) -> None:
    """Refuse learning rates with which no weight would stay finite.

    Raises:
        ValueError: naming the rate.
    """
    for group in optimizer.param_groups:
        if not math.isfinite(float(group["lr"])):
            raise ValueError(f"Expected optimizer to make one with finite learning rates, but got lr={group['lr']}.")
