"""Whether keys are of use: each of one sample, and the same one in every epoch."""

from __future__ import annotations

from torch import Tensor

from lightning_unlearn.data.loaders import MIN_SAMPLES
from lightning_unlearn.evidence.by_key import EpochOfKeys
from lightning_unlearn.trainer.progress import rank_zero_warn

# Of the rows of an epoch: so many may come twice, as where ranks fill up their shares.
_OFTEN = 0.05
# Of the samples of an epoch: fewer that came before are few.
_FEW = 0.5

_STABLE = (
    "give each sample a key of its own that is the same in every epoch, such as the name of its file, or its number in"
    " its shard together with the name of the shard; not a count of what has been drawn, nor a random number"
)


def check_epoch(epoch: EpochOfKeys, number: int) -> None:
    """Look at the keys of an epoch. Every rank must call it, with the same.

    Args:
        epoch: what they were.
        number: of the epoch with evidence, counted from 1.

    Raises:
        ValueError: for keys that are of no use.
    """
    if epoch.relabeled:
        raise ValueError(relabeled(epoch.relabeled, epoch.example))
    if 0 < epoch.distinct < MIN_SAMPLES:
        raise ValueError(
            f"Expected the keys of at least {MIN_SAMPLES} samples in an epoch, but its {epoch.rows:,} rows have"
            f" {epoch.distinct}; {_STABLE}."
        )
    if number == 1 and epoch.rows - epoch.distinct > _OFTEN * epoch.rows:
        rank_zero_warn(
            f"The {epoch.rows:,} rows of the first epoch have {epoch.distinct:,} keys: that is right where samples are"
            f" drawn more than once; else {_STABLE}."
        )
    if epoch.before and not epoch.again and epoch.distinct:
        raise ValueError(
            f"Expected samples to come again under the keys that they had before, but none of the {epoch.distinct:,}"
            f" keys of this epoch is among the {epoch.before:,} of earlier ones, so nothing would be known of a sample"
            f" when it comes again; {_STABLE}. Where a stream is so long that no sample comes twice, let an epoch be a"
            " part of it that is gone through again."
        )
    if number == 2 and epoch.again < _FEW * epoch.distinct:
        rank_zero_warn(
            f"Only {epoch.again:,} of the {epoch.distinct:,} samples of this epoch came in the one before by their"
            " keys: what is known of a sample that comes once tells little, and samples that are new after the"
            f" partition are trained on as they are. If they should have come, {_STABLE}."
        )


def relabeled(count: int, example: str) -> str:
    """Return what is said of a key that comes with several labels."""
    shown, rows = f" ({example})" if example else "", "row has" if count == 1 else "rows have"
    return (
        f"Expected a key to be of one sample, which keeps its label, but {count:,} {rows} another label than the one"
        f" seen before under the same key{shown}; {_STABLE}. It looks the same where a transfer hook reorders a batch,"
        " or where labels are drawn anew."
    )


def fault_of_first_batch(keys: list[object], label: Tensor) -> str:
    """Return why the keys of the first batch cannot be those of samples; empty if they can.

    Args:
        keys: B.
        label: (B,) int64, or (B, L) of a multi-label task.
    """
    if len(keys) != len(label):
        return (
            f"Expected a key for each of the {len(label)} samples of a batch, but sample_key has {len(keys)}; name a"
            " field that has one for each, or let the function return as many."
        )
    known: dict[object, list[int]] = {}
    for key, given in zip(keys, label.reshape(len(label), -1).tolist(), strict=True):
        if known.setdefault(key, given) != given:
            return relabeled(1, f"{key!r} is called {known[key]} and {given}".replace("[", "").replace("]", ""))
    return ""
