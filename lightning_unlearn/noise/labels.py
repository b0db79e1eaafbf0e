"""Wrong labels: drawn at random, or by people."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_unlearn.storage import source_file

# ``numpy.core`` is what numpy 1 called the module, and what the files of CIFAR-N say.
_reconstruct = np.array(0).__reduce__()[0]
_ARRAY_PARTS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint8", "int32", "int64")),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]


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


def human_labels(file: str | PathLike[str], which: str = "worse_label") -> tuple[Tensor, Tensor]:
    """What people called the images of CIFAR-10 or CIFAR-100, in the order of torchvision's training set.

    The labels are those of CIFAR-N (J. Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022, licence CC BY-NC
    4.0): download ``CIFAR-10_human.pt`` or ``CIFAR-100_human.pt`` from the authors' page. Nothing in the file is run.

    Args:
        file: theirs, or an ``.npz`` with arrays of the same names.
        which: ``"worse_label"`` (40.2 % wrong), ``"aggre_label"`` (9.0 %), ``"random_label1"`` to ``"random_label3"``
            (about 18 %); of CIFAR-100 ``"noisy_label"`` (40.2 %).

    Returns:
        The given and the true labels, (N,) int64 each. Compare the true ones with ``dataset.targets`` before training:
        another order of the images makes every label wrong.

    Raises:
        ValueError: if the file has no such labels, or holds something else.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "CIFAR-10_human.npz"
        >>> np.savez(file, clean_label=[3, 5], worse_label=[3, 2])
        >>> human_labels(file)
        (tensor([3, 2]), tensor([3, 5]))
    """
    found = _arrays(source_file(file))
    for name in (which, "clean_label"):
        if name not in found:
            raise ValueError(f"Expected labels named {name!r} in {file}, but it holds {sorted(found)}.")
    given, true = (torch.as_tensor(np.asarray(found[name])).long() for name in (which, "clean_label"))
    if given.ndim != 1 or given.shape != true.shape:
        raise ValueError(
            f"Expected one label per image in {file}, but {which!r} has shape {tuple(given.shape)} and 'clean_label'"
            f" {tuple(true.shape)}."
        )
    return given, true


def _arrays(file: Path) -> dict[str, Any]:
    """The arrays of a file by name, read without running what it may hold."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    try:
        with torch.serialization.safe_globals(_ARRAY_PARTS):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch has several for what is not its file, or holds more than arrays
        raise ValueError(
            f"Expected {file} to be CIFAR-N's file of arrays of labels, but it holds something else, or is cut short."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"Expected {file} to hold arrays by name, as CIFAR-N's, but it holds a {type(found).__name__}."
        )
    return found


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
