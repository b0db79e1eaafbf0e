"""What the noise models of labels have to explain: scores, labels, and what is known of the rate before training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.leave_one_out import left_out_share
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise, fit_with_and_without
from lightning_unlearn.utilities.reduce import Reduce

# The last pass and the second half of training stand in place of the mean over all of it as far as nothing is
# memorized: where the network predicts the given labels of the training samples more often than those of validation
# samples, by the first, altogether; by the second, not at all.
NO_GAP, _WIDE_GAP = 0.05, 0.2

# How much of the right labels a network predicted in an early epoch, from 0, as by chance, to 1, all of them, in
# logarithms. Up to the first, of its best guess only what natural confusion does not explain counts, since what is not
# learned looks wrong; from the second on, all of it.
_HARDLY, _WELL = 0.5, 0.75

# How many times as many of the labels one of two that have not seen them predicts at least, for it to be asked too: .47
# was that of a network of twelve neurons under 20 classes, which had called 27 clean labels wrong; others are .52 to 1.
_AS_MUCH = 0.5


@dataclass(frozen=True, eq=False)
class LabelHistory:
    """What a network said of one rank's samples, in logits of the C classes that occur among the given labels.

    Args:
        phases: (n, P, C), means over the parts of training, NaN where a sample was not drawn; P is 1 or more.
        last: (n, C), of a pass in eval mode after it.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count; of k copies of a sample each has 1 / k.
        early: of the earliest epoch that tells; None if none was kept.
        gap: share of the training samples whose given label is predicted, less that of validation samples; None
            where there are none.
        left_out: the rate by leave-one-out scores of features that training has not changed; None without any.
        left_out_logits: (n, C) of them; None where not all samples have some.
        favored: (C,) in nats less their mean, how much oftener than its share a sampler drew each class; None if
            samples were drawn alike.
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
    """What every hypothesis has to explain: scores and labels, and how often these are wrong by what has not seen them.

    Args:
        score: (n, C), what ranks, as of a network that is trained on samples drawn alike.
        is_left_out: whether leave-one-out logits are in it.
        fit: of blind errors to it.
        shift: (C,), what was added to logits for that.
        label: (n,).
        weight: (n,) float64.
        early: what is told by evidence that has not seen the labels.
        z: how sure it is that blind errors are there.
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
    """Return what a history tells, and the mean over training (n, C)."""
    y, w = history.label, history.weight.double()
    mean, seen = _evidence(history)
    shift = _bias(history).to(mean)
    shifted = seen + shift
    score, fit, z = _fitted(history, shifted, reduce)
    early = _unseen(history, fit.rate - 1.96 * fit.std_error, reduce)
    # What the next epoch has not confirmed had not been learned yet, and is still in the mean.
    if early is not None:
        z = early.z_score if early.is_confirmed else max(z, early.z_score)
    return LabelEvidence(score, score is not shifted, fit, shift, y, w, early, z, _is_sampled(history), reduce), mean


def finite_phases(history: LabelHistory, mean: Tensor) -> Tensor:
    """Return the phases (n, P, C), with the mean over training (n, C) for phases in which a sample was not drawn."""
    return torch.where(history.phases.isfinite(), history.phases, mean.unsqueeze(1))


def _is_sampled(history: LabelHistory) -> bool:
    """Return whether some classes were drawn more often than others.

    Samples that are drawn again and again are memorized first, and what is like them looks wrong: of suspects under a
    balanced sampler .52 to .96 were, where .85 were expected.
    """
    return history.favored is not None and bool(history.favored.any())


def _unseen(history: LabelHistory, least: float, reduce: Reduce) -> PrequentialRate | None:
    """Return what is told by evidence that has not seen the labels: as much as the one shows that shows more.

    Args:
        history: of this rank's samples.
        least: lower end of the rate that the scores show.
        reduce: sums over the ranks.
    """
    given = history.weight.new_zeros(history.last.shape[1], dtype=torch.float64)
    given = reduce(given.index_add(0, history.label, history.weight.double()))
    early, left_out = (_as_far_as_learned(one, given, least) for one in (history.early, history.left_out))
    told = [one for one in (early, left_out) if one is not None and one.is_settled]
    predicted = [_predicted(one.skill, given) for one in told]
    # What knows far less of the classes than the other takes for wrong what it has not learned.
    told = [one for one, share in zip(told, predicted, strict=True) if share >= _AS_MUCH * max(predicted)]
    if not told:
        return None
    # What leaves the sample out is not of a network that still learns.
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
    """Reduce the rate to what a network that predicts so many labels can tell.

    Args:
        told: of an early epoch.
        given: (C,) how many samples are called each class.
        least: rate that the scores show in any case.
    """
    if told is None:
        return None
    predicted = max(_predicted(told.skill, given), 1e-9) / max(1 - told.middle, 1e-9)
    known = 1 + math.log(predicted) / math.log(len(given))
    share = min(max((known - _HARDLY) / (_WELL - _HARDLY), 0.0), 1.0)
    lowest = max(told.low, min(least, told.middle))
    middle = lowest + share * (told.middle - lowest)
    # What is not counted may be wrong labels all the same: the upper end stays.
    return replace(
        told,
        middle=middle,
        confused=min(2 * share, 1.0) * told.confused,
        most_confused=told.most_confused + told.middle - middle,
    )


def _predicted(skill: float, given: Tensor) -> float:
    """Return the share of the labels that is predicted, where it is ``skill`` of what the largest class leaves."""
    largest = (given.max() / given.sum().clamp(min=1e-9)).item()
    return largest + skill * (1 - largest)


def _evidence(history: LabelHistory) -> tuple[Tensor, Tensor]:
    """Return (n, C) each: the mean over training, and what ranks."""
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
    """Return what ranks, with leave-one-out logits where they know more, and how blind errors explain the labels."""
    y, w = history.label, history.weight.double()
    fit, z = fit_with_and_without(score, y, w, reduce=reduce)
    share = left_out_share(history.left_out, history.early, z)
    if history.left_out_logits is None or share == 0:
        return score, fit, z
    told = fit_symmetric_noise(history.left_out_logits, y, w, reduce=reduce)
    score = score + (share * told.scale / fit.scale).to(score) * history.left_out_logits.to(score)
    return score, *fit_with_and_without(score, y, w, reduce=reduce)


def _bias(history: LabelHistory) -> Tensor:
    """Return (C,) what is added to the logits so that they are those of a network trained on samples drawn alike."""
    bias = history.last.new_zeros(history.last.shape[1], dtype=torch.float64)
    if history.early is not None:
        bias = bias + history.early.bias.to(bias)
    return bias if history.favored is None else bias - history.favored.to(bias)
