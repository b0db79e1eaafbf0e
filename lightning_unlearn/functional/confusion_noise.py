"""Noise rate under errors between similar classes, such as human errors, in addition to symmetric noise.

For a sample with class scores ``s_k``, label y has the probability ``sum_k softmax(a s + b)_k T_ky``, with a full
transition matrix T. The classifier's own confusion of classes has a similar effect, and symmetric noise
(:mod:`lightning_unlearn.functional.symmetric_noise`) explains such labels nearly as well. The additional rate under T
therefore counts only to the extent that its likelihood gain exceeds that of such confusion. Where a linear map of the
scores in place of a temperature (matrix scaling, Guo et al. 2017) explains nearly all of the gain, the network has not
learned yet to tell some classes apart, and no label need be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.lbfgs import minimize
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, centered, fit_symmetric_noise
from lightning_unlearn.utilities.chunks import row_slices
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

GAIN_PER_ENTRY, GAIN_PER_SAMPLE = 1.25, 0.0115
"""Log-likelihood gain of a full matrix, in nats, without errors between similar classes."""

LEAST_BEYOND_MAP, MOST_BEYOND_MAP = 0.1, 0.25
"""Share of the gain that remains after a linear map of the scores: up to the first value the additional rate does not
count, from the second on it counts fully. Human errors leave .29 to .83 (CIFAR features, seed 0), clean overlapping
classes of inputs with heavy tails .05, shapes that are hardly learned, with 10 % symmetric errors, .17."""

WORTH_ASKING = 0.02
"""Least additional rate for which the linear map is fitted."""

MOST_CLASSES, LEAST_EACH = 128, 2
"""Most classes, and fewest samples per matrix entry, for which a full matrix is fitted."""

_OWN = 0.3  # pseudo-counts on the diagonal of the matrix, in units of the square root of the class size
_STEPS = 60


@dataclass(eq=False)
class _Likelihood:
    """The mean negative log-likelihood and its gradient, over the rows of all ranks."""

    score: Tensor
    label: Tensor
    weight: Tensor
    group: Tensor
    groups: int
    reduce: Reduce

    def __post_init__(self) -> None:
        self.num_classes = classes = self.score.shape[1]
        given = self.reduce(self.weight.new_zeros(classes).index_add(0, self.label, self.weight))
        self.total = given.sum()
        self.more = torch.full((classes, classes), 1 / classes).to(given)
        self.more.diagonal().add_(_OWN * given.sqrt())

    def sums(self, at: Tensor) -> tuple[Tensor, ...]:
        """Return log-likelihood and wrong labels (2,), derivatives in log-scale (J,), bias (C,), and counts (C, C)."""
        classes, groups = self.num_classes, self.groups
        scale, bias = at[:groups].exp(), at[groups : groups + classes]
        names = at[groups + classes :].reshape(classes, classes).softmax(1).T.contiguous()
        sums = self.score.new_zeros(2 + groups + classes * (classes + 1), dtype=torch.float64)
        two, of_scale, of_bias, counts = self.parts(sums)
        for rows in row_slices(len(self.label), classes, self.score.device):
            y, w, group = self.label[rows], self.weight[rows], self.group[rows]
            scaled = centered(self.score[rows]) * scale[group].unsqueeze(1)
            prior = (scaled + bias).softmax(1)
            joint = prior * names[y]
            likelihood = joint.sum(1, keepdim=True).clamp(min=1e-300)
            true = joint / likelihood
            two += torch.stack([w @ likelihood.log().squeeze(1), w @ (1 - true.gather(1, y.unsqueeze(1)).squeeze(1))])
            of_scale.index_add_(0, group, w * ((true - prior) * scaled).sum(1))
            of_bias += w @ (true - prior)
            counts.view(classes, classes).index_add_(0, y, w.unsqueeze(1) * true)
        two, of_scale, of_bias, counts = self.parts(self.reduce(sums))
        return two, of_scale, of_bias, counts.reshape(classes, classes).T

    def parts(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split the flat tensor of sums into views."""
        at = [2, 2 + self.groups, 2 + self.groups + self.num_classes]
        two, of_scale, of_bias, counts = sums.tensor_split(at)
        return two, of_scale, of_bias, counts

    def __call__(self, at: Tensor) -> tuple[float, Tensor]:
        classes, groups = self.num_classes, self.groups
        bias, names = at[groups : groups + classes], at[groups + classes :].reshape(classes, classes).log_softmax(1)
        two, of_scale, of_bias, counts = self.sums(at)
        counts = counts + self.more
        loss = -two[0] - (self.more * names).sum() + 0.5 * bias.square().sum()
        of_names = counts.sum(1, keepdim=True) * names.exp() - counts
        gradient = torch.cat([-of_scale, bias - of_bias, of_names.flatten()])
        return (loss / self.total).item(), gradient / self.total


def asks_of_confusion(classes: int, samples: float) -> bool:
    """Return whether there are enough samples to estimate the confusion of this many classes."""
    return 2 < classes <= MOST_CLASSES and samples >= LEAST_EACH * classes * classes


def confusion_rate(
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    start: SymmetricNoiseFit,
    *,
    group: Tensor | None = None,
    reduce: Reduce = no_reduce,
) -> tuple[float, float]:
    """Return the share of wrong labels beyond symmetric noise.

    Args:
        score: (n, C), log-probabilities up to a temperature and a constant per sample, from a model that has not
            learned the labels.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        start: the fit of symmetric noise to the same scores.
        group: (n,) int64, groups of samples with a common temperature; None for a single one.
        reduce: sums over the ranks.

    Returns:
        the estimate and its upper bound; the same on every rank.
    """
    weight = weight.double()
    group = torch.zeros_like(label) if group is None else group
    gain, total, rate = _gain_of_matrix(score, label, weight, start, group, reduce)
    classes = score.shape[1]
    by_chance = max(GAIN_PER_ENTRY * classes * (classes - 1), GAIN_PER_SAMPLE * total)
    more = max(0.0, rate - start.rate)
    best = more * max(0.0, 1 - by_chance / max(gain, 1e-9))
    if best >= WORTH_ASKING:
        scaled = _matrix_scaled(score, label, weight, start, group, reduce)
        again = fit_symmetric_noise(scaled, label, weight, biased=True, reduce=reduce)
        left, _, _ = _gain_of_matrix(scaled, label, weight, again, torch.zeros_like(label), reduce)
        share = (left / gain - LEAST_BEYOND_MAP) / (MOST_BEYOND_MAP - LEAST_BEYOND_MAP)
        best *= min(max(share, 0.0), 1.0)
    return best, more


def _gain_of_matrix(
    score: Tensor, label: Tensor, weight: Tensor, start: SymmetricNoiseFit, group: Tensor, reduce: Reduce
) -> tuple[float, float, float]:
    """Return the gain of a full matrix over symmetric noise in nats, the sum of the weights, and the noise rate."""
    classes, groups = score.shape[1], len(start.scale)
    loss_of = _Likelihood(score, label, weight, group, groups, reduce)
    blind = max(start.blind, 1e-3) / classes
    names = torch.full((classes, classes), blind, dtype=torch.float64, device=score.device)
    names = names.fill_diagonal_(1 - blind * (classes - 1)).log()
    found = minimize(loss_of, torch.cat([start.scale.log(), start.bias, names.flatten()]), _STEPS)
    likelihood, wrong = loss_of.sums(found)[0].tolist()
    total = loss_of.total.item()
    gain = likelihood - 0.5 * start.bias.square().sum().item() - start.log_likelihood
    return gain, total, wrong / total


def _matrix_scaled(
    score: Tensor, label: Tensor, weight: Tensor, start: SymmetricNoiseFit, group: Tensor, reduce: Reduce
) -> Tensor:
    """Return the scores (n, C) after the maximum-likelihood linear map, with the symmetric noise rate of ``start``.

    A penalty of half the squared distance keeps the map near the temperatures of ``start``.
    """
    classes = score.shape[1]
    x = centered(score) * start.scale[group].unsqueeze(1)
    none = torch.eye(classes, dtype=torch.float64, device=score.device)
    total = reduce(weight.sum().reshape(1)).item()

    def loss_and_gradient(at: Tensor) -> tuple[float, Tensor]:
        bias, linear = at[:classes], at[classes:].reshape(classes, classes)
        sums = at.new_zeros(1 + len(at))
        for rows in row_slices(len(label), classes, score.device):
            p, y, w = (x[rows] @ linear + bias).softmax(1), label[rows].unsqueeze(1), weight[rows]
            clear = (1 - start.blind) * p.gather(1, y).squeeze(1)
            likely = clear + start.blind / classes
            by_logits = p.scatter_add(1, y, -torch.ones_like(p[:, :1])) * (w * clear / likely).unsqueeze(1)
            sums += torch.cat([-(w @ likely.log()).reshape(1), by_logits.sum(0), (x[rows].T @ by_logits).flatten()])
        sums = reduce(sums)
        away = linear - none
        sums[0] += 0.5 * (away.square().sum() + bias.square().sum())
        sums[1:] += torch.cat([bias, away.flatten()])
        return sums[0].item() / total, sums[1:] / total

    found = minimize(loss_and_gradient, torch.cat([start.bias, none.flatten()]), _STEPS)
    return x @ found[classes:].reshape(classes, classes) + found[:classes]
