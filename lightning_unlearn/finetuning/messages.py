"""Messages about fine-tuning, for the log and the summary of a fit."""

from __future__ import annotations

import torch

from lightning_unlearn.finetuning.state import FinetuneState
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.finetuning.warm_start import Memory, Start
from lightning_unlearn.results.finding import epochs_in_words, share_in_words
from lightning_unlearn.results.partition import Partition

_STARTS = {"keep": "", "shrink": ", from weights moved back towards those of the start", "start": ", from the start"}


def samples_of(subset: TrainingSubset) -> str:
    """Return what a subset holds, in words."""
    if subset.probability is not None:
        return f"{len(subset.index):,} samples, each drawn with its probability of being clean"
    changed = len(subset.relabeled)
    kept = f"{len(subset.index) - changed:,} clean samples"
    return f"{kept} and {changed:,} re-labeled ones" if subset.new_label is not None else kept


def done(state: FinetuneState, mode: str) -> str:
    """Return what was done in one clause; empty if nothing was.

    Args:
        state: state of fine-tuning.
        mode: ``"full"`` or ``"layers"``.
    """
    if state.training_subset is None:
        return ""
    kind = "F-FT" if mode == "full" else "L-FT"
    start = _STARTS[state.started_from]
    return f"trained on {samples_of(state.training_subset)} from epoch {state.first_epoch} on ({kind}{start})"


def left_out(partition: Partition, subset: TrainingSubset) -> str:
    """Say how many samples a subset leaves out and why, in a clause after a comma; empty if it leaves none out."""
    out = torch.ones(len(partition), dtype=torch.bool)
    out[subset.index] = False
    suspects, doubtful = int((out & ~partition.is_clean).sum()), int((out & partition.doubtful).sum())
    said = [f"{suspects:,} suspect{'' if suspects == 1 else 's'}"] if suspects else []
    said += [f"{doubtful:,} more whose label is doubtful"] if doubtful else []
    return f", without {' and '.join(said)}" if said else ""


def start_of(start: Start, moved: int = 0) -> str:
    """Return where fine-tuning starts from, and why.

    Args:
        start: that was chosen.
        moved: number of parameters that were changed.

    Example:
        >>> start_of(Start("keep", because="no label is suspect"))
        'Fine-tuning continues from the current weights: no label is suspect.'
    """
    many = f"; {moved:,} parameters" if moved else ""
    return f"Fine-tuning {start.said}{many}{': ' if start.because else ''}{start.because}."


def prospect(memory: Memory, start: Start, precision: float | None, epochs: int | None) -> str:
    """Return the expected gain of fine-tuning, in one sentence.

    The thresholds were measured (``benchmarks/results/repair-quick-cpu.md``).

    Args:
        memory: measurement of memorized labels.
        start: the chosen start.
        precision: expected share of wrong samples among the suspects; None if unknown.
        epochs: remaining epochs; None if unknown.
    """
    listed = "" if precision is None else f" ({share_in_words(precision)} of them wrong)"
    left = "" if epochs is None else f" in the remaining {epochs_in_words(epochs)}" if epochs > 1 else " in one epoch"
    if not memory.is_memorized:
        return f"Little to gain{left}: fine-tuning mainly keeps the suspect labels{listed} from being memorized."
    if not memory.has_suspects:
        return f"Some accuracy to gain{left}: memorization has begun, mostly not of the suspect labels{listed}."
    if not start.moves:
        return f"Part of the accuracy lost to memorized labels{listed} may be recovered{left}: the weights are kept."
    return f"The accuracy lost to memorized labels{listed} may be recovered{left}."


def started(
    subset: TrainingSubset, left: str, epoch: int, batches: tuple[int | float, int | float], trained: int
) -> str:
    """Say that fine-tuning starts.

    Args:
        subset: that is trained on.
        left: :func:`left_out`.
        epoch: the first on it.
        batches: per epoch, before and from now on.
        trained: number of parameters.
    """
    before, now = batches
    same = "as many batches per epoch as before" if before == now else f"{now} batches per epoch instead of {before}"
    return f"Fine-tuning from epoch {epoch} on {samples_of(subset)}{left}, {same}; {trained:,} parameters are trained."


def renewed(subset: TrainingSubset, epoch: int, batches: int | float) -> str:
    """Return the message that fine-tuning continues with a new partition."""
    return f"Fine-tuning continues from epoch {epoch} on {samples_of(subset)}, {batches} batches per epoch."


def of_dry_run(
    subset: TrainingSubset, epochs: int | None, batches: tuple[int | float, int | float], seconds: float | None
) -> str:
    """Return what would be trained on, and what it would cost.

    Args:
        subset: that would be trained on.
        epochs: that remain; None where that is not known.
        batches: per epoch, before and then.
        seconds: of the last epoch; None where that is not known.
    """
    before, after = batches
    number = "as many batches as before" if before == after else f"{after} batches instead of {before}"
    cost = "" if epochs is None else f", {epochs} epochs of {number}"
    if epochs is not None and seconds is not None and before != after:
        then, now = (epochs * one * seconds / max(1, before) for one in (after, before))
        cost += f": at the last epoch's speed about {then:.1f} s instead of {now:.1f} s"
    return f"Dry run: would train on {samples_of(subset)}{cost}."
