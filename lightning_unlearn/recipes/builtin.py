"""The recipes of this package: wrong labels, corrupted inputs, and both."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.standardization import standardize
from lightning_unlearn.recipes.base import NO_DOUBT, NoiseEstimate, RecipeResult
from lightning_unlearn.recipes.calibrated import verdict_on_labels
from lightning_unlearn.recipes.classes import is_exact, judged_classes, of_all_classes, restricted
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.recipes.many_classes import judge_many
from lightning_unlearn.utilities.reduce import Reduce

_HALF = 0.5

# Classes from which on there is something to tell apart.
_FEWEST = 2

# Input evidence. Gate: the share of samples between the two groups, and how much less sure the model is of one of them,
# in standard deviations.
_BETWEEN = 0.01
_LESS_SURE = 0.5
# A network that predicts fewer labels than this of what is called intact has not begun to memorize noise: on intact
# inputs it is right more often then, and its loss is lower. By how many standard errors it may be otherwise.
_LEARNED = 0.5
_CONTRARY = 3.0
# Groups follow the classes where the given label explains this share of the variance of who is in which.
_BY_CLASS = 0.15


def label_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Return the calibrated probability that the given label is correct, and the noise rate.

    One of three noise models explains the outputs during training and in an early epoch, before the network had learned
    the labels (``Evidence.out_of_sample``); see ``recipes.label_noise``:

    - class-dependent noise: some classes are often labeled as one other class, with a much higher likelihood;
    - a full noise transition matrix: a latent-class model
      (:func:`~lightning_unlearn.functional.fit_latent_classes`) on the class attributions separates the classes, and
      its most confident quarter disagrees with the labels more than 1.5 times as often as expected of the average
      sample;
    - symmetric noise, or errors between similar classes, at a rate that the early epoch determines.

    Suspects are acted on if the evidence for wrong labels exceeds five standard deviations. The result is inconclusive,
    with a warning, if the network predicts hardly more than one class, or classes with fewer than half of the samples,
    or if a class is labeled as another more often than as itself and no other evidence exists.

    Model outputs without any label are ignored. With more than 129 classes, soft margins detect symmetric noise
    (``recipes.many_classes``); without them, samples are ranked by margin and none is suspect.
    """
    if evidence.soft_margins is not None:
        return judge_many(evidence, evidence.soft_margins, reduce)
    classes = judged_classes(evidence, reduce)
    if len(classes) < _FEWEST or not is_exact(evidence.basis):
        return _by_margin(evidence, reduce)
    if len(classes) == evidence.num_classes:
        return verdict_on_labels(evidence, reduce)
    return of_all_classes(verdict_on_labels(restricted(evidence, classes), reduce), evidence, classes)


def _by_margin(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Return samples ranked by their margin (AUM), none of them suspect."""
    margin = standardize(evidence.aum.double().unsqueeze(1), evidence.weight, reduce).squeeze(1)
    probability = (1 - NO_DOUBT * (-margin).sigmoid()).float()
    why = "the evidence kept does not separate the classes"
    return RecipeResult(
        probability,
        evidence.label,
        torch.zeros_like(probability),
        label_probability=probability,
        warning=f"{why}: samples are ranked by their margin, and none is suspect",
    )


def input_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Return the probability that the input is intact, from an early layer's response to it.

    A mixture on the response. The gate: fewer than one per cent of the samples lie between the two groups, and the
    model was less sure of one of them in the course of training; that one is the corrupted one. Two kinds of intact
    inputs, such as recordings of two microphones, differ too, but run into each other. A network that has hardly
    learned may be sure of noise, and wrong: where it predicts fewer than half of the labels of the group called intact,
    and does worse on it than on the other, nothing is suspect. Nor is anything where the groups follow the classes: one
    class is often easier than the others, and looks different too; and where only one class has corrupted inputs, the
    network recognizes it by them, and is surest of those.
    """
    intact = torch.ones_like(evidence.weight)
    if evidence.input_statistics is None:
        return RecipeResult(intact, evidence.label, notes=("inputs: the model has no early layer to analyze",))
    w, u = evidence.weight.double(), evidence.uncertainty.double()
    rows = standardize(evidence.input_statistics.double(), evidence.weight, reduce)
    mixture = fit_mixture(rows, evidence.weight, reduce=reduce)
    share = mixture.posterior(rows)
    between = ((share[:, 0] > 0.1) & (share[:, 0] < 0.9)).double()
    right, loss = (evidence.prediction == evidence.label).double(), evidence.loss.double()
    of_groups = [w @ share, *((w * value) @ share for value in (u, right, loss, loss * loss))]
    sums = reduce(torch.cat([torch.stack([w, w * between, w * u, w * u * u]).sum(dim=1), *of_groups]))
    number, group, ambiguous = sums[0], sums[4:6], (sums[1] / sums[0]).item()
    deviation = (sums[3] / number - (sums[2] / number) ** 2).clamp(min=1e-12).sqrt()
    means = sums[6:8] / group.clamp(min=1e-9)
    gap = ((means[1] - means[0]) / deviation).item()
    clean = 0 if gap > 0 else 1
    found = bool((group > 1).all()) and ambiguous <= _BETWEEN and abs(gap) >= _LESS_SURE
    verdict = "corrupted inputs" if found else "no sign of corrupted inputs"
    if found and _is_contrary(clean, group, *sums[8:].reshape(3, 2)):
        found, verdict = False, "but it predicts worse on the other group, so it is unclear which one is corrupted"
    elif found and _follows_classes(evidence, share[:, 0], reduce):
        found, verdict = False, "no sign of corrupted inputs: the two groups coincide with classes"
    note = (
        f"inputs: two groups, the smaller with {group.min() / number:.1%} of the samples; {ambiguous:.1%}"
        f" lie between the groups; the model is less confident on one by {abs(gap):.2f} standard"
        f" deviations: {verdict}"
    )
    probability = share[:, clean].float() if found else intact
    return RecipeResult(probability, evidence.label, input_probability=probability, notes=(note,))


def _is_contrary(clean: int, group: Tensor, right: Tensor, loss: Tensor, squares: Tensor) -> bool:
    """Return whether a network that has hardly learned does worse on the inputs that are called intact.

    Args:
        clean: which of the two groups is called intact.
        group: (2,) samples of each.
        right: (2,) of how many the label is predicted.
        loss: (2,) sum of the losses.
        squares: (2,) sum of their squares.
    """
    share, mean = right / group, loss / group
    variance = torch.stack([share * (1 - share), squares / group - mean * mean]).clamp(min=1e-12)
    difference = torch.stack([share[1 - clean] - share[clean], mean[clean] - mean[1 - clean]])
    errors = (variance / group).sum(dim=1).sqrt()
    return bool(share[clean] < _LEARNED) and bool((difference > _CONTRARY * errors).any())


def _follows_classes(evidence: Evidence, share: Tensor, reduce: Reduce) -> bool:
    """Return whether the given labels tell which of the two groups a sample is in (adjusted R squared).

    Args:
        evidence: of this rank.
        share: (n,) probability of the first group.
        reduce: sums over the ranks.
    """
    w = evidence.weight.double()
    zeros = w.new_zeros(3, evidence.num_classes)
    rows = torch.stack([w, w * share, w * share * share])
    number, first, squares = reduce(zeros.index_add(1, evidence.label, rows))
    total = number.sum()
    free = total - (number > 0).sum()
    if free < 1:
        return False
    within = squares.sum() - (first * first / number.clamp(min=1e-9)).sum()
    whole = squares.sum() - first.sum() ** 2 / total
    return bool(1 - (within / free) / (whole / (total - 1)) > _BY_CLASS)


def auto_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Combine both kinds of evidence: p(clean) is the product.

    Labels are judged on the samples whose input is intact.
    """
    inputs = input_recipe(evidence, reduce)
    intact = inputs.clean_probability
    broken = evidence.weight * (intact < _HALF)
    number, of_all = reduce(torch.stack([broken.sum(), evidence.weight.sum()]).double()).tolist()
    corrupted = number > 0
    kept = replace(evidence, weight=evidence.weight * (intact >= _HALF))
    if corrupted and kept.out_of_sample is not None:
        # Which tells nothing of the others: what is corrupted was in the early epoch and in the validation data.
        kept = replace(kept, out_of_sample=OutOfSample(), left_out=None)
    labels = label_recipe(kept, reduce)
    if corrupted and labels.warning:
        # What is known is which inputs are broken.
        return replace(inputs, notes=(*labels.notes, f"labels: {labels.warning}", *inputs.notes))
    suggested = labels.suggested_probability
    return RecipeResult(
        labels.clean_probability * intact,
        labels.suggested_label,
        None if suggested is None else suggested * intact,
        label_probability=labels.label_probability,
        input_probability=inputs.input_probability,
        noise_matrix=labels.noise_matrix,
        notes=labels.notes + inputs.notes,
        warning=labels.warning,
        noise=_with_inputs(labels.noise, number / of_all) if corrupted else labels.noise,
    )


def _with_inputs(noise: NoiseEstimate | None, corrupted: float) -> NoiseEstimate | None:
    """Return the label estimate if a share of all samples has a corrupted input, whose labels were not judged."""
    if noise is None:
        return None
    # So that 1 stays exactly 1.
    rate, low, high = (1 - (1 - corrupted) * (1 - share) for share in (noise.rate, *noise.interval))
    return replace(noise, rate=rate, interval=(low, high))
