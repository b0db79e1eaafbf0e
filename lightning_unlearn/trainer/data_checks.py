"""Whether the training data are still those that the evidence is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.fingerprint import check_fingerprint, fingerprint, sampled_indices, varies
from lightning_unlearn.data.loaders import iterate_indices
from lightning_unlearn.data.row_order import Rows
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.rank_checks import check_ranks
from lightning_unlearn.trainer.row_checks import establish_rows
from lightning_unlearn.trainer.row_counts import check_numbers
from lightning_unlearn.trainer.scoring_loader import OFFER


@torch.no_grad()
def read_labels(fit: FitContext, loader: DataLoader[Any], index: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the labels of some samples, as batches hold them, with the dataset indices of each batch.

    Use inside ``isolated_eval``.

    Args:
        fit: that is running.
        loader: of the training set.
        index: (n,) int64, dataset indices.
    """
    batches = iterate_indices(loader, index, probing=True, absent=set())
    return [(indices, fit.task_format.split(fit.to_device(batch))[1]) for indices, batch in batches]


def class_labels(task_format: TaskFormat, read: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (U,) int64 on the CPU, the class labels of the rows of what :func:`read_labels` has read."""
    return torch.cat([task_format.labels(label, len(index), int(index[0])).cpu() for index, label in read])


def same_labels(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Return whether two readings of the same samples found the same labels; not so where samples are mixed."""
    return all(_same(label, again) for (_, label), (_, again) in zip(one, other, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    # Not torch.equal, to which NaN, a label that is missing, differs from itself.
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_reloaded(fit: FitContext, loader: DataLoader[Any], partition: Partition) -> None:
    """Refuse a loader, made again during the fit, in which an index means another sample than in the partition.

    Args:
        fit: that is running.
        loader: the new one.
        partition: that the fit goes by.

    Raises:
        ValueError: for another number of samples, or other labels of some that are looked at.
    """
    total, fault = len(loader.dataset), ""  # type: ignore[arg-type]  # its length has been checked
    index, task_format = sampled_indices(total), fit.task_format
    if total != len(partition):
        fault = f"it has {total} samples instead of {len(partition)}"
    else:
        with fit.isolated_eval():
            first, again = (read_labels(fit, loader, index) for _ in range(2))
            # Of samples that are mixed the labels say nothing.
            if not same_labels(first, again):
                return
            given = class_labels(task_format, first)
        if differ := int((given != partition.label.flatten()[task_format.row_indices(index)]).sum()):
            fault = f"{differ} of {len(given)} labels that were compared differ"
    if fault:
        raise ValueError(
            "Expected the reloaded train loader (reload_dataloaders_every_n_epochs) to have the samples of"
            f" the partition in the same order, but {fault}. Create the dataset once, in setup(), and only the"
            " loader anew."
        )


_AUGMENTED = (
    "The training set uses random augmentation, so passes score augmented samples. To score the originals, give the"
    f" DataModule or LightningModule a method {OFFER}() that returns a loader of the same samples, in the same order,"
    " without augmentation."
)

_MIXED = (
    "Expected a sample to have the same label on every read, but it differs, for example because"
    " samples are mixed (MixUp, CutMix). If collate_fn mixes them, let the DataModule define"
    f" {OFFER}(), a loader of the same samples in the same order without mixing; in a transfer hook,"
    " mix only if self.trainer.training."
)


@dataclass(frozen=True, eq=False)
class Recognized:
    """What the training data were found to be.

    Args:
        fingerprint: of the data set.
        rows: some samples, with their labels.
        train_fault: why the rows of training batches are not the samples drawn, where passes draw from another loader.
    """

    fingerprint: str
    rows: Rows
    train_fault: str = ""


def recognize_data(fit: FitContext, known: Tensor | None, before: str | None) -> Recognized:
    """Take the data's fingerprint, check that rows are samples, and compare with a checkpoint and the other ranks.

    Within ``isolated_eval``, so that where one rank refuses its data, all do.

    Args:
        fit: that begins.
        known: (N,) int64, the label of every row as a checkpoint has it; None in a fit from the start.
        before: the fingerprint in the checkpoint, or empty; None for no comparison.

    Raises:
        ValueError: for other data than before; for labels that vary from one reading to the next; where the loader that
            is offered for the passes has other labels; where ranks have different data.
        TypeError: where the rows of batches are not the samples drawn.
    """
    loader, task_format = fit.scoring_loader, fit.task_format
    index = sampled_indices(len(loader.dataset))  # type: ignore[arg-type]

    def read(of: DataLoader[Any]) -> list[tuple[Tensor, Tensor]]:
        return read_labels(fit, of, index)

    with fit.isolated_eval():
        found = fingerprint(loader)
        first = read(loader)
        check_numbers(loader, first)
        # Also where there is nothing to compare them with: one of them may not be of the task that the first batch
        # seemed to be of.
        given = class_labels(task_format, first)
        train_fault = ""
        if fit.offers_scoring_loader:
            train_fault = _fault_in_training(fit, read, None if known is not None else given)
        again = read(loader)
        if not same_labels(first, again):
            if given.sort().values.equal(class_labels(task_format, again).sort().values):
                # The same ones in another order, which is said better there.
                establish_rows(fit, loader)
            raise ValueError(_MIXED)
        if known is not None:
            check_same_labels(known[task_format.row_indices(index)], given)
        if before is not None:
            check_fingerprint(before, found)
        rows = establish_rows(fit, loader)
    check_ranks(fit, len(loader.dataset), found, rows)  # type: ignore[arg-type]
    if varies(found):
        rank_zero_info(_AUGMENTED)
    return Recognized(found, rows, train_fault)


def _fault_in_training(
    fit: FitContext, read: Callable[[DataLoader[Any]], list[tuple[Tensor, Tensor]]], offered: Tensor | None
) -> str:
    """Return why rows of training batches are not the samples drawn; passes that draw from elsewhere may go on.

    Args:
        fit: that begins.
        read: the labels of some samples, from a loader.
        offered: these labels in the loader that is offered for the passes; None for no comparison.

    Raises:
        ValueError: where the two loaders have other labels.
    """
    loader = fit.train_loader
    first = read(loader)
    if not same_labels(first, read(loader)):
        # Samples are mixed in training, which the offer is there to spare the passes.
        return ""
    try:
        establish_rows(fit, loader)
    except TypeError as error:
        return str(error)
    if offered is not None and (differ := int((class_labels(fit.task_format, first) != offered).sum())):
        raise ValueError(
            f"Expected {OFFER}() to return a loader of the training set's samples in the same order, but {differ}"
            f" of {len(offered)} labels that were compared differ."
        )
    return ""


def check_same_size(before: int, now: int) -> None:
    """Refuse a training set of another length than that of the evidence so far.

    Raises:
        ValueError: with both numbers.
    """
    if before != now:
        raise ValueError(
            f"Expected the {before} training samples of the evidence collected so far, but the dataset now has"
            f" {now}. It must keep its length during a fit; resume with the data of the checkpoint, or start"
            " without it."
        )


def check_same_labels(before: Tensor, now: Tensor) -> None:
    """Refuse other labels than those seen before, of which -1 is none.

    Raises:
        ValueError: with the number of labels that have changed.
    """
    changed = int(((before >= 0) & (before != now)).sum())
    if changed:
        raise ValueError(
            f"Expected every dataset index to keep its label, but {changed} of {len(now)} changed since the"
            " last evidence pass. Labels must be fixed per index, also in a resumed fit."
        )


def check_labels_of_ranks(fit: FitContext, index: Tensor, differ: int) -> None:
    """Compare the labels that each rank's data have at some indices. Every rank must call it.

    Args:
        fit: that is running.
        index: (n,) int64, of samples that came with two labels, the same on every rank.
        differ: how many these are.

    Raises:
        ValueError: on every rank, if one has other labels than rank 0.
    """
    with fit.isolated_eval(), torch.no_grad():
        given = class_labels(fit.task_format, read_labels(fit, fit.scoring_loader, index))
    if fit.agree(not given.equal(fit.broadcast(given)), of_all=False):
        raise ValueError(other_labels_on_ranks(differ))


def other_labels_on_ranks(differ: int) -> str:
    """Return what is said of labels that are others on another rank."""
    return (
        f"Expected every rank to have the same labels at the same indices, but {differ} differ between the"
        " rank that trained on the sample and the rank that judges it, for example because a dataset is"
        " shuffled, split or given noise without a seed. Create it identically on every rank, with fixed"
        " labels per index."
    )


def same_task(before: str, now: str) -> str:
    """Return the task, if it is that of the checkpoint.

    Args:
        before: the checkpoint's; empty in a fit from the start.
        now: as the first batch looks.

    Raises:
        ValueError: naming both.
    """
    if before not in ("", now):
        raise ValueError(
            f"Expected a {before} task, as in the checkpoint, but the first batch has labels of a {now} task; give the"
            f" data it was made with, pass data=DataFormat(task='{before}') if these are its labels, or start again"
            " without it."
        )
    return now
