"""What test_killed.py runs in processes of its own, forked from one that has imported all this and done nothing else.

Every function here is the target of such a process. The order of the data is a function of the epoch, as a fit that is
to be resumed exactly needs it.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.attribution import Attributor
from lightning_unlearn.finetuning.run import Finetuning
from lightning_unlearn.partitioning.run import Partitioning
from lightning_unlearn.pruning import guard as guard_module
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.pruning.holding import HeldEntries
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, by_margin, fit, sgd, trio, weights

SIZE, AT, EPOCHS = 101, 2, 5


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)


def small_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


# A criterion that prunes in any case, so that the guard has something to weigh up.
PRUNES = {"criterion": "magnitude", "amount": 0.3, "max_val_drop": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"prune": PRUNES},
    "layers, lr": {"prune": PRUNES, "finetune": {"mode": "layers", "lr": 0.01}, "recipe": by_margin},
    "layers, optimizer": {
        "prune": PRUNES,
        "finetune": {"mode": "layers", "optimizer": small_adam, "lr_scheduler": halving},
        "recipe": by_margin,
        "evidence_from": "eval_passes",
    },
    "rounds, relabel": {
        "prune": {"criterion": Sensitivity(fdr_level=None)},  # the regression alone
        "finetune": {"on_noisy": "relabel", "relabel_threshold": 0.4},
        "every_n_epochs": 1,
        "min_change": 0,
        "recipe": by_margin,
    },
    "rounds, reweight, new head": {
        "prune": PRUNES | {"amount": 0.15},
        "finetune": {"on_noisy": "reweight", "lr": 0.02},
        "every_n_epochs": 2,
        "min_change": 0,
        "recipe": by_margin,
        "evidence_from": "eval_passes",
    },
}


def scheduled(module: Any) -> Any:
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)}


class Reads(Blobs):
    """Tells what reads a sample: training, or a pass of ours."""

    trainer: Any = None

    def __getitem__(self, index: int) -> Any:
        in_pass = self.trainer is not None and self.trainer.state.stage == RunningStage.VALIDATING
        (self.read_in_pass if in_pass else self.read_in_training)()
        return super().__getitem__(index)

    def read_in_pass(self) -> None:
        """To be counted."""

    def read_in_training(self) -> None:
        """To be counted."""


class Attach(Callback):
    """Tells the data whose stage to look at."""

    def __init__(self, data: Reads) -> None:
        self.data = data

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.data.trainer = trainer


PLACES = {
    "training step": (Toy, "training_step"),
    "reading a training sample": (Reads, "read_in_training"),
    "reading a sample in a pass": (Reads, "read_in_pass"),
    "attributing a batch": (Attributor, "attribute"),
    "validation step": (Toy, "validation_step"),
    "computing the partition": (Partitioning, "compute"),
    "reporting the partition": (Partitioning, "report"),
    "pruning": (SensitivityPruneCallback, "_prune"),
    "measuring in the guard": (guard_module.ScoreMonitor, "is_worse"),
    "holding at zero": (HeldEntries, "hold"),
    "starting to fine-tune": (Finetuning, "_start"),
    "optimizer step": (torch.optim.SGD, "step"),
    "making a checkpoint": (ModelCheckpoint, "_save_checkpoint"),
    "putting a checkpoint in its place": (LocalFileOpener, "commit"),
}
"""Where a fit is killed: right before, or right after, a call of one of these."""


def counted(function: Callable[..., Any], name: str, counts: Counter[str], kill: tuple[str, int, str] | None) -> Any:
    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        if kill == (name, counts[name], "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if kill == (name, counts[name], "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counting


def quietly(folder: Path) -> None:
    """What this process says goes to a file."""
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def train(folder: Path, variant: str, kill: tuple[str, int, str] | None = None) -> None:
    """Goes on from the last checkpoint in the folder, if there is one, to the end or to where it is killed.

    Args:
        folder: for checkpoints and the result.
        variant: of the callbacks.
        kill: a place, at which of its calls, and "before" or "after" it.
    """
    quietly(folder)
    counts: Counter[str] = Counter()
    for name, (owner, attribute) in PLACES.items():
        setattr(owner, attribute, counted(getattr(owner, attribute), name, counts, kill))
    data = BlobsData(Reads(SIZE), by_epoch=True)
    callbacks = trio(AT, **VARIANTS[variant])
    module, record = Toy(optimizer=scheduled), IndexRecorder(data.train)
    keep = ModelCheckpoint(folder / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    attach = Attach(data.train)
    trainer = fit(
        module,
        data,
        [*callbacks, record, keep, attach],
        ckpt_path="last",
        max_epochs=EPOCHS,
        enable_checkpointing=True,
    )
    found = {
        "counts": dict(counts),
        "weights": weights(module),
        "states": [callback.state_dict() for callback in callbacks],
        "optimizer": trainer.optimizers[0].state_dict(),
        "drawn": record.by_epoch,
    }
    torch.save(found, folder / "result.pt")
