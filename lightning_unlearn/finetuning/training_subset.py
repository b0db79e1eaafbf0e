"""Which samples fine-tuning trains on, how often, and under which label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.results.labels import any_label
from lightning_unlearn.results.partition import Partition

OnNoisy = Literal["drop", "reweight", "relabel"]
"""What becomes of the samples that are not clean."""


@dataclass(frozen=True, eq=False)
class TrainingSubset:
    """Which samples are trained on, how often, and what they are called.

    Args:
        index: (K,) int64, dataset indices, ascending.
        probability: (K,) float32, with which each is drawn in an epoch; None for all in every epoch.
        new_label: (N,) int64, or (N, L) of a multi-label task, the label to train with in place of the given one, -1
            for the given one; None where no label is replaced.
    """

    index: Tensor
    probability: Tensor | None = None
    new_label: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the state as tensors only."""
        return {"index": self.index, "probability": self.probability, "new_label": self.new_label}

    @property
    def relabeled(self) -> Tensor:
        """(R,) int64, the dataset indices whose label is replaced."""
        none = torch.zeros(0, dtype=torch.int64)
        return none if self.new_label is None else any_label(self.new_label >= 0).nonzero().flatten()


def make_training_subset(partition: Partition, on_noisy: OnNoisy, relabel_threshold: float) -> TrainingSubset:
    """Return what is to be trained on after the partition.

    Args:
        partition: of the training set.
        on_noisy: ``"drop"``: the clean samples but the doubtful ones; ``"reweight"``: every sample with its probability
            of being clean; ``"relabel"``: as ``"drop"``, and those whose label is wrong with the suggested one where
            that is likely enough. A sample whose input is corrupted is not worth a new label.
        relabel_threshold: the least probability of a suggested label that is used.

    Example:
        >>> partition = Partition(
        ...     clean_probability=torch.tensor([0.9, 0.1, 0.2]),
        ...     is_clean=torch.tensor([True, False, False]),
        ...     suggested_label=torch.tensor([3, 1, 2]),
        ...     suggested_probability=torch.tensor([0.9, 0.9, 0.4]),
        ...     noise_rate=0.6,
        ...     label=torch.tensor([3, 7, 7]),
        ...     label_evidence=torch.tensor([0.9, 0.1, 0.2]),
        ...     input_evidence=torch.ones(3),
        ...     reason=torch.tensor([0, 1, 1], dtype=torch.uint8),
        ...     noise_matrix=torch.zeros(0, 0),
        ...     recipe="label",
        ...     layer="input of 'fc'",
        ...     epoch=5,
        ... )
        >>> subset = make_training_subset(partition, "relabel", 0.8)
        >>> subset.index, subset.new_label
        (tensor([0, 1]), tensor([-1,  1, -1]))
    """
    clean, probability = partition.is_clean, partition.clean_probability
    if on_noisy == "reweight":
        # A sample that is kept only for its class's sake still counts by half.
        weight = torch.where(clean, probability.clamp(min=0.5), probability)
        index = (weight > 0).nonzero().flatten()
        return TrainingSubset(index, weight[index])
    if on_noisy == "drop":
        return TrainingSubset(partition.trained_on().nonzero().flatten())
    sure = partition.relabel_mask(relabel_threshold)
    new_label = torch.where(sure.unsqueeze(1) if partition.is_multilabel else sure, partition.suggested_label, -1)
    return TrainingSubset((partition.trained_on() | sure).nonzero().flatten(), new_label=new_label)
