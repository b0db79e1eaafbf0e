"""Which samples a rank judges, and where its evidence of them lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_warn
from lightning_unlearn.utilities.exchange import Exchange, keep
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

MOST_GATHERED = 4 * 2**30
"""Bytes of evidence that rank 0 gathers of several ranks for a checkpoint."""


def shared_out(total: int, ranks: int) -> int:
    """Return how many of ``total`` samples each of the ranks holds, some of which only pad its share.

    Example:
        >>> shared_out(5, 2)
        3
    """
    return -(-total // ranks)


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a fit, as one of them sees them.

    Args:
        rank: of this one.
        number: R.
        reduce: sums over them.
        exchange: hands over what each has for each.
    """

    rank: int = 0
    number: int = 1
    reduce: Reduce = no_reduce
    exchange: Exchange = keep

    @classmethod
    def of(cls, fit: FitContext) -> Ranks:
        """Return the ranks of a running fit."""
        return cls(fit.rank, fit.world_size, fit.reduce, fit.exchange)

    def most(self, value: int) -> int:
        """Return the largest that any rank has. Every rank must call it."""
        of_each = torch.zeros(self.number, dtype=torch.float64)
        of_each[self.rank] = value
        return int(self.reduce(of_each).max())


def is_too_large(held: int, ranks: Ranks) -> bool:
    """Return whether it would take too much for rank 0 to gather what the ranks hold, which is then said.

    Every rank must call it. What one process holds is never too large.

    Args:
        held: bytes that this rank holds.
        ranks: of the fit.
    """
    if ranks.number == 1:
        return False
    whole = int(ranks.reduce(torch.tensor([held], dtype=torch.float64)).item())
    if whole > MOST_GATHERED:
        rank_zero_warn(
            f"The checkpoint does not contain the evidence, which takes {whole / 2**30:.1f} GiB (limit"
            f" {MOST_GATHERED / 2**30:.0f} GiB). A fit that resumes from it before the partition collects"
            " evidence again."
        )
    return whole > MOST_GATHERED


@dataclass(frozen=True, eq=False)
class RankShare:
    """Which samples a rank judges: as many on every rank, some of which only pad its share.

    Args:
        index: (n,) int64, their rows in the partition.
        weight: (n,) float32, 0 for one that only pads.
        local: (n,) int64, where they are in the rank's evidence.
        total: N, of all ranks.
    """

    index: Tensor
    weight: Tensor
    local: Tensor
    total: int

    @classmethod
    def by_index(cls, total: int, ranks: Ranks) -> RankShare:
        """Return every R-th sample of a data set, in their order."""
        index, weight = shard_indices(total, ranks.rank, ranks.number)
        return cls(index, weight, torch.arange(len(index)), total)
