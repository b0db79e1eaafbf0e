"""What a partition says of the labels, in words, and what their classes are called."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.status import PartitionStatus

# So many pairs of classes are named.
_MOST_NAMES = 3
_NEARLY_ALL = 0.95
_LEAST_TOLD = 0.0005  # which is .1 %


def finding_of(partition: Partition, class_names: Sequence[str] = ()) -> str:
    """Return what is found, in one sentence without its end: how many labels look wrong, and the two lists.

    Args:
        partition: of the training set.
        class_names: by label; by default the partition's own, where they are known.
    """
    class_names = class_names or partition.class_names
    suspects = len(partition) - int(partition.is_clean.sum())
    if partition.noise_rate_interval is None:
        if not suspects and partition.status is PartitionStatus.INCONCLUSIVE:
            return "nothing is known about the samples"  # the warning says why
        return f"{suspects:,} of {len(partition):,} samples are suspect{_estimated(partition)}"
    if not suspects or partition.noise_rate is None:
        return f"{suspects:,} suspects" if suspects else "no suspects"
    has_inputs = bool((partition.reason >= REASONS.index("input")).any())
    what = "samples" if has_inputs else "labels"
    said = [
        rate_in_words(partition.noise_rate, partition.noise_rate_interval, what),
        f"{suspects:,} suspect{'s' if suspects > 1 else ''}{precision_in_words(partition)}",
        *worth_in_words(partition),
    ]
    for true, called, share in partition.often_called[:_MOST_NAMES]:
        pair = f"class {true}", str(called)
        if max(true, called) < len(class_names):
            pair = f"'{class_names[true]}'", f"'{class_names[called]}'"
        said.append(f"{pair[0]} is often labeled {pair[1]} ({share:.0%})")
    return "; ".join(said)


def _estimated(partition: Partition) -> str:
    return "" if partition.noise_rate is None else f", estimated noise rate {partition.noise_rate:.1%}"


def rate_in_words(rate: float, interval: tuple[float, float], what: str = "labels") -> str:
    """Return how many look wrong; without an upper end where it is not known.

    It is known for errors that fall on any class alike. Those of people lie between similar classes, where they look
    like uncertainty: 9 % of them were called 6 % (``benchmarks/results/detection-cpu.md``).

    Example:
        >>> rate_in_words(0.03, (0.019, 0.044))
        'about 3.0% of the labels (1.9% to 4.4%) look wrong'
        >>> rate_in_words(0.03, (0.019, 1.0))
        'about 3.0% of the labels look wrong (at least 1.9%)'
    """
    return f"about {rate:.1%} of the {what}{_ends(interval)} look wrong{at_least(interval)}"


def _ends(interval: tuple[float, float]) -> str:
    low, high = interval
    return "" if high >= 1 else f" ({low:.1%} to {high:.1%})"


def at_least(interval: tuple[float, float]) -> str:
    """Return the lower end, in parentheses after a space, where the upper one is not known; empty if it is none."""
    low, high = interval
    return f" (at least {low:.1%})" if high >= 1 and low >= _LEAST_TOLD else ""


def precision_in_words(partition: Partition) -> str:
    """Return how many of the suspects are expected to be wrong, after a comma; empty where that is not known."""
    expected = partition.expected_precision
    if expected is None:
        return ""
    return f", {share_in_words(expected)} expected to be wrong"


def share_in_words(share: float) -> str:
    """Put a share into words.

    Example:
        >>> share_in_words(0.84), share_in_words(0.97)
        ('about 8 in 10', 'nearly all')
    """
    return "nearly all" if share >= _NEARLY_ALL else f"about {max(1, round(10 * share))} in 10"


def worth_in_words(partition: Partition) -> list[str]:
    """Say that samples beyond the suspects are worth a look, as a clause; empty where none are."""
    worth = partition.worth_review()
    if not worth:
        return []
    return [f"the next {worth:,} are worth a look" if worth > 1 else "the next one is worth a look"]


def epochs_in_words(number: int) -> str:
    """Put a number of epochs into words."""
    return f"{number} epoch{'' if number == 1 else 's'}"
