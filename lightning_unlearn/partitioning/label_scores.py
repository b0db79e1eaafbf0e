"""What a recipe returned on every rank, in dataset order, and with a person's decisions: one row for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.recipes import RecipeResult
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.results.labels import DROP, KEEP, RELABEL
from lightning_unlearn.utilities.distributed import gather_by_index
from lightning_unlearn.utilities.reduce import Reduce


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What was seen of one rank's share of the samples, and what a recipe made of it.

    Args:
        evidence: of this rank's share.
        weight: (n,), 0 for a row that only pads the share; where the label is to be ignored, the evidence's is 0 too.
        verdict: None where there was nothing to judge, as all samples have the same label.
    """

    evidence: Evidence
    weight: Tensor
    verdict: RecipeResult | None


@dataclass(frozen=True, eq=False)
class LabelScores:
    """What is known of every sample's one label; (N,) each."""

    probability: Tensor
    of_label: Tensor
    of_input: Tensor
    label_confidence: Tensor
    suggested: Tensor
    of_suggested: Tensor
    usable: Tensor
    suspect: Tensor


def gather_scores(one: ShardResult, given: Tensor, precision: float, reduce: Reduce) -> LabelScores:
    """Gather what a recipe returned on every rank, in dataset order. Every rank must call it.

    Args:
        one: of this rank's share.
        given: (N,) the label of every sample; -1 for none.
        precision: of the suspects.
        reduce: sums over the ranks.
    """
    evidence, verdict, known = one.evidence, one.verdict, given >= 0
    certain = torch.ones_like(one.weight)

    def of_all(values: Tensor | None) -> Tensor:
        placed = gather_by_index(
            evidence.index, one.weight, (certain if values is None else values).cpu(), len(given), reduce
        )
        return placed.float().clamp(0, 1)

    if verdict is None:
        sure = torch.ones(len(given))
        return LabelScores(sure, sure, sure, of_all(evidence.label_confidence), given, sure, sure > 0, sure == 0)
    probability = of_all(verdict.clean_probability)
    of_suggested = verdict.suggested_probability
    suggested = gather_by_index(evidence.index, one.weight, verdict.suggested_label.cpu(), len(given), reduce)
    usable = torch.ones(len(given), dtype=torch.bool)
    if verdict.unusable is not None:
        usable = of_all(verdict.unusable.float()) == 0
    # A sample whose label is to be ignored is not judged.
    return LabelScores(
        probability.where(known, 1),
        of_all(verdict.label_probability).where(known, 1),
        of_all(verdict.input_probability).where(known, 1),
        of_all(evidence.label_confidence).where(known, 1),
        suggested.where(known, given),
        (1 - probability if of_suggested is None else of_all(of_suggested)).where(known, 1),
        usable | ~known,
        (of_all(verdict.suspects(evidence.weight, reduce, precision).float()) > 0) & known,
    )


def apply_review(one: LabelScores, given: Tensor, new: Tensor, decision: Tensor) -> LabelScores:
    """Return what is known of every sample's one label, with what a person has decided.

    Args:
        one: what the recipe says.
        given: (N,) the label.
        new: (N,) that to train with, -1 for the given one.
        decision: (N,) int8, positions in ``DECISIONS``, -1 where nothing is decided.
    """
    dropped, moved = decision == DROP, decision == RELABEL
    # Of several labels, those that stay are right.
    wrong = moved & (new >= 0) & (new != given)
    right = (decision == KEEP) | (moved & ~wrong)
    return LabelScores(
        one.probability.masked_fill(right, 1).masked_fill(dropped | wrong, 0),
        one.of_label.masked_fill(right, 1).masked_fill(wrong, 0),
        one.of_input.masked_fill(right | wrong, 1),
        one.label_confidence,
        torch.where(wrong, new, torch.where(right, given, one.suggested)),
        # Too little for a new label.
        one.of_suggested.masked_fill(right | wrong, 1).masked_fill(dropped, 0),
        (one.usable | right) & ~dropped & ~wrong,
        one.suspect & ~right,
    )


def merge_labels(columns: Sequence[LabelScores], label: Tensor) -> LabelScores:
    """Merge the labels of each sample, which is as clean as the most doubtful of them."""
    probability = torch.stack([column.probability for column in columns], dim=1)
    wrong = torch.stack([column.suspect | ~column.usable for column in columns], dim=1)
    suggested = torch.where(wrong, torch.stack([column.suggested for column in columns], dim=1), label)
    of_suggested = torch.stack([column.of_suggested for column in columns], dim=1)
    return LabelScores(
        probability.amin(dim=1),
        torch.stack([column.of_label for column in columns], dim=1).amin(dim=1),
        torch.stack([column.of_input for column in columns], dim=1).amin(dim=1),
        torch.stack([column.label_confidence for column in columns], dim=1).amin(dim=1),
        suggested,
        torch.where(wrong, of_suggested, probability).amin(dim=1),
        torch.stack([column.usable for column in columns], dim=1).all(dim=1),
        wrong.any(dim=1),
    )
