"""Restrict evidence to the classes that occur as labels; a model may have more outputs than these."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.functional.coordinates import helmert
from lightning_unlearn.functional.transition import MOST_NAMES
from lightning_unlearn.recipes.base import RecipeResult
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.utilities.reduce import Reduce


def runner_up(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the most probable class other than the given one over training, and its share among the others.

    If some classes have no coordinates, the runner-up of the last pass is used. If that is unknown too, it is the
    prediction of the last pass, with a share of 0.

    Returns:
        (n,) int64 and (n,) float32 in [0, 1].
    """
    if evidence.runner_up is not None and evidence.runner_up_probability is not None:
        return evidence.runner_up, evidence.runner_up_probability
    if not is_exact(evidence.basis):
        # Random coordinates cannot be mapped back to single classes.
        return evidence.prediction, torch.zeros_like(evidence.weight)
    scores = class_scores(evidence, evidence.attribution.mean(dim=1))
    share, rival = scores.scatter(1, evidence.label.unsqueeze(1), -torch.inf).softmax(dim=1).max(dim=1)
    return rival, share


def class_scores(evidence: Evidence, block: Tensor) -> Tensor:
    """Map a part (n, r) of the attributions to class scores (n, C); -inf for a class without coordinates."""
    return (block @ evidence.basis.T).masked_fill(~with_coordinates(evidence.basis), -torch.inf)


def with_coordinates(basis: Tensor) -> Tensor:
    """Return (C,) bool, the classes that have coordinates in the evidence."""
    return basis.abs().sum(dim=1) > 0


def is_exact(basis: Tensor) -> bool:
    """Return whether these coordinates represent class scores exactly, as opposed to a random projection."""
    return 0 < int(with_coordinates(basis).sum()) <= basis.shape[1] + 1


def judged_classes(evidence: Evidence, reduce: Reduce) -> Tensor:
    """Return (C',) int64, the classes that have coordinates and occur as labels of samples with a weight above 0."""
    counts = evidence.weight.new_zeros(evidence.num_classes).double()
    counts = reduce(counts.index_add(0, evidence.label, evidence.weight.double()))
    return ((counts > 0) & with_coordinates(evidence.basis)).nonzero().flatten()


def restricted(evidence: Evidence, classes: Tensor) -> Evidence:
    """Restrict the evidence to some classes, as if the model had no other outputs.

    Samples of other classes get a weight of 0.

    Args:
        evidence: must have exact coordinates.
        classes: (C',) int64, in ascending order; label k of the result is ``classes[k]``.
    """
    basis = helmert(len(classes)).to(evidence.basis)
    change = evidence.basis[classes].T @ basis
    place = torch.full((evidence.num_classes,), -1, device=classes.device)
    place[classes] = torch.arange(len(classes), device=classes.device)
    label = place[evidence.label]
    return replace(
        evidence,
        weight=evidence.weight * (label >= 0),
        label=label.clamp(min=0),
        attribution=evidence.attribution @ change,
        left_out=None if evidence.left_out is None else evidence.left_out @ change,
        basis=basis,
        prediction=place[evidence.prediction],
        out_of_sample=None
        if evidence.out_of_sample is None
        else _out_of_sample_of(evidence.out_of_sample, classes.cpu()),
    )


def _out_of_sample_of(out_of_sample: OutOfSample, classes: Tensor) -> OutOfSample:
    early, left_out = (
        None if rate is None else replace(rate, bias=rate.bias[classes])
        for rate in (out_of_sample.early, out_of_sample.left_out)
    )
    drawn = None if out_of_sample.drawn is None else out_of_sample.drawn[classes]
    return replace(out_of_sample, early=early, drawn=drawn, left_out=left_out)


def of_all_classes(verdict: RecipeResult, evidence: Evidence, classes: Tensor) -> RecipeResult:
    """Map a result for :func:`restricted` evidence back to all classes; samples of other classes are clean.

    Args:
        verdict: result for the restricted evidence.
        evidence: before it was restricted.
        classes: (C',) int64, as passed to :func:`restricted`.
    """
    judged = torch.isin(evidence.label, classes)
    clean = verdict.clean_probability.where(judged, 1)
    share, matrix = verdict.suggested_probability, verdict.noise_matrix
    if matrix is not None:
        small, matrix = matrix, None
        if evidence.num_classes <= MOST_NAMES:
            matrix = torch.eye(evidence.num_classes, device=small.device, dtype=small.dtype)
            matrix[classes.unsqueeze(1), classes] = small
    noise = verdict.noise
    if noise is not None:
        names = tuple((int(classes[a]), int(classes[b]), often) for a, b, often in noise.names)
        noise = replace(noise, names=names)
    return replace(
        verdict,
        noise=noise,
        clean_probability=clean,
        label_probability=clean,
        suggested_label=classes[verdict.suggested_label].where(judged, evidence.label),
        suggested_probability=None if share is None else share.where(judged, 0),
        noise_matrix=matrix,
    )
