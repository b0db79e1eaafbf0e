"""Input of the label noise models: scores, labels, and noise rates estimated before the labels were learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.leave_one_out import left_out_share
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise, fit_with_and_without
from lightning_unlearn.utilities.reduce import Reduce

# The last pass and the second half of training replace the mean over all of training as long as nothing is memorized.
# The criterion is the gap between training and validation accuracy: fully up to the first value, not at all from the
# second on.
NO_GAP, _WIDE_GAP = 0.05, 0.2

# How much the network had learned in an early epoch, in logarithms: 0 for chance level, 1 if it predicted all right
# labels. Up to the first value only the lower bound of the noise rate counts, since labels that are not learned look
# wrong. From the second value on the whole estimate counts.
_HARDLY, _WELL = 0.5, 0.75

# Of two out-of-sample estimates, the one that predicts fewer labels is dropped below this fraction of the other: .47
# was that of a network of twelve neurons under 20 classes, which had called 27 clean labels wrong; others are .52 to 1.
_AS_MUCH = 0.5


@dataclass(frozen=True, eq=False)
class LabelHistory:
    """Logits of one rank's samples during training, for the C classes that occur among the given labels.

    Args:
        phases: (n, P, C), mean logits over each of P >= 1 parts of training, NaN where a sample was not drawn.
        last: (n, C), logits of an evaluation pass after it.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count, 1 / k for each of k copies of a sample.
        early: noise rate from the earliest epoch that allows an estimate; None if none was kept.
        gap: accuracy on the given training labels minus validation accuracy; None without validation samples.
        left_out: noise rate from leave-one-out scores of features that training has not changed; None without any.
        left_out_logits: (n, C), leave-one-out logits; None if some samples have none.
        favored: (C,), centered log-ratio, in nats, of how often a sampler drew each class to its share; None for
            uniform sampling.
    """

    phases: Tensor
    last: Tensor
    label: Tensor
    weight: Tensor
    early: PrequentialRate | None = None
    gap: float | None = None
    left_out: PrequentialRate | None = None
    left_out_logits: Tensor | None = None
    favored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LabelEvidence:
    """Scores, labels and out-of-sample noise rate: the common input of all noise models.

    Args:
        score: (n, C), class scores that rank the samples, corrected for class weights and non-uniform sampling.
        is_left_out: whether the scores include leave-one-out logits.
        fit: symmetric noise fitted to the scores.
        shift: (C,), the correction that was added to the logits.
        label: (n,) int64, given labels.
        weight: (n,) float64.
        early: noise rate from evidence that has not seen the labels.
        z: significance of symmetric noise, in standard deviations.
        is_sampled: whether some classes were drawn more often than others.
        reduce: sums over the ranks.
    """

    score: Tensor
    is_left_out: bool
    fit: SymmetricNoiseFit
    shift: Tensor
    label: Tensor
    weight: Tensor
    early: PrequentialRate | None
    z: float
    is_sampled: bool
    reduce: Reduce


def label_evidence(history: LabelHistory, reduce: Reduce) -> tuple[LabelEvidence, Tensor]:
    """Return the evidence of a history, and its mean logits over training (n, C)."""
    y, w = history.label, history.weight.double()
    mean, seen = _evidence(history)
    shift = _bias(history).to(mean)
    shifted = seen + shift
    score, fit, z = _fitted(history, shifted, reduce)
    early = _unseen(history, fit.rate - 1.96 * fit.std_error, reduce)
    # An early estimate that the next epoch does not confirm is too early: the mean then counts as well.
    if early is not None:
        z = early.z_score if early.is_confirmed else max(z, early.z_score)
    return LabelEvidence(score, score is not shifted, fit, shift, y, w, early, z, _is_sampled(history), reduce), mean


def finite_phases(history: LabelHistory, mean: Tensor) -> Tensor:
    """Fill phases (n, P, C) in which a sample was not drawn with its mean over training (n, C)."""
    return torch.where(history.phases.isfinite(), history.phases, mean.unsqueeze(1))


def _is_sampled(history: LabelHistory) -> bool:
    """Return whether some classes were drawn more often than others.

    Samples that are drawn repeatedly are memorized first, and samples similar to them look wrong: under a balanced
    sampler .52 to .96 of the suspects were wrong, where .85 were expected.
    """
    return history.favored is not None and bool(history.favored.any())


def _unseen(history: LabelHistory, least: float, reduce: Reduce) -> PrequentialRate | None:
    """Combine the noise rates from evidence that has not seen the labels; the larger estimate counts.

    Args:
        history: logits and labels of this rank's samples.
        least: lower bound of the rate according to the scores.
        reduce: sums over the ranks.
    """
    given = history.weight.new_zeros(history.last.shape[1], dtype=torch.float64)
    given = reduce(given.index_add(0, history.label, history.weight.double()))
    early, left_out = (_as_far_as_learned(one, given, least) for one in (history.early, history.left_out))
    told = [one for one in (early, left_out) if one is not None and one.is_settled]
    predicted = [_predicted(one.skill, given) for one in told]
    # An estimate that knows far less of the classes than the other mistakes labels it has not learned for wrong ones.
    told = [one for one, share in zip(told, predicted, strict=True) if share >= _AS_MUCH * max(predicted)]
    if not told:
        return None
    # Leave-one-out estimates need no confirmation, as their features do not change any more.
    sure = [one for one in told if one.is_confirmed or one is left_out]
    return replace(
        told[0],
        low=min(one.low for one in told),
        middle=max(one.middle for one in sure or told),
        high=max(one.high for one in told),
        confused=max(one.confused for one in sure or told),
        most_confused=max(one.most_confused for one in told),
        z_score=max(one.z_score for one in sure or told),
        is_confirmed=bool(sure),
    )


def _as_far_as_learned(told: PrequentialRate | None, given: Tensor, least: float) -> PrequentialRate | None:
    """Reduce the rate by how little of the labels the network had learned.

    Args:
        told: noise rate of an early epoch.
        given: (C,), number of samples labeled as each class.
        least: lower bound of the rate according to the scores.
    """
    if told is None:
        return None
    predicted = max(_predicted(told.skill, given), 1e-9) / max(1 - told.middle, 1e-9)
    known = 1 + math.log(predicted) / math.log(len(given))
    share = min(max((known - _HARDLY) / (_WELL - _HARDLY), 0.0), 1.0)
    lowest = max(told.low, min(least, told.middle))
    middle = lowest + share * (told.middle - lowest)
    # Labels that are not counted may still be wrong, so the upper bound stays.
    return replace(
        told,
        middle=middle,
        confused=min(2 * share, 1.0) * told.confused,
        most_confused=told.most_confused + told.middle - middle,
    )


def _predicted(skill: float, given: Tensor) -> float:
    """Return the accuracy for a ``skill``: the share above that of always predicting the largest class."""
    largest = (given.max() / given.sum().clamp(min=1e-9)).item()
    return largest + skill * (1 - largest)


def _evidence(history: LabelHistory) -> tuple[Tensor, Tensor]:
    """Return (n, C) each: the mean logits over training, and the scores that rank the samples."""
    mean = history.phases.nanmean(dim=1)
    mean = torch.where(mean.isfinite(), mean, history.last)
    share = 0.0
    if history.gap is not None:
        share = min(max((_WIDE_GAP - history.gap) / (_WIDE_GAP - NO_GAP), 0.0), 1.0)
    if not share:
        return mean, mean
    late = history.phases[:, history.phases.shape[1] // 2 :].nanmean(dim=1)
    late = (torch.where(late.isfinite(), late, history.last) + history.last) / 2
    return mean, (1 - share) * mean + share * late


def _fitted(history: LabelHistory, score: Tensor, reduce: Reduce) -> tuple[Tensor, SymmetricNoiseFit, float]:
    """Return the scores, with leave-one-out logits where these are better, the symmetric noise fit, and its z."""
    y, w = history.label, history.weight.double()
    fit, z = fit_with_and_without(score, y, w, reduce=reduce)
    share = left_out_share(history.left_out, history.early, z)
    if history.left_out_logits is None or share == 0:
        return score, fit, z
    told = fit_symmetric_noise(history.left_out_logits, y, w, reduce=reduce)
    score = score + (share * told.scale / fit.scale).to(score) * history.left_out_logits.to(score)
    return score, *fit_with_and_without(score, y, w, reduce=reduce)


def _bias(history: LabelHistory) -> Tensor:
    """Return (C,), the correction of logits for class weights and non-uniform sampling."""
    bias = history.last.new_zeros(history.last.shape[1], dtype=torch.float64)
    if history.early is not None:
        bias = bias + history.early.bias.to(bias)
    return bias if history.favored is None else bias - history.favored.to(bias)
