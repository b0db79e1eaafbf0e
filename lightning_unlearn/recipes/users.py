"""Recipes of users: functions called as they can be, and their answers checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.arguments import called, fault_of_call
from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.recipes.verdict import Judge, Recipe, Verdict
from lightning_unlearn.recipes.views import rival_of
from lightning_unlearn.types import Evidence


def judge_of(function: Callable[..., Any]) -> Judge:
    """A user's function as a judge, its answer checked.

    Args:
        function: of the evidence alone, or, with a second positional parameter without a default, of the evidence and
            the function that sums over ranks. Other parameters with a default, and ``**kwargs``, are the user's own.

    Raises:
        ValueError: if it cannot be called so.
    """
    name, takes_reduce = called(function), _takes_reduce(function)
    if fault := fault_of_call(function, 1 + takes_reduce):
        raise ValueError(
            "Expected recipe to be a function of the evidence (and, if it needs it, of the function that sums over"
            f" ranks), but '{name}' {fault}."
        )
    return _Checked(name, function, takes_reduce)


def checking(recipe: Recipe) -> Recipe:
    """A user's recipe, its answers checked."""
    if isinstance(recipe.judge, _Checked):
        return recipe
    return replace(recipe, judge=_Checked(recipe.name, recipe.judge, takes_reduce=True))


# An object, since a function that is made within a function cannot be pickled.
@dataclass(frozen=True)
class _Checked:
    name: str
    function: Callable[..., Any]
    takes_reduce: bool

    def __call__(self, evidence: Evidence, reduce: Reduce) -> Verdict:
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


def checked(name: str, answer: Any, evidence: Evidence, reduce: Reduce, failure: Exception | None = None) -> Verdict:
    """What a recipe has answered as a verdict, on the device of the evidence; every rank must ask.

    Args:
        name: of the recipe, for messages.
        answer: p(clean), (n,), or a verdict.
        evidence: that it was asked about.
        reduce: sums over the ranks.
        failure: what it raised on this rank instead.

    Raises:
        ValueError: for an answer that is neither, on every rank alike.
        Exception: the failure, on its rank.
    """
    verdict = answer if isinstance(answer, Verdict) else Verdict(answer, rival_of(evidence)[0])
    fault = next(filter(None, (_fault(*each, evidence) for each in _parts(verdict))), "")
    # Together, as the others would wait for a rank that has given up.
    if reduce(torch.tensor(float(bool(fault or failure)), device=evidence.weight.device)).item() > 0:
        if failure is not None:
            raise failure
        raise ValueError(f"Expected recipe '{name}' to return {fault or _ON_ANOTHER_RANK}.")
    device = evidence.weight.device
    moved = {field: value.detach().float().to(device) for field, value, _ in _parts(verdict) if value is not None}
    moved["suggested_label"] = verdict.suggested_label.detach().long().to(device)
    return replace(verdict, **moved)


_ON_ANOTHER_RANK = "a verdict on every rank, but on another it did not"
_LABELS = "suggested_label"


def _parts(verdict: Verdict) -> list[tuple[str, Any, str]]:
    """What has a row per sample, with what it is called in a message."""
    return [
        ("clean_probability", verdict.clean_probability, "p(clean)"),
        (_LABELS, verdict.suggested_label, _LABELS),
        *(
            (name, getattr(verdict, name), name)
            for name in ("suggested_probability", "label_probability", "input_probability")
        ),
    ]


def _fault(field: str, value: Any, word: str, evidence: Evidence) -> str:
    """What is expected of a part of a verdict, and what it is; empty where it is as expected."""
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
