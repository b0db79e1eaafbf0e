"""A partition in the forms of other packages, each of which is imported only when its form is asked for.

Rows, samples and columns are in the order of the data set, as the indices of a partition are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.results.fiftyone import review_from_fiftyone, to_fiftyone
from lightning_unlearn.results.label_studio_tasks import to_label_studio
from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.packages import check_length, columns_by_title, label_cells, package
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.utilities.files import replacing

__all__ = [
    "review_from_fiftyone",
    "to_dataframe",
    "to_datalab",
    "to_fiftyone",
    "to_hugging_face",
    "to_label_studio",
    "to_parquet",
]


def to_dataframe(partition: Partition, *, class_names: Sequence[str] | None = None) -> Any:
    """Return a pandas DataFrame with a row for each sample, whose index is that of the data set.

    Args:
        partition: of the training set.
        class_names: the name of every class, by label, for the columns ``given_class`` and ``suggested_class``; by
            default the partition's own.

    Returns:
        the columns of :meth:`Partition.to_csv <lightning_unlearn.Partition.to_csv>`; of a multi-label task the
        labels and names of a sample are lists, and what is not known is NaN.

    Raises:
        ImportError: without pandas.
        ValueError: if there is not one name per class.
    """
    pandas = package("pandas")
    index = pandas.RangeIndex(len(partition), name="index")
    return pandas.DataFrame(columns_by_title(partition, class_names), index=index)


def to_parquet(partition: Partition, path: str | PathLike[str], *, class_names: Sequence[str] | None = None) -> None:
    """Write the table of :func:`to_dataframe` as Parquet, in which lists stay lists.

    Args:
        partition: of the training set.
        path: file to write; folders are made, and what was there is replaced in one step.
        class_names: the name of every class, by label.

    Raises:
        ImportError: without pandas and pyarrow.
        ValueError: if there is not one name per class.
    """
    package("pyarrow")
    frame = to_dataframe(partition, class_names=class_names)
    with replacing(path) as file:
        frame.reset_index().to_parquet(file, engine="pyarrow", index=False)


def to_datalab(partition: Partition, lab: Any = None, *, class_names: Sequence[str] | None = None) -> Any:
    """Return a cleanlab Datalab with the label issues that the partition has found, as ``find_issues`` leaves its own.

    ``is_label_issue`` is whether a sample is suspect for its label, ``label_score`` its probability of being clean: in
    [0, 1] as cleanlab's own score, the lower the likelier wrong, but of samples with .2 four fifths are expected to be
    wrong, where the noise rate is known. Samples that are suspect only for their input are no label issues. For
    cleanlab's own methods on what this fit has shown, give them ``pred_probs``: see
    :attr:`AttributionPartitionCallback.probabilities <lightning_unlearn.AttributionPartitionCallback.probabilities>`.

    Args:
        partition: of the training set.
        lab: a Datalab of the training set in the order of its indices, to which the issues are added (label issues that
            it has are replaced); by default a new one that holds the given labels alone.
        class_names: the name of every class, by label, for the new one.

    Raises:
        ImportError: without cleanlab's Datalab.
        ValueError: for a Datalab of another length, or names that do not fit.
    """
    managers = package("cleanlab", "cleanlab.datalab.internal.issue_manager")
    pandas = package("pandas")
    if bool((partition.label < 0).any()):
        raise ValueError("Datalab needs a label for each sample, but some labels are ignored (-1).")
    if lab is None:
        class_names = class_names if class_names is not None else partition.class_names or None
        lab = _new_lab(partition, class_names)
    if len(lab.labels) != len(partition):
        raise ValueError(
            f"Expected a Datalab of the {len(partition)} samples of the partition, but it has"
            f" {len(lab.labels)}. Pass one of the training set, in index order."
        )
    given, suggested = (_numbered(label, lab, class_names) for label in (partition.label, partition.suggested_label))
    if differ := sum(one != other for one, other in zip(given, _plain(lab.labels), strict=True)):
        raise ValueError(
            f"Expected a Datalab with the labels of the partition, but {differ} of {len(given)} differ. Pass"
            " one of the training set, in index order."
        )
    of_label = torch.tensor([reason in ("label", "both") for reason in REASONS])[partition.reason.long()]
    score = partition.clean_probability.double()

    class Found(managers.IssueManager):  # type: ignore[misc, name-defined]
        """Holds what has been found already."""

        issue_name = "label"

        def find_issues(self, *args: Any, **kwargs: Any) -> None:
            """Find nothing: no issue is left to look for."""

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
    """Return a Hugging Face data set with what is known of each row in further columns; the one given stays as it is.

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
    datasets = package("datasets")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, the split that was trained on, but got a {type(dataset).__name__}."
        )
    check_length(partition, len(dataset), "a data set")
    columns = {f"{prefix}{name}": values for name, values in columns_by_title(partition, class_names).items()}
    if taken := [name for name in columns if name in dataset.column_names]:
        raise ValueError(f"Expected columns that are not there yet, but {taken[0]!r} is; give another prefix.")
    return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(columns)], axis=1)


def _new_lab(partition: Partition, class_names: Sequence[str] | None) -> Any:
    datalab, datasets = package("cleanlab", "cleanlab.datalab.datalab"), package("datasets")
    cells = columns_by_title(partition, class_names)["given_label" if class_names is None else "given_class"]
    if partition.is_multilabel:
        return datalab.Datalab({"label": cells}, label_name="label", task="multilabel", verbosity=0)
    classes = max(len(partition.noise_matrix), int(torch.cat([partition.label, partition.suggested_label]).max()) + 1)
    # Also those classes that no sample is given.
    names = [str(k) for k in range(classes)] if class_names is None else list(class_names)
    feature = datasets.Features({"label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"label": partition.label.tolist()}, features=feature)
    return datalab.Datalab(data, label_name="label", verbosity=0)


def _numbered(label: Tensor, lab: Any, class_names: Sequence[str] | None) -> list[Any]:
    """Return labels by the numbers that a Datalab has for its classes, which it knows by what they are called."""
    numbers = {name: number for number, name in enumerate(lab.class_names)}

    def number(one: int) -> int:
        called = [one, str(one)] if class_names is None else [class_names[one]]
        known = [numbers[name] for name in called if name in numbers]
        if not known:
            raise ValueError(
                f"Expected a Datalab with class {called[0]!r}, but it has {', '.join(map(str, numbers))}. Pass"
                " class_names as the Datalab has them, or build it from a dataset whose label is a"
                " datasets.ClassLabel."
            )
        return known[0]

    return [[number(k) for k in cell] if isinstance(cell, list) else number(cell) for cell in label_cells(label)]


def _plain(labels: Iterable[Any]) -> list[Any]:
    return [list(label) if isinstance(label, (list, tuple)) else int(label) for label in labels]
