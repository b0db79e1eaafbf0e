"""Noise rate from the training steps of the first epochs, before the network has learned the labels."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.margin_noise import prequential_margin_rate
from lightning_unlearn.functional.prequential import (
    PARTS,
    PrequentialRate,
    class_shift,
    following,
    prequential_rate,
)
from lightning_unlearn.recipes.classes import is_exact, with_coordinates
from lightning_unlearn.utilities.reduce import Reduce

MOST_EPOCHS = 6
"""Number of epochs within which the network must have stopped learning fast."""

_SCALE = 255  # of positions
_FEWEST = 2  # classes
_HALVINGS = 40
_MOST_DRAWS = 1e4  # of a sample in an epoch, on average


class EarlyEpochs:
    """Estimate the noise rate in the earliest epoch in which the network no longer learns fast.

    The estimate is confirmed by that of the next epoch.

    Attributes:
        rate: estimate from the epochs so far; None before the first.
        drawn: (C,) float64, number of draws of samples of each class in the epoch.
    """

    def __init__(self) -> None:
        self.rate: PrequentialRate | None = None
        self.drawn: Tensor | None = None

    def is_due(self, epoch: int) -> bool:
        """Return whether an estimate from this epoch, counted from 1, is needed."""
        return epoch <= MOST_EPOCHS and not (self.rate is not None and self.rate.is_confirmed)

    def look(
        self,
        trajectory: TrainingDynamics,
        positions: Tensor,
        batches: float,
        share: tuple[Tensor, Tensor],
        device: torch.device,
        reduce: Reduce,
    ) -> None:
        """Update the estimate with an epoch whose evidence is not yet merged. Every rank must call it.

        Args:
            trajectory: evidence, including the rows observed in this epoch.
            positions: (N,) uint8, the position in the epoch at which each sample was last drawn, from 1 to 255; 0 if it
                was not drawn.
            batches: number of batches in the epoch.
            share: rows of the trajectory (n,), the same number on every rank, and their weights (n,), 0 for padding.
            device: device to compute on.
            reduce: sums over the ranks.
        """
        index, weight = share
        coordinates, count = trajectory.fresh(index)
        label, place = trajectory.label[index], positions[index]
        position = torch.where(place > 0, (place.float() - 1) / _SCALE, -1.0)
        counts = (count > 0) & (weight > 0) & (label >= 0) & (position >= 0)
        of_classes = torch.zeros(2, trajectory.num_classes, dtype=torch.float64)
        each = torch.stack([count[counts].double(), torch.ones_like(count[counts]).double()])
        drawn, seen = reduce(of_classes.index_add_(1, label[counts], each))
        present = ((drawn > 0) & with_coordinates(trajectory.basis)).nonzero().flatten()
        parts = int(max(1, min(PARTS, batches)))
        if trajectory.has_margins:
            self._look_at_margins(trajectory, coordinates, (position, counts), drawn, parts, device, reduce)
            return
        if len(present) < _FEWEST or not is_exact(trajectory.basis) or not _is_whole(position[counts], parts, reduce):
            return
        place = torch.zeros(trajectory.num_classes, dtype=torch.int64)
        place[present] = torch.arange(len(present))
        given = held_by_class(seen[present], drawn[present])
        favored = -class_shift(given, drawn[present])
        found = prequential_rate(
            (torch.where(counts.unsqueeze(1), coordinates, 0) @ trajectory.basis[present].T).to(device),
            place[label.clamp(min=0)].to(device),
            position.clamp(min=0).to(device),
            (counts * (given / seen[present])[place[label.clamp(min=0)]]).to(device),
            favored=favored.to(device),
            parts=parts,
            known=self.rate,
            reduce=reduce,
        )
        bias = torch.zeros(trajectory.num_classes, dtype=torch.float64)
        bias[present] = found.bias.cpu()
        self.rate, self.drawn = following(self.rate, replace(found, bias=bias)), drawn

    def _look_at_margins(
        self,
        trajectory: TrainingDynamics,
        margins: Tensor,
        of_rows: tuple[Tensor, Tensor],
        drawn: Tensor,
        parts: int,
        device: torch.device,
        reduce: Reduce,
    ) -> None:
        """Update the estimate from soft margins (n, K), for more classes than have coordinates."""
        position, counts = of_rows
        # If most outputs occur as no label, they are excluded from the next epoch on, so wait for it.
        few = 2 * int((drawn > 0).sum()) < trajectory.num_rivals
        expected = trajectory.expected(reduce)
        if few or not _is_whole(position[counts], parts, reduce):
            return
        found = prequential_margin_rate(
            margins.nan_to_num().to(device),
            position.clamp(min=0).to(device),
            counts.float().to(device),
            trajectory.num_rivals,
            drawn=drawn,
            expected=expected,
            is_first=trajectory.is_empty,
            parts=parts,
            reduce=reduce,
        )
        self.rate, self.drawn = following(self.rate, found), drawn

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state as plain numbers; None before the first estimate."""
        if self.rate is None or self.drawn is None:
            return None
        return {**asdict(self.rate), "bias": self.rate.bias.tolist(), "drawn": self.drawn.tolist()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any] | None) -> EarlyEpochs:
        """Create an instance from the state that :meth:`state_dict` returned."""
        early = cls()
        if state is not None:
            numbers = dict(state)
            early.drawn = torch.tensor(numbers.pop("drawn"), dtype=torch.float64)
            bias = torch.tensor(numbers.pop("bias"), dtype=torch.float64)
            early.rate = PrequentialRate(**numbers, bias=bias)
        return early


def held_by_class(seen: Tensor, drawn: Tensor) -> Tensor:
    """Estimate the number of samples of each class, (C,), from the numbers of distinct samples and of draws.

    Of n samples drawn d times at random, with replacement, n (1 - exp(-d / n)) are seen. If no sample is drawn twice,
    the number of distinct samples is returned.

    Args:
        seen: (C,), number of distinct samples drawn.
        drawn: (C,), number of draws.
    """
    part = seen / drawn.clamp(min=1)
    low, high = torch.zeros_like(part), torch.full_like(part, _MOST_DRAWS)
    for _ in range(_HALVINGS):
        each = (low + high) / 2
        is_more = -torch.expm1(-each) / each > part
        low, high = torch.where(is_more, each, low), torch.where(is_more, high, each)
    return torch.where(seen < drawn, drawn / high, seen)


def _is_whole(position: Tensor, parts: int, reduce: Reduce) -> bool:
    """Return whether each part of the epoch has draws, which is not so after resuming within the epoch."""
    held = torch.bincount((position * parts).long().clamp(0, parts - 1), minlength=parts)
    return bool((reduce(held.double()) > 0).all())
