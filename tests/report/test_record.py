import json

import pytest
import torch

from lightning_unlearn.report import RunRecord
from tests.report.runs import hostile_record


def test_what_is_written_is_read(tmp_path):
    record = hostile_record()
    assert record.save(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    read = RunRecord.load(tmp_path / "new" / "run")
    assert read.partition.clean_probability.equal(record.partition.clean_probability)
    assert [mask.layer for mask in read.masks] == [mask.layer for mask in record.masks]
    assert read.masks[0].sensitivity.equal(record.masks[0].sensitivity)
    for name in vars(record).keys() - {"partition", "masks"}:
        assert getattr(read, name) == getattr(record, name), name


def test_an_earlier_runs_masks_are_not_taken_for_this_ones(tmp_path):
    hostile_record().save(tmp_path)
    hostile_record(masks=()).save(tmp_path)
    assert RunRecord.load(tmp_path).masks == ()


def test_a_partition_alone_will_do(tmp_path):
    record = hostile_record()
    record.partition.save(tmp_path / "partition.npz")
    read = RunRecord.load(tmp_path)
    assert (len(read.partition), read.masks, read.gallery, read.curves) == (100, (), {}, {})


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        hostile_record(seconds={"fit": float("nan")}).save(tmp_path)


def test_a_folder_without_a_run_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"but there is no partition\.npz in it; add UnlearnReport"):
        RunRecord.load(tmp_path)
    with pytest.raises(ValueError, match=r"but .*missing does not exist"):
        RunRecord.load(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"but .*file is a file"):
        RunRecord.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it cannot be read"),
        ("[]", "it has format version None where this version of lightning_unlearn has 2"),
        (json.dumps({"version": 9}), "it has format version 9"),
        (json.dumps({"version": 2, "curves": []}), "its curves is a list"),
        (json.dumps({"version": 2, "class_names": "ab"}), "its class_names is a str"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(content, message, tmp_path):
    hostile_record().save(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RunRecord.load(tmp_path)


def test_a_mask_is_only_read_from_the_folder_itself(tmp_path):
    hostile_record().save(tmp_path / "run")
    hostile_record().masks[0].save(tmp_path / "other.npz")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(about | {"masks": ["../other.npz"]}))
    with pytest.raises(ValueError, match=r"run.json .*there is no file of the mask .*other.npz"):
        RunRecord.load(tmp_path / "run")


def test_nothing_is_left_out_of_a_large_run(tmp_path):
    record = hostile_record(100_000)
    record.save(tmp_path)
    assert torch.equal(RunRecord.load(tmp_path).partition.label, record.partition.label)


BROKEN = [
    ("run.json", "[" * 100_000, "it cannot be read"),
    ("run.json", b"\xff\xfe\x00", "it cannot be read"),
    ("run.json", json.dumps({"version": 2, "precision": float("nan")}), "it holds NaN, which is no number"),
    ("run.json", json.dumps({"version": 2, "suspect_precision": "x"}), "its suspect_precision is a str"),
    ("run.json", json.dumps({"version": 2, "class_names": [1]}), "its class_names is a list or table of other values"),
    ("run.json", json.dumps({"version": 2, "rounds": [1]}), "its rounds is a list or table of other values"),
    ("run.json", json.dumps({"version": 2, "curves": {"a": [[0, "x"]]}}), "its curves is a list or table of other val"),
    ("run.json", json.dumps({"version": 2, "swaps": [0.5]}), "its swaps is a list or table of other values"),
    ("run.json", json.dumps({"version": 2, "masks": [3]}), "there is no file of the mask 3"),
    ("run.json", json.dumps({"version": 2, "masks": {}}), "its masks is a list or table of other values"),
    ("run.json", '{"version": ' + "9" * 4000 + "}", "it has format version 999"),
    ("gallery.json", json.dumps({"version": 2, "samples": []}), "its samples are not cards"),
    ("gallery.json", json.dumps({"version": 2, "samples": {"x": {}}}), "its samples are not cards"),
    ("gallery.json", json.dumps({"version": 2, "samples": {"1": 3}}), "its samples are not cards"),
    ("partition.npz", b"PK\x03\x04", "it cannot be read"),
    ("mask-0.npz", b"", "it cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_run_is_refused_with_the_name_of_its_file(name, content, message, tmp_path):
    hostile_record().save(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^Expected .*{name} to be a file that .*{message}") as error:
        RunRecord.load(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
