"""What the exports share: other packages, imported when they are asked for, and a partition as plain columns."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_unlearn.results.labels import positive_labels
from lightning_unlearn.results.partition import Partition

# What to give pip for a package, where that is not its name.
_PIP = {"cleanlab": "'cleanlab[datalab]'", "pyarrow": "pandas pyarrow"}


def package(name: str, module: str | None = None) -> Any:
    """Return a package, or one of its modules.

    Raises:
        ImportError: saying how to install it.
    """
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        raise ImportError(
            f"Expected {name} to be installed for this export, but it cannot be imported ({error}); run"
            f" `pip install {_PIP.get(name, name)}`."
        ) from error


def check_length(partition: Partition, found: int, what: str) -> None:
    """Refuse values that do not belong to the samples of a partition.

    Raises:
        ValueError: for another number of them.
    """
    if found != len(partition):
        raise ValueError(
            f"Expected {what} with {len(partition)} rows, as in the partition, but got {found}. Pass the"
            " training data, in index order."
        )


def columns_by_title(partition: Partition, class_names: Sequence[str] | None) -> dict[str, list[Any]]:
    """Return what is known of each sample, by index, as plain values.

    Raises:
        ValueError: if there is not one name per class.
    """
    names = partition.known_names(class_names)
    columns: dict[str, list[Any]] = {"key": list(partition.keys)} if partition.keys else {}
    if partition.files:
        columns["file"] = list(partition.files)
    for title, label in (("given", partition.label), ("suggested", partition.suggested_label)):
        cells = label_cells(label)
        columns[f"{title}_label"] = cells
        if names is not None:
            columns[f"{title}_class"] = [
                [names[one] for one in cell] if isinstance(cell, list) else names.get(cell) for cell in cells
            ]
    for name in ("clean_probability", "suggested_probability", "label_evidence", "input_evidence"):
        columns[name] = getattr(partition, name).tolist()
    if partition.noise_rate is None:
        columns["clean_probability"] = [math.nan] * len(partition)
    place, curve = partition.ranking().argsort(), partition.precision_curve()
    return columns | {
        "reason": partition.reasons(),
        "is_clean": partition.is_clean.tolist(),
        "rank": (place + 1).tolist(),
        "list": partition.listed(),
        "expected_precision": [math.nan] * len(partition) if curve is None else curve[place].tolist(),
        "proposed": partition.decisions(),
        # For a person to fill.
        "decision": [""] * len(partition),
    }


def label_cells(label: Tensor) -> list[Any]:
    """Return a class index for each sample, or a list of the labels that it has."""
    if label.ndim == 1:
        return label.tolist()
    return positive_labels(label)
