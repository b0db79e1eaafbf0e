"""Estimate which given labels are wrong, how many, and how significant that is, from logits during training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.structured_noise import StructuredNoise
from lightning_unlearn.recipes.base import NO_DOUBT, judged_labels, noise_status
from lightning_unlearn.recipes.explanations import (
    Explanation,
    by_blind_errors,
    by_class_shares,
    by_matrix,
    by_names,
    speaks,
    wrong_labels,
)
from lightning_unlearn.recipes.label_evidence import NO_GAP, LabelEvidence, LabelHistory, finite_phases, label_evidence
from lightning_unlearn.recipes.latent_noise import (
    NamedClasses,
    as_sure_as_labels_show,
    latent_windows,
    named_classes,
    transition_noise,
)
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

NOT_KNOWN = "the model separates fewer than two classes, or classes with fewer than half of the samples"
NOT_NAMED = "at least one class is labeled as another more often than as itself; the noise model is not identifiable"

_SHOWN = 3.0  # standard deviations

Status = Literal["found", "weak", "none", "unknown"]


@dataclass(frozen=True, eq=False)
class LabelNoise:
    """Estimated label noise. All fields but the first three are the same on every rank.

    Args:
        wrong: (n,) float64, probability that the given label is wrong; also the ranking.
        suggested: (n,) int64, the most probable other class.
        suggested_share: (n,) float64, its probability among the other classes.
        status: ``"found"``: suspects may be acted on; ``"weak"``: suspects are only listed, because the evidence is
            weak or a sampler draws some classes more often; ``"none"``: no evidence of wrong labels; ``"unknown"``: the
            network has learned too little.
        objection: reason why no estimate is possible; empty if one is.
        rate: share of wrong labels; a lower bound unless the noise is symmetric.
        interval: 95 % interval of the rate; the upper end is 1 unless the noise is known to be symmetric.
        z: significance of wrong labels, in standard deviations.
        structured: noise model of systematically mislabeled classes; None if there are none.
        transition: (C, C), row k the probabilities of the given label for true class k; None for symmetric noise.
    """

    wrong: Tensor
    suggested: Tensor
    suggested_share: Tensor
    status: Status
    objection: str
    rate: float
    interval: tuple[float, float]
    z: float
    structured: StructuredNoise | None
    transition: Tensor | None


def find_label_noise(history: LabelHistory, *, reduce: Reduce = no_reduce) -> LabelNoise:
    """Estimate which labels are wrong.

    Four noise models are tried in this order, and the first with sufficient evidence is used: (1) some classes are
    systematically labeled as another class; (2) a full transition matrix, if latent classes separate well; (3)
    symmetric noise with a rate for each true class; (4) symmetric noise with errors between similar classes.

    Args:
        history: logits and labels of this rank's samples.
        reduce: sums over the ranks.
    """
    evidence, mean = label_evidence(history, reduce)
    windows = latent_windows(finite_phases(history, mean), history.last, evidence.label, history.weight, reduce)
    given = (evidence.shift, evidence.label, evidence.weight, reduce)
    named, matrix = named_classes(windows, *given), transition_noise(windows, *given)
    shares = by_class_shares(windows, evidence)
    if named is not None and not _is_habit(named, shares, evidence, history):
        named = None
    number = reduce(evidence.weight.sum().reshape(1)).item()
    is_shown = matrix is not None and matrix.is_shown(number, evidence.z)
    found = None if named is None else by_names(named, evidence)
    if found is None and matrix is not None and is_shown and speaks(matrix, evidence, number):
        is_needed = not _is_memorized(matrix.rate, evidence, history) and evidence.z < _SHOWN
        matrix = as_sure_as_labels_show(matrix, evidence.label, evidence.weight, is_needed, reduce)
        found = None if matrix is None else by_matrix(matrix, evidence)
    if found is None:
        found = by_blind_errors(evidence) if shares is None else shares[0]
    # Only an early epoch or the most confident samples tell systematic mislabeling from confusion of similar classes.
    is_open = evidence.is_sampled or (named is not None and evidence.early is None and not is_shown)
    can_judge = judged_labels(*_given_and_said(mean + evidence.shift, evidence.label, evidence.weight, reduce))
    objection = "" if bool(can_judge.any()) else NOT_KNOWN
    if not objection:
        found = replace(found, wrong=torch.where(can_judge[evidence.label], found.wrong, NO_DOUBT * found.wrong))
    status = noise_status(found.z, found.rate * number, is_open=is_open)
    if status == "none" and matrix is not None and not matrix.is_named:
        objection = objection or NOT_NAMED
    return _label_noise(found, named, "unknown" if objection else status, objection, evidence)


def _label_noise(
    found: Explanation, named: NamedClasses | None, status: Status, objection: str, evidence: LabelEvidence
) -> LabelNoise:
    is_shown = status in {"found", "weak"}
    share, suggested = found.others.scatter(1, evidence.label.unsqueeze(1), -torch.inf).softmax(1).max(1)
    return LabelNoise(
        wrong=found.wrong,
        suggested=suggested,
        suggested_share=share,
        status=status,
        objection=objection,
        rate=found.rate,
        # Wrong labels that do not show, or were memorized first, have no upper bound.
        interval=found.interval if is_shown and not evidence.is_sampled else (found.interval[0], 1.0),
        z=found.z,
        structured=named.noise if named else None,
        transition=found.transition,
    )


def _is_habit(
    named: NamedClasses, shares: tuple[Explanation, float] | None, evidence: LabelEvidence, history: LabelHistory
) -> bool:
    """Return whether classes are systematically mislabeled, as opposed to randomly labeled or slowly learned.

    Early in training, a slowly learned class is confused with a similar one, as if it were labeled as that class.
    Systematic mislabeling also shows in all of training, except if labels are memorized, that is, if more labels are
    predicted than are right.
    """
    # A class with random labels also appears to be labeled as a few particular classes.
    if shares is not None and shares[1] > named.gain / 2:
        return False
    _, rate = wrong_labels(named.posterior(evidence.label), evidence)
    if not (named.lasts or _is_memorized(rate, evidence, history)):
        return False
    return evidence.early is None or _was_seen_early(rate, evidence.early, evidence)


def _is_memorized(rate: float, evidence: LabelEvidence, history: LabelHistory) -> bool:
    """Return whether more labels are predicted than are right, and clearly more than on the validation set."""
    right = (history.last.argmax(1) == evidence.label).double()
    number, hit = evidence.reduce(torch.stack([evidence.weight.sum(), evidence.weight @ right])).tolist()
    return bool(hit >= (1 - rate) * number) and (history.gap is None or history.gap > NO_GAP)


def _was_seen_early(rate: float, early: PrequentialRate, evidence: LabelEvidence) -> bool:
    """Return whether the network disagreed with at least this share of the labels in an early epoch.

    Most samples of a class have the right label, so the network learns the right label first.
    """
    zeros = evidence.weight.new_zeros(evidence.score.shape[1])
    given = evidence.reduce(zeros.index_add(0, evidence.label, evidence.weight))
    number = given.sum().item()
    disagreed = min(max((1 - early.skill) * (1 - given.max().item() / number), 0.0), 1.0)
    return bool(rate <= disagreed + 2 * math.sqrt((disagreed + 1 / number) / number))


def _given_and_said(mean: Tensor, label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return (C,) each: the number of samples labeled as each class, and the number predicted as it."""
    zeros = weight.new_zeros(mean.shape[1])
    given, said = reduce(torch.stack([zeros.index_add(0, of, weight) for of in (label, mean.argmax(1))]))
    return given, said
