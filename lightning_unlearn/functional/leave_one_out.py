"""What a linear head would say of each sample if it had been trained on all the others, in closed form.

Ridge regression of the given labels on the features: with the hat matrix ``H``, the prediction of a sample that was
left out is its label less ``residual / (1 - leverage)`` (Allen 1974, PRESS). One eigendecomposition of the summed
``X'X`` serves all penalties, and each sample then needs its own row only. It is out of sample only if the features
are: of a frozen backbone, or from before the fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.functional.chunks import row_slices
from lightning_unlearn.functional.mixture import Reduce, no_reduce, reduce_together

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean eigenvalue; that of the least leave-one-out error is taken."""

_MOST_LEVERAGE = 1 - 1e-6


def leave_one_out_scores(
    features: Tensor,
    label: Tensor,
    weight: Tensor,
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    reduce: Reduce = no_reduce,
) -> Tensor:
    """One-against-the-rest ridge regression of the labels, each sample predicted by the others.

    Args:
        features: (n, D).
        label: (n,) int64.
        weight: (n,) 1 for a row that counts, 0 for one that does not.
        num_classes: C.
        penalties: to choose from.
        reduce: sums over the ranks.

    Returns:
        (n, C) float64, near 1 for the class that the others would call it.

    Example:
        >>> x = torch.tensor([[-1.0], [-1.1], [-1.2], [-0.9], [1.0], [1.1], [0.9]])
        >>> label = torch.tensor([0, 0, 0, 1, 1, 1, 1])  # the fourth is wrong
        >>> leave_one_out_scores(x, label, torch.ones(7), 2).argmax(1)
        tensor([0, 0, 0, 0, 1, 1, 1])
    """
    w, dimension = weight.double(), features.shape[1]
    parts = row_slices(len(label), max(dimension, num_classes), features.device)
    zeros = w.new_zeros
    number, total = reduce_together(
        reduce, w.sum().reshape(1), sum((w[rows] @ features[rows].double() for rows in parts), zeros(dimension))
    )
    mean = total / number
    gram, cross, count = zeros(dimension, dimension), zeros(dimension, num_classes), zeros(num_classes)
    for rows in parts:
        x = (features[rows].double() - mean) * w[rows].unsqueeze(1).sqrt()
        target = _one_hot(label[rows], num_classes) * w[rows].unsqueeze(1).sqrt()
        gram += x.T @ x
        cross += x.T @ target
        count.index_add_(0, label[rows], w[rows])
    gram, cross, count = reduce_together(reduce, gram, cross, count)
    value, vector = torch.linalg.eigh(gram)
    value, rotated, share = value.clamp(min=0), vector.T @ cross, count / number
    shrunk = torch.stack([1 / (value + penalty * value.mean() + 1e-12) for penalty in penalties])
    errors = zeros(len(penalties))
    for rows in parts:
        z = (features[rows].double() - mean) @ vector
        target = _one_hot(label[rows], num_classes)
        for at, inverse in enumerate(shrunk):
            errors[at] += w[rows] @ (target - _left_out(z, inverse, rotated, share, target, number)).square().sum(1)
    inverse = shrunk[reduce(errors).argmin()]
    scores = features.new_empty(len(label), num_classes, dtype=torch.float64)
    for rows in parts:
        z = (features[rows].double() - mean) @ vector
        scores[rows] = _left_out(z, inverse, rotated, share, _one_hot(label[rows], num_classes), number)
    return scores


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    return torch.nn.functional.one_hot(label, num_classes).double()


def _left_out(z: Tensor, inverse: Tensor, cross: Tensor, share: Tensor, target: Tensor, number: Tensor) -> Tensor:
    fitted = z @ (inverse.unsqueeze(1) * cross) + share
    leverage = (z.square() @ inverse + 1 / number).clamp(max=_MOST_LEVERAGE)
    return target - (target - fitted) / (1 - leverage).unsqueeze(1)
