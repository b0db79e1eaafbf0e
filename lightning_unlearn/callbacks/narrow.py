"""Restrict training to samples of your choice during a fit."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks.finetune import CleanSubsetFinetuneCallback
from lightning_unlearn.finetuning.train_data import SubsetLoader
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import DualPackageCallback, MisconfigurationException
from lightning_unlearn.trainer.protocols import PartitionSource
from lightning_unlearn.trainer.running_fit import RunningFit
from lightning_unlearn.trainer.scoring_loader import train_loader
from lightning_unlearn.trainer.strategies import check_strategy

_WHEN = "call it in on_train_start, on_train_epoch_start or on_train_epoch_end of a callback or of the module"


def narrow(trainer: Trainer, indices: Iterable[int] | Tensor | None) -> None:
    """Train on these samples only, from the next epoch on or the one that is about to start.

    Call it in ``on_train_start``, ``on_train_epoch_start`` or ``on_train_epoch_end``, as often as you like, on every
    rank. The loader keeps its class, workers, collate function, transforms and way of sampling (shuffled, weighted,
    split over the ranks). Lightning recomputes the number of batches and the validation interval; a learning rate
    schedule planned for a number of steps is not changed. After the fit, or an exception, the loader draws from all
    samples again. Checkpoints do not store the selection: call it again in ``on_train_start`` of a resumed fit.

    Args:
        trainer: the Trainer that is fitting.
        indices: positions in the full training set, regardless of earlier calls; each once, in any order, and the same
            on every rank. None for all samples.

    Raises:
        MisconfigurationException: outside of a fit or in the middle of an epoch, under a strategy that is not
            supported, with ``overfit_batches``, with a CleanSubsetFinetuneCallback, and with an
            AttributionPartitionCallback that is still collecting evidence.
        TypeError: for indices that are not integers, and for a loader that cannot be narrowed.
        ValueError: for indices that are out of range, repeated, that differ between the ranks, or that do not
            fill a batch.

    Example:
        >>> import lightning as L
        >>> class Curriculum(L.Callback):
        ...     def on_train_epoch_start(self, trainer, pl_module):
        ...         narrow(trainer, range(100 * (trainer.current_epoch + 1)))
    """
    _check(trainer)
    loader = train_loader(trainer)
    chosen, fault = _checked(indices, len(loader.dataset))  # type: ignore[arg-type]
    # What one rank refuses, all refuse: otherwise the others would hang.
    if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
        raise fault or ValueError("The indices are invalid on another rank; see its error.")
    first: Tensor = trainer.strategy.broadcast(chosen)
    if trainer.strategy.reduce_boolean_decision(not torch.equal(first.cpu(), chosen), all=False):
        raise ValueError(
            "Expected the same indices on every rank, but they differ. Choose them on one rank and broadcast"
            " them (trainer.strategy.broadcast), or use a generator with a fixed seed."
        )
    known = next((one for one in callbacks_of(trainer) if isinstance(one, _Narrowing)), None)
    narrowing = _Narrowing() if known is None else known
    narrowing.take(trainer, None if indices is None else chosen)
    if known is None:
        # In front, so that it is gone when others see to the order of the list; and another list, as Lightning is on
        # its way through this one.
        _put(trainer, [narrowing, *callbacks_of(trainer)])


def _put(trainer: Trainer, callbacks: list[Any]) -> None:
    setattr(trainer, "callbacks", callbacks)  # noqa: B010  (Trainer does not declare it)


def _check(trainer: Trainer) -> None:
    check_strategy(trainer, "narrow")
    # Trainer sets some of its attributes without declaring them.
    if overfit_batches := getattr(trainer, "overfit_batches", 0):
        raise MisconfigurationException(
            f"narrow needs all the training data, but the Trainer has overfit_batches={overfit_batches}; set it to 0."
        )
    if not _is_between_epochs(trainer):
        raise MisconfigurationException(f"Expected narrow to be called between two epochs of a fit; {_WHEN}.")
    if any(isinstance(callback, CleanSubsetFinetuneCallback) for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            "narrow and CleanSubsetFinetuneCallback would both choose the training samples; use one of them."
        )
    for callback in callbacks_of(trainer):
        if isinstance(callback, PartitionSource) and not _has_all_evidence(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} is still collecting evidence, which would cover a part of the samples"
                " only. Call narrow after the partition, and without every_n_epochs."
            )


def _has_all_evidence(source: PartitionSource) -> bool:
    return getattr(source, "has_result", False) and getattr(source, "every_n_epochs", None) is None


def _is_between_epochs(trainer: Trainer) -> bool:
    if not trainer.training or trainer.state.fn != "fit" or trainer.train_dataloader is None:
        return False
    # Their kinds of tracker are declared less than they are.
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    is_inside = epoch.started > epoch.processed or batch.ready != batch.completed
    # A fit that goes on from the middle of an epoch has not begun with it when training starts.
    return not is_inside or trainer.fit_loop.epoch_loop.restarting


def _checked(indices: Iterable[int] | Tensor | None, total: int) -> tuple[Tensor, Exception | None]:
    """Return (K,) int64, ascending, and what is wrong with them."""
    if indices is None:
        return torch.arange(total), None
    none = torch.zeros(0, dtype=torch.int64)
    # Of tensors and arrays.
    listed: Any = indices.tolist() if hasattr(indices, "tolist") else indices
    try:
        # Not True, which Python takes for 1: a mask is no list of positions.
        found = torch.tensor([operator.index(_no_flag(one)) for one in listed], dtype=torch.int64)
    except (TypeError, OverflowError) as error:
        return none, TypeError(
            f"Expected indices to be integer positions in the training set, but got {type(indices).__name__}"
            f" ({error}); for a mask, pass mask.nonzero().flatten()."
        )
    found = found.sort().values
    if len(found) and not 0 <= int(found[0]) <= int(found[-1]) < total:
        outside = int(found[0]) if found[0] < 0 else int(found[-1])
        return none, ValueError(f"Expected indices in [0, {total}), the size of the training set, but got {outside}.")
    if len(found) and bool((found[1:] == found[:-1]).any()):
        twice = int(found[1:][found[1:] == found[:-1]][0])
        return none, ValueError(
            f"Expected each index once, but {twice} is repeated. To draw samples more often, give the loader a"
            " WeightedRandomSampler."
        )
    return found, None


def _no_flag(one: Any) -> Any:
    if isinstance(one, bool):
        raise TypeError("a bool is no position")
    return one


class _Narrowing(DualPackageCallback):
    """Holds on to the user's loader, and gives it back."""

    def __init__(self) -> None:
        self._loader = SubsetLoader()
        self._fit: RunningFit | None = None
        self._total = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no fit.
        return {**self.__dict__, "_fit": None}

    def take(self, trainer: Trainer, index: Tensor | None) -> None:
        """Train on these samples, or on all again."""
        if self._fit is None:
            fit = RunningFit(trainer, trainer.lightning_module)
            self._loader.begin(fit)
            self._fit, self._total = fit, fit.total
        subset = TrainingSubset(torch.arange(self._total) if index is None else index)
        if fault := self._loader.fault_of(self._fit, subset, keeps_plan=False):
            raise ValueError(f"Expected indices to train on, but the {len(subset.index)} samples {fault}.")
        self._loader.detach(self._fit)
        self._loader.attach(self._fit, subset, keeps_plan=lambda: False)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None and (found := self._fit.total) != self._total:
            raise ValueError(
                f"Expected the training set of {self._total} samples for which narrow was called, but the reloaded"
                f" loader has {found}. Call narrow again in on_train_epoch_start of each epoch that reloads it, or"
                " leave out reload_dataloaders_every_n_epochs."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_all(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception.
        self._restore_all(trainer)

    def _restore_all(self, trainer: Trainer) -> None:
        if self._fit is not None:
            self._loader.detach(self._fit)
        self._fit = None
        _put(trainer, [callback for callback in callbacks_of(trainer) if callback is not self])
        self.let_go()
