"""Selection of the neurons to prune: significance, order and number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_unlearn.functional.sensitivity import Sensitivity

# A whole number may come out a little too small: 0.29 * 100 is 28.999999999999996.
_ROUNDING = 1e-9


def benjamini_hochberg(p_value: Tensor, level: float) -> Tensor:
    """Return the hypotheses to reject at a false discovery rate of ``level`` (Benjamini and Hochberg).

    With the largest k for which the k-th smallest p-value is at most ``level * k / m``, the k smallest are rejected.

    Args:
        p_value: (m,).
        level: false discovery rate, in (0, 1).

    Returns:
        (m,) bool.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.01, 0.8, 0.03, 0.04]), level=0.05)
        tensor([ True, False, False, False])
        >>> benjamini_hochberg(torch.tensor([0.01, 0.8, 0.03, 0.035]), level=0.05)
        tensor([ True, False,  True,  True])
    """
    ascending, order = p_value.sort(stable=True)
    rank = torch.arange(1, len(p_value) + 1, dtype=torch.float64)
    below = (ascending.double() <= level * rank / max(len(p_value), 1)).nonzero().flatten()
    rejected = torch.zeros(len(p_value), dtype=torch.bool)
    rejected[order[: int(below[-1]) + 1 if len(below) else 0]] = True
    return rejected


def noise_neurons(found: Sensitivity, fdr_level: float | None = None) -> Tensor:
    """Return the neurons that are more active on noisy samples, the most harmful first.

    With ``fdr_level``, only significant neurons are returned: a one-sided test of each active neuron (so that neurons
    that are significantly more active on clean samples do not influence the others), corrected by Benjamini and
    Hochberg. This bounds the expected share of false positives among the returned neurons; a bound on the probability
    of any false positive (Bonferroni) would return hardly any neuron of a wide layer.

    Args:
        found: the regression.
        fdr_level: level in (0, 1), or None for no test.

    Returns:
        (K,) int64.

    Example:
        >>> found = Sensitivity(
        ...     coefficient=torch.tensor([-0.4, 0.9, -0.5, -0.1]).double(),
        ...     standard_error=torch.tensor([0.1, 0.1, 0.1, 0.1]).double(),
        ...     is_live=torch.ones(4, dtype=torch.bool),
        ... )
        >>> noise_neurons(found, fdr_level=0.05), noise_neurons(found)
        (tensor([2, 0]), tensor([2, 0, 3]))
    """
    harmful = found.is_live & (found.coefficient < 0)
    if fdr_level is not None:
        sure = torch.zeros_like(harmful)
        sure[found.is_live] = benjamini_hochberg(found.harmful_p_value()[found.is_live], fdr_level)
        harmful &= sure
    return in_order(-found.coefficient, harmful)


def in_order(score: Tensor, eligible: Tensor) -> Tensor:
    """Return the eligible neurons, those of largest score first, equal ones by position.

    Args:
        score: (D,).
        eligible: (D,) bool.

    Returns:
        (K,) int64.

    Example:
        >>> in_order(torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.tensor([True, True, True, False]))
        tensor([1, 2, 0])
    """
    # A stable order, so that every rank has the same.
    order = score.argsort(descending=True, stable=True)
    return order[eligible[order]]


def share_of(amount: float, neurons: int) -> int:
    """Return how many neurons a share of them is, rounded down.

    Example:
        >>> share_of(0.29, 100), share_of(0.3, 9)
        (29, 2)
    """
    return math.floor(amount * neurons + _ROUNDING)


def check_amount(amount: float, neurons: int) -> None:
    """Refuse a share that is less than one neuron.

    Raises:
        ValueError: naming one that is not.
    """
    if share_of(amount, neurons) < 1:
        raise ValueError(
            f"amount={amount} of {neurons} neurons rounds to zero; use at least {math.ceil(1e6 / neurons) / 1e6:g}."
        )


def select_neurons(sensitivity: Tensor, amount: float) -> Tensor:
    """Return the neurons to keep when the ``amount`` of largest magnitude is pruned, as the paper has it.

    The share is taken of the *live* neurons, those with a sensitivity other than 0. A ReLU layer that has memorized its
    data can have half of its neurons dead; half of all neurons would then be all that the network has left.

    Args:
        sensitivity: (D,).
        amount: share of the live neurons in (0, 1), rounded down.

    Returns:
        keep: (D,) bool.

    Raises:
        ValueError: if the amount is less than one of all D neurons.

    Example:
        >>> select_neurons(torch.tensor([0.1, -0.9, 0.0, 0.3]), amount=0.7)
        tensor([ True, False,  True, False])
    """
    check_amount(amount, len(sensitivity))
    live = sensitivity != 0
    keep = torch.ones_like(live)
    keep[in_order(sensitivity.abs(), live)[: share_of(amount, int(live.sum()))]] = False
    return keep
