"""Rows of a table with a class each, a share of them called wrongly: find them, and repair what they taught.

Measured on 427 rows of breast cancer, 30 % wrong: validation accuracy .958 after 40 epochs, .662 without the
callbacks; 83 suspects, all of them truly wrong (of 128 that are). 12 s of CPU, both fits.
One seed, one thread of a busy 2-core x86-64 machine, torch 2.11.0,
lightning 2.6.6, captum 0.9.0, 2026-12-01.

Run: python tabular.py [--data FILE.csv --label COLUMN] [--noise SHARE] [--fast]
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, UnlearnReport
from lightning_unlearn.noise import symmetric_labels

QUIET: dict = {"devices": 1, "logger": False, "enable_checkpointing": False}


def make_table(file: Path) -> None:
    """Writes the table of breast cancer that comes with scikit-learn: 569 cases, 30 measures of cell nuclei."""
    from sklearn.datasets import load_breast_cancer

    cases = load_breast_cancer()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow([*cases.feature_names, "diagnosis"])
        for row, label in zip(cases.data.tolist(), cases.target, strict=True):
            writer.writerow([*row, cases.target_names[label]])


class Table(L.LightningDataModule):
    """A CSV file of numbers with a column of classes; made of scikit-learn's breast cancer where there is none."""

    def __init__(
        self, data: str = "data/cancer.csv", label: str = "diagnosis", noise: float = 0.3, batch_size: int = 32
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        if not Path(self.hparams.data).exists():
            make_table(Path(self.hparams.data))

    def setup(self, stage: str) -> None:
        with Path(self.hparams.data).open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        self.columns = [name for name in rows[0] if name != self.hparams.label]
        self.classes = sorted({row[self.hparams.label] for row in rows})
        value = torch.tensor([[float(row[name]) for name in self.columns] for row in rows])
        label = torch.tensor([self.classes.index(row[self.hparams.label]) for row in rows])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        self.row, val = order[len(rows) // 4 :], order[: len(rows) // 4]
        self.mean, self.std = value[self.row].mean(0), value[self.row].std(0).clamp_min(1e-6)
        given = symmetric_labels(label[self.row], self.hparams.noise, len(self.classes), seed=0)
        self.is_wrong = given != label[self.row]  # to tell how well it went; no callback sees it
        self.train_data = TensorDataset((value[self.row] - self.mean) / self.std, given)
        self.val_data = TensorDataset((value[val] - self.mean) / self.std, label[val])

    def as_row(self, sample: tuple[Tensor, Tensor]) -> dict[str, float]:
        """A sample in the units of the file."""
        return dict(zip(self.columns, (sample[0] * self.std + self.mean).tolist(), strict=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_data, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_data, self.hparams.batch_size)


class Classifier(L.LightningModule):
    def __init__(self, columns: int = 30, classes: int = 2, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.Linear(columns, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        # Not the binary accuracy: there is a logit for each class.
        self.log("val_acc", multiclass_accuracy(self(x), y, self.hparams.classes, average="micro"), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def train_without(data: L.LightningDataModule, make_model: Callable[[], L.LightningModule], epochs: int) -> float:
    """Validation accuracy of the same fit without the callbacks."""
    L.seed_everything(0, verbose=False)
    model = make_model()
    trainer = L.Trainer(
        **QUIET, max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0
    )
    trainer.fit(model, datamodule=data)
    return trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="CSV of numbers and a column of classes; else breast cancer")
    parser.add_argument("--label", default="diagnosis", help="the column of classes (%(default)s)")
    parser.add_argument("--noise", type=float, help="share of training labels to make wrong (0 with --data)")
    parser.add_argument("--out", default="runs/tabular", metavar="DIR", help="for what was found (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few epochs, to see it run")
    options = parser.parse_args()
    epochs = 12 if options.fast else 40

    noise = options.noise if options.noise is not None else 0.0 if options.data else 0.3
    data = Table(options.data or "data/cancer.csv", options.label, noise)
    data.prepare_data()
    data.setup("fit")

    # What a team has: a model, data, a Trainer. What is new: the callbacks.
    partition = AttributionPartitionCallback()
    finetune = CleanSubsetFinetuneCallback()
    report = UnlearnReport(options.out, class_names=data.classes, render=data.as_row)

    make_model = partial(Classifier, len(data.columns), len(data.classes))
    L.seed_everything(0, verbose=False)
    model = make_model()
    trainer = L.Trainer(**QUIET, max_epochs=epochs, callbacks=[partition, finetune, report])
    trainer.fit(model, datamodule=data)
    with_them = trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]

    found = partition.partition
    found.to_csv(Path(options.out, "suspects.csv"), class_names=data.classes, columns={"row": data.row.tolist()})

    without = train_without(data, make_model, epochs)
    print(
        f"\nValidation accuracy after {epochs} epochs: {without:.3f} without the callbacks, {with_them:.3f} with them."
    )
    suspects = found.suspect_indices().tolist()
    print(f"{len(suspects)} of {len(found)} rows are suspect, the most suspect of them:")
    for at in suspects[:5]:
        given, suggested = data.classes[found.label[at]], data.classes[found.suggested_label[at]]
        print(f"  {f'row {data.row[at]}'}: {given}, rather {suggested}")
    # Known only because the wrong ones were made here.
    if data.is_wrong.any():
        right = int(data.is_wrong[suspects].sum())
        print(f"{right} of these {len(suspects)} are truly wrong, of {int(data.is_wrong.sum())} that are.")
    print(f"All of them: {options.out}/suspects.csv. To look at: {options.out}/report.html")


if __name__ == "__main__":
    main()
