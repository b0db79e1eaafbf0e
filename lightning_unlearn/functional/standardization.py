"""Rows in chunks: their mean, and columns of mean 0 and variance 1, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_unlearn.utilities.reduce import Reduce, no_reduce

CHUNK = 2**19
"""Numbers of the rows that are worked on at a time: 2,048 rows of 256, which stay in a CPU's cache."""


def chunk_length(rows: Tensor) -> int:
    """Return rows that are worked on at a time."""
    # A GPU is kept busy by more rows only.
    numbers = CHUNK if rows.device.type == "cpu" else 16 * CHUNK
    return min(max(1, len(rows)), max(1, numbers // max(1, rows[:1].numel())))


def in_chunks(rows: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of several tensors, about ``CHUNK`` numbers of the first at a time."""
    length = chunk_length(rows)
    return zip(*(torch.split(tensor, length) for tensor in (rows, *tensors)), strict=True)


def work_dtype(rows: Tensor) -> torch.dtype:
    """Return float32 for wide float32 rows on a CPU, which halves the time; else float64.

    Not where the user lets float32 products be rounded to bfloat16, found by trying, as there are several settings.
    """
    dimension = rows.shape[1]
    if rows.dtype == torch.float64 or dimension < 32 or rows.device.type != "cpu":
        return torch.float64
    fine = torch.full((256, dimension), 1 + 2.0**-12)
    return torch.float32 if (fine @ torch.eye(dimension)).equal(fine) else torch.float64


def weighted_mean(rows: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of the rows of all ranks, and the sum () of their weights, in float64.

    Args:
        rows: (n, D).
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.
    """
    total = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    for chunk, w in in_chunks(rows, weight.double()):
        total += torch.cat([w @ chunk.double(), w.sum().reshape(1)])
    total = reduce(total)
    return total[:-1] / total[-1], total[-1]


def standardize(rows: Tensor, weight: Tensor, reduce: Reduce = no_reduce) -> Tensor:
    """Return columns with mean 0 and standard deviation 1 over all ranks; constant columns become 0.

    Args:
        rows: (n, D).
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        (n, D) in the dtype of ``rows``.

    Example:
        >>> standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.ones(2))
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    mean, count = weighted_mean(rows, weight, reduce)
    # The variance around the mean, not the difference of two large sums, which would lose small variances.
    squares = torch.zeros_like(mean)
    for chunk, w in in_chunks(rows, weight.double()):
        squares += w @ (chunk.double() - mean).square()
    scale = (reduce(squares) / count).sqrt()
    scale = torch.where(scale > 1e-12 * mean.abs().clamp(min=1e-300), scale, torch.inf)
    standardized = torch.empty_like(rows)
    for chunk, out in in_chunks(rows, standardized):
        out.copy_((chunk - mean) / scale)
    return standardized
