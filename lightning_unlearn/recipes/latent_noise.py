"""True classes behind the given labels, in what a network said of them: which go by another's name, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.coordinates import helmert
from lightning_unlearn.functional.evidence import confident_disagreement
from lightning_unlearn.functional.latent_classes import fit_latent_classes
from lightning_unlearn.functional.likelihood_scale import fit_likelihood_scale
from lightning_unlearn.functional.structured_noise import (
    MIN_ENTRY,
    StructuredNoise,
    find_pairs,
    find_structured_noise,
    fit_structured_noise,
    least_gain,
)
from lightning_unlearn.functional.symmetric_noise import fit_symmetric_noise
from lightning_unlearn.functional.transition import fit_transition, given_posterior, log_odds_of
from lightning_unlearn.utilities.chunks import softmax
from lightning_unlearn.utilities.reduce import Reduce

MOST_CLASSES = 128
"""Up to which true classes are looked for behind the given ones."""

# Samples of a class for every class: with fewer, latent classes take what is confused for names.
_LEAST_EACH = 2

MEMORIZED = 0.9
"""Share of the given labels that the last pass predicts, from which on it says nothing of classes."""

# Latent classes beside the network's own logits: whether classes go by other names is told best by scores that are
# mostly the network's, which are hardly ever wrong of clean data; which samples do, by the latent classes.
_LIKELIHOOD, _LOGITS, _POSTERIOR_LOGITS, _SHARPEN = 0.15, 1.5, 0.15, 4.0

# Where two classes go by each other's names, latent ones alone are too sure which: .63 to .84 of the suspects are wrong
# where .85 are expected, with these logits .75 to .94 (a residual network, seeds 1 to 3, and a table, seed 1).
_POSTERIOR_LOGITS_OF_PAIRS = 0.5

# Likelihoods of Gaussians in many correlated coordinates are too sure of themselves where a matrix is fitted to them.
_LARGEST_SCALE = 0.7

# How far the scale is moved to the one that makes the labels likeliest. On convolutional networks (seed 1) the rate is
# .21 and .31 then for 20 % symmetric and 40 % human errors; at 1 it would be .16 and .23, at 0 .29 and .41.
_FITTED = 2 / 3

# Nats, at least and for each sample, by which the fitted scale must make the labels likelier than the largest one.
_BETTER, _BETTER_EACH = 10.0, 0.005

# Nats, for each class and at least, that wrong labels must explain beyond the uncertainty of likelihoods that are less
# sure of themselves: clean data of a recurrent and an attention network gain -4 to 1, noise 100 and more.
_GAIN_EACH, _LEAST_GAIN = 1.0, 4.5

UNEXPLAINED = 1.5
"""How many times as often as uncertainty explains of the average sample the most confident quarter disagrees."""

# From which on a thousand samples and more need no other sign, and a shorter window may be less sure.
_STRIKING = 3.0

# A shorter window shows so many times as much, and is at most so many times as uncertain.
_CLEARER, _LESS_SURE = 1.25, 1.5

MANY = 1000
"""Samples of which blind errors show."""

_SIGN = 2.0  # standard deviations


@dataclass(frozen=True, eq=False)
class LatentWindow:
    """A part of training and what latent classes make of it.

    Args:
        parts: (n, C) each, that the classes were fitted to together.
        logits: (n, C), their mean.
        likelihood: (n, C), the log-likelihood of each latent class.
        transition: (C, C), how they are called.
    """

    parts: Sequence[Tensor]
    logits: Tensor
    likelihood: Tensor
    transition: Tensor


def latent_windows(
    phases: Tensor, last: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[LatentWindow, ...]:
    """Return all of training, its first half, and its first phase, which is the least memorized.

    None where there are too many classes.

    Args:
        phases: (n, P, C), finite.
        last: (n, C).
        label: (n,) int64.
        weight: (n,).
        reduce: sums over the ranks.
    """
    w, right, classes = weight.double(), (last.argmax(1) == label).double(), last.shape[1]
    hit, number = reduce(torch.stack([w @ right, w.sum()])).tolist()
    if not 2 <= classes <= MOST_CLASSES or number < _LEAST_EACH * classes * classes:
        return ()
    number_of = phases.shape[1]
    windows = []
    for length in sorted({number_of, max(1, number_of // 2), 1}, reverse=True):
        parts = [part.mean(dim=1) for part in phases[:, :length].tensor_split(2, dim=1) if part.shape[1]]
        if length == number_of and hit < MEMORIZED * number:
            parts.append(last)
        windows.append(LatentWindow(parts, phases[:, :length].mean(1), *_latent_classes(parts, label, w, reduce)))
    return tuple(windows)


def _latent_classes(parts: Sequence[Tensor], label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    classes = parts[0].shape[1]
    basis = helmert(classes).to(parts[0])
    rows = torch.cat([part @ basis for part in parts], dim=1)

    def first_guess(x: Tensor) -> Tensor:
        of_mean = x.reshape(len(x), -1, classes - 1)[:, :2].mean(dim=1).double()
        return softmax(_SHARPEN * of_mean @ basis.double().T)

    latent = fit_latent_classes(rows, label, weight, first_guess, classes, reduce=reduce)
    return latent.log_likelihood(rows), latent.transition


@dataclass(frozen=True, eq=False)
class NamedClasses:
    """Classes some of which go by another's name.

    Args:
        score: (n, C) of the latent classes.
        noise: how they are called.
        gain: in nats, over blind errors.
        lasts: whether all of training shows as much, and not its first part alone.
    """

    score: Tensor
    noise: StructuredNoise
    gain: float
    lasts: bool

    def posterior(self, label: Tensor) -> Tensor:
        """Return the log-probability (n, C) of each true class."""
        return self.noise.posterior(self.score, label)


def named_classes(
    windows: Sequence[LatentWindow], shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> NamedClasses | None:
    """Return which classes go by another's name, in the window in which more shows; None if none does.

    Args:
        windows: of :func:`latent_windows`.
        shift: (C,), what is added to logits.
        label: (n,) int64.
        weight: (n,).
        reduce: sums over the ranks.
    """
    y, w, best, lasts = label, weight.double(), None, False
    for window in dict.fromkeys((*windows[-1:], *windows[:1])):
        gain, is_shown, is_most = _gain_of_names(window, shift, y, w, reduce)
        if is_shown and (best is None or gain > best[1]):
            best = window, gain
        lasts |= window is windows[0] and is_most
    # The first part of training confuses what is hard to tell for longer than all of it.
    pairs = _pairs(windows[0], shift, y, w, reduce) if windows else None
    if pairs is not None and (best is None or pairs[1] > best[1]):
        best, lasts, candidate = (windows[0], pairs[1]), True, pairs[0].transition
    elif best is not None:
        pairs, candidate = None, best[0].transition
    if best is None:
        return None
    window, gain = best
    share = _POSTERIOR_LOGITS if pairs is None else _POSTERIOR_LOGITS_OF_PAIRS
    score = _LIKELIHOOD * window.likelihood + share * (window.logits + shift).double()
    base = fit_symmetric_noise(score, y, w, biased=True, reduce=reduce)
    noise = fit_structured_noise(score, y, w, candidate, base, pairs=pairs is not None, reduce=reduce)
    return None if noise is None else NamedClasses(score, noise, gain, lasts)


def _pairs(
    window: LatentWindow, shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[StructuredNoise, float] | None:
    """Return the classes that go by each other's names, and nats that this gains over blind errors."""
    if len(window.transition) == 2:
        return None
    score = _LIKELIHOOD * window.likelihood + _LOGITS * (window.logits + shift).double()
    base = fit_symmetric_noise(score, label, weight, biased=True, reduce=reduce)
    return find_pairs(score, label, weight, window.transition, base, reduce=reduce)


def _gain_of_names(
    window: LatentWindow, shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[float, bool, bool]:
    """Return nats that names gain over blind errors, whether that shows each of them, and whether it shows any."""
    candidate = window.transition
    if len(candidate) == 2 or not bool((candidate.clone().fill_diagonal_(0) >= MIN_ENTRY).any()):
        return 0.0, False, False
    score = _LIKELIHOOD * window.likelihood + _LOGITS * (window.logits + shift).double()
    base = fit_symmetric_noise(score, label, weight, biased=True, reduce=reduce)
    found = find_structured_noise(score, label, weight, candidate, base, reduce=reduce)
    if found is None:
        return 0.0, False, False
    _, gain, is_shown = found
    return gain, is_shown, gain >= least_gain(reduce(weight.sum().reshape(1)).item())


@dataclass(frozen=True, eq=False)
class TransitionNoise:
    """Labels that a full transition matrix of latent classes explains, and uncertainty does not.

    Without wrong labels a classifier disagrees with them on the average sample as often as it expects to, and on its
    most confident quarter far less.

    Args:
        window: that it is of.
        score: (n, C) of the true classes.
        transition: (C, C), row k the probabilities of what a sample of class k is called.
        rate: of wrong labels.
        uncertainty: share of the true classes that the latent classes expect to get wrong without the given label.
        confident: share of the most confident quarter that disagrees.
        z: how sure it is that more samples disagree than 1.5 times the uncertainty, in standard deviations.
        is_named: whether each class goes by its own name most often.
    """

    window: LatentWindow
    score: Tensor
    transition: Tensor
    rate: float
    uncertainty: float
    confident: float
    z: float
    is_named: bool

    def posterior(self, label: Tensor) -> Tensor:
        """Return the log-probability (n, C) of each true class."""
        return given_posterior(self.score, label, self.transition)

    @property
    def unexplained(self) -> float:
        """How many times as often the most confident disagree as uncertainty explains of the average sample."""
        return self.confident / max(self.uncertainty, 1e-9) if self.is_named else 0.0

    def is_shown(self, samples: float, z: float) -> bool:
        """Return whether there are wrong labels.

        A network that has hardly learned may be confident and wrong. But of many samples there is another sign then.

        Args:
            samples: how many there are.
            z: how sure it is otherwise that labels are wrong.
        """
        return self.unexplained > (UNEXPLAINED if samples < MANY or z >= _SIGN else _STRIKING)


def transition_noise(
    windows: Sequence[LatentWindow], shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> TransitionNoise | None:
    """Return how latent classes are labeled, in the window that shows wrong labels most clearly; None without windows.

    What was half memorized in the end speaks for wrong labels as if they were right; what was hardly learned yet is
    unsure of everything. Of several windows of clean data some look suspicious by chance, so a shorter one must be far
    clearer than a longer one.

    Args:
        windows: of :func:`latent_windows`.
        shift: (C,), what is added to logits.
        label: (n,) int64.
        weight: (n,).
        reduce: sums over the ranks.
    """
    best = longest = None
    for window in windows:
        found = _transition_noise(window, shift, label, weight.double(), reduce)
        if best is None or longest is None:
            best = longest = found
            continue
        is_sure = found.uncertainty <= _LESS_SURE * longest.uncertainty
        if found.unexplained > _CLEARER * best.unexplained and (is_sure or found.unexplained > _STRIKING):
            best = found
    return best


def _transition_noise(
    window: LatentWindow, shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> TransitionNoise:
    likelihood, classes = window.likelihood, window.likelihood.shape[1]
    transition, wrong = _scaled(window, _LARGEST_SCALE, label, weight, reduce)
    unsure = 1 - softmax(likelihood.clone()).amax(dim=1)
    late = torch.stack([part + shift for part in window.parts[-2:]]).mean(dim=0)
    score = _LIKELIHOOD * likelihood + _LOGITS * late.double()
    predicted = score.argmax(dim=1)
    sums = torch.stack([torch.ones_like(wrong), wrong, unsure, (predicted != label).double()])
    number, rate, uncertainty, differs = reduce(sums @ weight).tolist()
    confident = confident_disagreement(
        log_odds_of(score, predicted), predicted == label, predicted, weight, classes, reduce=reduce
    )
    rate, uncertainty, differs = rate / number, uncertainty / number, differs / number
    return TransitionNoise(
        window=window,
        score=score,
        transition=transition,
        rate=rate,
        uncertainty=uncertainty,
        confident=confident,
        z=_binomial_z(differs, UNEXPLAINED * uncertainty, number),
        is_named=bool((transition.diagonal() >= transition.amax(dim=1)).all()),
    )


def _scaled(window: LatentWindow, scale: float, label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return the transition matrix at a scale of the likelihoods, and the probability (n,) that each label is wrong."""
    likelihood = scale * window.likelihood
    transition = fit_transition(likelihood, label, weight, window.transition, reduce=reduce)
    posterior = given_posterior(likelihood, label, transition)
    return transition, 1 - posterior.gather(1, label.unsqueeze(1)).squeeze(1).exp()


def as_sure_as_labels_show(
    noise: TransitionNoise, label: Tensor, weight: Tensor, is_needed: bool, reduce: Reduce
) -> TransitionNoise | None:
    """Return the same, as sure of the true classes as the given labels show; None if uncertainty alone explains these.

    The scale that makes the labels likeliest takes wrong labels on samples that are hard to tell, as people make
    them, for uncertainty; the largest one takes uncertainty for wrong labels. Hence two thirds of the way to the first,
    in logarithms.

    Args:
        noise: of :func:`transition_noise`.
        label: (n,) int64.
        weight: (n,).
        is_needed: whether errors must explain the labels. Scores that hold some of the given labels, as memorized ones
            do, explain these without errors.
        reduce: sums over the ranks.
    """
    window, w = noise.window, weight.double()
    fitted = fit_likelihood_scale(window.likelihood, label, w, window.transition, largest=_LARGEST_SCALE, reduce=reduce)
    number = reduce(w.sum().reshape(1)).item()
    # Where all samples are told equally well, any scale explains the labels.
    if fitted.gain - fitted.gain_at_largest < max(_BETTER, _BETTER_EACH * number):
        return noise
    if fitted.gain < max(_LEAST_GAIN, _GAIN_EACH * len(noise.transition)):
        return None if is_needed else noise
    scale = fitted.scale**_FITTED * _LARGEST_SCALE ** (1 - _FITTED)
    transition, wrong = _scaled(window, scale, label, w, reduce)
    total = reduce((w @ wrong).reshape(1)).item()
    return replace(noise, transition=transition, rate=total / number)


def _binomial_z(share: float, expected: float, number: float) -> float:
    """Return how surely a share is above the expected one, in standard deviations."""
    p, q = min(max(share, 1e-9), 1 - 1e-9), min(max(expected, 1e-9), 1 - 1e-9)
    if p <= q:
        return 0.0
    return math.sqrt(2 * number * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))))
