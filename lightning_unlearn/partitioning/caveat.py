"""What may be wrong with the labels of a training set though no sample is suspect, in words."""

from __future__ import annotations

from lightning_unlearn.recipes.base import NoiseEstimate
from lightning_unlearn.results.finding import rate_in_words

_NO_LIST = (
    "no suspects were found in this fit (errors between easily confused classes may go undetected);"
    " the review list still ranks all samples"
)

_LISTED = "listed for review, not acted upon"


def caveat_of(noise: NoiseEstimate, worth: int) -> str:
    """Return why suspects are not acted on, as a clause.

    Args:
        noise: the noise estimate.
        worth: number of samples that are worth a look.
    """
    if noise.status == "none":
        return _NO_LIST
    if noise.status == "found":
        rate = rate_in_words(noise.rate, noise.interval)
        return f"{rate}, but no list reaches suspect_precision"
    many = f"{worth:,} labels are worth a look" if worth else "labels may be wrong"
    if noise.sampled:
        return (
            f"{many}, but the sampler draws some classes more often, and their samples are memorized first: {_LISTED}"
        )
    if noise.names:
        return f"{many}, but no early epoch shows whether classes are mislabeled or hard to separate: {_LISTED}"
    return f"{many}, but the evidence is too weak to act on (z = {noise.z_score:.1f}): {_LISTED}"
