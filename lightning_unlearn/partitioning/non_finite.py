"""Samples whose logits or attributions are NaN or infinite.

A single such sample would make the sums over all ranks non-finite. They are therefore excluded before the recipe runs,
and marked as not clean afterwards, because of their input, which is the most likely cause.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.recipes import Recipe, RecipeResult
from lightning_unlearn.recipes.evidence import NOT_BY_SAMPLE, Evidence
from lightning_unlearn.trainer.divergence import MOST_LEFT_OUT, too_many_left_out
from lightning_unlearn.utilities.reduce import Reduce


def finite_rows(evidence: Evidence) -> Tensor:
    """Return (n,) bool, whether all evidence of a sample is finite."""
    finite = torch.ones_like(evidence.weight, dtype=torch.bool)
    for name, value in _columns(evidence).items():
        if name != "weight" and value.is_floating_point():
            finite &= value.isfinite().flatten(1).all(dim=1) if value.ndim > 1 else value.isfinite()
    return finite


def apply_to_finite_rows(recipe: Recipe, evidence: Evidence, reduce: Reduce, model_fault: str = "") -> RecipeResult:
    """Return the result of a recipe on finite samples; the others are not clean because of their input.

    Args:
        recipe: the recipe; it receives non-finite samples as copies of another sample with weight 0.
        evidence: evidence of this rank's shard.
        reduce: sums over the ranks.
        model_fault: known fault of the model's weights, for the message.

    Returns:
        the result of the recipe if all samples are finite; otherwise with the other samples in ``unusable``.

    Raises:
        ValueError: if more than half of the samples are not finite, on every rank.
    """
    finite = finite_rows(evidence)
    counts = evidence.weight > 0
    bad, total = (int(x) for x in reduce(torch.stack([(counts & ~finite).sum(), counts.sum()]).double()).tolist())
    if bad > MOST_LEFT_OUT * total:
        raise ValueError(too_many_left_out(bad, total, model_fault))
    verdict = recipe.function(evidence if finite.all() else _filled(evidence, finite), reduce)
    if not bad:
        return verdict
    note = (
        f"{bad:,} of {total:,} samples have NaN or infinite logits or attributions: they cannot be scored,"
        " and count as not clean because of their input"
    )
    return _with_unusable(verdict, evidence.label, ~finite, note)


def _columns(evidence: Evidence) -> dict[str, Tensor]:
    """Return what has a row per sample."""
    named = {field.name: getattr(evidence, field.name) for field in fields(evidence) if field.name not in NOT_BY_SAMPLE}
    return {name: value for name, value in named.items() if value is not None}


def _filled(evidence: Evidence, finite: Tensor) -> Evidence:
    """Return the evidence with the rows of non-finite samples replaced by those of another sample."""
    usable = (finite & (evidence.weight > 0)).nonzero().flatten()
    changes: dict[str, Any] = {"weight": evidence.weight * finite}
    for name, value in _columns(evidence).items():
        if name not in ("index", "label", "weight"):
            filler = value[usable[0]] if len(usable) else torch.zeros_like(value[0])
            shape = (-1,) + (1,) * (value.ndim - 1)
            changes[name] = torch.where(finite.reshape(shape), value, filler)
    return replace(evidence, **changes)


def _with_unusable(verdict: RecipeResult, label: Tensor, unusable: Tensor, note: str) -> RecipeResult:
    certain = torch.ones_like(verdict.clean_probability)
    of_label = verdict.label_probability
    of_input = certain if verdict.input_probability is None else verdict.input_probability
    suggested = verdict.suggested_probability
    if suggested is None:
        suggested = 1 - verdict.clean_probability
    return replace(
        verdict,
        clean_probability=verdict.clean_probability.masked_fill(unusable, 0),
        suggested_label=torch.where(unusable, label, verdict.suggested_label.to(label.dtype)),
        suggested_probability=suggested.masked_fill(unusable, 0),
        label_probability=None if of_label is None else of_label.masked_fill(unusable, 1),
        input_probability=of_input.masked_fill(unusable, 0),
        notes=(*verdict.notes, note),
        unusable=unusable,
    )
