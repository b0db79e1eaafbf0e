"""How many rows are worked on together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 8_192
"""Rows that are held in double precision at a time, at most."""

MOST_NUMBERS = 2**23
"""Numbers, one for each class of a row, that are held at a time."""

MOST_IN_CACHE = 2**18
"""The same on a processor, where what is gone over again and again should stay in its cache: 2 MiB."""

LEAST_ROWS = 128
"""Rows that are worked on together even so, as a product with fewer would read all classes for each few of them."""

_FEW_CLASSES = 64


def rows_at_a_time(numbers: int, device: torch.device) -> int:
    """Return how many rows of so many numbers, one for each class or more, are worked on together."""
    most = min(ROWS, MOST_NUMBERS // numbers)
    if device.type == "cpu":
        most = min(most, max(LEAST_ROWS, MOST_IN_CACHE // numbers))
    return max(1, most)


def thinning(total: float, numbers: int, most: int) -> int:
    """Return n so that every n-th of so many rows, each of so many numbers, are about ``most`` numbers or fewer."""
    return max(1, int(total * numbers / most))


def row_slices(total: int, numbers: int, device: torch.device) -> list[slice]:
    """Return the parts that so many rows of so many numbers are worked on in."""
    length = rows_at_a_time(numbers, device)
    return [slice(first, first + length) for first in range(0, total, length)]


def row_chunks(numbers: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of some tensors, few enough rows at a time for ``numbers`` numbers a row."""
    length = rows_at_a_time(numbers, tensors[0].device)
    return zip(*(torch.split(tensor, length) for tensor in tensors), strict=True)


def softmax(logits: Tensor) -> Tensor:
    """Return the softmax of (n, C) over the classes; ``logits`` are written to.

    Of few classes torch's own takes several times as long on a processor.
    """
    if logits.shape[1] > _FEW_CLASSES:
        return logits.softmax(dim=1)
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=1, keepdim=True))
