"""Apply the label noise estimate (:mod:`lightning_unlearn.recipes.label_noise`) to the evidence of a rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.leave_one_out import skill_of
from lightning_unlearn.functional.prequential import class_shift
from lightning_unlearn.functional.structured_noise import MIN_ENTRY
from lightning_unlearn.functional.transition import MOST_NAMES
from lightning_unlearn.recipes.base import ACTED_Z, NO_DOUBT, NoiseEstimate, RecipeResult
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.recipes.label_evidence import LabelHistory
from lightning_unlearn.recipes.label_noise import LabelNoise, find_label_noise
from lightning_unlearn.utilities.reduce import Reduce

# Gap between training and validation accuracy from which on labels count as memorized.
_GAP = 0.2
# If the skill in an early epoch exceeds that on later validation by more than this, labels had been learned before.
_MORE_SKILL = 0.1


def verdict_on_labels(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Estimate p(clean) from evidence in which every class occurs.

    Args:
        evidence: of this rank's samples.
        reduce: sums over the ranks.
    """
    out_of_sample, predicted = evidence.out_of_sample or OutOfSample(), share_predicted(evidence, reduce)
    missing = _missing(evidence.out_of_sample, _largest_share(evidence, reduce))
    if missing and out_of_sample.early is not None:
        # If labels had been learned before, the noise rate has no upper bound.
        out_of_sample = replace(out_of_sample, early=replace(out_of_sample.early, is_blind=False))
    found = find_label_noise(_history(evidence, out_of_sample, predicted, reduce), reduce=reduce)
    # Without an estimate no sample is suspect, but the ranking is kept.
    wrong = found.wrong * NO_DOUBT if found.objection else found.wrong
    clean = (1 - wrong).float()
    return RecipeResult(
        clean,
        found.suggested,
        (wrong * found.suggested_share).float(),
        label_probability=clean,
        noise_matrix=_matrix(found, evidence.num_classes, clean.device),
        notes=(*_notes(predicted, out_of_sample.accuracy), *_said(missing)),
        warning=found.objection,
        noise=None if found.status == "unknown" else _estimate(found),
    )


def _estimate(found: LabelNoise) -> NoiseEstimate:
    names: list[tuple[int, int, float]] = []
    if found.structured is not None:
        matrix = found.structured.transition.clone().fill_diagonal_(0)
        names = [(a, b, float(matrix[a, b])) for a, b in (matrix >= MIN_ENTRY).nonzero().tolist()]
    low, high = found.interval
    return NoiseEstimate(
        status=found.status,
        rate=min(max(found.rate, 0.0), 1.0),
        interval=(min(max(low, 0.0), 1.0), min(max(high, low, 0.0), 1.0)),
        z_score=found.z,
        sampled=found.status == "weak" and found.z >= ACTED_Z and found.structured is None,
        names=tuple(sorted(names, key=lambda name: -name[2])),
    )


def _matrix(found: LabelNoise, classes: int, device: torch.device) -> Tensor | None:
    if classes > MOST_NAMES:
        return None
    if found.status in {"none", "unknown"}:
        return torch.eye(classes, device=device)
    if found.transition is not None:
        return found.transition.float().to(device)
    others = torch.full((classes, classes), found.rate / max(classes - 1, 1), dtype=torch.float64)
    return others.fill_diagonal_(1 - found.rate).float().to(device)


def _history(evidence: Evidence, out_of_sample: OutOfSample, predicted: float, reduce: Reduce) -> LabelHistory:
    scores = evidence.attribution.float() @ evidence.basis.float().T
    last = scores[:, -1]
    phases = scores[:, :-1] if scores.shape[1] > 1 else scores
    return LabelHistory(
        phases=phases,
        last=last,
        label=evidence.label,
        weight=evidence.weight,
        early=out_of_sample.early,
        gap=None if out_of_sample.accuracy is None else predicted - out_of_sample.accuracy,
        left_out=out_of_sample.left_out,
        left_out_logits=None if evidence.left_out is None else evidence.left_out.float() @ evidence.basis.float().T,
        favored=_favored(evidence, out_of_sample.drawn, reduce),
    )


def _favored(evidence: Evidence, drawn: Tensor | None, reduce: Reduce) -> Tensor | None:
    if drawn is None:
        return None
    # A sampler draws each copy of a sample, so copies count individually here.
    each = (evidence.weight > 0).double()
    given = torch.zeros(evidence.num_classes, dtype=torch.float64, device=each.device)
    return -class_shift(reduce(given.index_add_(0, evidence.label, each)), drawn)


def share_predicted(evidence: Evidence, reduce: Reduce) -> float:
    """Return the share of the given labels that the last pass predicts."""
    w = evidence.weight.double()
    right, number = reduce(torch.stack([(w * (evidence.prediction == evidence.label)).sum(), w.sum()])).tolist()
    return float(right / max(number, 1))


def _largest_share(evidence: Evidence, reduce: Reduce) -> float:
    w = evidence.weight.double()
    given = reduce(w.new_zeros(evidence.num_classes).index_add(0, evidence.label, w))
    return (given.max() / given.sum().clamp(min=1e-9)).item()


def _said(missing: str) -> tuple[str, ...]:
    if not missing:
        return ()
    return (
        (
            f"labels: {missing}, so memorized labels cannot be detected, and there may be more wrong labels"
            " than estimated"
        ),
    )


def _notes(predicted: float, accuracy: float | None) -> tuple[str, ...]:
    if accuracy is None or predicted - accuracy < _GAP:
        return ()
    said = f"the network predicts {predicted:.0%} of the given labels and {accuracy:.0%} of the validation labels"
    return (f"labels: {said}, so it has memorized labels; the early epochs are used instead",)


def _missing(out_of_sample: OutOfSample | None, largest: float) -> str:
    """Return why no early epoch gives the noise rate; empty if one does, or without out-of-sample evidence.

    Args:
        out_of_sample: evidence from before the labels were learned.
        largest: share of the largest class among the given labels.
    """
    if out_of_sample is None:
        return ""
    if out_of_sample.early is None or not out_of_sample.early.is_settled:
        return "no early epoch of training steps was observed in which the network had learned enough, but not too much"
    if (
        out_of_sample.accuracy is not None
        and out_of_sample.early.skill > skill_of(out_of_sample.accuracy, largest) + _MORE_SKILL
    ):
        return (
            "in the early epoch the network predicted a larger share of the labels than of the validation"
            " labels now, so it had already learned them"
        )
    return ""
