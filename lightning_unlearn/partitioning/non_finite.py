"""Samples that cannot be judged, since what the model says of them is NaN or infinite.

One such sample would leave no sum finite, and with it no mixture, no latent class and no sample on any rank. So they
are taken out before a recipe looks, and put back after it, as not clean: what is broken is their input most likely,
which is the only thing that is theirs alone.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.recipes import Recipe, Verdict
from lightning_unlearn.recipes.evidence import NOT_BY_SAMPLE, Evidence
from lightning_unlearn.utilities.reduce import Reduce

# Of more samples than that, it is not the samples that are broken.
_MOST = 0.5


def finite_rows(evidence: Evidence) -> Tensor:
    """(n,) bool, whether all that is known of a sample is finite."""
    finite = torch.ones_like(evidence.weight, dtype=torch.bool)
    for name, value in _columns(evidence).items():
        if name != "weight" and value.is_floating_point():
            finite &= value.isfinite().flatten(1).all(dim=1) if value.ndim > 1 else value.isfinite()
    return finite


def judge_finite(recipe: Recipe, evidence: Evidence, reduce: Reduce, model_fault: str = "") -> Verdict:
    """The verdict of a recipe on the samples that can be judged; the others are not clean, for their input.

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
    if bad > _MOST * total:
        raise ValueError(_too_many(bad, total, model_fault))
    verdict = recipe.judge(evidence if finite.all() else _filled(evidence, finite), reduce)
    if not bad:
        return verdict
    note = (
        f"{bad:,} of {total:,} samples cannot be judged, since their logits or attributions are NaN or infinite: not"
        " clean, for their input"
    )
    return _with_unusable(verdict, evidence.label, ~finite, note)


def check_rows_left_out(model: nn.Module, left_out: int, total: int, epoch: int, reduce: Reduce) -> str:
    """What to warn of where rows of an epoch were not finite; empty where all were.

    A few are what 16-bit training leaves behind while its loss scale settles.

    Args:
        model: whose weights are looked at where it was most of the rows.
        left_out: how many rows of all ranks were not finite.
        total: of how many.
        epoch: how many epochs were complete.
        reduce: sums over the ranks; every rank must call this.

    Raises:
        ValueError: where it was most of them and the weights are not finite either, which no further training mends.
    """
    if not left_out:
        return ""
    if left_out > _MOST * total:
        fault = first_not_finite(model)
        if reduce(torch.tensor(float(bool(fault)))).item() > 0:
            raise ValueError(_too_many(left_out, total, fault or "weights on another rank"))
    return (
        f"The logits or attributions of {left_out:,} of {total:,} training samples were NaN or infinite in epoch"
        f" {epoch}; these rows are left out of the evidence."
    )


def first_not_finite(model: nn.Module) -> str:
    """The name of the first parameter or buffer that holds NaN or infinity; empty where none does."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not bool(value.detach().isfinite().all()):
            return name
    return ""


def _columns(evidence: Evidence) -> dict[str, Tensor]:
    """What has a row per sample."""
    named = {field.name: getattr(evidence, field.name) for field in fields(evidence) if field.name not in NOT_BY_SAMPLE}
    return {name: value for name, value in named.items() if value is not None}


def _filled(evidence: Evidence, finite: Tensor) -> Evidence:
    """The evidence with another sample's rows, which are like those of any, in place of what is not finite."""
    usable = (finite & (evidence.weight > 0)).nonzero().flatten()
    changes: dict[str, Any] = {"weight": evidence.weight * finite}
    for name, value in _columns(evidence).items():
        if name not in ("index", "label", "weight"):
            filler = value[usable[0]] if len(usable) else torch.zeros_like(value[0])
            shape = (-1,) + (1,) * (value.ndim - 1)
            changes[name] = torch.where(finite.reshape(shape), value, filler)
    return replace(evidence, **changes)


def _with_unusable(verdict: Verdict, label: Tensor, unusable: Tensor, note: str) -> Verdict:
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


def _too_many(bad: int, total: int, model_fault: str) -> str:
    found = (
        f"Expected finite logits and attributions, but those of {bad:,} of {total:,} training samples are NaN or"
        " infinite"
    )
    if model_fault:
        return (
            f"{found}, and so is the model's {model_fault}: training has diverged. Use a smaller learning rate,"
            " gradient_clip_val, or no NaN in the inputs (which BatchNorm keeps), and start again from a checkpoint of"
            " before."
        )
    return (
        f"{found}, though the model's weights are finite. Check the inputs for NaN, forward for overflow (try"
        " precision='bf16-mixed' or 32), and that it returns no logits of -inf for classes that it rules out."
    )
