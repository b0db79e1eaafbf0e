"""Swapping, watching and re-labeling training data; the private API that it takes is listed in ``fit_loop``."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.trainer.fit_loop import limited_batches

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Return a batch as ``training_step`` would get it: converted, transferred, with the user's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


class TrainDataSwap:
    """Replaces the train loader of a running fit, and has Lightning recompute what depends on its length.

    Lightning's own way, ``reload_dataloaders_every_n_epochs``, must be set in advance and calls the user's
    ``train_dataloader`` again, or returns a loader passed to ``fit`` as it is.
    """

    def __init__(self) -> None:
        self._source: Any = None
        self._val_check_interval: int | float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return vars(TrainDataSwap())

    @property
    def is_attached(self) -> bool:
        """Whether the loader is replaced."""
        return self._source is not None

    def attach(self, fit: RunningFit, change: Callable[[Any], DataLoader[Any]]) -> None:
        """Draw from ``change(loader)`` from now on, and after every reload.

        Args:
            fit: that is running.
            change: from the loader that the user gave, or the one in use, to the one to use.
        """
        trainer, loop = fit.trainer, _loop_of(fit)
        source = loop._data_source
        original = type(source).dataloader.__get__(source)
        live = loop._combined_loader
        self._source = source

        def changed(given: Any) -> DataLoader[Any]:
            loader = change(given)
            self._fit_val_check_interval(trainer, limited_batches(trainer, len(loader)))
            return loader

        def dataloader(_: Any) -> Any:
            return changed(original())

        # Bound methods of the same name, as which a pickled source finds its class's.
        source.dataloader = MethodType(dataloader, source)
        if live is None:
            # Resuming: no loader yet, so Lightning asks for it, changed, when the loop starts.
            return
        live.flattened = [changed(loader) for loader in live.flattened]
        # Lightning's own loader is handed back to it, so that its workers survive.
        source.dataloader = lambda: live
        try:
            loop._combined_loader = None
            loop.setup_data()
        finally:
            source.dataloader = MethodType(dataloader, source)

    def ask_again(self, fit: RunningFit) -> None:
        """Have Lightning ask for the loader when the loop starts, also where ``configure_optimizers`` has asked."""
        _loop_of(fit)._combined_loader = None

    def _fit_val_check_interval(self, trainer: Trainer, num_batches: int) -> None:
        # Lightning would raise, mid-run, if an integer interval exceeds the number of batches.
        interval: int | float = trainer.val_check_interval
        if isinstance(interval, int) and interval > num_batches and trainer.check_val_every_n_epoch is not None:
            rank_zero_warn(
                f"An epoch on the clean subset has {num_batches} batches, fewer than val_check_interval={interval};"
                " validation now runs at the end of the epoch."
            )
            self._val_check_interval = interval
            trainer.val_check_interval = 1.0

    def detach(self, fit: RunningFit) -> None:
        """Give the fit the user's own loader again, from the next time that it asks for one."""
        if self._source is not None:
            self._source.__dict__.pop("dataloader", None)
            self._source = None
        if self._val_check_interval is not None:
            fit.trainer.val_check_interval = self._val_check_interval
            self._val_check_interval = None


class TrainLoaderWatch:
    """Shows the train loaders of a fit when they are ready and no iterator has been made of them yet.

    That is before ``on_train_start``, where workers have long begun with the first epoch, and after Lightning has put
    its own samplers in; and again whenever it reloads them.
    """

    def __init__(self) -> None:
        self._loop: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return {"_loop": None}

    def attach(self, fit: RunningFit, show: Callable[[list[Any]], None]) -> None:
        """Call ``show`` with the loaders from now on; attach in ``setup`` at the latest."""
        loop = _loop_of(fit)
        if self._loop is not None or not hasattr(loop, "_load_combined_loader_states"):
            # Without the moment there is nothing to show; who watches finds the loaders when the epoch starts.
            return

        def _load_combined_loader_states(of: Any) -> None:
            type(of)._load_combined_loader_states(of)
            if of is loop:
                show(list(loop._combined_loader.flattened))

        # A bound method of the same name, as which a pickled loop finds its class's.
        loop._load_combined_loader_states = MethodType(_load_combined_loader_states, loop)
        self._loop = loop

    def detach(self) -> None:
        """Stop watching."""
        if self._loop is not None:
            self._loop.__dict__.pop("_load_combined_loader_states", None)
            self._loop = None


def _loop_of(fit: RunningFit) -> Any:
    return fit.trainer.fit_loop


def users_sampler(trainer: Trainer, loader: DataLoader[Any], drawn_from: Any, own: Any) -> tuple[Any, bool]:
    """Return what the user's train loader draws from, and whether Lightning splits that over the ranks.

    It is the same before Lightning has put its own samplers in and after. Lightning wraps the user's sampler to split
    it, shuffled; in the place of a RandomSampler or SequentialSampler it puts a DistributedSampler over the data set,
    whatever they were asked for.

    Args:
        trainer: during ``fit``.
        loader: a train loader.
        drawn_from: its batch sampler's ``.sampler``.
        own: its ``.sampler``, which is another one where the user gave a batch sampler.

    Returns:
        the user's sampler, or the one that takes its place; and whether it is split (and not itself a part).
    """
    if type(drawn_from).__name__ == "DistributedSamplerWrapper":
        return drawn_from.dataset._sampler, True
    connector: Any = trainer._accelerator_connector
    splits = connector.use_distributed_sampler and connector.is_distributed
    if not splits or isinstance(drawn_from, DistributedSampler) or isinstance(own, DistributedSampler):
        return drawn_from, False
    if isinstance(own, (RandomSampler, SequentialSampler)):
        return DistributedSampler(loader.dataset, num_replicas=1, rank=0, shuffle=True), True
    return drawn_from, True


_NOTHING = object()


class BatchHook:
    """Changes training batches as the loader delivers them, before any transfer hook of the user's.

    No public hook may put another batch in the place of the one delivered. Which one that is, the precision plugin
    shows, which the training loop has convert it first: others, such as a model summary with ``example_input_array`` or
    an export, prepare inputs of theirs with the same private hook in the middle of a fit.
    """

    def __init__(self) -> None:
        self._module: LightningModule | None = None
        self._precision: Any = None
        self._delivered: Any = _NOTHING

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return {"_module": None, "_precision": None, "_delivered": _NOTHING}

    def attach(self, fit: RunningFit, change: Callable[[Any], Any]) -> None:
        """Give training ``change(batch)`` from now on; validation and the callbacks' own passes are left alone."""
        self.detach()
        trainer, pl_module = fit.trainer, fit.pl_module
        precision: Any = trainer.precision_plugin

        def convert_input(plugin: Any, data: Any) -> Any:
            data = type(plugin).convert_input(plugin, data)
            if plugin is precision and trainer.training:
                self._delivered = data
            return data

        def _on_before_batch_transfer(module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
            if module is pl_module and trainer.training and batch is self._delivered:
                self._delivered = _NOTHING
                batch = change(batch)
            return type(module)._on_before_batch_transfer(module, batch, dataloader_idx)

        # In the instances' own dictionaries, where they hide the methods and nothing else. Bound methods of the same
        # names: a copy has them bound to itself, a pickled one finds its class's.
        pl_module.__dict__["_on_before_batch_transfer"] = MethodType(_on_before_batch_transfer, pl_module)
        precision.__dict__["convert_input"] = MethodType(convert_input, precision)
        self._module, self._precision = pl_module, precision

    def detach(self) -> None:
        """Leave the batches alone again."""
        if self._module is not None:
            self._module.__dict__.pop("_on_before_batch_transfer", None)
            self._precision.__dict__.pop("convert_input", None)
        self._module, self._precision, self._delivered = None, None, _NOTHING
