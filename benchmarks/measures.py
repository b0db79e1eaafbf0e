"""How good a ranking and a list of suspects are, with the truth that their makers never saw."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from lightning_unlearn import Partition


def ranking(wrong: Tensor, score: Tensor) -> list[float]:
    """AUROC, average precision, and precision at depth k, where k is the number of wrong samples.

    Args:
        wrong: (N,) bool, some of them.
        score: (N,), the higher the more suspect.

    Example:
        >>> import torch
        >>> ranking(torch.tensor([True, False, False]), torch.tensor([0.9, 0.1, 0.2]))
        [1.0, 1.0, 1.0]
    """
    first = score.argsort(descending=True, stable=True)[: int(wrong.sum())]
    values = (roc_auc_score(wrong, score), average_precision_score(wrong, score), wrong[first].double().mean())
    return [round(float(value), 5) for value in values]


def flags(wrong: Tensor, flagged: Tensor) -> list[float]:
    """Number, precision and recall of what is flagged.

    Example:
        >>> import torch
        >>> flags(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        [1, 1.0, 0.5]
    """
    hit, number = int((wrong & flagged).sum()), int(flagged.sum())
    return [number, round(hit / max(number, 1), 5), round(hit / max(int(wrong.sum()), 1), 5)]


def quality(partition: Partition, bad: Tensor) -> dict[str, Any]:
    """The columns of a partition in the tables of the repair and of the paper's protocol.

    Args:
        partition: of N samples.
        bad: (N,) bool, the truth.
    """
    suspect = ~partition.is_clean
    row: dict[str, Any] = {
        "noise_rate": partition.noise_rate,
        "true_rate": float(bad.double().mean()),
        "flagged": float(suspect.double().mean()),
        "kept_purity": float((~bad[~suspect]).double().mean()) if (~suspect).any() else None,
        "warning": partition.warning,
    }
    if bad.any():
        row["auroc"], row["average_precision"], _ = ranking(bad, -partition.clean_probability)
        _, precision, recall = flags(bad, suspect)
        f1 = 2 * precision * recall / max(precision + recall, np.finfo(float).tiny)
        row |= {"precision": precision, "recall": recall, "f1": f1}
    return row
