"""Recipes of users: functions called as they can be, tried before the training, and their answers checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.functional.soft_margin import rivals_of, soft_margins
from lightning_unlearn.recipes.base import Recipe, RecipeFn, RecipeResult
from lightning_unlearn.recipes.classes import is_exact, runner_up
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.utilities.calls import called, fault_of_call
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

# Of a trial, the share of wrong labels and the neurons.
_WRONG = 0.2
_NEURONS = 8
# There is none with more numbers, which would take long.
_MOST_NUMBERS = 2**24


class RecipeResultError(ValueError):
    """A recipe returned something other than p(clean) or a RecipeResult that fits the evidence."""


def judge_of(function: Callable[..., Any]) -> RecipeFn:
    """Return a user's function as a judge, its answer checked.

    Args:
        function: of the evidence alone, or, with a second positional parameter without a default, of the evidence and
            the function that sums over ranks. Other parameters with a default, and ``**kwargs``, are the user's own.

    Raises:
        ValueError: if it cannot be called so.
    """
    name, takes_reduce = called(function), _takes_reduce(function)
    if fault := fault_of_call(function, 1 + takes_reduce):
        raise ValueError(
            "Expected recipe to be a function of the evidence (and optionally of the function that sums over"
            f" ranks), but '{name}' {fault}."
        )
    return _Checked(name, function, takes_reduce)


def checking(recipe: Recipe) -> Recipe:
    """Return a user's recipe, its answers checked."""
    if isinstance(recipe.function, _Checked):
        return recipe
    return replace(recipe, function=_Checked(recipe.name, recipe.function, takes_reduce=True))


# An object, since a function that is made within a function cannot be pickled.
@dataclass(frozen=True)
class _Checked:
    name: str
    function: Callable[..., Any]
    takes_reduce: bool

    def __call__(self, evidence: Evidence, reduce: Reduce) -> RecipeResult:
        answer: Any = None
        failure = None
        try:
            answer = self.function(evidence, reduce) if self.takes_reduce else self.function(evidence)
        except Exception as error:  # of the user's function
            failure = error
        return checked(self.name, answer, evidence, reduce, failure)


def _takes_reduce(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some that are written in C say nothing
        return False
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(by_place) > 1 and by_place[1].default is inspect.Parameter.empty


def checked(
    name: str, answer: Any, evidence: Evidence, reduce: Reduce, failure: Exception | None = None
) -> RecipeResult:
    """Return what a recipe has answered as a verdict, on the device of the evidence; every rank must ask.

    Args:
        name: of the recipe, for messages.
        answer: p(clean), (n,), or a verdict.
        evidence: that it was asked about.
        reduce: sums over the ranks.
        failure: what it raised on this rank instead.

    Raises:
        RecipeResultError: for an answer that is neither, on every rank alike.
        Exception: the failure, on its rank.
    """
    verdict = answer if isinstance(answer, RecipeResult) else RecipeResult(answer, runner_up(evidence)[0])
    fault = next(filter(None, (_fault(*each, evidence) for each in _parts(verdict))), "")
    # Together, as the others would wait for a rank that has given up.
    if reduce(torch.tensor(float(bool(fault or failure)), device=evidence.weight.device)).item() > 0:
        if failure is not None:
            raise failure
        raise RecipeResultError(f"Expected recipe '{name}' to return {fault or _ON_ANOTHER_RANK}.")
    device = evidence.weight.device
    moved = {field: value.detach().float().to(device) for field, value, _ in _parts(verdict) if value is not None}
    moved["suggested_label"] = verdict.suggested_label.detach().long().to(device)
    return replace(verdict, **moved)


_ON_ANOTHER_RANK = "a valid result on every rank, but it failed on another rank"
_LABELS = "suggested_label"


def _parts(verdict: RecipeResult) -> list[tuple[str, Any, str]]:
    """Return what has a row per sample, with what it is called in a message."""
    return [
        ("clean_probability", verdict.clean_probability, "p(clean)"),
        (_LABELS, verdict.suggested_label, _LABELS),
        *(
            (name, getattr(verdict, name), name)
            for name in ("suggested_probability", "label_probability", "input_probability")
        ),
    ]


def _fault(field: str, value: Any, word: str, evidence: Evidence) -> str:
    """Return what is expected of a part of a verdict, and what it is; empty where it is as expected."""
    shape = evidence.index.shape
    if value is None and field not in ("clean_probability", _LABELS):
        return ""
    if not isinstance(value, Tensor) or value.shape != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return f"{word} of shape {tuple(shape)}, but got {found}"
    if value.is_complex() or value.is_meta or value.layout != torch.strided:
        kind = "on the device meta" if value.is_meta else f"{value.dtype}, {value.layout}"
        return f"{word} as a plain tensor of real numbers, but it is {kind}"
    low, high = (0, evidence.num_classes - 1) if field == _LABELS else (0, 1)
    if len(value) and not bool(((value >= low) & (value <= high)).all()):
        what = f"class labels in [0, {high}]" if field == _LABELS else "probabilities in [0, 1]"
        also = "" if field in ("clean_probability", _LABELS) else f" as {word}"
        return f"{what}{also}, but they span {float(value.min()):.4g} to {float(value.max()):.4g}"
    return ""


def trial(recipe: Recipe, basis: Tensor, index: Tensor, device: torch.device) -> str:
    """Return why a recipe cannot judge; empty if it can.

    It is asked about the samples that there are, but with made-up evidence: what fails shall fail before hours of
    training.

    Args:
        recipe: of a user.
        basis: (C, r) float32, the coordinates of class attributions.
        index: (n,) int64, the samples of this rank.
        device: where recipes compute.
    """
    if basis.shape[0] * len(index) > _MOST_NUMBERS:
        return ""
    evidence = made_up(basis.to(device), index, recipe)
    try:
        recipe.function(evidence, no_reduce)
    except RecipeResultError as error:
        return str(error)
    except Exception as error:  # of the user's function
        return (
            f"Expected recipe '{recipe.name}' to run on synthetic evidence before training starts, but it"
            f" raised {type(error).__name__}: {error}."
        )
    return ""


def made_up(basis: Tensor, index: Tensor, recipe: Recipe) -> Evidence:
    """Return evidence of a model that is fairly sure of the classes, where a fifth of the labels are wrong.

    Args:
        basis: (C, r) float32.
        index: (n,) int64.
        recipe: which says what it looks at.
    """
    generator, classes, count = torch.Generator().manual_seed(0), len(basis), len(index)
    truth = torch.arange(count) % classes
    wrong = torch.rand(count, generator=generator) < _WRONG
    label = torch.where(wrong, (truth + 1) % classes, truth)
    clear = 4 * torch.nn.functional.one_hot(truth, classes).float()
    scores = clear.unsqueeze(1) + torch.randn(count, 3, classes, generator=generator)
    last, column = scores[:, -1], label.unsqueeze(1)
    margin = last.gather(1, column).squeeze(1) - last.scatter(1, column, -torch.inf).amax(dim=1)
    share = last.softmax(dim=1)
    parts: dict[str, Any] = {
        "weight": torch.ones(count),
        "label": label,
        "attribution": scores.to(basis.device) @ basis,
        "basis": basis,
        "margin": margin,
        "aum": margin,
        "label_confidence": margin.sigmoid(),
        "uncertainty": torch.special.entr(share).sum(dim=1),
        "loss": torch.nn.functional.cross_entropy(last, label, reduction="none"),
        "prediction": last.argmax(dim=1),
    }
    if not is_exact(basis):
        parts["soft_margins"] = torch.stack([soft_margins(block, label) for block in scores.unbind(dim=1)], dim=1)
        parts["runner_up"], parts["runner_up_probability"] = rivals_of(last, label)
    if recipe.needs_input_statistics:
        parts["input_statistics"] = 1 + torch.rand(count, 2, generator=generator)
    if recipe.needs_neuron_attribution:
        parts["neuron_attribution"] = torch.randn(count, _NEURONS, generator=generator)
    return Evidence(index=index, **{name: value.to(basis.device) for name, value in parts.items()})
