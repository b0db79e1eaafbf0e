"""Labels of samples: reasons, decisions, and the samples of each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_unlearn.results.partition import Partition


REASONS = ("none", "label", "input", "both")
"""Why a sample is not clean; ``Partition.reason`` holds positions in this tuple."""

LISTS = ("suspect", "clean", "review")
"""Which list a sample is on."""

DECISIONS = ("keep", "drop", "relabel")
"""What becomes of a sample."""


def indices_by_class(label: Tensor) -> list[tuple[int, Tensor]]:
    """Return the classes that are given, each with the samples that are given it.

    Args:
        label: (N,) int64, -1 for none; or (N, L), 1 for a label that the sample has.

    Returns:
        pairs of a class and (K,) int64 positions, ascending.

    Example:
        >>> indices_by_class(torch.tensor([2, 0, 2, -1]))
        [(0, tensor([1])), (2, tensor([0, 2]))]
    """
    if label.ndim == 2:
        columns = [(c, (column == 1).nonzero().flatten()) for c, column in enumerate(label.T)]
        return [(c, members) for c, members in columns if len(members)]
    order = label.argsort(stable=True)
    order = order[int((label < 0).sum()) :]
    counts = label[order].bincount()
    classes = counts.nonzero().flatten()
    members = order.tensor_split(counts[classes].cumsum(dim=0)[:-1])
    return list(zip(classes.tolist(), members, strict=True))


def any_label(one: Tensor) -> Tensor:
    """Return (N,) bool of a bool for each sample, (N,), or for each of its labels, (N, L)."""
    return one.any(dim=1) if one.ndim == 2 else one


def label_issue_mask(partition: Partition) -> Tensor:
    """Return (N,) bool, the samples that are suspected for their label, and for which another one is suggested.

    Not those suspected only for their input, of whose label nothing is said.
    """
    differs = any_label((partition.label >= 0) & (partition.suggested_label != partition.label))
    return ~partition.is_clean & (partition.reason != REASONS.index("input")) & differs


def cut_of(partition: Partition) -> float | None:
    """Return the p(clean) between suspect and clean: one half where it separates them, else the middle of the gap.

    None without suspects. Below it there may be clean samples, of a class of which too few would be left.
    """
    judged = torch.ones_like(partition.is_clean) if partition.is_multilabel else partition.label >= 0
    suspect = partition.clean_probability[judged & ~partition.is_clean]
    if not len(suspect):
        return None
    low = float(suspect.max())
    above = partition.clean_probability[judged & partition.is_clean & (partition.clean_probability > low)]
    high = float(above.min()) if len(above) else 1.0
    return 0.5 if low < 0.5 <= high else (low + high) / 2


def positive_labels(label: Tensor) -> list[list[int]]:
    """Return the labels that each sample of a multi-label task has.

    Args:
        label: (N, L), 1 for a label that the sample has.

    Example:
        >>> positive_labels(torch.tensor([[1, 0, 1], [0, 0, 0]]))
        [[0, 2], []]
    """
    return [row.nonzero().flatten().tolist() for row in label == 1]


KEEP, DROP, RELABEL = range(len(DECISIONS))
UNDECIDED = -1
