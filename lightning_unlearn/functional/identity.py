"""Hashes of the rows of a batch's input, equal for rows with the same content."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Odd numbers with as many ones as zeros, in no order (of splitmix64 and of murmur3), as signed ones.
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x3B314601E57A13AD)
# Elements that are hashed at a time: 32 MB as int64.
_AT_ONCE = 2**22


def row_identity(x: Any, total: int) -> Tensor | None:
    """Return a hash of the content of each row of a batch's input.

    The hash does not depend on the other rows, nor on zero padding at the end of a row.

    Args:
        x: a tensor with the batch in dimension 0, a list with a number, string or tensor for each sample, or a tuple,
            list or dict of these; None and single values are shared by all samples and ignored.
        total: B.

    Returns:
        (B,) int64 on the CPU; None if the input cannot be split into rows.

    Example:
        >>> same = row_identity(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]), 3)
        >>> (same[0] == same[2]).item(), (same[0] == same[1]).item()
        (True, False)
    """
    found: list[Tensor] = []
    if not _gather(x, total, found) or not found:
        return None
    identity = torch.zeros(total, dtype=torch.int64)
    for values in found:
        identity = mixed(identity * _FACTORS[0] + values)
    return identity


def mixed(value: Tensor) -> Tensor:
    """Return integers with their bits mixed, int64 like these."""
    stirred: Tensor = value
    for factor, bits in zip(_FACTORS[1:], (30, 27), strict=True):
        stirred = (stirred ^ (stirred >> bits)) * factor
    return stirred ^ (stirred >> 31)


def copies(identity: Tensor) -> Tensor:
    """Return (N,) int64, how many of (N,) have the same identity, oneself included."""
    place: Tensor
    count: Tensor
    _, place, count = torch.unique(identity, return_inverse=True, return_counts=True)
    return count[place]


def _gather(x: Any, total: int, found: list[Tensor]) -> bool:
    """Add the hashes of the rows of each part; False where one has no row for each sample."""
    if x is None or isinstance(x, (bool, int, float, str)) or (isinstance(x, Tensor) and x.numel() == 1 != total):
        return True
    if isinstance(x, Tensor):
        return _gather_tensor(x, total, found)
    if isinstance(x, dict):
        return all(_gather(value, total, found) for value in x.values())
    if not isinstance(x, (list, tuple)):
        return False
    if len(x) == total and all(isinstance(value, (bool, int, float, str)) for value in x):
        found.append(torch.tensor([_of_text(repr(value)) for value in x]))
        return True
    if len(x) == total and isinstance(x, list) and all(isinstance(value, Tensor) for value in x):
        return _gather_list(x, total, found)
    return all(_gather(value, total, found) for value in x)


def _gather_list(x: list[Tensor], total: int, found: list[Tensor]) -> bool:
    # As many inputs as samples, or a tensor for each sample, such as pictures of different sizes.
    if all(value.ndim > 0 and len(value) == total for value in x):
        return False
    parts: list[Tensor] = []
    if not all(_gather_tensor(value.unsqueeze(0), 1, parts) for value in x):
        return False
    found.append(torch.cat(parts))
    return True


def _gather_tensor(x: Tensor, total: int, found: list[Tensor]) -> bool:
    if x.layout != torch.strided or x.is_nested or x.is_quantized or x.ndim == 0 or len(x) != total:
        return False
    rows = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    rows = rows.reshape(total, -1)
    # Minus zero is zero. Eight bytes are hashed at a time.
    rows = rows.byte() if rows.dtype == torch.bool else rows + 0
    rows = pad(rows, (0, -rows.shape[1] % (8 // rows.element_size()))).contiguous().view(torch.int64)
    place = mixed(torch.arange(1, rows.shape[1] + 1, device=rows.device) * _FACTORS[0])
    sums = []
    size = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for first in range(0, total, size):
        value = rows[first : first + size]
        # Zeros count nothing: batches are padded to different lengths.
        sums.append((mixed(value * _FACTORS[0] + place) * (value != 0)).sum(dim=1).cpu())
    found.append(torch.cat(sums))
    return True


def _of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
