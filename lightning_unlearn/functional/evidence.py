"""Label evidence averaged over training, a few numbers per sample.

Evidence is averaged because the final model has memorized part of the noise, while margins from the time when it was
still generalizing show it (area under the margin, Pleiss et al. 2020, arXiv 2001.10528).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.utilities.chunks import row_slices
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

_BINS = 2_000
# Numbers in the histograms of all groups together; with very many groups each has fewer bins.
_MOST_NUMBERS = 2**22


def label_confidence(margin: Tensor) -> Tensor:
    """Return the confidence of the given label against the largest other class, in [0, 1].

    This is the sigmoid of the margin: the probability of the given label if only these two classes were possible.
    Margins are averaged over training in this form because they grow without bound as a network memorizes; raw margins
    of the last epochs, which are least informative, would dominate the early ones.

    Args:
        margin: (B,), margin attribution summed over the neurons, in nats.

    Returns:
        (B,)

    Example:
        >>> label_confidence(torch.tensor([0.0, 100.0]))
        tensor([0.5000, 1.0000])
    """
    return margin.sigmoid()


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of logits, in nats, (B,).

    Args:
        logits: (B, C).
    """
    # torch's own softmax takes several times as long for few classes on a CPU.
    parts = []
    for rows in row_slices(len(logits), logits.shape[1], logits.device):
        below = logits[rows] - logits[rows].amax(dim=1, keepdim=True)
        odds = below.exp()
        total = odds.sum(dim=1)
        parts.append(total.log() - (odds * below).sum(dim=1) / total)
    return torch.cat(parts) if parts else logits.new_zeros(0)


def confident_disagreement(
    log_odds: Tensor,
    agrees: Tensor,
    group: Tensor,
    weight: Tensor,
    num_groups: int,
    *,
    share: float = 0.25,
    reduce: Reduce = no_reduce,
) -> float:
    """Return the disagreement rate of the most confident samples of each group.

    Args:
        log_odds: (n,), confidence of the prediction.
        agrees: (n,) bool, whether the prediction equals the label.
        group: (n,) int64, such as the predicted class.
        weight: (n,), 0 for a row that does not count.
        num_groups: number of groups.
        share: share of each group to use.
        reduce: sums over the ranks.

    Returns:
        share of these samples that disagree, in [0, 1], averaged over groups weighted by size.

    Example:
        >>> confident_disagreement(
        ...     torch.tensor([9.0, 8.0, 1.0, 0.0]),
        ...     torch.tensor([True, False, False, False]),
        ...     torch.zeros(4, dtype=torch.int64),
        ...     torch.ones(4),
        ...     1,
        ...     share=0.5,
        ... )
        0.5
    """
    # Histograms, whose sums need no rank's rows; from the most confident bin down.
    bins = max(2, min(_BINS, _MOST_NUMBERS // num_groups))
    level = ((40 - log_odds.double().clamp(-40, 40)) * (bins - 1) / 80).long()
    counts = torch.zeros(2, num_groups * bins, dtype=torch.float64, device=log_odds.device)
    place = group * bins + level
    counts[0].index_add_(0, place, weight.double())
    counts[1].index_add_(0, place, weight.double() * (~agrees).double())
    asked, disagree = reduce(counts).reshape(2, num_groups, bins)
    wanted = share * asked.sum(dim=1, keepdim=True)
    before = asked.cumsum(dim=1) - asked
    part = ((wanted - before) / asked.clamp(min=1e-9)).clamp(0, 1)
    return float((part * disagree).sum() / (part * asked).sum().clamp(min=1e-9))
