"""From evidence to the probability that a sample is clean, by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.evidence import support_log_odds
from lightning_unlearn.functional.mixture import GaussianMixture, Reduce, fit_mixture, standardise
from lightning_unlearn.types import Evidence

# Standard errors by which the components' means must differ before one is called clean.
_DECISIVE = 3.0


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a recipe says of one rank's share.

    Args:
        clean_probability: (n,) float32.
        suggested_label: (n,) int64, for a sample that turns out not to be clean.
        warning: why the verdict should not be acted upon; empty if it can be. The same on every rank.
    """

    clean_probability: Tensor
    suggested_label: Tensor
    warning: str = ""


@dataclass(frozen=True)
class Recipe:
    """A way to a partition.

    Args:
        name: for configuration and messages.
        judge: from this rank's evidence, and the function that sums over ranks, to a verdict.
        needs_rows: whether it needs the per-neuron attributions ``Evidence.rows``.
        averages: whether evidence of earlier epochs counts.
        soft: whether neurons are regressed on the probability (else, as in the paper, on the two clusters).
    """

    name: str
    judge: Callable[[Evidence, Reduce], Verdict]
    needs_rows: bool = False
    averages: bool = True
    soft: bool = True


def _higher_component(score: Tensor, share: Tensor, weight: Tensor, reduce: Reduce) -> int | None:
    """The component with the higher mean score, or None if the means are too close to tell.

    Args:
        score: (n,), higher is cleaner.
        share: (n, 2), probability of each component.
        weight: (n,).
        reduce: sums over the ranks.
    """
    s, w = score.double().unsqueeze(1), share * weight.double().unsqueeze(1)
    count, first, second = reduce(torch.stack([w.sum(0), (w * s).sum(0), (w * s * s).sum(0)]))
    if (count < 1).any():
        return None
    mean = first / count
    standard_error = ((second / count - mean**2).clamp(min=0) / count).sum().sqrt()
    gap = (mean[1] - mean[0]).item()
    if not math.isfinite(gap) or abs(gap) <= _DECISIVE * standard_error.item():
        return None
    return int(gap > 0)


def _undecided(evidence: Evidence, what: str) -> Verdict:
    return Verdict(
        torch.ones_like(evidence.weight),
        evidence.label,
        f"the two groups found do not differ in {what}, so which of them is clean cannot be told",
    )


def judge_label(evidence: Evidence, reduce: Reduce) -> Verdict:
    """A mixture on the log-odds of the averaged support of the given label; the component with the higher is clean.

    The model's own evidence decides which component is clean: where the layer supports the given label against every
    other. The probability rises with the support throughout.
    """
    rows = standardise(support_log_odds(evidence.support).unsqueeze(1), evidence.weight, reduce)
    mixture: GaussianMixture = fit_mixture(rows, evidence.weight, reduce=reduce)
    clean = _higher_component(evidence.support, mixture.posterior(rows), evidence.weight, reduce)
    if clean is None:
        return _undecided(evidence, "how well the model supports the given labels")
    return Verdict(mixture.posterior_monotone(rows, clean).float(), evidence.rival)


def judge_rlap(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The paper's steps 2-3 on ``Evidence.rows``, without its noise mask.

    The reference code takes from the true noise mask which of the two clusters is the clean one. Here it is the one
    whose given labels the model fits better: the lower mean cross-entropy.
    """
    if evidence.rows is None:
        raise ValueError(
            "The recipe 'rlap' needs Evidence.rows, the per-neuron attributions (n, D), but they are None."
        )
    rows = standardise(evidence.rows, evidence.weight, reduce)
    share = fit_mixture(rows, evidence.weight, reduce=reduce).posterior(rows)
    clean = _higher_component(-evidence.loss, share, evidence.weight, reduce)
    if clean is None:
        return _undecided(evidence, "the model's loss on them")
    return Verdict(share[:, clean].float(), evidence.prediction)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("label", judge_label),
        Recipe("rlap", judge_rlap, needs_rows=True, averages=False, soft=False),
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: if there is none; the message lists those there are.

    Example:
        >>> get_recipe("label").needs_rows
        False
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"Expected recipe to be one of {', '.join(map(repr, RECIPES))}, but got '{name}'.{hint}")
