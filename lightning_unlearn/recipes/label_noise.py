"""Which given labels are wrong, how many, and how sure that is: from what a network said in the course of training."""

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
    """What is found. All but the first three is the same on every rank.

    Args:
        wrong: (n,) float64, probability that the given label is wrong; it ranks.
        suggested: (n,) int64, the likeliest other class.
        suggested_share: (n,) float64, its probability among the other classes.
        status: ``"found"``: suspects may be acted upon; ``"weak"``: they are named only, as little speaks for them,
            or a sampler draws some classes more often; ``"none"``: no sign; ``"unknown"``: the network has learned too
            little.
        objection: why nothing can be told; empty if it can.
        rate: of wrong labels; a lower bound for errors that are not blind.
        interval: of it, at 95 %; the upper end is 1 where errors are not known to fall on any class alike.
        z: how sure it is that labels are wrong.
        structured: the classes that go by another's name; None if none does.
        transition: (C, C), row k the probabilities of what a sample of class k is called; None where errors are blind.
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
    """Find the labels that are wrong.

    Four hypotheses are asked, and the first that is shown explains the labels: some classes go by another's name; any
    class may be called by any name, as latent classes that are told well apart show; errors are blind, but more in one
    true class than in another; errors that are blind, or fall on classes that are taken for each other.

    Args:
        history: of this rank's samples.
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
    # Habits are told from what is hard by an early epoch, or by the most confident samples.
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
        # What does not show, or is memorized first, may be any number.
        interval=found.interval if is_shown and not evidence.is_sampled else (found.interval[0], 1.0),
        z=found.z,
        structured=named.noise if named else None,
        transition=found.transition,
    )


def _is_habit(
    named: NamedClasses, shares: tuple[Explanation, float] | None, evidence: LabelEvidence, history: LabelHistory
) -> bool:
    """Return whether a class goes by another's name, not by any, and is not one that the network was slow to learn.

    In the first part of training such a class is taken for one like it, as if it went by that name. All of training
    shows a habit as well, but where labels are memorized: where more are predicted than are right.
    """
    # A class that goes by any other name seems to go by some of them.
    if shares is not None and shares[1] > named.gain / 2:
        return False
    _, rate = wrong_labels(named.posterior(evidence.label), evidence)
    if not (named.lasts or _is_memorized(rate, evidence, history)):
        return False
    return evidence.early is None or _was_seen_early(rate, evidence.early, evidence)


def _is_memorized(rate: float, evidence: LabelEvidence, history: LabelHistory) -> bool:
    """Return whether more of the labels are predicted than are right, and clearly more than of validation labels."""
    right = (history.last.argmax(1) == evidence.label).double()
    number, hit = evidence.reduce(torch.stack([evidence.weight.sum(), evidence.weight @ right])).tolist()
    return bool(hit >= (1 - rate) * number) and (history.gap is None or history.gap > NO_GAP)


def _was_seen_early(rate: float, early: PrequentialRate, evidence: LabelEvidence) -> bool:
    """Return whether so many labels as go by another class's name were not what the network said in an early epoch.

    A class goes by its own name more often, so the network learns that first.
    """
    zeros = evidence.weight.new_zeros(evidence.score.shape[1])
    given = evidence.reduce(zeros.index_add(0, evidence.label, evidence.weight))
    number = given.sum().item()
    disagreed = min(max((1 - early.skill) * (1 - given.max().item() / number), 0.0), 1.0)
    return bool(rate <= disagreed + 2 * math.sqrt((disagreed + 1 / number) / number))


def _given_and_said(mean: Tensor, label: Tensor, weight: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return (C,) each: how many samples are called each class, and of how many it is predicted."""
    zeros = weight.new_zeros(mean.shape[1])
    given, said = reduce(torch.stack([zeros.index_add(0, of, weight) for of in (label, mean.argmax(1))]))
    return given, said
