"""Four noise models, each of which explains the given labels: p(wrong), the rate, and what was called how."""

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

# Classes that are told apart so well are judged by latent classes, of however many samples: these do not memorize.
_APART = 0.1
_TWO = 2

# Errors on classes that are taken for each other are not counted up to the first, and all from the second on: errors as
# people make them, 17 and 40 %, show .04 to .14; right labels of classes that overlap .02 to .03.
_NO_CONFUSION, _ALL_CONFUSION = 0.02, 0.04

# Share of the suspected labels that is in doubt where scores split in two: .005 to .19. It is .25 to .94 where labels
# are memorized or classes are hard to tell.
_CLEAR_CUT = 0.2

_LEAST_RATE = 1e-4  # for the order where no label is wrong
_MOST_BLIND = 0.95


@dataclass(frozen=True, eq=False)
class Explanation:
    """The labels as one hypothesis explains them; ``others`` (n, C) are log-probabilities of the true classes."""

    wrong: Tensor
    others: Tensor
    rate: float
    interval: tuple[float, float]
    z: float
    transition: Tensor | None = None


def wrong_labels(posterior: Tensor, evidence: LabelEvidence) -> tuple[Tensor, float]:
    """Return the probability (n,) that each label is wrong, and the rate of all ranks.

    Args:
        posterior: (n, C), log-probabilities of the true class.
        evidence: of this rank's samples.
    """
    wrong, w = torch.sigmoid(-log_odds_of(posterior, evidence.label)), evidence.weight
    number, total = evidence.reduce(torch.stack([w.sum(), w @ wrong])).tolist()
    return wrong, total / number


def by_names(named: NamedClasses, evidence: LabelEvidence) -> Explanation:
    """Explain the labels by classes that go by another's name."""
    others = named.posterior(evidence.label)
    wrong, rate = wrong_labels(others, evidence)
    z = math.sqrt(evidence.z**2 + 2 * named.gain)
    return Explanation(wrong, others, rate, (rate / 2, 1.0), z, named.noise.transition)


def speaks(matrix: TransitionNoise, evidence: LabelEvidence, number: float) -> bool:
    """Return whether latent classes say more of the labels than an early epoch and the network's own scores.

    Of two classes, these are a single number, of which latent classes make too much where one is rare.
    """
    if number < MANY or evidence.early is None:
        return True
    return matrix.uncertainty <= _APART and not evidence.is_left_out and len(matrix.transition) > _TWO


def by_matrix(matrix: TransitionNoise, evidence: LabelEvidence) -> Explanation:
    """Explain the labels by latent classes, each of which may be called by any name."""
    rate, early, interval = matrix.rate, evidence.early, (matrix.rate / 2, 1.0)
    if early is not None:
        # An early epoch takes what is easily confused for uncertain, latent classes take it for wrong.
        most = early.high if early.is_blind else 1.0
        rate = (max(rate, early.middle) + min(max(rate, early.low), most)) / 2
        interval = min(early.low, rate), max(_highest(early), matrix.rate)
    posterior = matrix.posterior(evidence.label)
    wrong = torch.sigmoid(-log_odds_of(posterior, evidence.label))
    wrong = with_mean(wrong, evidence.weight, _possible(rate), reduce=evidence.reduce)
    return Explanation(wrong, posterior, rate, interval, max(evidence.z, matrix.z), matrix.transition)


def by_class_shares(windows: Sequence[LatentWindow], evidence: LabelEvidence) -> tuple[Explanation, float] | None:
    """Explain them by errors that are blind, but far more in one true class than in another; and the gain in nats.

    None if they are not.
    """
    told = (
        find_class_noise(evidence.score, evidence.label, evidence.weight, reduce=evidence.reduce) if windows else None
    )
    if told is None:
        return None
    noise, gain = told
    # A class that is hardly told from another looks as if its labels were lost, as long as a network learns.
    is_lost = 1 - noise.transition.diagonal() >= MIN_ENTRY
    own = windows[0].transition.argmax(1) == torch.arange(len(is_lost), device=is_lost.device)
    if not bool(own[is_lost].all()):
        return None
    posterior = noise.posterior(evidence.score, evidence.label)
    wrong, rate = wrong_labels(posterior, evidence)
    z = max(evidence.z, math.sqrt(2 * gain))
    return Explanation(wrong, posterior, rate, (rate / 2, 1.0), z, noise.transition), gain


def by_blind_errors(evidence: LabelEvidence) -> Explanation:
    """Explain them by errors that are blind, or fall on classes that are taken for each other, which rank alike."""
    fit, early, y, w, reduce = evidence.fit, evidence.early, evidence.label, evidence.weight, evidence.reduce
    rate, error = fit.rate, 1.96 * fit.std_error
    interval = max(0.0, rate - error), 1.0
    if early is not None:
        rate = early.middle + _counted(early.confused) if early.is_confirmed else max(rate, early.low)
        if early.low <= fit.rate and fit.rate > error and _is_clear_cut(evidence):
            rate = min(rate, fit.rate + error)
        interval = min(early.low, rate), max(_highest(early), fit.rate + error, rate)
    blind = min(max(rate, _LEAST_RATE) / (1 - 1 / evidence.score.shape[1]), _MOST_BLIND)
    # At a rate that is higher than the scores show, their temperature is that of labels which are partly memorized.
    known = fit_symmetric_noise(evidence.score, y, w, start=fit, blind=blind, reduce=reduce)
    wrong = with_mean(known.wrong_probability(evidence.score, y), w, _possible(rate), reduce=reduce)
    # The margin ranks better where classes are easily confused, as it leaves the less likely ones out.
    wrong = in_order_of(-label_margin(evidence.score, y), wrong, w, reduce=reduce)
    return Explanation(wrong, evidence.score.double(), rate, interval, evidence.z)


def _counted(confused: float) -> float:
    """Return how much of what classes that are taken for each other may explain is added to the rate."""
    return confused * min(max((confused - _NO_CONFUSION) / (_ALL_CONFUSION - _NO_CONFUSION), 0.0), 1.0)


def _is_clear_cut(evidence: LabelEvidence) -> bool:
    """Return whether scores split in two, so that they tell the number of wrong labels better than an early epoch."""
    wrong = evidence.fit.wrong_probability(evidence.score, evidence.label)
    doubt, total = evidence.reduce(torch.stack([wrong * (1 - wrong), wrong]) @ evidence.weight).tolist()
    return bool(doubt <= _CLEAR_CUT * total)


def _highest(early: PrequentialRate) -> float:
    """Return how many labels are wrong at most; 1 where errors are not blind, so that an unknown number does not show.

    A shift between classes that is taken out is not told from classes that are taken for each other.
    """
    is_known = early.is_blind and not bool(early.bias.any())
    return max(early.high, early.middle + early.most_confused) if is_known else 1.0


def _possible(rate: float) -> float:
    return min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE)
