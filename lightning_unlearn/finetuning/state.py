"""The state of fine-tuning, which checkpoints store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied


@dataclass(frozen=True, eq=False)
class FinetuneState:
    """State of fine-tuning; immutable.

    Args:
        partition_epoch: epoch of the last partition that was processed; 0 before the first.
        first_epoch: first epoch on a subset.
        training_subset: the subset that is trained on; None for all data.
        started_from: ``"keep"``, ``"shrink"`` or ``"start"``.
    """

    partition_epoch: int = 0
    first_epoch: int = 0
    training_subset: TrainingSubset | None = None
    started_from: str = "keep"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        subset = None if self.training_subset is None else copied(self.training_subset.state_dict())
        return {**vars(self), "training_subset": subset}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FinetuneState:
        """Make the state from what :meth:`state_dict` returned."""
        subset = None if state["training_subset"] is None else TrainingSubset(**copied(state["training_subset"]))
        return cls(state["partition_epoch"], state["first_epoch"], subset, state["started_from"])

    def record(self, partition: Partition, seed: int) -> dict[str, Any]:
        """Return what was done to which samples.

        Args:
            partition: the partition that was acted on.
            seed: seed of the order in which the subset is drawn.
        """
        if self.training_subset is None:
            return {"from_epoch": None, "dropped": [], "relabeled": [], "weighed": False}
        dropped = torch.ones(len(partition), dtype=torch.bool)
        dropped[self.training_subset.index] = False
        moved, new = self.training_subset.relabeled, self.training_subset.new_label
        return {
            "from_epoch": self.first_epoch,
            "started_from": self.started_from,
            "seed": seed,
            "dropped": dropped.nonzero().flatten(),
            # Of several labels, -1 for one that stays.
            "relabeled": []
            if new is None
            else [{"index": index, "given": partition.label[index], "new": new[index]} for index in moved.tolist()],
            # Whether each is drawn with its probability of being clean.
            "weighed": self.training_subset.probability is not None,
        }
