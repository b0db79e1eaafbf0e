"""The summary of a fit in words: what was found, what was done, and whether it helped."""

from __future__ import annotations

from typing import NamedTuple

from lightning_unlearn.results.finding import at_least, precision_in_words, worth_in_words
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.results.summary import RepairSummary, standard_error, verdict_of
from lightning_unlearn.trainer.divergence import ADVICE

_FOLLOWS = {
    "a loss": ". Check the suspects before you use this model.",
    "no meaningful gain": ".",
    "no meaningful change": ", within the standard error of {error:.1f} points on {samples:,} samples.",
    "a gain": " over the weights at the partition. Continued training on all data was not compared.",
}
_NOTHING = "No callback acted on the partition."
_UNKNOWN = "The effect is unknown: there are no validation data."


class Accuracies(NamedTuple):
    """On the validation data; None where not known.

    Args:
        before: at the partition.
        after: at the end.
        best_before: of the fit's validations before the partition.
        samples: in the validation set at the end.
    """

    before: float | None = None
    after: float | None = None
    best_before: float | None = None
    samples: int | None = None


def summarize(
    partition: Partition,
    *,
    memorized: float | None,
    done: tuple[str, ...],
    accuracy: Accuracies,
    dry_run: bool = False,
    diverged: str = "",
    validation: str = "",
) -> RepairSummary:
    """Return the summary of a fit.

    Args:
        partition: the last partition that was acted on, or the one that was not.
        memorized: see :class:`~lightning_unlearn.results.summary.RepairSummary`.
        done: a clause for each callback that acted.
        accuracy: validation accuracies at the partition, at the end and before.
        dry_run: whether this was a dry run.
        diverged: weights that are NaN or infinite; empty for none.
        validation: result for the validation set in one sentence; empty if it was not judged.
    """
    suspects = len(partition.suspect_indices())
    sentences = [_found(partition, suspects)]
    if partition.is_actionable:
        if memorized is not None:
            sentences.append(
                f"The network predicted {memorized:.0%} of the suspect labels when the partition was computed."
            )
        if dry_run:
            sentences.append(f"Dry run: {'; '.join(('nothing was changed', *done))}.")
        elif done:
            sentences.append(f"Done: {'; '.join(done)}.")
            sentences += [] if diverged else [_gained(*accuracy)]
        else:
            sentences.append(_NOTHING)
    if diverged:
        sentences.append(f"Training has diverged since, {diverged} are NaN or infinite: {ADVICE}.")
    if validation:
        sentences.append(validation)
    return RepairSummary(
        samples=len(partition),
        suspects=suspects,
        noise_rate=partition.noise_rate,
        memorized=memorized,
        done=done,
        accuracy_before=accuracy.before,
        best_accuracy_before=accuracy.best_before,
        accuracy_after=accuracy.after,
        validation_samples=accuracy.samples,
        advice=" ".join(sentences),
    )


def _found(partition: Partition, suspects: int) -> str:
    number = f"{len(partition):,}"
    if partition.status is PartitionStatus.INCONCLUSIVE and not suspects:
        return f"The {number} training samples could not be assessed, and nothing was changed: {partition.warning}."
    if not suspects:
        found = f"No sign of noise in the {number} training samples: nothing was changed."
        if partition.noise_rate_interval is not None:
            found = (
                f"All {number} training samples were classified as clean, and nothing was changed: {partition.warning}."
            )
        return f"{found} Partition.to_csv(path, suspects_only=False) ranks them."
    reasons = partition.reasons()
    counts = {word: reasons.count(word) for word in ("label", "input", "both") if word in reasons}
    why = ", ".join(f"{count:,} for {word}" for word, count in counts.items())
    found = f"{suspects:,} of {number} training samples are suspect ({why}){precision_in_words(partition)}"
    if partition.noise_rate is not None:
        found += f", estimated noise rate {partition.noise_rate:.1%}{_how_sure(partition)}"
    found += "."
    return f"{found} Nothing was changed: {partition.warning}." if partition.warning else found


def _how_sure(partition: Partition) -> str:
    if partition.noise_rate_interval is None:
        return ""
    low, high = partition.noise_rate_interval
    said = at_least((low, high)) if high >= 1 else f" ({low:.1%} to {high:.1%})"
    return "; ".join([said, *worth_in_words(partition)])


def _gained(before: float | None, after: float | None, best: float | None, samples: int | None) -> str:
    """Return the change of validation accuracy since the partition and the best epoch before it, in words."""
    if before is None or after is None:
        return _UNKNOWN
    points = f"{100 * (after - before):+.1f} points"
    text = f"Validation accuracy {after:.3f} at the end, {before:.3f} at the partition ({points})"
    if best is not None and best > before:
        text = f"{text}, {best:.3f} at best before it ({100 * (after - best):+.1f} points)"
    verdict = verdict_of(before, after, best, samples)
    error = 100 * standard_error(before if best is None else max(before, best), samples)
    return f"{text}: {verdict}{_FOLLOWS[verdict].format(error=error, samples=samples)}"
