"""A partition in other packages' forms, read back with those packages."""

import csv
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_unlearn.results.exports import to_dataframe, to_datalab, to_fiftyone, to_hugging_face, to_parquet
from lightning_unlearn.results.labels import DROP, KEEP, RELABEL
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review import validate_review
from lightning_unlearn.results.review_csv import read_review

NAMES = ["=cat", "dog", "emu", "fox", "gnu"]
COLUMNS = [
    "given_label",
    "suggested_label",
    "clean_probability",
    "suggested_probability",
    "label_evidence",
    "input_evidence",
    "reason",
    "is_clean",
    "rank",
    "list",
    "expected_precision",
    "proposed",
    "decision",
]


def make_partition(**changes):
    fields = {
        "clean_probability": torch.tensor([0.75, 0.25, 0.125, 0.875]),
        "is_clean": torch.tensor([True, False, False, True]),
        "suggested_label": torch.tensor([3, 1, 2, 0]),
        "suggested_probability": torch.tensor([0.75, 0.9375, 0.5, 0.875]),
        "noise_rate": 0.5,
        "label": torch.tensor([3, 2, 2, 0]),
        "label_evidence": torch.tensor([0.5, 0.25, 0.5, 0.5]),
        "input_evidence": torch.tensor([1.0, 1.0, 0.125, 1.0]),
        "reason": torch.tensor([0, 1, 2, 0], dtype=torch.uint8),
        "noise_matrix": torch.eye(5),
        "recipe": "label",
        "layer": "input of 'fc'",
        "epoch": 5,
    }
    return Partition(**(fields | changes))


def several():
    """Of a task with three labels."""
    label = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    suggested = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]])
    return make_partition(
        label=label,
        suggested_label=suggested,
        label_probability=torch.full((4, 3), 0.5),
        noise_matrix=torch.zeros(0, 0),
    )


def test_a_data_frame():
    frame = to_dataframe(make_partition(), class_names=NAMES)
    assert frame.index.tolist() == [0, 1, 2, 3]
    assert frame.index.name == "index"
    assert set(frame.columns) == {*COLUMNS, "given_class", "suggested_class"}
    assert frame["given_label"].tolist() == [3, 2, 2, 0]
    assert frame["given_class"].tolist() == ["fox", "emu", "emu", "=cat"]
    assert frame["clean_probability"].tolist() == [0.75, 0.25, 0.125, 0.875]
    assert frame["reason"].tolist() == ["none", "label", "input", "none"]
    assert frame["proposed"].tolist() == ["keep", "relabel", "drop", "keep"]
    assert frame["decision"].tolist() == [""] * 4
    assert frame["is_clean"].dtype == bool
    assert frame["rank"].tolist() == [3, 2, 1, 4]
    assert frame["list"].tolist() == ["clean", "suspect", "suspect", "clean"]
    assert frame["expected_precision"].isna().all()
    frame = to_dataframe(make_partition(noise_rate_interval=(0.2, 1.0)))
    assert frame["expected_precision"].tolist() == pytest.approx([1.875 / 3, 1.625 / 2, 0.875, 2 / 4])
    assert list(to_dataframe(make_partition()).columns) == COLUMNS
    with pytest.raises(ValueError, match="Expected class_names to name each of 5 classes, but got 4 names"):
        to_dataframe(make_partition(), class_names=NAMES[:4])


def test_the_page_describes_the_columns_of_every_table(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    section = page.partition("\n## Columns\n")[2].partition("\n## ")[0]
    described = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    everything = make_partition(
        keys=("a", "b", "c", "d"), files=tuple("abcd"), class_names=tuple("vwxyz"), fingerprint=f"4:{'00aaaaaa' * 4}"
    )
    everything.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8-sig", newline="") as file:
        written = next(csv.reader(file))
    frame = ["index", *to_dataframe(everything).columns]
    assert written == [name for name in described if name != "suggested_probability"]
    assert frame == [name for name in described if name != "dataset"]


def test_a_table_goes_through_pandas_and_back(tmp_path):
    pandas = importlib.import_module("pandas")
    make_partition(fingerprint="4:" + "ab" * 16).to_csv(tmp_path / "suspects.csv", class_names=NAMES)
    frame = pandas.read_csv(tmp_path / "suspects.csv", dtype={"decision": str})
    assert frame["proposed"].tolist() == ["drop", "relabel"]
    assert frame["decision"].isna().all()
    frame.loc[frame["index"] == 1, "decision"] = "relabel"
    frame.loc[frame["index"] == 2, "decision"] = "keep"
    frame.loc[2, ["index", "decision"]] = [3, "drop"]  # with empty cells beside, so that numbers become 3.0
    frame.sort_values("index", ascending=False).to_csv(tmp_path / "edited.csv", sep=";")
    review = validate_review(read_review(tmp_path / "edited.csv"), total=4, classes=5, fingerprint="4:" + "ab" * 16)
    found = review.apply_to(make_partition().label)
    assert found.decision.tolist() == [-1, RELABEL, KEEP, DROP]
    assert found.new_label.tolist() == [-1, 1, -1, -1]


def test_parquet(tmp_path):
    pandas = importlib.import_module("pandas")
    to_parquet(make_partition(), tmp_path / "deep" / "all.parquet", class_names=NAMES)
    frame = pandas.read_parquet(tmp_path / "deep" / "all.parquet")
    assert frame.columns[0] == "index"
    pandas.testing.assert_frame_equal(
        frame.set_index("index"), to_dataframe(make_partition(), class_names=NAMES).reset_index().set_index("index")
    )
    to_parquet(several(), tmp_path / "several.parquet")
    frame = pandas.read_parquet(tmp_path / "several.parquet")
    assert [list(cell) for cell in frame["suggested_label"]] == [[0, 2], [0, 1], [1], [0, 1, 2]]


def test_hugging_face_columns():
    datasets = importlib.import_module("datasets")
    data = datasets.Dataset.from_dict({"text": list("abcd"), "label": [3, 2, 2, 0]})
    found = to_hugging_face(make_partition(), data, class_names=NAMES)
    assert data.column_names == ["text", "label"]
    assert found.column_names[:3] == ["text", "label", "unlearn_given_label"]
    assert found["unlearn_clean_probability"][:] == [0.75, 0.25, 0.125, 0.875]
    assert found.filter(lambda row: row["unlearn_is_clean"])["text"][:] == ["a", "d"]
    # One that is a selection of rows already.
    shuffled = to_hugging_face(make_partition(), data.select([3, 2, 1, 0]))
    assert shuffled["text"][:] == list("dcba")
    assert shuffled["unlearn_given_label"][:] == [3, 2, 2, 0]
    assert to_hugging_face(several(), data)["unlearn_suggested_label"][1] == [0, 1]
    with pytest.raises(ValueError, match="Expected columns that are not there yet, but 'unlearn_given_label' is"):
        to_hugging_face(make_partition(), found)
    with pytest.raises(ValueError, match="Expected a data set with 4 rows, as in the partition, but got 2"):
        to_hugging_face(make_partition(), data.select([0, 1]))
    with pytest.raises(TypeError, match=r"Expected a datasets.Dataset, the split that was trained on, but got a Data"):
        to_hugging_face(make_partition(), datasets.DatasetDict({"train": data}))


def test_a_datalab():
    lab = to_datalab(make_partition(), class_names=NAMES)
    issues = lab.get_issues("label")
    # 2 is suspect for its input.
    assert issues["is_label_issue"].tolist() == [False, True, False, False]
    assert issues["label_score"].tolist() == [0.75, 0.25, 0.125, 0.875]
    assert issues["given_label"].tolist() == ["fox", "emu", "emu", "=cat"]
    assert issues["predicted_label"].tolist() == ["fox", "dog", "emu", "=cat"]
    summary = lab.get_issue_summary("label")
    assert summary["num_issues"].tolist() == [1]
    assert summary["score"].tolist() == [0.5]
    assert to_datalab(make_partition()).get_issues("label")["predicted_label"].tolist() == ["3", "1", "2", "0"]


def test_label_issues_of_ours_replace_those_of_a_datalab():
    numpy, datalab = importlib.import_module("numpy"), importlib.import_module("cleanlab").Datalab
    label = torch.arange(3).repeat(8)
    names = ["ant", "bee", "cow"]
    lab = datalab({"name": [names[k] for k in label]}, label_name="name", verbosity=0)
    wrong = numpy.full((24, 3), 0.05) + 0.85 * numpy.roll(numpy.eye(3)[label.numpy()], 1, axis=1)
    lab.find_issues(pred_probs=wrong, issue_types={"label": {}, "class_imbalance": {}})
    partition = make_partition(
        label=label,
        suggested_label=torch.where(torch.arange(24) == 5, 0, label),
        is_clean=torch.arange(24) != 5,
        clean_probability=torch.where(torch.arange(24) == 5, 0.0, 1.0),
        reason=(torch.arange(24) == 5).byte(),
        suggested_probability=torch.ones(24),
        label_evidence=torch.ones(24),
        input_evidence=torch.ones(24),
        noise_matrix=torch.eye(3),
    )
    assert to_datalab(partition, lab, class_names=names) is lab
    issues = lab.get_issues("label")
    assert issues["is_label_issue"].to_numpy().nonzero()[0].tolist() == [5]
    assert issues["predicted_label"].tolist()[4:7] == ["bee", "ant", "ant"]
    assert set(lab.get_issue_summary()["issue_type"]) == {"label", "class_imbalance"}
    with pytest.raises(ValueError, match="Expected a Datalab with class 0, but it has ant, bee, cow"):
        to_datalab(partition, lab)
    with pytest.raises(ValueError, match="labels of the partition, but 16 of 24 differ"):
        to_datalab(partition, lab, class_names=["bee", "ant", "cow"])
    with pytest.raises(ValueError, match="Expected a Datalab of the 4 samples of the partition, but it has 24"):
        to_datalab(make_partition(), lab)
    with pytest.raises(ValueError, match="Datalab needs a label for each sample, but some labels are ignored"):
        to_datalab(make_partition(label=torch.tensor([3, -1, 2, 0])))


def test_a_datalab_of_several_labels():
    issues = to_datalab(several()).get_issues("label")
    assert issues["is_label_issue"].tolist() == [False, True, False, False]
    assert issues["given_label"].tolist() == [[0, 2], [], [1], [0, 1, 2]]
    assert issues["predicted_label"].tolist() == [[0, 2], [0, 1], [1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("package", "export", "command"),
    [
        ("pandas", to_dataframe, "pip install pandas"),
        ("pyarrow", lambda partition: to_parquet(partition, "all.parquet"), "pip install pandas pyarrow"),
        ("cleanlab.datalab.internal.issue_manager", to_datalab, r"pip install 'cleanlab\[datalab\]'"),
        ("datasets", lambda partition: to_hugging_face(partition, None), "pip install datasets"),
        ("fiftyone", lambda partition: to_fiftyone(partition, [None] * 4), "pip install fiftyone"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch, package, export, command):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(ImportError, match=rf"Expected {name} to be installed .* run `{command}`"):
        export(make_partition())
