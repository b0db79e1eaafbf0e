"""What is lost where a fit goes on from a checkpoint without a callback that has acted in it."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.trainer.progress import rank_zero_warn


def _has_pruned(state: dict[str, Any]) -> bool:
    return not state.get("is_proposal") and any(not mask["keep"].all() for mask in state.get("masks", ()))


def _has_narrowed(state: dict[str, Any]) -> bool:
    return state.get("training_subset") is not None


# Where a callback of this package has acted in a checkpoint and is missing in the resumed fit: how its state tells, and
# what is lost.
_MISSED = {
    "SensitivityPruneCallback": (
        _has_pruned,
        "its pruned neurons are no longer kept at zero, and training may revive them",
    ),
    "CleanSubsetFinetuneCallback": (
        _has_narrowed,
        "training continues with all data, all layers and the optimizer of configure_optimizers",
    ),
}


def warn_of_missing(here: set[str], states: dict[str, Any]) -> None:
    """Warn if a callback of this package has acted in a checkpoint and is missing in the resumed fit.

    Args:
        here: names of those that are.
        states: of the checkpoint's callbacks, by their names.
    """
    for name, (has_acted, consequence) in _MISSED.items():
        if name in states and name not in here and has_acted(states[name]):
            rank_zero_warn(
                f"The checkpoint was saved after {name} had acted, but the Trainer has none: {consequence}. Add it"
                " back unless this is intended."
            )
