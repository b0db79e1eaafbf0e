"""Coordinates of class differences: logits up to a constant added to all of them."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_COORDINATES = 128
"""The most coordinates that :func:`class_coordinates` returns."""


def class_coordinates(num_classes: int) -> Tensor:
    """Return an orthonormal basis of class differences, since a constant added to all logits has no effect.

    Args:
        num_classes: C.

    Returns:
        (C, r) float32 with ``r = min(C - 1, 128)``. For C <= 129 it keeps all differences (Helmert's basis). For more
        classes it is a fixed random projection that preserves distances to about ten per cent (Johnson and
        Lindenstrauss), for users' recipes.

    Example:
        >>> basis = class_coordinates(3)
        >>> ((torch.tensor([2.0, 1.0, 0.0]) @ basis) @ basis.T).round(decimals=3).abs()
        tensor([1., 0., 1.])
    """
    if num_classes - 1 > MAX_COORDINATES:
        draw = torch.randn(num_classes - 1, MAX_COORDINATES, generator=torch.Generator().manual_seed(0)).double()
        return times_helmert(torch.linalg.qr(draw)[0]).float()
    return helmert(num_classes)


def helmert(num_classes: int) -> Tensor:
    """Return Helmert's orthonormal basis (C, C - 1) of all differences between classes, float32.

    Example:
        >>> helmert(2)
        tensor([[ 0.7071],
                [-0.7071]])
    """
    return times_helmert(torch.eye(num_classes - 1, dtype=torch.float64)).float()


def times_helmert(matrix: Tensor) -> Tensor:
    """Return the product (C, r) of Helmert's basis (C, C - 1) and a matrix (C - 1, r), without forming the basis.

    Column j of the basis is 1 in the first j rows and -j in the next row, divided by its norm.
    """
    j = torch.arange(1, len(matrix) + 1, dtype=torch.float64).unsqueeze(1)
    scaled = matrix / (j * (j + 1)).sqrt()
    below = scaled.flip(0).cumsum(0).flip(0)
    nothing = scaled.new_zeros(1, scaled.shape[1])
    return torch.cat([below, nothing]) - torch.cat([nothing, j * scaled])
