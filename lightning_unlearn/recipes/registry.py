"""Recipes by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from lightning_unlearn.recipes.base import EvidenceFrom, Recipe
from lightning_unlearn.recipes.baselines import argmax_recipe, aum_recipe, loss_recipe, rlap_recipe
from lightning_unlearn.recipes.builtin import auto_recipe, input_recipe, label_recipe
from lightning_unlearn.recipes.users import judge_of
from lightning_unlearn.utilities.calls import called
from lightning_unlearn.utilities.checks import did_you_mean, plain

ENTRY_POINTS = "lightning_unlearn.recipes"
"""Group in which other packages offer recipes."""


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("auto", auto_recipe, needs_input_statistics=True, needs_out_of_sample=True),
        Recipe("label", label_recipe, needs_out_of_sample=True),
        Recipe("input", input_recipe, needs_input_statistics=True),
        # The paper keeps no sample for the sake of its class.
        Recipe(
            "rlap",
            rlap_recipe,
            needs_neuron_attribution=True,
            uses_history=False,
            soft_targets=False,
            min_class_fraction=0.0,
        ),
        Recipe("loss", loss_recipe, uses_history=False),
        Recipe("aum", aum_recipe),
        Recipe("argmax", argmax_recipe, uses_history=False),
    )
}

_SETTINGS = ("evidence_from", "attribution_method", "input_layer", "min_class_fraction")


def get_recipe(
    recipe: str | Recipe | Callable[..., Any],
    *,
    evidence_from: EvidenceFrom | None = None,
    attribution_method: str | None = None,
    input_layer: str | None = None,
    min_class_fraction: float | None = None,
) -> Recipe:
    """Return the recipe of a name, a dotted path or a function, with some of its settings replaced.

    In YAML: ``class_path: lightning_unlearn.recipes.get_recipe``, ``init_args: {recipe: label, input_layer: conv1}``.

    Args:
        recipe: a name of :data:`~lightning_unlearn.recipes.RECIPES`; a name in the entry-point group
            ``lightning_unlearn.recipes``; the dotted path of a function or a :class:`Recipe`; or one of these. A
            function takes :class:`~lightning_unlearn.recipes.evidence.Evidence`, and, if it has a second positional
            parameter without a default, the function that sums over ranks; it returns p(clean), (n,), or a
            :class:`RecipeResult`.
        evidence_from: see :class:`Recipe`; None for the recipe's own, as for the others.
        attribution_method: see :class:`Recipe`.
        input_layer: see :class:`Recipe`.
        min_class_fraction: see :class:`Recipe`.

    Raises:
        ValueError: if there is none, the message lists those there are; or for a function of other arguments.
        TypeError: if it is neither a name nor a function.

    Example:
        >>> get_recipe("auto").needs_neuron_attribution
        False
        >>> get_recipe(lambda evidence: evidence.label_confidence).name
        '<lambda>'
        >>> get_recipe("label", min_class_fraction=0).min_class_fraction
        0.0
    """
    wanted = {
        "evidence_from": evidence_from,
        "attribution_method": attribution_method,
        "input_layer": input_layer,
        "min_class_fraction": min_class_fraction,
    }
    changes: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return replace(_find(recipe), **changes) if changes else _find(recipe)


def settings_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return what :func:`get_recipe` can change."""
    return {name: getattr(recipe, name) for name in _SETTINGS}


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings in which a recipe differs from the one of its name."""
    known = RECIPES.get(recipe.name, Recipe("default", recipe.function))
    return {name: value for name, value in settings_of_recipe(recipe).items() if value != getattr(known, name)}


def is_builtin(recipe: Recipe) -> bool:
    """Return whether a recipe is one of this package, whatever its settings."""
    return any(recipe.function is one.function for one in RECIPES.values())


def _find(recipe: str | Recipe | Callable[..., Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if callable(recipe):
        return Recipe(called(recipe), judge_of(recipe), needs_input_statistics=True)
    recipe = plain(recipe)
    if not isinstance(recipe, str):
        raise TypeError(
            f"Expected recipe to be a name, a dotted path or a function, but got a {type(recipe).__name__}."
        )
    if recipe in RECIPES:
        return RECIPES[recipe]
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if recipe in offered:
        return replace(_find(offered[recipe].load()), name=recipe)
    if "." in recipe and all(part.isidentifier() for part in recipe.split(".")):
        return replace(_find(_import(recipe)), name=recipe)
    names = [*RECIPES, *offered]
    raise ValueError(
        f"Expected recipe to be one of {', '.join(map(repr, names))}, or the dotted path of a function, but got"
        f" {recipe!r:.80}.{did_you_mean(recipe, names)}"
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
