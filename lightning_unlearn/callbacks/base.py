"""Base classes of the callbacks: setup, resume, teardown, and when they act."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import settings_of
from lightning_unlearn.trainer.callback_order import callbacks_of, move_before_progress_bars, restore_order
from lightning_unlearn.trainer.compat import DualPackageCallback, MisconfigurationException, may_make_layers
from lightning_unlearn.trainer.context import FitContext, shared_context
from lightning_unlearn.trainer.incompatible import refuse_privacy
from lightning_unlearn.trainer.missing import warn_of_missing
from lightning_unlearn.trainer.protocols import PartitionSource, find_partition_source, keyed_of
from lightning_unlearn.trainer.strategies import check_strategy
from lightning_unlearn.utilities.sharding import reshard


class FitCallback(DualPackageCallback):
    """Base class with access to the :class:`FitContext` that the callbacks of a fit share, from ``setup`` on."""

    _fit: FitContext | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no fit.
        return {**self.__dict__, "_fit": None}

    @property
    def fit(self) -> FitContext:
        """The fit that is set up or running.

        Raises:
            RuntimeError: outside of one.
        """
        if self._fit is None:
            raise RuntimeError(f"{type(self).__name__} is not part of a fit: pass it to a Trainer and call fit.")
        return self._fit

    def join_fit(self, trainer: Trainer, pl_module: LightningModule, source: PartitionSource) -> None:
        """Use the context that another callback has created, or create it."""
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, FitCallback)]
        self._fit = shared_context(trainer, pl_module, source, [one._fit for one in ours if one is not self])

    @override
    def let_go(self) -> None:
        super().let_go()
        self._fit = None


class UnlearnCallback(FitCallback):
    """Base class of callbacks that act at the start of training and of every epoch (:meth:`act_if_due`).

    Both hooks are used because Lightning may skip the second one after a resume. Nothing is done at the end of an
    epoch, where a ModelCheckpoint would store changed weights under the metric of the unchanged ones.
    """

    seconds = 0.0
    """Seconds that this callback's own work between epochs has taken since the fit was started or resumed."""
    # Format version of ``state_dict``; a checkpoint with another version is refused.
    state_version = 1

    _fitting = False
    # Whether a checkpoint's state comes after on_fit_start, as where a strategy shards weights.
    _is_late = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        self._is_late, self._fit = False, None
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
        self.join_fit(trainer, pl_module, self.find_source(trainer))
        move_before_progress_bars(self.fit, self)
        if trainer.current_epoch == 0:
            # A fit from the start, with callbacks that may have seen another; a checkpoint's state is loaded after
            # this.
            self.reset()
        self.validate_setup(trainer, pl_module)
        if not may_make_layers(pl_module):
            self.check_layers(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fitting and trainer.strategy.restore_checkpoint_after_setup:
            self._is_late = True
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, UnlearnCallback)]
        if self._fitting and self is ours[0]:
            warn_of_missing({callback.state_key for callback in ours}, checkpoint.get("callbacks", {}))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning also restores callbacks for test and validate, often from a checkpoint of an earlier epoch: what a
        # fit has found must not be lost to that.
        if self._fitting or not self.has_result:
            self._restore_known(state_dict)
        if self._is_late:
            self._is_late = False
            self.resume(self.fit.trainer, self.fit.pl_module)

    def _restore_known(self, state: dict[str, Any]) -> None:
        found, expected, who = state.get("version"), self.state_version, type(self).__name__
        if found == expected:
            self.load_fields(state)
            return
        said = f"Expected the state of {who} in format version {expected}, but the checkpoint has version {found}"
        if self._fitting:
            raise ValueError(
                f"{said}; resume with the version of lightning_unlearn that wrote it, or train from its weights"
                " without ckpt_path."
            )
        rank_zero_warn(f"{said}; weights are not affected, but the results of {who} are not available.")

    @property
    def has_result(self) -> bool:
        """Whether there is a result that a user may ask for."""
        raise NotImplementedError

    def load_fields(self, state: dict[str, Any]) -> None:
        """Take over the state that ``state_dict`` described."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget an earlier fit."""

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, as primitives."""
        return settings_of(self)

    def find_source(self, trainer: Trainer) -> PartitionSource:
        """Return the callback that publishes the partition."""
        raise NotImplementedError

    def validate_setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything has run, what could not work later."""

    def check_layers(self, pl_module: LightningModule) -> None:
        """Refuse unknown layers, and layers that do not fit the setting that names them.

        When the callback is set up; for a module that may make layers in ``setup`` or ``configure_model``, which come
        later, when the fit starts.
        """

    def validate_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the first step, what only the loaders and a forward pass show."""

    @property
    def waits_for_batch(self) -> bool:
        """Whether :meth:`validate_data` is called on the first training batch, as no other may be drawn to look at."""
        return False

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume what a checkpoint's state says was under way; do nothing in a fit from the start."""

    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due at this epoch boundary; a second call does nothing."""
        raise NotImplementedError

    def restore_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what was changed for the fit."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what is done inside in :attr:`seconds`. Do not nest it around calls of another callback."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fit.memory.has_begun = True
        self.check_layers(pl_module)
        # Before the state of the optimizer is restored, which must find the optimizer that it belongs to.
        self.resume(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        refuse_privacy(trainer, pl_module, type(self).__name__)
        if not self.waits_for_batch:
            self.validate_data(trainer, pl_module)
        self.act_if_due(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation may have left weights whole.
        reshard(pl_module)
        self.act_if_due(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_all(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception.
        self._restore_all(trainer, pl_module)

    def _restore_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_late = False
        if self._fit is not None:
            restore_order(self._fit)
            self.restore_trainer(trainer, pl_module)
        self.let_go()


class PartitionConsumer(UnlearnCallback):
    """Acts on the partition that another callback of the Trainer publishes."""

    acts_on_partition = True

    @override
    def reset(self) -> None:
        self._source: PartitionSource | None = None

    @override
    def find_source(self, trainer: Trainer) -> PartitionSource:
        return find_partition_source(trainer, type(self).__name__)

    @override
    def validate_setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._source = self.fit.source

    @property
    @override
    def waits_for_batch(self) -> bool:
        return keyed_of(self._source) is not None

    def confirm(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that what was done still holds, before it is reported."""

    def summary_clause(self) -> str:
        """Return what was done, in one clause; empty where nothing was."""
        raise NotImplementedError

    def provenance_entry(self, partition: Partition) -> dict[str, Any]:
        """Return what this callback did to which samples or neurons.

        Args:
            partition: the one that was acted on.
        """
        return {}

    def when_computed(self) -> str:
        """Return when there will be a partition, as far as is known."""
        at_epoch = None if self._source is None else self._source.at_epoch
        return f"at epoch {at_epoch}" if isinstance(at_epoch, int) else "when the partition is computed"

    @property
    def _is_dry_run(self) -> bool:
        return self._source is not None and self._source.dry_run

    def refuse_dry_run(self) -> None:
        """Refuse to call a fit a dry run that goes on from a checkpoint in which weights or data were changed.

        Raises:
            MisconfigurationException: saying what to do.
        """
        if self._is_dry_run:
            raise MisconfigurationException(
                f"dry_run=True changes nothing, but {type(self).__name__} had already acted when the checkpoint"
                " was saved; set dry_run=False, or resume from a checkpoint from before the partition."
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
