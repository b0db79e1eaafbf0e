"""A partition from nowhere, and a model whose neurons are known, for the tests of pruning."""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.results.partition import Partition

CLASSES = 4
# Neurons of Planted, by what they do.
FLAG, IDLE, ANTI = 4, 5, 6


def make_partition(probability, label, epoch=1, warning="", status="ok"):
    """A partition of the given probabilities of being clean."""
    is_clean = probability >= 0.5
    return Partition(
        clean_probability=probability.float(),
        is_clean=is_clean,
        suggested_label=torch.where(is_clean, label, (label + 1) % CLASSES),
        suggested_probability=torch.ones(len(label)),
        noise_rate=1 - probability.mean().item(),
        label=label,
        label_evidence=torch.ones(len(label)),
        input_evidence=torch.ones(len(label)),
        reason=(~is_clean).to(torch.uint8),
        noise_matrix=torch.zeros(0, 0),
        recipe="label",
        layer="nowhere",
        epoch=epoch,
        warning=warning,
        status=status,
    )


class Published(L.Callback):
    """Publishes partitions that are known in advance.

    Args:
        partitions: each with the epoch from which it is the current one.
        dry_run: whether nothing is to be changed.
        soft: whether neurons are regressed on the probability.
    """

    def __init__(self, *partitions, dry_run=False, soft=True):
        self.partitions = partitions
        self.at_epoch = min(partition.epoch for partition in partitions)
        self.dry_run = dry_run
        self.uses_soft_targets = soft
        self.task_format = TaskFormat()
        self.sample_weight = None
        self.memorized = None
        self.accuracy_gap = None

    def get_partition(self, trainer, pl_module):
        due = [partition for partition in self.partitions if partition.epoch <= trainer.current_epoch]
        return due[-1] if due else None


def planted(size=400, seed=0, noise=0.3):
    """Samples of eight features, wrong labels, and which of these are wrong.

    Four features say the class; FLAG is on for a wrong label, IDLE says nothing, ANTI is on for a right label,
    and the last is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.arange(size) % CLASSES
    wrong = torch.rand(size, generator=generator) < noise
    x = torch.zeros(size, 8)
    x[:, :CLASSES] = 3.0 * one_hot(clean, CLASSES)
    x[:, FLAG] = 2.0 * wrong
    x[:, ANTI] = 2.0 * ~wrong
    x += 0.3 * torch.randn(size, 8, generator=generator)
    x[:, 7] = 1.0
    shift = torch.randint(1, CLASSES, (size,), generator=generator)
    return x, torch.where(wrong, (clean + shift) % CLASSES, clean), wrong


class Planted(L.LightningModule):
    """Neuron i of ``fc`` is feature i, rectified; the head reads the first four, and learns nothing.

    Args:
        lr: to learn after all.
    """

    def __init__(self, lr=0.0):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.lr = lr
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(8))
            self.fc.bias.zero_()
            self.head.weight.copy_(torch.eye(8)[:CLASSES])
            self.head.weight[:, FLAG:] = 0.01
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.fc(x).relu())

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class PlantedData(L.LightningDataModule):
    """The samples of :func:`planted`, and others with right labels for validation."""

    def __init__(self, size=400, validation=True):
        super().__init__()
        self.x, self.y, self.wrong = planted(size)
        self.validation = validation

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), batch_size=32, shuffle=True)

    def val_dataloader(self):
        x, y, _ = planted(200, seed=1, noise=0.0)
        return DataLoader(TensorDataset(x, y), batch_size=64) if self.validation else []

    def probability(self, seed=0):
        """That a sample is clean: sure, but for some scatter."""
        scatter = 0.2 * torch.rand(len(self.y), generator=torch.Generator().manual_seed(seed))
        return torch.where(self.wrong, scatter, 1 - scatter)
