"""What the partition is judged on: data sets with noise, and the training run that meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.models import ResNetClassifier, cifar_classifier, spoken_classifier
from benchmarks.sources import Source, cifar, digits, spoken_digits
from lightning_unlearn.demo import DigitsClassifier
from lightning_unlearn.noise import GaussianInputs, PaperImageNoise, asymmetric_labels, symmetric_labels

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A data set with noise.

    Args:
        name: of the case.
        data: ``"cifar"``, ``"spoken"`` or ``"digits"``.
        labels: ``"clean"``, ``"human"``, ``"symmetric"`` or ``"asymmetric"``.
        rate: share of wrong labels, where they are injected.
        sigma: of the Gaussian noise on inputs in [0, 1]; 0 for none.
        share: share of corrupted inputs.
        leaking: the paper's protocol: after normalisation, only the corrupted images clamped to [0, 1].
        train_size: images of CIFAR-10.
        depth: 18 or 34: a ResNet of so many layers, trained for long; 0 for the small network.
    """

    name: str
    data: str
    labels: str = "clean"
    rate: float = 0.0
    sigma: float = 0.0
    share: float = 0.5
    leaking: bool = False
    train_size: int = 10_000
    depth: int = 0

    @property
    def large(self) -> bool:
        """Whether it is for a large GPU."""
        return self.depth > 0

    @property
    def epochs(self) -> int:
        """Epochs before the partition."""
        if self.large:
            return 40
        return 12 if self.data == "cifar" else 30

    @property
    def batch(self) -> int:
        """Samples per step."""
        return 128 if self.data == "cifar" else 64

    @property
    def network(self) -> Callable[[], L.LightningModule]:
        """Makes the network."""
        if self.large:
            return partial(ResNetClassifier, self.depth)
        return {"cifar": cifar_classifier, "spoken": spoken_classifier, "digits": DigitsClassifier}[self.data]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("cifar-human", "cifar", "human", train_size=20_000),
        Case("cifar-sym20", "cifar", "symmetric", 0.2),
        Case("cifar-sym40", "cifar", "symmetric", 0.4),
        Case("cifar-sym60", "cifar", "symmetric", 0.6),
        Case("cifar-asym40", "cifar", "asymmetric", 0.4),
        Case("cifar-clean", "cifar"),
        Case("cifar-input0.5", "cifar", sigma=0.5),
        Case("cifar-input1", "cifar", sigma=1.0),
        Case("cifar-input4.5", "cifar", sigma=4.5),
        Case("cifar-input-leak", "cifar", sigma=4.5, leaking=True),
        Case("cifar-both", "cifar", "symmetric", 0.2, sigma=0.5, share=0.2),
        Case("spoken-sym40", "spoken", "symmetric", 0.4),
        Case("spoken-asym20", "spoken", "asymmetric", 0.2),
        Case("spoken-asym40", "spoken", "asymmetric", 0.4),
        Case("spoken-clean", "spoken"),
        Case("spoken-input0.5", "spoken", sigma=0.5),
        Case("spoken-input1", "spoken", sigma=1.0),
        Case("spoken-input4.5", "spoken", sigma=4.5),
        Case("spoken-both", "spoken", "symmetric", 0.2, sigma=0.5, share=0.2),
        # One large GPU: --scale gpu
        Case("cifar-human-full", "cifar", "human", train_size=50_000, depth=18),
        Case("cifar-human-full-34", "cifar", "human", train_size=50_000, depth=34),
        Case("cifar-clean-full", "cifar", train_size=50_000, depth=18),
    )
}
# Of the demo; their network has no blocks, so only the repair is judged on them.
DIGITS_CASES: dict[str, Case] = {
    case.name: case for case in (Case("digits-sym40", "digits", "symmetric", 0.4), Case("digits-clean", "digits"))
}
CPU_CASES = tuple(name for name in CASES if not CASES[name].large)
# Where cleanlab's out-of-sample probabilities, at five times the training, are worth their time.
FOLD_CASES = ("cifar-human", "cifar-sym40", "cifar-asym40", "spoken-sym40", "spoken-asym40")


@dataclass(frozen=True)
class Noisy:
    """A case with its data.

    Args:
        train: (N, channels, height, width) float32, noisy and normalised.
        given_label: (N,) int64.
        true_label: (N,) int64.
        wrong_label: (N,) bool, for evaluation only.
        corrupted: (N,) bool, for evaluation only.
        test: normalised.
        test_label: (M,) int64.
    """

    train: Tensor
    given_label: Tensor
    true_label: Tensor
    wrong_label: Tensor
    corrupted: Tensor
    test: Tensor
    test_label: Tensor


def make(case: Case, seed: int, data: Path) -> Noisy:
    """The data of a case.

    Args:
        case: which.
        seed: of the choice of images and of the noise.
        data: folder with ``cifar10n.npz`` and ``fsdd.zip``.
    """
    if case.data == "cifar":
        source = cifar(data / "cifar10n.npz", case.train_size, 5_000, seed)
    else:
        source = digits(seed) if case.data == "digits" else spoken_digits(data / "fsdd.zip")
    given = _given_labels(case, source, seed)
    mean = source.train.mean(dim=(0, 2, 3), keepdim=True)
    std = source.train.std(dim=(0, 2, 3), keepdim=True)
    corrupted = torch.zeros(len(given), dtype=torch.bool)
    train, test = source.train, source.test
    if case.leaking:
        train, corrupted = _corrupt(case, replace(source, train=(train - mean) / std), seed)
        test = (test - mean) / std
    else:
        if case.sigma:
            train, corrupted = _corrupt(case, source, seed)
        train, test = (train - mean) / std, (test - mean) / std
    return Noisy(train, given, source.true_label, given != source.true_label, corrupted, test, source.test_label)


def _given_labels(case: Case, source: Source, seed: int) -> Tensor:
    if case.labels == "human":
        if source.human_label is None:
            raise ValueError(f"{case.data} has no human labels.")
        return source.human_label
    if case.labels == "symmetric":
        return symmetric_labels(source.true_label, case.rate, CLASSES, seed=seed)
    if case.labels == "asymmetric":
        return asymmetric_labels(source.true_label, case.rate, CLASSES, seed=seed)
    return source.true_label


def _corrupt(case: Case, source: Source, seed: int) -> tuple[Tensor, Tensor]:
    noise = PaperImageNoise if case.leaking else GaussianInputs
    rows = TensorDataset(source.train, source.true_label)
    noisy = noise(rows, sigma=case.sigma, share=case.share, seed=seed + 1000)
    return torch.stack([noisy[i][0] for i in range(len(noisy))]), noisy.is_corrupted
