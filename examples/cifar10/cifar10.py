"""CIFAR-10 as in the paper: a ResNet-18 learns from images half of which are drowned in noise, and is repaired.

Measured on 4,000 images, 20 + 10 epochs, CPU: accuracy .389 before, .448 after, .441 by training on with all of them as
long (benchmarks/results/paper-cpu.md; seed 0, one core of x86-64). The full size has not been measured: no GPU.
Run: python examples/cifar10/cifar10.py --data DIR [--download] [--recipe rlap], or offline: ... --fast
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchvision.datasets import CIFAR10
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.models import resnet18

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    Partition,
    SensitivityPruneCallback,
)
from lightning_unlearn.noise import (
    CIFAR10_ASYMMETRIC,
    GaussianInputs,
    PaperImageNoise,
    asymmetric_labels,
    human_labels,
    symmetric_labels,
)

CLASSES = 10
# Of the training set's pixels in [0, 1].
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)


class Rows(Dataset[Any]):
    """Tensors that are fetched a batch at a time: a fast GPU waits for single images."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.x[rows], self.y[rows]


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function of ``Rows``; at the top of the module, so that worker processes find it."""
    return batch


def read_images(data: Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images (N, 3, 32, 32) uint8 in torchvision's order, their classes, and what people called them, if it is there.

    ``data`` is torchvision's folder, or an ``.npz`` with ``train_jpeg``, ``train_offsets``, ``train_label`` and maybe
    ``train_human_label`` (``test_...`` likewise), where image i is ``jpeg[offsets[i]:offsets[i + 1]]``.
    """
    if data.suffix != ".npz":
        found = CIFAR10(data, train=train, download=download)
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets), None
    part = "train" if train else "test"
    with np.load(data) as file:
        missing = [f"{part}_{name}" for name in ("jpeg", "offsets", "label") if f"{part}_{name}" not in file]
        if missing:
            raise ValueError(f"Expected arrays {', '.join(missing)} in {data}, but it holds {', '.join(file.files)}.")
        jpeg, offsets, label = (file[f"{part}_{name}"] for name in ("jpeg", "offsets", "label"))
        human = file["train_human_label"] if train and "train_human_label" in file else None
    files = [torch.from_numpy(jpeg[first:last].copy()) for first, last in pairwise(offsets)]
    images = torch.stack(decode_jpeg(files))
    return images, torch.from_numpy(label).long(), None if human is None else torch.from_numpy(human).long()


def mirrored_and_shifted(x: Tensor) -> Tensor:
    """Mirrors half of the images and shifts each by up to four pixels: a whole batch at once, where it lies."""
    total, channels, height, width = x.shape
    x = torch.where(torch.rand(total, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, total, 1), device=x.device)
    row = (down + torch.arange(height, device=x.device))[:, None, :, None]
    column = (right + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(total, device=x.device)[:, None, None, None]
    return padded[image, torch.arange(channels, device=x.device)[None, :, None, None], row, column]


class Cifar10(L.LightningDataModule):
    """CIFAR-10 with noise: decoded once, fetched batch-wise, augmented and normalized on the device.

    Args:
        data: torchvision's folder, or an ``.npz`` (see ``read_images``).
        download: fetch what the folder lacks.
        train_size: so many of the 50,000 training images, drawn at random, None for all; the paper has 50,000, 25,000
            and 12,500.
        test_size: so many of the test images, drawn at random; None for all.
        labels: of the training images: as they are, wrong at random, or as people gave them. ``"asymmetric"`` is the
            literature's: truck to automobile, bird to airplane, deer to horse, cat and dog to each other.
        rate: share of the labels that are wrong with ``"symmetric"``; with ``"asymmetric"`` of those five classes.
        human_file: of CIFAR-N, for ``labels="human"``; an ``.npz`` may hold them itself.
        inputs: ``"gaussian"``: noise on pixels in [0, 1], where all images are clamped; ``"paper"``: the paper's noise,
            after normalization, where only noisy images are clamped, which gives them away.
        sigma: of that noise; by default the paper's 4.5, which is about 1.1 of a pixel's range.
        share: of the training images that are noisy.
        augment: mirror and shift images in training; the paper does not.
        batch_size: of every loader; 128 in the paper.
        seed: of the images and of the noise.
        partition: a file that ``Partition.save`` or ``lightning-unlearn partition`` wrote, of the same images: only
            what it calls clean is trained on.

    Attributes:
        true_label, is_wrong, is_corrupted: (N,), from ``setup`` on. For evaluation only: no loader hands them out.
    """

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        data: str | Path = "data",
        *,
        download: bool = False,
        train_size: int | None = None,
        test_size: int | None = None,
        labels: Literal["clean", "symmetric", "asymmetric", "human"] = "clean",
        rate: float = 0.4,
        human_file: str | Path | None = None,
        inputs: Literal["clean", "gaussian", "paper"] = "clean",
        sigma: float | None = None,
        share: float = 0.5,
        augment: bool = False,
        batch_size: int = 128,
        seed: int = 0,
        partition: str | Path | None = None,
    ) -> None:
        super().__init__()
        # From Python nobody else looks at these words, and a misspelt one must not be another noise.
        for name, value, known in (
            ("labels", labels, ("clean", "symmetric", "asymmetric", "human")),
            ("inputs", inputs, ("clean", "gaussian", "paper")),
        ):
            if value not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, but got {value!r}.")
        self.data, self.download, self.train_size, self.test_size = Path(data), download, train_size, test_size
        self.labels, self.rate, self.human_file = labels, rate, human_file
        self.inputs, self.share, self.augment, self.partition = inputs, share, augment, partition
        self.sigma = sigma if sigma is not None else (4.5 if inputs == "paper" else 1.1)
        self.batch_size, self.seed = batch_size, seed
        self.mean, self.std = MEAN, STD
        self.train_data: Rows | None = None

    def prepare_data(self) -> None:
        """Once per machine."""
        if self.download and self.data.suffix != ".npz":
            CIFAR10(self.data, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Reads, decodes and corrupts, the first time that it is called."""
        if self.train_data is not None:
            return
        images, true, human = read_images(self.data, train=True, download=False)
        chosen = self._some(len(images), self.train_size)
        human = self._human_labels(true, human)[chosen] if self.labels == "human" else None
        self.true_label, images = true[chosen], images[chosen]
        given = self._given_labels(human)
        self.is_wrong = given != self.true_label
        self.is_corrupted = torch.zeros(len(chosen), dtype=torch.bool)
        self.train_data = self._kept(Rows(self._corrupted(images), given))
        images, label, _ = read_images(self.data, train=False, download=False)
        chosen = self._some(len(images), self.test_size)
        self.test_data = Rows(images[chosen], label[chosen])

    def _some(self, total: int, size: int | None) -> Tensor:
        if size is not None and not 0 < size <= total:
            raise ValueError(f"Expected to take 1 to {total:,} images of {self.data}, but was asked for {size:,}.")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(total, generator=generator)[:size].sort().values

    def _given_labels(self, human: Tensor | None) -> Tensor:
        """Of the images that were drawn, so that the share of wrong ones is theirs."""
        if human is not None:
            return human
        if self.labels == "symmetric":
            return symmetric_labels(self.true_label, self.rate, CLASSES, seed=self.seed)
        if self.labels == "asymmetric":
            becomes = CIFAR10_ASYMMETRIC
            return asymmetric_labels(self.true_label, self.rate, CLASSES, seed=self.seed, becomes=becomes)
        return self.true_label

    def _human_labels(self, true: Tensor, human: Tensor | None) -> Tensor:
        """Of all images."""
        if self.human_file is not None:
            human, clean = human_labels(self.human_file)
            if not clean.equal(true):
                raise ValueError(f"Expected {self.human_file} to be of these images in torchvision's order.")
        if human is None:
            raise ValueError("Expected human_file='.../CIFAR-10_human.pt' for labels='human'; see noise.human_labels.")
        return human

    def _corrupted(self, images: Tensor) -> Tensor:
        """uint8 as before, or float32 where the paper's noise leaves [0, 1]."""
        if self.inputs == "clean":
            return images
        noise = {"sigma": self.sigma, "share": self.share, "seed": self.seed + 1000}
        pixels = images.float() / 255
        if self.inputs == "paper":
            noisy: GaussianInputs = PaperImageNoise(TensorDataset((pixels - MEAN) / STD), **noise)
            self.is_corrupted = noisy.is_corrupted
            return torch.stack([noisy[i][0] for i in range(len(noisy))]) * STD + MEAN
        noisy = GaussianInputs(TensorDataset(pixels), **noise)
        self.is_corrupted = noisy.is_corrupted
        return torch.stack([(noisy[i][0] * 255).round().to(torch.uint8) for i in range(len(noisy))])

    def _kept(self, rows: Rows) -> Rows:
        """What a saved partition calls clean, for new weights."""
        if self.partition is None:
            return rows
        partition = Partition.load(self.partition)
        if len(partition) != len(rows):
            raise ValueError(
                f"Expected {self.partition} to be of these {len(rows):,} training samples, but it is of"
                f" {len(partition):,}: give the options that it was made with."
            )
        kept = partition.clean_indices()
        masks = (self.true_label, self.is_wrong, self.is_corrupted)
        self.true_label, self.is_wrong, self.is_corrupted = (mask[kept] for mask in masks)
        return Rows(rows.x[kept], rows.y[kept])

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_data, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_data, shuffle=False)

    def _loader(self, rows: Any, *, shuffle: bool) -> DataLoader[Any]:
        pins = torch.cuda.is_available()
        return DataLoader(rows, self.batch_size, shuffle=shuffle, collate_fn=as_it_is, pin_memory=pins)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augments in training alone, not in the passes of the partition, and normalizes."""
        x, y = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            x = mirrored_and_shifted(x)
        x = x if x.is_floating_point() else x.float() / 255
        self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)  # stay where they were needed
        x = (x - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last), y


class PaperResNet18(L.LightningModule):
    """torchvision's ResNet-18 with a head of 512-256-10 neurons.

    Args:
        stem: ``"7x7"`` with pooling after it, as torchvision has it, or ``"3x3"`` without, better for 32 x 32 pixels.
        lr, momentum, weight_decay: of SGD.
        decay_epochs: the learning rate falls to zero over so many epochs; None, as in the paper, for one that stays.
    """

    def __init__(
        self,
        stem: Literal["7x7", "3x3"] = "7x7",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        decay_epochs: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = resnet18()
        if stem == "3x3":
            self.net.conv1, self.net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.net.fc = nn.Identity()
        self.fc = nn.Linear(512, 256)
        self.head = nn.Linear(256, CLASSES)
        self.to(memory_format=torch.channels_last)  # as the images come; a GPU would bring the weights round every step
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(CLASSES, average="micro"),
                "precision": MulticlassPrecision(CLASSES, average="macro"),
                "recall": MulticlassRecall(CLASSES, average="macro"),
                "f1": MulticlassF1Score(CLASSES, average="macro"),
                "top3": MulticlassAccuracy(CLASSES, top_k=3, average="micro"),
            },
            prefix="test_",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.net(x)).relu())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.metrics.update(self(x), y)
        self.log_dict(self.metrics)

    def configure_optimizers(self) -> Any:
        settings = {name: self.hparams[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(self.parameters(), **settings)
        if self.hparams["decay_epochs"] is None:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["decay_epochs"])]


def made_up(file: Path, train: int = 200, test: int = 50) -> Path:
    """Writes images in CIFAR-10's form whose class is their brightness, for who has no data."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for part, total in (("train", train), ("test", test)):
        label = torch.arange(total) % CLASSES
        pixels = 20 + 22 * label[:, None, None, None] + torch.randint(0, 20, (total, 3, 32, 32), generator=generator)
        jpeg = [encode_jpeg(image).numpy() for image in pixels.to(torch.uint8)]
        found[f"{part}_jpeg"] = np.concatenate(jpeg)
        found[f"{part}_offsets"] = np.cumsum([0, *map(len, jpeg)])
        found[f"{part}_label"] = label.numpy()
    np.savez(file, **found)
    return file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="torchvision's folder, or an .npz")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--recipe", default="auto", help="'rlap' is the paper's")
    parser.add_argument("--train-size", type=int, help="so many of the training images; by default all")
    parser.add_argument("--fast", action="store_true", help="a few epochs on made-up images, to see it run")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    base, repair = (2, 1) if args.fast else (60, 30)
    if args.fast:
        args.data, args.download = made_up(Path(tempfile.mkdtemp()) / "cifar10.npz"), False

    L.seed_everything(0, verbose=False)
    data = Cifar10(args.data, download=args.download, train_size=args.train_size, inputs="paper")
    shared: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "devices": 1, "precision": "bf16-mixed"}
    # What the paper calls the initial model.
    model = PaperResNet18()
    trainer = L.Trainer(max_epochs=base, **shared)
    trainer.fit(model, datamodule=data)
    (before,) = trainer.test(model, datamodule=data, verbose=False)

    # The same fit with the callbacks: partition, pruning, F-FT.
    L.seed_everything(0, verbose=False)
    model = PaperResNet18()
    partition = AttributionPartitionCallback(at_epoch=base, recipe=args.recipe)
    prune = SensitivityPruneCallback(amount=40 / 256)
    finetune = CleanSubsetFinetuneCallback("full", optimizer=partial(torch.optim.Adam, lr=1e-3))
    trainer = L.Trainer(max_epochs=base + repair, callbacks=[partition, prune, finetune], **shared)
    trainer.fit(model, datamodule=data)
    (after,) = trainer.test(model, datamodule=data, verbose=False)

    found = partition.partition.is_clean != data.is_corrupted
    print(f"\nTest accuracy {before['test_acc']:.4f} after {base} epochs, {after['test_acc']:.4f} with the repair.")
    print(f"The partition is right for {found.float().mean():.3f} of {len(found):,} images.")


if __name__ == "__main__":
    main()
