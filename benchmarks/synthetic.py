"""Evidence of a training run that did not take place, as large as one likes.

What a network says of a sample is drawn: the logits of its true class stand out by a margin that grows over training,
and so, late, do those of the label it was given. Nothing here says how good a recipe is; only what it costs, and
whether shares of it add up to the whole.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.evidence.training_dynamics import PHASES
from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.coordinates import MAX_COORDINATES, class_coordinates
from lightning_unlearn.functional.soft_margin import NUM_SCALES, rivals_of, soft_margins
from lightning_unlearn.noise import symmetric_labels
from lightning_unlearn.recipes.evidence import Evidence

# How far the true class, and the given one, stand out of the others in each phase of training and in the last pass.
_LEARNED = (1.0, 2.0, 2.5, 2.5, 2.5)
_MEMORIZED = (0.0, 0.0, 0.5, 1.0, 1.5)
_ROWS = 8_192


def evidence(total: int, num_classes: int, *, rate: float = 0.2, seed: int = 0) -> Evidence:
    """Of all samples of a data set with wrong labels.

    Args:
        total: N.
        num_classes: C.
        rate: share of wrong labels.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(num_classes, (total,), generator=generator)
    label = symmetric_labels(true, rate, num_classes, seed=seed)
    # Of more classes than have coordinates there are soft margins in their place.
    is_exact = num_classes - 1 <= MAX_COORDINATES
    basis = class_coordinates(num_classes) if is_exact else torch.zeros(num_classes, 0)
    attribution = torch.empty(total, PHASES + 1, basis.shape[1])
    margins = torch.empty(total, PHASES + 1, 0 if is_exact else NUM_SCALES)
    columns: list[Tensor] = []
    # In parts, since there are C logits of every sample.
    for first in range(0, total, _ROWS):
        rows = slice(first, first + _ROWS)
        of, given = true[rows], label[rows]
        every = torch.arange(len(of))
        total_margin, last = torch.zeros(len(of)), torch.empty(0)
        for phase, (learned, memorized) in enumerate(zip(_LEARNED, _MEMORIZED, strict=True)):
            last = torch.randn(len(of), num_classes, generator=generator)
            last[every, of] += learned
            last[every, given] += memorized
            attribution[rows, phase] = last @ basis
            if not is_exact:
                margins[rows, phase] = soft_margins(last, given)
            total_margin += label_margin(last, given)
        log_probability = last.log_softmax(dim=1)
        columns.append(
            torch.stack(
                [
                    label_margin(last, given),
                    total_margin / len(_LEARNED),
                    -(log_probability.exp() * log_probability).sum(dim=1),
                    -log_probability[every, given],
                    last.argmax(dim=1).float(),
                    *(() if is_exact else (found.float() for found in rivals_of(last, given))),
                ],
                dim=1,
            )
        )
    margin, aum, uncertainty, loss, prediction, *rivals = torch.cat(columns).unbind(dim=1)
    return Evidence(
        index=torch.arange(total),
        weight=torch.ones(total),
        label=label,
        attribution=attribution,
        basis=basis,
        margin=margin,
        aum=aum,
        label_confidence=aum.sigmoid(),
        uncertainty=uncertainty,
        loss=loss,
        prediction=prediction.long(),
        input_statistics=1 + 0.1 * torch.randn(total, 2, generator=generator),
        soft_margins=None if is_exact else margins,
        runner_up=None if is_exact else rivals[0].long(),
        runner_up_probability=None if is_exact else rivals[1],
    )


def share_of(whole: Evidence, rank: int, world_size: int) -> Evidence:
    """What one rank holds of it."""
    index, weight = shard_indices(len(whole.index), rank, world_size)
    rows = {
        field.name: value[index]
        for field in fields(whole)
        if field.name not in ("basis", "weight") and (value := getattr(whole, field.name)) is not None
    }
    return replace(whole, **rows, weight=weight)
