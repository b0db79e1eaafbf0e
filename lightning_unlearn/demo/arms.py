"""The demo: the three callbacks in one fit, beside the controls that show what they are worth."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
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
from lightning_unlearn.sampling import OnNoisy
from lightning_unlearn.storage import target_folder
from lightning_unlearn.targets import Reading

BASE = "base"
CONTINUE = "continue on all data, same steps"
RETRAIN_SHORT = "retrain on the subset, same steps"
RETRAIN = "retrain on the subset, as the base"
LFT = "L-FT (fine-tune pruned layer and after)"
FFT = "F-FT (fine-tune all layers)"
RELABEL = "F-FT, wrong labels replaced"
ORACLE = "F-FT on the truly clean subset"


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        base_epochs: epochs on all the data; long enough to memorize the wrong labels.
        repair_epochs: epochs on the clean subset.
        noise: share of wrong training labels.
        amount: share of the live neurons to prune.
        lr: learning rate at which the fine-tuning's AdamW starts; it falls to zero along a cosine. The controls of the
            same steps have both.
        weight_decay: likewise. Strong, since what was memorized must fade while the loss on the subset is small.
        seeds: of the repeats: split, noise, initial weights and order.
    """

    base_epochs: int = 40
    repair_epochs: int = 20
    noise: float = 0.4
    amount: float = 0.15
    lr: float = 3e-3
    weight_decay: float = 2.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Arm:
    """What one way to train came to.

    Args:
        accuracy: on the test set, in [0, 1].
        seconds: wall time; of the arms that start from the base, without the base.
        steps: optimizer steps, counted likewise.
    """

    accuracy: float
    seconds: float
    steps: int


@dataclass(frozen=True)
class Detection:
    """How well the partition found the wrong labels, judged with the true labels that it never saw.

    Args:
        auroc: of ``1 - clean_probability`` against the true mask.
        precision: share of the suspects whose label is wrong.
        recall: share of the wrong labels that are suspects.
        suggested_right: share of the suspects with a wrong label whose suggested label is right.
        noise_rate: as estimated.
        memorised: share of the wrong labels that the base model predicts.
    """

    auroc: float
    precision: float
    recall: float
    suggested_right: float
    noise_rate: float
    memorised: float


@dataclass(frozen=True)
class Outcome:
    """One repeat."""

    seed: int
    arms: dict[str, Arm]
    detection: Detection


class _Phase(L.Callback):
    """A progress bar for one phase of a fit, and its wall time and steps."""

    def __init__(self, name: str, first: int, last: int) -> None:
        self.name, self.first, self.last = name, first, last
        self.started = 0.0
        self.seconds = 0.0
        self.steps = 0
        self._bar: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.first:
            self.started, self.steps = time.perf_counter(), trainer.global_step
            self._bar = tqdm(total=self.last - self.first, desc=f"{self.name:<42}", unit=" epochs")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.update()
            if trainer.current_epoch == self.last - 1:
                self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()

    def _end(self, trainer: L.Trainer) -> None:
        self.seconds = time.perf_counter() - self.started
        self.steps = trainer.global_step - self.steps
        self._bar.close()
        self._bar = None


class _TruePartition(L.Callback):
    """Publishes the partition that knows the true labels: the best that any partition could do."""

    regresses_on_probability = True
    is_dry_run = False
    sample_weight = None
    memorised = None

    def __init__(self, truth: Partition, at_epoch: int) -> None:
        self.truth = truth
        self.at_epoch = at_epoch
        self.reading = Reading()

    def pull_partition(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Partition | None:
        return self.truth if trainer.current_epoch >= self.at_epoch else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines about hardware and loaders; on one thread, as more would only wait for each other."""
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


def _trainer(epochs: int, callbacks: list[L.Callback], steps: int = -1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _accuracy(model: L.LightningModule, data: DigitsDataModule) -> float:
    (result,) = _trainer(1, []).test(model, datamodule=data, verbose=False)
    return float(result["test_acc"])


class _Repeat:
    """One seed of the demo; every arm after the base starts from the same checkpoint."""

    def __init__(self, settings: Settings, seed: int, folder: Path, report: Path | None = None) -> None:
        self.settings = settings
        self.seed = seed
        self.folder = folder
        self.report = report
        self.first = settings.base_epochs
        self.last = settings.base_epochs + settings.repair_epochs
        self.data = DigitsDataModule(noise=settings.noise, seed=seed)
        self.optimizer = partial(torch.optim.AdamW, lr=settings.lr, weight_decay=settings.weight_decay)
        self.data.setup()
        self.wrong = self.data.given_label != self.data.true_label

    def run(self) -> tuple[Outcome, Partition]:
        """All arms."""
        arms, partition, checkpoint = self._product()
        memorised = self._memorised(checkpoint)
        arms[CONTINUE] = self._continue(checkpoint, arms[FFT].steps)
        clean = partition.clean_indices()
        arms[RETRAIN_SHORT] = self._retrain(RETRAIN_SHORT, clean, self.settings.repair_epochs, like_fine_tuning=True)
        arms[RETRAIN] = self._retrain(RETRAIN, clean, self.settings.base_epochs)
        arms[LFT] = self._resume(
            LFT,
            checkpoint,
            [
                AttributionPartitionCallback(at_epoch=self.first),
                SensitivityPruneCallback(amount=self.settings.amount),
                self._finetune("layers"),
            ],
        )
        arms[RELABEL] = self._resume(
            RELABEL,
            checkpoint,
            [
                AttributionPartitionCallback(at_epoch=self.first),
                SensitivityPruneCallback(amount=self.settings.amount),
                self._finetune("full", on_noisy="relabel"),
            ],
        )
        arms[ORACLE] = self._resume(
            ORACLE,
            checkpoint,
            [
                _TruePartition(self._truth(partition), self.first),
                SensitivityPruneCallback(amount=self.settings.amount),
                self._finetune("full"),
            ],
        )
        order = (BASE, CONTINUE, RETRAIN_SHORT, RETRAIN, LFT, FFT, RELABEL, ORACLE)
        return Outcome(
            self.seed, {name: arms[name] for name in order}, self._detection(partition, memorised)
        ), partition

    def _product(self) -> tuple[dict[str, Arm], Partition, Path]:
        """What a user runs: one fit with the three callbacks. The base is this fit after ``base_epochs``."""
        partition = AttributionPartitionCallback(at_epoch=self.first)
        base, repair = _Phase(BASE, 0, self.first), _Phase(FFT, self.first, self.last)
        keep = ModelCheckpoint(
            self.folder,
            filename=f"base-{self.seed}",
            every_n_epochs=self.first,
            save_top_k=-1,
            save_on_train_epoch_end=True,
        )
        L.seed_everything(self.seed, verbose=False)
        model = DigitsClassifier()
        callbacks: list[L.Callback] = [
            base,
            repair,
            partition,
            SensitivityPruneCallback(amount=self.settings.amount),
            self._finetune("full"),
            keep,
        ]
        if self.report is not None:
            callbacks.append(UnlearnReport(self.report))
        _trainer(self.last, callbacks).fit(model, datamodule=self.data)
        checkpoint = self.folder / f"base-{self.seed}.ckpt"
        before = DigitsClassifier.load_from_checkpoint(checkpoint, map_location="cpu")
        arms = {
            BASE: self._arm(before, base),
            FFT: self._arm(model, repair),
        }
        return arms, partition.partition, checkpoint

    def _arm(self, model: DigitsClassifier, phase: _Phase) -> Arm:
        return Arm(_accuracy(model, self.data), phase.seconds, phase.steps)

    def _resume(self, name: str, checkpoint: Path, callbacks: list[L.Callback]) -> Arm:
        phase = _Phase(name, self.first, self.last)
        L.seed_everything(self.seed, verbose=False)
        model = DigitsClassifier()
        _trainer(self.last, [phase, *callbacks]).fit(model, datamodule=self.data, ckpt_path=checkpoint)
        return self._arm(model, phase)

    def _continue(self, checkpoint: Path, steps: int) -> Arm:
        """From the base's weights, with the optimizer and the steps of the fine-tuning: only the data differ."""
        model = DigitsClassifier.load_from_checkpoint(checkpoint, map_location="cpu")
        epochs = -(-steps // len(self.data.train_dataloader()))
        self._train_like_fine_tuning(model, epochs)
        phase = _Phase(CONTINUE, 0, epochs)
        L.seed_everything(self.seed, verbose=False)
        _trainer(epochs, [phase], steps).fit(model, datamodule=self.data)
        return self._arm(model, phase)

    def _finetune(self, mode: Literal["full", "layers"], on_noisy: OnNoisy = "drop") -> CleanSubsetFinetuneCallback:
        schedule = partial(CosineAnnealingLR, T_max=self.settings.repair_epochs)
        return CleanSubsetFinetuneCallback(
            mode, warm_start="keep", on_noisy=on_noisy, optimizer=self.optimizer, lr_scheduler=schedule
        )

    def _train_like_fine_tuning(self, model: DigitsClassifier, epochs: int) -> None:
        """Gives the model the optimizer and schedule of the fine-tuning."""

        def configure_optimizers() -> Any:
            optimizer = self.optimizer(model.parameters())
            return [optimizer], [CosineAnnealingLR(optimizer, T_max=epochs)]

        model.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def _retrain(self, name: str, clean: Tensor, epochs: int, like_fine_tuning: bool = False) -> Arm:
        """From new weights, with the optimizer of the base or of the fine-tuning."""
        phase = _Phase(name, 0, epochs)
        L.seed_everything(self.seed, verbose=False)
        model = DigitsClassifier()
        if like_fine_tuning:
            self._train_like_fine_tuning(model, epochs)
        subset = Subset(self.data.train_data, clean.tolist())
        loader = DataLoader(subset, batch_size=self.data.batch_size, shuffle=True)
        _trainer(epochs, [phase]).fit(model, loader)
        return self._arm(model, phase)

    def _truth(self, partition: Partition) -> Partition:
        return replace(
            partition,
            clean_probability=(~self.wrong).float(),
            is_clean=~self.wrong,
            suggested_label=self.data.true_label,
            suggested_probability=torch.ones(len(self.wrong)),
            noise_rate=self.wrong.float().mean().item(),
            noise_rate_interval=None,
            often_called=(),
            recipe="truth",
            warning="",
        )

    @torch.no_grad()
    def _memorised(self, checkpoint: Path) -> float:
        model = DigitsClassifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()
        image = self.data.train_data.tensors[0]
        logits: Tensor = model(image)
        fitted = logits.argmax(dim=1) == self.data.given_label
        return fitted[self.wrong].float().mean().item()

    def _detection(self, partition: Partition, memorised: float) -> Detection:
        suspect, wrong = ~partition.is_clean, self.wrong
        found = suspect & wrong
        right = partition.suggested_label == self.data.true_label
        return Detection(
            auroc=binary_auroc(1 - partition.clean_probability, wrong.int()).item(),
            precision=(found.sum() / suspect.sum().clamp(min=1)).item(),
            recall=(found.sum() / wrong.sum()).item(),
            suggested_right=(right & found).sum().item() / max(1, int(found.sum())),
            noise_rate=partition.noise_rate,
            memorised=memorised,
        )


def run_demo(settings: Settings, out: str | PathLike[str]) -> list[Outcome]:
    """Runs every seed; writes ``suspects.csv``, ``partition.npz`` and ``report.html`` of the first to ``out``."""
    out = target_folder(out)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for number, seed in enumerate(settings.seeds):
            if len(settings.seeds) > 1:
                tqdm.write(f"Repeat {number + 1} of {len(settings.seeds)} (seed {seed})")
            outcome, partition = _Repeat(settings, seed, Path(folder), None if number else out).run()
            outcomes.append(outcome)
            if number == 0:
                partition.to_csv(out / "suspects.csv")
    return outcomes


def _spread(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(settings: Settings, outcomes: list[Outcome]) -> str:
    """The demo's last words: every arm, and the partition against the true mask."""
    lines = [f"{'':<42}{'test accuracy':>16}{'vs base':>10}{'seconds':>14}{'steps':>8}"]
    base = statistics.mean(outcome.arms[BASE].accuracy for outcome in outcomes)
    for name in outcomes[0].arms:
        arms = [outcome.arms[name] for outcome in outcomes]
        accuracy = [arm.accuracy for arm in arms]
        gain = "" if name == BASE else f"{100 * (statistics.mean(accuracy) - base):+.1f}"
        steps = round(statistics.mean(arm.steps for arm in arms))
        seconds = _spread([arm.seconds for arm in arms], 1)
        lines.append(f"{name:<42}{_spread(accuracy, 3):>16}{gain:>10}{seconds:>14}{steps:>8}")
    found = [outcome.detection for outcome in outcomes]
    score = {field: _spread([getattr(each, field) for each in found], 3) for field in asdict(found[0])}
    seeds = f"mean ± standard deviation of {len(outcomes)} seeds" if len(outcomes) > 1 else f"seed {outcomes[0].seed}"
    return "\n".join(
        [
            f"Digits, 1,198 training images, {settings.noise:.0%} of the labels wrong;"
            f" {settings.base_epochs} + {settings.repair_epochs} epochs; {seeds}.",
            f"The base has memorized {score['memorised']} of the wrong labels.",
            "",
            *lines,
            "",
            "Arms of the same steps have the optimizer of the fine-tuning; retraining starts from new weights, and 'as",
            "the base' has its optimizer and epochs. Seconds and steps below the base come on top of it; the base's",
            "include reading the evidence, L-FT's and F-FT's its last pass, partition and pruning. With wrong labels",
            "replaced there are more samples, so more steps.",
            f"Partition: AUROC {score['auroc']}, precision {score['precision']}, recall {score['recall']};"
            f" estimated noise rate {score['noise_rate']};",
            f"suggested label right for {score['suggested_right']} of the wrong labels found.",
        ]
    )
