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

from benchmarks.detection_cases import DetectionCase, load, noisy_labels, noisy_validation, test_part
from benchmarks.detection_cases import Source as Table
from benchmarks.models import ResNetClassifier, TableClassifier, cifar_classifier, spoken_classifier
from benchmarks.sources import Source, cifar, digits, spoken_digits
from lightning_unlearn.demo import DigitsClassifier
from lightning_unlearn.noise import GaussianInputs, PaperImageNoise, asymmetric_labels, symmetric_labels

CLASSES = 10


# Of tables and texts: the network of :mod:`benchmarks.detection_cases`, columns and classes. Fits take seconds.
TABLES = {
    "features": ("mlp", 1280, 10),
    "music-mv": ("wide", 124, 10),
    "hate": ("text", 120, 3),
    "phon-15": ("wide", 5, 2),
}
_VALIDATION = 500  # of the test images' features; the rest is tested on


@dataclass(frozen=True)
class Case:
    """A data set with noise.

    Args:
        name: of the case.
        data: ``"cifar"``, ``"spoken"``, ``"digits"``, or one of :data:`TABLES`.
        labels: ``"clean"``, ``"human"``, ``"symmetric"``, ``"asymmetric"``, or ``"given"`` as published.
        rate: share of wrong labels, where they are injected.
        sigma: of the Gaussian noise on inputs in [0, 1]; 0 for none.
        share: share of corrupted inputs.
        leaking: the paper's protocol: after normalization, only the corrupted images clamped to [0, 1].
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
        if self.large:
            return 512
        return {"cifar": 128, "features": 128, "hate": 128, "music-mv": 32, "phon-15": 32}.get(self.data, 64)

    @property
    def network(self) -> Callable[[], L.LightningModule]:
        """Makes the network."""
        if self.large:
            return partial(ResNetClassifier, self.depth)
        if self.data in TABLES:
            return partial(TableClassifier, *TABLES[self.data])
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
        Case("cifar-sym25-full", "cifar", "symmetric", 0.25, train_size=50_000, depth=18),
    )
}
# Of the demo; their network has no blocks, so only the repair is judged on them.
DIGITS_CASES: dict[str, Case] = {
    case.name: case for case in (Case("digits-sym40", "digits", "symmetric", 0.4), Case("digits-clean", "digits"))
}
TABLE_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("features-human40", "features", "human", 0.4, train_size=6_000),
        Case("features-human17", "features", "human", 0.17, train_size=6_000),
        Case("features-human9", "features", "human", 0.09, train_size=6_000),
        Case("features-sym20", "features", "symmetric", 0.2, train_size=6_000),
        Case("features-clean", "features", train_size=6_000),
        Case("music", "music-mv", "given"),
        Case("hate", "hate", "given"),
        Case("phon-15", "phon-15", "given"),
    )
}
CPU_CASES = tuple(name for name in CASES if not CASES[name].large)
# Where cleanlab's out-of-sample probabilities, at five times the training, are worth their time.
FOLD_CASES = ("cifar-human", "cifar-sym40", "cifar-asym40", "spoken-sym40", "spoken-asym40")


@dataclass(frozen=True)
class Noisy:
    """A case with its data.

    Args:
        train: (N, channels, height, width) float32, noisy and normalized.
        given_label: (N,) int64.
        true_label: (N,) int64.
        wrong_label: (N,) bool, for evaluation only.
        corrupted: (N,) bool, for evaluation only.
        test: normalized.
        test_label: (M,) int64.
        validation: inputs, and labels as noisy as those of training; None where there are none.
    """

    train: Tensor
    given_label: Tensor
    true_label: Tensor
    wrong_label: Tensor
    corrupted: Tensor
    test: Tensor
    test_label: Tensor
    validation: tuple[Tensor, Tensor] | None = None


def _table(case: Case, seed: int, data: Path) -> Noisy:
    noise = DetectionCase("cifar" if case.data == "features" else case.data, case.labels, case.rate)
    whole = load(noise.data, data, seed)
    if whole.val_x is None or whole.val_y is None:
        raise ValueError(f"{case.data} has no validation samples.")
    if noise.data == "cifar":
        few, held = slice(case.train_size), slice(_VALIDATION)
        human = None if whole.human is None else whole.human[few]
        test, test_label = whole.val_x[_VALIDATION:], whole.val_y[_VALIDATION:]
        whole = Table(
            whole.x[few], whole.truth[few], human=human, val_x=whole.val_x[held], val_y=whole.val_y[held], classes=10
        )
    else:
        test, test_label = test_part(data, case.data)
    given, validation = noisy_labels(whole, noise, seed), noisy_validation(whole, noise, seed)
    corrupted = torch.zeros(len(given), dtype=torch.bool)
    return Noisy(whole.x, given, whole.truth, given != whole.truth, corrupted, test, test_label, validation)


def make(case: Case, seed: int, data: Path) -> Noisy:
    """The data of a case.

    Args:
        case: which.
        seed: of the choice of images and of the noise.
        data: folder with the files.
    """
    if case.data in TABLES:
        return _table(case, seed, data)
    if case.data == "cifar":
        source = cifar(data / "cifar10n.npz", case.train_size, 10_000 if case.large else 5_000, seed)
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
