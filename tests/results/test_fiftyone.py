"""Fields and tags of FiftyOne samples, with the package itself, which is installed in a job of its own."""

import pytest
import torch

from lightning_unlearn.results.exports import review_from_fiftyone, to_fiftyone
from lightning_unlearn.results.labels import DROP, KEEP, RELABEL
from lightning_unlearn.results.review import validate_review
from lightning_unlearn.results.review_csv import read_review
from tests.results.test_exports import NAMES, make_partition, several

fiftyone = pytest.importorskip("fiftyone")
FINGERPRINT = "4:" + "ab" * 16


@pytest.fixture
def samples():
    dataset = fiftyone.Dataset()
    dataset.add_samples([fiftyone.Sample(filepath=f"{index}.png") for index in range(4)], progress=False)
    yield dataset
    dataset.delete()


def tag(samples, tags):
    samples.set_values("tags", [tags.get(index, ["seen"]) for index in range(4)])


def decisions(path, classes=5, labels=None):
    review = validate_review(read_review(path), total=4, classes=classes, labels=labels, fingerprint=FINGERPRINT)
    columns = review.index.tolist(), review.decision.tolist(), review.new_label.tolist()
    return {index: (decision, new) for index, decision, new in zip(*columns, strict=True)}


def test_fields_of_samples(samples):
    partition = make_partition(label=torch.tensor([3, 2, -1, 0]))
    to_fiftyone(partition, samples, class_names=NAMES, prefix="lu_")
    suggested = samples.values("lu_suggested_label")
    assert [(one.label, one.confidence) for one in suggested] == [
        ("fox", 0.75),
        ("dog", 0.9375),
        ("emu", 0.5),
        ("=cat", 0.875),
    ]
    assert [one and one.label for one in samples.values("lu_given_label")] == ["fox", "emu", None, "=cat"]
    assert samples.values("lu_clean_probability") == [0.75, 0.25, 0.125, 0.875]
    assert samples.values("lu_is_clean") == [True, False, False, True]
    assert not samples.has_field("lu_decision")
    # As the App sorts and filters.
    view = samples.match(fiftyone.ViewField("lu_list") == "suspect").sort_by("lu_rank")
    assert [path.rpartition("/")[2] for path in view.values("filepath")] == ["2.png", "1.png"]
    # Once more, over the same fields.
    to_fiftyone(partition, samples, class_names=NAMES, prefix="lu_")
    with pytest.raises(ValueError, match="Expected samples with 4 rows, as in the partition, but got 2"):
        to_fiftyone(partition, view)


def test_fields_of_several_labels(samples):
    to_fiftyone(several(), samples)
    found = samples.values("unlearn_suggested_label")[1].classifications
    assert [(one.label, one.confidence) for one in found] == [("0", 0.9375), ("1", 0.9375)]
    assert samples.values("unlearn_given_label")[1].classifications == []


@pytest.mark.parametrize("names", [NAMES, None])
def test_tags_are_read_back_as_review_reads_them(samples, tmp_path, names):
    partition = make_partition(fingerprint=FINGERPRINT)
    to_fiftyone(partition, samples, class_names=names)
    tag(samples, {0: ["keep", "seen"], 1: ["relabel"], 2: ["drop"]})
    path = tmp_path / "reviewed.csv"
    review_from_fiftyone(partition, samples, path, class_names=names)
    assert decisions(path) == {0: (KEEP, -1), 1: (RELABEL, 1), 2: (DROP, -1)}
    # Another label, edited by a person.
    labels = samples.values("unlearn_suggested_label")
    labels[1].label = "gnu" if names else "4"
    samples.set_values("unlearn_suggested_label", labels)
    with pytest.raises(ValueError, match="contains 3 decisions, which would be lost; give another path"):
        review_from_fiftyone(partition, samples, path, class_names=names)
    review_from_fiftyone(partition, samples, path, class_names=names, overwrite=True)
    assert decisions(path)[1] == (RELABEL, 4)


def test_several_labels_are_read_back(samples, tmp_path):
    partition = several()
    to_fiftyone(partition, samples, class_names=["a", "b", "c"])
    tag(samples, {1: ["relabel"]})
    review_from_fiftyone(partition, samples, tmp_path / "reviewed.csv", class_names=["a", "b", "c"])
    assert decisions(tmp_path / "reviewed.csv", classes=3, labels=3) == {1: (RELABEL, [1, 1, 0])}


@pytest.mark.parametrize(
    ("tags", "names", "words"),
    [
        (
            {2: ["keep", "drop"]},
            NAMES,
            "sample 2 to have one of the tags .* but it has keep and drop",
        ),
        ({1: ["relabel"]}, ["a", "b", "c", "d", "e"], "'dog' names none"),
        ({1: ["relabel"]}, ["=cat", "dog", "dog", "fox", "gnu"], "'dog' names 2"),
        ({0: ["relabel"]}, NAMES, "Expected a label other than the given one for sample 0"),
    ],
)
def test_what_does_not_fit_is_refused(samples, tmp_path, tags, names, words):
    partition = make_partition()
    to_fiftyone(partition, samples, class_names=NAMES)
    tag(samples, tags)
    with pytest.raises(ValueError, match=words):
        review_from_fiftyone(partition, samples, tmp_path / "reviewed.csv", class_names=names)
    assert not (tmp_path / "reviewed.csv").exists()
