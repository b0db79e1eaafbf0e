"""Leave-one-out predictions of a linear head, in closed form.

Ridge regression of the given labels on the features: with the hat matrix ``H``, the prediction of a sample that was
left out is its label minus ``residual / (1 - leverage)`` (Allen 1974, PRESS). One eigendecomposition of the summed
``X'X`` serves all penalties, and each sample then needs only its own row. The predictions are out of sample only if the
features are: those of a frozen backbone, or from before the fit.

Many features are reduced to their leading principal components by a random range finder with one power iteration
(Halko, Martinsson and Tropp 2011), which does not use the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.functional.prequential import PrequentialRate, prequential_rate
from lightning_unlearn.utilities.chunks import row_slices
from lightning_unlearn.utilities.reduce import Reduce, no_reduce, reduce_together

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean eigenvalue; that of the least leave-one-out error is taken."""

MAX_COMPONENTS = 384
"""Of more features as many principal components are taken."""

# The least deviation of a feature, of the largest one's: what varies less is the same for all.
_LEAST_DEVIATION = 1e-7

_MOST_LEVERAGE = 1 - 1e-6

# So much less skill than the network's, and so much more than it has on validation samples, is no chance.
_LESS_SKILL = 0.05
_MORE_SKILL = 0.1

# Their share in what ranks: at most; from which z on; at how much more skill than that of an early epoch all of it; and
# at how many times the z of the network none of it.
_MOST_SHARE = 0.7
_LEAST_Z = 3.0
_MUCH_MORE_SKILL = 0.2
_AS_CLEAR = 0.5

# From scores of about 1 to something like logits, where the search for a temperature starts.
_LIKE_LOGITS = 10.0


def leave_one_out_logits(
    features: Tensor, label: Tensor, weight: Tensor, num_classes: int, *, reduce: Reduce = no_reduce
) -> Tensor:
    """Return :func:`leave_one_out_scores` of standardized features, reduced if there are many, on the scale of logits.

    Args:
        features: (n, D), features that were not trained on the labels.
        label: (n,) int64; every class must occur.
        weight: (n,), 0 for a row that does not count; 1 / k for each of k copies of a sample.
        num_classes: C.
        reduce: sums over the ranks.

    Returns:
        (n, C) float64.
    """
    features = _standardized(features, weight, reduce)
    if features.shape[1] > MAX_COMPONENTS:
        features = _principal_components(features, weight, MAX_COMPONENTS, reduce)
    return _LIKE_LOGITS * leave_one_out_scores(features, label, weight, num_classes, reduce=reduce)


def left_out_rate(logits: Tensor, label: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce) -> PrequentialRate:
    """Return the noise rate by :func:`leave_one_out_logits`, the same on every rank."""
    return prequential_rate(logits, label, torch.zeros_like(label), weight, parts=1, reduce=reduce)


def left_out_share(left_out: PrequentialRate | None, early: PrequentialRate | None, z_score: float) -> float:
    """Return the weight of leave-one-out logits beside those of the network in the ranking, in [0, .7].

    The weight grows as the ridge regression predicts left-out labels better than an early epoch of the network did,
    and shows wrong labels more clearly than all of training.

    Args:
        left_out: estimate from the leave-one-out logits.
        early: estimate from an early epoch.
        z_score: z score of wrong labels from all of training.
    """
    if left_out is None or early is None or not early.is_settled or left_out.z_score < _LEAST_Z:
        return 0.0
    more = min(max((left_out.skill - early.skill) / _MUCH_MORE_SKILL, 0.0), 1.0)
    return _MOST_SHARE * more * min(max(left_out.z_score / max(z_score, 1e-9) - _AS_CLEAR, 0.0), 1.0)


def leave_one_out_scores(
    features: Tensor,
    label: Tensor,
    weight: Tensor,
    num_classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    reduce: Reduce = no_reduce,
) -> Tensor:
    """Predict the labels by one-against-the-rest ridge regression, each sample left out in turn.

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
    coefficients = (shrunk.unsqueeze(2) * rotated).transpose(0, 1).flatten(1)
    # Single precision, as there are several of each.
    scores = torch.zeros(len(penalties), len(label), num_classes, device=w.device)
    errors = zeros(len(penalties))
    for rows in parts:
        z, target = (features[rows].double() - mean) @ vector, _one_hot(label[rows], num_classes)
        fitted = (z @ coefficients).reshape(len(z), len(penalties), num_classes).transpose(0, 1) + share
        leverage = (z.square() @ shrunk.T + 1 / number).clamp(max=_MOST_LEVERAGE).T
        left_out = target - (target - fitted) / (1 - leverage).unsqueeze(2)
        scores[:, rows] = left_out.float()
        errors += (target - left_out).square().sum(2) @ w[rows]
    return scores[reduce(errors).argmin()].double()


def skill_of(accuracy: float, largest: float) -> float:
    """Return the skill ``(accuracy - largest) / (1 - largest)``."""
    return (accuracy - largest) / max(1 - largest, 1e-9)


def objection_to(left_out: PrequentialRate, predicted: float, validated: float | None, early: float | None) -> str:
    """Return why leave-one-out scores cannot estimate the noise rate; empty if they can.

    A ridge regression that predicts less than the network counts labels as wrong that it cannot predict. Features that
    were trained on these labels before, for example in an earlier fit, predict the labels of training samples better
    than those of validation samples, even if left out.

    Args:
        left_out: estimate from the leave-one-out scores.
        predicted: skill of the network on the training samples.
        validated: its skill on validation samples; None without any.
        early: its skill in an early epoch; None if there was none.
    """
    known = validated if validated is not None else early if early is not None else predicted
    if left_out.skill < known - _LESS_SKILL:
        return "they predict less than the network, so they are not used for the noise rate"
    if validated is not None and min(left_out.skill, predicted) > validated + _MORE_SKILL:
        return (
            "they predict more than the network does on validation samples, so the features have seen the labels before"
        )
    return ""


def _standardized(features: Tensor, weight: Tensor, reduce: Reduce) -> Tensor:
    """Return (n, D) float32, as the columns of a table may be in any unit."""
    w = weight.double()
    parts = row_slices(len(features), features.shape[1], features.device)
    zeros = w.new_zeros(features.shape[1])
    count, total = reduce_together(
        reduce, w.sum().reshape(1), sum((w[rows] @ features[rows].double() for rows in parts), zeros)
    )
    mean = total / count
    squares = sum((w[rows] @ (features[rows].double() - mean).square() for rows in parts), zeros)
    deviation = (reduce(squares) / count).sqrt()
    deviation = deviation.clamp(min=max(_LEAST_DEVIATION * deviation.max().item(), 1e-12))
    return torch.cat([((features[rows].double() - mean) / deviation).float() for rows in parts])


def _principal_components(features: Tensor, weight: Tensor, number: int, reduce: Reduce) -> Tensor:
    """Return (n, number) float32, the coordinates of the rows along about the directions of their largest variance."""
    w, dimension = weight.float(), features.shape[1]
    parts = row_slices(len(features), dimension, features.device)
    sums = (w[rows] @ features[rows].float() for rows in parts)
    count, total = reduce_together(reduce, w.sum().reshape(1), sum(sums, w.new_zeros(dimension)))
    mean, generator = total / count, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dimension, number, generator=generator).to(w.device))[0]
    image = torch.zeros_like(basis)
    for rows in parts:
        x = (features[rows].float() - mean) * w[rows].unsqueeze(1).sqrt()
        image += x.T @ (x @ basis)
    basis = torch.linalg.qr(reduce(image))[0]
    return torch.cat([(features[rows].float() - mean) @ basis for rows in parts])


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    return torch.nn.functional.one_hot(label, num_classes).double()
