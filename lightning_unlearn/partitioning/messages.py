"""Log messages about the partition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.data.naming import class_names_in
from lightning_unlearn.results.finding import epochs_in_words, finding_of
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.loggers import log_partition
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn

# Samples per class below which clean data of a weak model were called noisy in four of ten simulated sets.
_FEW = 50


def report_partition(
    fit: FitContext,
    partition: Partition,
    evidence: str,
    notes: Sequence[str],
) -> None:
    """Say what the first partition found, and what follows from it.

    Args:
        fit: that is running.
        partition: that was computed.
        evidence: what it was computed from, in words.
        notes: of the person who has reviewed it and of the recipe, in words.
    """
    rank_zero_info(
        f"Partition after {epochs_in_words(partition.epoch)} ({partition.recipe}, {partition.layer}, {evidence}):"
        f" {finding_of(partition)}."
    )
    for note in (*notes, *_few_samples(len(partition), _classes_of(partition))):
        rank_zero_info(f"  {note}")
    if partition.warning:
        rank_zero_warn(f"Partition not applied; training continues on all data: {partition.warning}.")
    log_partition(fit, partition)


def class_names_of(fit: FitContext, classes: int | None) -> list[str]:
    """Return the class names that an UnlearnReport was given or the training set lists; empty if neither has any."""
    for callback in fit.callbacks:
        names = getattr(callback, "class_names", None)
        if isinstance(names, list) and len(names) == classes and all(isinstance(one, str) for one in names):
            return names
    if fit.keyed is not None:
        return []
    return class_names_in(fit.train_loader.dataset, classes)


def report_round(fit: FitContext, new: Partition, changed: float, is_stable: bool) -> None:
    """Log the result of recomputing the partition.

    Args:
        fit: the running fit.
        new: the new partition.
        changed: share of the samples that changed group.
        is_stable: whether it has converged and is not recomputed.
    """
    suspects = len(new.suspect_indices())
    end = "; it has converged and is not recomputed" if is_stable else ""
    if new.is_actionable:
        log_partition(fit, new)
    else:
        last = ", and none is computed again" if is_stable else ""
        end = f"; not applied ({new.warning}), the previous one stays{last}"
    rate = "" if new.noise_rate is None else f" estimated noise rate {new.noise_rate:.1%},"
    rank_zero_info(
        f"Partition recomputed after {epochs_in_words(new.epoch)}: {suspects:,} of {len(new):,} samples are"
        f" suspect,{rate} {changed:.1%} changed group{end}."
    )


def warn_of_probabilities(logits: Tensor) -> None:
    """Warn where what ``forward`` returns, (B, C), seems to be probabilities."""
    if (logits >= 0).all() and ((logits.float().sum(dim=1) - 1).abs() < 1e-2).all():
        rank_zero_warn(
            "forward appears to return probabilities. Return logits or log-probabilities: margins of"
            " probabilities vanish for confident samples."
        )


def _classes_of(partition: Partition) -> int:
    """Return how many classes its labels name."""
    return 2 if partition.is_multilabel else len(torch.unique(partition.label[partition.label >= 0]))


def _few_samples(total: int, num_classes: int) -> list[str]:
    """Return a word of caution where so few samples were measured to look like noise though they are clean."""
    if total >= _FEW * num_classes:
        return []
    return [f"fewer than {_FEW} samples per class on average; expect false positives"]


def say_absent(fit: FitContext, absent: int, total: int) -> None:
    """Say how many samples the data set gives as None. Every rank must call it, with the number in its own share."""
    number = int(fit.reduce(torch.tensor([float(absent)])).item())
    if number:
        rank_zero_info(
            f"{number:,} of {total:,} training samples are None in the dataset. They have no label, are not"
            " scored, and stay in training unchanged."
        )


def say_cost(fit: FitContext, epoch_seconds: float) -> None:
    """Say before a pass what bounds its time."""
    rank_zero_info(
        f"Scoring {fit.total:,} training samples. This takes about as long as validating on them, less"
        f" than the last training epoch ({epoch_seconds:.1f} s)."
    )


def say_late(epoch: int, due: str, *, acts: bool) -> None:
    """Log that the partition is computed after training has ended.

    Args:
        epoch: number of complete epochs.
        due: when it was due; empty if it is due now.
        acts: whether another callback would have acted on it.
    """
    due_then = f", due {due}," if due else ""
    late = f"Training has ended after {epochs_in_words(epoch)}: the partition{due_then}"
    if acts:
        rank_zero_warn(
            f"{late} is computed now, too late to prune or fine-tune. Train for more epochs, or set a smaller at_epoch."
        )
    elif due:
        rank_zero_info(f"{late} is computed now.")
