"""Names of classes and files, of the data sets that people have."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_unlearn.data.naming import class_names_in, files_in


class Folder:
    """As torchvision's ImageFolder."""

    classes = ["cat", "dog"]  # noqa: RUF012
    samples = [("pets/cat/1.png", 0), ("pets/dog/2.png", 1), ("pets/dog/3.png", 1)]  # noqa: RUF012

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Listed(TensorDataset):
    """As users write them."""

    def __init__(self, **attributes):
        super().__init__(torch.zeros(2, 3), torch.tensor([0, 1]))
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("dataset", "names", "files"),
    [
        (Folder(), ["cat", "dog"], ["pets/cat/1.png", "pets/dog/2.png", "pets/dog/3.png"]),
        (Subset(Folder(), [2, 0]), ["cat", "dog"], ["pets/dog/3.png", "pets/cat/1.png"]),
        (Subset(Subset(Folder(), [2, 0]), torch.tensor([1])), ["cat", "dog"], ["pets/cat/1.png"]),
        (
            ConcatDataset([Subset(Folder(), [1]), Folder()]),
            ["cat", "dog"],
            [f"pets/{x}.png" for x in ("dog/2", "cat/1", "dog/2", "dog/3")],
        ),
        (Listed(files=[Path("a.wav"), Path("b.wav")], class_names=("yes", "no")), ["yes", "no"], ["a.wav", "b.wav"]),
        (Listed(files=["only one"]), [], []),
        (Listed(samples=torch.zeros(2, 3), classes=[0, 1]), [], []),
        (
            ConcatDataset([Folder(), Listed(classes=["x", "y"])]),
            [],
            ["pets/cat/1.png", "pets/dog/2.png", "pets/dog/3.png", "", ""],
        ),
        ([1, 2], [], []),
    ],
    ids=[
        "folder",
        "subset",
        "subset of a subset",
        "concat",
        "paths",
        "other number",
        "no names",
        "other parts",
        "list",
    ],
)
def test_names_are_those_of_the_data_set_or_of_what_it_is_a_part_of(dataset, names, files):
    assert class_names_in(dataset) == class_names_in(dataset, 2) == names
    assert class_names_in(dataset, 3) == []
    assert files_in(dataset) == files


def test_hugging_face_features_name_the_label_and_a_column_the_files():
    datasets = pytest.importorskip("datasets")
    columns = {"path": datasets.Value("string"), "topic": datasets.ClassLabel(names=["x", "y"])}
    features = datasets.Features({**columns, "label": datasets.ClassLabel(names=["ham", "spam"])})
    rows = datasets.Dataset.from_dict({"path": ["1.txt", "2.txt"], "topic": [0, 0], "label": [1, 0]}, features=features)
    rows = rows.select([1, 0]).with_format("torch", columns=["label"])
    assert class_names_in(rows, 2) == ["ham", "spam"]
    assert files_in(rows) == ["2.txt", "1.txt"]
    assert files_in(Subset(rows, [1])) == ["1.txt"]
    # One label column, whatever it is called; of two that are called otherwise it is not known which is meant.
    assert class_names_in(rows.remove_columns("label")) == ["x", "y"]
    assert class_names_in(rows.rename_column("label", "kind")) == []
    several = datasets.Features({"tags": datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))})
    assert class_names_in(datasets.Dataset.from_dict({"tags": [[0, 2]]}, features=several), 3) == ["a", "b", "c"]


class Broken:
    def __len__(self):
        raise RuntimeError("closed")


def test_a_data_set_that_fails_has_no_names():
    assert files_in(Broken()) == class_names_in(Broken()) == []
