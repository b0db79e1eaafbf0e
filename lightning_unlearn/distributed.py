"""What crosses ranks. Takes the strategy as an argument, so a fake can stand in for Lightning's."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_unlearn.functional.mixture import Reduce


class ReducingStrategy(Protocol):
    """The part of a Lightning strategy that is used here."""

    @property
    def root_device(self) -> torch.device:
        """Where the strategy's collectives expect tensors."""

    def reduce(self, tensor: Tensor, *, reduce_op: Any) -> Tensor:
        """Reduces a tensor over the ranks."""


def sum_over_ranks(strategy: ReducingStrategy) -> Reduce:
    """A function that sums a tensor over the ranks of a strategy. Every rank must call it, with equal shapes."""

    def reduce(part: Tensor) -> Tensor:
        # A copy, since collectives write in place; on the strategy's device, since NCCL sees no other. But not on MPS,
        # which has no double precision and is never one of several devices.
        device = part.device if strategy.root_device.type == "mps" else strategy.root_device
        return strategy.reduce(part.detach().clone().to(device), reduce_op="sum").to(part.device)

    return reduce


def place_by_index(index: Tensor, weight: Tensor, values: Tensor, total: int, reduce: Reduce) -> Tensor:
    """Every rank's rows in dataset order, on every rank.

    Each index belongs to one rank, so a sum puts the rows together without a gather of uneven shares.

    Args:
        index: (n,) int64, dataset indices of this rank's rows.
        weight: (n,), 0 for a row that only pads.
        values: (n, ...), a few numbers per sample; never per-neuron rows.
        total: N.
        reduce: sums over the ranks.

    Returns:
        (N, ...)
    """
    counts = weight > 0
    placed = values.new_zeros(total, *values.shape[1:])
    placed[index[counts]] = values[counts]
    return reduce(placed)
