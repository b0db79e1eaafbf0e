"""What may be done with a partition."""

from __future__ import annotations

from enum import Enum
from typing import Any

from lightning_unlearn.utilities.checks import shown


class PartitionStatus(str, Enum):
    """What may be done with a partition; all but ``OK`` is not acted on, and ``Partition.warning`` says why."""

    OK = "ok"
    """Some samples are suspect, and every class keeps clean ones."""
    ALL_CLEAN = "all_clean"
    """There is no sign of noise; wrong labels between classes that are easily confused would not show."""
    REVIEW_ONLY = "review_only"
    """Labels look wrong, but no list of suspects is sure enough to act upon; people may look at the ranking."""
    TOO_EARLY = "too_early"
    """It was drawn after a single epoch, in which a network has learned little."""
    NONE_CLEAN = "none_clean"
    """Every sample is suspect."""
    CLASS_LOST = "class_lost"
    """Every sample of some class is suspect."""
    INCONCLUSIVE = "inconclusive"
    """Nothing can be told, as where the network has hardly learned; ``clean_probability`` ranks at best."""

    def __str__(self) -> str:
        return self.value


def checked_status(given: Any, warning: str) -> PartitionStatus:
    """Return the status, of which a file or a checkpoint holds the text.

    Args:
        given: the status, or its text.
        warning: of the partition; with one, ``OK`` is ``INCONCLUSIVE``.

    Raises:
        ValueError: for another.
    """
    try:
        status = PartitionStatus(given)
    except ValueError as error:
        known = ", ".join(repr(one.value) for one in PartitionStatus)
        raise ValueError(f"status must be one of {known}, but is {shown(given)}.") from error
    return PartitionStatus.INCONCLUSIVE if warning and status is PartitionStatus.OK else status
