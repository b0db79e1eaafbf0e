"""Recipes by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.recipes.baselines import judge_argmax, judge_aum, judge_loss, judge_rlap
from lightning_unlearn.recipes.judges import judge_auto, judge_input, judge_label
from lightning_unlearn.recipes.verdict import Judge, Recipe, Verdict
from lightning_unlearn.recipes.views import rival_of
from lightning_unlearn.types import Evidence

ENTRY_POINTS = "lightning_unlearn.recipes"
"""Group in which other packages offer recipes."""


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("auto", judge_auto, needs_response=True),
        Recipe("label", judge_label),
        Recipe("input", judge_input, needs_response=True),
        Recipe("rlap", judge_rlap, needs_rows=True, averages=False, soft=False),
        Recipe("loss", judge_loss, averages=False),
        Recipe("aum", judge_aum),
        Recipe("argmax", judge_argmax, averages=False),
    )
}


def get_recipe(recipe: str | Recipe | Callable[..., Any]) -> Recipe:
    """The recipe of a name, of a dotted path, or of a function.

    Args:
        recipe: a name of :data:`~lightning_unlearn.recipes.RECIPES`; a name in the entry-point group
            ``lightning_unlearn.recipes``; the dotted path of a function or a :class:`Recipe`; or one of these. A
            function takes :class:`~lightning_unlearn.types.Evidence`, and, if it has a second parameter without a
            default, the function that sums over ranks; it returns p(clean), (n,), or a :class:`Verdict`.

    Raises:
        ValueError: if there is none; the message lists those there are.
        TypeError: if it is neither a name nor a function.

    Example:
        >>> get_recipe("auto").needs_rows
        False
        >>> get_recipe(lambda evidence: evidence.support).name
        '<lambda>'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if callable(recipe):
        return Recipe(getattr(recipe, "__name__", type(recipe).__name__), _as_judge(recipe), needs_response=True)
    if not isinstance(recipe, str):
        raise TypeError(
            f"Expected recipe to be a name, a dotted path or a function, but got a {type(recipe).__name__}."
        )
    if recipe in RECIPES:
        return RECIPES[recipe]
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if recipe in offered:
        return replace(get_recipe(offered[recipe].load()), name=recipe)
    if "." in recipe and all(part.isidentifier() for part in recipe.split(".")):
        return replace(get_recipe(_import(recipe)), name=recipe)
    names = [*RECIPES, *offered]
    near = difflib.get_close_matches(recipe, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"Expected recipe to be one of {', '.join(map(repr, names))}, or the dotted path of a function, but got"
        f" '{recipe}'.{hint}"
    )


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected recipe to be the dotted path of a function that can be imported, but '{path}' cannot: {error}."
        ) from error
    if not callable(found) and not isinstance(found, Recipe):
        raise ValueError(f"Expected recipe '{path}' to be a function, but it is a {type(found).__name__}.")
    return found


def _as_judge(function: Callable[..., Any]) -> Judge:
    """A user's function as a judge, its answer checked."""
    # A second parameter with a default is a setting of the user's own.
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    takes_reduce = len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty
    name = getattr(function, "__name__", type(function).__name__)

    def judge(evidence: Evidence, reduce: Reduce) -> Verdict:
        answer: Any = function(evidence, reduce) if takes_reduce else function(evidence)
        verdict = answer if isinstance(answer, Verdict) else Verdict(answer, rival_of(evidence)[0])
        probability: Any = verdict.clean_probability
        shape = evidence.index.shape
        if not isinstance(probability, Tensor) or probability.shape != shape:
            found = tuple(probability.shape) if isinstance(probability, Tensor) else type(probability).__name__
            raise ValueError(f"Expected recipe '{name}' to return p(clean) of shape {tuple(shape)}, but got {found}.")
        illegal = ~((probability >= 0) & (probability <= 1)).all()
        # Together, as the others would wait for a rank that has given up.
        if reduce(illegal.double()).item() > 0:
            here = (
                f"they span {probability.min():.4g} to {probability.max():.4g}" if illegal else "another rank's do not"
            )
            raise ValueError(f"Expected recipe '{name}' to return probabilities in [0, 1], but {here}.")
        return replace(verdict, clean_probability=probability.float())

    return judge
