"""Sums over the ranks, as a function that is handed in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks; the identity on one process."""


def no_reduce(total: Tensor) -> Tensor:
    """Return the sum over ranks where there is only one."""
    return total


def reduce_together(reduce: Reduce, *parts: Tensor) -> list[Tensor]:
    """Sum several tensors of one dtype over the ranks, each as it is, in one collective."""
    flat = reduce(torch.cat([part.flatten() for part in parts]))
    pieces = torch.split(flat, [part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
