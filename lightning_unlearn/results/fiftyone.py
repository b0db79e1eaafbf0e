"""A partition as fields of FiftyOne samples, and the tags that people set there read back."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from lightning_unlearn.results.labels import DECISIONS
from lightning_unlearn.results.packages import check_length, columns_by_title, label_cells, package
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review_csv import check_undecided
from lightning_unlearn.results.table import columns_of
from lightning_unlearn.utilities.checks import check_flag
from lightning_unlearn.utilities.files import write_csv


def to_fiftyone(
    partition: Partition, samples: Any, *, class_names: Sequence[str] | None = None, prefix: str = "unlearn_"
) -> None:
    """Set fields of FiftyOne samples, those of the same names again.

    The fields are the columns of :func:`to_dataframe`, but that given and suggested labels are ``Classification`` (of a
    multi-label task ``Classifications``), the suggested one with its probability as confidence. A person decides by
    tags: see :func:`review_from_fiftyone`.

    Args:
        partition: of the training set.
        samples: a FiftyOne dataset or view of the training set, in the order of its indices.
        class_names: the name of every class, by label; by default its number.
        prefix: of the names of the fields.

    Raises:
        ImportError: without fiftyone.
        ValueError: for another length.
    """
    fiftyone = package("fiftyone")
    check_length(partition, len(samples), "samples")
    names = partition.known_names(class_names)

    def classified(label: int | list[int], confidence: float | None) -> Any:
        several = [
            fiftyone.Classification(label=str(one) if names is None else names[one], confidence=confidence)
            for one in ([label] if isinstance(label, int) else label)
            if one >= 0
        ]
        return fiftyone.Classifications(classifications=several) if partition.is_multilabel else (several or [None])[0]

    # What a person decides are tags.
    rest = ("file", "_class", "decision")
    columns = {name: values for name, values in columns_by_title(partition, None).items() if not name.endswith(rest)}
    sure = columns.pop("suggested_probability")
    columns["given_label"] = [classified(label, None) for label in columns["given_label"]]
    columns["suggested_label"] = [classified(*pair) for pair in zip(columns["suggested_label"], sure, strict=True)]
    for name, values in columns.items():
        samples.set_values(f"{prefix}{name}", values)


def review_from_fiftyone(
    partition: Partition,
    samples: Any,
    path: str | PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    prefix: str = "unlearn_",
    overwrite: bool = False,
) -> None:
    """Write the decisions that people have made in FiftyOne as the table that ``review=`` takes.

    A decision is a tag of the sample: ``keep``, ``drop`` or ``relabel``; re-labeled is to what the field of the
    suggested label says, as it was or as somebody has edited it. Samples without such a tag are not in the table.

    Args:
        partition: that :func:`to_fiftyone` was given.
        samples: the same FiftyOne samples, all of them, in the same order.
        path: of the table to write; folders are made.
        class_names: as :func:`to_fiftyone` was given.
        prefix: likewise.
        overwrite: write over a table in which a person has decided something, too.

    Raises:
        ValueError: for another length, a sample with two of the tags, and a label that is the name of no class; for a
            table with decisions in its place, unless ``overwrite``.
    """
    if not check_flag("overwrite", overwrite):
        check_undecided(path, "give another path, rename it, or set overwrite=True")
    check_length(partition, len(samples), "samples")
    names = partition.known_names(class_names)
    decided = dict(filter(None, map(_decision, range(len(partition)), samples.values("tags"))))
    among = sorted(decided)
    table = columns_of(partition, suspects_only=False, review=0, names=names, columns=None, among=among)
    table["decision"] = [decided[index] for index in table["index"]]
    labels = samples.values(f"{prefix}suggested_label")
    for at, index in enumerate(table["index"]):
        if decided[index] == "relabel":
            new = _new_label(index, labels[index], names)
            if new == _as_list(label_cells(partition.label[[index]])[0]):
                raise ValueError(
                    f"Expected a label other than the given one for sample {index}, which is tagged relabel; edit"
                    f" {prefix}suggested_label, or tag it keep."
                )
            table["suggested_label"][at] = " ".join(map(str, new))
            if names is not None:
                table["suggested_class"][at] = "; ".join(names[one] for one in new)
    write_csv(path, table)


def _decision(index: int, tags: Sequence[str] | None) -> tuple[int, str] | None:
    found = [tag for tag in tags or () if tag in DECISIONS]
    if len(found) > 1:
        raise ValueError(
            f"Expected sample {index} to have one of the tags keep, drop and relabel, but it has"
            f" {' and '.join(found)}; remove the others."
        )
    return (index, found[0]) if found else None


def _as_list(cell: Any) -> list[int]:
    return cell if isinstance(cell, list) else [cell]


def _new_label(index: int, label: Any, names: dict[int, str] | None) -> list[int]:
    """Return the classes that a sample is to have, by what they are called in FiftyOne."""
    several = getattr(label, "classifications", None)
    found = []
    for one in [] if label is None else [label] if several is None else several:
        known = [number for number, name in (names or {}).items() if name == one.label]
        if names is None and one.label.isdecimal():
            known = [int(one.label)]
        if len(known) != 1:
            raise ValueError(
                f"Expected the suggested label of sample {index}, which is tagged relabel, to name one class, but"
                f" {one.label!r} names {len(known) or 'none'}; pick one in FiftyOne, or pass the same class_names"
                " as to to_fiftyone."
            )
        found += known
    return sorted(found)
