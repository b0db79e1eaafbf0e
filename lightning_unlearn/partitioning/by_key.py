"""What a fit refuses whose samples are known by a key, and what a person has decided of such samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION
from lightning_unlearn.data.sample_key import Key
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.recipes import Recipe
from lightning_unlearn.results.review import Review, check_classes, validate_review
from lightning_unlearn.results.review_csv import Table
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.progress import rank_zero_warn
from lightning_unlearn.trainer.protocols import MaskSource

_WHY = "samples identified by sample_key are read from training steps only, not by a pass over the data"


def refuse_by_key(callback: Any) -> None:
    """Refuse the settings of a callback, and of its recipe, that need a pass over the training set.

    Raises:
        ValueError: naming the setting.
    """
    recipe: Recipe = callback.recipe
    asked = {
        "layer": callback.layer is not None,
        "every_n_epochs": callback.every_n_epochs is not None,
        "judge_validation=True": callback.judge_validation,
        f"recipe='{recipe.name}'": recipe.needs_neuron_attribution or recipe.name == "input",
        "evidence_from='eval_passes'": recipe.evidence_from != "train_steps",
        f"attribution_method='{recipe.attribution_method}'": recipe.attribution_method != GRADIENT_X_ACTIVATION,
        "input_layer": recipe.input_layer is not None,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{name} cannot be combined with sample_key, since {_WHY}. Leave it out.")


def check_fit_by_key(partners: Sequence[Any]) -> None:
    """Refuse a callback beside that needs a pass over the training set.

    Raises:
        MisconfigurationException: naming it.
    """
    for callback in partners:
        if isinstance(callback, MaskSource):
            raise MisconfigurationException(
                f"{type(callback).__name__} ranks neurons by a pass over the training set, but {_WHY}. Leave it"
                " out, or use a map-style dataset without sample_key."
            )


def check_reviewed(table: Table, task_format: TaskFormat) -> None:
    """Refuse a table of decisions that is not by key, or names classes that there are not.

    Raises:
        ValueError: with the line.
    """
    several = task_format.task == "multilabel"
    for row in table.rows:
        where = f"{table.path}, {table.place} {row.line}"
        if not row.key:
            raise ValueError(
                f"{where}: expected the key of the sample, since this fit identifies samples by sample_key, but"
                " found none; use a table written for a partition by key, with a column 'key'."
            )
        check_classes(where, row, task_format.num_outputs if several else task_format.num_classes, single=not several)


def review_by_key(table: Table, keys: Sequence[Key], task_format: TaskFormat) -> Review:
    """Return the decisions about samples that are known.

    Args:
        table: what the file holds.
        keys: of all samples, in the order of the partition's rows.
        task_format: knows the task.
    """
    place = {str(key): at for at, key in enumerate(keys)}
    # A spreadsheet's formula is written with a quote in front.
    found = [(row, place.get(row.key, place.get(row.key.removeprefix("'")))) for row in table.rows]
    if missing := [row.key for row, at in found if at is None]:
        rank_zero_warn(
            f"Ignoring {len(missing):,} decisions in {table.path}: their samples were not seen before the partition"
            f" ({missing[0]!r}{', ...' if len(missing) > 1 else ''})."
        )
    several = task_format.task == "multilabel"
    return validate_review(
        # Which samples they are of is said by the keys.
        replace(table, mark="", rows=tuple(replace(row, index=at) for row, at in found if at is not None)),
        total=len(keys),
        classes=task_format.num_outputs if several else task_format.num_classes,
        labels=task_format.num_outputs if several else None,
    )
