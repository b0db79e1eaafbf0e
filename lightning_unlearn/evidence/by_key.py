"""Evidence of samples that are identified by a key, sharded over ranks by the hash of the key.

During an epoch each rank records the rows of its own training steps by key. At the end of the epoch the ranks exchange
these rows, each sending them to the owner of the key, which alone stores the evidence of the sample. Only the partition
has the length of the whole training set: its rows are all keys in ascending order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_unlearn.data.sample_key import Key, owners_of
from lightning_unlearn.evidence.rank_share import Ranks, RankShare, is_too_large
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.identity import mixed
from lightning_unlearn.functional.soft_margin import rivals_of

# Samples that a rank sends in one exchange.
_AT_A_TIME = 65_536
_SCALE = 254  # of positions, which are whole numbers from 1 to 255


@dataclass(frozen=True)
class EpochOfKeys:
    """Statistics of the keys of an epoch. All fields but ``example`` are the same on every rank.

    Args:
        rows: number of rows that were read.
        distinct: number of distinct keys in them.
        again: number of these keys that had occurred in an earlier epoch.
        before: number of keys known before the epoch.
        relabeled: number of rows whose label differs from the known label of their key.
        example: description of one such row; empty on a rank that has seen none.
    """

    rows: int
    distinct: int
    again: int
    before: int
    relabeled: int
    example: str = ""


class KeyedEvidence:
    """Hold the keys that this rank owns, and buffer the rows of an epoch until they are exchanged.

    Attributes:
        layer: description of the layer from which the evidence was read.
        latest: (R, 4), values of the latest training step of each row, see :func:`_of_step`; empty if all classes have
            coordinates.
        positions: (n,) uint8, the position in the last epoch at which each of this rank's samples was last drawn, from
            1 to 255, 0 if it was not drawn.
    """

    def __init__(self) -> None:
        self.layer = ""
        self.reset()

    def reset(self) -> None:
        """Discard all samples."""
        self._own: dict[Any, int] = {}
        self.latest = torch.zeros(0, 4)
        self._parts: list[dict[str, Any]] = []
        self._epochs = 0
        self.drop()

    def drop(self) -> None:
        """Discard the rows recorded since the last exchange."""
        self._slots: dict[Any, int] = {}
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._labels: list[tuple[Tensor, Tensor]] = []
        self._latest: list[tuple[Tensor, Tensor]] = []
        self._places: list[tuple[Tensor, float]] = []
        self._rows = 0
        self.positions = torch.zeros(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._own)

    @property
    def epochs(self) -> int:
        """Number of epochs of which there is evidence."""
        return self._epochs

    def slots(self, keys: Sequence[Key]) -> Tensor:
        """Return (B,) int64, the numbers that identify the keys of a batch within this epoch."""
        return torch.tensor([self._slots.setdefault(key, len(self._slots)) for key in keys], dtype=torch.int64)

    def note(self, trajectory: TrainingDynamics, index: Tensor, logits: Tensor, label: Tensor) -> None:
        """Record rows of a training step.

        Args:
            trajectory: computes the evidence to keep of each row.
            index: (B,) int64, row numbers within this epoch.
            logits: (B, C).
            label: (B,) int64.
        """
        self._rows += len(index)
        self._noted.append(trajectory.described(index, logits, label))
        self._labels.append((index, label.cpu()))
        if trajectory.has_margins:
            self._latest.append((index, _of_step(trajectory, logits.float(), label).cpu()))

    def place(self, slots: Tensor, position: float) -> None:
        """Record in which batch of the epoch samples were drawn."""
        self._places.append((slots, position))

    def labels(self, count: int | None = None) -> tuple[Tensor, int, str]:
        """Return the labels (count,) of this epoch's rows, the number of conflicting ones, and one as an example."""
        if count is None:
            count = max((int(index.max()) + 1 for index, _ in self._labels if len(index)), default=0)
        label, differ, example = torch.full((count,), -1), 0, ""
        for index, found in self._labels:
            # For several rows with the same key, keep the first label.
            known = label[index]
            label[index] = found.where(known < 0, known)
            other = (label[index] != found).nonzero().flatten()
            differ += len(other)
            if len(other) and not example:
                at = int(other[0])
                slot = int(index[at]) * len(self._slots) // max(count, 1)
                key = next(itertools.islice(self._slots, slot, None))
                example = f"{key!r} has the labels {int(label[index[at]])} and {int(found[at])}"
        return label, differ, example

    def hand_over(self, trajectory: TrainingDynamics, rows: int, ranks: Ranks) -> EpochOfKeys:
        """Send the recorded rows to the owners of their keys. Every rank must call it, once per epoch.

        Args:
            trajectory: evidence of this rank's own samples; receives the rows as not yet merged.
            rows: number of rows per sample.
            ranks: the ranks of the fit.
        """
        count, before = len(self._slots), len(self._own)
        fresh = torch.zeros(count * rows, trajectory.row_width)
        for index, noted in self._noted:
            fresh.index_add_(0, index, noted)
        label, differ, example = self.labels(count * rows)
        latest = torch.zeros(count * rows, 4 if self._latest else 0)
        for index, noted in self._latest:
            latest[index] = noted
        columns = (
            fresh.view(count, rows, -1),
            label.view(count, rows),
            latest.view(count, rows, -1),
            self._positions(count),
        )
        keys, number = list(self._slots), self._rows
        owners = owners_of(keys, ranks.number)
        self.drop()
        self.positions = torch.zeros(before, dtype=torch.uint8)
        for first in range(0, _AT_A_TIME * ranks.most(-(-count // _AT_A_TIME)), _AT_A_TIME):
            of = [
                (owners[first : first + _AT_A_TIME] == rank).nonzero().flatten() + first for rank in range(ranks.number)
            ]
            parts = [([keys[at] for at in mine.tolist()], *(column[mine] for column in columns)) for mine in of]
            for part in ranks.exchange(parts):
                others, said = self._take(trajectory, rows, *part)
                differ, example = differ + others, example or said
        drawn = self.positions > 0
        sums = torch.tensor([number, int(drawn.sum()), int(drawn[:before].sum()), before, differ])
        self._epochs += 1
        rows_read, distinct, again, known, relabeled = (int(one) for one in ranks.reduce(sums.double()).tolist())
        return EpochOfKeys(rows_read, distinct, again, known, relabeled, example)

    def _positions(self, count: int) -> Tensor:
        """Return (count,) uint8, the position in the epoch at which each sample was last drawn."""
        found = torch.ones(count, dtype=torch.uint8)
        batches = max((position for _, position in self._places), default=0) + 1
        for slots, position in self._places:
            found[slots] = 1 + int(position / batches * _SCALE)
        return found

    def _take(
        self,
        trajectory: TrainingDynamics,
        rows: int,
        keys: list[Any],
        fresh: Tensor,
        label: Tensor,
        latest: Tensor,
        position: Tensor,
    ) -> tuple[int, str]:
        """Add rows received from a rank; return the number of conflicting labels and an example, as :meth:`labels`."""
        if not keys:
            return 0, ""
        number = torch.tensor([self._own.setdefault(key, len(self._own)) for key in keys])
        trajectory.grow(len(self._own) * rows)
        more = torch.zeros(len(self._own) - len(self.positions), dtype=torch.uint8)
        self.positions = torch.cat([self.positions, more])
        self.positions[number] = torch.maximum(self.positions[number], position)
        index = _rows_of(number, rows)
        trajectory.add(index, fresh.flatten(0, 1))
        if latest.numel():
            self.latest = torch.cat([self.latest, torch.zeros(len(self._own) * rows - len(self.latest), 4)])
            self.latest[index] = latest.flatten(0, 1)
        known, label = trajectory.label[index], label.flatten()
        trajectory.label[index] = known.where(known >= 0, label)
        other = ((known >= 0) & (label >= 0) & (known != label)).nonzero().flatten()
        at = int(other[0]) if len(other) else 0
        example = f"{keys[at // rows]!r} has the labels {int(known[at])} and {int(label[at])}" if len(other) else ""
        return len(other), example

    def padded(self, trajectory: TrainingDynamics, rows: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Pad this rank's samples to the same number on every rank. Every rank must call it.

        Args:
            trajectory: evidence of this rank's samples; an empty sample is added if there is none.
            rows: number of rows per sample.
            ranks: the ranks of the fit.

        Returns:
            sample numbers (n,) int64, and weights (n,) float32, 0 for padding.
        """
        own, most = len(self._own), ranks.most(len(self._own))
        if not own and most:
            trajectory.grow(rows)
            self.positions = torch.zeros(1, dtype=torch.uint8)
        padded = torch.arange(most)
        return padded.clamp(max=max(own - 1, 0)), (padded < own).float()

    def share(self, trajectory: TrainingDynamics, rows: int, ranks: Ranks) -> tuple[RankShare, tuple[Any, ...]]:
        """Return this rank's samples, and the keys of all ranks in ascending order. Every rank must call it.

        Args:
            trajectory: evidence of this rank's samples.
            rows: number of rows per sample.
            ranks: the ranks of the fit.
        """
        local, weight = self.padded(trajectory, rows, ranks)
        of_ranks = ranks.exchange([list(self._own)] * ranks.number)
        keys = list(itertools.chain.from_iterable(of_ranks))
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
        index = order.argsort()
        first = sum(map(len, of_ranks[: ranks.rank]))
        # A rank that owns no sample pads with one of another rank, with a weight of 0.
        placed = index[first + local] if self._own else torch.zeros_like(local)
        share = RankShare(placed, weight, local, len(keys))
        return share, tuple(keys[at] for at in order.tolist())

    def state_dict(self, trajectory: TrainingDynamics | None, ranks: Ranks | None) -> dict[str, Any]:
        """Return the state as tensors and primitives: of all ranks on rank 0, or of this rank without ``ranks``.

        With ``ranks`` every rank must call it. The evidence is left out if rank 0 would have to gather more than 4 GiB,
        not counting keys.

        Args:
            trajectory: evidence of this rank's samples.
            ranks: the ranks of a running fit.
        """
        mine: dict[str, Any] = {
            "keys": list(self._own),
            "trajectory": None if trajectory is None else trajectory.state_dict(),
        }
        mine["latest"] = self.latest.clone()
        parts, whole = [mine], ranks is not None
        if ranks is not None and is_too_large(0 if trajectory is None else trajectory.merged_bytes, ranks):
            parts, whole = [], False
        elif ranks is not None and ranks.number > 1:
            parts = ranks.exchange([mine, *[None] * (ranks.number - 1)])
        return {"layer": self.layer, "epochs": self._epochs, "whole": whole, "parts": [one for one in parts if one]}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks) -> TrainingDynamics | None:
        """Load this rank's part of a state that :meth:`state_dict` returned with any number of ranks.

        Returns:
            the evidence of this rank's samples; None if the state holds none.
        """
        self.reset()
        self.layer, self._epochs = state["layer"], state["epochs"]
        parts = [part for part in state["parts"] if part["trajectory"] is not None]
        if not parts:
            return None
        mine = [(owners_of(part["keys"], ranks.number) == ranks.rank).nonzero().flatten() for part in parts]
        for part, which in zip(parts, mine, strict=True):
            for at in which.tolist():
                self._own[part["keys"][at]] = len(self._own)
        self.positions = torch.zeros(len(self._own), dtype=torch.uint8)
        rows = next((len(p["trajectory"]["label"]) // len(p["keys"]) for p in parts if p["keys"]), 1)
        if any(len(part["latest"]) for part in parts):
            of_rows = [part["latest"][_rows_of(which, rows)] for part, which in zip(parts, mine, strict=True)]
            self.latest = torch.cat(of_rows)
        of_parts = [(part["trajectory"], _rows_of(which, rows)) for part, which in zip(parts, mine, strict=True)]
        joined = {
            name: torch.cat([one[name].index_select(dim, index) for one, index in of_parts], dim=dim)
            for name, dim in (("phases", 1), ("scores", 0), ("label", 0))
        }
        return TrainingDynamics.from_state_dict({**parts[0]["trajectory"], **joined})


def _rows_of(samples: Tensor, rows: int) -> Tensor:
    """Return (n L,) int64, the row numbers of the L rows of each sample."""
    return (samples.unsqueeze(1) * rows + torch.arange(rows)).flatten()


def last_seen(
    trajectory: TrainingDynamics, rows: Tensor, index: Tensor, latest: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the results of an evaluation pass from the last part of training in which each sample was drawn.

    Args:
        trajectory: evidence of training steps.
        rows: (n,) int64, row numbers on this rank.
        index: (n,) int64, global row numbers.
        latest: (R, 4), values of the latest training step of each row (:func:`_of_step`), if more classes occur than
            have coordinates.

    Returns:
        tensors with the names of :meth:`ScoringPass.run <lightning_unlearn.evidence.eval_pass.ScoringPass.run>`.
    """
    label = trajectory.label[rows]
    given = label.clamp(min=0)
    last = _latest(trajectory.phases(rows), (len(rows), trajectory.basis.shape[1]))
    found = {"label": label, "identity": mixed(index + 1), "last": last}
    if trajectory.has_margins and latest is not None and len(latest):
        rival, share, margin, loss = latest[rows].unbind(dim=1)
        soft = trajectory.soft_margins(rows)
        found["soft_margins"] = _latest(soft, (len(rows), soft[0].shape[1]))
        found |= {"runner_up": rival.long(), "runner_up_probability": share, "margin": margin, "loss": loss}
        return found | {"prediction": torch.where(margin > 0, given, rival.long())}
    absent = torch.full((trajectory.num_classes,), -torch.inf)
    absent[trajectory.classes] = 0
    logits = last @ trajectory.basis.T + absent
    return found | {
        "margin": label_margin(logits, given),
        "loss": cross_entropy(logits, given, reduction="none"),
        "prediction": logits.argmax(dim=1),
    }


def _of_step(trajectory: TrainingDynamics, logits: Tensor, label: Tensor) -> Tensor:
    """Return (B, 4): strongest other class, its probability among the others, label margin, and cross-entropy."""
    rival, share = rivals_of(logits, label, trajectory.classes)
    loss = cross_entropy(logits, label, reduction="none")
    return torch.stack([rival.float(), share, label_margin(logits, label), loss], dim=1)


def _latest(phases: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return (n, r), the values of the last phase in which each row was drawn; NaN if it never was."""
    last = torch.full(shape, torch.nan)
    for phase in phases:
        last = torch.where(phase.isfinite(), phase, last)
    return last
