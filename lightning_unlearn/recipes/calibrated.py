"""The verdict of the detector of label errors on a rank's share (:mod:`lightning_unlearn.recipes.label_noise`)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.functional.prequential import favored_by_sampler
from lightning_unlearn.functional.structured_noise import MIN_ENTRY
from lightning_unlearn.recipes.label_noise import ACTED_Z, LabelHistory, LabelNoise, find_label_noise
from lightning_unlearn.recipes.verdict import NoiseEstimate, Verdict
from lightning_unlearn.types import Evidence, OutOfSample

# So far apart, training and validation accuracy say that labels are memorized.
_GAP = 0.2


def label_noise_of(evidence: Evidence, reduce: Reduce) -> LabelNoise:
    """What is found in evidence in which every class occurs."""
    return find_label_noise(_history(evidence, evidence.unseen or OutOfSample(), reduce), reduce=reduce)


def verdict_of(found: LabelNoise, evidence: Evidence, reduce: Reduce, not_known: str) -> Verdict:
    """The verdict that follows from it.

    Args:
        found: of the evidence.
        evidence: of this rank's share.
        reduce: sums over the ranks.
        not_known: the warning where the network has learned too little.
    """
    clean = (1 - found.wrong).float()
    return Verdict(
        clean,
        found.suggested,
        (found.wrong * found.suggested_share).float(),
        label_probability=clean,
        noise_matrix=_matrix(found, evidence.num_classes).float().to(clean.device),
        notes=_notes(evidence, reduce),
        warning=not_known if found.status == "unknown" else "",
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


def _matrix(found: LabelNoise, classes: int) -> Tensor:
    if found.structured is not None:
        return found.structured.transition
    others = torch.full((classes, classes), found.rate / max(classes - 1, 1), dtype=torch.float64)
    return others.fill_diagonal_(1 - found.rate)


def _history(evidence: Evidence, unseen: OutOfSample, reduce: Reduce) -> LabelHistory:
    scores = evidence.attribution.float() @ evidence.basis.float().T
    last = scores[:, -1]
    phases = scores[:, :-1] if scores.shape[1] > 1 else scores
    accuracy = share_predicted(evidence, reduce)
    return LabelHistory(
        phases=phases,
        last=last,
        label=evidence.label,
        weight=evidence.weight,
        early=unseen.early,
        gap=None if unseen.accuracy is None else accuracy - unseen.accuracy,
        left_out=unseen.left_out,
        left_out_logits=None if evidence.left_out is None else evidence.left_out.float() @ evidence.basis.float().T,
        favored=_favored(evidence, unseen.drawn, reduce),
    )


def _favored(evidence: Evidence, drawn: Tensor | None, reduce: Reduce) -> Tensor | None:
    if drawn is None:
        return None
    weight = evidence.weight.double()
    given = torch.zeros(evidence.num_classes, dtype=torch.float64, device=weight.device)
    return favored_by_sampler(reduce(given.index_add_(0, evidence.label, weight)), drawn)


def share_predicted(evidence: Evidence, reduce: Reduce) -> float:
    """Of the given labels, how many the last pass predicts."""
    w = evidence.weight.double()
    right, number = reduce(torch.stack([(w * (evidence.prediction == evidence.label)).sum(), w.sum()])).tolist()
    return float(right / max(number, 1))


def _notes(evidence: Evidence, reduce: Reduce) -> tuple[str, ...]:
    predicted, accuracy = share_predicted(evidence, reduce), evidence.unseen.accuracy if evidence.unseen else None
    if accuracy is None or predicted - accuracy < _GAP:
        return ()
    said = f"the network predicts {predicted:.0%} of the given labels and {accuracy:.0%} of those of validation samples"
    return (f"labels: {said}: it has memorized labels; the early epochs decide",)
