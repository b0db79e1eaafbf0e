"""What is said of fine-tuning: in the log, before and when it starts, and in the summary of a fit."""

from __future__ import annotations

from lightning_unlearn.finetuning.training_subset import TrainingDraw

_STARTS = {"keep": "", "shrink": ", from weights moved back towards those of the start", "start": ", from the start"}


def samples_of(draw: TrainingDraw) -> str:
    """What a draw holds, in words."""
    if draw.probability is not None:
        return f"{len(draw.index):,} samples, each drawn as often as it is likely to be clean"
    changed = len(draw.relabelled)
    kept = f"{len(draw.index) - changed:,} clean samples"
    return f"{kept} and {changed:,} re-labeled ones" if draw.new_label is not None else kept


def done(draw: TrainingDraw, epoch: int, *, mode: str, started_from: str) -> str:
    """What was done, in one clause.

    Args:
        draw: that was trained on.
        epoch: the first on it.
        mode: ``"full"`` or ``"layers"``.
        started_from: ``"keep"``, ``"shrink"`` or ``"start"``.
    """
    kind = "F-FT" if mode == "full" else "L-FT"
    return f"trained on {samples_of(draw)} from epoch {epoch} on ({kind}{_STARTS[started_from]})"


def started(draw: TrainingDraw, epoch: int, batches: tuple[int | float, int | float], trained: int) -> str:
    """That fine-tuning starts.

    Args:
        draw: that is trained on.
        epoch: the first on it.
        batches: per epoch, before and from now on.
        trained: number of parameters.
    """
    before, now = batches
    return (
        f"Fine-tuning from epoch {epoch} on {samples_of(draw)}, {now} batches per epoch instead of {before};"
        f" {trained:,} parameters are trained."
    )


def renewed(draw: TrainingDraw, epoch: int, batches: int | float) -> str:
    """That fine-tuning goes on with another partition."""
    return f"Fine-tuning goes on from epoch {epoch} on {samples_of(draw)}, {batches} batches per epoch."


def of_dry_run(draw: TrainingDraw, epochs: int | None, batches: tuple[int, int], seconds: float | None) -> str:
    """What would be trained on, and what it would cost.

    Args:
        draw: that would be trained on.
        epochs: that remain; None where that is not known.
        batches: per epoch, before and then.
        seconds: of the last epoch; None where that is not known.
    """
    before, after = batches
    cost = "" if epochs is None else f", {epochs} epochs of {after} batches instead of {before}"
    if epochs is not None and seconds is not None:
        then, now = (epochs * one * seconds / max(1, before) for one in (after, before))
        cost += f": at the last epoch's speed about {then:.1f} s instead of {now:.1f} s"
    return f"Dry run: would train on {samples_of(draw)}{cost}."
