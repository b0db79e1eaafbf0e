"""Builds one partition from the results of a recipe on each rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.partitioning.caveat import caveat_of
from lightning_unlearn.partitioning.label_scores import (
    LabelScores,
    ShardResult,
    apply_review,
    gather_scores,
    merge_labels,
)
from lightning_unlearn.recipes.base import NoiseEstimate
from lightning_unlearn.results.labels import REASONS, indices_by_class
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review import AppliedReview
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.utilities.reduce import Reduce

_NO_MATRIX = torch.zeros(0, 0)
# So many labels of a multi-label task are named in the log.
_MOST_LABELS = 10
_HALF = 0.5

TRAINED_ON = 0.7
"""Probability of a right label from which on fine-tuning trains on a sample, where labels are suspect at all."""


@dataclass(frozen=True, eq=False)
class CleanCriteria:
    """Criteria by which samples are called clean.

    Args:
        precision: expected share of wrong samples among the suspects.
        min_class_fraction: fraction of each class's samples that is always kept.
    """

    precision: float
    min_class_fraction: float


def build_partition(  # noqa: PLR0913  (what a partition says of itself)
    judged: Sequence[ShardResult],
    label: Tensor,
    cut: CleanCriteria,
    reduce: Reduce,
    *,
    recipe: str,
    layer: str,
    epoch: int,
    fingerprint: str = "",
    relabel_threshold: float | None = None,
    decided: AppliedReview | None = None,
) -> Partition:
    """Return the partition, the same on every rank. Every rank must call it.

    Args:
        judged: results for this rank's shard, one for each label of a sample; a single one in multi-class tasks.
        label: (N,) int64, the given labels, or (N, L) in multi-label tasks; -1 for an ignored label.
        cut: criteria by which samples are called clean.
        reduce: sums over the ranks.
        recipe: name of the recipe.
        layer: layer at which attributions were computed.
        epoch: number of complete epochs.
        fingerprint: fingerprint of the training set.
        relabel_threshold: minimum probability of a suggested label that is used; None for the default.
        decided: a person's decisions about some samples, which override the recipe. If the result of the recipe should
            not be acted on, all other samples are clean.
    """
    objection = refusal_reason(judged)
    if decided is not None and objection:
        judged = [replace(one, verdict=None) for one in judged]
    if label.ndim > 1:
        # One label that cannot be told apart says nothing, and nothing against the others.
        judged = [replace(one, verdict=None) if one.verdict and one.verdict.warning else one for one in judged]
    given_of_each = label.reshape(len(label), -1).unbind(dim=1)
    columns = [gather_scores(*each, cut.precision, reduce) for each in zip(judged, given_of_each, strict=True)]
    if decided is not None:
        new_label = decided.new_label.reshape(len(label), -1).unbind(dim=1)
        columns = [
            apply_review(*each, decided.decision) for each in zip(columns, given_of_each, new_label, strict=True)
        ]
    one = columns[0] if label.ndim == 1 else merge_labels(columns, label)
    is_clean = _enforce_min_class_fraction(
        ~one.suspect & one.usable, one.probability, label, cut.min_class_fraction, one.usable
    )
    doubtful = _doubtful(one, is_clean, label, cut.min_class_fraction, judged)
    first = judged[0].verdict
    noise = None if first is None or label.ndim > 1 else first.noise
    rate, interval = _rate(noise, one.probability, is_decided=decided is not None)
    matrix = None if first is None or label.ndim > 1 else first.noise_matrix
    kept = is_clean.unsqueeze(1) if label.ndim > 1 else is_clean
    found = Partition(
        clean_probability=one.probability,
        is_clean=is_clean,
        suggested_label=torch.where(kept, label, one.suggested),
        suggested_probability=torch.where(is_clean, one.probability, one.of_suggested),
        noise_rate=None if objection else rate,
        label=label,
        label_evidence=one.label_confidence,
        input_evidence=one.of_input,
        reason=_reasons(is_clean, one.of_label, one.of_input),
        noise_matrix=_NO_MATRIX if matrix is None else matrix.cpu().float(),
        recipe=recipe,
        layer=layer,
        epoch=epoch,
        fingerprint=fingerprint,
        label_probability=_NO_MATRIX if label.ndim == 1 else torch.stack([c.probability for c in columns], dim=1),
        noise_rate_interval=interval,
        often_called=() if noise is None else noise.names,
        doubtful=doubtful,
    )
    if relabel_threshold is not None:
        found = replace(found, relabel_threshold=relabel_threshold)
    found = _with_suggestions(found, one)
    found = _with_status(found, [each.verdict.noise for each in judged if each.verdict and each.verdict.noise])
    # What a person has decided holds all the same.
    if objection and (decided is None or found.status is PartitionStatus.ALL_CLEAN):
        return replace(found, status=PartitionStatus.INCONCLUSIVE, warning=objection)
    return found


def _with_suggestions(found: Partition, one: LabelScores) -> Partition:
    """Return the partition, with what the recipe suggests for the samples that are worth a look too."""
    worth = found.review_ranking()[: found.worth_review()]
    # A sample that is kept for its class may be sure to be wrong, but nothing has been suggested for it.
    label, probability = found.suggested_label.clone(), found.suggested_probability.clone()
    label[worth], probability[worth] = one.suggested[worth], one.of_suggested[worth]
    return replace(found, suggested_label=label, suggested_probability=probability)


def _rate(
    noise: NoiseEstimate | None, probability: Tensor, *, is_decided: bool
) -> tuple[float, tuple[float, float] | None]:
    """Return how many samples are not clean, and its interval, with what a person has decided."""
    mean = min(max(1 - probability.double().mean().item(), 0.0), 1.0)
    if noise is None:
        return mean, None
    rate = mean if is_decided else noise.rate
    return rate, _moved(noise.interval, rate - noise.rate)


def _with_status(found: Partition, noises: Sequence[NoiseEstimate]) -> Partition:
    """Return the partition with its status, from the noise estimates of the labels that have one."""
    status, warning = _status(found, noises)
    # What does not show may be any number.
    rate = None if status is PartitionStatus.ALL_CLEAN and noises else found.noise_rate
    return replace(found, status=status, warning=warning, noise_rate=rate)


def _moved(interval: tuple[float, float], by: float) -> tuple[float, float]:
    """Return the interval of a rate that is higher by so much for what a person has decided; 1 stays unknown."""
    low, high = interval
    return min(max(low + by, 0.0), 1.0), high if high >= 1 else min(max(high + by, 0.0), 1.0)


def gate_messages(judged: Sequence[ShardResult], partition: Partition) -> list[str]:
    """Return the notes of the recipe for the log; in multi-label tasks a summary over the labels."""
    if not partition.is_multilabel:
        return [note for one in judged if one.verdict for note in one.verdict.notes]
    wrong = (partition.suggested_label != partition.label).float().mean(dim=0)
    shares = sorted(((share, at) for at, share in enumerate(wrong.tolist()) if share), reverse=True)
    said = [f"label {at} ({share:.1%} of the samples)" for share, at in shares[:_MOST_LABELS]]
    found = f"{', '.join(said)}{', ...' if len(shares) > _MOST_LABELS else ''}" if said else "none"
    notes = [f"labels with wrong values: {len(shares)} of {len(judged)}: {found}"]
    if same := [str(at) for at, one in enumerate(judged) if one.verdict is None]:
        notes.append(f"labels with the same value in all samples are skipped: {', '.join(same)}")
    return notes


def refusal_reason(judged: Sequence[ShardResult]) -> str:
    """Return why the result of the recipe should not be acted on; empty if it can be."""
    warnings = [one.verdict.warning if one.verdict else "" for one in judged]
    if len(judged) == 1:
        return warnings[0]
    said = [f"label {at}: {warning}" for at, warning in enumerate(warnings) if warning]
    return "; ".join(said) if len(said) == len(judged) else ""


def _enforce_min_class_fraction(
    is_clean: Tensor, probability: Tensor, label: Tensor, share: float, usable: Tensor
) -> Tensor:
    """Return the samples to keep: clean ones, and at least a fraction of each class, most likely clean first."""
    kept = is_clean.clone()
    for _, of_class in indices_by_class(label):
        members = of_class[usable[of_class]]
        least = math.ceil(share * len(members))
        if int(is_clean[members].sum()) < least:
            kept[members[probability[members].argsort(descending=True, stable=True)[:least]]] = True
    return kept


def _doubtful(one: LabelScores, is_clean: Tensor, label: Tensor, share: float, judged: Sequence[ShardResult]) -> Tensor:
    """Return (N,) bool, the clean samples to exclude from training because their label is likely enough wrong.

    Only if suspects are acted on and p(clean) is calibrated, and not in multi-label tasks, where every label would
    exclude samples of its own. No class loses all of its samples.
    """
    noise = None if label.ndim > 1 or judged[0].verdict is None else judged[0].verdict.noise
    if noise is None or noise.status != "found" or not bool(one.suspect.any()):
        return torch.zeros_like(is_clean)
    trained = _enforce_min_class_fraction(
        is_clean & (one.of_label >= TRAINED_ON), one.probability, label, share, one.usable
    )
    for _, members in indices_by_class(label):
        if not bool(trained[members].any()):
            # A class of which nothing is sure is better learned from what is clean than not at all.
            trained[members] = is_clean[members]
    return is_clean & ~trained


def _reasons(is_clean: Tensor, of_label: Tensor, of_input: Tensor) -> Tensor:
    """Return (N,) uint8, positions in ``REASONS``; of a sample for which neither is below one half, the likelier."""
    label, corrupted = of_label < _HALF, of_input < _HALF
    neither = ~label & ~corrupted
    label, corrupted = label | (neither & (of_label <= of_input)), corrupted | (neither & (of_label > of_input))
    reason = label * REASONS.index("label") + corrupted * REASONS.index("input")
    return torch.where(is_clean, 0, reason).to(torch.uint8)


def _status(found: Partition, noises: Sequence[NoiseEstimate]) -> tuple[PartitionStatus, str]:
    """Return the status of a partition, and why it keeps too few samples or excludes none; empty if neither.

    Args:
        found: the partition.
        noises: the noise estimates of the labels that have one.
    """
    kept, total = int(found.is_clean.sum()), len(found)
    if kept == total:
        if not noises:
            return PartitionStatus.ALL_CLEAN, f"all {total} samples were classified as clean"
        most = max(noises, key=lambda one: one.z_score)
        status = PartitionStatus.ALL_CLEAN if most.status == "none" else PartitionStatus.REVIEW_ONLY
        return status, caveat_of(most, found.worth_review())
    if kept == 0:
        return PartitionStatus.NONE_CLEAN, f"none of the {total} samples was classified as clean"
    lost = [c for c, members in indices_by_class(found.label) if not bool(found.is_clean[members].any())]
    if lost:
        of = "class" if len(lost) == 1 else "the classes"
        return PartitionStatus.CLASS_LOST, f"no sample is kept of {of} {str(lost)[1:-1]}"
    return PartitionStatus.OK, ""
