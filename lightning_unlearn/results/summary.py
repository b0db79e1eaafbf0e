"""The summary of a fit: what was found, what was done, and whether it helped."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A smaller difference on validation data is not a gain: continued training would have changed it as much.
_POINTS = 0.003


def verdict_of(before: float, after: float, best: float | None = None, samples: int | None = None) -> str:
    """Return whether accuracy was gained over the better of the accuracies before, in words.

    A difference within one standard error of the accuracy is neither a gain nor a loss.

    Args:
        before: accuracy at the partition.
        after: accuracy at the end of the fit.
        best: best validation accuracy of the fit before the partition; None if unknown.
        samples: size of the validation set; None if unknown.

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
    """Return the standard error of an accuracy; 0 if the number of samples is unknown."""
    return math.sqrt(accuracy * (1 - accuracy) / samples) if samples else 0.0


@dataclass(frozen=True)
class PartitionRound:
    """One of several partitions of a fit (``every_n_epochs``).

    Args:
        epoch: number of complete epochs.
        suspects: number of samples that are not clean.
        noise_rate: estimated share of samples that are not clean; None if unknown.
        changed: share of the samples that changed group since the previous partition; 1 for the first.
    """

    epoch: int
    suspects: int
    noise_rate: float | None
    changed: float


@dataclass(frozen=True)
class RepairSummary:
    """What was found, what was done about it, and the result.

    Args:
        samples: N.
        suspects: number of suspects in the last partition.
        noise_rate: estimated noise rate of the last partition; None if unknown.
        memorized: share of the suspect labels that the network predicted when the first partition that was acted on was
            computed; None if there were none.
        done: what the callbacks did, one clause each.
        accuracy_before: validation accuracy at that partition; None if unknown.
        best_accuracy_before: best validation accuracy of the fit before that partition; None if unknown.
        accuracy_after: validation accuracy at the end of the fit, of the averaged weights if a callback averages them;
            None if unknown.
        validation_samples: size of the validation set at the end of the fit; None if unknown.
        advice: a paragraph with all of this and its interpretation.
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
