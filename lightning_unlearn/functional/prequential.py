"""The noise rate from training steps before the network has learned the label of a sample.

In the first epochs a training step is a test: the network predicts a sample that it has seen once or never. This is
known as prequential evaluation (Dawid 1984) or progressive validation (Blum et al. 1999). Such predictions are not
memorized, so their disagreement with the labels can be counted. While the network learns fast, its temperature changes
from step to step; therefore each fifth of the epoch has its own temperature, and a test checks that they are similar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.functional.confusion_noise import asks_of_confusion, confusion_rate
from lightning_unlearn.functional.symmetric_noise import SymmetricNoiseFit, centered, fit_symmetric_noise, z_score
from lightning_unlearn.utilities.chunks import thinning
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

PARTS = 5
"""Into how many parts an epoch is divided, each with a temperature of its own."""

MIN_SKILL = 0.1
"""How much of what the largest class leaves the network must predict."""

MAX_SCALE_CHANGE = 2.0
"""How many times as large the scale of the first part may be as that of the others: more, and it still learns fast."""

MAX_SCALE = 10.0
"""Scale from which on the network has hardly begun."""

MAX_SCALE_OF_CONFUSION = 2.5
"""Scale up to which confusion counts.

Above it, outputs are no probabilities of labels, as where only hard samples are trained on.
"""

MIN_SHIFT = 0.2
"""Total variation between the given classes and those predicted, or drawn, up to which no shift is seen: by chance."""

MIN_SAMPLES_PER_BIAS = 10
"""Samples of each class, on average, from which on its bias is fitted."""

MIN_Z = 3.0
"""Sign of wrong labels from which on it is asked whether classes are taken for each other."""

MAX_NUMBERS = 2**21
"""Scores that a fit looks at, over all classes; of more samples every second, third, ... is taken."""

MAX_FALL = 1.5
"""How many times as high as the next epoch's a rate may be: by more, it was what had not been learned yet."""

_TWO_SIDED = 1.96


@dataclass(frozen=True, eq=False)
class PrequentialRate:
    """Estimate of the noise rate from one early epoch.

    Args:
        low: lower end of the 95 % interval, without natural confusion.
        middle: point estimate.
        high: upper end of the interval.
        z_score: z score of the evidence for any wrong labels.
        skill: skill of the network, ``(accuracy - p) / (1 - p)`` with p the share of the largest class.
        is_settled: whether the network had learned enough, and learning had slowed down; otherwise the other numbers
            are not meaningful.
        bias: (C,) float64, in logits, that makes the mean prediction match the given labels: the opposite of the effect
            of class weights; 0 if they match.
        is_confirmed: whether the following epoch was evaluated too.
        confused: additional share of wrong labels from errors between similar classes.
        most_confused: upper bound of ``confused``, if all confusion is wrong labels.
        is_blind: whether confusion between classes was estimated, and adds no more than ``high`` allows.
    """

    low: float
    middle: float
    high: float
    z_score: float
    skill: float
    is_settled: bool
    bias: Tensor
    is_confirmed: bool = False
    confused: float = 0.0
    most_confused: float = 0.0
    is_blind: bool = False


def following(known: PrequentialRate | None, found: PrequentialRate) -> PrequentialRate:
    """Return the estimate after one more epoch: the highest rate, if the following epoch confirms it.

    While the network learns, wrong labels stand out more and more, and the rate rises. Once labels are memorized, the
    rate falls by a tenth to a third per epoch (fits of ``benchmarks/detection.py``). A rate that falls to half or to
    zero came from samples that had not been learned yet, such as rare classes. If an epoch shows no noise and the next
    one does, for example during warm-up of the learning rate, the next one is the first that counts.

    Args:
        known: estimate from the epochs before; None before the first.
        found: estimate from the next epoch.
    """
    if known is None or not known.is_settled:
        return found
    if not found.is_settled:
        return known
    is_surer, is_first_sign = found.z_score > known.z_score, known.z_score < MIN_Z <= found.z_score
    if is_first_sign or (is_surer and found.middle > known.middle):
        return found
    middle = min(known.middle, MAX_FALL * found.middle)
    return replace(
        known,
        low=min(known.low, found.low),
        middle=middle,
        confused=known.confused * middle / known.middle if known.middle else 0.0,
        high=max(known.high, found.high),
        z_score=min(known.z_score, found.z_score),
        is_confirmed=True,
    )


def prequential_rate(  # noqa: PLR0913  (what is known of an epoch)
    logits: Tensor,
    label: Tensor,
    position: Tensor,
    weight: Tensor,
    *,
    favored: Tensor | None = None,
    parts: int = PARTS,
    known: PrequentialRate | None = None,
    reduce: Reduce = no_reduce,
) -> PrequentialRate:
    """Return the noise rate by one epoch's training steps.

    Args:
        logits: (n, C) of the steps; or other scores that have not seen the label, such as leave-one-out ones.
        label: (n,) int64.
        position: (n,) in [0, 1), how much of the epoch had passed.
        weight: (n,), 0 for a sample that was not drawn in this epoch or does not count. Where samples were not drawn
            alike, the classes' sums are as their numbers among all samples.
        favored: (C,) in nats less their mean, how much oftener than its share each class was drawn; None for none.
        parts: of the epoch, each with a temperature of its own; 1 for scores that are all of one network.
        known: by the epochs before. Of one that only confirms it (see :func:`following`), it is not asked how classes
            are taken for each other, which takes longest.
        reduce: sums over the ranks.

    Returns:
        the same on every rank.
    """
    thin = thinning(reduce(weight.double().sum().reshape(1)).item(), logits.shape[1], MAX_NUMBERS)
    logits, label, position, weight = logits[::thin], label[::thin], position[::thin], weight[::thin].double()
    share = reduce(weight.new_zeros(logits.shape[1]).index_add_(0, label, weight))
    share = share / share.sum().clamp(min=1e-9)
    group = (position * parts).long().clamp(0, parts - 1)
    logits = logits.nan_to_num()
    data = (logits if favored is None else logits - favored.to(logits), label, weight)
    # Of few samples of each class a bias would be chance.
    biased = reduce((weight > 0).double().sum().reshape(1)).item() >= MIN_SAMPLES_PER_BIAS * logits.shape[1]
    some = fit_symmetric_noise(*data, group=group, num_groups=parts, biased=biased, reduce=reduce)
    skill, shift = _skill_and_shift(some, *data, group, share, reduce)
    bias = (some.bias - some.bias.mean()) / _typical(some.scale) * (shift >= MIN_SHIFT)
    if skill < MIN_SKILL or not _is_settled(some.scale):
        return PrequentialRate(0.0, 0.0, 1.0, 0.0, skill, False, bias)
    # The bias stays, and the fits start from where this one ended.
    none = fit_symmetric_noise(
        *data, group=group, num_groups=parts, noisy=False, start=replace(some, blind=0.0), reduce=reduce
    )
    lower = fit_symmetric_noise(*data, group=group, num_groups=parts, unclear=True, start=some, reduce=reduce)
    z = z_score(some, none)
    found = PrequentialRate(*rate_between(lower, some), z, skill, True, bias)
    # Scores of another kind than a network's logits look as if classes were taken for each other.
    if parts == 1 or z < MIN_Z or following(known, found) is not found:
        return found
    if not asks_of_confusion(logits.shape[1], reduce(weight.sum().reshape(1)).item()):
        return found
    confused, most = confusion_rate(*data, some, group=group, reduce=reduce)
    # A network that is trained on hard samples only confuses classes everywhere, whatever the labels.
    is_sure = bool(_typical(some.scale) <= MAX_SCALE_OF_CONFUSION)
    is_blind = confused <= found.high - found.middle
    return replace(found, confused=confused * is_sure, most_confused=most, is_blind=is_blind)


def rate_between(lower: SymmetricNoiseFit, upper: SymmetricNoiseFit) -> tuple[float, float, float]:
    """Return lower end, best guess and upper end of the rate, by fits with and without natural confusion."""
    names, rates = 1 - 1 / len(upper.bias), sorted((lower.rate, upper.rate))
    low = max(0.0, min(rates[0], lower.rate - _TWO_SIDED * lower.std_error * names))
    high = max(rates[1], upper.rate + _TWO_SIDED * upper.std_error * names)
    return low, sum(rates) / 2, min(high, 1.0)


def class_shift(given: Tensor, drawn: Tensor) -> Tensor:
    """Return the shift of class logits, in nats, that undoes the effect of a sampler or of class weights.

    A network trained on such draws shifts its logits by the same amount with the opposite sign.

    Args:
        given: (C,), number of samples of each class.
        drawn: (C,), number of draws of each class, or the sum of its predicted probabilities.

    Returns:
        (C,) float64, with mean 0; 0 for differences within chance, and for classes without a sample.

    Example:
        >>> class_shift(torch.tensor([900, 100]), torch.tensor([500, 500])).round(decimals=1)
        tensor([ 1.1000, -1.1000], dtype=torch.float64)
    """
    given, drawn = given.double(), drawn.double().to(given.device)
    share, drawn_share = (x / x.sum().clamp(min=1e-9) for x in (given, drawn))
    if (share - drawn_share).abs().sum().item() / 2 < MIN_SHIFT:
        return torch.zeros_like(share)
    # One of each class more, for those that were not drawn.
    shift = ((given + 1) / (given + 1).sum()).log() - ((drawn + 1) / (drawn + 1).sum()).log()
    return (shift - shift[given > 0].mean()) * (given > 0)


def _skill_and_shift(
    fit: SymmetricNoiseFit, logits: Tensor, label: Tensor, weight: Tensor, group: Tensor, share: Tensor, reduce: Reduce
) -> tuple[float, float]:
    """Return what is predicted beside the largest class, and how far class shares are from the labels'."""
    plain = centered(logits)
    scaled = fit.scale[group].unsqueeze(1) * plain
    right = ((scaled + fit.bias).argmax(1) == label).double()
    # As it is, and at its temperature: a network that is unsure yet, or too sure, looks biased in one of them.
    said = torch.stack([weight @ scores.softmax(1) for scores in (plain, scaled)])
    sums = reduce(torch.cat([torch.stack([weight @ right, weight.sum()]), said.flatten()]))
    hit, total = sums[:2].tolist()
    largest, total = share.max().item(), max(total, 1e-9)
    away = (sums[2:].reshape(2, -1) / total - share).abs().sum(1).min().item() / 2
    return (hit / total - largest) / max(1 - largest, 1e-9), away


def _is_settled(scale: Tensor) -> bool:
    if len(scale) == 1:
        return True
    typical = _typical(scale)
    return bool(scale[0] <= MAX_SCALE_CHANGE * typical) and bool(typical <= MAX_SCALE)


def _typical(scale: Tensor) -> Tensor:
    return scale[min(1, len(scale) - 1) :].median()
