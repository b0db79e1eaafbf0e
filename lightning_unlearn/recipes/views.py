"""What may be looked at of what a model said in the course of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.recipes.classes import is_exact, with_coordinates
from lightning_unlearn.types import Evidence

# Share of the given labels that a part of training must predict to count as memorised.
MEMORISED = 0.9


def rival_of(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The class other than the given one that the model was most for on the whole, and its share among the others.

    Where the evidence is a random part of what the model said, it is what the last pass predicts, with a share of 0.

    Returns:
        (n,) int64 and (n,) float32 in [0, 1].
    """
    if not is_exact(evidence.basis):
        # Random coordinates say nothing of a single class.
        return evidence.prediction, torch.zeros_like(evidence.weight)
    scores = class_scores(evidence, evidence.attribution.mean(dim=1))
    share, rival = scores.scatter(1, evidence.label.unsqueeze(1), -torch.inf).softmax(dim=1).max(dim=1)
    return rival, share


def class_scores(evidence: Evidence, block: Tensor) -> Tensor:
    """(n, C), what a part (n, r) of the attributions says of each class; -inf of one without coordinates."""
    return (block @ evidence.basis.T).masked_fill(~with_coordinates(evidence.basis), -torch.inf)


@dataclass(frozen=True, eq=False)
class View:
    """A part of what a sample's class attributions were, early and late and in the end.

    Args:
        blocks: (n, P', r), at most three: two of training, one of the last pass.
        of_training: how many of them are averages over training.
        is_part: whether the rest was left out because it was memorised.
    """

    blocks: Tensor
    of_training: int
    is_part: bool = False


def views_of(evidence: Evidence, reduce: Reduce) -> list[View]:
    """What may be looked at: training up to the end of one of its phases, with or without the last pass, longest first.

    A network that has memorised its labels repeats them, right or wrong. So views that end in a block which predicts
    nearly all the given labels are left out, but for the shortest one, which comes from the time before.
    """
    blocks, w = evidence.attribution, evidence.weight.double()
    agrees = torch.stack(
        [
            w.sum(),
            *(w @ ((block @ evidence.basis.T).argmax(1) == evidence.label).double() for block in blocks.unbind(1)),
        ]
    )
    agrees = reduce(agrees)
    *informs, last_informs = (agrees[1:] <= MEMORISED * agrees[0]).tolist()
    last = blocks[:, -1:]
    if not informs:
        return [View(last, 1)]
    views, is_part = [], not (last_informs and all(informs))
    for phases in range(len(informs), 0, -1):
        if phases > 1 and not informs[phases - 1]:
            continue
        of_training = _halves(blocks[:, :phases])
        if last_informs:
            views.append(View(torch.cat([of_training, last], dim=1), of_training.shape[1], is_part))
        views.append(View(of_training, of_training.shape[1], is_part))
    return views


def whole_of(evidence: Evidence) -> View:
    """All of training and the last pass, memorised or not."""
    training, last = evidence.attribution[:, :-1], evidence.attribution[:, -1:]
    halves = _halves(training)
    return View(torch.cat([halves, last], dim=1), halves.shape[1])


def _halves(phases: Tensor) -> Tensor:
    """(n, 1 or 2, r), the means of the first half of the phases and of the second."""
    return torch.stack([part.mean(dim=1) for part in phases.tensor_split(2, dim=1) if part.shape[1]], dim=1)
