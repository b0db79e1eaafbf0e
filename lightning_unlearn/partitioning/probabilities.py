"""Class probabilities averaged over training, for tools such as cleanlab."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.functional.coordinates import MAX_COORDINATES
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.utilities.distributed import gather_by_index
from lightning_unlearn.utilities.reduce import Reduce


def check_has_probabilities(task_format: TaskFormat) -> None:
    """Refuse a task for which no probabilities are kept.

    Raises:
        ValueError: for several labels per sample, and for more than 129 classes.
    """
    if task_format.task == "multilabel" or task_format.num_classes > MAX_COORDINATES + 1:
        found = "several labels" if task_format.task == "multilabel" else f"{task_format.num_classes} classes"
        raise ValueError(
            f"keep_probabilities=True needs one label per sample and at most {MAX_COORDINATES + 1} classes,"
            f" but found {found}. Leave it out."
        )


def average_probabilities(one: ShardResult, total: int, reduce: Reduce) -> Tensor:
    """Return the softmax of the logits, averaged over the training before the partition. Every rank must call it.

    Labels that were memorized late were not predicted early, so the average still shows wrong labels that the last
    epoch does not.

    Args:
        one: results for this rank's shard.
        total: N.
        reduce: sums over the ranks.

    Returns:
        (N, C) float32 on the CPU, in dataset order.
    """
    parts = one.evidence.attribution
    # The last part is of the pass in eval mode, after all training that there was.
    trained = parts[:, :-1] if parts.shape[1] > 1 else parts
    logits = trained.float().mean(dim=1) @ one.evidence.basis.float().T
    return gather_by_index(
        one.evidence.index.cpu(), one.weight.cpu(), torch.softmax(logits, dim=1).cpu(), total, reduce
    )
