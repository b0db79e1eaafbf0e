"""Whole fits with the callbacks and without, and one of many rounds; part of :mod:`benchmarks.scaling`."""

from __future__ import annotations

import gc
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.rank_memory import peak_bytes, resident_bytes
from benchmarks.sources import Rows, as_it_is
from benchmarks.speed import images, processor_clock, quietly, trainer_of
from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback

EPOCHS, AT = 4, 3
ROUNDS = 205
_BATCH, _IN_ROUNDS = 1_024, 1_000
_SIDE = 8


class SmallNetwork(L.LightningModule):
    """Two layers on images of 1 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(_SIDE**2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class _Watch(L.Callback):
    """Processor seconds of each epoch, before what comes when it has ended, and what is resident then."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.resident: list[int] = []
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock with the first batch."""
        if batch_idx == 0:
            self._started = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops it."""
        self.seconds.append(time.process_time() - self._started)
        gc.collect()
        self.resident.append(resident_bytes())


def of_fit(total: int, has_callbacks: bool) -> dict[str, Any]:
    """What a fit of N samples takes, and the most that is in memory in it."""
    x, y = images(total, _SIDE, 1)
    loader = DataLoader(Rows(x, y), _BATCH, shuffle=True, collate_fn=as_it_is)
    partition, watch = AttributionPartitionCallback(at_epoch=AT), _Watch()
    callbacks = [partition, CleanSubsetFinetuneCallback()] if has_callbacks else []
    before, started = peak_bytes(), time.process_time()
    with quietly(), processor_clock("cpu"):
        trainer_of(EPOCHS, [watch, *callbacks], "cpu").fit(SmallNetwork(), loader)
    return {
        "samples": total,
        "callbacks": has_callbacks,
        "seconds": time.process_time() - started,
        # The first has to warm up.
        "epochs": watch.seconds[1:AT],
        "partition": partition.seconds if has_callbacks else 0.0,
        "peak": peak_bytes(),
        "before": before,
        "suspects": len(partition.partition.suspect_indices()) if has_callbacks else 0,
    }


def of_rounds(epochs: int) -> dict[str, Any]:
    """What is resident after each epoch of a fit with a partition after every one."""
    x, y = images(_IN_ROUNDS, _SIDE, 1)
    loader = DataLoader(Rows(x, y), 128, shuffle=True, collate_fn=as_it_is)
    partition, watch = AttributionPartitionCallback(at_epoch=2, every_n_epochs=1), _Watch()
    partition.min_change = 0.0
    started = time.process_time()
    with quietly():
        callbacks = [watch, partition, CleanSubsetFinetuneCallback()]
        trainer_of(epochs, callbacks, "cpu").fit(SmallNetwork(), loader)
    return {
        "samples": _IN_ROUNDS,
        "epochs": epochs,
        "rounds": len(partition.rounds),
        "seconds": time.process_time() - started,
        "resident": watch.resident,
    }
