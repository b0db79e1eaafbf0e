"""Which samples a rank judges, and where its evidence of them lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.utilities.exchange import Exchange, keep
from lightning_unlearn.utilities.reduce import Reduce, no_reduce


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
        """Return every R-th sample of a data set, of all of which each rank has the evidence."""
        index, weight = shard_indices(total, ranks.rank, ranks.number)
        return cls(index, weight, index, total)
