"""From evidence to the probability that a sample is clean, by name.

A recipe is a function from :class:`~lightning_unlearn.recipes.evidence.Evidence`, one rank's share of it, and a
function that sums over ranks, to a :class:`Verdict`. None needs a Trainer, a noise mask, a clean set or a noise rate.
"""

from lightning_unlearn.recipes.baselines import judge_argmax, judge_aum, judge_loss, judge_rlap
from lightning_unlearn.recipes.judges import judge_auto, judge_input, judge_label
from lightning_unlearn.recipes.registry import ENTRY_POINTS, RECIPES, get_recipe
from lightning_unlearn.recipes.verdict import Judge, Recipe, Verdict

__all__ = [
    "ENTRY_POINTS",
    "RECIPES",
    "Judge",
    "Recipe",
    "Verdict",
    "get_recipe",
    "judge_argmax",
    "judge_aum",
    "judge_auto",
    "judge_input",
    "judge_label",
    "judge_loss",
    "judge_rlap",
]
