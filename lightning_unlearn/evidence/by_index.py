"""Evidence of samples that have a dataset index: each lies on one rank, the index modulo the number of ranks.

A rank of several notes what its own training steps show, of whichever samples they drew. When an epoch ends, the ranks
hand over what they have noted, each sample to the rank that owns it, so that no rank holds more than its share. The
passes need no such exchange: a rank passes over the samples that it owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_unlearn.evidence.rank_share import Ranks, is_too_large, shared_out
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics

# Rows that a rank hands over at a time.
_AT_A_TIME = 16_384
# Samples with two labels that are named.
_MOST_NAMED = 8
_SHORT = 2**31
# Instead of evidence that is not in a checkpoint.
_PART = {"is_part": True}
_SCALE = 255  # of positions


class _Noted(NamedTuple):
    """Of some rows of training steps: the finite ones with what is kept of them, and all of them with their labels."""

    finite: Tensor
    kept: Tensor
    every: Tensor
    label: Tensor


class IndexedEvidence:
    """Where the evidence of each sample of a data set lies, and what a rank has noted of an epoch for the owners.

    Sample i is number ``i // R`` on rank ``i mod R``; of several labels, it has as many rows.

    Attributes:
        ranks: of the fit; None outside of one, and after an exception.
        total: N, the samples of all ranks.
        positions: (n,) uint8, how much of the epoch had passed when each of this rank's samples was drawn last, from 1
            to 255, 0 of one that was not drawn; None where that is not asked for.
    """

    def __init__(self) -> None:
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return {**self.__dict__, "ranks": None}

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.ranks: Ranks | None = None
        self.total = self._rows_per_sample = 0
        self.positions: Tensor | None = None
        self._probed: tuple[Tensor, Tensor] | None = None
        self.drop()

    def drop(self) -> None:
        """Forget what was noted since the last exchange."""
        self._noted: list[_Noted] = []
        self._places: list[tuple[Tensor, int]] = []

    def start(self, ranks: Ranks, total: int, rows_per_sample: int) -> None:
        """Take of what the evidence is.

        Args:
            ranks: of the fit.
            total: N.
            rows_per_sample: L.
        """
        self.ranks, self.total, self._rows_per_sample = ranks, total, rows_per_sample

    @property
    def in_use(self) -> Ranks:
        """Return the ranks.

        Raises:
            RuntimeError: where there are none.
        """
        if self.ranks is None:
            raise RuntimeError("No evidence is being gathered; this is an error in lightning_unlearn.")
        return self.ranks

    @property
    def is_shared(self) -> bool:
        """Return whether there are other ranks that own samples."""
        return self.ranks is not None and self.ranks.number > 1

    @property
    def rows(self) -> int:
        """Return how many rows this rank's own samples have, as many as on every other; some only pad."""
        return shared_out(self.total, self.in_use.number) * self._rows_per_sample

    def local(self, index: Tensor) -> Tensor:
        """Return (n,) int64, the row on its owner of each row, by its number among those of all ranks."""
        per_sample, number = self._rows_per_sample, self.in_use.number
        if number == 1:
            return index
        return index // (per_sample * number) * per_sample + index % per_sample

    def _owner(self, index: Tensor) -> Tensor:
        return index // self._rows_per_sample % self.in_use.number

    def own_rows(self) -> Tensor:
        """Return (n,) int64, the numbers of this rank's rows among those of all ranks; -1 for one that only pads."""
        ranks, per_sample = self.in_use, self._rows_per_sample
        index = torch.arange(ranks.rank, ranks.rank + self.rows // per_sample * ranks.number, ranks.number)
        rows = (index.unsqueeze(1) * per_sample + torch.arange(per_sample)).flatten()
        return rows.where(rows < self.total * per_sample, -1)

    def place(self, index: Tensor, position: float) -> None:
        """Note how much of the epoch had passed when samples were drawn.

        Args:
            index: (B,) int64, of samples.
            position: in [0, 1).
        """
        if self.positions is None:
            return
        place = 1 + int(position * _SCALE)
        if self.is_shared:
            self._places.append((self._short(index), place))
        else:
            self.positions[index] = place

    def probe(self, index: Tensor, label: Tensor) -> None:
        """Note labels that are known before the first step; those of steps are compared with them.

        Args:
            index: (n,) int64, of rows, on every rank the same.
            label: (n,) int64.
        """
        own = self._owner(index) == self.in_use.rank
        rows, order = self.local(index[own]).sort(stable=True)
        self._probed = rows, label[own][order]

    def note(self, trajectory: TrainingDynamics, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Note rows of training steps.

        Args:
            trajectory: of this rank's own samples.
            index: (B,) int64, the rows by their number among those of all ranks.
            logits: (B, C).
            label: (B,) int64.
        """
        if not self.is_shared:
            trajectory.observe(index, logits, label)
            return
        finite, kept = trajectory.described(index, logits, label)
        every = self._short(index)
        of_kept = every if len(finite) == len(index) else self._short(finite)
        self._noted.append(_Noted(of_kept, kept, every, self._short(label.cpu())))

    def _short(self, index: Tensor) -> Tensor:
        """Return the same numbers in four bytes each, where these can hold the number of a row."""
        return index.int() if self.total * self._rows_per_sample < _SHORT else index

    def hand_over(self, trajectory: TrainingDynamics) -> Tensor:
        """Bring what was noted to the owners of the samples. Every rank must call it, once an epoch.

        Args:
            trajectory: of this rank's own samples; takes it as not merged yet.

        Returns:
            (k,) int64, the same on every rank, rows that have come with another label than the one known before, at
            most 8 of each rank.
        """
        ranks, differ = self.in_use, [torch.zeros(0, dtype=torch.int64)]
        if ranks.number == 1:
            return differ[0]
        turns = list(self._turns())
        turns += [[]] * (ranks.most(len(turns)) - len(turns))
        places, self._noted, self._places = self._places, [], []
        # From the last on, so that what has been handed over does not stay in memory.
        while turns:
            differ += [
                self._take(trajectory, part) for part in ranks.exchange(self._parts(turns.pop(), trajectory.row_width))
            ]
        if self.positions is not None:
            self._hand_over_places(places, self.positions)
        return self._of_all_ranks(torch.cat(differ)[:_MOST_NAMED])

    def _turns(self) -> Iterator[list[_Noted]]:
        """Yield what was noted, in portions of about equal size."""
        turn: list[_Noted] = []
        rows = 0
        for noted in self._noted:
            turn.append(noted)
            rows += len(noted.every)
            if rows >= _AT_A_TIME:
                yield turn
                turn, rows = [], 0
        if turn:
            yield turn

    def _parts(self, turn: list[_Noted], width: int) -> list[_Noted]:
        """Return for each rank what is its own."""
        none = torch.zeros(0, dtype=torch.int32)
        empty = _Noted(none, torch.zeros(0, width), none, none)
        finite, kept, index, label = (torch.cat(column) for column in zip(empty, *turn, strict=True))
        of_kept, of_label = self._owner(finite), self._owner(index)
        parts = []
        for rank in range(self.in_use.number):
            mine, labeled = (of_kept == rank).nonzero().flatten(), (of_label == rank).nonzero().flatten()
            parts.append(_Noted(finite[mine], kept[mine], index[labeled], label[labeled]))
        return parts

    def _take(self, trajectory: TrainingDynamics, part: _Noted) -> Tensor:
        """Take what a rank has seen of this rank's own samples, and return the rows with another label than known."""
        trajectory.add(self.local(part.finite.long()), part.kept)
        index, label = part.every.long(), part.label.long()
        rows = self.local(index)
        known = trajectory.label[rows]
        trajectory.label[rows] = known.where(known >= 0, label)
        if self._probed is not None and len(self._probed[0]):
            at = torch.searchsorted(self._probed[0], rows).clamp(max=len(self._probed[0]) - 1)
            known = known.where((known >= 0) | (self._probed[0][at] != rows), self._probed[1][at])
        return index[(known >= 0) & (known != label)]

    def _hand_over_places(self, places: list[tuple[Tensor, int]], positions: Tensor) -> None:
        """Bring to the owners when their samples were drawn; of one that two ranks drew, the later time counts."""
        ranks = self.in_use
        none = torch.zeros(0, dtype=torch.int32)
        index = torch.cat([none, *(at for at, _ in places)])
        place = torch.cat([none, *(torch.full_like(at, value) for at, value in places)]).to(torch.uint8)
        owner = index % ranks.number
        parts = [(index[owner == rank], place[owner == rank]) for rank in range(ranks.number)]
        for samples, found in ranks.exchange(parts):
            own = samples.long() // ranks.number
            positions[own] = torch.maximum(positions[own], found)

    def _of_all_ranks(self, found: Tensor) -> Tensor:
        ranks = self.in_use
        named = torch.zeros(ranks.number, _MOST_NAMED, dtype=torch.float64)
        named[ranks.rank, : len(found)] = (found + 1).double()
        named = ranks.reduce(named).flatten().long()
        return named[named > 0] - 1

    def known_labels(self, trajectory: TrainingDynamics) -> Tensor:
        """Return (N L,) int64, the label of every row as far as it is known, -1 for others. Every rank must call it."""
        if not self.is_shared:
            return trajectory.label
        rows = self.own_rows()
        known = torch.zeros(self.total * self._rows_per_sample, dtype=torch.int64)
        known[rows[rows >= 0]] = trajectory.label[rows >= 0] + 1
        return self.in_use.reduce(known) - 1

    def state_dict(self, trajectory: TrainingDynamics) -> dict[str, Any]:
        """Return the trajectory of all samples, in their order, on rank 0; elsewhere that it is not there.

        During a fit every rank must call it, as all do where Lightning writes a checkpoint. Outside of one, and after
        an exception, a rank of several has a part alone, which is of no use: nothing is kept of it. Nor is it where
        rank 0 would have to gather more than 4 GiB.
        """
        ranks = self.ranks
        is_whole = len(trajectory) == self.total * self._rows_per_sample or not self.total
        if ranks is None or ranks.number == 1:
            return trajectory.state_dict() if is_whole else dict(_PART)
        if is_too_large(trajectory.merged_bytes, ranks):
            return dict(_PART)
        mine = trajectory.state_dict()
        found = ranks.exchange([mine, *[None] * (ranks.number - 1)])
        return dict(_PART) if ranks.rank else {**mine, **self._joined(found)}

    def _joined(self, parts: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return what all ranks have, in the order of the samples."""
        per_sample, rows = self._rows_per_sample, self.total * self._rows_per_sample

        def joined(name: str, dim: int) -> Tensor:
            columns = [part[name].movedim(dim, 0) for part in parts]
            each = torch.stack([one.reshape(-1, per_sample, *one.shape[1:]) for one in columns], dim=1)
            return each.flatten(0, 2)[:rows].movedim(0, dim).contiguous()

        return {name: joined(name, dim) for name, dim in (("phases", 1), ("scores", 0), ("label", 0))}
