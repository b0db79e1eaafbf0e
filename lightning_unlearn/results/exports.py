"""A partition in the forms of other packages, each of which is imported only when its form is asked for.

Rows, samples and columns are in the order of the data set, as the indices of a partition are.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.results.labels import REASONS, positive_labels
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.utilities.files import replacing

# What to give pip for a package, where that is not its name.
_PIP = {"cleanlab": "'cleanlab[datalab]'", "pyarrow": "pandas pyarrow"}


def to_dataframe(partition: Partition, *, class_names: Sequence[str] | None = None) -> Any:
    """A pandas DataFrame with a row for each sample, whose index is that of the data set.

    Args:
        partition: of the training set.
        class_names: the name of every class, by label, for the columns ``given_class`` and ``suggested_class``; by
            default the partition's own.

    Returns:
        columns ``file`` (where the data set of the fit lists its files), ``given_label``, ``suggested_label`` (of a
        multi-label task lists of the labels that a sample has), ``clean_probability`` and ``expected_precision`` (NaN
        where they are not known), ``suggested_probability``, ``label_evidence``, ``input_evidence``, ``reason``,
        ``is_clean``, ``rank``, ``list``, ``proposed`` and an empty
        ``decision`` (see :meth:`Partition.to_csv
        <lightning_unlearn.Partition.to_csv>`).

    Raises:
        ImportError: without pandas.
        ValueError: if there is not one name per class.
    """
    pandas = _package("pandas")
    index = pandas.RangeIndex(len(partition), name="index")
    return pandas.DataFrame(_columns(partition, class_names), index=index)


def to_parquet(partition: Partition, path: str | PathLike[str], *, class_names: Sequence[str] | None = None) -> None:
    """Writes the table of :func:`to_dataframe` as Parquet, in which lists stay lists.

    Args:
        partition: of the training set.
        path: file to write; folders are made, and what was there is replaced in one step.
        class_names: the name of every class, by label.

    Raises:
        ImportError: without pandas and pyarrow.
        ValueError: if there is not one name per class.
    """
    _package("pyarrow")
    frame = to_dataframe(partition, class_names=class_names)
    with replacing(path) as file:
        frame.reset_index().to_parquet(file, engine="pyarrow", index=False)


def to_datalab(partition: Partition, lab: Any = None, *, class_names: Sequence[str] | None = None) -> Any:
    """A cleanlab Datalab with the label issues that the partition has found, as ``find_issues`` leaves its own.

    ``is_label_issue`` is whether a sample is suspect for its label, ``label_score`` its probability of being clean.
    Samples that are suspect only for their input are no label issues.

    Args:
        partition: of the training set.
        lab: a Datalab of the training set in the order of its indices, to which the issues are added (label issues that
            it has are replaced); by default a new one that holds the given labels alone.
        class_names: the name of every class, by label, for the new one.

    Raises:
        ImportError: without cleanlab's Datalab.
        ValueError: for a Datalab of another length, or names that do not fit.
    """
    managers = _package("cleanlab", "cleanlab.datalab.internal.issue_manager")
    pandas = _package("pandas")
    if bool((partition.label < 0).any()):
        raise ValueError(
            "Expected a label of each sample, as Datalab has them, but some are to be ignored (-1); it cannot say so."
        )
    if lab is None:
        class_names = class_names if class_names is not None else partition.class_names or None
        lab = _new_lab(partition, class_names)
    if len(lab.labels) != len(partition):
        raise ValueError(
            f"Expected a Datalab of the {len(partition)} samples of the partition, but it has {len(lab.labels)};"
            " give one of the training set, in the order of its indices."
        )
    given, suggested = (_numbered(label, lab, class_names) for label in (partition.label, partition.suggested_label))
    if differ := sum(one != other for one, other in zip(given, _plain(lab.labels), strict=True)):
        raise ValueError(
            f"Expected a Datalab of the labels that the partition is of, but {differ} of {len(given)} differ; give one"
            " of the training set, in the order of its indices."
        )
    of_label = torch.tensor([reason in ("label", "both") for reason in REASONS])[partition.reason.long()]
    score = partition.clean_probability.double()

    class Found(managers.IssueManager):  # type: ignore[misc, name-defined]
        """Holds what has been found already."""

        issue_name = "label"

        def find_issues(self, *args: Any, **kwargs: Any) -> None:
            """Nothing is left to find."""

    found = Found(lab)
    found.issues = pandas.DataFrame({"is_label_issue": of_label.numpy(), "label_score": score.numpy()})
    found.summary = found.make_summary(score=float(score.mean()))
    found.info = {"given_label": given, "predicted_label": suggested, "num_label_issues": int(of_label.sum())}
    # It warns of what it replaces, which is what is asked for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lab.data_issues.collect_issues_from_issue_manager(found)
    return lab


def to_hugging_face(
    partition: Partition, dataset: Any, *, class_names: Sequence[str] | None = None, prefix: str = "unlearn_"
) -> Any:
    """A Hugging Face data set with what is known of each row in further columns; the one given stays as it is.

    Args:
        partition: of the training set.
        dataset: a ``datasets.Dataset`` of the training set, in the order of its indices.
        class_names: the name of every class, by label.
        prefix: of the names of the columns, which are those of :func:`to_dataframe`.

    Raises:
        ImportError: without datasets.
        TypeError: for anything but a ``datasets.Dataset``.
        ValueError: for another length, or a column that is there.
    """
    datasets = _package("datasets")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, the split that was trained on, but got a {type(dataset).__name__}."
        )
    _check_length(partition, len(dataset), "a data set")
    columns = {f"{prefix}{name}": values for name, values in _columns(partition, class_names).items()}
    if taken := [name for name in columns if name in dataset.column_names]:
        raise ValueError(f"Expected columns that are not there yet, but {taken[0]!r} is; give another prefix.")
    return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(columns)], axis=1)


def to_fiftyone(
    partition: Partition, samples: Any, *, class_names: Sequence[str] | None = None, prefix: str = "unlearn_"
) -> None:
    """Sets fields of FiftyOne samples, those of the same names again.

    The fields are the columns of :func:`to_dataframe`, but that given and suggested labels are ``Classification`` (of a
    multi-label task ``Classifications``), the suggested one with its probability as confidence.

    Args:
        partition: of the training set.
        samples: a FiftyOne dataset or view of the training set, in the order of its indices.
        class_names: the name of every class, by label; by default its number.
        prefix: of the names of the fields.

    Raises:
        ImportError: without fiftyone.
        ValueError: for another length.
    """
    fiftyone = _package("fiftyone")
    _check_length(partition, len(samples), "samples")
    names = partition.known_names(class_names)

    def classified(label: int | list[int], confidence: float | None) -> Any:
        several = [
            fiftyone.Classification(label=str(one) if names is None else names[one], confidence=confidence)
            for one in ([label] if isinstance(label, int) else label)
            if one >= 0
        ]
        return fiftyone.Classifications(classifications=several) if partition.is_multilabel else (several or [None])[0]

    columns = {
        name: values for name, values in _columns(partition, None).items() if not name.endswith(("file", "_class"))
    }
    sure = columns.pop("suggested_probability")
    columns["given_label"] = [classified(label, None) for label in columns["given_label"]]
    columns["suggested_label"] = [classified(*pair) for pair in zip(columns["suggested_label"], sure, strict=True)]
    for name, values in columns.items():
        samples.set_values(f"{prefix}{name}", values)


def _package(name: str, module: str | None = None) -> Any:
    """A package, or one of its modules.

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


def _check_length(partition: Partition, found: int, what: str) -> None:
    if found != len(partition):
        raise ValueError(
            f"Expected {what} of {len(partition)} rows, as the partition has, but got {found}; give what was trained"
            " on, in the order of its indices."
        )


def _columns(partition: Partition, class_names: Sequence[str] | None) -> dict[str, list[Any]]:
    names = partition.known_names(class_names)
    columns: dict[str, list[Any]] = {"file": list(partition.files)} if partition.files else {}
    for title, label in (("given", partition.label), ("suggested", partition.suggested_label)):
        cells = _cells(label)
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


def _cells(label: Tensor) -> list[Any]:
    """A class index for each sample, or a list of the labels that it has."""
    if label.ndim == 1:
        return label.tolist()
    return positive_labels(label)


def _new_lab(partition: Partition, class_names: Sequence[str] | None) -> Any:
    datalab, datasets = _package("cleanlab", "cleanlab.datalab.datalab"), _package("datasets")
    cells = _columns(partition, class_names)["given_label" if class_names is None else "given_class"]
    if partition.is_multilabel:
        return datalab.Datalab({"label": cells}, label_name="label", task="multilabel", verbosity=0)
    classes = max(len(partition.noise_matrix), int(torch.cat([partition.label, partition.suggested_label]).max()) + 1)
    # Also those classes that no sample is given.
    names = [str(k) for k in range(classes)] if class_names is None else list(class_names)
    feature = datasets.Features({"label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"label": partition.label.tolist()}, features=feature)
    return datalab.Datalab(data, label_name="label", verbosity=0)


def _numbered(label: Tensor, lab: Any, class_names: Sequence[str] | None) -> list[Any]:
    """Labels by the numbers that a Datalab has for its classes, which it knows by what they are called."""
    numbers = {name: number for number, name in enumerate(lab.class_names)}

    def number(one: int) -> int:
        called = [one, str(one)] if class_names is None else [class_names[one]]
        known = [numbers[name] for name in called if name in numbers]
        if not known:
            raise ValueError(
                f"Expected a Datalab that knows class {called[0]!r}, but it knows {', '.join(map(str, numbers))}; give"
                " class_names as it calls them, or make it of a data set whose label is a datasets.ClassLabel."
            )
        return known[0]

    return [[number(k) for k in cell] if isinstance(cell, list) else number(cell) for cell in _cells(label)]


def _plain(labels: Iterable[Any]) -> list[Any]:
    return [list(label) if isinstance(label, (list, tuple)) else int(label) for label in labels]
