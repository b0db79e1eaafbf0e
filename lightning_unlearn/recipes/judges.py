"""The recipes of this package: wrong labels, corrupted inputs, and both."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.evidence import shift_to_rate
from lightning_unlearn.functional.mixture import Reduce, fit_mixture, standardise
from lightning_unlearn.recipes.calibrated import label_noise_of, verdict_of
from lightning_unlearn.recipes.classes import is_exact, judged_classes, of_all_classes, restricted
from lightning_unlearn.recipes.label_model import NOT_KNOWN, label_model
from lightning_unlearn.recipes.label_noise import LabelNoise
from lightning_unlearn.recipes.verdict import NO_DOUBT, NoiseEstimate, Verdict
from lightning_unlearn.types import Evidence, OutOfSample

# What the gate calls wrong stands if the detector, too, expects so many of it to be.
_PLAUSIBLE = 0.25
_HALF = 0.5
_MANY = 1000

# Classes up to which the gate is asked: it takes long for many, and its lists of them were mostly right labels.
_MOST_GATED = 65

# Classes from which on there is something to tell apart.
_FEWEST = 2

# Input evidence. Gate: the share of samples between the two groups, and how much less sure the model is of one of them,
# in standard deviations.
_BETWEEN = 0.01
_LESS_SURE = 0.5
# A network that predicts fewer labels than this of what is called intact has not begun to memorise noise: on intact
# inputs it is right more often then, and its loss is lower. By how many standard errors it may be otherwise.
_LEARNED = 0.5
_CONTRARY = 3.0
# Groups follow the classes where the given label explains this share of the variance of who is in which.
_BY_CLASS = 0.15


def judge_label(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The probability that the given label is right; of many wrong labels as a gate finds them, else calibrated.

    Where the gate (below) finds wrong labels, it is the posterior from true classes behind the given ones. Where it
    does not, or where the detector of ``recipes.label_noise``, going by an early epoch, expects
    less than a quarter of them to be wrong, the detector speaks, if there is ``Evidence.unseen``: p(clean) is
    calibrated, and it is acted upon if five standard deviations say that labels are wrong.

    A latent-class model (:func:`~lightning_unlearn.functional.fit_latent_classes`) on the class attributions of the
    first and the second half of training, as far as it was not memorised, and of the last pass gives every sample a
    likelihood under each true class, and how classes are called. The likelihoods, weakened, are added to the model's
    own logits; the probability of the given label under both, and under the transition matrix, is set to the noise rate
    that the latent classes alone estimate, or to that of the lapses (below) if it is higher.

    The gate: without noise, a classifier is wrong on the average sample as often as it expects to be, and on its most
    confident quarter far less. If the most confident quarter of every class disagrees with the labels more than 1.5
    times as often as the *average* sample is expected to, uncertainty does not explain it, and there are wrong labels.
    A weaker model can be more uncertain than that and still tell: where the labels lapse, that is, differ from what it
    says however sure it is (:func:`~lightning_unlearn.functional.fit_lapses`), by five standard deviations and as a
    quarter of all the disagreement, there are wrong labels too. But a network that has hardly learned may be confident
    and wrong: of a thousand samples or more some must lapse, by two standard deviations, or 1.5 times do not do, but 3.
    Else nothing is suspect. Nor is anything where a class is called by another's name more often than by its own: which
    of the two it is cannot be told then, and a network that has hardly learned yet looks like that. Nor is anything
    where the model predicts hardly more than one class, or fewer than half of them.

    Outputs of the model that no label names are left out. With more classes than the evidence has coordinates, what it
    says of a class is a random part of what the model said: samples are ranked by their margin then, and nothing is
    suspect.
    """
    classes = judged_classes(evidence, reduce)
    if len(classes) < _FEWEST or not is_exact(evidence.basis):
        return _by_margin(evidence, classes, reduce)
    if len(classes) == evidence.num_classes:
        return _judge_label(evidence, reduce)
    return of_all_classes(_judge_label(restricted(evidence, classes), reduce), evidence, classes)


def _by_margin(evidence: Evidence, classes: Tensor, reduce: Reduce) -> Verdict:
    """The order of the margins (AUM), and nothing suspect."""
    margin = standardise(evidence.mean_margin.double().unsqueeze(1), evidence.weight, reduce).squeeze(1)
    probability = (1 - NO_DOUBT * (-margin).sigmoid()).float()
    why = (
        f"{len(classes)} classes occur, and the {evidence.basis.shape[1]} coordinates that are kept of a sample's"
        " evidence do not tell them apart"
    )
    return Verdict(
        probability,
        evidence.label,
        torch.zeros_like(probability),
        label_probability=probability,
        notes=(f"labels: {why}: samples are ranked by their margin, and none is suspect",),
        caveat=f"wrong labels would not show: {why}",
    )


def _judge_label(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The verdict on evidence in which every class occurs."""
    gated, is_open = None, False
    if evidence.unseen is None or evidence.num_classes <= _MOST_GATED:
        gated, is_open = _by_gate(evidence, reduce)
    if gated is not None and (evidence.unseen is None or gated.warning):
        return gated
    if gated is not None and is_open and not _may_overrule(evidence, reduce):
        return gated
    found = label_noise_of(evidence, reduce)
    if gated is not None and is_open and _is_plausible(gated, found, evidence, reduce):
        return gated
    return verdict_of(found, evidence, reduce, NOT_KNOWN)


def _may_overrule(evidence: Evidence, reduce: Reduce) -> bool:
    """Whether the detector may speak against the gate.

    Without an early epoch to go by, what is memorized looks right, and of few samples it tells little.
    """
    early = evidence.unseen.early if evidence.unseen else None
    return early is not None and early.is_settled and bool(reduce(evidence.weight.double().sum()) >= _MANY)


def _is_plausible(gated: Verdict, found: LabelNoise, evidence: Evidence, reduce: Reduce) -> bool:
    """Whether enough of what the gate calls wrong is expected to be."""
    suspects = evidence.weight.double() * (gated.clean_probability < _HALF)
    number, wrong = reduce(torch.stack([suspects.sum(), suspects @ found.wrong])).tolist()
    return bool(number > 0 and wrong >= _PLAUSIBLE * number)


def _by_gate(evidence: Evidence, reduce: Reduce) -> tuple[Verdict, bool]:
    """The verdict of latent classes, and whether they find wrong labels."""
    model, w = label_model(evidence, reduce), evidence.weight
    rate = min(max(model.noise_rate, 1e-6), 1 - 1e-6)
    probability = (model.log_odds + shift_to_rate(model.log_odds, w, rate, reduce=reduce)).sigmoid().float()
    matrix = model.transition.float() if model.transition.ndim == 2 else None
    found = model.finds_wrong_labels
    if not found:
        probability = 1 - NO_DOUBT * (1 - probability)
        matrix = None if matrix is None else torch.eye(len(matrix), device=matrix.device)
    lapses = ""
    if (clear := model.clear_lapses) is not None:
        lapses = f", {clear.rate:.1%} of all however confident ({clear.z:.1f} standard deviations)"
    nothing = "no sign of wrong labels"
    note = (
        f"labels: {model.disagreement:.1%} of the most confident samples disagree, {model.uncertainty:.1%} expected of"
        f" the average one{lapses}: {model.objection or ('wrong labels' if found else nothing)}"
    )
    verdict = Verdict(
        probability,
        model.suggested,
        (1 - probability) * model.suggested_share.float(),
        label_probability=probability,
        noise_matrix=matrix,
        notes=(note,),
        warning=model.objection,
    )
    return verdict, found


def judge_input(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The probability that the input is intact, from an early layer's response to it.

    A mixture on the response. The gate: fewer than one per cent of the samples lie between the two groups, and the
    model was less sure of one of them in the course of training; that one is the corrupted one. Two kinds of intact
    inputs, such as recordings of two microphones, differ too, but run into each other. A network that has hardly
    learned may be sure of noise, and wrong: where it predicts fewer than half of the labels of the group called intact,
    and does worse on it than on the other, nothing is suspect. Nor is anything where the groups follow the classes: one
    class is often easier than the others, and looks different too; and where only one class has corrupted inputs, the
    network recognizes it by them, and is surest of those.
    """
    intact = torch.ones_like(evidence.weight)
    if evidence.response is None:
        return Verdict(intact, evidence.label, notes=("inputs: no early layer to look at",))
    w, u = evidence.weight.double(), evidence.uncertainty.double()
    rows = standardise(evidence.response.double(), evidence.weight, reduce)
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
        found, verdict = False, "but it does worse on the other, so which is corrupted cannot be told yet"
    elif found and _follows_classes(evidence, share[:, 0], reduce):
        found, verdict = False, "no sign of corrupted inputs, as the two groups follow the classes"
    note = (
        f"inputs: two groups, the smaller of {group.min() / number:.1%}, {ambiguous:.1%} of the samples between them,"
        f" the model less sure of one by {abs(gap):.2f} standard deviations: {verdict}"
    )
    probability = share[:, clean].float() if found else intact
    return Verdict(probability, evidence.label, input_probability=probability, notes=(note,))


def _is_contrary(clean: int, group: Tensor, right: Tensor, loss: Tensor, squares: Tensor) -> bool:
    """Whether a network that has hardly learned does worse on the inputs that are called intact.

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
    """Whether the given labels tell which of the two groups a sample is in (adjusted R squared).

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


def judge_auto(evidence: Evidence, reduce: Reduce) -> Verdict:
    """Both kinds of evidence, each behind its gate: p(clean) is the product.

    The latent classes are fitted on the samples whose input is intact.
    """
    inputs = judge_input(evidence, reduce)
    intact = inputs.clean_probability
    broken = evidence.weight * (intact < _HALF)
    number, of_all = reduce(torch.stack([broken.sum(), evidence.weight.sum()]).double()).tolist()
    corrupted = number > 0
    kept = replace(evidence, weight=evidence.weight * (intact >= _HALF))
    if corrupted and kept.unseen is not None:
        # Which tells nothing of the others: what is corrupted was in the early epoch and in the validation data.
        kept = replace(kept, unseen=OutOfSample(), left_out=None)
    labels = judge_label(kept, reduce)
    suggested = labels.suggested_probability
    return Verdict(
        labels.clean_probability * intact,
        labels.suggested_label,
        None if suggested is None else suggested * intact,
        label_probability=labels.label_probability,
        input_probability=inputs.input_probability,
        noise_matrix=labels.noise_matrix,
        notes=labels.notes + inputs.notes,
        warning="" if corrupted else labels.warning,
        caveat=labels.caveat,
        noise=_with_inputs(labels.noise, number / of_all) if corrupted else labels.noise,
    )


def _with_inputs(noise: NoiseEstimate | None, corrupted: float) -> NoiseEstimate | None:
    """The estimate of labels where a share of all samples has a corrupted input, and its labels were not judged."""
    if noise is None:
        return None
    rate, low, high = (corrupted + (1 - corrupted) * share for share in (noise.rate, *noise.interval))
    return replace(noise, rate=rate, interval=(low, high))
