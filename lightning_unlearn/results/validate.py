"""Checks of what a partition or a mask is made of."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.utilities.checks import check_number, plain, shown

if TYPE_CHECKING:
    from lightning_unlearn.results.partition import Partition


# More than any classifier has; tables with a row for each class are made of labels that a file holds.
_MOST_CLASSES = 2**24
# Those that NumPy has too.
_STORED = (torch.float16, torch.float32, torch.float64)
# What a partition has for each sample.
_BY_SAMPLE = {
    "clean_probability": torch.float32,
    "is_clean": torch.bool,
    "suggested_label": torch.int64,
    "suggested_probability": torch.float32,
    "label": torch.int64,
    "label_evidence": torch.float32,
    "input_evidence": torch.float32,
    "reason": torch.uint8,
    "doubtful": torch.bool,
}
# Of a multi-label task a number for each label.
_BY_LABEL = ("label", "suggested_label")


def check_partition(partition: Partition) -> None:
    """Refuse a partition whose fields do not fit each other, and make its primitives those of Python.

    Raises:
        ValueError: naming the field, what it must be and what it is.
    """
    if partition.noise_rate is not None:
        check_primitives(partition, noise_rate=float)
    check_primitives(partition, epoch=int, recipe=str, layer=str, warning=str, fingerprint=str)
    threshold = check_number("relabel_threshold", partition.relabel_threshold, above=0, most=1)
    # The class is frozen for everybody else.
    object.__setattr__(partition, "relabel_threshold", threshold)
    check_held(partition)
    object.__setattr__(partition, "keys", check_keys(partition.keys, partition.clean_probability))
    shape = partition.clean_probability.shape
    if len(shape) != 1:
        raise ValueError(f"clean_probability must have shape (N,), but has {tuple(shape)}.")
    if partition.doubtful.shape == (0,):
        object.__setattr__(partition, "doubtful", torch.zeros(shape, dtype=torch.bool))
    _check_tensors(partition, shape)
    check_sizes(partition)
    check_estimates(partition)
    _check_ranges(partition)


def _check_tensors(partition: Partition, shape: torch.Size) -> None:
    of_labels = torch.Size([*shape, *partition.label_probability.shape[1:]]) if partition.is_multilabel else shape
    for name, dtype in _BY_SAMPLE.items():
        value = getattr(partition, name)
        expected = of_labels if name in _BY_LABEL else shape
        if value.shape != expected or value.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(expected)}, but is {value.dtype} of shape"
                f" {tuple(value.shape)}."
            )
    for name in ("noise_matrix", "label_probability"):
        check_matrix(name, getattr(partition, name))


def _check_ranges(partition: Partition) -> None:
    if len(partition) and int(partition.reason.max()) >= len(REASONS):
        raise ValueError(f"reason must hold numbers below {len(REASONS)}, but holds {int(partition.reason.max())}.")
    low, high = (partition.clean_probability if len(partition) else torch.zeros(1)).aminmax()
    if not (0 <= low <= high <= 1 and 0 <= (partition.noise_rate or 0) <= 1):
        raise ValueError(
            f"Probabilities must lie in [0, 1], but clean_probability spans [{low:.4g}, {high:.4g}] and"
            f" noise_rate is {partition.noise_rate}."
        )


def check_primitives(record: Any, **kinds: type[Any]) -> None:
    """Make numbers and texts those of Python, as a file or a checkpoint holds them; NumPy's are taken.

    Raises:
        ValueError: naming the field of another kind.
    """
    for name, kind in kinds.items():
        value = getattr(record, name)
        found = plain(value)
        fits = isinstance(found, (int, float) if kind is float else kind) and not isinstance(found, bool)
        if not fits:
            raise ValueError(f"{name} must be a {kind.__name__}, but is {value!r}.")
        # The class is frozen for everybody else.
        object.__setattr__(record, name, kind(found))


def check_held(record: Any) -> None:
    """Refuse what has no content that a file could hold, and leave out how a tensor was computed.

    Raises:
        ValueError: naming the field that is no tensor, a sparse one, or one without content.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if "Tensor" not in str(field.type) or (value is None and "None" in str(field.type)):
            continue
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            found = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} on {value.device}"
            raise ValueError(f"{field.name} must be a dense tensor, but is {found}.")
        object.__setattr__(record, field.name, value.detach())


def check_scores(name: str, value: Tensor, shape: torch.Size) -> None:
    """Refuse scores of another shape, or of a type that a file cannot hold."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, but has {tuple(value.shape)}.")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be of a floating type, but is {value.dtype}.")
    if value.dtype not in _STORED:
        raise ValueError(f"{name} must be of a floating type that a file can hold, but is {value.dtype}; use .float().")


def check_sizes(partition: Partition) -> None:
    """Refuse labels and shapes of which no table with a row for each class can be made, and what is no number.

    Raises:
        ValueError: naming the field.
    """
    for name in ("suggested_probability", "label_evidence", "input_evidence", "noise_matrix", "label_probability"):
        if not bool(getattr(partition, name).isfinite().all()):
            raise ValueError(f"{name} must be finite, but holds NaN or infinity.")
    if not 0 <= partition.epoch < 2**63:
        raise ValueError(f"epoch must be a number of epochs, but is {shown(partition.epoch)}.")
    rows, columns = partition.noise_matrix.shape
    if rows not in (0, columns) or columns > _MOST_CLASSES:
        raise ValueError(f"noise_matrix must have a row for each column, but has shape {(rows, columns)}.")
    shape = tuple(partition.label_probability.shape)
    if shape[1] > _MOST_CLASSES or (partition.is_multilabel and shape[0] != len(partition)):
        raise ValueError(f"label_probability must have shape ({len(partition)}, L) or (0, 0), but has {shape}.")
    _check_files(partition)
    most = 1 if partition.is_multilabel else _MOST_CLASSES - 1
    for name in ("label", "suggested_label") if len(partition) else ():
        low, high = (int(one) for one in getattr(partition, name).aminmax())
        if low < -1 or high > most:
            raise ValueError(f"{name} must lie in [-1, {most:,}], but spans [{low}, {high}].")


def _check_files(partition: Partition) -> None:
    files: Any = partition.files
    if not isinstance(files, (tuple, list)) or (files and len(files) != len(partition)):
        raise ValueError(f"files must be {len(partition)} paths, one for each sample, or none, but is {shown(files)}.")
    if not all(isinstance(file, str) for file in files):
        raise ValueError("files must be texts, but one is none.")
    object.__setattr__(partition, "files", tuple(files))


def check_estimates(partition: Partition) -> None:
    """Make the interval a pair of floats, and the pairs of classes tuples.

    Raises:
        ValueError: for what is no interval within [0, 1], and what are no classes with a share.
    """
    pairs: Any = partition.often_called
    try:
        found = tuple((int(true), int(called), float(share)) for true, called, share in pairs)
    except (TypeError, ValueError):
        found = ((-1, -1, 0.0),)
    if not all(min(pair[:2]) >= 0 and max(pair[:2]) < _MOST_CLASSES and 0 <= pair[2] <= 1 for pair in found):
        raise ValueError(f"often_called must be pairs of classes, each with a share, but is {shown(pairs)}.")
    object.__setattr__(partition, "often_called", found)
    interval = partition.noise_rate_interval
    if interval is None:
        return
    ends: Any = interval
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise ValueError(f"noise_rate_interval must be its two ends, but is {shown(interval)}.")
    low, high = (check_number("noise_rate_interval", end, least=0, most=1) for end in ends)
    if low > high:
        raise ValueError(f"noise_rate_interval must be its lower and its upper end, but is {shown(interval)}.")
    object.__setattr__(partition, "noise_rate_interval", (low, high))


def check_keys(keys: Any, rows: Any) -> tuple[Any, ...]:
    """Return the keys of samples, as a tuple.

    Raises:
        ValueError: for another number, or what are not all integers or all texts, each once, in ascending order.
    """
    found = tuple(keys)
    if not found:
        return ()
    kinds = {type(key) for key in found}
    if len(found) != len(rows) or kinds not in ({int}, {str}):
        raise ValueError(
            f"keys must be an integer or a text for each of {len(rows)} samples, but are {len(found)} of"
            f" {', '.join(sorted(kind.__name__ for kind in kinds))}."
        )
    if any(one >= other for one, other in itertools.pairwise(found)):
        raise ValueError("keys must be in ascending order, each once, but are not.")
    return found


def check_matrix(name: str, value: Tensor) -> None:
    """Refuse anything but a matrix of float32."""
    if value.ndim != 2 or value.dtype != torch.float32:
        raise ValueError(
            f"{name} must be torch.float32 with two dimensions, but is {value.dtype} {tuple(value.shape)}."
        )
