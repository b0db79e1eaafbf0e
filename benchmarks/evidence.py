"""What the callback would have gathered in a fit whose logits were kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.functional import label_margin
from lightning_unlearn.functional.mixture import no_reduce
from lightning_unlearn.trajectory import PHASES, Trajectory
from lightning_unlearn.types import Evidence


def evidence_of_logits(training: Sequence[Tensor] | Tensor, last: Tensor, label: Tensor) -> Evidence:
    """The evidence at the end of some epochs, through the trajectory that the callback has.

    Args:
        training: of each epoch (N, C), what the training steps said of each sample.
        last: (N, C), of a pass in eval mode after them.
        label: (N,) int64, the given labels.
    """
    index, trajectory = torch.arange(len(label)), Trajectory(len(label), last.shape[1])
    for epoch, logits in enumerate(training):
        trajectory.observe(index, logits, label)
        trajectory.merge(epoch * PHASES // len(training), no_reduce)
    phases = trajectory.phases(index)
    trajectory.observe(index, last, label)
    trajectory.merge(None, no_reduce)
    scores = trajectory.scores(index)
    return Evidence(
        index=index,
        weight=torch.ones(len(label)),
        label=label,
        attribution=torch.stack([*phases, last @ trajectory.basis], dim=1),
        basis=trajectory.basis,
        margin=label_margin(last, label),
        mean_margin=scores["margin"],
        support=scores["support"],
        uncertainty=scores["uncertainty"],
        loss=torch.nn.functional.cross_entropy(last, label, reduction="none"),
        prediction=last.argmax(dim=1),
    )
