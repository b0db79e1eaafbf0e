"""Whether some class is called by another's name, or by any, beyond what blind errors and uncertainty explain.

A network that has learned such a habit predicts it: its own probabilities then explain the labels, and no error is
left. What tells is which pairs of classes stand out together, and that is what latent classes hold. Their transition
matrix names the candidates; here each of them must make the given labels likelier by far, or it is dropped.

Errors that are blind may still be more in one class than in another, as where annotators do not know it: then each true
class has a share of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.lbfgs import minimize
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, fit_symmetric_noise
from lightning_unlearn.utilities.chunks import row_slices, thinning
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

MIN_ENTRY = 0.06
"""How often a class goes by another's name at least, or the entry is dropped."""

ONE_WAY = 3.0
"""How many times as often as the other way round: less, and the two classes may only be hard to tell apart."""

MIN_GAIN = 50.0
"""Nats that all entries together must gain over blind errors."""

MIN_GAIN_EACH = 20.0
"""Nats for each of them."""

MIN_GAIN_PER_SAMPLE = 0.03
"""Nats for each sample: the more there are, the more a wrong shape of the classes gains."""

MIN_GAIN_OF_PAIRS_PER_SAMPLE = 0.015
"""Nats for each sample that classes which go by each other's names must gain: .024 to .048 where 15 to 35 % of two
classes are swapped, .007 at most where classes overlap."""

MOST_ENTRIES_PER_CLASS = 2
"""Candidates, over all classes, from which on classes overlap rather than go by each other's names."""

LEAST_GAIN_OF_CLASSES = 20.0
"""Nats, and one for each class, that shares of their own must gain over a common one: without them it is 12 at most."""

LEAST_GAIN_OF_CLASSES_PER_SAMPLE = 0.002
"""Nats for each sample: labels as people give them gain .001, a class that loses a fifth or more of its own .007."""

LEAST_GAIN_OF_UNEXPLAINED = 0.012
"""The same, as a share of the nats that a common one leaves: a linear network that cannot tell the classes gains .008,
a class that loses its labels .016 to .053."""

LEAST_EACH = 20
"""Samples of a class on average from which on it is asked."""

MOST_NUMBERS = 2**20
"""Scores that are looked at for that, over all classes; of more samples every second, third, ... is taken."""

_ODDS, _FIRST_SHARE = -1.0, 0.05
_STEPS = 40


@dataclass(frozen=True, eq=False)
class StructuredNoise:
    """Labels as drawn from rows of a transition matrix.

    Args:
        scale: what the scores are multiplied by.
        bias: (C,) float64, what is added to them then.
        transition: (C, C) float64, row k the probabilities of what a sample of class k is called.
        log_likelihood: of the labels, in nats.
        entries: how many names there are beside the classes' own.
    """

    scale: float
    bias: Tensor
    transition: Tensor
    log_likelihood: float
    entries: int

    def posterior(self, score: Tensor, label: Tensor) -> Tensor:
        """Return the log-probability of each true class given its scores and label, (n, C) float64."""
        p = (self.scale * (score.double() - score.double().mean(1, keepdim=True)) + self.bias).log_softmax(1)
        return (p + self.transition.clamp(min=1e-300).log().T[label]).log_softmax(1)


def _matrix(entries: Tensor, logits: Tensor, odds: Tensor, num_classes: int) -> Tensor:
    """Return the transition with ``odds`` (1,) or (C,) of blind errors."""
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
    """Return the matrix with these entries (m, 2), and how large each has become (m,).

    Blind errors have a share in common, or one for each true class.
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
                scaled = score[rows].double()
                p = (scale * (scaled - scaled.mean(1, keepdim=True)) + bias).softmax(1)
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
    """Return the classes called by another's name, the gain in nats, and whether that shows it.

    Args:
        score: (n, C) of the latent classes and the network.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C), the transition matrix of the latent classes.
        base: the fit of blind errors to the same scores.
        reduce: sums over the ranks.

    Returns:
        the same on every rank; None if no class is.
    """
    found = fit_structured_noise(score, label, weight, candidate, base, reduce=reduce)
    if found is None:
        return None
    gain, total = found.log_likelihood - base.log_likelihood, reduce(weight.double().sum().reshape(1)).item()
    is_enough = gain >= least_gain(total) and gain >= MIN_GAIN_EACH * found.entries
    return found, gain, is_enough and _by_own_name(found, candidate)


def _by_own_name(found: StructuredNoise, candidate: Tensor) -> bool:
    """Return whether each class goes by its own name most often."""
    own = torch.arange(len(candidate), device=candidate.device)
    # Classes that are told apart so badly that latent ones are called by each other's names show no habit.
    others = found.transition.clone().fill_diagonal_(0) >= MIN_ENTRY
    told = (candidate.argmax(1) == own) | ~(others.any(0) | others.any(1))
    return bool(((found.transition.argmax(1) == own) & told).all())


def least_gain(samples: float) -> float:
    """Return nats over blind errors from which on so many samples show that a class goes by another's name."""
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
    """Return the matrix with those entries of ``candidate`` that stay large; None if there are none, or far too many.

    Args:
        score: (n, C).
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C).
        base: to start from.
        pairs: whether two classes may go by each other's names.
        reduce: sums over the ranks.
    """
    weight = weight.double()
    others = candidate.clone().fill_diagonal_(0)
    large = others >= MIN_ENTRY
    one_way = large & (others >= ONE_WAY * others.T)
    paired = large & large.T & ~one_way & ~one_way.T if pairs else torch.zeros_like(large)
    entries = (one_way | paired).nonzero()
    while 0 < len(entries) <= MOST_ENTRIES_PER_CLASS * len(candidate):
        found, size = _fit(score, label, weight, entries, base, reduce)
        kept = torch.zeros_like(large).index_put((entries[:, 0], entries[:, 1]), size >= MIN_ENTRY)
        kept &= ~paired | kept.T  # one of a pair alone is a class that is hard to tell from the other
        if kept.sum() == len(entries):
            return found
        entries = kept.nonzero()
    return None


def find_pairs(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    candidate: Tensor,
    base: SymmetricNoiseFit,
    *,
    reduce: Reduce = no_reduce,
) -> tuple[StructuredNoise, float] | None:
    """Return the classes that go by each other's names and the gain in nats; None if that is not shown.

    Confusion of two classes ends where the network is sure of them. Swapped labels are as frequent there.

    Args:
        score: (n, C) of the latent classes and the network.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        candidate: (C, C), the transition matrix of the latent classes.
        base: the fit of blind errors to the same scores.
        reduce: sums over the ranks.

    Returns:
        the same on every rank.
    """
    others = candidate.clone().fill_diagonal_(0)
    paired = (others >= MIN_ENTRY) & (others < ONE_WAY * others.T)
    if not bool((paired & paired.T).any()):
        return None
    given = (score, label, weight, candidate, base)
    found = fit_structured_noise(*given, pairs=True, reduce=reduce)
    without = fit_structured_noise(*given, reduce=reduce)
    names = 0 if without is None else without.entries
    if found is None or found.entries <= names or not _by_own_name(found, candidate):
        return None
    total = reduce(weight.double().sum().reshape(1)).item()
    gain = found.log_likelihood - (base if without is None else without).log_likelihood
    is_enough = gain >= max(MIN_GAIN, MIN_GAIN_OF_PAIRS_PER_SAMPLE * total)
    return (found, found.log_likelihood - base.log_likelihood) if is_enough else None


def find_class_noise(
    score: Tensor, label: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce
) -> tuple[StructuredNoise, float] | None:
    """Return how often the labels of each true class are drawn blindly, if far from alike, and the gain in nats.

    Args:
        score: (n, C), what ranks the samples.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.

    Returns:
        the same on every rank; None if a common share explains the labels as well.
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
