"""How far the label's logit leads those of all other classes together, at several temperatures: a few floats a sample.

Of many classes the logits are too many to keep. But how likely a label is at the temperature ``1 / a``, is told by its
log-odds ``a s_y - log(sum of exp(a s_k) over the others)``. Divided by ``a``, and with the mean in place of the sum,
they are the *soft margin*: the label's logit less the mean of the others' for small ``a``, less the largest for large
ones, and smooth in between, so that those at some scales tell those at all. Like logits, they are averaged over
training.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lightning_unlearn.utilities.chunks import row_slices

SCALES = tuple(2.0**power for power in range(-3, 6))
"""At which soft margins are kept, each twice the one before."""

NUM_SCALES = len(SCALES)


def soft_margins(
    logits: Tensor, label: Tensor, *, rivals: Tensor | None = None, expected: Tensor | None = None
) -> Tensor:
    """Return the soft margins at the scales 1/8, 1/4, ... 32.

    Args:
        logits: (n, C), C >= 2.
        label: (n,) int64.
        rivals: (R,) int64, the classes to compare the label with; by default all.
        expected: (C,) that the probabilities of the classes are added to.

    Returns:
        (n, 9) float32.

    Example:
        >>> soft_margins(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([0]))[0, :2].round(decimals=3)
        tensor([2., 2.])
    """
    absent = _absent(logits, rivals)
    parts = [
        _soft_margins(logits[rows].float(), label[rows], absent, expected)
        for rows in row_slices(len(logits), logits.shape[1], logits.device)
    ]
    return torch.cat(parts) if parts else logits.new_zeros(0, NUM_SCALES, dtype=torch.float32)


def _absent(logits: Tensor, rivals: Tensor | None) -> Tensor | None:
    """Return (C,) float32, what makes classes that are no rivals impossible."""
    if rivals is None or not len(rivals):
        return None
    return torch.full(logits.shape[1:], -torch.inf, device=logits.device).index_fill_(0, rivals.to(logits.device), 0)


def _others(logits: Tensor, label: Tensor, absent: Tensor | None) -> Tensor:
    others = logits.clone() if absent is None else logits + absent
    return others.scatter_(1, label.unsqueeze(1), -torch.inf)


def _soft_margins(logits: Tensor, label: Tensor, absent: Tensor | None, expected: Tensor | None) -> Tensor:
    others, column = _others(logits, label, absent), label.unsqueeze(1)
    number = (logits.shape[1] if absent is None else absent.isfinite().sum()) - 1
    largest = others.amax(dim=1, keepdim=True)
    margin = logits.gather(1, column) - largest
    odds, columns = others.sub_(largest).mul_(SCALES[0]).exp_(), []
    for scale in SCALES:
        total = odds.sum(dim=1, keepdim=True)
        columns.append(margin - (total / number).log() / scale)
        if expected is not None and scale == 1:
            given = (margin - total.log()).sigmoid()
            expected.addmv_(odds.T, ((1 - given) / total).squeeze(1))
            expected.index_add_(0, label, given.squeeze(1))
        odds.square_()  # at twice the scale
    return torch.cat(columns, dim=1)


def rivals_of(logits: Tensor, label: Tensor, rivals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the strongest class other than the label, (n,) int64, and its probability among these, (n,).

    Args:
        logits: (n, C), C >= 2.
        label: (n,) int64.
        rivals: (R,) int64, the classes to compare the label with; by default, or where there are none, all.
    """
    absent = _absent(logits, rivals)
    parts = []
    for rows in row_slices(len(logits), logits.shape[1], logits.device):
        others = _others(logits[rows].float(), label[rows], absent)
        largest, rival = others.max(dim=1)
        parts.append((rival, (largest - others.logsumexp(dim=1)).exp()))
    if not parts:
        return label.clone(), logits.new_zeros(0)
    of_class, share = zip(*parts, strict=True)
    return torch.cat(of_class), torch.cat(share)


@cache
def _spline() -> Tensor:
    """Return (K, K) float64, from a cubic spline's values at its knots to second derivatives; ends are parabolas."""
    size = NUM_SCALES
    matrix, values = torch.zeros(2, size, size, dtype=torch.float64)
    for k in range(1, size - 1):
        matrix[k, k - 1 : k + 2] = torch.tensor([1.0, 4.0, 1.0])
        values[k, k - 1 : k + 2] = torch.tensor([6.0, -12.0, 6.0])
    for end, beside in ((0, 1), (size - 1, size - 2)):
        matrix[end, end], matrix[end, beside] = 1.0, -1.0
    found: Tensor = torch.linalg.solve(matrix, values)
    return found


def interpolation(log_scale: float) -> tuple[Tensor, Tensor]:
    """Return what the soft margins at the kept scales are multiplied by for that at another one.

    Beyond the smallest and the largest scale it is that at these.

    Args:
        log_scale: natural logarithm of the scale.

    Returns:
        (9,) float64, and its derivative in ``log_scale``.
    """
    place = (log_scale - math.log(SCALES[0])) / math.log(2)
    inside = min(max(place, 0.0), NUM_SCALES - 1.0)
    knot = min(int(inside), NUM_SCALES - 2)
    t = inside - knot
    identity, second = torch.eye(NUM_SCALES, dtype=torch.float64), _spline()
    left, right, curved_left, curved_right = identity[knot], identity[knot + 1], second[knot], second[knot + 1]
    value = (1 - t) * left + t * right
    value = value + ((1 - t) ** 3 - (1 - t)) / 6 * curved_left + (t**3 - t) / 6 * curved_right
    if inside != place:
        return value, torch.zeros_like(value)
    slope = right - left + (1 - 3 * (1 - t) ** 2) / 6 * curved_left + (3 * t**2 - 1) / 6 * curved_right
    return value, slope / math.log(2)
