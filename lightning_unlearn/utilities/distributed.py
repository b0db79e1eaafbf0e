"""What crosses ranks. Takes the strategy as an argument, so a fake can stand in for Lightning's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lightning_unlearn.utilities.reduce import Reduce

_Made = TypeVar("_Made")


class ReducingStrategy(Protocol):
    """The part of a Lightning strategy that is used here."""

    @property
    def root_device(self) -> torch.device:
        """Where the strategy's collectives expect tensors."""

    def reduce(self, tensor: Tensor, *, reduce_op: Any) -> Tensor:
        """Reduce a tensor over the ranks."""


def sum_over_ranks(strategy: ReducingStrategy) -> Reduce:
    """Return a function that sums a tensor over the ranks of a strategy. Every rank must call it, with equal shapes.

    Where the strategy's ranks are a group of torch.distributed, they are asked directly: Lightning's strategies wait
    for all ranks at a barrier first, which takes longer than the sum, and the estimate of a noise rate asks for
    hundreds.
    """
    # The strategy's own number of ranks: a group may be there while each of its processes fits for itself.
    has_ranks = getattr(strategy, "world_size", 1) > 1

    def reduce(part: Tensor) -> Tensor:
        # A copy, since collectives write in place; on the strategy's device, since NCCL sees no other. But not on MPS,
        # which has no double precision and is never one of several devices.
        device = part.device if strategy.root_device.type == "mps" else strategy.root_device
        total = part.detach().clone().to(device)
        if has_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        else:
            total = strategy.reduce(total, reduce_op="sum")
        return total.to(part.device)

    return reduce


def gather_by_index(index: Tensor, weight: Tensor, values: Tensor, total: int, reduce: Reduce) -> Tensor:
    """Return every rank's rows in dataset order, on every rank.

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


class BroadcastingStrategy(Protocol):
    """The part of a Lightning strategy that is used here."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0 of all nodes."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of one rank, on every rank."""


def run_on_rank_zero(strategy: BroadcastingStrategy, make: Callable[[], _Made]) -> _Made:
    """Return what rank 0 makes, on every rank; and what it raises, too. Every rank must call it.

    A file may lie on the first node alone, or be edited while others read it.
    """
    made: _Made | None = None
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            made = make()
        except Exception as raised:  # of whatever kind, the others must not wait for what does not come
            error = raised
    made, error = strategy.broadcast((made, error))
    if error is not None:
        raise error
    return cast("_Made", made)
