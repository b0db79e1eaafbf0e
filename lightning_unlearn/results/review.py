"""What a person has decided about samples: read from a table that has been through a spreadsheet, and laid over labels.

The table is what :meth:`~lightning_unlearn.results.partition.Partition.to_csv` writes. Only the columns ``index`` and
``decision`` are needed, ``suggested_label`` where a sample is re-labeled, in any order and among others. Rows that are
missing, or whose decision is empty, leave the decision to the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.fingerprint import MOST_CHANGED, fraction_changed, sampled_indices
from lightning_unlearn.results.labels import DROP, KEEP, RELABEL, UNDECIDED, any_label
from lightning_unlearn.results.review_csv import UNKNOWN, Row, Table


@dataclass(frozen=True, eq=False)
class Review:
    """Decisions about samples of a data set that they have been found to fit.

    Args:
        path: of the file.
        line: (K,) int64, of the file.
        index: (K,) int64, of the samples.
        decision: (K,) int8, position in ``DECISIONS``.
        new_label: (K,) int64, of a multi-label task (K, L), the label to train with where it is re-labeled, else -1.
        given_label: likewise, the label that the file says it was given; -2 where it does not say.
        place: what ``line`` counts: ``"line"``, or ``"task"``.
    """

    path: str
    line: Tensor
    index: Tensor
    decision: Tensor
    new_label: Tensor
    given_label: Tensor
    place: str = "line"

    def __len__(self) -> int:
        return len(self.index)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def counts(self) -> str:
        """Return how many decisions there are, in words."""
        kept, dropped, relabeled = (int((self.decision == code).sum()) for code in (KEEP, DROP, RELABEL))
        return f"decided in {self.path}: keep {kept:,}, drop {dropped:,}, relabel {relabeled:,}"

    def equals(self, other: Review) -> bool:
        """Return whether the same is decided of the same samples, in whatever order."""
        mine, others = ((one.index.argsort(), one) for one in (self, other))
        return all(
            torch.equal(getattr(mine[1], name)[mine[0]], getattr(others[1], name)[others[0]])
            for name in ("index", "decision", "new_label")
        )

    def compared(self) -> Tensor:
        """Return (M,) int64, positions of up to 16 decisions, spread over them, to compare labels of."""
        known = (~any_label(self.given_label == UNKNOWN)).nonzero().flatten()
        return known[sampled_indices(len(known))]

    def check_labels(self, positions: Tensor, label: Tensor) -> None:
        """Refuse labels that are not those that the file says were given.

        Args:
            positions: (M,) int64, of decisions.
            label: (M,) int64 or (M, L), the labels of their samples.

        Raises:
            ValueError: with the line.
        """
        given = self.given_label[positions]
        differ = any_label((given != label) & (label >= 0)).nonzero().flatten()
        if len(differ):
            at = int(positions[differ[0]])
            raise ValueError(
                f"{self.path}, {self.place} {int(self.line[at])}: expected given_label to be the label of sample"
                f" {int(self.index[at])}, {label[differ[0]].tolist()}, but it is {given[differ[0]].tolist()}: the"
                " file belongs to another dataset, or the label has changed since. Use a file of this dataset, or"
                " delete the rows whose labels were corrected."
            )

    def apply_to(self, label: Tensor) -> AppliedReview:
        """Return what is decided of each sample of the data set.

        Args:
            label: (N,) int64 or (N, L), the given labels, -1 for one that is to be ignored.
        """
        decision = torch.full((len(label),), UNDECIDED, dtype=torch.int8)
        new = torch.full_like(label, -1)
        given = label[self.index]
        stale = (self.given_label != UNKNOWN) & (given >= 0) & (self.given_label != given)
        holds = ~any_label(stale)
        decision[self.index[holds]] = self.decision[holds]
        new[self.index[holds]] = self.new_label[holds]
        if label.ndim == 2:
            new = new.where(label >= 0, -1)
        return AppliedReview(decision, new, int((~holds).sum()))


@dataclass(frozen=True, eq=False)
class AppliedReview:
    """What is decided of each sample.

    Args:
        decision: (N,) int8, position in ``DECISIONS``, -1 where nothing is decided.
        new_label: (N,) int64 or (N, L), the label to train with, -1 for the given one.
        stale: how many decisions do not count, since the label has been changed after they were made.
    """

    decision: Tensor
    new_label: Tensor
    stale: int


def validate_review(
    table: Table, *, total: int, classes: int, labels: int | None = None, fingerprint: str = "", content: bool = True
) -> Review:
    """Return decisions that fit a data set.

    Args:
        table: what a file holds.
        total: N.
        classes: C, that a label may name.
        labels: L of a multi-label task, else None.
        fingerprint: of the data set.
        content: whether to compare that, or only the length.

    Raises:
        ValueError: with the line, for what does not fit.
    """
    share = fraction_changed(table.mark, fingerprint if content else f"{total}:")
    if share > MOST_CHANGED:
        was = table.mark[1:].partition("-")[0]
        how = f"{was} samples" if was != str(total) else f"as many, but {share:.0%} of those compared differ"
        raise ValueError(
            f"Expected {table.path} to belong to this training set of {total} samples, but it belongs to"
            f" another ({how}). Use the file written for this one. If only the preprocessing has changed, on"
            " purpose, set data=DataFormat(verify=False)."
        )
    for row in table.rows:
        _check_fits(f"{table.path}, {table.place} {row.line}", row, total, classes, single=labels is None)
    return Review(
        path=table.path,
        line=torch.tensor([row.line for row in table.rows], dtype=torch.int64),
        index=torch.tensor([row.index for row in table.rows], dtype=torch.int64),
        decision=torch.tensor([row.decision for row in table.rows], dtype=torch.int8),
        new_label=_labels([row.new if row.decision == RELABEL else None for row in table.rows], labels, -1),
        given_label=_labels([row.given for row in table.rows], labels, UNKNOWN),
        place=table.place,
    )


def _check_fits(where: str, row: Row, total: int, classes: int, *, single: bool) -> None:
    if not 0 <= row.index < total:
        found = row.index if row.index >= 0 else f"left out (key {row.key!r})"
        raise ValueError(f"{where}: expected index to lie in [0, {total}), but it is {found}.")
    check_classes(where, row, classes, single=single)


def check_classes(where: str, row: Row, classes: int, *, single: bool) -> None:
    """Refuse a decision to re-label as a class that there is not.

    Args:
        where: it stands, for the message.
        row: of the file.
        classes: C.
        single: whether a sample has one label.

    Raises:
        ValueError: saying where.
    """
    if row.decision != RELABEL:
        return
    if single and len(row.new) != 1:
        raise ValueError(f"{where}: expected suggested_label to be one class, but it is {list(row.new)}.")
    if wrong := [one for one in row.new if not 0 <= one < classes]:
        raise ValueError(
            f"{where}: expected suggested_label to be in [0, {classes}), since the model has {classes}"
            f" classes, but it is {wrong[0]}."
        )


def _labels(found: list[tuple[int, ...] | None], labels: int | None, unknown: int) -> Tensor:
    """Return (K,) int64, or (K, L) with 1 for each that a sample has."""
    if labels is None:
        return torch.tensor([one[0] if one else unknown for one in found], dtype=torch.int64)
    placed = torch.zeros(len(found), labels, dtype=torch.int64)
    for at, one in enumerate(found):
        if one is None:
            placed[at] = unknown
        else:
            placed[at, [label for label in one if 0 <= label < labels]] = 1
    return placed
