"""The formula that moves trained weights back towards those that a fit began with."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 0.1
"""How much of the way that training has come is kept; .2 does as well, .4 worse (three kinds of data, one seed)."""


def shrink(weight: Tensor, start: Tensor, kept: float = KEPT) -> Tensor:
    """Return ``start + kept * (weight - start)``, computed in float32 at least.

    Args:
        weight: the trained weight, floating point.
        start: the same weight at the start of the fit, on the same device.
        kept: share of the change to keep: 1 for the weight itself, 0 for ``start`` even if the weight is not finite.

    Example:
        >>> shrink(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
        tensor([0.1000, 2.0000])
    """
    if kept == 0:
        return start.to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.lerp(start.to(wide), weight.to(wide), kept).to(weight.dtype)
