"""What the demo's fits need beside the callbacks: a progress bar and a clock, a schedule, silence."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

WIDTH = 44


class Phase(L.Callback):
    """A progress bar for some epochs of a fit, with their wall time and steps.

    Args:
        name: on the bar.
        first: epoch, counted from 0.
        last: the epoch after the last.
    """

    def __init__(self, name: str, first: int, last: int) -> None:
        self.name, self.first, self.last = name, first, last
        self.started = 0.0
        self.seconds = 0.0
        self.steps = 0
        self._bar: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock with the first epoch."""
        if trainer.current_epoch == self.first:
            self.started, self.steps = time.perf_counter(), trainer.global_step
            self._bar = tqdm(total=self.last - self.first, desc=f"{self.name:<{WIDTH}}", unit=" epochs")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock after the last epoch."""
        if self._bar is not None:
            self._bar.update()
            if trainer.current_epoch == self.last - 1:
                self.seconds = time.perf_counter() - self.started
                self.steps = trainer.global_step - self.steps
                self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no open bar behind."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@contextmanager
def quiet() -> Iterator[None]:
    """Run without Lightning's lines about hardware and loaders, on one thread (more would only wait for each other)."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def make_trainer(
    epochs: int, callbacks: list[L.Callback], steps: int = -1, *, accelerator: str = "cpu", precision: Any = None
) -> L.Trainer:
    """Return a Trainer on one device that writes nothing but what its callbacks write."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=epochs,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fall_to_zero(model: L.LightningModule, steps: int) -> None:
    """Give a module its own optimizer with the schedule of fine-tuning: from the module's rate to zero by a cosine.

    Args:
        model: whose ``configure_optimizers`` makes one optimizer.
        steps: after which the rate is zero.
    """
    make: Any = model.configure_optimizers

    def configure_optimizers() -> Any:
        optimizer = make()
        schedule = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(1.0, step / steps))) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
