"""Tasks for Label Studio, and what people have decided there, read back as review= reads it."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from lightning_unlearn.results.exports import to_label_studio
from lightning_unlearn.results.labels import DROP, KEEP, RELABEL
from lightning_unlearn.results.review import validate_review
from lightning_unlearn.results.review_csv import read_review
from tests.results.test_exports import NAMES, make_partition, several

FINGERPRINT = "4:" + "ab" * 16
URLS = [f"https://example.org/{index}.png" for index in range(4)]


def written(folder, partition=None, **options):
    partition = make_partition(fingerprint=FINGERPRINT) if partition is None else partition
    options = {"class_names": NAMES, "suspects_only": False, **options}
    tasks = to_label_studio(partition, folder, URLS, **options)
    return json.loads(tasks.read_text()), (folder / "labeling.xml").read_text()


def annotated(tasks, chosen, **annotation):
    """As a project exports its tasks: of some samples the choices, by name."""
    for task in tasks:
        choices = chosen.get(task["data"]["index"])
        result = [
            {"from_name": name, "to_name": "sample", "type": "choices", "value": {"choices": values}}
            for name, values in (choices or {}).items()
        ]
        task["annotations"] = [] if choices is None else [{"result": result, "was_cancelled": False, **annotation}]
    return tasks


def minimal(tasks):
    """The same as JSON-MIN: what was chosen beside the data, a text where it is one choice."""
    flat = []
    for task in tasks:
        chosen = {}
        for part in task["annotations"][0]["result"] if task["annotations"] else ():
            values = part["value"]["choices"]
            chosen[part["from_name"]] = values[0] if len(values) == 1 else {"choices": values}
        flat.append({**task["data"], **chosen, "annotator": 1})
    return flat


def decisions(folder, export, total=4, classes=5, labels=None):
    path = folder / "export.json"
    path.write_text(json.dumps(export), encoding="utf-8")
    review = validate_review(read_review(path), total=total, classes=classes, labels=labels, fingerprint=FINGERPRINT)
    return {
        index: (decision, new)
        for index, decision, new in zip(
            review.index.tolist(), review.decision.tolist(), review.new_label.tolist(), strict=True
        )
    }


def test_tasks_come_most_suspect_first_with_the_suggestion_as_prediction(tmp_path):
    tasks, interface = written(tmp_path)
    assert [task["data"]["index"] for task in tasks] == [2, 1, 0, 3]
    assert tasks[1]["data"] == {
        "sample": "https://example.org/1.png",
        "said": "given 2: emu; probability of being right 0.250; wrong for its label",
        "index": 1,
        "given_label": "2",
        "given_class": "2: emu",
        "p_clean": 0.25,
        "reason": "label",
        "rank": 2,
        "list": "suspect",
        "dataset": "n4-" + "ab" * 4,
    }
    (prediction,) = tasks[1]["predictions"]
    assert prediction["model_version"] == "lightning-unlearn n4-" + "ab" * 4
    assert prediction["score"] == 0.9375
    assert prediction["result"][0]["value"] == {"choices": ["1: dog"]}
    root = ElementTree.fromstring(interface)
    assert root.find("Image").attrib == {"name": "sample", "value": "$sample"}
    label, decision = root.findall("Choices")
    assert [choice.get("value") for choice in label] == ["0: =cat", "1: dog", "2: emu", "3: fox", "4: gnu"]
    assert (label.get("choice"), [choice.get("value") for choice in decision]) == ("single", ["drop"])


def test_suspects_alone_or_with_some_more(tmp_path):
    assert len(written(tmp_path, suspects_only=True)[0]) == 2
    assert len(written(tmp_path, suspects_only=True, review=1)[0]) == 3


@pytest.mark.parametrize("form", [lambda tasks: tasks, minimal], ids=["JSON", "JSON-MIN"])
def test_what_is_chosen_is_read_back(tmp_path, form):
    tasks, _ = written(tmp_path)
    chosen = {0: {"label": ["3: fox"]}, 1: {"label": ["4: gnu"]}, 2: {"label": ["1: dog"], "decision": ["drop"]}}
    found = decisions(tmp_path, form(annotated(tasks, chosen)))
    # Of 3 nothing is decided.
    assert found == {0: (KEEP, -1), 1: (RELABEL, 4), 2: (DROP, -1)}


@pytest.mark.parametrize("form", [lambda tasks: tasks, minimal], ids=["JSON", "JSON-MIN"])
def test_several_labels_are_read_back(tmp_path, form):
    tasks, interface = written(tmp_path, several(), class_names=["a", "b", "c"])
    assert [
        task["predictions"][0]["result"][0]["value"]["choices"] for task in tasks if task["data"]["index"] == 1
    ] == [["0: a", "1: b"]]
    assert 'choice="multiple"' in interface
    chosen = {0: {"label": ["2: c", "0: a"]}, 1: {"label": ["1: b"]}, 2: {"label": ["none of them"]}, 3: {}}
    found = decisions(tmp_path, form(annotated(tasks, chosen)), classes=3, labels=3)
    assert found == {0: (KEEP, [-1] * 3), 1: (RELABEL, [0, 1, 0]), 2: (RELABEL, [0, 0, 0])}


def test_without_names_and_rates(tmp_path):
    partition = make_partition(noise_rate=None, noise_rate_interval=None)
    tasks, interface = written(tmp_path, partition, class_names=None, kind="text")
    assert [task["data"]["p_clean"] for task in tasks] == [None] * 4
    assert tasks[0]["data"]["said"] == "given 2; wrong for its input"
    assert '<Text name="sample" value="$sample"/>' in interface
    assert decisions(tmp_path, annotated(tasks, {1: {"label": ["0"]}})) == {1: (RELABEL, 0)}


def test_what_was_skipped_decides_nothing(tmp_path):
    tasks = annotated(written(tmp_path)[0], {1: {"label": ["4: gnu"]}}, was_cancelled=True)
    assert decisions(tmp_path, tasks) == {}


def test_people_who_differ_are_named_unless_one_is_the_ground_truth(tmp_path):
    tasks = annotated(written(tmp_path)[0], {1: {"label": ["4: gnu"]}})
    (first,) = tasks[1]["annotations"]
    other = json.loads(json.dumps(first).replace("4: gnu", "0: =cat"))
    tasks[1]["annotations"] = [first, first]
    assert decisions(tmp_path, tasks) == {1: (RELABEL, 4)}
    tasks[1]["annotations"] = [first, other]
    with pytest.raises(
        ValueError, match=r"task 2: expected one decision, but annotators disagree \(2 different ones\); agree"
    ):
        decisions(tmp_path, tasks)
    tasks[1]["annotations"] = [first, {**other, "ground_truth": True}]
    assert decisions(tmp_path, tasks) == {1: (RELABEL, 0)}
    flat = minimal(annotated(tasks, {1: {"label": ["4: gnu"]}}))
    flat.append({**flat[1], "label": "0: =cat"})
    with pytest.raises(ValueError, match="task 5: expected one decision about sample 1, but task 2 has another"):
        decisions(tmp_path, flat)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tasks: {"tasks": tasks}, "to be a list of tasks"),
        (lambda tasks: [{"data": {"image": "a.png"}}], "task 1: expected a task that to_label_studio has written"),
        (
            lambda tasks: annotated(tasks, {2: {"label": ["dog"]}}),
            "task 1: expected label to be a choice of labeli",
        ),
        (
            lambda tasks: annotated(tasks, {1: {"label": ["9: yak"]}}),
            r"task 2: expected suggested_label to be in",
        ),
        (
            lambda tasks: annotated(json.loads(json.dumps(tasks).replace("n4-", "n9-")), {1: {"label": ["0"]}}),
            r"to belong to this training set of 4 samples, but it belongs to another \(9 samples",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        decisions(tmp_path, change(written(tmp_path)[0]))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match="to be an export of Label Studio as JSON, but it cannot be read"):
        read_review(tmp_path / "broken.json")


def test_without_files_data_are_needed(tmp_path):
    with pytest.raises(ValueError, match="Expected data, an address or a text for each of 4 samples"):
        to_label_studio(make_partition(), tmp_path)
    with pytest.raises(ValueError, match="'sample' to have a value for each of 4 samples, but got 3"):
        to_label_studio(make_partition(), tmp_path, URLS[:3])
    partition = make_partition()
    partition.remember_files(["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    tasks = json.loads(to_label_studio(partition, tmp_path).read_text())
    assert [task["data"]["sample"] for task in tasks] == ["b/2.png", "a/1.png"]


@pytest.mark.parametrize("kind", ["image", "audio", "text", "video"])
@pytest.mark.parametrize("make", [lambda: make_partition(fingerprint=FINGERPRINT), several])
def test_label_studios_own_checks_accept_it(tmp_path, make, kind):
    interface_of = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    partition = make()
    names = ["a <b>", '"b" & c', "c"] if partition.is_multilabel else NAMES
    tasks, text = written(tmp_path, partition, class_names=names, kind=kind)
    interface = interface_of(text)
    interface.validate()
    for task in tasks:
        assert interface.validate_task({"data": task["data"]})
        assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
        (found,) = task["predictions"][0]["result"]
        assert set(found["value"]["choices"]) <= set(interface.get_control("label").labels)


def test_what_label_studio_makes_of_annotations_is_read_back(tmp_path):
    converter = pytest.importorskip("label_studio_sdk.converter").Converter
    tasks, text = written(tmp_path)
    chosen = {0: {"label": ["3: fox"]}, 1: {"label": ["4: gnu"]}, 2: {"label": ["1: dog"], "decision": ["drop"]}}
    exported = [
        {**task, "id": 100 + at, "annotations": [{"id": at, "created_at": "", "updated_at": "", **one}]}
        for at, task in enumerate(annotated(tasks, chosen))
        for one in task["annotations"]
    ]
    (tmp_path / "raw.json").write_text(json.dumps(exported))
    converter(text, str(tmp_path)).convert(str(tmp_path / "raw.json"), str(tmp_path / "min"), "JSON_MIN", is_dir=False)
    wanted = {0: (KEEP, -1), 1: (RELABEL, 4), 2: (DROP, -1)}
    assert decisions(tmp_path, json.loads((tmp_path / "min" / "result.json").read_text())) == wanted
    assert decisions(tmp_path, exported) == wanted


def test_the_labels_of_a_partition_stay_as_they_are(tmp_path):
    partition = make_partition(fingerprint=FINGERPRINT)
    tasks = annotated(written(tmp_path, partition)[0], {1: {"label": ["4: gnu"]}, 2: {"decision": ["drop"]}})
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    review = validate_review(read_review(tmp_path / "export.json"), total=4, classes=5, fingerprint=FINGERPRINT)
    assert review.apply_to(partition.label).new_label.tolist() == [-1, 4, -1, -1]
    # One whose label was mended meanwhile.
    assert review.apply_to(torch.tensor([3, 4, 2, 0])).stale == 1
