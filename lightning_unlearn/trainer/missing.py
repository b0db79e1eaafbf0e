"""Warn if a fit is resumed without a callback that was active in the checkpoint."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.trainer.progress import rank_zero_warn


def _has_pruned(state: dict[str, Any]) -> bool:
    return not state.get("is_proposal") and any(not mask["keep"].all() for mask in state.get("masks", ()))


def _has_narrowed(state: dict[str, Any]) -> bool:
    return state.get("training_subset") is not None


# For each callback: how its state in a checkpoint shows that it was active, and the consequence of resuming without it.
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
    """Warn if a callback of this package was active in a checkpoint and is missing in the resumed fit.

    Args:
        here: class names of the callbacks in the fit.
        states: states of the checkpoint's callbacks, by class name.
    """
    for name, (has_acted, consequence) in _MISSED.items():
        if name in states and name not in here and has_acted(states[name]):
            rank_zero_warn(
                f"The checkpoint was saved after {name} had acted, but the Trainer has none: {consequence}. Add it"
                " back unless this is intended."
            )
