"""Wrong labels, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_unlearn.utilities.checks import check_number, check_seed, check_whole

Labels = Tensor | Sequence[int]

CIFAR10_ASYMMETRIC: Mapping[int, int] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""The literature's asymmetric noise on CIFAR-10: truck to automobile, bird to airplane, deer to horse, cat and dog to
each other (G. Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017)."""


def symmetric_labels(label: Labels, rate: float, num_classes: int, *, seed: int) -> Tensor:
    """Replace a share of the labels by another class, each of the others equally likely.

    Who draws from all classes, the right one included, as some papers do, has ``rate * (C - 1) / C`` wrong labels.
    Which labels are wrong is ``torch.randperm(N)`` of the seed: draw them for the training set as it is, not before a
    ``random_split`` with the same seed, whose parts would have different shares.

    Args:
        label: (N,) integers, the right labels; a tensor, or a list such as torchvision's ``dataset.targets``.
        rate: share of the labels that are wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        seed: of the draw.

    Returns:
        (N,) int64, on the CPU.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if the rate is not in [0, 1], a label is not a class, or there is no other class.

    Example:
        >>> label = torch.zeros(10, dtype=torch.int64)
        >>> (symmetric_labels(label, 0.4, 3, seed=0) != label).sum()
        tensor(4)
    """
    return flip_labels(label, rate, num_classes, torch.Generator().manual_seed(check_seed("seed", seed)))


def flip_labels(label: Labels, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Do as :func:`symmetric_labels` does, for a caller that draws more than labels from one random generator.

    Args:
        label: (N,) integers, the right labels.
        rate: share of the labels that are wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        generator: source of randomness, on the CPU.

    Returns:
        (N,) int64, on the CPU.

    Raises:
        TypeError, ValueError: as :func:`symmetric_labels`.

    Example:
        >>> label = torch.zeros(10, dtype=torch.int64)
        >>> (flip_labels(label, 0.4, 3, torch.Generator().manual_seed(0)) != label).sum()
        tensor(4)
    """
    label = _checked(label, rate, num_classes)
    wrong = torch.randperm(len(label), generator=generator)[: round(rate * len(label))]
    shift = torch.randint(1, max(num_classes, 2), wrong.shape, generator=generator)
    noisy = label.clone()
    noisy[wrong] = (label[wrong] + shift) % num_classes
    return noisy


def asymmetric_labels(
    label: Labels, rate: float, num_classes: int, *, seed: int, becomes: Mapping[int, int] | None = None
) -> Tensor:
    """Replace a share of every class's labels by one other class.

    Args:
        label: (N,) integers, the right labels.
        rate: share of each class's samples whose label is wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        seed: of the draw.
        becomes: what a class is taken for; classes that it does not name keep their labels. By default the next class:
            c becomes c + 1, the last one 0. :data:`CIFAR10_ASYMMETRIC` is the literature's for CIFAR-10, where
            five of ten classes have wrong labels.

    Returns:
        (N,) int64, on the CPU.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if the rate is not in [0, 1], a label is not a class, or there is no other class; or if ``becomes``
            names what is not a class, or a class for itself.

    Example:
        >>> asymmetric_labels(torch.tensor([0, 0, 1, 1]), 0.5, 2, seed=0).sort().values
        tensor([0, 0, 1, 1])
        >>> asymmetric_labels([0, 1, 2, 9], 1.0, 10, seed=0, becomes=CIFAR10_ASYMMETRIC)
        tensor([0, 1, 0, 1])
    """
    label = _checked(label, rate, num_classes)
    if becomes is None:
        becomes = {c: (c + 1) % num_classes for c in range(num_classes)}
    elif any(a == b or not 0 <= min(a, b) <= max(a, b) < num_classes for a, b in becomes.items()):
        raise ValueError(
            f"Expected becomes to name for classes from 0 to {num_classes - 1} another one each, but got"
            f" {dict(becomes)}."
        )
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    noisy = label.clone()
    for c in sorted(becomes):
        members = (label == c).nonzero().flatten()
        wrong = members[torch.randperm(len(members), generator=generator)[: round(rate * len(members))]]
        noisy[wrong] = becomes[c]
    return noisy


def matrix_labels(label: Labels, transition: Tensor, *, seed: int) -> Tensor:
    """Draw every label from the row of its true class.

    Args:
        label: (N,) integers, the right labels.
        transition: (C, C), row c the probabilities of what a sample of class c is called; rows sum to 1.
        seed: of the draw.

    Returns:
        (N,) int64, on the CPU.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if the matrix is not one of probabilities, or a label is not a class.

    Example:
        >>> matrix_labels(torch.tensor([0, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), seed=0)
        tensor([1, 1])
    """
    transition = torch.as_tensor(transition, device="cpu")
    square = transition.ndim == 2 and transition.shape[0] == transition.shape[1]
    # Put so that NaN is refused too.
    if not (square and (transition >= 0).all() and ((transition.sum(dim=1) - 1).abs() <= 1e-4).all()):
        raise ValueError(
            "Expected transition to be a matrix (C, C) of probabilities whose rows sum to 1, but got shape"
            f" {tuple(transition.shape)} with row sums {transition.sum(dim=-1).flatten().tolist()[:5]}."
        )
    label = _checked(label, 0.0, len(transition))
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    return torch.multinomial(transition.double()[label], 1, generator=generator).squeeze(1)


def _checked(label: Labels, rate: float, num_classes: int) -> Tensor:
    """Return (N,) int64, on the CPU, where the draws are made: they are the same with and without a GPU."""
    check_number("rate", rate, least=0, most=1)
    num_classes = check_whole("num_classes", num_classes, least=1)
    if rate > 0 and num_classes < 2:
        raise ValueError(f"Expected at least 2 classes, but got {num_classes}: there is no other label to give.")
    label = _class_labels(label)
    if len(label) and not (label.min() >= 0 and label.max() < num_classes):
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, but they span {int(label.min())} to {int(label.max())}."
        )
    return label


def _class_labels(label: Labels) -> Tensor:
    """Return (N,) int64, on the CPU."""
    label = torch.as_tensor(label, device="cpu")
    if label.ndim != 1 or (len(label) and (label.is_floating_point() or label.is_complex())):
        kind = str(label.dtype).removeprefix("torch.")
        raise TypeError(f"Expected one integer class per sample, (N,), but got {kind} of shape {tuple(label.shape)}.")
    return label.long()


class NoisyLabels(Dataset[Any]):
    """A dataset of ``(x, y)`` with other labels.

    Args:
        dataset: map-style, of items ``(x, y)``; what more they have is kept.
        given_label: (N,) integers, what ``y`` is from now on.
        true_label: (N,) integers, the right labels.

    Attributes:
        is_wrong: (N,) bool, where the given label is not the true one. For evaluation only.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if there is not one label of each kind per item.

    Example:
        >>> clean = [("cat.jpg", 0), ("dog.jpg", 1)]
        >>> noisy = NoisyLabels(clean, given_label=torch.tensor([0, 0]), true_label=torch.tensor([0, 1]))
        >>> noisy[1], noisy.is_wrong
        (('dog.jpg', 0), tensor([False,  True]))
    """

    def __init__(self, dataset: Any, given_label: Labels, true_label: Labels) -> None:
        if not len(dataset) == len(given_label) == len(true_label):
            raise ValueError(
                f"Expected one label per item, but there are {len(dataset)} items, {len(given_label)} given and"
                f" {len(true_label)} true labels."
            )
        self.dataset = dataset
        self.given_label = _class_labels(given_label)
        self.is_wrong = self.given_label != _class_labels(true_label)

    def __len__(self) -> int:
        return len(self.given_label)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x, _, *rest = self.dataset[index]
        return (x, int(self.given_label[index]), *rest)
