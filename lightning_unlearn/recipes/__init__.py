"""From evidence to the probability that a sample is clean, by name.

A recipe is a function from :class:`~lightning_unlearn.recipes.evidence.Evidence`, one rank's share of it, and a
function that sums over ranks, to a :class:`RecipeResult`. None needs a Trainer, a noise mask, a clean set or a noise
rate.
"""

from lightning_unlearn.recipes.base import Recipe, RecipeFn, RecipeResult
from lightning_unlearn.recipes.baselines import argmax_recipe, aum_recipe, loss_recipe, rlap_recipe
from lightning_unlearn.recipes.builtin import auto_recipe, input_recipe, label_recipe
from lightning_unlearn.recipes.registry import ENTRY_POINTS, RECIPES, get_recipe

__all__ = [
    "ENTRY_POINTS",
    "RECIPES",
    "Recipe",
    "RecipeFn",
    "RecipeResult",
    "argmax_recipe",
    "aum_recipe",
    "auto_recipe",
    "get_recipe",
    "input_recipe",
    "label_recipe",
    "loss_recipe",
    "rlap_recipe",
]
