"""Label evidence gathered over training, a few numbers per sample.

Evidence is averaged over training because the last model has memorized part of the noise: what survives memorization is
how the margin was while the network was still generalizing (the idea of AUM, Pleiss et al. 2020, arXiv 2001.10528).
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
    """Return how strongly the given label is supported against the strongest other, between 0 and 1.

    The logistic function of the margin: the probability of the given label if only these two were possible. Margins are
    averaged over training in this form, because they grow as a network memorizes, without bound; as they are, the last
    passes, which know least, would outweigh the early ones.

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
    """Return how often the most confident samples of each group disagree.

    Args:
        log_odds: (n,), how confident a sample is.
        agrees: (n,) bool.
        group: (n,) int64, such as the predicted class.
        weight: (n,), 0 for a row that does not count.
        num_groups: number of groups.
        share: of each group's samples that are asked.
        reduce: sums over the ranks.

    Returns:
        share of those asked that disagree, in [0, 1]; each group counts by its size.

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
