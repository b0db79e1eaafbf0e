"""Which given labels are wrong, how many, and how sure that is: from what a network said in the course of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.chunks import softmax
from lightning_unlearn.functional.coordinates import helmert
from lightning_unlearn.functional.latent import fit_latent_classes
from lightning_unlearn.functional.leave_one_out import left_out_share
from lightning_unlearn.functional.mixture import Reduce, no_reduce
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.structured_noise import (
    MIN_ENTRY,
    StructuredNoise,
    find_structured_noise,
    fit_structured_noise,
)
from lightning_unlearn.functional.suspects import LEAST, ExpectedPrecision, expected_precision, in_order_of, with_mean
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise, fit_with_and_without
from lightning_unlearn.functional.transition import log_odds_of

EXPECTED_PRECISION = 0.85
"""Of the suspects; what is true of them is mostly within .1 of it."""

NAMED_Z = 3.0
"""From which on suspects are named."""

ACTED_Z = 5.0
"""From which on they are acted upon."""

# The last pass stands in place of the mean over training as far as nothing is memorized: where the network predicts the
# given labels of the training samples more often than those of validation samples, by the first, altogether; by the
# second, not at all.
_NO_GAP, _WIDE_GAP = 0.05, 0.2

_MEMORIZED = 0.9  # share of given labels that the last pass predicts, from which on it says nothing of classes
# Latent classes beside the network's own logits: whether classes go by other names is told best by scores that are
# mostly the network's, which are hardly ever wrong of clean data; which samples do, by the latent classes.
_LIKELIHOOD, _TEST_LOGITS, _POSTERIOR_LOGITS, _SHARPEN = 0.15, 1.5, 0.15, 4.0
MOST_STRUCTURED = 128
"""Classes up to which one may be looked for that is called by another's name."""

# Samples of a class for every class: with fewer, latent classes take what is confused for names.
_LEAST_EACH = 2

_SELDOM = 0.05  # a class is not known if it is predicted less often than this share of the samples called so
_LEAST_RATE = 1e-4  # for the order where no label is wrong

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
        favored: (C,) by a sampler (:func:`~lightning_unlearn.functional.prequential.favored_by_sampler`); None if
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
    """What is found. All but the first four is the same on every rank.

    Args:
        wrong: (n,) float64, probability that the given label is wrong; it ranks.
        suspect: (n,) bool.
        suggested: (n,) int64, the likeliest other class.
        suggested_share: (n,) float64, its probability among the other classes.
        status: ``"found"``: suspects may be acted upon; ``"weak"``: they are named only, as little speaks for them,
            or a sampler draws some classes more often; ``"none"``: no sign; ``"unknown"``: the network has learned too
            little.
        rate: of wrong labels; a lower bound for errors that are not blind.
        interval: of it, at 95 %.
        z: how sure it is that labels are wrong.
        structured: the classes that go by another's name; None if none does.
        precision: expected, of the list by ``wrong``.
        suspects: how many there are.
        expected: their expected precision.
    """

    wrong: Tensor
    suspect: Tensor
    suggested: Tensor
    suggested_share: Tensor
    status: Status
    rate: float
    interval: tuple[float, float]
    z: float
    structured: StructuredNoise | None
    precision: ExpectedPrecision
    suspects: int
    expected: float


def find_label_noise(
    history: LabelHistory, *, precision: float = EXPECTED_PRECISION, reduce: Reduce = no_reduce
) -> LabelNoise:
    """Finds the labels that are wrong.

    Args:
        history: of this rank's samples.
        precision: that the suspects should have.
        reduce: sums over the ranks.
    """
    y, w, bias = history.label, history.weight.double(), _bias(history)
    mean, score = _evidence(history)
    shift = bias.to(mean)
    score, fit, z = _fitted(history, score + shift, reduce)
    early = _unseen(history)
    # What the next epoch has not confirmed had not been learned yet, and is still in the mean.
    is_confirmed = early is not None and early.is_confirmed
    z = early.z_score if early and is_confirmed else max(z, early.z_score if early else 0.0)
    structured = _structured(history, mean + shift, reduce)
    if structured is not None and early is not None and not _was_seen_early(structured, early, y, w, reduce):
        structured = None
    if structured is None:
        rate = early.middle if early and is_confirmed else max(fit.rate, early.low if early else 0.0)
        others = score.double()
        wrong = _blind_errors(fit, score, y, w, rate, reduce)
    else:
        others = structured.posterior(y)
        wrong = torch.sigmoid(-log_odds_of(others, y))
        number, total = reduce(torch.stack([w.sum(), w @ wrong])).tolist()
        rate, z = total / number, math.sqrt(z**2 + 2 * structured.gain)
    # Habits are told from what is hard by an early epoch alone.
    is_open = _is_sampled(history) or (structured is not None and early is None)
    status = _status(z, is_open=is_open) if _knows_classes(mean + shift, y, w, reduce) else "unknown"
    list_of = expected_precision(wrong, w, reduce=reduce)
    number, threshold, expected = list_of.longest(precision, LEAST) if status in {"found", "weak"} else (0.0, 1.0, 0.0)
    share, suggested = others.scatter(1, y.unsqueeze(1), -torch.inf).softmax(1).max(1)
    return LabelNoise(
        wrong=wrong,
        suspect=(wrong >= threshold) & (number > 0),
        suggested=suggested,
        suggested_share=share,
        status=status,
        rate=rate,
        interval=_interval(fit, early, rate, structured is not None),
        z=z,
        structured=structured.noise if structured else None,
        precision=list_of,
        suspects=round(number),
        expected=expected,
    )


def _was_seen_early(
    structured: _Structured, early: PrequentialRate, label: Tensor, weight: Tensor, reduce: Reduce
) -> bool:
    """Whether so many labels as go by another class's name were not what the network said in an early epoch.

    A class goes by its own name more often, so the network learns that first.
    """
    wrong = torch.sigmoid(-log_odds_of(structured.posterior(label), label))
    zeros = weight.new_zeros(structured.score.shape[1])
    given = reduce(zeros.index_add(0, label, weight))
    number, total = reduce(torch.stack([weight.sum(), weight @ wrong])).tolist()
    disagreed = min(max((1 - early.skill) * (1 - given.max().item() / number), 0.0), 1.0)
    return bool(total / number <= disagreed + 2 * math.sqrt((disagreed + 1 / number) / number))


def _is_sampled(history: LabelHistory) -> bool:
    """Whether some classes were drawn more often than others.

    Samples that are drawn again and again are memorized first, and what is like them looks wrong: of suspects under a
    balanced sampler .55 to .96 were, where .85 were expected.
    """
    return history.favored is not None and bool(history.favored.any())


def _status(z: float, *, is_open: bool) -> Status:
    if z >= ACTED_Z and not is_open:
        return "found"
    return "weak" if z >= NAMED_Z else "none"


def _blind_errors(
    fit: SymmetricNoiseFit, score: Tensor, label: Tensor, weight: Tensor, rate: float, reduce: Reduce
) -> Tensor:
    """(n,) probability that each label is wrong, ``rate`` on average."""
    at_least = replace(fit, blind=max(fit.blind, _LEAST_RATE))
    wrong = with_mean(at_least.wrong_probability(score, label), weight, max(rate, _LEAST_RATE), reduce=reduce)
    # The margin ranks better where classes are easily confused, as it leaves the less likely ones out.
    return in_order_of(-label_margin(score, label), wrong, weight, reduce=reduce)


def _unseen(history: LabelHistory) -> PrequentialRate | None:
    """What is told by evidence that has not seen the labels: as much as the one shows that shows more."""
    told = [one for one in (history.early, history.left_out) if one is not None and one.is_settled]
    if not told:
        return None
    return replace(
        told[0],
        low=min(one.low for one in told),
        middle=max(one.middle for one in told),
        high=max(one.high for one in told),
        z_score=max(one.z_score for one in told),
        # What leaves the sample out is not of a network that still learns.
        is_confirmed=any(one.is_confirmed or one is history.left_out for one in told),
    )


def _evidence(history: LabelHistory) -> tuple[Tensor, Tensor]:
    """(n, C) each: the mean over training, and what ranks."""
    mean = history.phases.nanmean(dim=1)
    mean = torch.where(mean.isfinite(), mean, history.last)
    share = 0.0
    if history.gap is not None:
        share = min(max((_WIDE_GAP - history.gap) / (_WIDE_GAP - _NO_GAP), 0.0), 1.0)
    return mean, (1 - share) * mean + share * history.last if share else mean


def _fitted(history: LabelHistory, score: Tensor, reduce: Reduce) -> tuple[Tensor, SymmetricNoiseFit, float]:
    """What ranks, with leave-one-out logits where they know more, and how blind errors explain the labels by that."""
    y, w = history.label, history.weight.double()
    fit, z = fit_with_and_without(score, y, w, reduce=reduce)
    share = left_out_share(history.left_out, history.early, z)
    if history.left_out_logits is None or share == 0:
        return score, fit, z
    told = fit_symmetric_noise(history.left_out_logits, y, w, reduce=reduce)
    score = score + (share * told.scale / fit.scale).to(score) * history.left_out_logits.to(score)
    return score, *fit_with_and_without(score, y, w, reduce=reduce)


def _bias(history: LabelHistory) -> Tensor:
    """(C,) what is added to the logits so that they are those of a network trained on samples drawn alike."""
    bias = history.last.new_zeros(history.last.shape[1], dtype=torch.float64)
    if history.early is not None:
        bias = bias + history.early.bias.to(bias)
    return bias if history.favored is None else bias - history.favored.to(bias)


@dataclass(frozen=True, eq=False)
class _Structured:
    """Scores (n, C) of latent classes, how these are called, and how many nats that gains."""

    score: Tensor
    noise: StructuredNoise
    gain: float

    def posterior(self, label: Tensor) -> Tensor:
        """Log-probability (n, C) of each true class."""
        return self.noise.posterior(self.score, label)


def _structured(history: LabelHistory, mean: Tensor, reduce: Reduce) -> _Structured | None:
    """Which classes go by another's name.

    Looked for in the first phase, which is the least memorized, and in all of training; where more shows, is taken.
    """
    y, w, classes = history.label, history.weight.double(), mean.shape[1]
    if not 2 < classes <= MOST_STRUCTURED:
        return None
    if reduce(w.sum().reshape(1)).item() < _LEAST_EACH * classes * classes:
        return None
    best = None
    for parts, logits in _windows(history, mean, reduce):
        likelihood, candidate = _latent_classes(parts, y, w, reduce)
        if not bool((candidate.clone().fill_diagonal_(0) >= MIN_ENTRY).any()):
            continue
        score = _LIKELIHOOD * likelihood + _TEST_LOGITS * logits.double()
        base = fit_symmetric_noise(score, y, w, biased=True, reduce=reduce)
        found = find_structured_noise(score, y, w, candidate, base, reduce=reduce)
        if found is not None and (best is None or found[1] > best[2]):
            best = likelihood, logits, found[1], candidate
    if best is None:
        return None
    likelihood, logits, gain, candidate = best
    score = _LIKELIHOOD * likelihood + _POSTERIOR_LOGITS * logits.double()
    base = fit_symmetric_noise(score, y, w, biased=True, reduce=reduce)
    noise = fit_structured_noise(score, y, w, candidate, base, reduce=reduce)
    return None if noise is None else _Structured(score, noise, gain)


def _windows(history: LabelHistory, mean: Tensor, reduce: Reduce) -> list[tuple[list[Tensor], Tensor]]:
    """Parts of training (n, C) that latent classes are fitted to together, and the logits that go with them."""
    w, right = history.weight.double(), (history.last.argmax(1) == history.label).double()
    hit, number = reduce(torch.stack([w @ right, w.sum()])).tolist()
    phases = torch.where(history.phases.isfinite(), history.phases, mean.unsqueeze(1))
    parts = [part.mean(dim=1) for part in phases.tensor_split(2, dim=1) if part.shape[1]]
    if hit < _MEMORIZED * number:
        parts.append(history.last)
    return [([phases[:, 0]], phases[:, 0]), (parts, mean)]


def _latent_classes(parts: Sequence[Tensor], label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """The log-likelihood of each latent class (n, C), and how the classes are called (C, C)."""
    classes = parts[0].shape[1]
    basis = helmert(classes).to(parts[0])
    rows = torch.cat([part @ basis for part in parts], dim=1)

    def first_guess(x: Tensor) -> Tensor:
        of_mean = x.reshape(len(x), -1, classes - 1)[:, :2].mean(dim=1).double()
        return softmax(_SHARPEN * of_mean @ basis.double().T)

    latent = fit_latent_classes(rows, label, weight, first_guess, classes, reduce=reduce)
    return latent.log_likelihood(rows), latent.transition


def _knows_classes(mean: Tensor, label: Tensor, weight: Tensor, reduce: Reduce) -> bool:
    zeros = weight.new_zeros(mean.shape[1])
    given, said = reduce(torch.stack([zeros.index_add(0, of, weight) for of in (label, mean.argmax(1))]))
    known = (said >= _SELDOM * given)[given > 0]
    return bool(known.sum() >= max(2, len(known) / 2))


def _interval(
    fit: SymmetricNoiseFit, early: PrequentialRate | None, rate: float, structured: bool
) -> tuple[float, float]:
    if early is None or structured:
        error = 1.96 * fit.std_error
        return max(0.0, fit.rate - error if not structured else rate / 2), 1.0
    return min(early.low, rate), max(early.high, fit.rate + 1.96 * fit.std_error, rate)
