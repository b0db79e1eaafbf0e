"""Which given labels are wrong, how many, and how sure that is: from what a network said in the course of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.leave_one_out import left_out_share
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.structured_noise import MIN_ENTRY, StructuredNoise, find_class_noise
from lightning_unlearn.functional.suspects import in_order_of, with_mean
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise, fit_with_and_without
from lightning_unlearn.functional.transition import log_odds_of
from lightning_unlearn.recipes.base import NO_DOUBT, judged_labels, noise_status
from lightning_unlearn.recipes.latent_noise import (
    MANY,
    LatentWindow,
    NamedClasses,
    TransitionNoise,
    as_sure_as_labels_show,
    latent_windows,
    named_classes,
    transition_noise,
)
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

# The last pass and the second half of training stand in place of the mean over all of it as far as nothing is
# memorized: where the network predicts the given labels of the training samples more often than those of validation
# samples, by the first, altogether; by the second, not at all.
_NO_GAP, _WIDE_GAP = 0.05, 0.2

# Classes that are told apart so well are judged by latent classes, of however many samples: these do not memorize.
_APART = 0.1
_TWO = 2

# Errors on classes that are taken for each other are not counted up to the first, and all from the second on: errors as
# people make them, 17 and 40 %, show .04 to .14; right labels of classes that overlap .02 to .03.
_NO_CONFUSION, _ALL_CONFUSION = 0.02, 0.04

# Share of the suspected labels that is in doubt where scores split in two: .005 to .19. It is .25 to .94 where labels
# are memorized or classes are hard to tell.
_CLEAR_CUT = 0.2

# How much of the right labels a network predicted in an early epoch, from 0, as by chance, to 1, all of them, in
# logarithms. Up to the first, of its best guess only what natural confusion does not explain counts, since what is not
# learned looks wrong; from the second on, all of it.
_HARDLY, _WELL = 0.5, 0.75

# How many times as many of the labels one of two that have not seen them predicts at least, for it to be asked too: .47
# was that of a network of twelve neurons under 20 classes, which had called 27 clean labels wrong; others are .52 to 1.
_AS_MUCH = 0.5

_LEAST_RATE = 1e-4  # for the order where no label is wrong
_MOST_BLIND = 0.95

NOT_KNOWN = "the model separates fewer than two classes, or classes with fewer than half of the samples"
NOT_NAMED = "at least one class is labeled as another more often than as itself; the noise model is not identifiable"

Status = Literal["found", "weak", "none", "unknown"]


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
class LabelNoise:
    """What is found. All but the first three is the same on every rank.

    Args:
        wrong: (n,) float64, probability that the given label is wrong; it ranks.
        suggested: (n,) int64, the likeliest other class.
        suggested_share: (n,) float64, its probability among the other classes.
        status: ``"found"``: suspects may be acted upon; ``"weak"``: they are named only, as little speaks for them,
            or a sampler draws some classes more often; ``"none"``: no sign; ``"unknown"``: the network has learned too
            little.
        objection: why nothing can be told; empty if it can.
        rate: of wrong labels; a lower bound for errors that are not blind.
        interval: of it, at 95 %; the upper end is 1 where errors are not known to fall on any class alike.
        z: how sure it is that labels are wrong.
        structured: the classes that go by another's name; None if none does.
        transition: (C, C), row k the probabilities of what a sample of class k is called; None where errors are blind.
    """

    wrong: Tensor
    suggested: Tensor
    suggested_share: Tensor
    status: Status
    objection: str
    rate: float
    interval: tuple[float, float]
    z: float
    structured: StructuredNoise | None
    transition: Tensor | None


def find_label_noise(history: LabelHistory, *, reduce: Reduce = no_reduce) -> LabelNoise:
    """Find the labels that are wrong.

    Four hypotheses are asked, and the first that is shown explains the labels: some classes go by another's name; any
    class may be called by any name, as latent classes that are told well apart show; errors are blind, but more in one
    true class than in another; errors that are blind, or fall on classes that are taken for each other.

    Args:
        history: of this rank's samples.
        reduce: sums over the ranks.
    """
    asked, mean = _asked(history, reduce)
    windows = latent_windows(_finite(history, mean), history.last, asked.label, history.weight, reduce)
    given = (asked.shift, asked.label, asked.weight, reduce)
    named, matrix = named_classes(windows, *given), transition_noise(windows, *given)
    if named is not None and not _is_habit(named, asked, history):
        named = None
    number = reduce(asked.weight.sum().reshape(1)).item()
    is_shown = matrix is not None and matrix.is_shown(number, asked.z)
    found = None if named is None else _by_names(named, asked)
    if found is None and matrix is not None and is_shown and _speaks(matrix, asked, number):
        sure = as_sure_as_labels_show(matrix, asked.label, asked.weight, reduce)
        found = None if sure is None else _by_matrix(sure, asked)
    found = found or _by_class_shares(windows, asked) or _by_blind_errors(asked)
    # Habits are told from what is hard by an early epoch, or by the most confident samples.
    is_open = asked.is_sampled or (named is not None and asked.early is None and not is_shown)
    given_and_said = _given_and_said(mean + asked.shift, asked.label, asked.weight, reduce)
    can_judge = judged_labels(*given_and_said)
    objection = "" if bool(can_judge.any()) else NOT_KNOWN
    if not objection:
        found = replace(found, wrong=torch.where(can_judge[asked.label], found.wrong, NO_DOUBT * found.wrong))
    status = noise_status(found.z, found.rate * number, is_open=is_open)
    if status == "none" and matrix is not None and not matrix.is_named:
        objection = objection or NOT_NAMED
    return _label_noise(found, named, "unknown" if objection else status, objection, asked)


@dataclass(frozen=True, eq=False)
class _Asked:
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


def _asked(history: LabelHistory, reduce: Reduce) -> tuple[_Asked, Tensor]:
    """Return what the history is asked, and the mean over training (n, C)."""
    y, w, early = history.label, history.weight.double(), _unseen(history, reduce)
    mean, seen = _evidence(history)
    shift = _bias(history).to(mean)
    shifted = seen + shift
    score, fit, z = _fitted(history, shifted, reduce)
    # What the next epoch has not confirmed had not been learned yet, and is still in the mean.
    if early is not None:
        z = early.z_score if early.is_confirmed else max(z, early.z_score)
    return _Asked(score, score is not shifted, fit, shift, y, w, early, z, _is_sampled(history), reduce), mean


@dataclass(frozen=True, eq=False)
class _Explained:
    """The labels as one hypothesis explains them; ``others`` (n, C) are log-probabilities of the true classes."""

    wrong: Tensor
    others: Tensor
    rate: float
    interval: tuple[float, float]
    z: float
    transition: Tensor | None = None


def _label_noise(
    found: _Explained, named: NamedClasses | None, status: Status, objection: str, asked: _Asked
) -> LabelNoise:
    is_shown = status in {"found", "weak"}
    share, suggested = found.others.scatter(1, asked.label.unsqueeze(1), -torch.inf).softmax(1).max(1)
    return LabelNoise(
        wrong=found.wrong,
        suggested=suggested,
        suggested_share=share,
        status=status,
        objection=objection,
        rate=found.rate,
        # What does not show, or is memorized first, may be any number.
        interval=found.interval if is_shown and not asked.is_sampled else (found.interval[0], 1.0),
        z=found.z,
        structured=named.noise if named else None,
        transition=found.transition,
    )


def _by_names(named: NamedClasses, asked: _Asked) -> _Explained:
    others, w = named.posterior(asked.label), asked.weight
    wrong = torch.sigmoid(-log_odds_of(others, asked.label))
    number, total = asked.reduce(torch.stack([w.sum(), w @ wrong])).tolist()
    rate, z = total / number, math.sqrt(asked.z**2 + 2 * named.gain)
    return _Explained(wrong, others, rate, (rate / 2, 1.0), z, named.noise.transition)


def _speaks(matrix: TransitionNoise, asked: _Asked, number: float) -> bool:
    """Return whether latent classes say more of the labels than an early epoch and the network's own scores.

    Of two classes, these are a single number, of which latent classes make too much where one is rare.
    """
    if number < MANY or asked.early is None:
        return True
    return matrix.uncertainty <= _APART and not asked.is_left_out and len(matrix.transition) > _TWO


def _by_matrix(matrix: TransitionNoise, asked: _Asked) -> _Explained:
    rate, early, interval = matrix.rate, asked.early, (matrix.rate / 2, 1.0)
    if early is not None:
        # An early epoch takes what is easily confused for uncertain, latent classes take it for wrong.
        most = early.high if early.is_blind else 1.0
        rate = (max(rate, early.middle) + min(max(rate, early.low), most)) / 2
        interval = min(early.low, rate), max(_highest(early), matrix.rate)
    posterior = matrix.posterior(asked.label)
    wrong = torch.sigmoid(-log_odds_of(posterior, asked.label))
    wrong = with_mean(wrong, asked.weight, _possible(rate), reduce=asked.reduce)
    return _Explained(wrong, posterior, rate, interval, max(asked.z, matrix.z), matrix.transition)


def _by_class_shares(windows: Sequence[LatentWindow], asked: _Asked) -> _Explained | None:
    """Return errors that are blind, but more in one true class than in another; None if they are not, by far."""
    told = find_class_noise(asked.score, asked.label, asked.weight, reduce=asked.reduce) if windows else None
    if told is None:
        return None
    noise, gain = told
    # A class that is hardly told from another looks as if its labels were lost, as long as a network learns.
    is_lost = 1 - noise.transition.diagonal() >= MIN_ENTRY
    own = windows[0].transition.argmax(1) == torch.arange(len(is_lost), device=is_lost.device)
    if not bool(own[is_lost].all()):
        return None
    posterior, w = noise.posterior(asked.score, asked.label), asked.weight
    wrong = torch.sigmoid(-log_odds_of(posterior, asked.label))
    number, total = asked.reduce(torch.stack([w.sum(), w @ wrong])).tolist()
    rate = total / number
    return _Explained(wrong, posterior, rate, (rate / 2, 1.0), max(asked.z, math.sqrt(2 * gain)), noise.transition)


def _by_blind_errors(asked: _Asked) -> _Explained:
    """Return errors that are blind, and those on classes that are taken for each other, which rank like them."""
    fit, early, y, w, reduce = asked.fit, asked.early, asked.label, asked.weight, asked.reduce
    rate, error = fit.rate, 1.96 * fit.std_error
    interval = max(0.0, rate - error), 1.0
    if early is not None:
        rate = early.middle + _counted(early.confused) if early.is_confirmed else max(rate, early.low)
        if early.low <= fit.rate and fit.rate > error and _is_clear_cut(asked):
            rate = min(rate, fit.rate + error)
        interval = min(early.low, rate), max(_highest(early), fit.rate + error, rate)
    blind = min(max(rate, _LEAST_RATE) / (1 - 1 / asked.score.shape[1]), _MOST_BLIND)
    # At a rate that is higher than the scores show, their temperature is that of labels which are partly memorized.
    known = fit_symmetric_noise(asked.score, y, w, start=fit, blind=blind, reduce=reduce)
    wrong = with_mean(known.wrong_probability(asked.score, y), w, _possible(rate), reduce=reduce)
    # The margin ranks better where classes are easily confused, as it leaves the less likely ones out.
    wrong = in_order_of(-label_margin(asked.score, y), wrong, w, reduce=reduce)
    return _Explained(wrong, asked.score.double(), rate, interval, asked.z)


def _counted(confused: float) -> float:
    """Return how much of what classes that are taken for each other may explain is added to the rate."""
    return confused * min(max((confused - _NO_CONFUSION) / (_ALL_CONFUSION - _NO_CONFUSION), 0.0), 1.0)


def _is_clear_cut(asked: _Asked) -> bool:
    """Return whether scores split in two, so that they tell the number of wrong labels better than an early epoch."""
    wrong = asked.fit.wrong_probability(asked.score, asked.label)
    doubt, total = asked.reduce(torch.stack([wrong * (1 - wrong), wrong]) @ asked.weight).tolist()
    return bool(doubt <= _CLEAR_CUT * total)


def _highest(early: PrequentialRate) -> float:
    """Return how many labels are wrong at most; 1 where errors are not blind, so that an unknown number does not show.

    A shift between classes that is taken out is not told from classes that are taken for each other.
    """
    is_known = early.is_blind and not bool(early.bias.any())
    return max(early.high, early.middle + early.most_confused) if is_known else 1.0


def _possible(rate: float) -> float:
    return min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE)


def _is_habit(named: NamedClasses, asked: _Asked, history: LabelHistory) -> bool:
    """Return whether a class goes by another's name, and is not one that the network was slow to learn.

    In the first part of training such a class is taken for one like it, as if it went by that name. All of training
    shows a habit as well, but where labels are memorized: where more are predicted than are right.
    """
    label, weight = asked.label, asked.weight
    wrong = torch.sigmoid(-log_odds_of(named.posterior(label), label))
    right = (history.last.argmax(1) == label).double()
    number, total, hit = asked.reduce(torch.stack([weight.sum(), weight @ wrong, weight @ right])).tolist()
    is_memorized = hit >= number - total and (history.gap is None or history.gap > _NO_GAP)
    if not (named.lasts or is_memorized):
        return False
    return asked.early is None or _was_seen_early(total / number, number, asked.early, asked)


def _was_seen_early(rate: float, number: float, early: PrequentialRate, asked: _Asked) -> bool:
    """Return whether so many labels as go by another class's name were not what the network said in an early epoch.

    A class goes by its own name more often, so the network learns that first.
    """
    zeros = asked.weight.new_zeros(asked.score.shape[1])
    given = asked.reduce(zeros.index_add(0, asked.label, asked.weight))
    disagreed = min(max((1 - early.skill) * (1 - given.max().item() / number), 0.0), 1.0)
    return bool(rate <= disagreed + 2 * math.sqrt((disagreed + 1 / number) / number))


def _is_sampled(history: LabelHistory) -> bool:
    """Return whether some classes were drawn more often than others.

    Samples that are drawn again and again are memorized first, and what is like them looks wrong: of suspects under a
    balanced sampler .52 to .96 were, where .85 were expected.
    """
    return history.favored is not None and bool(history.favored.any())


def _unseen(history: LabelHistory, reduce: Reduce) -> PrequentialRate | None:
    """Return what is told by evidence that has not seen the labels: as much as the one shows that shows more."""
    given = history.weight.new_zeros(history.last.shape[1], dtype=torch.float64)
    given = reduce(given.index_add(0, history.label, history.weight.double()))
    early, left_out = (_as_far_as_learned(one, given) for one in (history.early, history.left_out))
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


def _as_far_as_learned(told: PrequentialRate | None, given: Tensor) -> PrequentialRate | None:
    """Reduce the rate to what a network that predicts so many labels can tell.

    Args:
        told: of an early epoch.
        given: (C,) how many samples are called each class.
    """
    if told is None:
        return None
    predicted = max(_predicted(told.skill, given), 1e-9) / max(1 - told.middle, 1e-9)
    known = 1 + math.log(predicted) / math.log(len(given))
    share = min(max((known - _HARDLY) / (_WELL - _HARDLY), 0.0), 1.0)
    middle = told.low + share * (told.middle - told.low)
    # What is not counted may be wrong labels all the same: the upper end stays.
    return replace(told, middle=middle, most_confused=told.most_confused + told.middle - middle)


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
        share = min(max((_WIDE_GAP - history.gap) / (_WIDE_GAP - _NO_GAP), 0.0), 1.0)
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


def _finite(history: LabelHistory, mean: Tensor) -> Tensor:
    return torch.where(history.phases.isfinite(), history.phases, mean.unsqueeze(1))


def _bias(history: LabelHistory) -> Tensor:
    """Return (C,) what is added to the logits so that they are those of a network trained on samples drawn alike."""
    bias = history.last.new_zeros(history.last.shape[1], dtype=torch.float64)
    if history.early is not None:
        bias = bias + history.early.bias.to(bias)
    return bias if history.favored is None else bias - history.favored.to(bias)


def _given_and_said(mean: Tensor, label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return (C,) each: how many samples are called each class, and of how many it is predicted."""
    zeros = weight.new_zeros(mean.shape[1])
    given, said = reduce(torch.stack([zeros.index_add(0, of, weight) for of in (label, mean.argmax(1))]))
    return given, said
