"""Symmetric label noise: how many labels are drawn blindly, beside those that uncertainty explains.

Of a sample whose classes score ``s_k``, a label that is never wrong has the probability ``softmax(a s + b)_y``, at the
temperature ``1 / a`` and bias ``b`` of the classes that the scores need. If a share r is drawn blindly, it is
``(1 - r) softmax(a s + b)_y + r / C``, and not even the surest samples agree more often than ``1 - r``. In
psychophysics, where observers blink, such a floor is called the lapse rate (Wichmann & Hill 2001). A third part,
``u softmax((a s + b) / 2)_y``, takes labels of samples that are less clear than they look; with it, r is a lower end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.lbfgs import minimize
from lightning_unlearn.utilities.chunks import row_slices, softmax
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

FLOOR = 30.0
"""Nats below certainty from which on a label is as good as impossible, where none is wrong."""

NATURAL = 0.5  # what the scores of less clear samples are multiplied by
START = -3.0  # log-weight of each further part, relative to the first
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class SymmetricNoiseFit:
    """Labels as drawn from a classifier's scores, some of them blindly.

    Args:
        scale: (J,) float64, what the scores of each group of samples are multiplied by.
        bias: (C,) float64, what is added to them then.
        blind: share of the labels that are drawn blindly.
        unclear: share of the samples that are less clear than they look.
        log_likelihood: of the labels, in nats, less the penalty on the bias.
        std_error: of ``blind``.
    """

    scale: Tensor
    bias: Tensor
    blind: float
    unclear: float
    log_likelihood: float
    std_error: float = 0.0

    @property
    def rate(self) -> float:
        """Share of the labels that are wrong, as one in C of those drawn blindly is right."""
        return self.blind * (1 - 1 / len(self.bias))

    def wrong_probability(self, score: Tensor, label: Tensor, group: Tensor | None = None) -> Tensor:
        """Return the probability that each given label is wrong.

        Args:
            score: (n, C).
            label: (n,) int64.
            group: (n,) int64 in [0, J); None where there is one.

        Returns:
            (n,) float64.
        """
        parts = []
        for rows in row_slices(len(label), score.shape[1], score.device):
            scaled = centered(score[rows]) * (self.scale[0] if group is None else self.scale[group[rows]].unsqueeze(1))
            z, y = scaled + self.bias, label[rows].unsqueeze(1)
            unclear = softmax(NATURAL * z).gather(1, y).squeeze(1) if self.unclear else 0.0
            clear = softmax(z).gather(1, y).squeeze(1)
            of_blind = self.blind / len(self.bias)
            total = (1 - self.blind - self.unclear) * clear + self.unclear * unclear + of_blind
            parts.append(of_blind * (1 - clear) / total.clamp(min=TINY))
        return torch.cat(parts) if parts else score.new_zeros(0, dtype=torch.float64)


def z_score(some: SymmetricNoiseFit, none: SymmetricNoiseFit) -> float:
    """Return how sure it is that labels are wrong, in standard deviations: sqrt(2 x gain in log-likelihood)."""
    return math.sqrt(2 * max(0.0, some.log_likelihood - none.log_likelihood))


def mixture_shares(mixture: Tensor, *, noisy: bool, unclear: bool) -> list[float]:
    """Return the shares of clear samples, of blind labels, and of samples that are less clear than they look.

    Args:
        mixture: (2,) log-weights of the last two, relative to the first.
        noisy: whether there are blind labels.
        unclear: whether there are samples that are less clear.
    """
    blind, less_clear = mixture.tolist()
    logits = [0.0, blind if noisy else -math.inf, less_clear if unclear else -math.inf]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def first_mixture(blind: float) -> float:
    """Return the log-weight at which a search starts that goes on from a fit with a share of blind labels."""
    return math.log(blind / max(1 - blind, 1e-9)) if blind > 0 else START


def blind_error(information: Tensor, shares: list[float], *, unclear: bool) -> float:
    """Return the standard error of the share of blind labels.

    Args:
        information: (J + 1, J + 1) on the CPU, of J scales and of the log-weight of blind labels; (J + 2, J + 2) with
            that of less clear samples. Changed in place.
        shares: of :func:`mixture_shares`.
        unclear: whether there are less clear samples.
    """
    parts = 1 + unclear
    information.diagonal().add_(1e-9 * information.diagonal().max() + 1e-12)
    covariance = torch.linalg.inv(information)[-parts:, -parts:]
    of_blind = torch.tensor([shares[1] * (1 - shares[1]), -shares[1] * shares[2]], dtype=torch.float64)[:parts]
    return math.sqrt(max(0.0, (of_blind @ covariance @ of_blind).item()))


@dataclass(eq=False)
class _Likelihood:
    """The mean negative log-likelihood and its gradient, over the rows of all ranks."""

    score: Tensor
    label: Tensor
    weight: Tensor
    group: Tensor
    reduce: Reduce
    noisy: bool
    unclear: bool
    biased: bool
    known: bool

    def __post_init__(self) -> None:
        self.num_classes = self.score.shape[1]
        self.total = self.reduce(self.weight.sum().reshape(1)).item()
        self.slices = row_slices(len(self.label), self.num_classes, self.score.device)
        # What is looked at in one piece is centered once, in place of every time.
        self.centered = centered(self.score) if len(self.slices) == 1 else None

    def shares(self, mixture: Tensor) -> list[float]:
        """Return the shares of clear samples, of blind labels, and of samples less clear than they look."""
        return mixture_shares(mixture, noisy=self.noisy, unclear=self.unclear)

    def rows(self, rows: slice, log_scale: Tensor, bias: Tensor, shares: list[float]) -> tuple[Tensor, ...]:
        """Return, for some rows, the log-probability of the label and its derivatives in the logits and log-weights."""
        clear_share, blind, unclear_share = shares
        scores = centered(self.score[rows]) if self.centered is None else self.centered
        scaled = scores * log_scale.exp()[self.group[rows]].unsqueeze(1)
        z, y = scaled + bias, self.label[rows].unsqueeze(1)
        soft = softmax(NATURAL * z) if self.unclear else None
        gradient = softmax(z)
        clear = gradient.gather(1, y).squeeze(1)
        total, unclear = clear_share * clear + blind / self.num_classes, torch.zeros_like(clear)
        if soft is not None:
            unclear = soft.gather(1, y).squeeze(1)
            total = total + unclear_share * unclear
        total = total.clamp(min=TINY)
        # Where none is wrong, a label that is as good as impossible costs no more than FLOOR, whatever the scale.
        live: Tensor | float = 1.0 if self.noisy else (total > math.exp(-FLOOR)).double()
        log_total = total.log() if self.noisy else total.log().clamp(min=-FLOOR)
        by_clear = live * clear_share * clear / total
        gradient = gradient.mul_(-by_clear.unsqueeze(1)).scatter_add_(1, y, by_clear.unsqueeze(1))
        if soft is not None:
            by_unclear = NATURAL * live * unclear_share * unclear / total
            gradient -= soft.mul_(by_unclear.unsqueeze(1))
            gradient.scatter_add_(1, y, by_unclear.unsqueeze(1))
        of_mixture = torch.stack([blind * (1 / self.num_classes - total), unclear_share * (unclear - total)])
        return log_total, scaled, gradient, of_mixture * live / total

    def __call__(self, log_scale: Tensor, bias: Tensor, mixture: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient (J + C + 2,)."""
        groups, classes = len(log_scale), self.num_classes
        sums, shares = self.score.new_zeros(1 + groups + classes + 2, dtype=torch.float64), self.shares(mixture)
        for rows in self.slices:
            log_total, scaled, gradient, of_mixture = self.rows(rows, log_scale, bias, shares)
            w = self.weight[rows]
            of_scale = w.new_zeros(groups).index_add_(0, self.group[rows], w * (gradient * scaled).sum(1))
            sums -= torch.cat([(w @ log_total).reshape(1), of_scale, w @ gradient, of_mixture @ w])
        sums = self.reduce(sums)
        sums[0] += 0.5 * bias.square().sum()
        sums[1 + groups : -2] += bias
        if not self.biased:
            sums[1 + groups : -2] = 0
        for at, has in ((-2, self.noisy and not self.known), (-1, self.unclear)):
            if not has:
                sums[at] = 0
        return sums[0].item() / self.total, sums[1:] / self.total

    def std_error(self, log_scale: Tensor, bias: Tensor, mixture: Tensor) -> float:
        """Return the error of the blind share, by the outer products of the derivatives; the bias is taken as known."""
        groups, shares = len(log_scale), self.shares(mixture)
        size = groups + 1 + self.unclear
        information = self.score.new_zeros(size, size, dtype=torch.float64)
        for rows in self.slices:
            _, scaled, gradient, of_mixture = self.rows(rows, log_scale, bias, shares)
            each = information.new_zeros(len(scaled), groups)
            each.scatter_(1, self.group[rows].unsqueeze(1), (gradient * scaled).sum(1, keepdim=True))
            each = torch.cat([each, of_mixture[: 1 + self.unclear].T], dim=1)
            information += each.T @ (self.weight[rows].unsqueeze(1) * each)
        return blind_error(self.reduce(information).cpu(), shares, unclear=self.unclear)


def centered(score: Tensor) -> Tensor:
    """Return class scores (n, C) as float64, each row less its mean."""
    score = score.double()
    return score - score.mean(dim=1, keepdim=True)


def fit_symmetric_noise(  # noqa: PLR0913  (what is fitted, and to what)
    score: Tensor,
    label: Tensor,
    weight: Tensor,
    *,
    group: Tensor | None = None,
    num_groups: int = 1,
    noisy: bool = True,
    unclear: bool = False,
    biased: bool = False,
    blind: float | None = None,
    start: SymmetricNoiseFit | None = None,
    reduce: Reduce = no_reduce,
    steps: int = 40,
) -> SymmetricNoiseFit:
    """Fit how often labels are drawn blindly, under a classifier whose temperature is not known.

    Args:
        score: (n, C), log-probabilities up to a temperature and what is added to all classes.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        group: (n,) int64, samples whose scores have a temperature of their own; None: all have the same.
        num_groups: J.
        noisy: whether labels may be wrong at all.
        unclear: whether samples may be less clear than they look.
        biased: whether the classes have a bias; that of ``start`` otherwise.
        blind: share of the labels that are drawn blindly, in (0, 1), where it is known.
        start: a fit to start from.
        reduce: sums over the ranks.
        steps: of L-BFGS, at most.

    Returns:
        the same on every rank.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> score = 4 * torch.randn(2000, 3, generator=generator)
        >>> label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
        >>> label[::5] = torch.randint(3, (400,), generator=generator)  # two thirds of these are wrong
        >>> round(fit_symmetric_noise(score, label, torch.ones(2000)).rate, 2)
        0.13
    """
    device = score.device
    group = torch.zeros_like(label) if group is None else group
    loss_of = _Likelihood(score, label, weight.double(), group, reduce, noisy, unclear, biased, blind is not None)
    log_scale = torch.zeros(num_groups, dtype=torch.float64, device=device)
    bias = torch.zeros(score.shape[1], dtype=torch.float64, device=device)
    mixture = torch.full((2,), START, dtype=torch.float64, device=device)
    if start is not None:
        log_scale, bias = start.scale.log().clone(), start.bias.clone()
        mixture[0] = first_mixture(start.blind)
    if blind is not None:
        mixture[0] = math.log(blind / (1 - blind))
    sizes = [num_groups, len(bias), 2]
    found = minimize(lambda at: loss_of(*at.split(sizes)), torch.cat([log_scale, bias, mixture]), steps)  # type: ignore[no-untyped-call]
    log_scale, bias, mixture = found.split(sizes)  # type: ignore[no-untyped-call]
    loss, _ = loss_of(log_scale, bias, mixture)
    _, blind, of_unclear = loss_of.shares(mixture)
    error = loss_of.std_error(log_scale, bias, mixture) if noisy else 0.0
    return SymmetricNoiseFit(log_scale.exp(), bias, blind, of_unclear, -loss * loss_of.total, error)


def fit_with_and_without(
    score: Tensor, label: Tensor, weight: Tensor, *, reduce: Reduce = no_reduce
) -> tuple[SymmetricNoiseFit, float]:
    """Return the noise at one temperature for all, 0 if it makes the labels no likelier, and how sure that is.

    Args:
        score: (n, C).
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        reduce: sums over the ranks.
    """
    some = fit_symmetric_noise(score, label, weight, reduce=reduce)
    none = fit_symmetric_noise(score, label, weight, noisy=False, start=replace(some, blind=0.0), reduce=reduce)
    if some.log_likelihood <= none.log_likelihood:
        return replace(none, blind=0.0), 0.0
    return some, z_score(some, none)
