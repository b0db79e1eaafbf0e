"""What a fit with repair comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

# On validation data, less is no gain: training on would have moved it as much.
_POINTS = 0.003


def verdict_of(before: float, after: float, best: float | None = None, samples: int | None = None) -> str:
    """Return whether accuracy was gained, against the better one of those before, in words.

    A difference within one standard error of the accuracy is neither a gain nor a loss.

    Args:
        before: at the partition.
        after: at the end of the fit.
        best: of the fit's validations before the partition; None where it is not known.
        samples: in the validation set; None where not known.

    Example:
        >>> verdict_of(0.7, 0.8), verdict_of(0.7, 0.8, 0.799), verdict_of(0.7, 0.8, 0.9)
        ('a gain', 'no meaningful gain', 'a loss')
        >>> verdict_of(0.953, 0.943, samples=300), verdict_of(0.953, 0.943, samples=3000)
        ('no meaningful change', 'a loss')
    """
    before = max(before, before if best is None else best)
    # Rounded, as points are shown to a tenth.
    gain, error = round(after - before, 6), standard_error(before, samples)
    if _POINTS <= abs(gain) < error:
        return "no meaningful change"
    if gain <= -_POINTS:
        return "a loss"
    return "no meaningful gain" if gain < _POINTS else "a gain"


def standard_error(accuracy: float, samples: int | None) -> float:
    """Return that of an accuracy, 0 where the number of samples is not known."""
    return math.sqrt(accuracy * (1 - accuracy) / samples) if samples else 0.0


@dataclass(frozen=True)
class PartitionRound:
    """One of the partitions of a fit that computes several.

    Args:
        epoch: how many epochs were complete.
        suspects: how many samples were not clean.
        noise_rate: estimated share of samples that are not clean; None where it is not known.
        changed: share of the samples that were on the other side the time before; 1 for the first.
    """

    epoch: int
    suspects: int
    noise_rate: float | None
    changed: float


@dataclass(frozen=True)
class RepairSummary:
    """What was found, what was done about it, and what came of it.

    Args:
        samples: N.
        suspects: how many samples the last partition does not call clean.
        noise_rate: its estimate; None where it is not known.
        memorized: share of the samples suspected for their label to which the network gave that label when the first
            partition that was acted upon was computed; None if there were none.
        done: what the callbacks did, a clause for each.
        accuracy_before: on the validation data at the same time; None where it is not known.
        best_accuracy_before: the best of the fit's own validations before it; None likewise.
        accuracy_after: likewise, at the end of the fit; of the averaged weights where a callback averages them.
        validation_samples: in the validation set at the end of the fit; None where not known.
        advice: all of this in one paragraph, with what it means.
    """

    samples: int
    suspects: int
    noise_rate: float | None
    memorized: float | None
    done: tuple[str, ...]
    accuracy_before: float | None
    best_accuracy_before: float | None
    accuracy_after: float | None
    validation_samples: int | None
    advice: str
