"""The paper's protocol and what it is compared with: one training on noise, and every way to go on from it.

The fit that the paper calls the initial model is made once, with a learning rate that stays. What fine-tunes goes on
from its checkpoint, with the paper's Adam, and so does "continue", on all the data for as many steps. Retraining starts
from new weights, for as many epochs as the initial model had.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks.measures import quality
from benchmarks.models import StopAfter, TrainOn, train_with
from benchmarks.runs import fast_precision, kept
from examples.cifar10.cifar10 import Cifar10, PaperResNet18
from examples.speech_commands.speech_commands import PaperSpeechCnn, SpeechCommands
from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    Partition,
    SensitivityPruneCallback,
)
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.evidence import Evidence

AMOUNT = 40 / 256  # of the neurons that are pruned
CRITERIA = (
    "sensitivity",
    "mean_abs_ratio",
    "rms_ratio",
    "std_ratio",
    "frequency_ratio",
    "hessian",
    "random",
)
Kind = Literal["initial", "fine-tune", "retrain", "continue", "all"]


@dataclass(frozen=True)
class Arm:
    """One way to a network.

    Args:
        name: of the arm.
        kind: what is done.
        recipe: of the partition; ``"truth"`` for the true one.
        mode: of the fine-tuning.
        criterion: of the pruning; None for the recipe's own, with its guards.
        decays: whether the learning rate falls to zero.
    """

    name: str
    kind: Kind
    recipe: str = ""
    mode: str = "full"
    criterion: str | None = None
    decays: bool = False


def _of_recipe(recipe: str) -> list[Arm]:
    return [
        Arm(f"{recipe}, L-FT", "fine-tune", recipe, "layers"),
        Arm(f"{recipe}, F-FT", "fine-tune", recipe),
        Arm(f"{recipe}, retrain", "retrain", recipe),
        Arm(f"{recipe}, retrain, rate decays", "retrain", recipe, decays=True),
        Arm(f"{recipe}, continue on all", "continue", recipe),
    ]


INITIAL = "initial"
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(INITIAL, "initial"),
        *_of_recipe("rlap"),
        *_of_recipe("auto"),
        Arm("oracle, F-FT", "fine-tune", "truth"),
        Arm("all, rate decays", "all", decays=True),
        *(Arm(f"prune {name}, L-FT", "fine-tune", "auto", "layers", name) for name in CRITERIA),
        *(Arm(f"prune {name}, F-FT", "fine-tune", "auto", "full", name) for name in CRITERIA),
    )
}
"""In the order in which they are run: what others need comes first."""
LONG = tuple(name for name in ARMS if name.startswith("prune ") and name.endswith("F-FT"))
"""What the CPU scale leaves out."""


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Args:
        task: ``"cifar10"`` or ``"speech"``.
        noise: a name of :data:`NOISES`.
        train_size: of the training set; None for all of it.
        base_epochs: of the initial model and of retraining.
        repair_epochs: of fine-tuning.
        test_size: of the test set, of CIFAR-10.
        network: arguments of the network.
        precision: of the Trainer.
    """

    task: str
    noise: str
    train_size: int | None
    base_epochs: int = 60
    repair_epochs: int = 30
    test_size: int = 10_000
    network: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16-mixed"


NOISES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {
        "paper": {"inputs": "paper"},
        "paper8": {"inputs": "paper", "sigma": 8.0},
        "gaussian": {"inputs": "gaussian"},
        "symmetric": {"labels": "symmetric"},
        "human": {"labels": "human"},
    },
    "speech": {"paper": {"mfcc_sigma": 15.0}, "snr": {"snr_db": 0.0}, "symmetric": {"labels": "symmetric"}},
}
"""Arguments of the DataModules: the paper's noise, also stronger, without what gives it away, and wrong labels."""

DRAWS = 2
"""Raised where the same seed draws other noise than before, so that no fit goes on from a checkpoint of the old one."""


class PaperUnit:
    """A setting with a seed, and its folder.

    Args:
        setting: which.
        seed: of data, noise, weights and order.
        folder: where checkpoint, partitions and results are kept.
        data: of the DataModule.
        accelerator: of the Trainer.
    """

    def __init__(self, setting: Setting, seed: int, *, folder: Path, data: Path, accelerator: str) -> None:
        self.setting, self.seed, self.folder = setting, seed, folder
        self.source, self.accelerator = data, accelerator

    def settings(self) -> dict[str, Any]:
        """All that its results depend on."""
        return {**asdict(self.setting), "seed": self.seed, "digits": self._is_digits, "draws": DRAWS}

    def result(self, arm: str) -> dict[str, Any]:
        """What an arm came to, run now if it has not been."""
        of = {"task": self.setting.task, "noise": self.setting.noise, "seed": self.seed, "arm": arm}
        return kept(self.folder / f"{arm}.json", lambda: of | self._run(ARMS[arm]), self.accelerator)

    def _run(self, arm: Arm) -> dict[str, Any]:
        if arm.kind in ("retrain", "continue"):
            self.result(f"{arm.recipe}, F-FT")
        elif arm.criterion is not None:
            plain = self.result(f"{arm.recipe}, {'L-FT' if arm.mode == 'layers' else 'F-FT'}")
            if not plain["acted"]:
                # Without a partition to act upon there is nothing to prune by: the fit would be that one again.
                return {name: value for name, value in plain.items() if name != "arm"}
        elif arm.kind == "fine-tune":
            self.result(INITIAL)
        L.seed_everything(self.seed, verbose=False)
        found = {
            "initial": self._initial,
            "fine-tune": self._finetune,
            "retrain": self._retrain,
            "continue": self._continue,
            "all": self._all,
        }[arm.kind](arm)
        return {"train_size": len(self.data.train_data), **found}

    @property
    def _is_digits(self) -> bool:
        return self.setting.task == "speech" and (self.source.suffix == ".zip" or any(self.source.glob("*.wav")))

    @cached_property
    def data(self) -> Any:
        """The DataModule, set up."""
        setting = self.setting
        options: dict[str, Any] = {"train_size": setting.train_size, "seed": self.seed}
        if setting.task == "cifar10":
            make: Callable[..., Any] = partial(Cifar10, test_size=setting.test_size)
        else:
            make = partial(SpeechCommands, digits=self._is_digits)
        data = make(self.source, **options, **NOISES[setting.task][setting.noise])
        data.setup()
        return data

    @property
    def _bad(self) -> Tensor:
        """(N,) bool, the truth: what is better not trained on."""
        return self.data.is_wrong | self.data.is_corrupted

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "initial.ckpt"

    def _network(self, *, decays: bool = False) -> L.LightningModule:
        make = {"cifar10": PaperResNet18, "speech": PaperSpeechCnn}[self.setting.task]
        epochs = self.setting.base_epochs if decays else None
        return make(**self.setting.network, decay_epochs=epochs).to(memory_format=torch.channels_last)

    def _initial(self, arm: Arm) -> dict[str, Any]:
        epochs = self.setting.base_epochs
        keep = ModelCheckpoint(
            self.folder,
            filename="initial",
            every_n_epochs=epochs,
            save_top_k=-1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        callbacks = [AttributionPartitionCallback(at_epoch=epochs), StopAfter(epochs), keep]
        # One epoch more than is run, since the partition wants to have one left after it.
        return self._fit(self._network(), self.data, callbacks, epochs + 1, trained=epochs)

    def _finetune(self, arm: Arm) -> dict[str, Any]:
        setting = self.setting
        partition, adam = self._partitioner(arm.recipe), partial(torch.optim.Adam, lr=1e-3)
        prune = SensitivityPruneCallback(amount=AMOUNT, **self._pruning(arm))
        finetune = CleanSubsetFinetuneCallback(arm.mode, warm_start="keep", optimizer=adam)
        callbacks = [TrainOn(adam), partition, prune, finetune]
        last = setting.base_epochs + setting.repair_epochs
        found = self._fit(
            self._network(), self.data, callbacks, last, trained=setting.repair_epochs, checkpoint=self._checkpoint
        )
        # The pass and the pruning happen once, and are told beside the seconds of an epoch.
        own = {"partition_seconds": partition.seconds, "prune_seconds": prune.seconds}
        found["seconds"] -= sum(own.values())
        if arm.criterion is None:
            partition.partition.save(self._partition_file(arm.recipe))
        pruned = sum(len(mask.pruned_indices()) for mask in prune.masks) if prune.has_result else 0
        quality_of = quality(partition.partition, self._bad)
        return found | own | {"acted": finetune.is_active, "pruned": pruned, "partition": quality_of}

    def _pruning(self, arm: Arm) -> dict[str, Any]:
        if arm.criterion is not None:
            # As many neurons for every criterion, and none taken back, so that only the choice differs.
            criterion = Sensitivity(fdr_level=None) if arm.criterion == "sensitivity" else arm.criterion
            return {"criterion": criterion, "max_val_drop": None}
        return {"max_val_drop": None} if arm.recipe == "rlap" else {}

    def _partitioner(self, recipe: str) -> AttributionPartitionCallback:
        bad = self._bad

        def truth(evidence: Evidence) -> Tensor:
            return (~bad).float()[evidence.index.cpu()].to(evidence.label.device)

        # The paper keeps no sample for the sake of its class.
        fraction = None if recipe == "auto" else 0.0
        chosen = get_recipe(truth if recipe == "truth" else recipe, min_class_fraction=fraction)
        return AttributionPartitionCallback(at_epoch=self.setting.base_epochs, recipe=chosen)

    def _partition_file(self, recipe: str) -> Path:
        return self.folder / f"partition-{recipe}.pt"

    def _retrain(self, arm: Arm) -> dict[str, Any]:
        kept_index = Partition.load(self._partition_file(arm.recipe)).clean_indices()
        data, rows = copy.copy(self.data), self.data.train_data
        if len(kept_index) % data.batch_size == 1:
            kept_index = kept_index[:-1]  # batch norm cannot be trained on one sample
        data.train_data = type(rows)(rows.x[kept_index], rows.y[kept_index])
        return self._fit(self._network(decays=arm.decays), data, [], self.setting.base_epochs)

    def _all(self, arm: Arm) -> dict[str, Any]:
        return self._fit(self._network(decays=arm.decays), self.data, [], self.setting.base_epochs)

    def _continue(self, arm: Arm) -> dict[str, Any]:
        """All the data, with the optimizer and the steps of F-FT: only the data differ."""
        steps = self.result(f"{arm.recipe}, F-FT")["steps"]
        batches = len(self.data.train_dataloader())
        model = self._network()
        model.load_state_dict(torch.load(self._checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        train_with(model, partial(torch.optim.Adam, lr=1e-3), None, "epoch")
        return self._fit(model, self.data, [], -(-steps // batches), steps=steps, trained=steps / batches)

    def _trainer(self, **options: Any) -> L.Trainer:
        return L.Trainer(
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator=self.accelerator,
            devices=1,
            precision=fast_precision(self.setting.precision, self.accelerator),
            **options,
        )

    def _fit(
        self,
        model: L.LightningModule,
        data: Any,
        callbacks: list[L.Callback],
        epochs: int,
        *,
        trained: float | None = None,
        steps: int = -1,
        checkpoint: Path | None = None,
    ) -> dict[str, Any]:
        """Trains for ``trained`` epochs, by default all, and tests."""
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = self._trainer(max_epochs=epochs, max_steps=steps, callbacks=callbacks, enable_checkpointing=saves)
        before = 0 if checkpoint is None else self.result(INITIAL)["steps"]
        started = time.perf_counter(), time.process_time()
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        seconds = {"seconds": time.perf_counter() - started[0], "process_seconds": time.process_time() - started[1]}
        (tested,) = self._trainer(enable_checkpointing=False).test(model, datamodule=data, verbose=False)
        names = {"accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "f1", "top3": "top3"}
        metrics = {name: tested[f"test_{of}"] for name, of in names.items()}
        return {**metrics, **seconds, "epochs": trained or epochs, "steps": trainer.global_step - before}
