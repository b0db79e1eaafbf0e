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
    "give each sample a unique key that is the same in every epoch, such as its file name, or its"
    " shard and its position in the shard; do not use a running count or a random number"
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
            f"Expected the keys of at least {MIN_SAMPLES} samples per epoch, but the {epoch.rows:,} rows of"
            f" this epoch have {epoch.distinct} distinct keys; {_STABLE}."
        )
    if number == 1 and epoch.rows - epoch.distinct > _OFTEN * epoch.rows:
        rank_zero_warn(
            f"The {epoch.rows:,} rows of the first epoch have {epoch.distinct:,} distinct keys. This is"
            f" correct if samples are drawn more than once; otherwise {_STABLE}."
        )
    if epoch.before and not epoch.again and epoch.distinct:
        raise ValueError(
            f"Expected samples to return with the same key, but none of the {epoch.distinct:,} keys of this"
            f" epoch is among the {epoch.before:,} keys of earlier epochs, so no evidence can be collected per"
            f" sample; {_STABLE}. If the stream is so long that no sample returns, define an epoch as a part"
            " of it that is repeated."
        )
    if number == 2 and epoch.again < _FEW * epoch.distinct:
        rank_zero_warn(
            f"Only {epoch.again:,} of the {epoch.distinct:,} samples of this epoch were in the previous one,"
            " by their keys. A sample that is seen once gives little evidence, and samples that first appear"
            f" after the partition are trained on unchanged. If they should have returned, {_STABLE}."
        )


def relabeled(count: int, example: str) -> str:
    """Return what is said of a key that comes with several labels."""
    shown, rows = f" ({example})" if example else "", "row has" if count == 1 else "rows have"
    return (
        f"Expected each key to identify one sample with a fixed label, but {count:,} {rows} a different"
        f" label than before under the same key{shown}; {_STABLE}. The same happens if a transfer hook"
        " reorders a batch, or if labels are random."
    )


def fault_of_first_batch(keys: list[object], label: Tensor) -> str:
    """Return why the keys of the first batch cannot be those of samples; empty if they can.

    Args:
        keys: B.
        label: (B,) int64, or (B, L) of a multi-label task.
    """
    if len(keys) != len(label):
        return (
            f"Expected one key per sample, but sample_key gave {len(keys)} keys for a batch of {len(label)}"
            " samples; name a field with one key per sample, or return as many from the function."
        )
    known: dict[object, list[int]] = {}
    for key, given in zip(keys, label.reshape(len(label), -1).tolist(), strict=True):
        if known.setdefault(key, given) != given:
            return relabeled(1, f"{key!r} has the labels {known[key]} and {given}".replace("[", "").replace("]", ""))
    return ""
