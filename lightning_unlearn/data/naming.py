"""Class names and file paths of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from lightning_unlearn.data.batch import LABEL_NAMES

# Where data sets list their files: torchvision's as pairs with the label, users' as paths.
_FILES = ("samples", "files", "paths", "image_paths", "filenames", "filepaths")
_FILE_COLUMNS = ("file", "path", "file_name", "filename", "file_path", "filepath", "image_path", "audio_path")


def class_names_in(dataset: Any, classes: int | None = None) -> list[str]:
    """Return the class names by label; empty if the dataset does not have a name for each class.

    Names are read from ``classes`` or ``class_names`` (torchvision's datasets), or from the features of the label
    column (Hugging Face), also of datasets within Subset and ConcatDataset.

    Args:
        dataset: the dataset of a loader.
        classes: number of classes, if known.

    Example:
        >>> from types import SimpleNamespace as Folder
        >>> class_names_in(Folder(dataset=Folder(classes=["cat", "dog"]), indices=[3, 1]), 2)
        ['cat', 'dog']
    """
    for one in _inner(dataset):
        for names in (getattr(one, "classes", None), getattr(one, "class_names", None), _feature_names(one)):
            if not isinstance(names, (list, tuple)) or classes not in (None, len(names)):
                continue
            if names and all(isinstance(name, str) for name in names):
                return list(names)
    return []


def _inner(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and the datasets that it wraps."""
    while dataset is not None:
        yield dataset
        parts = getattr(dataset, "datasets", None)
        # If parts have different classes, their labels differ in meaning too.
        if isinstance(parts, (list, tuple)) and len({tuple(class_names_in(part)) for part in parts}) == 1:
            dataset = parts[0]
        else:
            dataset = getattr(dataset, "dataset", None)


def _feature_names(dataset: Any) -> Any:
    """Return the names of a Hugging Face ``ClassLabel``, or of a list of them for several labels per sample."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    labels = {
        name: getattr(one, "names", getattr(getattr(one, "feature", None), "names", None))
        for name, one in features.items()
    }
    named = {name: names for name, names in labels.items() if names}
    known = [named[name] for name in LABEL_NAMES if name in named]
    return known[0] if known else next(iter(named.values())) if len(named) == 1 else None


def files_in(dataset: Any) -> list[str]:
    """Return the file path of each sample, by index; empty if the dataset does not list them.

    Paths are read from ``samples`` (ImageFolder), ``files`` or ``paths``, or from a column of paths (Hugging Face),
    also of datasets within Subset and ConcatDataset.

    Example:
        >>> from types import SimpleNamespace as Folder
        >>> folder = Folder(samples=[("cat/1.png", 0), ("cat/2.png", 0), ("dog/1.png", 1)])
        >>> files_in(Folder(dataset=folder, indices=[2, 0]))
        ['dog/1.png', 'cat/1.png']
    """
    try:
        return _files(dataset, len(dataset) if hasattr(dataset, "__len__") else None)
    except Exception:  # raised by a user's class; names are optional
        return []


def _files(dataset: Any, length: int | None) -> list[str]:
    for name in _FILES:
        listed = getattr(dataset, name, None)
        if isinstance(listed, Sequence) and not isinstance(listed, str) and length in (None, len(listed)):
            paths = [_path(one[0] if isinstance(one, tuple) and one else one) for one in listed]
            if paths and all(paths):
                return paths
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, (list, tuple)):
        found = [files_in(part) or [""] * len(part) for part in parts]
        return [path for part in found for path in part] if any(map(any, found)) else []
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = files_in(dataset.dataset)
        return [inner[index] for index in dataset.indices] if inner else []
    return _column(dataset)


def _path(one: Any) -> str:
    return fspath(one) if isinstance(one, (str, PathLike)) else ""


def _column(dataset: Any) -> list[str]:
    """Return a Hugging Face column of paths, without decoding files."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return []
    name = next((one for one in _FILE_COLUMNS if getattr(features.get(one), "dtype", None) == "string"), None)
    return [] if name is None else list(dataset.with_format(None).select_columns([name])[:][name])
