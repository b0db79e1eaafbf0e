"""Symmetric label noise from soft margins, which contain all that its likelihood needs of the logits.

The model is that of :mod:`~lightning_unlearn.functional.symmetric_noise`, without a bias of the classes: a label that
is never wrong has the probability ``sigmoid(a m(a) - log(C - 1))`` at the scale ``a``, ``m(a)`` being the soft margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_unlearn.functional.lbfgs import minimize
from lightning_unlearn.functional.prequential import (
    MAX_SCALE,
    MAX_SCALE_CHANGE,
    PARTS,
    PrequentialRate,
    class_shift,
    rate_between,
)
from lightning_unlearn.functional.soft_margin import SCALES, interpolation
from lightning_unlearn.functional.symmetric_noise import (
    FLOOR,
    NATURAL,
    START,
    TINY,
    SymmetricNoiseFit,
    blind_error,
    first_mixture,
    mixture_shares,
    z_score,
)
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

LEAST_SKILL = 0.3
"""How much of what the largest class leaves the network must predict; of many classes it still learns fast below it."""

_AS_GOOD = 0.5  # what the first part of an epoch must predict of what the last does
# Where a search starts: at the scales that are kept, and between them.
_FIRST_SCALES = torch.arange(2 * len(SCALES) - 1, dtype=torch.float64) * math.log(2) / 2 + math.log(SCALES[0])

Curve = Callable[[float], tuple[Tensor, Tensor]]
"""From the logarithm of a scale to what kept margins are multiplied by for that scale's, and its derivative."""


def predicted(margins: Tensor, num_classes: int) -> Tensor:
    """Return (n,) bool, whether the label is the strongest class, by soft margins (n, K)."""
    return margins[:, -1] * SCALES[-1] > math.log(num_classes - 1)


@dataclass(frozen=True, eq=False)
class AveragedCurve:
    """The soft margin of a mean of several logits, from the soft margins of each.

    Logits of early training are smaller, with the same meaning at a larger scale. This is exact if all are multiples of
    one another.

    Args:
        scale: (P,), factor of the logits of each part for probabilities.
    """

    scale: Tensor

    def __call__(self, log_scale: float) -> tuple[Tensor, Tensor]:
        """Return (P K,) each."""
        spread = (1 / self.scale).mean().item()
        parts = [interpolation(log_scale + math.log(each * spread)) for each in self.scale.tolist()]
        values, slopes = zip(*parts, strict=True)
        return torch.cat(values) / len(parts), torch.cat(slopes) / len(parts)


def average_of(parts: Sequence[Tensor], weight: Tensor, num_classes: int, *, reduce: Reduce) -> AveragedCurve:
    """Return the curve of the mean of parts of training, by the scale that each needs.

    Args:
        parts: P of (n, K), the soft margins of each.
        weight: (n,), 0 for a row that does not count.
        num_classes: C.
        reduce: sums over the ranks.
    """
    fits = [fit_margin_noise(part, weight, num_classes, reduce=reduce) for part in parts]
    # One that says nothing of the labels has no scale of its own.
    return AveragedCurve(torch.cat([fit.scale for fit in fits]).clamp(SCALES[0], SCALES[-1]))


def _probability(
    margins: Tensor, log_scale: Tensor, group: Tensor, num_classes: int, curve: Curve
) -> tuple[Tensor, Tensor]:
    """Return (n,) each: the label's probability at the scale of its group, and its derivative in the scale's logarithm.

    A scale beyond the largest one kept is clamped to it: such small logits then look less confident, which does not
    make labels look wrong.
    """
    within = log_scale.clamp(max=math.log(SCALES[-1]))
    inside = (within == log_scale).to(margins.device, torch.float64)[group]
    columns = [torch.stack(of_groups, dim=1) for of_groups in zip(*map(curve, within.tolist()), strict=True)]
    soft, steep = ((margins @ each.to(margins)).gather(1, group.unsqueeze(1)).squeeze(1).double() for each in columns)
    scale = within.exp().to(margins.device)[group]
    probability = torch.sigmoid(scale * soft - math.log(num_classes - 1))
    return probability, inside * probability * (1 - probability) * scale * (soft + steep)


def wrong_probability(fit: SymmetricNoiseFit, margins: Tensor, curve: Curve = interpolation) -> Tensor:
    """Return the probability (n,) float64 that each given label is wrong.

    Args:
        fit: of one scale.
        margins: (n, K).
        curve: of the margins.
    """
    group, classes = torch.zeros(len(margins), dtype=torch.int64, device=margins.device), len(fit.bias)
    clear, _ = _probability(margins, fit.scale[:1].log(), group, classes, curve)
    of_blind = fit.blind / classes
    return of_blind * (1 - clear) / ((1 - fit.blind) * clear + of_blind).clamp(min=TINY)


@dataclass(eq=False)
class _Likelihood:
    """The mean negative log-likelihood and its gradient, over the rows of all ranks."""

    margins: Tensor
    weight: Tensor
    group: Tensor
    num_classes: int
    curve: Curve
    reduce: Reduce
    noisy: bool
    unclear: bool

    def __post_init__(self) -> None:
        self.total = max(self.reduce(self.weight.sum().reshape(1)).item(), 1e-9)

    def shares(self, mixture: Tensor) -> list[float]:
        """Return the shares of clear samples, of blind labels, and of samples less clear than they look."""
        return mixture_shares(mixture, noisy=self.noisy, unclear=self.unclear)

    def rows(self, log_scale: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the labels' log-probability (n,), and its derivatives in log-scale (n,) and log-weights (2, n)."""
        clear_share, blind, unclear_share = self.shares(mixture)
        of_rows = self.margins, log_scale, self.group, self.num_classes, self.curve
        clear, slope = _probability(*of_rows)
        total, slope = clear_share * clear + blind / self.num_classes, clear_share * slope
        unclear = torch.zeros_like(clear)
        if self.unclear:
            softer = log_scale + math.log(NATURAL)
            unclear, of_softer = _probability(self.margins, softer, *of_rows[2:])
            total, slope = total + unclear_share * unclear, slope + unclear_share * of_softer
        total = total.clamp(min=TINY)
        # Where none is wrong, a label that is as good as impossible costs no more than FLOOR, whatever the scale.
        live = torch.ones_like(total) if self.noisy else (total > math.exp(-FLOOR)).double()
        log_total = total.log() if self.noisy else total.log().clamp(min=-FLOOR)
        of_mixture = torch.stack([blind * (1 / self.num_classes - total), unclear_share * (unclear - total)])
        return log_total, slope * live / total, of_mixture * live / total

    def __call__(self, log_scale: Tensor, mixture: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient (J + 2,)."""
        log_total, slope, of_mixture = self.rows(log_scale, mixture)
        w, groups = self.weight, len(log_scale)
        sums = w.new_zeros(1 + groups + 2)
        sums[0] = -(w @ log_total)
        sums[1 : 1 + groups].index_add_(0, self.group, -w * slope)
        sums[-2:] = -(of_mixture @ w) * torch.tensor([self.noisy, self.unclear], device=w.device)
        sums = self.reduce(sums).cpu() / self.total
        return sums[0].item(), sums[1:]

    def best_of(self, log_scales: Tensor, groups: int) -> Tensor:
        """Return (groups,), the likeliest of some scales (S,): from afar a first step may end where none matters."""
        mixture, losses = torch.zeros(2, dtype=torch.float64), []
        for log_scale in log_scales:
            log_total, _, _ = self.rows(log_scale.expand(groups), mixture)
            losses.append(self.weight.new_zeros(groups).index_add_(0, self.group, -self.weight * log_total))
        return log_scales[self.reduce(torch.stack(losses)).argmin(dim=0).cpu()]

    def std_error(self, log_scale: Tensor, mixture: Tensor) -> float:
        """Return the error of the blind share, by the outer products of the derivatives."""
        groups, shares = len(log_scale), self.shares(mixture)
        _, slope, of_mixture = self.rows(log_scale, mixture)
        each = slope.new_zeros(len(slope), groups).scatter_(1, self.group.unsqueeze(1), slope.unsqueeze(1))
        each = torch.cat([each, of_mixture[: 1 + self.unclear].T], dim=1)
        information = self.reduce(each.T @ (self.weight.unsqueeze(1) * each)).cpu()
        return blind_error(information, shares, unclear=self.unclear)


def fit_margin_noise(  # noqa: PLR0913  (what is fitted, and to what)
    margins: Tensor,
    weight: Tensor,
    num_classes: int,
    *,
    curve: Curve = interpolation,
    group: Tensor | None = None,
    num_groups: int = 1,
    noisy: bool = True,
    unclear: bool = False,
    start: SymmetricNoiseFit | None = None,
    reduce: Reduce = no_reduce,
    steps: int = 40,
) -> SymmetricNoiseFit:
    """Fit how often labels are drawn blindly, as :func:`~.symmetric_noise.fit_symmetric_noise` does by all logits.

    Args:
        margins: (n, K) soft margins of the labels.
        weight: (n,), 0 for a row that does not count.
        num_classes: C > 2.
        curve: of the margins.
        group: (n,) int64, samples whose scores have a temperature of their own; None: all have the same.
        num_groups: J.
        noisy: whether labels may be wrong at all.
        unclear: whether samples may be less clear than they look.
        start: a fit to start from.
        reduce: sums over the ranks.
        steps: of L-BFGS, at most.

    Returns:
        the same on every rank, its bias 0.

    Example:
        >>> from lightning_unlearn.functional.soft_margin import soft_margins
        >>> generator = torch.Generator().manual_seed(0)
        >>> score = 4 * torch.randn(2000, 300, generator=generator)
        >>> label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
        >>> label[::5] = torch.randint(300, (400,), generator=generator)
        >>> round(fit_margin_noise(soft_margins(score, label), torch.ones(2000), 300).rate, 2)
        0.2
    """
    group = torch.zeros(len(margins), dtype=torch.int64, device=margins.device) if group is None else group
    loss_of = _Likelihood(margins, weight.double(), group, num_classes, curve, reduce, noisy, unclear)
    mixture = torch.full((2,), START, dtype=torch.float64)
    if start is None:
        log_scale = replace(loss_of, noisy=False, unclear=False).best_of(_FIRST_SCALES, num_groups)
    else:
        log_scale = start.scale.log().clone()
        mixture[0] = first_mixture(start.blind)
    sizes = [num_groups, 2]
    found = minimize(lambda at: loss_of(*at.split(sizes)), torch.cat([log_scale, mixture]), steps)  # type: ignore[no-untyped-call]
    log_scale, mixture = found.split(sizes)  # type: ignore[no-untyped-call]
    loss, _ = loss_of(log_scale, mixture)
    _, blind, of_unclear = loss_of.shares(mixture)  # 0 of what there is none of
    error = loss_of.std_error(log_scale, mixture) if noisy else 0.0
    bias = torch.zeros(num_classes, dtype=torch.float64)
    return SymmetricNoiseFit(log_scale.exp(), bias, blind, of_unclear, -loss * loss_of.total, error)


def fit_with_and_without(
    margins: Tensor, weight: Tensor, num_classes: int, *, curve: Curve = interpolation, reduce: Reduce = no_reduce
) -> tuple[SymmetricNoiseFit, float]:
    """Return the noise, zero if it does not make the labels more likely, and its z score; arguments as above."""
    fit = partial(fit_margin_noise, margins, weight, num_classes, curve=curve, reduce=reduce)
    none = fit(noisy=False)
    some = fit(start=none)
    return (none, 0.0) if some.log_likelihood <= none.log_likelihood else (some, z_score(some, none))


def _is_settled(scale: Tensor, hits: Tensor) -> bool:
    """Return whether learning has slowed down, from each part's scale and share of predicted labels."""
    if len(scale) == 1:
        return True
    typical = scale[1:].median()
    is_even = bool(scale.max() <= MAX_SCALE_CHANGE * typical) and bool(typical <= MAX_SCALE)
    return is_even and bool(hits[0] >= _AS_GOOD * hits[-1])


def prequential_margin_rate(  # noqa: PLR0913  (what was seen, of what, and when)
    margins: Tensor,
    position: Tensor,
    weight: Tensor,
    num_classes: int,
    *,
    drawn: Tensor,
    expected: Tensor,
    is_first: bool,
    parts: int = PARTS,
    reduce: Reduce = no_reduce,
) -> PrequentialRate:
    """Return the noise rate by one epoch's training steps, as :func:`~.prequential.prequential_rate` by all logits.

    Args:
        margins: (n, K) soft margins of the steps.
        position: (n,) in [0, 1), how much of the epoch had passed.
        weight: (n,), 0 for a sample that was not drawn in this epoch or does not count.
        num_classes: C.
        drawn: (C',) how often each class was drawn in this epoch, C' being all outputs.
        expected: (C',) how often the network expected it in this epoch.
        is_first: whether it is the first epoch. In a later one labels may be memorized, so the rate is a lower bound.
        parts: of the epoch, each with a temperature of its own.
        reduce: sums over the ranks.

    Returns:
        the same on every rank.
    """
    weight, bias = weight.double(), class_shift(drawn, expected)
    largest = (drawn.max() / drawn.sum().clamp(min=1)).item()
    group = (position * parts).long().clamp(0, parts - 1)
    fit = partial(fit_margin_noise, margins, weight, num_classes, group=group, num_groups=parts, reduce=reduce)
    none = fit(noisy=False)
    some = fit(start=none)
    right = weight * predicted(margins, num_classes)
    sums = weight.new_zeros(2, parts).index_add_(1, group, torch.stack([right, weight]))
    hits, total = reduce(sums).cpu()
    skill = ((hits.sum() / total.sum().clamp(min=1e-9)).item() - largest) / max(1 - largest, 1e-9)
    is_settled = _is_settled(some.scale, hits / total.clamp(min=1e-9))
    if skill < LEAST_SKILL or not is_settled:
        return PrequentialRate(0.0, 0.0, 1.0, 0.0, skill, False, bias)
    low, middle, high = rate_between(fit(unclear=True, start=some), some)
    return PrequentialRate(low, middle, high if is_first else 1.0, z_score(some, none), skill, True, bias)
