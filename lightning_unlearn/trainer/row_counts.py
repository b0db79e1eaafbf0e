"""Check that a batch has one row for each sample drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.row_order import (
    lengths,
)


def check_number(loader: DataLoader[Any], label: Any, samples: int, may_offer: bool = True) -> None:
    """Check that a batch has one row for each sample drawn.

    Raises:
        TypeError: if it does not.
    """
    try:
        rows = len(label)
    except TypeError:
        return
    if rows != samples:
        offer = ", or offer attribution_dataloader(), a loader of the same samples that does" if may_offer else ""
        raise TypeError(
            f"Expected a batch with one row for each sample drawn, but of {samples} samples"
            f" {name_of(loader.collate_fn)} makes {rows} rows; keep one row for each, in the order given{offer}."
        )


def check_numbers(loader: DataLoader[Any], read: Sequence[tuple[Tensor, Any]]) -> None:
    """Check that batches have one label for each sample drawn.

    Args:
        loader: the loader that delivered them.
        read: dataset indices and labels of each batch.

    Raises:
        TypeError: as :func:`check_number`.
    """
    for indices, label in read:
        check_number(loader, label, len(indices))


def check_batch(loader: DataLoader[Any], batch: Any, samples: int) -> None:
    """Refuse a batch, not yet read, all of whose tensors have another number of rows than samples were drawn.

    Raises:
        TypeError: as :func:`check_number`.
    """
    numbers = lengths(batch)
    if len(numbers) == 1:
        check_number(loader, range(numbers.pop()), samples)


def name_of(collate: Any) -> str:
    """Return a collate function by name."""
    return f"collate_fn ({getattr(collate, '__qualname__', type(collate).__name__)})"
