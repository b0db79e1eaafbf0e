"""Refuses, before the first step, loaders whose rows are not the samples drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.loaders import batch_size, detached_copy, iterate_indices
from lightning_unlearn.data.row_order import (
    ALONE,
    ItemByItem,
    Rows,
    compare,
    joined,
    row_hashes,
    sample_batches,
    shuffled,
)
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.trainer.row_counts import check_number, name_of

if TYPE_CHECKING:
    from lightning_unlearn.trainer.context import FitContext

# So often other samples are taken where those before were all alike.
_ATTEMPTS = 4
# So often it is looked whether items of themselves are others from one reading to the next.
_AGAIN = 4
Transfer = Callable[[Any], Any]


class _OtherNumber(Exception):
    """A batch has not one row for each sample drawn."""


@torch.no_grad()
def establish_rows(fit: FitContext, loader: DataLoader[Any], *, may_offer: bool = True) -> Rows:
    """Check that the rows of the loader's batches are the samples drawn, in that order. Within ``isolated_eval``.

    Args:
        fit: that is running, which knows by now how batches are read.
        loader: of the training set.
        may_offer: whether the passes may draw from another loader, which the user may offer.

    Returns:
        what was looked at.

    Raises:
        TypeError: where they are not, naming what is likely to be in the way.
    """
    task_format, transfer = fit.task_format, fit.to_device
    total, size = len(loader.dataset), batch_size(loader)  # type: ignore[arg-type]  # its length has been checked
    for attempt in range(_ATTEMPTS):
        batches = sample_batches(total, size, attempt)
        look = _Look(task_format, batches)
        fault = look.fault(loader, transfer)
        if fault:
            raise TypeError(f"{_EXPECTED} {_culprit(look, loader, transfer, fault, may_offer)}.")
        if look.tells:
            break
    _check_last_batch(fit, loader, may_offer)
    fit.memory.established.add(loader)
    return look.first


def establish_rows_again(fit: FitContext) -> None:
    """Check the rows of a train loader that was made again since. Every rank must call it.

    Raises:
        TypeError: as :func:`establish_rows`.
    """
    loader = fit.train_loader
    if loader in fit.memory.established or fit.offers_scoring_loader:
        return
    with fit.isolated_eval():
        establish_rows(fit, loader)


def _check_last_batch(fit: FitContext, loader: DataLoader[Any], may_offer: bool) -> None:
    """Check a smaller batch, as a pass ends with: a collate function may make another number of rows of it."""
    last = math.ceil(len(loader.dataset) / fit.world_size) % batch_size(loader)  # type: ignore[arg-type]
    if last:
        _, batch = next(iterate_indices(loader, torch.arange(last), probing=True, size=last, absent=set()))
        check_number(loader, fit.task_format.split(fit.to_device(batch))[1], last, may_offer)


_SAME_SAMPLE = (
    "return the same sample for an index every time (None, which collate_fn leaves out, for one that cannot be read)"
)
_EXPECTED = "Expected the rows of a batch to be the samples that were drawn for it, in that order, but"


class _Look:
    """Some samples, fetched in two orders and alone.

    Args:
        task_format: knows how batches are read.
        batches: of dataset indices.
    """

    def __init__(self, task_format: TaskFormat, batches: Sequence[Tensor]) -> None:
        self._reading = task_format
        self._batches = batches
        self.tells = False
        self.first: Rows

    def fault(self, loader: DataLoader[Any], transfer: Transfer) -> str:
        """Return what is wrong with the rows and what causes it, in a clause; empty if nothing is wrong."""
        try:
            return self._fault(loader, transfer)
        except _OtherNumber as other:
            return f"makes {other}"

    def _fault(self, loader: DataLoader[Any], transfer: Transfer) -> str:
        self.first = self._read(loader, transfer, self._batches)
        found = compare(self.first, self._read(loader, transfer, shuffled(self._batches)))
        wrong = max(found.labels, found.moved)
        if not wrong:
            wrong = self._compare_alone(loader, transfer, found.kept)
        if not wrong and not found.kept:
            # Random augmentation, or the rows are all alike.
            steady = _by_item(loader, seeded=True)
            one = self._read(steady, transfer, self._batches)
            seeded = compare(one, self._read(steady, transfer, shuffled(self._batches)))
            wrong, self.tells = seeded.moved, found.tells or seeded.tells
        else:
            self.tells = found.tells
        return (
            f"puts {wrong} of the {len(self.first.index)} rows checked in the place of other samples" if wrong else ""
        )

    def _read(
        self, loader: DataLoader[Any], transfer: Transfer, batches: Sequence[Tensor], size: int | None = None
    ) -> Rows:
        read: list[Rows] = []
        absent: set[int] = set()
        index = torch.cat(list(batches))
        for indices, batch in iterate_indices(loader, index, probing=True, size=size, absent=absent):
            x, label = self._reading.split(transfer(batch))
            if hasattr(label, "__len__") and len(label) != len(indices):
                raise _OtherNumber(f"{len(label)} rows of {len(indices)} samples")
            labels = self._reading.classes(label, len(indices)).cpu().reshape(len(indices), -1)
            # What stands in for a sample that is None is another's.
            there = [place for place, drawn in enumerate(indices.tolist()) if drawn not in absent]
            hashes = {name: [rows[place] for place in there] for name, rows in row_hashes(x, len(indices)).items()}
            read.append(Rows(indices[there], labels[there], hashes))
        return joined(read)

    def _compare_alone(self, loader: DataLoader[Any], transfer: Transfer, kept: frozenset[str]) -> int:
        """Count the samples with another label, or that are what another index had, when fetched alone."""
        few = torch.cat(list(self._batches))[:ALONE]
        try:
            alone = self._read(loader, transfer, [few], size=1)
        except (_OtherNumber, TypeError, ValueError, IndexError, RuntimeError):
            # A batch of one may be a case of its own to who made the loader for larger ones.
            return 0
        known, found = self.first.label_of(), alone.label_of()
        labels = sum(known[index] != label for index, label in found.items())
        moved = [_moved(alone, self.first, name) for name in kept]
        # A part that is as it was speaks for all.
        return max(labels, 0 if None in moved else max((number or 0 for number in moved), default=0))


def _moved(alone: Rows, together: Rows, name: str) -> int | None:
    """Return how many samples that were fetched alone are what another index had, by a part of the input.

    None where each is what it was. Padding, which a sample has only among longer ones, makes it another thing.
    """
    inside, rows = together.columns[name], alone.columns.get(name, [])
    own = dict(zip(together.index.tolist(), inside, strict=True))
    pairs = [(row, own[index]) for index, row in zip(alone.index.tolist(), rows, strict=False)]
    if pairs and all(row == mine for row, mine in pairs):
        return None
    return len([row for row, mine in pairs if row != mine and row in inside])


def _culprit(look: _Look, loader: DataLoader[Any], transfer: Transfer, fault: str, may_offer: bool) -> str:
    """Name the cause: the first step without which the rows are right, what it does wrong, and what to do."""
    offer = ", or offer attribution_dataloader(), a loader of the same samples that keeps it" if may_offer else ""
    if not _is_faulty(look, _by_item(loader, seeded=True), transfer):
        data, each = type(loader.dataset).__name__, _by_item(loader, seeded=False)
        # More than once, as what comes by chance may not come again.
        if not hasattr(loader.dataset, "__getitems__") or any(_is_faulty(look, each, transfer) for _ in range(_AGAIN)):
            return f"{data}.__getitem__ {fault}; {_SAME_SAMPLE}"
        return f"{data}.__getitems__ {fault}; return the items in the order asked for"
    plain = detached_copy(loader)
    plain.__class__ = DataLoader
    for name, (without, moved), advice in (
        (
            "a transfer hook (on_before_batch_transfer, on_after_batch_transfer)",
            (loader, _as_it_is),
            "let it keep their order where self.trainer.training is False",
        ),
        (f"{type(loader).__name__}.__iter__", (plain, _as_it_is), "use torch's DataLoader"),
    ):
        if not _is_faulty(look, without, moved):
            return f"{name} {fault}; {advice}"
    return f"{name_of(loader.collate_fn)} {fault}; keep one row for each sample, in the order given{offer}"


def _by_item(loader: DataLoader[Any], *, seeded: bool) -> DataLoader[Any]:
    """Return the loader with its data set asked for one item after the other."""
    other = detached_copy(loader)
    other.__dict__["dataset"] = ItemByItem(loader.dataset, seeded=seeded)
    return other


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_faulty(look: _Look, loader: DataLoader[Any], transfer: Transfer) -> bool:
    try:
        return bool(look.fault(loader, transfer))
    except Exception:  # of whatever kind: what a stage needs of those left out cannot be known
        return True
