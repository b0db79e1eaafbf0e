"""Systematic mislabeling of one class as another, beyond what symmetric noise and uncertainty explain.

A network that has learned such mislabeling predicts it, so its own probabilities explain the labels without any error.
Latent classes still show which pairs of classes stand out. Their transition matrix provides candidate entries; an entry
is kept only if it makes the given labels far more likely.

The rate of symmetric noise may also differ between true classes, for example if annotators do not know a class
(:func:`find_class_noise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.lbfgs import minimize
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, centered, fit_symmetric_noise
from lightning_unlearn.utilities.chunks import row_slices, thinning
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

MIN_ENTRY = 0.06
"""Least probability of an entry; smaller ones are dropped."""

ONE_WAY = 3.0
"""Least ratio of an entry to the one in the opposite direction; below it, the two classes may only be similar."""

MIN_GAIN = 50.0
"""Least log-likelihood gain of all entries over symmetric noise, in nats."""

MIN_GAIN_EACH = 20.0
"""Least gain per entry, in nats."""

MIN_GAIN_PER_SAMPLE = 0.03
"""Least gain per sample, in nats. The gain from a misspecified shape of the classes grows with the sample size."""

MIN_GAIN_OF_PAIRS_PER_SAMPLE = 0.015
"""Least gain of swapped classes per sample, in nats: .024 to .048 where 15 to 35 % of two classes are swapped, .007 at
most where classes overlap."""

MOST_ENTRIES_PER_CLASS = 2
"""Largest mean number of candidate entries per class; with more, classes overlap and no entry is kept."""

LEAST_GAIN_OF_CLASSES = 20.0
"""Least gain of a rate per class over a common rate, in nats; 1 nat per class is added. If the rates are equal, it is
12 at most."""

LEAST_GAIN_OF_CLASSES_PER_SAMPLE = 0.002
"""The same per sample, in nats: human labels gain .001, a class that loses a fifth or more of its labels .007."""

LEAST_GAIN_OF_UNEXPLAINED = 0.012
"""The same, as a fraction of the negative log-likelihood under a common rate: a linear network that cannot separate the
classes gains .008, a class that loses its labels .016 to .053."""

LEAST_EACH = 20
"""Least mean number of samples per class for a rate per class."""

MOST_NUMBERS = 2**20
"""Largest number of scores to which a rate per class is fitted; beyond it, every second, third, ... sample is used."""

_ODDS, _FIRST_SHARE = -1.0, 0.05
_STEPS = 40


@dataclass(frozen=True, eq=False)
class StructuredNoise:
    """Noise model with a transition matrix, on class probabilities ``softmax(scale * score + bias)``.

    Args:
        scale: inverse temperature of the centered scores.
        bias: (C,) float64.
        transition: (C, C) float64, row k the probabilities of the given label for true class k.
        log_likelihood: of the given labels, in nats.
        entries: number of off-diagonal entries besides symmetric noise.
    """

    scale: float
    bias: Tensor
    transition: Tensor
    log_likelihood: float
    entries: int

    def posterior(self, score: Tensor, label: Tensor) -> Tensor:
        """Return the log-probability of each true class given scores and label, (n, C) float64."""
        p = (self.scale * centered(score) + self.bias).log_softmax(1)
        return (p + self.transition.clamp(min=1e-300).log().T[label]).log_softmax(1)


def _matrix(entries: Tensor, logits: Tensor, odds: Tensor, num_classes: int) -> Tensor:
    """Return the transition matrix (C, C) with log-odds (1,) or (C,) of symmetric noise."""
    alone = torch.full((num_classes, num_classes), -torch.inf, dtype=torch.float64, device=logits.device)
    names = alone.fill_diagonal_(0).index_put((entries[:, 0], entries[:, 1]), logits).softmax(1)
    blind = odds.sigmoid().unsqueeze(1)
    return (1 - blind) * names + blind / num_classes


def _fit(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    entries: Tensor,
    start: SymmetricNoiseFit,
    reduce: Reduce,
    *,
    is_common: bool = True,
) -> tuple[StructuredNoise, Tensor]:
    """Fit a transition matrix with these entries (m, 2), and return it with the fitted entries (m,).

    The rate of symmetric noise is common to all true classes, or one per class.
    """
    classes, blind = score.shape[1], min(max(start.blind, 1e-4 if is_common else _FIRST_SHARE), 0.9)
    sizes = [1, classes, 1 if is_common else classes, len(entries)]
    first = torch.cat(
        [
            start.scale[:1].log(),
            start.bias,
            torch.logit(start.bias.new_full((sizes[2],), blind)),
            start.bias.new_full((len(entries),), _ODDS),
        ]
    )
    total = reduce(weight.sum().reshape(1)).item()

    def parts(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_scale, bias, odds, logits = at.split(sizes)  # type: ignore[no-untyped-call]
        return log_scale.exp(), bias, _matrix(entries, logits, odds, classes)

    def loss_and_gradient(at: Tensor) -> tuple[float, Tensor]:
        sums = at.new_zeros(1 + len(at))
        for rows in row_slices(len(label), classes, score.device):
            with torch.enable_grad():
                free = at.clone().requires_grad_()
                scale, bias, names = parts(free)
                p = (scale * centered(score[rows]) + bias).softmax(1)
                loss = -(weight[rows] * (p * names.T[label[rows]]).sum(1).clamp(min=1e-300).log()).sum()
                sums += torch.cat([loss.detach().reshape(1), *torch.autograd.grad(loss, [free])])
        sums = reduce(sums)
        bias = at[1 : classes + 1]
        sums[0] += 0.5 * bias.square().sum()
        sums[2 : classes + 2] += bias
        return sums[0].item() / total, sums[1:] / total

    found = minimize(loss_and_gradient, first, _STEPS)
    likelihood = -loss_and_gradient(found)[0] * total
    scale, bias, matrix = parts(found)
    noise = StructuredNoise(scale.item(), bias, matrix, likelihood, len(entries))
    return noise, matrix[entries[:, 0], entries[:, 1]]


def find_structured_noise(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    candidate: Tensor,
    base: SymmetricNoiseFit,
    *,
    reduce: Reduce = no_reduce,
) -> tuple[StructuredNoise, float, bool] | None:
    """Find classes that are systematically labeled as another class.

    Args:
        score: (n, C), combined scores of latent classes and network.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C), the transition matrix of the latent classes.
        base: symmetric noise fitted to the same scores.
        reduce: sums over the ranks.

    Returns:
        the noise model, its gain in nats, and whether that gain is sufficient; None if no entry remains. The same on
        every rank.
    """
    found = fit_structured_noise(score, label, weight, candidate, base, reduce=reduce)
    if found is None:
        return None
    gain, total = found.log_likelihood - base.log_likelihood, reduce(weight.double().sum().reshape(1)).item()
    is_enough = gain >= least_gain(total) and gain >= MIN_GAIN_EACH * found.entries
    return found, gain, is_enough and _by_own_name(found, candidate)


def _by_own_name(found: StructuredNoise, candidate: Tensor) -> bool:
    """Return whether each class is most often labeled as itself."""
    own = torch.arange(len(candidate), device=candidate.device)
    # If latent classes separate two classes so badly that their labels are swapped, this is no evidence of mislabeling.
    others = found.transition.clone().fill_diagonal_(0) >= MIN_ENTRY
    told = (candidate.argmax(1) == own) | ~(others.any(0) | others.any(1))
    return bool(((found.transition.argmax(1) == own) & told).all())


def least_gain(samples: float) -> float:
    """Return the least gain over symmetric noise, in nats, that shows systematic mislabeling with this many samples."""
    return max(MIN_GAIN, MIN_GAIN_PER_SAMPLE * samples)


def fit_structured_noise(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    candidate: Tensor,
    base: SymmetricNoiseFit,
    *,
    pairs: bool = False,
    reduce: Reduce = no_reduce,
) -> StructuredNoise | None:
    """Fit a transition matrix with those entries of ``candidate`` that stay large.

    Args:
        score: (n, C), class scores.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C), the transition matrix of the latent classes.
        base: symmetric noise fitted to the scores, the start of the fit.
        pairs: whether two classes may be labeled as each other.
        reduce: sums over the ranks.

    Returns:
        the same on every rank; None if no entry remains, or if there are too many.
    """
    weight = weight.double()
    one_way, paired = _large_entries(candidate)
    paired &= pairs
    entries = (one_way | paired).nonzero()
    while 0 < len(entries) <= MOST_ENTRIES_PER_CLASS * len(candidate):
        found, size = _fit(score, label, weight, entries, base, reduce)
        kept = torch.zeros_like(paired).index_put((entries[:, 0], entries[:, 1]), size >= MIN_ENTRY)
        kept &= ~paired | kept.T  # one direction alone of a pair indicates similar classes
        if kept.sum() == len(entries):
            return found
        entries = kept.nonzero()
    return None


def _large_entries(candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C, C) bool each: large entries without a counterpart, and those of two classes labeled as each other."""
    others = candidate.clone().fill_diagonal_(0)
    large = others >= MIN_ENTRY
    one_way = large & (others >= ONE_WAY * others.T)
    return one_way, large & large.T & ~one_way & ~one_way.T


def has_pairs(candidate: Tensor) -> bool:
    """Return whether a transition matrix (C, C) has two classes labeled as each other."""
    return bool(_large_entries(candidate)[1].any())


def find_pairs(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    candidate: Tensor,
    base: SymmetricNoiseFit,
    *,
    reduce: Reduce = no_reduce,
) -> tuple[StructuredNoise, float, bool] | None:
    """Find pairs of classes whose labels are swapped.

    Similar classes are not confused where the network is certain. Swapped labels are as frequent there as elsewhere.

    Args:
        score: (n, C), combined scores of latent classes and network.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C), the transition matrix of the latent classes.
        base: symmetric noise fitted to the same scores.
        reduce: sums over the ranks.

    Returns:
        the noise model, its gain in nats, and whether the pairs gain enough, the same on every rank; None if there is
        no pair.
    """
    given = (score, label, weight, candidate, base)
    found = fit_structured_noise(*given, pairs=True, reduce=reduce)
    without = fit_structured_noise(*given, reduce=reduce)
    if found is None or found.entries <= (0 if without is None else without.entries):
        return None
    total = reduce(weight.double().sum().reshape(1)).item()
    of_pairs = found.log_likelihood - (base if without is None else without).log_likelihood
    is_enough = of_pairs >= max(MIN_GAIN, MIN_GAIN_OF_PAIRS_PER_SAMPLE * total)
    return found, found.log_likelihood - base.log_likelihood, is_enough and _by_own_name(found, candidate)


def find_class_noise(
    score: Tensor, label: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce
) -> tuple[StructuredNoise, float] | None:
    """Fit symmetric noise with a rate for each true class.

    Args:
        score: (n, C), the class scores that rank the samples.
        label: (n,) int64, given labels.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        the noise model and its gain over a common rate in nats, the same on every rank; None if a common rate explains
        the labels as well.
    """
    classes, total = score.shape[1], reduce(weight.double().sum().reshape(1)).item()
    thin = thinning(total, classes, MOST_NUMBERS)
    if classes < 3 or total < thin * LEAST_EACH * classes:
        return None
    part = score[::thin], label[::thin], weight[::thin].double()
    common = fit_symmetric_noise(*part, biased=True, reduce=reduce)
    none = torch.empty(0, 2, dtype=torch.long, device=score.device)
    found, _ = _fit(*part, none, common, reduce, is_common=False)
    gain = thin * (found.log_likelihood - common.log_likelihood)
    least = max(
        LEAST_GAIN_OF_CLASSES + classes,
        LEAST_GAIN_OF_CLASSES_PER_SAMPLE * total,
        -LEAST_GAIN_OF_UNEXPLAINED * thin * common.log_likelihood,
    )
    return (found, gain) if gain >= least else None
