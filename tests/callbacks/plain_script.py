"""A team that has the checkpoint of a fit with the callbacks, and has never heard of this package.

Run by test_killed.py in a process of its own. Imports nothing that imports the package.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PACKAGE = "lightning_unlearn"


class Plain(L.LightningModule):
    """The network of tests.toys.Toy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(32, 20),
            nn.BatchNorm1d(20),
            nn.ReLU(),
            nn.Linear(20, 4),
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)}


class Starts(L.Callback):
    """The weights at the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def uninstall() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "tests")]:
        del sys.modules[name]
    sys.modules[PACKAGE] = None  # type: ignore[assignment]
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        return
    raise AssertionError("the package can still be imported")


def use(path: Path, result: Path) -> None:
    """Loads a checkpoint, validates it and goes on training from it for an epoch."""
    with (result.parent / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    uninstall()
    loaded = Plain.load_from_checkpoint(path, strict=True)
    loader = DataLoader(TensorDataset(torch.randn(48, 16), torch.randint(0, 4, (48,))), batch_size=16)
    starts = Starts()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=torch.load(path, weights_only=True)["epoch"] + 2,
        callbacks=[starts],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Plain(), loader, ckpt_path=path, verbose=False)
    trainer.fit(Plain(), loader, loader, ckpt_path=path)
    found = {
        "loaded": dict(loaded.state_dict()),
        "resumed": starts.weights,
        "epochs": trainer.current_epoch,
        "val_loss": trainer.callback_metrics["val_loss"],
    }
    torch.save(found, result)
