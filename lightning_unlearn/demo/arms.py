"""The demo: the three callbacks as they are in one fit, beside the controls that show what they are worth."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    Partition,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.demo.digits import DigitsClassifier, DigitsDataModule
from lightning_unlearn.demo.outcomes import (
    ARMS,
    AUTO,
    BASE,
    CEILING,
    CONTINUE,
    KEPT_WEIGHTS,
    REPAIR,
    RETRAIN,
    RETRAIN_SHORT,
    SHRINK_ALL,
    Arm,
    Detection,
    Outcome,
    Settings,
)
from lightning_unlearn.demo.phases import Phase, fall_to_zero, make_trainer, quiet
from lightning_unlearn.finetuning.warm_start import StartWeights
from lightning_unlearn.utilities.files import target_folder


class _Repeat:
    """One seed of the demo."""

    def __init__(self, settings: Settings, seed: int, folder: Path, report: Path | None = None) -> None:
        self.seed = seed
        self.report = report
        self.first = settings.base_epochs
        self.last = settings.base_epochs + settings.repair_epochs
        self.data = DigitsDataModule(noise=settings.noise, seed=seed)
        self.data.setup()
        self.wrong = self.data.given_label != self.data.true_label
        self.checkpoint = folder / f"base-{seed}.ckpt"

    def run(self) -> tuple[Outcome, Partition]:
        """Return all arms."""
        arms, partition = self._product()
        steps = arms[REPAIR].steps
        kept, clean = partition.clean_indices(), (~self.wrong).nonzero().flatten()
        arms[KEPT_WEIGHTS] = self._resume(KEPT_WEIGHTS, CleanSubsetFinetuneCallback(warm_start="keep"))
        arms[CONTINUE] = self._train(CONTINUE, self._base(), steps)
        arms[SHRINK_ALL] = self._train(SHRINK_ALL, self._shrunk(), steps)
        arms[RETRAIN_SHORT] = self._train(RETRAIN_SHORT, self._fresh(), steps, kept)
        arms[CEILING] = self._train(CEILING, self._fresh(), steps, clean)
        arms[RETRAIN] = self._train(RETRAIN, self._fresh(), self.first * self._batches(kept), kept)
        arms[AUTO] = self._auto()
        detection = self._detection(partition, self._memorized())
        return Outcome(self.seed, {name: arms[name] for name in ARMS}, detection), partition

    def _product(self) -> tuple[dict[str, Arm], Partition]:
        """Return what a user runs: one fit with the three callbacks. The base is this fit after ``base_epochs``."""
        partition = AttributionPartitionCallback(at_epoch=self.first)
        base, repair = Phase(BASE, 0, self.first), Phase(REPAIR, self.first, self.last)
        keep = ModelCheckpoint(
            self.checkpoint.parent,
            filename=self.checkpoint.stem,
            every_n_epochs=self.first,
            save_top_k=-1,
            save_on_train_epoch_end=True,
        )
        model = self._fresh()
        callbacks: list[L.Callback] = [base, repair, partition, *_acting(), keep]
        if self.report is not None:
            callbacks.append(UnlearnReport(self.report))
        make_trainer(self.last, callbacks).fit(model, datamodule=self.data)
        return {BASE: self._arm(self._base(), base), REPAIR: self._arm(model, repair)}, partition.partition

    def _auto(self) -> Arm:
        """Return the same fit with nothing set at all."""
        model, phase = self._fresh(), Phase(AUTO, 0, self.last)
        callbacks = [phase, AttributionPartitionCallback(), *_acting()]
        make_trainer(self.last, callbacks).fit(model, datamodule=self.data)
        return self._arm(model, phase)

    def _resume(self, name: str, finetune: CleanSubsetFinetuneCallback) -> Arm:
        """Continue from the base's checkpoint with another fine-tuning."""
        model, phase = self._fresh(), Phase(name, self.first, self.last)
        partition = AttributionPartitionCallback(at_epoch=self.first)
        trainer = make_trainer(self.last, [phase, partition, SensitivityPruneCallback(), finetune])
        trainer.fit(model, datamodule=self.data, ckpt_path=self.checkpoint)
        return self._arm(model, phase)

    def _train(self, name: str, model: DigitsClassifier, steps: int, index: Tensor | None = None) -> Arm:
        """Train ``steps`` steps on those samples, or on all, with the schedule of the fine-tuning."""
        index = torch.arange(len(self.wrong)) if index is None else index
        epochs = -(-steps // self._batches(index))
        phase = Phase(name, 0, epochs)
        fall_to_zero(model, steps)
        L.seed_everything(self.seed, verbose=False)
        subset = Subset(self.data.train_data, index.tolist())
        loader = DataLoader(subset, batch_size=self.data.batch_size, shuffle=True)
        make_trainer(epochs, [phase], steps).fit(model, loader, self.data.val_dataloader())
        return self._arm(model, phase)

    def _batches(self, index: Tensor) -> int:
        return -(-len(index) // self.data.batch_size)

    def _fresh(self) -> DigitsClassifier:
        """Start with the weights that the fit of this seed began with."""
        L.seed_everything(self.seed, verbose=False)
        return DigitsClassifier()

    def _base(self) -> DigitsClassifier:
        return DigitsClassifier.load_from_checkpoint(self.checkpoint, map_location="cpu")

    def _shrunk(self) -> DigitsClassifier:
        start = StartWeights()
        start.remember(self._fresh())
        model = self._base()
        start.move(model, "shrink", (), ())
        return model

    def _arm(self, model: DigitsClassifier, phase: Phase) -> Arm:
        (result,) = make_trainer(1, []).test(model, datamodule=self.data, verbose=False)
        return Arm(float(result["test_acc"]), phase.seconds, phase.steps)

    @torch.no_grad()
    def _memorized(self) -> float:
        image, given = self.data.train_data.tensors
        logits: Tensor = self._base().eval()(image)
        return (logits.argmax(dim=1) == given)[self.wrong].float().mean().item()

    def _detection(self, partition: Partition, memorized: float) -> Detection:
        suspect, wrong = ~partition.is_clean, self.wrong
        found = suspect & wrong
        right = partition.suggested_label == self.data.true_label
        return Detection(
            auroc=binary_auroc(1 - partition.clean_probability, wrong.int()).item(),
            precision=(found.sum() / suspect.sum().clamp(min=1)).item(),
            recall=(found.sum() / wrong.sum()).item(),
            suggested_right=(right & found).sum().item() / max(1, int(found.sum())),
            noise_rate=partition.noise_rate,
            memorized=memorized,
        )


def _acting() -> list[L.Callback]:
    return [SensitivityPruneCallback(), CleanSubsetFinetuneCallback()]


def run_demo(settings: Settings, out: str | PathLike[str]) -> list[Outcome]:
    """Run every seed, and write ``suspects.csv``, ``partition.npz`` and ``report.html`` of the first to ``out``."""
    out = target_folder(out)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number, seed in enumerate(settings.seeds):
            if len(settings.seeds) > 1:
                tqdm.write(f"Seed {seed}, {number + 1} of {len(settings.seeds)}")
            outcome, partition = _Repeat(settings, seed, Path(folder), None if number else out).run()
            outcomes.append(outcome)
            if number == 0:
                partition.to_csv(out / "suspects.csv")
    return outcomes
