"""Samples that cannot be judged, since what the model says of them is NaN or infinite.

One such sample would leave no sum finite, and with it no mixture, no latent class and no sample on any rank. So they
are taken out before a recipe looks, and put back after it, as not clean: what is broken is their input most likely,
which is the only thing that is theirs alone.
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
    """Return (n,) bool, whether all that is known of a sample is finite."""
    finite = torch.ones_like(evidence.weight, dtype=torch.bool)
    for name, value in _columns(evidence).items():
        if name != "weight" and value.is_floating_point():
            finite &= value.isfinite().flatten(1).all(dim=1) if value.ndim > 1 else value.isfinite()
    return finite


def apply_to_finite_rows(recipe: Recipe, evidence: Evidence, reduce: Reduce, model_fault: str = "") -> RecipeResult:
    """Return the verdict of a recipe on the samples that can be judged; the others are not clean, for their input.

    Args:
        recipe: asked about this rank's samples; those that cannot be judged look to it like another one, of weight 0.
        evidence: of this rank's share.
        reduce: sums over the ranks.
        model_fault: what is known to be wrong with the model's weights, for the message.

    Returns:
        the recipe's own verdict where all is finite; else one that names in ``unusable`` what must not be trained on.

    Raises:
        ValueError: if more than half of the samples cannot be judged, on every rank alike.
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
        f"{bad:,} of {total:,} samples cannot be judged, since their logits or attributions are NaN or infinite: not"
        " clean, for their input"
    )
    return _with_unusable(verdict, evidence.label, ~finite, note)


def _columns(evidence: Evidence) -> dict[str, Tensor]:
    """Return what has a row per sample."""
    named = {field.name: getattr(evidence, field.name) for field in fields(evidence) if field.name not in NOT_BY_SAMPLE}
    return {name: value for name, value in named.items() if value is not None}


def _filled(evidence: Evidence, finite: Tensor) -> Evidence:
    """Return the evidence with another sample's rows, which are like those of any, in place of what is not finite."""
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
