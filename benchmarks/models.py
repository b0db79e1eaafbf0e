"""The networks of the benchmarks: plain LightningModules that know nothing of lightning_unlearn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from benchmarks.detection_cases import network_of


def _block(inputs: int, outputs: int, *, pool: bool) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class SmallClassifier(L.LightningModule):
    """3 x 3 convolutions, a hidden linear layer and a head.

    Args:
        channels: of the input.
        stages: channels of every convolution, and whether the image is halved after it.
        hidden: neurons of the linear layer before the head.
        mirror: whether training mirrors half of the images and shifts all of them by up to two pixels.
        lr: highest learning rate of Adam.
        decay: whether the learning rate falls to zero (one cycle) or stays.
    """

    def __init__(
        self,
        channels: int = 3,
        stages: tuple[tuple[int, bool], ...] = ((32, True), (64, False), (64, True), (128, False), (128, True)),
        hidden: int = 128,
        mirror: bool = True,
        lr: float = 3e-3,
        decay: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [channels, *(width for width, _ in stages)]
        self.blocks = nn.Sequential(
            *(_block(widths[i], width, pool=pool) for i, (width, pool) in enumerate(stages)), nn.AdaptiveAvgPool2d(2)
        )
        self.fc = nn.Linear(4 * widths[-1], hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of normalized images."""
        return self.head(self.fc(self.blocks(x).flatten(1)).relu())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the given labels, on mirrored and shifted images if asked for."""
        x, y = batch
        return nn.functional.cross_entropy(self(_augment(x) if self.hparams["mirror"] else x), y)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the accuracy as ``test_acc``."""
        self.log("test_acc", multiclass_accuracy(self(batch[0]), batch[1], num_classes=10, average="micro"))

    def configure_optimizers(self) -> Any:
        """Adam, with or without a schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        if not self.hparams["decay"]:
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams["lr"], total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _augment(x: Tensor) -> Tensor:
    """Mirrors each image with probability one half and shifts the batch by up to two pixels."""
    flip = torch.rand(len(x), device=x.device) < 0.5
    x = torch.where(flip.reshape(-1, 1, 1, 1), x.flip(3), x)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(x, (down, right), dims=(2, 3))


def cifar_classifier() -> SmallClassifier:
    """The small network of the CPU scale for 32 x 32 images."""
    return SmallClassifier()


def spoken_classifier() -> SmallClassifier:
    """Three convolution blocks on spectrograms, with a learning rate that stays: it memorizes."""
    return SmallClassifier(
        channels=1, stages=((16, True), (32, True), (64, True)), hidden=64, mirror=False, lr=1e-3, decay=False
    )


class ResNetClassifier(SmallClassifier):
    """ResNet for 32 x 32 images: a 3 x 3 convolution first, without pooling after it.

    Args:
        depth: 18 or 34.
        lr: highest learning rate of Adam.
    """

    def __init__(self, depth: int = 18, lr: float = 3e-3) -> None:
        super().__init__(stages=((8, True),), lr=lr)
        from torchvision.models import get_model

        net = get_model(f"resnet{depth}", num_classes=10)
        stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), net.bn1, net.relu)
        self.blocks = nn.Sequential(stem, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool)
        self.fc = nn.Identity()
        self.head = net.fc


class TableClassifier(L.LightningModule):
    """A network of :mod:`benchmarks.detection_cases`, for vectors and texts.

    Args:
        kind: its name there.
        inputs: columns.
        classes: of the labels.
    """

    def __init__(self, kind: str, inputs: int, classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network_of(kind, inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the given labels."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the cross-entropy as ``val_loss``."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the accuracy as ``test_acc``."""
        self.log("test_acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())


class StopAfter(L.Callback):
    """Ends a fit after some epochs, although the Trainer has been told of one more."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks the Trainer to stop."""
        if trainer.current_epoch == self.epochs - 1:
            trainer.should_stop = True


class TrainOn(L.Callback):
    """The user's plan for the time after a partition, which holds where it is not acted upon.

    Args:
        make_optimizer: from parameters.
        make_schedule: from the optimizer; None for a learning rate that stays.
    """

    def __init__(
        self, make_optimizer: Callable[[Any], torch.optim.Optimizer], make_schedule: Callable[[Any], Any] | None = None
    ) -> None:
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the partition is computed: whoever acts on it has the last word."""
        optimizer = self.make_optimizer(pl_module.parameters())
        trainer.strategy.optimizers = [optimizer]
        schedules = [] if self.make_schedule is None else [LRSchedulerConfig(self.make_schedule(optimizer))]
        trainer.strategy.lr_scheduler_configs = schedules


def train_with(
    model: L.LightningModule,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    make_schedule: Callable[[Any], Any] | None,
    interval: str,
) -> None:
    """Gives a network another optimizer and schedule than its own."""

    def configure_optimizers() -> Any:
        optimizer = make_optimizer(model.parameters())
        if make_schedule is None:
            return optimizer
        schedule = {"scheduler": make_schedule(optimizer), "interval": interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    model.configure_optimizers = configure_optimizers


@torch.no_grad()
def move_towards(
    model: L.LightningModule, weights: Mapping[str, Tensor], share: float, batches: Iterable[Tensor]
) -> None:
    """Moves a network a share of the way to other weights, and lets its batch norms see the data anew."""
    for name, weight in model.named_parameters():
        weight.lerp_(weights[name], share)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    for x in batches:
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
