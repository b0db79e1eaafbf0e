"""What the page needs so that a person decides about samples in it: rows of the table that ``review=`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.results.labels import positive_labels
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.table import columns_of
from lightning_unlearn.utilities.files import spreadsheet_cell


def review_data(
    partition: Partition,
    names: Sequence[str],
    gallery: Mapping[int, Mapping[str, Any]],
    earlier: Mapping[str, list[int]],
) -> dict[str, Any]:
    """Return the rows of the samples shown, as ``Partition.to_csv`` writes them, and what is decided already.

    Args:
        partition: of the training set.
        names: of classes, by label; may be too few.
        gallery: what is shown of a sample, by its index.
        earlier: indices by decision, of the table that the run went by.

    Returns:
        ``key`` under which the browser keeps decisions, of the fingerprint and the labels, as samples that vary have no
        content in their fingerprint; ``mark`` of the data set; ``classes`` as their number; ``names`` of classes as
        cells; ``titles``; ``rows``, by index; and ``earlier``, of each its index, decision, given and new labels.
    """
    digest = blake2b(partition.label.contiguous().numpy().tobytes(), digest_size=6).hexdigest()
    classes = _classes(partition, names)
    columns = None
    if not partition.files and any("file" in card for card in gallery.values()):
        columns = {"file": [gallery.get(index, {}).get("file", "") for index in range(len(partition))]}
    table = columns_of(
        partition,
        suspects_only=False,
        review=0,
        names=dict(enumerate(names)) if len(names) >= classes else None,
        columns=columns,
        among=[index for index in gallery if index < len(partition)],
    )
    mark = next(iter(table["dataset"]), "")
    return {
        "key": f"lightning-unlearn review {mark} {digest}",
        "mark": mark,
        "classes": classes,
        "names": [spreadsheet_cell(name) for name in names] if len(names) >= classes else [],
        "titles": list(table),
        "rows": {row[0]: [spreadsheet_cell(value) for value in row] for row in zip(*table.values(), strict=True)},
        "earlier": [
            [index, word, labels_of(partition.label[index]), labels_of(partition.suggested_label[index])]
            for word, indices in earlier.items()
            for index in indices
            if index < len(partition)
        ],
    }


def _classes(partition: Partition, names: Sequence[str]) -> int:
    if partition.is_multilabel:
        return partition.label.shape[1]
    seen = int(torch.cat([partition.label, partition.suggested_label]).max()) + 1 if len(partition) else 0
    return max(len(names), len(partition.noise_matrix), seen)


def labels_of(label: Tensor) -> list[int]:
    """Return the labels that a sample has.

    Args:
        label: () int64, or (L,), 1 for each label that it has.
    """
    return [int(label)] if label.ndim == 0 else positive_labels(label.unsqueeze(0))[0]
