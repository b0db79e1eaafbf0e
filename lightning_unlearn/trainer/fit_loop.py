"""What the callbacks need of Lightning beyond its hooks, and all of its private API that they touch.

Private names, checked on lightning 2.5.0 to 2.6.6 (``tests/trainer/test_fit_loop.py`` fails when one goes missing or
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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_unlearn.trainer.compat import is_lightning_instance


def runs_in_other_processes(trainer: Trainer) -> bool:
    """Return whether the fit runs in processes that are spawned or forked for it and end with it."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def averages_weights(callback: Any) -> bool:
    """Return whether a callback averages the weights (EMA, SWA)."""
    return hasattr(callback, "_average_model")


def live_loaders(trainer: Trainer) -> list[Any]:
    """Return the train loaders that the fit draws from; empty before they are made."""
    loop: Any = trainer.fit_loop
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def live_iterator(trainer: Trainer) -> tuple[Any, int]:
    """Return the iterator of the batch in hand, and how many later batches Lightning has drawn from it already.

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
    """Return the validation loaders of the fit, each with how many batches are drawn of it; None for all.

    Lightning makes them before the first validation; where that has not been, it makes them now. Inside
    ``isolated_eval``, on every rank.
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


def rewrap_ddp(trainer: Trainer) -> None:
    """Wrap the module anew after ``requires_grad`` has changed, which a DDP wrapper notices only when it is made."""
    strategy: Any = trainer.strategy
    if is_lightning_instance(strategy, "DDPStrategy") and strategy.lightning_module is not None:
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


@contextmanager
def planned_epochs(trainer: Trainer, remaining: int | None) -> Iterator[None]:
    """Let ``Trainer.estimated_stepping_batches`` count the remaining epochs, for a schedule that starts now."""
    loop = trainer.fit_loop
    planned = loop.max_epochs
    if remaining is not None:
        loop.max_epochs = remaining
    try:
        yield
    finally:
        loop.max_epochs = planned


def limited_batches(trainer: Trainer, num_batches: int) -> int:
    """Return how many batches of a train loader the Trainer uses in an epoch."""
    limit: int | float = trainer.limit_train_batches
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def next_epoch(trainer: Trainer) -> int:
    """Return the epoch that Lightning gives the samplers next; after a resume it precedes ``current_epoch``."""
    current: Any = trainer.fit_loop.epoch_progress.current
    return int(current.processed)


def compute_device(trainer: Trainer) -> torch.device:
    """Return where sums are computed: the accelerator if it has double precision, else the CPU."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether the Trainer only runs a few batches, to see that nothing breaks."""
    return bool(getattr(trainer, "fast_dev_run", False))


def log_values(pl_module: LightningModule, values: dict[str, float]) -> None:
    """Log scalars that are equal on every rank, through the Trainer's loggers."""
    for logger in pl_module.loggers:
        logger.log_metrics(values, step=pl_module.global_step)
