"""Log messages about settings that differ from those of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_unlearn.results.partition import Partition

# What counts from here on whatever the checkpoint holds, what is checked elsewhere, and functions, of which two may do
# the same under different names.
_LEFT_OUT = {"dry_run", "review", "verify", "every_n_epochs", "batch_to_xy", "logits_from"}
_SIZES = {"batch_size": "batch size", "ranks": "number of ranks"}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the differences between two records of fits: in settings, and in sizes.

    Args:
        before: record of the fit that wrote the checkpoint; see
            :func:`~lightning_unlearn.results.provenance.fit_record`.
        now: record of the resumed fit.

    Returns:
        the differing settings and sizes, each with the new and the old value, in words.
    """
    known = {who: _flat(given) for who, given in before["settings"].items()}
    settings = [
        f"{name}={value!r} instead of {known[who][name]!r}"
        for who, given in now["settings"].items()
        for name, value in _flat(given).items()
        if name not in _LEFT_OUT and value != known.get(who, {}).get(name, value)
    ]
    sizes = [
        f"{words} {now[name]} instead of {before[name]}"
        for name, words in _SIZES.items()
        if now.get(name) != before.get(name, now.get(name))
    ]
    return settings, sizes


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the fields of ``data`` beside the others."""
    return {**{name: value for name, value in settings.items() if name != "data"}, **settings.get("data", {})}


def what_holds(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    partition: Partition | None,
    epochs_seen: int,
    may_be_recomputed: bool,
) -> str:
    """Return a line for the log; empty where nothing differs, or nothing is held.

    Args:
        before: see :func:`differences`.
        now: see :func:`differences`.
        partition: that the checkpoint holds.
        epochs_seen: of how many epochs it holds evidence.
        may_be_recomputed: whether other partitions are to follow.
    """
    settings, sizes = differences(before, now)
    if not (settings or sizes) or (partition is None and not epochs_seen):
        return ""
    said = f"Resuming with {', '.join([*settings, *sizes])}"
    if partition is None:
        return f"{said}: the evidence of {epochs_seen} epochs is kept, and the new settings apply from now on."
    held = (
        f"{said}. The partition of the checkpoint (epoch {partition.epoch}) and what followed from it stay unchanged."
    )
    if settings:
        effect = "apply to partitions computed from now on" if may_be_recomputed else "have no effect"
        held += f" The new settings of the callbacks {effect}."
    if sizes:
        held += " Every sample that was kept is still trained on."
    return held
