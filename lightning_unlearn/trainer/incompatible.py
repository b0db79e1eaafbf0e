"""Callbacks and packages of others that the callbacks cannot work beside, by name: most are not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from lightning_unlearn.trainer.compat import MisconfigurationException, is_lightning_instance
from lightning_unlearn.trainer.fit_loop import live_loaders

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


def refuse_privacy(trainer: Trainer, pl_module: LightningModule, who: str) -> None:
    """Refuse training with differential privacy by Opacus.

    Args:
        trainer: with its optimizers and loaders.
        pl_module: the user's.
        who: the callback's name.

    Raises:
        MisconfigurationException: naming what of Opacus was found.
    """
    loaders = live_loaders(trainer)
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("batch_sampler", "sampler")]
    found = next(
        (one for one in (*trainer.optimizers, *loaders, *samplers, *pl_module.modules()) if _private(one)), None
    )
    if found is not None:
        raise MisconfigurationException(
            f"{who} reads every training sample as it is, which breaks the privacy guarantee of Opacus"
            f" ({type(found).__name__} was found), and batches of Poisson sampling cannot be narrowed to a subset;"
            f" train without Opacus, or without {who}."
        )


def _private(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "opacus" for kind in type(value).__mro__)


def refuse_beside_finetuning(fit: RunningFit, who: str, **given: bool) -> None:
    """Refuse arguments that clash with callbacks that unfreeze layers and give the optimizer groups of their own.

    That is Lightning's BaseFinetuning (BackboneFinetuning, a user's own) and the package finetuning-scheduler: what
    they have noted of the optimizer's groups belongs to one that ``configure_optimizers`` has made before.

    Args:
        fit: that is set up.
        who: the callback's name.
        given: for each argument, as it is to be written, whether it was given.

    Raises:
        MisconfigurationException: naming the argument and the other callback.
    """
    other = next((callback for callback in fit.callbacks if is_lightning_instance(callback, "BaseFinetuning")), None)
    wrong = next((name for name, is_given in given.items() if is_given), None)
    if other is not None and wrong is not None:
        raise MisconfigurationException(
            f"{who}({wrong}) cannot be combined with {type(other).__name__}, which unfreezes layers, adds"
            f" parameter groups to the optimizer and sets their learning rates itself. Leave out {wrong} to"
            f" keep the optimizer and its groups, or leave out {type(other).__name__}."
        )
