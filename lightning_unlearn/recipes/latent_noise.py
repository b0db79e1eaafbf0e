"""Estimate which classes are systematically labeled as another class, and how often, from the network's logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

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
    has_pairs,
    least_gain,
)
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise
from lightning_unlearn.functional.transition import fit_transition, given_posterior, log_odds_of
from lightning_unlearn.utilities.chunks import softmax
from lightning_unlearn.utilities.reduce import Reduce

MOST_CLASSES = 128
"""Largest number of classes for which latent classes are fitted."""

# Samples per entry of the transition matrix. With fewer, latent classes mistake confusion for wrong labels.
_LEAST_EACH = 2

MEMORIZED = 0.9
"""Share of the given labels predicted in the last pass, from which on that pass is left out of the fit."""

# Weights of latent classes and the network's logits. Scores that are mostly the network's detect best whether a class
# is mislabeled, with hardly any false alarm on clean data. Latent classes locate the samples best.
_LIKELIHOOD, _LOGITS, _POSTERIOR_LOGITS, _SHARPEN = 0.15, 1.5, 0.15, 4.0

# Where labels of two classes are swapped, latent classes alone are overconfident: .63 to .84 of the suspects are wrong
# where .85 are expected, with these logits .75 to .94 (a residual network, seeds 1 to 3, and a table, seed 1).
_POSTERIOR_LOGITS_OF_PAIRS = 0.5

# Share of the gain in the first phase of training that swapped labels keep in all of it: .56 to 1 (a residual network,
# tables). That of similar classes of clean data fades as the network learns to tell them apart: .16 after 5 epochs. But
# after 3 or 4, ten classes in five similar pairs kept .35 to .64: hence at most half of the classes may be swapped, and
# training must have three windows, which are four epochs or more.
_PERSISTS, _WINDOWS_OF_PAIRS = 0.4, 2

# Gaussian likelihoods in many correlated coordinates are overconfident, which biases a matrix fitted to them.
_LARGEST_SCALE = 0.7

# Step from the largest scale (0) to the maximum-likelihood one (1), in logarithms. On convolutional networks (seed 1)
# the estimated rate is .21 and .31 for 20 % symmetric and 40 % human errors; at 1 it would be .16 and .23, at 0 .29
# and .41.
_FITTED = 2 / 3

# Least gain of the fitted scale over the largest one in log-likelihood: in nats, and in nats per sample.
_BETTER, _BETTER_EACH = 10.0, 0.005

# Least gain of wrong labels over rescaled likelihoods: in nats per class, and in nats. Clean data of a recurrent and an
# attention network gain -4 to 1, noise 100 and more.
_GAIN_EACH, _LEAST_GAIN = 1.0, 4.5

UNEXPLAINED = 1.5
"""Least ratio of the disagreement on the most confident quarter to the mean uncertainty that indicates wrong labels."""

# Ratio that suffices for 1000 samples or more without other evidence, and that a less certain, shorter window needs.
_STRIKING = 3.0

# To be preferred, a shorter window needs this multiple of the ratio, at no more than this multiple of the uncertainty.
_CLEARER, _LESS_SURE = 1.25, 1.5

MANY = 1000
"""Number of samples from which on symmetric noise can be detected."""

_SIGN = 2.0  # standard deviations


@dataclass(frozen=True, eq=False)
class LatentWindow:
    """Latent classes fitted to a part of training.

    Args:
        parts: logits (n, C) of consecutive parts of the window, to which the classes were fitted jointly.
        logits: (n, C), mean logits over the window.
        likelihood: (n, C), log-likelihood of each latent class.
        transition: (C, C), row k the probabilities of the given label for latent class k.
    """

    parts: Sequence[Tensor]
    logits: Tensor
    likelihood: Tensor
    transition: Tensor


_Scored = Callable[[LatentWindow], tuple[Tensor, SymmetricNoiseFit]]


def latent_windows(
    phases: Tensor, last: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[LatentWindow, ...]:
    """Return windows over all of training, its first half, and its first phase, which is the least memorized.

    Args:
        phases: (n, P, C), finite mean logits of each part of training.
        last: (n, C), logits of the last pass.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        the windows, longest first; empty with too many classes or too few samples.
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
    """Noise model in which some classes are systematically labeled as another class.

    Args:
        score: (n, C), scores of the true classes.
        noise: the fitted transition matrix with its temperature and bias.
        gain: log-likelihood gain over symmetric noise, in nats.
        lasts: whether the evidence of all of training shows it too, and not only that of its first part.
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
    """Return the noise model of systematically mislabeled classes, from the window with the largest gain.

    Args:
        windows: as returned by :func:`latent_windows`.
        shift: (C,), correction to add to logits.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        None if no class is systematically mislabeled.
    """
    if not windows or len(windows[0].transition) == 2:
        return None
    y, w, best, lasts = label, weight.double(), None, False

    @cache
    def scored(window: LatentWindow) -> tuple[Tensor, SymmetricNoiseFit]:
        return _scored(window, _LOGITS, shift, y, w, reduce)

    for window in dict.fromkeys((windows[-1], windows[0])):
        gain, is_shown, is_most = _gain_of_names(window, scored, y, w, reduce)
        if is_shown and (best is None or gain > best[1]):
            best = window, gain
        lasts |= window is windows[0] and is_most
    swapped = _swapped(windows, scored, y, w, reduce)
    if swapped is not None and (best is None or swapped[1] > best[1]):
        best, lasts = (windows[0], swapped[1]), True
        candidate = swapped[0].transition - swapped[0].transition.min()  # without symmetric noise
    elif best is not None:
        swapped, candidate = None, best[0].transition
    else:
        return None
    window, gain = best
    of_logits = _POSTERIOR_LOGITS if swapped is None else _POSTERIOR_LOGITS_OF_PAIRS
    score, base = _scored(window, of_logits, shift, y, w, reduce)
    noise = fit_structured_noise(score, y, w, candidate, base, pairs=swapped is not None, reduce=reduce)
    return None if noise is None else NamedClasses(score, noise, gain, lasts)


def _scored(
    window: LatentWindow, of_logits: float, shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[Tensor, SymmetricNoiseFit]:
    """Return (n, C) scores of latent classes and network, and symmetric noise fitted to them."""
    score = _LIKELIHOOD * window.likelihood + of_logits * (window.logits + shift).double()
    return score, fit_symmetric_noise(score, label, weight, biased=True, reduce=reduce)


def _swapped(
    windows: Sequence[LatentWindow], scored: _Scored, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[StructuredNoise, float] | None:
    """Return the noise model of pairs of classes with swapped labels, and its gain over symmetric noise in nats.

    It is sought in all of training, as the first part still confuses similar classes, and must persist from there.
    """
    if len(windows) <= _WINDOWS_OF_PAIRS:
        return None

    def pairs(window: LatentWindow) -> tuple[StructuredNoise, float, bool] | None:
        if not has_pairs(window.transition):
            return None
        score, base = scored(window)
        return find_pairs(score, label, weight, window.transition, base, reduce=reduce)

    found = pairs(windows[0])
    if found is None:
        return None
    noise, gain, is_shown = found
    if not is_shown or 2 * noise.entries > len(noise.transition):
        return None
    first = pairs(windows[-1])
    return None if first is None or gain < _PERSISTS * first[1] else (noise, gain)


def _gain_of_names(
    window: LatentWindow, scored: _Scored, label: Tensor, weight: Tensor, reduce: Reduce
) -> tuple[float, bool, bool]:
    """Return the gain over symmetric noise in nats, whether it suffices for every entry, and whether for any."""
    candidate = window.transition
    if not bool((candidate.clone().fill_diagonal_(0) >= MIN_ENTRY).any()):
        return 0.0, False, False
    score, base = scored(window)
    found = find_structured_noise(score, label, weight, candidate, base, reduce=reduce)
    if found is None:
        return 0.0, False, False
    _, gain, is_shown = found
    return gain, is_shown, gain >= least_gain(reduce(weight.sum().reshape(1)).item())


@dataclass(frozen=True, eq=False)
class TransitionNoise:
    """Noise model with a full transition matrix of latent classes, compared with the classifier's uncertainty.

    With correct labels a classifier disagrees with them as often as its mean uncertainty predicts, and far less often
    on its most confident quarter.

    Args:
        window: the part of training to which it was fitted.
        score: (n, C), scores of the true classes.
        transition: (C, C), row k the probabilities of the given label for true class k.
        rate: share of wrong labels.
        uncertainty: expected error rate of the latent classes without the given label.
        confident: share of the most confident quarter whose prediction differs from the given label.
        z: significance of more disagreement than 1.5 times the uncertainty, in standard deviations.
        is_named: whether each class is most often labeled as itself.
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
        """Ratio of the disagreement on the most confident quarter to the mean uncertainty; 0 without ``is_named``."""
        return self.confident / max(self.uncertainty, 1e-9) if self.is_named else 0.0

    def is_shown(self, samples: float, z: float) -> bool:
        """Return whether the model shows wrong labels.

        A network that has hardly learned may be confident and wrong. With many samples, other evidence of wrong labels
        or a larger ratio is therefore required.

        Args:
            samples: their number over all ranks.
            z: significance of wrong labels from the other evidence, in standard deviations.
        """
        return self.unexplained > (UNEXPLAINED if samples < MANY or z >= _SIGN else _STRIKING)


def transition_noise(
    windows: Sequence[LatentWindow], shift: Tensor, label: Tensor, weight: Tensor, reduce: Reduce
) -> TransitionNoise | None:
    """Return the full transition matrix from the window that shows wrong labels most clearly.

    Late in training, partly memorized wrong labels look right. Early in training, the network is uncertain of
    everything. Among several windows of clean data some look suspicious by chance, so a shorter window must be far
    clearer than a longer one.

    Args:
        windows: as returned by :func:`latent_windows`.
        shift: (C,), correction to add to logits.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        None if there are no windows.
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
    """Return the transition matrix for scaled log-likelihoods, and the probability (n,) that each label is wrong."""
    likelihood = scale * window.likelihood
    transition = fit_transition(likelihood, label, weight, window.transition, reduce=reduce)
    posterior = given_posterior(likelihood, label, transition)
    return transition, 1 - posterior.gather(1, label.unsqueeze(1)).squeeze(1).exp()


def as_sure_as_labels_show(
    noise: TransitionNoise, label: Tensor, weight: Tensor, is_needed: bool, reduce: Reduce
) -> TransitionNoise | None:
    """Recalibrate the latent classes on the given labels and refit the transition matrix.

    The maximum-likelihood scale mistakes wrong labels of ambiguous samples, such as human errors, for uncertainty. The
    largest scale mistakes uncertainty for wrong labels. The scale used lies two thirds of the way from the largest to
    the maximum-likelihood one, in logarithms.

    Args:
        noise: as returned by :func:`transition_noise`.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        is_needed: return None if uncertainty alone explains the labels. Set to False for memorized labels: scores that
            contain them explain them without errors.
        reduce: sums over the ranks.

    Returns:
        the recalibrated noise model, or None as described for ``is_needed``.
    """
    window, w = noise.window, weight.double()
    fitted = fit_likelihood_scale(window.likelihood, label, w, window.transition, largest=_LARGEST_SCALE, reduce=reduce)
    number = reduce(w.sum().reshape(1)).item()
    # If all samples are equally easy, any scale explains the labels.
    if fitted.gain - fitted.gain_at_largest < max(_BETTER, _BETTER_EACH * number):
        return noise
    if fitted.gain < max(_LEAST_GAIN, _GAIN_EACH * len(noise.transition)):
        return None if is_needed else noise
    scale = fitted.scale**_FITTED * _LARGEST_SCALE ** (1 - _FITTED)
    transition, wrong = _scaled(window, scale, label, w, reduce)
    total = reduce((w @ wrong).reshape(1)).item()
    return replace(noise, transition=transition, rate=total / number)


def _binomial_z(share: float, expected: float, number: float) -> float:
    """Return the significance of a share above the expected one, in standard deviations."""
    p, q = min(max(share, 1e-9), 1 - 1e-9), min(max(expected, 1e-9), 1 - 1e-9)
    if p <= q:
        return 0.0
    return math.sqrt(2 * number * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))))
