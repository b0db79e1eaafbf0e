"""Evidence of samples with a dataset index, sharded over ranks: the owner of a sample is its index modulo world size.

During an epoch each rank records the rows of its own training steps. At the end of the epoch the ranks exchange these
rows, each sending them to the owners of the samples, so that no rank stores more than its share. Evaluation passes need
no exchange, since each rank iterates over the samples that it owns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_unlearn.evidence.rank_share import Ranks, is_too_large, shared_out
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics

# Rows that a rank sends in one exchange.
_AT_A_TIME = 16_384
# Rows with conflicting labels that each rank reports.
_MOST_NAMED = 8
_SHORT = 2**31
# Placeholder for evidence that is left out of a checkpoint.
_PART = {"is_part": True}
_SCALE = 255  # of positions


class _Noted(NamedTuple):
    """Rows of training steps: indices and evidence of the finite rows, indices and labels of all rows."""

    finite: Tensor
    kept: Tensor
    every: Tensor
    label: Tensor


class IndexedEvidence:
    """Map samples to their owners, and buffer the rows of an epoch until they are exchanged.

    With R ranks, sample i is number ``i // R`` on rank ``i mod R``. A multi-label sample has one row per label.

    Attributes:
        ranks: the ranks of the running fit; None outside of a fit, and after an exception.
        total: N, number of samples over all ranks.
        positions: (n,) uint8, the position in the epoch at which each of this rank's samples was last drawn, from 1
            to 255, 0 if it was not drawn; None if positions are not recorded.
    """

    def __init__(self) -> None:
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not hold objects of the running fit.
        return {**self.__dict__, "ranks": None}

    def reset(self) -> None:
        """Discard everything from an earlier fit."""
        self.ranks: Ranks | None = None
        self.total = self._rows_per_sample = 0
        self.positions: Tensor | None = None
        self._probed: tuple[Tensor, Tensor] | None = None
        self.drop()

    def drop(self) -> None:
        """Discard the rows recorded since the last exchange."""
        self._noted: list[_Noted] = []
        self._places: list[tuple[Tensor, int]] = []

    def start(self, ranks: Ranks, total: int, rows_per_sample: int) -> None:
        """Set the size of the evidence.

        Args:
            ranks: the ranks of the fit.
            total: N, number of samples over all ranks.
            rows_per_sample: L, number of labels per sample.
        """
        self.ranks, self.total, self._rows_per_sample = ranks, total, rows_per_sample

    @property
    def in_use(self) -> Ranks:
        """Return the ranks.

        Raises:
            RuntimeError: outside of a fit.
        """
        if self.ranks is None:
            raise RuntimeError("No evidence is being gathered; this is an error in lightning_unlearn.")
        return self.ranks

    @property
    def is_shared(self) -> bool:
        """Return whether samples are distributed over several ranks."""
        return self.ranks is not None and self.ranks.number > 1

    @property
    def rows(self) -> int:
        """Return the number of rows of this rank's samples, padded to the same number on every rank."""
        return shared_out(self.total, self.in_use.number) * self._rows_per_sample

    def local(self, index: Tensor) -> Tensor:
        """Map global row numbers (n,) to row numbers on their owners, (n,) int64."""
        per_sample, number = self._rows_per_sample, self.in_use.number
        if number == 1:
            return index
        return index // (per_sample * number) * per_sample + index % per_sample

    def _owner(self, index: Tensor) -> Tensor:
        return index // self._rows_per_sample % self.in_use.number

    def own_rows(self) -> Tensor:
        """Return (n,) int64, the global row numbers of this rank's rows; -1 for padding."""
        ranks, per_sample = self.in_use, self._rows_per_sample
        index = torch.arange(ranks.rank, ranks.rank + self.rows // per_sample * ranks.number, ranks.number)
        rows = (index.unsqueeze(1) * per_sample + torch.arange(per_sample)).flatten()
        return rows.where(rows < self.total * per_sample, -1)

    def place(self, index: Tensor, position: float) -> None:
        """Record the position in the epoch at which samples were drawn.

        Args:
            index: (B,) int64, dataset indices.
            position: fraction of the epoch, in [0, 1).
        """
        if self.positions is None:
            return
        place = 1 + int(position * _SCALE)
        if self.is_shared:
            self._places.append((self._short(index), place))
        else:
            self.positions[index] = place

    def probe(self, index: Tensor, label: Tensor) -> None:
        """Record labels that are known before the first step, to compare labels of training steps with them.

        Args:
            index: (n,) int64, global row numbers, the same on every rank.
            label: (n,) int64.
        """
        own = self._owner(index) == self.in_use.rank
        rows, order = self.local(index[own]).sort(stable=True)
        self._probed = rows, label[own][order]

    def note(self, trajectory: TrainingDynamics, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Record rows of a training step.

        Args:
            trajectory: evidence of this rank's own samples.
            index: (B,) int64, global row numbers.
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
        """Convert row numbers to int32 if all of them fit."""
        return index.int() if self.total * self._rows_per_sample < _SHORT else index

    def hand_over(self, trajectory: TrainingDynamics) -> Tensor:
        """Send the recorded rows to the owners of their samples. Every rank must call it, once per epoch.

        Args:
            trajectory: evidence of this rank's own samples; receives the rows as not yet merged.

        Returns:
            (k,) int64, global row numbers whose label differs from the one known before, at most 8 per rank; the same
            on every rank.
        """
        ranks, differ = self.in_use, [torch.zeros(0, dtype=torch.int64)]
        if ranks.number == 1:
            return differ[0]
        turns = list(self._turns())
        turns += [[]] * (ranks.most(len(turns)) - len(turns))
        places, self._noted, self._places = self._places, [], []
        # Pop from the end, so that sent rows are freed.
        while turns:
            differ += [
                self._take(trajectory, part) for part in ranks.exchange(self._parts(turns.pop(), trajectory.row_width))
            ]
        if self.positions is not None:
            self._hand_over_places(places, self.positions)
        return self._of_all_ranks(torch.cat(differ)[:_MOST_NAMED])

    def _turns(self) -> Iterator[list[_Noted]]:
        """Yield the recorded rows in portions of about equal size."""
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
        """Split a portion of rows by owner, one part per rank."""
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
        """Add rows received from a rank, and return the global row numbers with a conflicting label."""
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
        """Send positions to the owners of the samples; if several ranks drew a sample, the last position counts."""
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
        """Return (N L,) int64, the label of every row, -1 where it is unknown. Every rank must call it."""
        if not self.is_shared:
            return trajectory.label
        rows = self.own_rows()
        known = torch.zeros(self.total * self._rows_per_sample, dtype=torch.int64)
        known[rows[rows >= 0]] = trajectory.label[rows >= 0] + 1
        return self.in_use.reduce(known) - 1

    def state_dict(self, trajectory: TrainingDynamics) -> dict[str, Any]:
        """Return the evidence of all samples, in their order, on rank 0, and a placeholder on other ranks.

        During a fit every rank must call it, as all do when Lightning writes a checkpoint. With several ranks, a
        placeholder is also returned outside of a fit and after an exception, when a rank has only its own part, and if
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
        """Interleave the parts of all ranks in the order of the samples."""
        per_sample, rows = self._rows_per_sample, self.total * self._rows_per_sample

        def joined(name: str, dim: int) -> Tensor:
            columns = [part[name].movedim(dim, 0) for part in parts]
            each = torch.stack([one.reshape(-1, per_sample, *one.shape[1:]) for one in columns], dim=1)
            return each.flatten(0, 2)[:rows].movedim(0, dim).contiguous()

        return {name: joined(name, dim) for name, dim in (("phases", 1), ("scores", 0), ("label", 0))}
