"""What is found about the labels of a training set, in words."""

from __future__ import annotations

from lightning_unlearn.recipes.verdict import NoiseEstimate
from lightning_unlearn.types import Partition

# So many pairs of classes are named in the log.
_MOST_NAMES = 3
_NEARLY_ALL = 0.95

_NO_LIST = (
    "no list of suspects can be made from this fit; errors among classes that are easily confused would not show; the"
    " review list ranks all samples all the same"
)

_LISTED = "listed for review, not acted upon"


def rate_in_words(rate: float, interval: tuple[float, float]) -> str:
    """How many labels look wrong; a lower bound where the upper end is not known.

    The upper end holds for errors that fall on any class alike. Those of people lie between similar classes, where they
    look like uncertainty: 9 % of them were called 4 % (``benchmarks/results/detection-in-a-fit.md``).

    Example:
        >>> rate_in_words(0.03, (0.019, 0.044))
        'about 3.0% of the labels look wrong (1.9% to 4.4%; more if similar classes are confused)'
        >>> rate_in_words(0.03, (0.019, 1.0))
        'at least 1.9% of the labels look wrong'
    """
    low, high = interval
    if high >= 1:
        return f"at least {low:.1%} of the labels look wrong"
    ends = f"{low:.1%} to {high:.1%}; more if similar classes are confused"
    return f"about {rate:.1%} of the labels look wrong ({ends})"


def precision_in_words(expected: float) -> str:
    """How many of a list are expected to be wrong.

    Example:
        >>> precision_in_words(0.86), precision_in_words(0.98)
        ('about 9 in 10 expected to be wrong', 'nearly all expected to be wrong')
    """
    if expected >= _NEARLY_ALL:
        return "nearly all expected to be wrong"
    return f"about {max(1, round(10 * expected))} in 10 expected to be wrong"


def finding_of(noise: NoiseEstimate, partition: Partition) -> str:
    """What was found, in one sentence without its end.

    Args:
        noise: what is estimated.
        partition: that follows from it.
    """
    if noise.status == "none":
        return _NO_LIST
    worth = partition.worth_review()
    if noise.status == "weak":
        return caveat_of(noise, worth)
    named = "none of them surely enough to act upon"
    if partition.expected_precision is not None:
        suspects = len(partition.suspect_indices())
        named = f"{suspects:,} suspects, {precision_in_words(partition.expected_precision)}"
    said = [rate_in_words(noise.rate, noise.interval), named]
    if worth:
        said.append(f"the next {worth:,} are worth a look")
    for given, other, share in noise.names[:_MOST_NAMES]:
        said.append(f"class {given} is often called {other} ({share:.0%})")
    return "; ".join(said)


def caveat_of(noise: NoiseEstimate, worth: int) -> str:
    """What may be wrong though no sample is suspect.

    Args:
        noise: what is estimated.
        worth: how many samples are worth a look.
    """
    if noise.status == "weak":
        many = f"{worth:,} labels are worth a look" if worth else "labels may be wrong"
        if noise.shifted:
            return f"{many}, but class weights or a balanced sampler shift the outputs: {_LISTED}"
        if noise.names:
            return f"{many}, but no early epoch shows whether classes go by other names or are hard to tell: {_LISTED}"
        return f"{many}, too few signs to act on (z {noise.z_score:.1f}): {_LISTED}"
    if noise.status == "none":
        return _NO_LIST
    return f"{rate_in_words(noise.rate, noise.interval)}, none of them surely enough to act upon"
