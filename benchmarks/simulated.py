"""Ranks without processes: a thread each, and a sum and an exchange that wait for all of them."""

# The tests have fewer lines of the same in tests/ranks.py, with a time limit and nothing counted: they are shipped
# without the benchmarks, and the package, which both could import, has no use for either.

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.evidence.rank_share import Ranks


class SimulatedRanks:
    """So many ranks in this process.

    Args:
        world_size: R.

    Attributes:
        collectives: sums so far.
        bytes: that each rank gave to them.
        handed_over: bytes that the ranks have handed to others.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.collectives = 0
        self.bytes = 0
        self.handed_over = 0
        self._parts: dict[int, Tensor] = {}
        self._sum = torch.empty(0)
        # The last one to come adds up for all.
        self._gathered = threading.Barrier(world_size, self._add_up)
        self._taken = threading.Barrier(world_size)
        self._board: dict[int, list[Any]] = {}
        self._noted = threading.Barrier(world_size, self._count)
        self._rank = threading.local()

    def of(self, rank: int) -> Ranks:
        """The ranks, as one of them sees them."""
        return Ranks(rank, self.world_size, self.reduce, self.exchange)

    def reduce(self, part: Tensor) -> Tensor:
        """The sum of what the ranks give; each must call it, with equal shapes."""
        self._parts[self._rank.number] = part
        self._gathered.wait()
        total = self._sum.clone()
        self._taken.wait()
        return total

    def exchange(self, parts: Sequence[Any]) -> list[Any]:
        """What each rank has for this one; each must call it."""
        mine = self._rank.number
        self._board[mine] = list(parts)
        self._noted.wait()
        found = [self._board[rank][mine] for rank in range(self.world_size)]
        self._taken.wait()
        return found

    def _count(self) -> None:
        for rank, parts in self._board.items():
            self.handed_over += sum(len(pickle.dumps(part)) for other, part in enumerate(parts) if other != rank)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work(rank)`` returns on every rank.

        Raises:
            RuntimeError: if a rank failed, or came to another sum than the others.
        """
        made: list[Any] = [None] * self.world_size
        failed: list[BaseException] = []

        def on_rank(rank: int) -> None:
            self._rank.number = rank
            try:
                made[rank] = work(rank)
            except BaseException as error:
                failed.append(error)
                for barrier in (self._gathered, self._noted, self._taken):
                    barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            cause = next((one for one in failed if not isinstance(one, threading.BrokenBarrierError)), failed[0])
            raise RuntimeError(f"{len(failed)} of {self.world_size} ranks failed.") from cause
        return made

    def _add_up(self) -> None:
        parts = [self._parts[rank] for rank in range(self.world_size)]
        if len({(part.shape, part.dtype) for part in parts}) != 1:
            raise ValueError("The ranks came to different sums.")
        self._sum = torch.stack(parts).sum(dim=0)
        self.collectives += 1
        self.bytes += parts[0].nbytes
