"""Schedules of fresh optimizers: what they have written into parameter groups, and one that falls to zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR


@contextmanager
def before_schedules() -> Iterator[dict[int, dict[str, Any]]]:
    """Note what each parameter group holds before a scheduler that also sets the momentum writes into it.

    Yields:
        the groups' values, by the ``id`` of the group.
    """
    given: dict[int, dict[str, Any]] = {}
    made = {kind: kind.__init__ for kind in (OneCycleLR, CyclicLR)}

    def noting(make: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(make)
        def init(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            for group in getattr(optimizer, "param_groups", ()):
                given.setdefault(id(group), {key: value for key, value in group.items() if key != "params"})
            make(self, optimizer, *args, **kwargs)

        return init

    try:
        for kind, make in made.items():
            kind.__init__ = noting(make)  # type: ignore[method-assign]
        yield given
    finally:
        for kind, make in made.items():
            kind.__init__ = make  # type: ignore[method-assign]


def forget_schedule(optimizer: Optimizer, given: Mapping[int, Mapping[str, Any]], lr: float | None) -> None:
    """Undo the changes that a discarded scheduler made to the optimizer when it was created.

    Entries that only schedulers read are kept, since a fit may resume from a checkpoint without this callback, and so
    with that scheduler.

    Args:
        optimizer: a fresh optimizer.
        given: the contents of its groups before; see :func:`before_schedules`.
        lr: learning rate of each group; None to keep the current ones.
    """
    for group in optimizer.param_groups:
        before = given.get(id(group), {})
        group.update({key: before[key] for key in ("momentum", "betas") if key in before})
        if lr is not None:
            group["lr"] = lr
        if "initial_lr" in group:
            group["initial_lr"] = group["lr"]


class PeakRates:
    """The highest learning rate that each parameter group has had."""

    def __init__(self) -> None:
        self._rates: list[list[float]] = []

    def see(self, optimizers: Sequence[Optimizer]) -> None:
        """Record the learning rates of the next step, except those on a device, which would synchronize with it."""
        rates = [[_rate(group.get("lr")) for group in one.param_groups] for one in optimizers]
        if [len(one) for one in rates] == [len(one) for one in self._rates]:
            pairs = zip(rates, self._rates, strict=True)
            rates = [[max(two) for two in zip(now, before, strict=True)] for now, before in pairs]
        self._rates = rates

    def of(self, optimizers: Sequence[Optimizer]) -> list[list[float]]:
        """Return the peak learning rate of each group of fresh optimizers; its own rate if the groups differ."""
        peaks = self._rates
        if [len(one) for one in peaks] != [len(one.param_groups) for one in optimizers]:
            peaks = [[0.0 for _ in one.param_groups] for one in optimizers]
        return [
            [_peak(group, seen) for group, seen in zip(one.param_groups, of_one, strict=True)]
            for one, of_one in zip(optimizers, peaks, strict=True)
        ]

    def state_dict(self) -> list[list[float]]:
        """Return the state as plain numbers."""
        return [list(rates) for rates in self._rates]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Take over what a checkpoint has."""
        self._rates = [list(rates) for rates in state]


def _rate(value: Any) -> float:
    """Return a learning rate; 0 if it is on a device or not a number."""
    is_elsewhere = getattr(getattr(value, "device", None), "type", "cpu") != "cpu"
    return 0.0 if value is None or is_elsewhere else float(value)


def _peak(group: Mapping[str, Any], seen: float) -> float:
    # A OneCycleLR may not have come to its peak yet.
    return max(seen, _rate(group.get("max_lr"))) or float(group.get("initial_lr", group["lr"]))


def fall_to_zero(
    optimizers: Sequence[Optimizer],
    given: Mapping[int, Mapping[str, Any]],
    peaks: Sequence[Sequence[float]],
    factor: Callable[[int], float],
) -> list[LRScheduler]:
    """Return cosine schedules for fresh optimizers, step by step from their peaks to zero at the end of the fit.

    They go by how much of the fit is over, and so by no number of steps that another partition might change.

    Args:
        optimizers: of the fit.
        given: what their groups held before a schedule that is dropped; see :func:`before_schedules`.
        peaks: of each optimizer and group.
        factor: of the peak, for all steps to come; see :func:`~lightning_unlearn.trainer.optimizers.cosine`.
    """
    schedules: list[LRScheduler] = []
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        forget_schedule(optimizer, given, None)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        schedules.append(LambdaLR(optimizer, factor))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            # Between epochs, how much is over cannot be told; and in a fit that is resumed, its state comes next.
            group["lr"] = rate
    return schedules
