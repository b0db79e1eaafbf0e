"""Lightning strategies that are supported, and arguments that are refused under some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import MisconfigurationException, is_lightning_instance
from lightning_unlearn.trainer.fit_loop import averages_weights, runs_in_other_processes

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_GPU = "Trainer(accelerator='gpu', strategy='ddp')"
_FSDP2 = "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with fully_shard (FSDP2)"
# By name, since most are not installed with Lightning, and some are subclasses of what is supported.
_NOT_HANDLED = {
    "FSDPStrategy": (
        "which lays the weights of several layers out in one flat tensor, where a neuron is not a row",
        f"{_FSDP2}, or Trainer(strategy='ddp')",
    ),
    "DeepSpeedStrategy": (
        "which keeps weights and optimizer in an engine of its own, where what is pruned could not be held at zero",
        f"{_FSDP2}, or Trainer(strategy='ddp')",
    ),
    "HivemindStrategy": ("under which processes are not synchronized", "Trainer(strategy='ddp')"),
    "ColossalAIStrategy": ("which keeps weights in tensors of its own", f"{_FSDP2}, or Trainer(strategy='ddp')"),
}
_NOT_HANDLED |= dict.fromkeys(
    ("HPUDDPStrategy", "HPUParallelStrategy", "SingleHPUStrategy"), ("whose devices were never tested", _GPU)
)
_NOT_HANDLED |= dict.fromkeys(
    ("XLAStrategy", "SingleDeviceXLAStrategy", "XLAFSDPStrategy"),
    ("whose lazy tensors would be recompiled for every hook and batch", _GPU),
)


def shards_weights(trainer: Trainer) -> bool:
    """Return whether each rank holds only a part of the weights."""
    return is_lightning_instance(trainer.strategy, "ModelParallelStrategy")


def check_strategy(trainer: Trainer, who: str) -> None:
    """Check that the strategy is supported.

    Raises:
        MisconfigurationException: for a strategy that distributes weights or samples in another way.
    """
    strategy: Any = trainer.strategy
    bases = [base.__name__ for base in type(strategy).__mro__]
    refused = next((_NOT_HANDLED[name] for name in bases if name in _NOT_HANDLED), None)
    if refused is None and not is_lightning_instance(strategy, *_SUPPORTED):
        refused = ("which is not known here", "Trainer(strategy='ddp') or Trainer(devices=1)")
    if refused is not None:
        why, instead = refused
        raise MisconfigurationException(
            f"{who} works on a single device, under DDP and under ModelParallelStrategy (FSDP2), but the Trainer uses"
            f" {type(strategy).__name__}, {why}; use {instead}."
        )
    if shards_weights(trainer):
        _check_model_parallel(trainer, strategy, who)
    if runs_in_other_processes(trainer):
        rank_zero_warn(
            f"With a spawn or fork strategy training runs in subprocesses, so results of {who} are not available"
            " in the main process. Read them from a checkpoint or in on_train_end, or use Trainer(strategy='ddp')"
            " in a script."
        )


def _check_model_parallel(trainer: Trainer, strategy: Any, who: str) -> None:
    parts = strategy.device_mesh["tensor_parallel"].size()
    if parts > 1:
        raise MisconfigurationException(
            f"{who} works under ModelParallelStrategy where all ranks get data of their own (FSDP2), but the Trainer"
            f" splits each layer over {parts} ranks (tensor parallelism); use ModelParallelStrategy("
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )
    for callback in callbacks_of(trainer):
        if averages_weights(callback):
            raise MisconfigurationException(
                f"{who} does not know the averaged weights of {type(callback).__name__} under ModelParallelStrategy;"
                " leave it out, or use Trainer(strategy='ddp')."
            )


def refuse_where_sharded(fit: RunningFit, who: str, **given: bool) -> None:
    """Refuse arguments that need all of the weights on one rank.

    Args:
        fit: that is set up.
        who: the callback's name.
        given: for each argument, whether it was given.

    Raises:
        MisconfigurationException: naming the argument.
    """
    wrong = next((name for name, is_given in given.items() if is_given), None)
    if wrong is not None and fit.is_sharded:
        raise MisconfigurationException(
            f"{who}({wrong}=...) does not work under {fit.strategy_name}, where every rank holds a part"
            f" of the weights and of the optimizer; leave out {wrong}, or use Trainer(strategy='ddp')."
        )
