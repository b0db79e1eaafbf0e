"""Four label noise models, each of which returns p(wrong), the noise rate and the transition matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.structured_noise import MIN_ENTRY, find_class_noise
from lightning_unlearn.functional.suspects import in_order_of, with_mean
from lightning_unlearn.functional.symmetric_noise import fit_symmetric_noise
from lightning_unlearn.functional.transition import log_odds_of
from lightning_unlearn.recipes.label_evidence import LabelEvidence
from lightning_unlearn.recipes.latent_noise import MANY, LatentWindow, NamedClasses, TransitionNoise

# Below this uncertainty latent classes are used for any number of samples, since they do not memorize.
_APART = 0.1
_TWO = 2

# Errors between similar classes are not counted up to the first rate, and fully from the second on: human errors, 17
# and 40 %, show .04 to .14; right labels of classes that overlap .02 to .03.
_NO_CONFUSION, _ALL_CONFUSION = 0.02, 0.04

# Largest share of ambiguous labels among the suspects for bimodal scores. These have .005 to .19; .25 to .94 is
# measured for memorized labels or similar classes.
_CLEAR_CUT = 0.2

_LEAST_RATE = 1e-4  # for the order where no label is wrong
_MOST_BLIND = 0.95


@dataclass(frozen=True, eq=False)
class Explanation:
    """Result of one noise model.

    Args:
        wrong: (n,), probability that the given label is wrong.
        others: (n, C), log-probabilities of the true classes.
        rate: share of wrong labels.
        interval: 95 % interval of the rate.
        z: significance of wrong labels, in standard deviations.
        transition: (C, C), row k the probabilities of the given label for true class k; None for symmetric noise.
    """

    wrong: Tensor
    others: Tensor
    rate: float
    interval: tuple[float, float]
    z: float
    transition: Tensor | None = None


def wrong_labels(posterior: Tensor, evidence: LabelEvidence) -> tuple[Tensor, float]:
    """Return the probability (n,) that each label is wrong, and the noise rate over all ranks.

    Args:
        posterior: (n, C), log-probabilities of the true class.
        evidence: scores and labels of this rank's samples.
    """
    wrong, w = torch.sigmoid(-log_odds_of(posterior, evidence.label)), evidence.weight
    number, total = evidence.reduce(torch.stack([w.sum(), w @ wrong])).tolist()
    return wrong, total / number


def by_names(named: NamedClasses, evidence: LabelEvidence) -> Explanation:
    """Model the labels by classes that are systematically labeled as another class."""
    others = named.posterior(evidence.label)
    wrong, rate = wrong_labels(others, evidence)
    z = math.sqrt(evidence.z**2 + 2 * named.gain)
    return Explanation(wrong, others, rate, (rate / 2, 1.0), z, named.noise.transition)


def speaks(matrix: TransitionNoise, evidence: LabelEvidence, number: float) -> bool:
    """Return whether latent classes are more reliable than an early epoch and the network's own scores.

    For two classes the scores are one-dimensional, and latent classes overestimate the noise of a rare class.
    """
    if number < MANY or evidence.early is None:
        return True
    return matrix.uncertainty <= _APART and not evidence.is_left_out and len(matrix.transition) > _TWO


def by_matrix(matrix: TransitionNoise, evidence: LabelEvidence) -> Explanation:
    """Model the labels by latent classes with a full transition matrix."""
    rate, early, interval = matrix.rate, evidence.early, (matrix.rate / 2, 1.0)
    if early is not None:
        # For similar classes an early epoch underestimates the noise, and latent classes overestimate it.
        most = early.high if early.is_blind else 1.0
        rate = (max(rate, early.middle) + min(max(rate, early.low), most)) / 2
        interval = min(early.low, rate), max(_highest(early), matrix.rate)
    posterior = matrix.posterior(evidence.label)
    wrong = torch.sigmoid(-log_odds_of(posterior, evidence.label))
    wrong = with_mean(wrong, evidence.weight, _possible(rate), reduce=evidence.reduce)
    return Explanation(wrong, posterior, rate, interval, max(evidence.z, matrix.z), matrix.transition)


def by_class_shares(windows: Sequence[LatentWindow], evidence: LabelEvidence) -> tuple[Explanation, float] | None:
    """Model the labels by symmetric noise with a rate for each true class.

    Returns:
        the result and its log-likelihood gain in nats; None unless the rates clearly differ.
    """
    told = (
        find_class_noise(evidence.score, evidence.label, evidence.weight, reduce=evidence.reduce) if windows else None
    )
    if told is None:
        return None
    noise, gain = told
    # While the network still learns, a class that it confuses with another looks as if its labels were random.
    is_lost = 1 - noise.transition.diagonal() >= MIN_ENTRY
    own = windows[0].transition.argmax(1) == torch.arange(len(is_lost), device=is_lost.device)
    if not bool(own[is_lost].all()):
        return None
    posterior = noise.posterior(evidence.score, evidence.label)
    wrong, rate = wrong_labels(posterior, evidence)
    z = max(evidence.z, math.sqrt(2 * gain))
    return Explanation(wrong, posterior, rate, (rate / 2, 1.0), z, noise.transition), gain


def by_blind_errors(evidence: LabelEvidence) -> Explanation:
    """Model the labels by symmetric noise and errors between similar classes, which give the same ranking."""
    fit, early, y, w, reduce = evidence.fit, evidence.early, evidence.label, evidence.weight, evidence.reduce
    rate, error = fit.rate, 1.96 * fit.std_error
    interval = max(0.0, rate - error), 1.0
    if early is not None:
        rate = early.middle + _counted(early.confused) if early.is_confirmed else max(rate, early.low)
        if early.low <= fit.rate and fit.rate > error and _is_clear_cut(evidence):
            rate = min(rate, fit.rate + error)
        interval = min(early.low, rate), max(_highest(early), fit.rate + error, rate)
    blind = min(max(rate, _LEAST_RATE) / (1 - 1 / evidence.score.shape[1]), _MOST_BLIND)
    # Refit the temperature at this rate: with partly memorized labels, the scores alone suggest too low a rate.
    known = fit_symmetric_noise(evidence.score, y, w, start=fit, blind=blind, reduce=reduce)
    wrong = with_mean(known.wrong_probability(evidence.score, y), w, _possible(rate), reduce=reduce)
    # The margin ranks better for similar classes, because it ignores improbable ones.
    wrong = in_order_of(-label_margin(evidence.score, y), wrong, w, reduce=reduce)
    return Explanation(wrong, evidence.score.double(), rate, interval, evidence.z)


def _counted(confused: float) -> float:
    """Return the share of errors between similar classes that counts as wrong labels."""
    return confused * min(max((confused - _NO_CONFUSION) / (_ALL_CONFUSION - _NO_CONFUSION), 0.0), 1.0)


def _is_clear_cut(evidence: LabelEvidence) -> bool:
    """Return whether scores are clearly bimodal, so that they give a better noise rate than an early epoch."""
    wrong = evidence.fit.wrong_probability(evidence.score, evidence.label)
    doubt, total = evidence.reduce(torch.stack([wrong * (1 - wrong), wrong]) @ evidence.weight).tolist()
    return bool(doubt <= _CLEAR_CUT * total)


def _highest(early: PrequentialRate) -> float:
    """Return the upper bound of the noise rate; 1 unless the noise is symmetric, since other errors may not show.

    A correction for a shift between classes also hides errors between similar classes, so the bound is 1 then too.
    """
    is_known = early.is_blind and not bool(early.bias.any())
    return max(early.high, early.middle + early.most_confused) if is_known else 1.0


def _possible(rate: float) -> float:
    return min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE)
