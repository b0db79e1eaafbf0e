"""Pictures in a folder per class, a share of them in the wrong folder: find them, and repair what they taught.

Measured on 1,200 digits as PNG files, 40 % misplaced: validation accuracy .988 after 30 epochs, .814 without the
callbacks; 498 suspects, 473 of them truly wrong (all that are). 83 s of CPU, both fits.
One seed, one thread of a busy 2-core x86-64 machine, torch 2.11.0,
lightning 2.6.6, captum 0.9.0, 2026-12-01.

Run: python images.py [--data DIR] [--fast]; DIR/train/CLASS/*.png and DIR/val/CLASS/*.png, of any format that Pillow
reads.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, UnlearnReport

QUIET: dict = {"devices": 1, "logger": False, "enable_checkpointing": False}

MEAN, STD = [0.31] * 3, [0.36] * 3


def make_folders(root: Path, noise: float, train: int, seed: int = 0) -> None:
    """Writes scikit-learn's digits as PNG files, half as many to validate on as to train on.

    The name of a misplaced training file ends with its true class.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)[: train + train // 2]
    for at, number in enumerate(order.tolist()):
        part, true = "train" if at < train else "val", int(digits.target[number])
        label, name = true, f"{number:04}.png"
        if part == "train" and torch.rand((), generator=generator) < noise:
            label = (true + int(torch.randint(1, 10, (), generator=generator))) % 10
            name = f"{number:04}-true-{true}.png"
        file = root / part / str(label) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).save(file)


class Images(L.LightningDataModule):
    """``data/train/CLASS/*.png`` and ``data/val/CLASS/*.png``; made of digits where there is no such folder."""

    def __init__(
        self, data: str = "data/images", noise: float = 0.4, size: int = 16, train: int = 1200, batch_size: int = 64
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        if not Path(self.hparams.data).exists():
            make_folders(Path(self.hparams.data), self.hparams.noise, self.hparams.train)

    def setup(self, stage: str) -> None:
        resize = v2.Resize([self.hparams.size] * 2)
        to_input = v2.Compose([v2.ToImage(), resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        self.train_data = ImageFolder(Path(self.hparams.data, "train"), to_input)
        self.val_data = ImageFolder(Path(self.hparams.data, "val"), to_input)
        self.classes = self.train_data.classes
        self.files = [file for file, _ in self.train_data.samples]
        self.is_wrong = torch.tensor(["-true-" in file for file in self.files])  # to tell how well it went

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_data, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_data, self.hparams.batch_size)


class Classifier(L.LightningModule):
    def __init__(self, classes: int = 10, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            *(nn.Linear(64 * 16, 128), nn.ReLU()),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", multiclass_accuracy(self(x), y, self.hparams.classes, average="micro"), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


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
    parser.add_argument("--data", metavar="DIR", help="with train/CLASS/*.png and val/CLASS/*.png; else digits")
    parser.add_argument("--size", type=int, default=16, help="of a side, in pixels (%(default)s)")
    parser.add_argument("--out", default="runs/images", metavar="DIR", help="for what was found (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few epochs and few small pictures, to see it run")
    options = parser.parse_args()
    epochs, size, train, batch_size = (6, 8, 300, 16) if options.fast else (30, options.size, 1200, 64)

    made = "data/images-fast" if options.fast else "data/images"
    data = Images(options.data or made, size=size, train=train, batch_size=batch_size)
    data.prepare_data()
    data.setup("fit")

    # What a team has: a model, data, a Trainer. What is new: the callbacks.
    partition = AttributionPartitionCallback()
    finetune = CleanSubsetFinetuneCallback()
    report = UnlearnReport(options.out, class_names=data.classes, mean=MEAN, std=STD)

    make_model = partial(Classifier, len(data.classes))
    L.seed_everything(0, verbose=False)
    model = make_model()
    trainer = L.Trainer(**QUIET, max_epochs=epochs, callbacks=[partition, finetune, report])
    trainer.fit(model, datamodule=data)
    with_them = trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]

    found = partition.partition
    found.to_csv(Path(options.out, "suspects.csv"), class_names=data.classes, columns={"file": data.files})

    without = train_without(data, make_model, epochs)
    print(
        f"\nValidation accuracy after {epochs} epochs: {without:.3f} without the callbacks, {with_them:.3f} with them."
    )
    suspects = found.suspect_indices().tolist()
    print(f"{len(suspects)} of {len(found)} files are suspect, the most suspect of them:")
    for at in suspects[:5]:
        given, suggested = data.classes[found.label[at]], data.classes[found.suggested_label[at]]
        print(f"  {data.files[at]}: {given}, rather {suggested}")
    # Known only because the wrong ones were made here.
    if data.is_wrong.any():
        right = int(data.is_wrong[suspects].sum())
        print(f"{right} of these {len(suspects)} are truly wrong, of {int(data.is_wrong.sum())} that are.")
    print(f"All of them: {options.out}/suspects.csv. To look at: {options.out}/report.html")


if __name__ == "__main__":
    main()
