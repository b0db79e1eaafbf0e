"""Suspects per class, and which classes are confused with each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_unlearn.results.labels import indices_by_class, label_issue_mask

if TYPE_CHECKING:
    from lightning_unlearn.results.partition import Partition


@dataclass(frozen=True)
class ClassSummary:
    """Suspects among the samples of one given label.

    Args:
        label: the given label.
        samples: number of samples with this label.
        suspects: number of them that are not clean.
        noise_rate: estimated share of them that are not clean; None if that of the partition is None.
        confused_with: the most frequent suggested label of those with a wrong label; None if there are none.
        confused_samples: number of samples with that suggested label.
    """

    label: int
    samples: int
    suspects: int
    noise_rate: float | None
    confused_with: int | None
    confused_samples: int


def confusion_counts(given: Tensor, suggested: Tensor, classes: Tensor) -> Tensor:
    """Return (S, S) int64, counts of given (rows) against suggested labels (columns) for some classes.

    Args:
        given: (K,) int64, labels.
        suggested: (K,) int64, other labels of the same samples.
        classes: (S,) int64, ascending; other classes are not counted.

    Example:
        >>> confusion_counts(torch.tensor([4, 4, 9]), torch.tensor([9, 9, 1]), torch.tensor([4, 9]))
        tensor([[0, 2],
                [0, 0]])
    """
    known = torch.cat([given, suggested, classes])
    place = torch.full((1 + int(known.max()) if len(known) else 0,), -1)
    place[classes] = torch.arange(len(classes))
    row, column = place[given], place[suggested]
    inside = (row >= 0) & (column >= 0)
    cell = row[inside] * len(classes) + column[inside]
    return cell.bincount(minlength=len(classes) ** 2).reshape(len(classes), len(classes))


def most_confused(label: Tensor, suggested: Tensor) -> dict[int, tuple[int, int]]:
    """Return, for each label, the label most often suggested instead (the first of several), and how often."""
    counts = Counter(zip(label.tolist(), suggested.tolist(), strict=True))
    found: dict[int, tuple[int, int]] = {}
    for (c, to), count in sorted(counts.items()):
        if count > found.get(c, (0, 0))[1]:
            found[c] = to, count
    return found


def summary_of_classes(partition: Partition) -> list[ClassSummary]:
    """Return what was found in each class of given labels, the class with the largest share of suspects first."""
    classes = int(torch.cat([partition.label, partition.suggested_label]).max()) + 1 if len(partition) else 0
    suspect = ~partition.is_clean
    judged = partition.label >= 0
    wrong = label_issue_mask(partition)
    confused = most_confused(partition.label[wrong], partition.suggested_label[wrong])
    samples, suspects = (partition.label[x].bincount(minlength=classes) for x in (judged, judged & suspect))
    doubt = torch.zeros(classes, dtype=torch.float64)
    doubt.index_add_(0, partition.label[judged], 1 - partition.clean_probability[judged].double())
    rows = [
        ClassSummary(
            label=c,
            samples=int(samples[c]),
            suspects=int(suspects[c]),
            noise_rate=None if partition.noise_rate is None else float(doubt[c] / samples[c]),
            confused_with=confused.get(c, (None, 0))[0],
            confused_samples=confused.get(c, (None, 0))[1],
        )
        for c in range(classes)
        if samples[c] > 0
    ]
    return sorted(rows, key=lambda row: -row.suspects / row.samples)


def summary_of_labels(partition: Partition) -> list[ClassSummary]:
    """Return, for each label of a multi-label task, how many of the samples that have it have it wrongly."""
    wrong = partition.suggested_label != partition.label
    rows = [
        ClassSummary(
            label=c,
            samples=len(members),
            suspects=int(wrong[members, c].sum()),
            noise_rate=None if partition.noise_rate is None else float(1 - doubt),
            confused_with=None,
            confused_samples=0,
        )
        for c, members in indices_by_class(partition.label)
        for doubt in [partition.label_probability[members, c].double().mean()]
    ]
    return sorted(rows, key=lambda row: -row.suspects / row.samples)
