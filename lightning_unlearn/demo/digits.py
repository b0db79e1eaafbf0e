"""scikit-learn's bundled digits with wrong training labels, and a network that memorizes them.

Neither class knows of the callbacks: they are what a team already has.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_unlearn.noise import flip_labels

CLASSES = 10
VALIDATION = 200


class DigitsDataModule(L.LightningDataModule):
    """1,797 images of handwritten digits, 8 x 8 pixels in [0, 1]: 1,198 to train on, 200 to validate, 399 to test.

    Args:
        noise: share of the training labels that are wrong (symmetric label noise); all others are right.
        batch_size: of every loader.
        seed: of the split and of the noise.

    Attributes:
        given_label: (N,) int64, the training labels as the model sees them; from ``setup`` on.
        true_label: (N,) int64, the right ones. For evaluation only: no loader hands them out.
    """

    def __init__(self, noise: float = 0.4, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.noise = noise
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Split the images and replace training labels, the same way for the same seed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "The digits come with scikit-learn, which is not installed: pip install scikit-learn."
            ) from error
        digits: Any = load_digits()
        image = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        label = torch.tensor(digits.target, dtype=torch.int64)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(label), generator=generator)
        train, val, test = order.tensor_split([2 * len(order) // 3, 2 * len(order) // 3 + VALIDATION])
        self.true_label = label[train]
        self.given_label = flip_labels(self.true_label, self.noise, CLASSES, generator)
        self.train_data = TensorDataset(image[train], self.given_label)
        self.val_data = TensorDataset(image[val], label[val])
        self.test_data = TensorDataset(image[test], label[test])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled images with the given labels."""
        return DataLoader(self.train_data, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return held-out images with their true labels."""
        return DataLoader(self.val_data, batch_size=VALIDATION)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test images with their true labels."""
        return DataLoader(self.test_data, batch_size=self.batch_size)


class DigitsClassifier(L.LightningModule):
    """Two convolutions and two linear layers, large enough to memorize a thousand wrong labels.

    Args:
        lr: learning rate of Adam.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.fc = nn.Linear(64 * 4 * 4, 128)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8)."""
        return self.head(self.fc(self.features(x)).relu())  # type: ignore[no-any-return]  # Module.__call__ is untyped

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the given labels."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy as ``val_acc``."""
        x, y = batch
        self.log("val_acc", multiclass_accuracy(self(x), y, num_classes=CLASSES, average="micro"))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy as ``test_acc``."""
        x, y = batch
        self.log("test_acc", multiclass_accuracy(self(x), y, num_classes=CLASSES, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with a constant learning rate."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
