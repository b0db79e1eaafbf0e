"""Optimizers of a checkpoint against those of the fit that resumes from it, and schedules that would end early."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.optimizers import steps_needed
from lightning_unlearn.trainer.running_fit import RunningFit

# What schedules write into parameter groups for themselves.
_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def groups_of(states: Iterable[Mapping[str, Any]]) -> list[list[tuple[int, set[str]]]]:
    """Return, for each optimizer in a checkpoint, the group sizes and the names of the groups' options.

    Args:
        states: the optimizers' ``state_dict``.
    """
    return [
        [(len(group["params"]), set(group) - _OF_SCHEDULES - {"params"}) for group in state.get("param_groups", ())]
        for state in states
    ]


def check_groups(optimizers: Sequence[Optimizer], saved: Sequence[Sequence[tuple[int, set[str]]]]) -> None:
    """Refuse a fresh optimizer that cannot load the optimizer state of a checkpoint.

    Args:
        optimizers: the fresh optimizers.
        saved: :func:`groups_of` the checkpoint; empty if it has none.

    Raises:
        MisconfigurationException: for different parameter groups, or a different kind of optimizer.
    """
    made = groups_of(optimizer.state_dict() for optimizer in optimizers)
    if not saved:
        return
    if _sizes(made) != _sizes(saved):
        raise MisconfigurationException(_other_optimizer(_sizes(saved), _sizes(made)))
    for (_, now), (_, before) in zip(itertools.chain(*made), itertools.chain(*saved), strict=True):
        # Another version of torch may know an option more.
        if now - before and before - now:
            raise MisconfigurationException(
                _other_optimizer(f"options {sorted(before - now)}", f"{sorted(now - before)}")
            )


def take_over(restored: Sequence[Optimizer], made: Sequence[Optimizer]) -> None:
    """Give optimizers that were made anew the states that have been restored into those before them.

    Args:
        restored: as ``configure_optimizers`` has made them, with the states of a checkpoint.
        made: in their place.

    Raises:
        MisconfigurationException: for optimizers of other classes or groups.
    """
    kinds = [[type(one).__name__ for one in optimizers] for optimizers in (restored, made)]
    if kinds[0] != kinds[1]:
        raise MisconfigurationException(
            "Where weights are sharded, the state of a checkpoint is restored into the optimizer that"
            f" configure_optimizers makes, here {', '.join(kinds[0])}, but CleanSubsetFinetuneCallback makes"
            f" {', '.join(kinds[1])}; let optimizer make one of the same class, or resume from a checkpoint from"
            " before the partition."
        )
    check_groups(made, groups_of(one.state_dict() for one in restored))
    for old, new in zip(restored, made, strict=True):
        if new is not old:
            new.load_state_dict(old.state_dict())


def _sizes(optimizers: Sequence[Sequence[tuple[int, set[str]]]]) -> str:
    return f"groups of {[[size for size, _ in groups] for groups in optimizers]} parameters"


def _other_optimizer(before: str, now: str) -> str:
    return (
        f"The optimizer of the checkpoint has {before}, but the one that CleanSubsetFinetuneCallback"
        f" creates has {now}, so its state cannot be loaded. Restore the arguments and"
        " configure_optimizers of that fit, or resume from a checkpoint from before the partition."
    )


def check_steps_left(fit: RunningFit, epochs: int | None, planned_size: int) -> None:
    """Refuse batches of another size with which a schedule of the checkpoint would end before the fit does.

    Such a schedule, a OneCycleLR, ends the fit with an error when it is stepped too often.

    Args:
        fit: with the state of the checkpoint.
        epochs: that remain; None where that is not known.
        planned_size: how many samples a batch of all ranks had before.

    Raises:
        MisconfigurationException: saying how many steps are left, and what to do.
    """
    if epochs is None:
        return
    needed = steps_needed(fit, epochs)
    for config in fit.schedules:
        total = getattr(config.scheduler, "total_steps", None)
        if config.interval != "step" or not isinstance(total, int):
            continue
        left = total - config.scheduler.last_epoch
        if needed // config.frequency > left:
            raise MisconfigurationException(
                f"The {type(config.scheduler).__name__} of the checkpoint has {left} steps left, planned for"
                f" {planned_size} samples per batch, but the rest of the fit takes {needed}. Resume with the batch"
                " size, number of devices and max_epochs of that fit, raise accumulate_grad_batches, or lower"
                " max_epochs."
            )
