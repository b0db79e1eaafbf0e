"""What a fit with repair comes to, in words: found, done, gained, and when it was not worth it."""

from __future__ import annotations

from lightning_unlearn.results.finding import at_least, precision_in_words, worth_in_words
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.results.summary import RepairSummary
from lightning_unlearn.trainer.divergence import ADVICE

# A network that gives so many of the suspects their given label has memorized them.
MEMORIZED = 0.5
# On validation data, less is no gain: training on would have moved it as much.
_POINTS = 0.003
_NOTHING = "Nothing was done about it: no callback acted on the partition."


def outlook(memorized: float) -> str:
    """What to expect of dropping the suspects, from the share of their labels that the network has memorized.

    Measured (``benchmarks/results/repair-cpu.md``): where the wrong labels were memorized, fine-tuning on the clean
    subset was 6 to 33 points ahead of training on. Where they were not, it was between 1 point behind and 3 ahead of
    training on for a short time; with the partition drawn again as the model got cleaner, it was ahead in every case.
    Where training on memorized the rest, as in ``examples/speech`` (30 % at first), it was 26 points ahead.
    """
    given = f"(it predicts {memorized:.0%} of them)"
    if memorized >= MEMORIZED:
        return f"The network has memorized the suspect labels {given}: fine-tuning on the clean subset should pay."
    return (
        f"The network has not memorized most of the suspect labels yet {given}: further training on them would, and"
        " dropping them now prevents it. It may gain little over a few more epochs on all the data; draw the partition"
        " again as the model gets cleaner (every_n_epochs)."
    )


def summarize(
    partition: Partition,
    *,
    memorized: float | None,
    done: tuple[str, ...],
    accuracy: tuple[float | None, float | None],
    is_dry_run: bool = False,
    diverged: str = "",
    validation: str = "",
) -> RepairSummary:
    """The summary of a fit.

    Args:
        partition: the last one that was acted upon, or the one that was not.
        memorized: see :class:`~lightning_unlearn.results.summary.RepairSummary`.
        done: a clause for each callback that did something.
        accuracy: on the validation data, before and after; None where not known.
        is_dry_run: whether nothing was to be changed.
        diverged: which weights are NaN or infinite; empty for none.
        validation: what was found of the validation set, in a sentence; empty where it was not judged.
    """
    suspects = len(partition.suspect_indices())
    sentences = [_found(partition, suspects)]
    if partition.is_actionable:
        if memorized is not None:
            sentences.append(outlook(memorized))
        if is_dry_run:
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
    before, after = accuracy
    return RepairSummary(
        samples=len(partition),
        suspects=suspects,
        noise_rate=partition.noise_rate,
        memorized=memorized,
        done=done,
        accuracy_before=before,
        accuracy_after=after,
        advice=" ".join(sentences),
    )


def _found(partition: Partition, suspects: int) -> str:
    number = f"{len(partition):,}"
    if partition.status is PartitionStatus.INCONCLUSIVE and not suspects:
        return f"Nothing is known about the {number} training samples, and nothing was changed: {partition.warning}."
    if not suspects:
        found = f"No sign of noise in the {number} training samples: nothing was changed."
        if partition.noise_rate_interval is not None:
            found = f"All of the {number} training samples count as clean, nothing was changed: {partition.warning}."
        return f"{found} The table with suspects_only=False (Partition.to_csv) has them by doubt."
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


def _gained(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "Without validation data it is not known whether it helped."
    gain = after - before
    text = f"Validation accuracy {before:.3f} before, {after:.3f} after: {100 * gain:+.1f} points"
    if gain <= -_POINTS:
        return f"{text}, a loss. Check the suspects before you use this model."
    if gain < _POINTS:
        return f"{text}, no gain to speak of."
    return f"{text}; a fit that trains on with the same steps tells how much of that is due to the repair."
