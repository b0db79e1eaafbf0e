"""Noise for experiments: dataset wrappers that make labels wrong or inputs corrupted, and remember where.

Everything is drawn once, from a seed and the dataset index: the same sample is noisy, in the same way, in every epoch,
on every worker and on every rank. The masks say which samples were changed. They are for evaluation: nothing in the
package reads them. The wrappers nest in either order, for wrong labels and corrupted inputs at once.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset


def symmetric_labels(label: Tensor, rate: float, num_classes: int, *, seed: int) -> Tensor:
    """Replaces a share of the labels by another class, each of the others equally likely.

    Args:
        label: (N,) int64, the right labels.
        rate: share of the labels that are wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        seed: of the draw.

    Returns:
        (N,) int64.

    Raises:
        ValueError: if the rate is not in [0, 1], a label is not a class, or there is no other class.

    Example:
        >>> label = torch.zeros(10, dtype=torch.int64)
        >>> (symmetric_labels(label, 0.4, 3, seed=0) != label).sum()
        tensor(4)
    """
    return flip_labels(label, rate, num_classes, torch.Generator().manual_seed(seed))


def flip_labels(label: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Like :func:`symmetric_labels`, for who draws more than the labels from one source of randomness.

    Args:
        label: (N,) int64, the right labels.
        rate: share of the labels that are wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        generator: source of randomness, on the CPU.

    Returns:
        (N,) int64.

    Raises:
        ValueError: as :func:`symmetric_labels`.

    Example:
        >>> label = torch.zeros(10, dtype=torch.int64)
        >>> (flip_labels(label, 0.4, 3, torch.Generator().manual_seed(0)) != label).sum()
        tensor(4)
    """
    _check(label, rate, num_classes)
    wrong = torch.randperm(len(label), generator=generator)[: round(rate * len(label))]
    shift = torch.randint(1, max(num_classes, 2), wrong.shape, generator=generator)
    noisy = label.clone()
    noisy[wrong] = (label[wrong] + shift) % num_classes
    return noisy


def asymmetric_labels(label: Tensor, rate: float, num_classes: int, *, seed: int) -> Tensor:
    """Replaces a share of every class's labels by the next class: c becomes c + 1, the last one 0.

    Args:
        label: (N,) int64, the right labels.
        rate: share of each class's samples whose label is wrong afterwards, in [0, 1], to the nearest sample.
        num_classes: C.
        seed: of the draw.

    Returns:
        (N,) int64.

    Raises:
        ValueError: if the rate is not in [0, 1], a label is not a class, or there is no other class.

    Example:
        >>> asymmetric_labels(torch.tensor([0, 0, 1, 1]), 0.5, 2, seed=0).sort().values
        tensor([0, 0, 1, 1])
    """
    _check(label, rate, num_classes)
    generator = torch.Generator().manual_seed(seed)
    noisy = label.clone()
    for c in range(num_classes):
        members = (label == c).nonzero().flatten()
        wrong = members[torch.randperm(len(members), generator=generator)[: round(rate * len(members))]]
        noisy[wrong] = (c + 1) % num_classes
    return noisy


def matrix_labels(label: Tensor, transition: Tensor, *, seed: int) -> Tensor:
    """Draws every label from the row of its true class.

    Args:
        label: (N,) int64, the right labels.
        transition: (C, C), row c the probabilities of what a sample of class c is called; rows sum to 1.
        seed: of the draw.

    Returns:
        (N,) int64.

    Raises:
        ValueError: if the matrix is not one of probabilities, or a label is not a class.

    Example:
        >>> matrix_labels(torch.tensor([0, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), seed=0)
        tensor([1, 1])
    """
    square = transition.ndim == 2 and transition.shape[0] == transition.shape[1]
    # Put so that NaN is refused too.
    if not (square and (transition >= 0).all() and ((transition.sum(dim=1) - 1).abs() <= 1e-4).all()):
        raise ValueError(
            "Expected transition to be a matrix (C, C) of probabilities whose rows sum to 1, but got shape"
            f" {tuple(transition.shape)} with row sums {transition.sum(dim=-1).flatten().tolist()[:5]}."
        )
    _check(label, 0.0, len(transition))
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(transition.double()[label], 1, generator=generator).squeeze(1)


def _check(label: Tensor, rate: float, num_classes: int) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"Expected rate to lie in [0, 1], but got {rate}.")
    if rate > 0 and num_classes < 2:
        raise ValueError(f"Expected at least 2 classes, but got {num_classes}: there is no other label to give.")
    if len(label) and not (label.min() >= 0 and label.max() < num_classes):
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1}, but they span {int(label.min())} to {int(label.max())}."
        )


class NoisyLabels(Dataset[Any]):
    """A dataset of ``(x, y)`` with other labels.

    Args:
        dataset: map-style, of items ``(x, y)``.
        given_label: (N,) int64, what ``y`` is from now on.
        true_label: (N,) int64, the right labels.

    Attributes:
        is_wrong: (N,) bool, where the given label is not the true one. For evaluation only.

    Raises:
        ValueError: if there is not one label of each kind per item.

    Example:
        >>> clean = [("cat.jpg", 0), ("dog.jpg", 1)]
        >>> noisy = NoisyLabels(clean, given_label=torch.tensor([0, 0]), true_label=torch.tensor([0, 1]))
        >>> noisy[1], noisy.is_wrong
        (('dog.jpg', 0), tensor([False,  True]))
    """

    def __init__(self, dataset: Any, given_label: Tensor, true_label: Tensor) -> None:
        if not len(dataset) == len(given_label) == len(true_label):
            raise ValueError(
                f"Expected one label per item, but there are {len(dataset)} items, {len(given_label)} given and"
                f" {len(true_label)} true labels."
            )
        self.dataset = dataset
        self.given_label = given_label
        self.is_wrong = given_label != true_label

    def __len__(self) -> int:
        return len(self.given_label)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][0], int(self.given_label[index])


class GaussianInputs(Dataset[Any]):
    """A dataset of ``(x, y)`` with Gaussian noise on some of its inputs, the same in every epoch.

    Args:
        dataset: map-style, of items ``(x, y)`` with a float tensor x, before normalisation.
        sigma: standard deviation of the noise, in units of x.
        share: share of the items that are corrupted, to the nearest item.
        seed: of the choice and of the noise.
        limits: between which *every* input is clamped, corrupted or not; None for no limits.
        leaking: clamp the corrupted inputs only, as the paper's code does after normalisation: ``x.min() >= 0`` then
            finds them without a model.

    Attributes:
        is_corrupted: (N,) bool. For evaluation only.

    Raises:
        ValueError: for a negative sigma, or a share not in [0, 1].

    Example:
        >>> noisy = GaussianInputs([(torch.zeros(3), 0)] * 4, sigma=1.0, share=0.5, seed=0)
        >>> noisy.is_corrupted.sum(), bool((noisy[0][0] == noisy[0][0]).all())
        (tensor(2), True)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sigma: float,
        share: float,
        seed: int,
        limits: tuple[float, float] | None = (0.0, 1.0),
        leaking: bool = False,
    ) -> None:
        if sigma < 0 or not 0 <= share <= 1:
            raise ValueError(f"Expected sigma >= 0 and share in [0, 1], but got sigma={sigma} and share={share}.")
        self.dataset = dataset
        self.sigma = sigma
        self.seed = seed
        self.limits = limits
        self.leaking = leaking
        total = len(cast(Sized, dataset))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        self.is_corrupted = torch.zeros(total, dtype=torch.bool)
        self.is_corrupted[order[: round(share * total)]] = True

    def __len__(self) -> int:
        return len(self.is_corrupted)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        index = range(len(self))[index]  # so that item -1 is the last one, with its noise
        x, *rest = self.dataset[index]
        corrupted = bool(self.is_corrupted[index])
        if corrupted:
            # A stream of its own per item, so that neither the order nor the worker matters.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index + 1)
            x = x + self.sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if self.limits is not None and (corrupted or not self.leaking):
            x = x.clamp(*self.limits)
        return (x, *rest)
