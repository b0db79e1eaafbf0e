"""A table of samples, the most suspect first: what ``Partition.to_csv`` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_unlearn.data.fingerprint import short_fingerprint
from lightning_unlearn.results.labels import REASONS, positive_labels
from lightning_unlearn.utilities.checks import check_flag, check_whole, shown

if TYPE_CHECKING:
    from lightning_unlearn.results.partition import Partition


def columns_of(
    partition: Partition,
    *,
    suspects_only: bool,
    review: int,
    names: dict[int, str] | None,
    columns: Mapping[str, Sequence[Any]] | None,
    among: Sequence[int] | None = None,
) -> dict[str, list[Any]]:
    """Return the columns by title; see :meth:`~lightning_unlearn.Partition.to_csv`.

    Args:
        partition: of whose samples the rows are.
        suspects_only: leave out the samples that are clean.
        review: how many of the other samples are in the table too.
        names: of every class, by label; None where they are not known.
        columns: further ones, by dataset index.
        among: dataset indices, whose rows alone are in the table.

    Raises:
        ValueError: if there is not one value per sample, or a title is taken.
    """
    suspects_only = check_flag("suspects_only", suspects_only)
    if not isinstance(columns, (Mapping, type(None))):
        raise ValueError(f"Expected columns to be a dict of values by title, but got {shown(columns)}.")
    added = {str(title): list(values) for title, values in (columns or {}).items()}
    if partition.files:
        added = {"file": list(partition.files), **added}
    for title, values in added.items():
        if len(values) != len(partition):
            raise ValueError(
                f"Expected column '{title}' to have a value for each of {len(partition)} samples, but got"
                f" {len(values)}."
            )
    review = check_whole("review", review, least=0, meaning="how many samples to add to the suspects")
    decisions, listed, order, curve = (
        partition.decisions(),
        partition.listed(),
        partition.ranking(),
        partition.precision_curve(),
    )
    if suspects_only:
        order = order[: len(partition.suspect_indices()) + review]
    rank = torch.arange(len(order))
    if among is not None:
        rank = torch.isin(order, torch.tensor(among, dtype=torch.int64)).nonzero().flatten()
        order = order[rank]
    given, suggested = partition.label[order], partition.suggested_label[order]
    own = {
        "index": order.tolist(),
        "given_label": _label_cells(given),
        **_named("given_class", given, names),
        "suggested_label": _label_cells(suggested),
        **_named("suggested_class", suggested, names),
        "clean_probability": [
            "" if partition.noise_rate is None else f"{value:.6f}"
            for value in partition.clean_probability[order].tolist()
        ],
        "label_evidence": [f"{value:.6g}" for value in partition.label_evidence[order].tolist()],
        "input_evidence": [f"{value:.6g}" for value in partition.input_evidence[order].tolist()],
        "reason": [REASONS[code] for code in partition.reason[order].tolist()],
        "is_clean": partition.is_clean[order].int().tolist(),
        "rank": (rank + 1).tolist(),
        "list": [listed[index] for index in order.tolist()],
        "expected_precision": [""] * len(order) if curve is None else _short(curve[rank]),
        "proposed": [decisions[index] for index in order.tolist()],
        "decision": [""] * len(order),
        "dataset": [short_fingerprint(partition.fingerprint)] * len(order),
    }
    # Whoever reads the table, as ``review=`` does, may not tell large from small letters in titles.
    reserved = {*own, "key"} if partition.keys else own
    if taken := [title for title in added if title.strip().lower() in reserved]:
        raise ValueError(f"Expected column titles that are not in the table, but got '{taken[0]}'; use another.")
    index = own.pop("index")
    more = {title: [values[at] for at in index] for title, values in added.items()}
    keys = {"key": [partition.keys[at] for at in index]} if partition.keys else {}
    return {"index": index, **keys, **more, **own}


def _short(value: Tensor) -> list[str]:
    return [f"{one:.4f}" for one in value.tolist()]


def _named(title: str, label: Tensor, names: dict[int, str] | None) -> dict[str, list[Any]]:
    """Return the column of the labels' names, if they have any."""
    if names is None:
        return {}
    if label.ndim == 1:
        return {title: [names.get(one, "") for one in label.tolist()]}
    return {title: ["; ".join(names[one] for one in row) for row in positive_labels(label)]}


def _label_cells(label: Tensor) -> list[Any]:
    """Return a class index for each sample, or the labels that it has, as in ``0 3``."""
    if label.ndim == 1:
        return label.tolist()
    return [" ".join(map(str, row)) for row in positive_labels(label)]
