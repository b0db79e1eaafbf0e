"""Wrong labels that people gave: the files of CIFAR-N."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.utilities.files import source_file

# ``numpy.core`` is what numpy 1 called the module, and what the files of CIFAR-N say.
_reconstruct = np.array(0).__reduce__()[0]
_ARRAY_PARTS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint8", "int32", "int64")),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]


def human_labels(file: str | PathLike[str], which: str = "worse_label") -> tuple[Tensor, Tensor]:
    """Return what people called the images of CIFAR-10 or CIFAR-100, in the order of torchvision's training set.

    The labels are those of CIFAR-N (J. Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022, license CC BY-NC
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
    given, true = (_integers(found[name], name, file) for name in (which, "clean_label"))
    if given.ndim != 1 or given.shape != true.shape:
        raise ValueError(
            f"Expected one label per image in {file}, but {which!r} has shape {tuple(given.shape)} and 'clean_label'"
            f" {tuple(true.shape)}."
        )
    return given, true


def _integers(array: Any, name: str, file: str | PathLike[str]) -> Tensor:
    """Return the labels of that name, int64."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"Expected integers under {name!r} in {file}, but they are of type {array.dtype}.")
    return torch.from_numpy(array.astype(np.int64))


def _arrays(file: Path) -> dict[str, Any]:
    """Return the arrays of a file by name, read without running what it may hold."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        with torch.serialization.safe_globals(_ARRAY_PARTS):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # both have several for what is not their file, or holds more than arrays
        raise ValueError(
            f"Expected {file} to be CIFAR-N's file of arrays of labels, but it holds something else, or is cut short."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"Expected {file} to hold arrays by name, as CIFAR-N's, but it holds a {type(found).__name__}."
        )
    return found
