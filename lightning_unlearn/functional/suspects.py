"""From how likely each label is wrong to a list: in which order, how long, and how many of it will be right.

All by histograms, whose sums need no rank's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.utilities.reduce import Reduce, no_reduce

_BINS = 2**14
_WIDEST = 40.0  # log-odds
_DEVIATIONS = 12.0
_LEVELS, _BISECTIONS = 2_000, 40

LEAST = 0.3
"""Probability of being wrong that a sample of a list has at least, however sure the others are.

Where clean and wrong labels lie far apart, a list would else be filled up with clean ones until its mean has fallen to
what is asked for. One half would leave out wrong labels of small sets (2 % of 1,800: recall .86 in place of .94).
"""


def with_mean(probability: Tensor, weight: Tensor, mean: float, *, reduce: Reduce = no_reduce) -> Tensor:
    """Return probabilities moved by one step in log-odds so that their mean is a given one.

    Args:
        probability: (n,).
        weight: (n,), 0 for a row that does not count.
        mean: in (0, 1).
        reduce: sums over the ranks.

    Returns:
        (n,) float64.

    Example:
        >>> with_mean(torch.tensor([0.5, 0.5]), torch.ones(2), 0.1).round(decimals=2)
        tensor([0.1000, 0.1000], dtype=torch.float64)
    """
    log_odds = torch.logit(probability.double(), eps=1e-15)
    # A histogram: one collective instead of one for each step of the search.
    width = 2 * _WIDEST / _LEVELS
    level = ((log_odds.clamp(-_WIDEST, _WIDEST - 1e-6) + _WIDEST) / width).long()
    counts = torch.zeros(_LEVELS, dtype=torch.float64, device=log_odds.device)
    counts = reduce(counts.index_add_(0, level, weight.double()))
    centers = (torch.arange(_LEVELS, device=counts.device) + 0.5) * width - _WIDEST
    low, high = -_WIDEST, _WIDEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_high = (counts * (centers + middle).sigmoid()).sum() > mean * counts.sum()
        low, high = (low, middle) if too_high else (middle, high)
    return torch.sigmoid(log_odds + (low + high) / 2)


def in_order_of(score: Tensor, value: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce) -> Tensor:
    """Return the same values, handed out anew: the sample of the highest score gets the largest.

    Args:
        score: (n,), finite.
        value: (n,) probabilities.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        (n,) float64, to about a thousandth in log-odds; equal only where the scores are.

    Example:
        >>> in_order_of(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.1, 0.2, 0.9]), torch.ones(3)).argsort()
        tensor([1, 2, 0])
    """
    score, w = score.double(), weight.double()
    number, total, squares = reduce(torch.stack([w.sum(), w @ score, w @ score.square()]))
    deviation = (squares / number - (total / number) ** 2).clamp(min=1e-24).sqrt()
    place = ((score - total / number) / deviation).clamp(-_DEVIATIONS, _DEVIATIONS) / (2 * _DEVIATIONS) + 0.5
    log_odds = torch.logit(value.double(), eps=1e-15).clamp(-_WIDEST, _WIDEST) / (2 * _WIDEST) + 0.5
    counts = reduce(torch.stack([_histogram(place, w), _histogram(log_odds, w)]))
    share = _interpolated(place * _BINS, torch.cat([counts.new_zeros(2, 1), counts.cumsum(1)], dim=1)[0])
    edges = torch.cat([counts.new_zeros(1), counts[1].cumsum(0)])
    # Where the values' histogram has reached as much; a slope of next to nothing keeps the empty bins in order.
    edges = edges + torch.linspace(0, 1e-9, len(edges), dtype=torch.float64, device=edges.device) * number
    at = torch.searchsorted(edges, share.contiguous()).clamp(1, _BINS)
    part = (share - edges[at - 1]) / (edges[at] - edges[at - 1])
    return torch.sigmoid(((at - 1 + part.clamp(0, 1)) / _BINS - 0.5) * 2 * _WIDEST)


def _histogram(place: Tensor, weight: Tensor) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.float64, device=place.device)
    return counts.index_add_(0, (place * _BINS).long().clamp(0, _BINS - 1), weight)


def _interpolated(at: Tensor, edges: Tensor) -> Tensor:
    low = at.long().clamp(0, len(edges) - 2)
    return edges[low] + (at - low) * (edges[low + 1] - edges[low])


@dataclass(frozen=True, eq=False)
class ExpectedPrecision:
    """How many of a list will be right, at any depth.

    Args:
        count: (bins,) how many samples the list has down to each bin, the most suspect first.
        right: (bins,) how many of them are expected to be wrong labels.
        threshold: (bins,) probability down to which each bin reaches.
    """

    count: Tensor
    right: Tensor
    threshold: Tensor

    def at_depth(self, depths: Sequence[float]) -> list[float]:
        """Return the expected precision of the first so many samples."""
        at = torch.as_tensor(depths, dtype=torch.float64, device=self.count.device)
        place = torch.searchsorted(self.count, at).clamp(max=len(self.count) - 1)
        before_count = torch.where(place > 0, self.count[place - 1], 0)
        before_right = torch.where(place > 0, self.right[place - 1], 0)
        part = ((at - before_count) / (self.count[place] - before_count).clamp(min=1e-12)).clamp(0, 1)
        right = before_right + part * (self.right[place] - before_right)
        return (right / at.clamp(min=1e-12)).clamp(0, 1).tolist()

    def longest(self, precision: float, least: float = 0.0) -> tuple[float, float, float]:
        """Return length, threshold and expected precision of the longest list of at least that expected precision.

        Args:
            precision: that is asked for.
            least: probability below which no sample is in it.
        """
        mean = self.right / self.count.clamp(min=1e-12)
        enough = ((mean >= precision) & (self.count > 0) & (self.threshold >= least)).nonzero().flatten()
        if not len(enough):
            return 0.0, 1.0, 0.0
        last = enough[-1]
        return self.count[last].item(), self.threshold[last].item(), mean[last].item()


def expected_precision(probability: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce) -> ExpectedPrecision:
    """Return what to expect of the samples in the order of their probability of being wrong.

    Args:
        probability: (n,).
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Example:
        >>> list_of = expected_precision(torch.tensor([0.9, 0.7, 0.1]), torch.ones(3))
        >>> [round(each, 2) for each in list_of.at_depth([1, 2, 3])]
        [0.9, 0.8, 0.57]
        >>> round(list_of.longest(0.75)[0])
        2
    """
    p, w = probability.double(), weight.double()
    place = torch.logit(p, eps=1e-15).clamp(-_WIDEST, _WIDEST) / (2 * _WIDEST) + 0.5
    counts = reduce(torch.stack([_histogram(place, w), _histogram(place, w * p)])).flip(1).cumsum(1)
    edges = torch.arange(_BINS - 1, -1, -1, dtype=torch.float64, device=p.device) / _BINS
    return ExpectedPrecision(counts[0], counts[1], torch.sigmoid((edges - 0.5) * 2 * _WIDEST))


def longest_list(
    probability: Tensor, weight: Tensor, precision: float, *, reduce: Reduce = no_reduce
) -> tuple[Tensor, float]:
    """Return the samples of the longest list with that expected share of wrong labels, and the share.

    Args:
        probability: (n,) of being wrong; a sample below :data:`LEAST` is on no list.
        weight: (n,), 0 for a row that does not count.
        precision: that is asked for.
        reduce: sums over the ranks, each of which must ask.

    Returns:
        (n,) bool, and the expected precision of all ranks' lists together, 0 for none.

    Example:
        >>> longest_list(torch.tensor([0.9, 0.8, 0.1]), torch.ones(3), 0.8)[0]
        tensor([ True,  True, False])
    """
    number, threshold, expected = expected_precision(probability, weight, reduce=reduce).longest(precision, LEAST)
    return (probability >= threshold) & (number > 0), expected
