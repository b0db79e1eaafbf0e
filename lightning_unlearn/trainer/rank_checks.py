"""Check that all ranks have the same data."""

from __future__ import annotations

import torch

from lightning_unlearn.data.fingerprint import MOST_CHANGED, share_changed
from lightning_unlearn.data.row_order import Rows
from lightning_unlearn.trainer.context import FitContext


def check_same_on_ranks(fit: FitContext, what: str, differs: bool, of: str = "training") -> None:
    """Raise an error if the data of ranks differ. Every rank must call it.

    Args:
        fit: the fit that is starting.
        what: what differs from rank 0, for the message.
        differs: whether it differs on this rank.
        of: ``"training"`` or ``"validation"``.

    Raises:
        ValueError: on every rank.
    """
    ranks = int(fit.reduce(torch.tensor([float(differs)])).item())
    if ranks:
        raise ValueError(
            f"Expected every rank to have the same {of} data in the same order, but {ranks} of"
            f" {fit.world_size} ranks have {what} than rank 0, as where a data set is shuffled, split or sampled"
            " without a seed; make it in the same way on every rank (seed_everything, or a generator with a seed), and"
            " leave it to the sampler to share it out."
        )


def check_ranks(
    fit: FitContext, total: int, found: str = "", labels: Rows | None = None, *, of: str = "training"
) -> None:
    """Compare this rank's data with those of rank 0: their number, and, where given, what was looked at of them.

    Args:
        fit: that begins.
        total: N.
        found: the fingerprint of the data.
        labels: of the same samples on every rank.
        of: ``"training"`` or ``"validation"``.

    Raises:
        ValueError: on every rank, if one has other data.
    """
    if fit.world_size == 1:
        return
    here = (total, found, {} if labels is None else labels.label_of())
    first = fit.broadcast(here)
    check_same_on_ranks(fit, "a different number of samples", first[0] != total, of)
    # Those looked at are others where ranks have another batch size.
    differ = any(first[2].get(index, label) != label for index, label in here[2].items())
    check_same_on_ranks(fit, "different labels at the same indices", differ, of)
    check_same_on_ranks(fit, "different items at the same indices", share_changed(first[1], found) > MOST_CHANGED, of)
