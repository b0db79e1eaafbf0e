"""What the three callbacks share: when they act, how they find each other, one pass over the training set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_unlearn.attribution import ForwardTrace, trace_forward
from lightning_unlearn.callbacks._layouts import settle_layout
from lightning_unlearn.callbacks._lightning import (
    callbacks_of,
    move_before_progress_bars,
    restore_order,
    to_device,
    undisturbed,
)
from lightning_unlearn.callbacks._neighbours import refuse_privacy
from lightning_unlearn.callbacks._packages import (
    EitherCallback,
    MisconfigurationException,
    has_forward,
    may_make_layers,
)
from lightning_unlearn.callbacks._progress import shown
from lightning_unlearn.callbacks._provenance import settings_of
from lightning_unlearn.callbacks._rows import check_batch, check_number
from lightning_unlearn.callbacks._scoring import scoring_loader, train_loader
from lightning_unlearn.callbacks._strategies import check_strategy
from lightning_unlearn.data.fingerprint import sampled_indices
from lightning_unlearn.data.loaders import batch_count, batch_size, check_iteration, indexed_batches, rank_share
from lightning_unlearn.data.task_format import IGNORED, Reading
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.protocols import PartitionSource
from lightning_unlearn.utilities.sharding import reshard

_MISSING_PARTNER = """{who} needs an AttributionPartitionCallback in the Trainer's callbacks, in any place, but found
{found}. Add it in Python:
    from lightning_unlearn import AttributionPartitionCallback
    trainer = Trainer(callbacks=[AttributionPartitionCallback(), {who}(...)])
or in YAML:
    trainer:
      callbacks:
        - class_path: lightning_unlearn.AttributionPartitionCallback
        - class_path: lightning_unlearn.{who}"""


def _has_pruned(state: dict[str, Any]) -> bool:
    return not state.get("is_proposal") and any(not mask["keep"].all() for mask in state.get("masks", ()))


def _has_narrowed(state: dict[str, Any]) -> bool:
    return state.get("draw") is not None


# Where one of ours has acted in a checkpoint and is missing in the fit that goes on from it: how its state tells, and
# what is lost.
_MISSED = {
    "SensitivityPruneCallback": (
        _has_pruned,
        "the neurons that it has pruned are no longer held at zero, and training may bring them back",
    ),
    "CleanSubsetFinetuneCallback": (
        _has_narrowed,
        "training goes on with all the data, all layers and the optimizer of configure_optimizers",
    ),
}


@dataclass(frozen=True, eq=False)
class IndexedBatch:
    """One batch of a pass in index order.

    Args:
        index: (B,) int64 on the CPU.
        weight: (B,) float32 on the batch's device, 0 for padding.
        x: the model's input.
        label: (U,) int64, class labels of the batch's rows, -1 for one that is to be ignored; the rows are the samples,
            but in a multi-label task (see :class:`~lightning_unlearn.data.task_format.Reading`).
    """

    index: Tensor
    weight: Tensor
    x: Any
    label: Tensor


class UnlearnCallback(EitherCallback):
    """Acts at the start of training and of every epoch, whenever :meth:`advance` finds that something is due.

    Both hooks, because after a resume Lightning may skip the second; and never at the end of an epoch, where a
    ModelCheckpoint would store changed weights under the metric of the unchanged ones.
    """

    seconds = 0.0
    """How long this callback's own work between epochs has taken since the fit was started or resumed."""
    # Of what ``state_dict`` describes; a checkpoint with another is not taken over.
    state_version = 1

    _fitting = False
    # What a checkpoint's state is to be put into that comes after on_fit_start, as where a strategy shards weights.
    _late: tuple[Trainer, LightningModule] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        self._late = None
        if not self._fitting:
            return
        self.seconds = 0.0
        check_strategy(trainer, type(self).__name__)
        # Trainer sets some of its attributes without declaring them.
        if overfit_batches := getattr(trainer, "overfit_batches", 0):
            raise MisconfigurationException(
                f"{type(self).__name__} needs all the training data, but the Trainer has"
                f" overfit_batches={overfit_batches}; set it to 0."
            )
        move_before_progress_bars(trainer, self)
        if trainer.current_epoch == 0:
            # A fit from the start, with callbacks that may have seen another; a checkpoint's state is loaded after
            # this.
            self.reset()
        self.check(trainer, pl_module)
        if not may_make_layers(pl_module):
            self.check_layers(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fitting and trainer.strategy.restore_checkpoint_after_setup:
            self._late = trainer, pl_module
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, UnlearnCallback)]
        if self._fitting and self is ours[0]:
            _warn_of_missing({callback.state_key for callback in ours}, checkpoint.get("callbacks", {}))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning also restores callbacks for test and validate, often from a checkpoint of an earlier epoch: what a
        # fit has found must not be lost to that.
        if self._fitting or not self.has_acted:
            self._restore_known(state_dict)
        if self._late is not None:
            self.resume(*self._late)
            self._late = None

    def _restore_known(self, state: dict[str, Any]) -> None:
        found, expected, who = state.get("version"), self.state_version, type(self).__name__
        if found == expected:
            self.restore(state)
            return
        said = f"Expected a state of {who} in format version {expected}, but the checkpoint has version {found}"
        if self._fitting:
            raise ValueError(
                f"{said}; go on with the version of lightning_unlearn that wrote it, or start again from its weights"
                " without ckpt_path."
            )
        rank_zero_warn(f"{said}; weights are not affected, but what {who} had found is not known here.")

    @property
    def has_acted(self) -> bool:
        """Whether there is a result that a user may ask for."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over the state that ``state_dict`` described."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets an earlier fit."""

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as primitives."""
        return settings_of(self)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses, before anything has run, what could not work later."""

    def check_layers(self, pl_module: LightningModule) -> None:
        """Refuses names of layers that there are not, or that cannot be what they are named for.

        When the callback is set up; for a module that may make layers in ``setup`` or ``configure_model``, which come
        later, when the fit starts.
        """

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses, before the first step, what only the loaders and a forward pass show."""

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up what a checkpoint's state says was under way; does nothing in a fit from the start."""

    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does what is due at this epoch boundary; a second call does nothing."""
        raise NotImplementedError

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives back what was borrowed for the fit."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done inside in :attr:`seconds`. Not around what asks another callback of ours."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_layers(pl_module)
        # Before the state of the optimizer is restored, which must find the optimizer that it belongs to.
        self.resume(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        refuse_privacy(trainer, pl_module, type(self).__name__)
        self.begin(trainer, pl_module)
        self.advance(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation may have left weights whole.
        reshard(pl_module)
        self.advance(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception.
        self._give_back(trainer, pl_module)

    def _give_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._late = None
        restore_order(trainer)
        self.undo(trainer, pl_module)
        self.let_go()


def _warn_of_missing(here: set[str], states: dict[str, Any]) -> None:
    for name, (has_acted, consequence) in _MISSED.items():
        if name in states and name not in here and has_acted(states[name]):
            rank_zero_warn(
                f"The checkpoint is of a fit in which {name} has acted, but the Trainer has none: {consequence}. Add it"
                " again, unless that is what you want."
            )


class PartitionConsumer(UnlearnCallback):
    """Acts on the partition that another callback of the Trainer publishes."""

    @override
    def reset(self) -> None:
        self._source: PartitionSource | None = None

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._source = find_partition_source(trainer, type(self).__name__)

    def confirm(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees to it that what was done still holds, before somebody says so."""

    def describe(self) -> str:
        """What was done, in one clause; empty where nothing was."""
        raise NotImplementedError

    def record(self, partition: Partition) -> dict[str, Any]:
        """What was done to which samples or neurons, by whoever says so.

        Args:
            partition: the one that was acted upon.
        """
        return {}

    def when_drawn(self) -> str:
        """When there will be a partition, as far as is known."""
        at_epoch = None if self._source is None else self._source.at_epoch
        return f"at epoch {at_epoch}" if isinstance(at_epoch, int) else "when the partition is drawn"

    @property
    def _is_dry_run(self) -> bool:
        return self._source is not None and self._source.is_dry_run

    def refuse_dry_run(self) -> None:
        """Refuses to call a fit a dry run that goes on from a checkpoint in which weights or data were changed.

        Raises:
            MisconfigurationException: saying what to do.
        """
        if self._is_dry_run:
            raise MisconfigurationException(
                f"action='report' changes nothing, but in the checkpoint {type(self).__name__} has acted already; set"
                " action='act', or resume from a checkpoint of before the partition."
            )

    @property
    def source(self) -> PartitionSource:
        """The callback that publishes the partition.

        Raises:
            RuntimeError: before a Trainer has set this callback up.
        """
        if self._source is None:
            raise RuntimeError(f"{type(self).__name__} must be set up by a Trainer first.")
        return self._source


def find_partition_source(trainer: Trainer, who: str) -> PartitionSource:
    """The one callback of the Trainer that publishes a partition.

    Raises:
        MisconfigurationException: if there is none or more than one; the message shows the lines to add.
    """
    sources = [callback for callback in callbacks_of(trainer) if isinstance(callback, PartitionSource)]
    if len(sources) != 1:
        raise MisconfigurationException(_MISSING_PARTNER.format(who=who, found=len(sources) or "none"))
    return sources[0]


def reading_of(source: PartitionSource) -> Reading:
    """How batches, outputs and labels are read."""
    return cast("Reading", source.reading)


def output_of(source: PartitionSource, pl_module: LightningModule, x: Any) -> Tensor:
    """The logits that ``forward`` returns, (B, K).

    Raises:
        TypeError: if the module has no ``forward``, or it takes another input or returns something else.
    """
    if not has_forward(pl_module):
        raise TypeError(
            f"Expected {type(pl_module).__name__} to have a forward that returns logits, but it has none; add"
            " `def forward(self, x): return self.net(x)`, which training_step may call too."
        )
    return reading_of(source).output(pl_module, x)


def logits_of(source: PartitionSource, pl_module: LightningModule, x: Any) -> Tensor:
    """Rows (U, C) of class logits; see :class:`~lightning_unlearn.data.task_format.Reading`."""
    return reading_of(source).logits(output_of(source, pl_module, x))


def probe(trainer: Trainer, pl_module: LightningModule, source: PartitionSource) -> tuple[ForwardTrace, IndexedBatch]:
    """One forward pass over the first samples, to fail before hours of training and to see what calls what."""
    with undisturbed(trainer, pl_module, keep=False):
        scoring_loader(trainer)
    with undisturbed(trainer, pl_module), torch.no_grad():
        check_iteration(train_loader(trainer))
        loader = scoring_loader(trainer)
        size = min(batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]  # its length has been checked
        absent: set[int] = set()
        indices, batch = next(indexed_batches(loader, torch.arange(size), probing=True, absent=absent))
        check_batch(loader, batch, len(indices))
        reading, batch = reading_of(source), to_device(trainer, pl_module, batch)

        def traced(value: Any) -> ForwardTrace:
            return trace_forward(pl_module, lambda x: output_of(source, pl_module, x), value)

        trace, x, label = settle_layout(reading, pl_module, batch, len(indices), traced)
    label = without(absent, indices, reading, reading.labels(label, len(indices)))
    return trace, IndexedBatch(indices, _is_there(absent, indices).float().to(label.device), x, label)


def without(absent: set[int], indices: Tensor, reading: Reading, label: Tensor) -> Tensor:
    """The labels (U,) of a batch, those of samples that are not there to be ignored."""
    gone = ~_is_there(absent, indices)
    return label.masked_fill(reading.by_row(gone).to(label.device), IGNORED) if gone.any() else label


def _is_there(absent: set[int], indices: Tensor) -> Tensor:
    return torch.tensor([index not in absent for index in indices.tolist()], dtype=torch.bool)


def check_classifies(trainer: Trainer, pl_module: LightningModule, trace: ForwardTrace) -> None:
    """Refuses networks that are trained in turns, as a GAN's, where ``forward`` may be any of them.

    Raises:
        MisconfigurationException: where one of several optimizers trains nothing that ``forward`` calls.
    """
    called = {parameter for call in trace.calls for parameter in call.module.parameters()}
    called |= set(pl_module.parameters(recurse=False))
    names = {parameter: name for name, parameter in pl_module.named_parameters()}
    for number, optimizer in enumerate(trainer.optimizers):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len(trainer.optimizers) > 1 and called.isdisjoint(trained):
            raise MisconfigurationException(
                f"Expected one network that classifies, but forward of {type(pl_module).__name__} calls nothing that"
                f" optimizer {number} trains ({', '.join(names.get(p, '?') for p in trained[:3])}, ...), as where a"
                " GAN's networks are trained in turns. If forward is the classifier all the same, name its layer with"
                " layer='...'."
            )


@torch.no_grad()
def read_labels(
    trainer: Trainer, pl_module: LightningModule, reading: Reading, loader: DataLoader[Any], index: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The labels of some samples, as batches hold them, with the dataset indices of each batch.

    Use inside ``undisturbed``.

    Args:
        trainer: of the running fit.
        pl_module: the user's.
        reading: knows how to split a batch.
        loader: of the training set.
        index: (n,) int64, dataset indices.
    """
    batches = indexed_batches(loader, index, probing=True, absent=set())
    return [(indices, reading.split(to_device(trainer, pl_module, batch))[1]) for indices, batch in batches]


def class_labels(reading: Reading, read: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(U,) int64 on the CPU, the class labels of the rows of what :func:`read_labels` has read."""
    return torch.cat([reading.labels(label, len(index), int(index[0])).cpu() for index, label in read])


def same_labels(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether two readings of the same samples found the same labels; not so where samples are mixed."""
    return all(_same(label, again) for (_, label), (_, again) in zip(one, other, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    # Not torch.equal, to which NaN, a label that is missing, differs from itself.
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_reloaded(
    trainer: Trainer, pl_module: LightningModule, source: PartitionSource, loader: DataLoader[Any], partition: Partition
) -> None:
    """Refuses a loader, made again during the fit, in which an index means another sample than in the partition.

    Args:
        trainer: of the running fit.
        pl_module: the user's.
        source: knows how to split a batch.
        loader: the new one.
        partition: that the fit goes by.

    Raises:
        ValueError: for another number of samples, or other labels of some that are looked at.
    """
    total, fault = len(loader.dataset), ""  # type: ignore[arg-type]  # its length has been checked
    index, reading = sampled_indices(total), reading_of(source)
    if total != len(partition):
        fault = f"it has {total} samples instead of {len(partition)}"
    else:
        with undisturbed(trainer, pl_module):
            first, again = (read_labels(trainer, pl_module, reading, loader, index) for _ in range(2))
            # Of samples that are mixed the labels say nothing.
            if not same_labels(first, again):
                return
            given = class_labels(reading, first)
        if differ := int((given != partition.label.flatten()[reading.row_indices(index)]).sum()):
            fault = f"{differ} of {len(given)} labels that were compared differ"
    if fault:
        raise ValueError(
            "Expected a train loader that is made again (reload_dataloaders_every_n_epochs) to have the samples of the"
            f" partition in the same order, but {fault}; make the data set once, in setup(), and the loader of it."
        )


def training_set(
    trainer: Trainer,
    pl_module: LightningModule,
    source: PartitionSource,
    title: str = "Evidence",
    absent: set[int] | None = None,
) -> Iterator[IndexedBatch]:
    """This rank's share of the training set in index order; see :func:`in_index_order`."""
    return in_index_order(trainer, pl_module, source, scoring_loader(trainer), title, absent)


@torch.no_grad()
def in_index_order(
    trainer: Trainer,
    pl_module: LightningModule,
    source: PartitionSource,
    loader: DataLoader[Any],
    title: str,
    absent: set[int] | None = None,
) -> Iterator[IndexedBatch]:
    """This rank's share of a loader's data set in index order. Use inside ``undisturbed``.

    A sample that the data set gives as None has a weight of 0 and no label.

    Args:
        trainer: of the running fit.
        pl_module: the user's.
        source: knows how to split a batch.
        loader: of samples that have an index.
        title: of the line in the progress bar.
        absent: takes the indices of such samples; those that it holds already count as such.

    Yields:
        batches, as many on every rank.
    """
    reading = reading_of(source)
    index, weight = rank_share(len(loader.dataset), trainer.global_rank, trainer.world_size)  # type: ignore[arg-type]
    absent = set() if absent is None else absent
    done, batches = 0, batch_count(loader, len(index))
    for indices, batch in shown(trainer, title, batches, indexed_batches(loader, index, absent=absent)):
        x, label = reading.split(to_device(trainer, pl_module, batch))
        check_number(loader, label, len(indices))
        label = without(absent, indices, reading, reading.labels(label, len(indices), int(indices[0])))
        counts = weight[done : done + len(indices)] * _is_there(absent, indices)
        yield IndexedBatch(indices, counts.to(label.device), x, label)
        done += len(indices)
