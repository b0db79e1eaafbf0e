"""Estimate which labels are wrong from soft margins, for more classes than have coordinates.

The noise model is symmetric noise. Systematic mislabeling of one class as another is not detected.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.margin_noise import (
    AveragedCurve,
    average_of,
    fit_with_and_without,
    predicted,
    wrong_probability,
)
from lightning_unlearn.functional.prequential import PrequentialRate, class_shift
from lightning_unlearn.functional.suspects import in_order_of, with_mean
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit
from lightning_unlearn.functional.transition import MOST_NAMES
from lightning_unlearn.recipes.base import NO_DOUBT, NoiseEstimate, RecipeResult, judged_labels, noise_status
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.recipes.label_noise import NOT_KNOWN
from lightning_unlearn.utilities.reduce import Reduce

# A part of training counts if the accuracy of its steps is at least the first fraction of validation accuracy or,
# without validation, the second fraction of that of the best part. Parts in which the network still learned are left
# out.
_AS_MUCH, _KNOWING = 0.9, 0.5

# Gap between training and validation accuracy from which on labels count as memorized, and the last pass is left out.
_GAP = 0.2

_SHIFTED = (
    (
        "labels: class weights or a sampler shift the outputs, which is not corrected for many classes,"
        " so the result is not applied"
    ),
)

_LEAST_RATE = 1e-4  # for the order where no label is wrong
_TWO_SIDED = 1.96


def judge_many(evidence: Evidence, margins: Tensor, reduce: Reduce) -> RecipeResult:
    """Estimate p(clean) from soft margins.

    Args:
        evidence: of this rank's samples.
        margins: (n, P, K), their soft margins in each part of training.
        reduce: sums over the ranks.
    """
    w = evidence.weight.double()
    zeros, right = w.new_zeros(evidence.num_classes), (evidence.prediction == evidence.label).double()
    of_label, of_prediction = (zeros.index_add(0, of, w) for of in (evidence.label, evidence.prediction))
    given, said = reduce(torch.stack([of_label, of_prediction]))
    accuracy = (reduce((w @ right).reshape(1)) / given.sum().clamp(min=1e-9)).item()
    memorized, classes = _memorized(accuracy, evidence), int((given > 0).sum())
    parts, curve = _parts(margins, evidence, classes, reduce, with_last=not memorized)
    early, weighted, sampled = _early(evidence, given)
    wrong, noise = _blind_errors(parts, curve, w, classes, early, reduce)
    can_judge = judged_labels(given, said)
    is_known = bool(can_judge.any())
    # Without an estimate no sample is suspect, but the ranking is kept.
    clean = (1 - torch.where(can_judge[evidence.label], wrong, NO_DOUBT * wrong)).float()
    note = f"labels: {classes} classes, so only symmetric noise is estimated"
    return RecipeResult(
        clean,
        evidence.label if evidence.runner_up is None else evidence.runner_up,
        (1 - clean) * (0 if evidence.runner_up_probability is None else evidence.runner_up_probability),
        label_probability=clean,
        noise_matrix=_matrix(given > 0, noise.rate),
        notes=(note, *memorized, *(_SHIFTED if weighted or sampled else ())),
        warning="" if is_known else NOT_KNOWN,
        noise=_weak_if(weighted, sampled, noise) if is_known else None,
    )


def _early(evidence: Evidence, given: Tensor) -> tuple[PrequentialRate | None, bool, bool]:
    """Return the noise rate of an early epoch, and whether class weights, and a sampler, shifted its outputs."""
    out_of_sample = evidence.out_of_sample
    if out_of_sample is None or out_of_sample.early is None:
        return None, False, False
    sampled = out_of_sample.drawn is not None and bool(class_shift(given, out_of_sample.drawn).any())
    return (
        (out_of_sample.early if out_of_sample.early.is_settled else None),
        bool(out_of_sample.early.bias.any()),
        sampled,
    )


def _weak_if(weighted: bool, sampled: bool, noise: NoiseEstimate) -> NoiseEstimate:
    if noise.status != "found" or not (weighted or sampled):
        return noise
    return replace(noise, status="weak", sampled=sampled)


def _memorized(accuracy: float, evidence: Evidence) -> tuple[str, ...]:
    """Return a note if labels are memorized; empty if they are not, or if that is unknown."""
    validation = evidence.out_of_sample.accuracy if evidence.out_of_sample else None
    if validation is None or accuracy - validation < _GAP:
        return ()
    both = f"{accuracy:.0%} of the given labels and {validation:.0%} of the validation labels"
    return ((f"labels: the network predicts {both}, so it has memorized labels; the early epochs are used instead"),)


def _parts(
    margins: Tensor, evidence: Evidence, classes: int, reduce: Reduce, *, with_last: bool
) -> tuple[list[Tensor], AveragedCurve]:
    """Return the parts (n, K) of training that count, with equal weights, and the curve of their average."""
    *phases, last = margins.unbind(dim=1)
    weight, validation = evidence.weight.double(), evidence.out_of_sample.accuracy if evidence.out_of_sample else None
    if phases:
        each = [weight @ predicted(part, classes).double() for part in phases]
        *hits, number = reduce(torch.stack([*each, weight.sum()])).tolist()
        least = _KNOWING * max(hits) if validation is None else _AS_MUCH * validation * number
        phases = [part for part, hit in zip(phases, hits, strict=True) if hit >= least]
    parts = [*phases, last] if with_last or not phases else phases
    return parts, average_of(parts, weight, classes, reduce=reduce)


def _blind_errors(
    parts: list[Tensor],
    curve: AveragedCurve,
    weight: Tensor,
    classes: int,
    early: PrequentialRate | None,
    reduce: Reduce,
) -> tuple[Tensor, NoiseEstimate]:
    """Return the probability (n,) that each label is wrong, and the noise estimate."""
    rows = torch.cat(parts, dim=1)
    fit, z = fit_with_and_without(rows, weight, classes, curve=curve, reduce=reduce)
    rate, z = (max(fit.rate, early.middle), max(z, early.z_score)) if early else (fit.rate, z)
    at_least = replace(fit, blind=max(fit.blind, _LEAST_RATE))
    wrong = with_mean(wrong_probability(at_least, rows, curve), weight, max(rate, _LEAST_RATE), reduce=reduce)
    # The margin to the strongest rival ranks better for similar classes, because it ignores improbable ones.
    strongest = torch.stack([part[:, -1] for part in parts]).mean(dim=0)
    wrong = in_order_of(-strongest, wrong, weight, reduce=reduce)
    number = reduce(weight.sum().reshape(1)).item()
    return wrong, NoiseEstimate(noise_status(z, rate * number), rate, _interval(fit, early, rate), z)


def _interval(fit: SymmetricNoiseFit, early: PrequentialRate | None, rate: float) -> tuple[float, float]:
    """Return the interval of the rate; its upper end is 1, since errors between similar classes are not estimated."""
    return (max(0.0, fit.rate - _TWO_SIDED * fit.std_error) if early is None else min(early.low, rate)), 1.0


def _matrix(occurs: Tensor, rate: float) -> Tensor | None:
    """Return the transition matrix (C, C) of symmetric noise; None if there are too many outputs for a matrix."""
    if len(occurs) > MOST_NAMES:
        return None
    there = occurs.float()
    matrix = there.unsqueeze(1) * there * rate / max(int(occurs.sum()) - 1, 1)
    return matrix.diagonal_scatter(1 - rate * there)
