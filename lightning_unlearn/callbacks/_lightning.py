"""What the callbacks need of Lightning beyond its hooks, and all of its private API that they touch.

Private names, checked on lightning 2.5.0 to 2.6.6 (``tests/callbacks/test_lightning.py`` fails when one goes missing or
is used elsewhere):

- of the fit loop ``_data_source``, ``_combined_loader``, ``_load_combined_loader_states`` and ``_data_fetcher``;
- of the evaluation loop ``_combined_loader`` and ``_last_val_dl_reload_epoch``;
- ``_iterator`` of the CombinedLoader, ``_on_before_batch_transfer`` of the LightningModule;
- ``_accelerator_connector`` of the Trainer, with ``use_distributed_sampler`` and ``is_distributed``;
- ``_sampler`` of the data set within a ``DistributedSamplerWrapper``;
- ``_average_model`` of ``StochasticWeightAveraging`` and, from 2.6 on, of ``WeightAveraging``;
- the name of ``_MultiProcessingLauncher``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.attribution import whole_batches
from lightning_unlearn.callbacks._kept import kept
from lightning_unlearn.callbacks._packages import is_a
from lightning_unlearn.callbacks._progress import close_lines
from lightning_unlearn.utilities.sharding import reshard


def runs_in_other_processes(trainer: Trainer) -> bool:
    """Whether the fit runs in processes that are spawned or forked for it and end with it."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def averages_weights(callback: Any) -> bool:
    """Whether a callback averages the weights (EMA, SWA)."""
    return hasattr(callback, "_average_model")


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The Trainer's callbacks, an attribute that it sets without declaring it."""
    return list(getattr(trainer, "callbacks", []))


# The callbacks as the user gave them, of each Trainer in which ours have moved.
_given: WeakKeyDictionary[Trainer, list[Any]] = WeakKeyDictionary()


def _put_callbacks(trainer: Trainer, callbacks: list[Any]) -> None:
    _given.setdefault(trainer, callbacks_of(trainer))
    setattr(trainer, "callbacks", callbacks)  # noqa: B010  (see callbacks_of)


def move_before_progress_bars(trainer: Trainer, callback: Any) -> None:
    """Lets a callback run before the progress bars, which read the number of batches when an epoch starts.

    The hook loop that is running goes on over the old list, so the list is replaced and not changed.
    """
    callbacks = callbacks_of(trainer)
    here = callbacks.index(callback)
    bar = next((i for i, other in enumerate(callbacks[:here]) if is_a(other, "ProgressBar")), None)
    if bar is None:
        return
    callbacks.insert(bar, callbacks.pop(here))
    _put_callbacks(trainer, callbacks)


def move_behind_averages(trainer: Trainer, callback: Any) -> None:
    """Lets a callback run after those that average weights, which put the average in the model's place in the end."""
    callbacks = callbacks_of(trainer)
    last = max((i for i, other in enumerate(callbacks) if averages_weights(other)), default=-1)
    here = callbacks.index(callback)
    if here < last:
        callbacks.insert(last, callbacks.pop(here))
        _put_callbacks(trainer, callbacks)


def restore_order(trainer: Trainer) -> None:
    """Puts the callbacks in the order in which the user gave them, unless others have come or gone."""
    given, now = _given.pop(trainer, None), callbacks_of(trainer)
    if given is not None and sorted(map(id, given)) == sorted(map(id, now)):
        setattr(trainer, "callbacks", given)  # noqa: B010  (see callbacks_of)


@contextmanager
def _as_in_validation(trainer: Trainer, pl_module: LightningModule, *, switches: bool) -> Iterator[None]:
    training = [(module, module.training) for module in pl_module.modules()]
    stage = trainer.state.stage
    try:
        if switches:
            pl_module.eval()
        trainer.validating = True
        eager = torch.compiler.set_stance("force_eager")
        with _logging_nothing(trainer, pl_module), trainer.precision_plugin.forward_context(), eager:
            yield
    finally:
        for module, flag in training:
            module.training = flag
        trainer.state.stage = stage
        close_lines(trainer)


@contextmanager
def _logging_nothing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Has ``self.log`` and the loggers, which ``forward`` may call, do nothing."""

    def ignored(*_: Any, **__: Any) -> None: ...

    logging = [module for module in pl_module.modules() if is_a(module, "LightningModule")]
    hidden = [(module, name) for module in logging for name in ("log", "log_dict")]
    # Where somebody has put a function of their own.
    before = {(module, name): vars(module)[name] for module, name in hidden if name in vars(module)}
    loggers = trainer.loggers
    try:
        for module, name in hidden:
            vars(module)[name] = ignored
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for module, name in hidden:
            vars(module).pop(name, None)
        for (module, name), function in before.items():
            vars(module)[name] = function


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule, *, keep: bool = True) -> Iterator[None]:
    """A pass over the data that leaves the fit as it was, also when it fails.

    Inside, modules are in eval mode, the Trainer reports that it validates (so that augmentation in transfer hooks is
    off), compiled modules run eagerly (their graphs ignore hooks), and nothing is logged. Random states, training
    flags, the stage and what else :func:`~lightning_unlearn.callbacks._kept.kept` names are put back. Every rank must
    enter: where the pass fails on one, it fails on all, and none waits for another for ever.

    Where FSDP2 shards the weights, ranks meet in every forward pass. There a rank that fails ends at once, and so do
    those that then wait for it in vain; and no batch is halved for want of memory, which would be one pass more.

    Args:
        trainer: of the running fit.
        pl_module: the user's.
        keep: False where methods of the user's are called inside that make what is to stay, such as a loader, and the
            model is not called. Modules stay in the mode that they are in then.
    """
    sharded = reshard(pl_module)
    failure: BaseException | None = None
    with isolate_rng():
        try:
            with (
                kept(pl_module) if keep else nullcontext(),
                # Without kept, nothing would undo what a module does to itself when it is switched to eval mode.
                _as_in_validation(trainer, pl_module, switches=keep),
                whole_batches() if sharded else nullcontext(),
            ):
                yield
        except BaseException as error:  # isolate_rng restores only where its block ends without an exception
            failure = error
    reshard(pl_module)
    if failure is not None and (sharded or not isinstance(failure, Exception)):
        raise failure
    if sharded:
        return
    failed = trainer.strategy.reduce_boolean_decision(failure is not None, all=False)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("The pass over the training set failed on another rank, whose error says why.")


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as ``training_step`` would get it: converted, transferred, with the user's transfer hooks."""
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

    def attach(self, trainer: Trainer, change: Callable[[Any], DataLoader[Any]]) -> None:
        """From now on, and after every reload, the fit draws from ``change(loader)``.

        Args:
            trainer: during ``fit``.
            change: from the loader that the user gave, or the one in use, to the one to use.
        """
        loop: Any = trainer.fit_loop
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

    def ask_again(self, trainer: Trainer) -> None:
        """Has Lightning ask for the loader when the loop starts, also where ``configure_optimizers`` has asked."""
        loop: Any = trainer.fit_loop
        loop._combined_loader = None

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

    def detach(self, trainer: Trainer) -> None:
        """Gives the fit the user's own loader again, from the next time that it asks for one."""
        if self._source is not None:
            self._source.__dict__.pop("dataloader", None)
            self._source = None
        if self._val_check_interval is not None:
            trainer.val_check_interval = self._val_check_interval
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

    def attach(self, trainer: Trainer, show: Callable[[list[Any]], None]) -> None:
        """From now on, in ``setup`` at the latest, ``show`` is called with the loaders."""
        loop: Any = trainer.fit_loop
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
        """Stops watching."""
        if self._loop is not None:
            self._loop.__dict__.pop("_load_combined_loader_states", None)
            self._loop = None


def live_loaders(trainer: Trainer) -> list[Any]:
    """The train loaders that the fit draws from; empty before they are made."""
    loop: Any = trainer.fit_loop
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def live_iterator(trainer: Trainer) -> tuple[Any, int]:
    """The iterator that the batch in hand came from, and how many later batches Lightning has drawn from it already.

    Returns:
        None and 0 where there are several loaders, or none, or a ``training_step`` draws its batches itself.
    """
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    iterators = getattr(getattr(getattr(fetcher, "iterator", None), "_iterator", None), "iterators", [])
    if len(iterators) != 1 or hasattr(fetcher, "iterator_wrapper"):
        return None, 0
    # Where the number of batches is not known, Lightning is one ahead, to see which is the last.
    return iterators[0], len(getattr(fetcher, "batches", []))


def validation_loaders(trainer: Trainer) -> list[tuple[Any, int | None]]:
    """The validation loaders of the fit, each with how many batches are drawn of it; None for all.

    Lightning makes them before the first validation; where that has not been, it makes them now. Inside
    ``undisturbed``, on every rank.
    """
    if not trainer.enable_validation:
        return []
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    if getattr(loop, "_combined_loader", None) is None:
        reloaded = getattr(loop, "_last_val_dl_reload_epoch", None)
        loop.setup_data()
        # When the user's loaders are due to be made again is as it was.
        loop._last_val_dl_reload_epoch = reloaded
    combined = getattr(loop, "_combined_loader", None)
    loaders = [] if combined is None else list(combined.flattened)
    limits = [None if math.isinf(limit) else int(limit) for limit in trainer.num_val_batches[: len(loaders)]]
    return list(zip(loaders, limits, strict=True))


def users_sampler(trainer: Trainer, loader: DataLoader[Any], drawn_from: Any, own: Any) -> tuple[Any, bool]:
    """What the user's train loader draws from, and whether Lightning splits that over the ranks.

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

    def attach(self, trainer: Trainer, pl_module: LightningModule, change: Callable[[Any], Any]) -> None:
        """From now on training gets ``change(batch)``; validation and passes of ours are left alone."""
        self.detach()
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
        """Leaves the batches alone again."""
        if self._module is not None:
            self._module.__dict__.pop("_on_before_batch_transfer", None)
            self._precision.__dict__.pop("convert_input", None)
        self._module, self._precision, self._delivered = None, None, _NOTHING


def rewrap_ddp(trainer: Trainer) -> None:
    """Wraps the module anew after ``requires_grad`` has changed, which a DDP wrapper notices only when it is made."""
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy") and strategy.lightning_module is not None:
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


@contextmanager
def planned_epochs(trainer: Trainer, remaining: int | None) -> Iterator[None]:
    """Lets ``Trainer.estimated_stepping_batches`` count the remaining epochs, for a schedule that starts now."""
    loop = trainer.fit_loop
    planned = loop.max_epochs
    if remaining is not None:
        loop.max_epochs = remaining
    try:
        yield
    finally:
        loop.max_epochs = planned


def limited_batches(trainer: Trainer, num_batches: int) -> int:
    """How many batches of a train loader the Trainer uses in an epoch."""
    limit: int | float = trainer.limit_train_batches
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def next_epoch(trainer: Trainer) -> int:
    """The epoch that Lightning gives the samplers next; after a resume it is known before ``current_epoch`` is."""
    current: Any = trainer.fit_loop.epoch_progress.current
    return int(current.processed)


def compute_device(trainer: Trainer) -> torch.device:
    """Where sums are computed: the accelerator if it has double precision, else the CPU."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the Trainer only runs a few batches, to see that nothing breaks."""
    return bool(getattr(trainer, "fast_dev_run", False))


def log_values(pl_module: LightningModule, values: dict[str, float]) -> None:
    """Logs scalars that are equal on every rank, through the Trainer's loggers."""
    for logger in pl_module.loggers:
        logger.log_metrics(values, step=pl_module.global_step)
