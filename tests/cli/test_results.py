"""Commands that look at what was found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_unlearn import Partition
from lightning_unlearn.cli import main
from lightning_unlearn.cli._results import summary_of
from lightning_unlearn.report import RunRecord
from tests.callbacks.published import make_partition


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "Expected a folder that UnlearnReport has written, but missing does not exist"),
        (["folder"], "but there is no partition.npz in it; add UnlearnReport"),
        (["run", "--control", "folder"], "but there is no partition.npz in it"),
        (["run", "--out", "folder"], "Expected a file to write, but folder is a folder"),
    ],
)
def test_a_folder_without_a_run_is_no_report(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    make_partition(torch.rand(20), torch.arange(20) % 4).save("run/partition.npz")
    with pytest.raises(SystemExit, match=f"lightning-unlearn report: error: .*{message}"):
        main(["report", *arguments])


def test_a_report_may_be_shown_at_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    make_partition(torch.rand(20), torch.arange(20) % 4).save(tmp_path / "unlearn" / "partition.npz")
    # The logger's folder will do.
    for given in (tmp_path, tmp_path / "unlearn"):
        main(["report", str(given), "--open"])
    assert shown == [(tmp_path / "unlearn" / "report.html").as_uri()] * 2


@pytest.fixture
def partition():
    return make_partition(torch.tensor([0.9, 0.2, 0.8, 0.05, 0.95]), torch.arange(5) % 4)


def test_a_saved_partition_is_shown_and_written_as_a_table(partition, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    partition.save("run/unlearn/partition.npz")
    for given in ("run/unlearn/partition.npz", "run/unlearn", "run"):
        main(["show", given, "--csv", "suspects.csv"])
        assert capsys.readouterr().out.splitlines() == [
            "2 of 5 samples are suspect (2 for label).",
            "Estimated noise rate 42.0%; recipe 'label', nowhere, after 1 epoch.",
            "",
            "The 2 most suspect of 2:",
            "index  given  suggested  p(clean)  reason",
            "    3      3          0    0.0500   label",
            "    1      1          2    0.2000   label",
            "",
            "The 3 that come next:",
            "    2      2          2    0.8000    none",
            "    0      0          0    0.9000    none",
            "    4      0          0    0.9500    none",
            "",
            "Table: suspects.csv",
        ]
    assert Path("suspects.csv").read_text(encoding="utf-8-sig").count("\n") == 3


RATE = "About 42.0% of the labels (30.0% to 50.0%) look wrong"


@pytest.fixture
def estimated(tmp_path, monkeypatch):
    """A run directory with two suspects, two samples that are worth a look, and names of the classes."""
    monkeypatch.chdir(tmp_path)
    found = make_partition(torch.tensor([0.9, 0.21, 0.52, 0.05, 0.45]), torch.arange(5) % 4)
    parts = {"is_clean": torch.tensor([True, False, True, False, True]), "noise_rate_interval": (0.3, 0.5)}
    parts |= {"reason": torch.tensor([0, 1, 0, 1, 0], dtype=torch.uint8), "noise_rate": 0.42}
    found = replace(found, **parts, often_called=((3, 0, 0.5),))
    RunRecord(found, class_names=["ant", "bee", "cat", "dog"]).save("run")
    return found


def test_both_lists_are_shown_with_what_to_expect(estimated, capsys):
    main(["show", "run"])
    assert capsys.readouterr().out.splitlines() == [
        f"{RATE}; 2 suspects, about 9 in 10 expected to be wrong; the next 2 are worth a look; 'dog' is often labeled"
        " 'ant' (50%).",
        "2 of 5 samples are suspect (2 for label); recipe 'label', nowhere, after 1 epoch.",
        "",
        "The 2 most suspect of 2:",
        "index  given  suggested  p(clean)  reason  rank  precision@rank",
        "    3    dog        ant    0.0500   label     1             95%",
        "    1    bee        cat    0.2100   label     2             87%",
        "",
        "The 3 that come next (2 worth a look):",
        "    4    ant        bee    0.4500    none     3             76%",
        "    2    cat        cat    0.5200    none     4             69%",
        "    0    ant        ant    0.9000    none     5             57%",
    ]


@pytest.mark.parametrize(
    ("options", "shown", "written"),
    [
        ([], 3, 2),
        (["--review"], 2, 4),
        (["--review", "1"], 1, 3),
        (["--review", "0"], 0, 2),
        (["--review", "99"], 3, 5),
        (["--top", "1"], 1, 2),
    ],
)
def test_so_many_of_the_review_list(estimated, capsys, options, shown, written):
    main(["show", "run/partition.npz", "--csv", "lists.csv", *options])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(("76%", "69%", "57%")) for line in lines) == shown
    assert len(Path("lists.csv").read_text(encoding="utf-8-sig").splitlines()) == 1 + written


def test_decisions_of_a_person_are_not_written_over(estimated):
    main(["show", "run", "--csv", "lists.csv"])
    table = Path("lists.csv").read_text(encoding="utf-8-sig")
    assert ",relabel,," in table
    Path("lists.csv").write_text(decided := table.replace(",relabel,,", ",relabel,keep,", 1))
    with pytest.raises(SystemExit, match=r"lists\.csv contains 1 decision, which would be lost"):
        main(["show", "run", "--csv", "lists.csv"])
    assert Path("lists.csv").read_text(encoding="utf-8-sig") == decided


def test_the_validation_set_has_the_names_of_classes_too(estimated, capsys):
    estimated.save("run/validation_partition.npz")
    main(["show", "run/validation_partition.npz"])
    out = capsys.readouterr().out
    assert "'dog' is often labeled 'ant'" in out
    assert "2 of 5 samples are suspect" in out


def test_names_that_do_not_fit_are_left_out(estimated, capsys):
    for content in ("{", "[]", '{"class_names": ["ant"]}', '{"class_names": 3}', '{"version": 1}'):
        Path("run/run.json").write_text(content)
        main(["show", "run"])
        assert "class 3 is often labeled 0 (50%)" in capsys.readouterr().out


def test_where_nothing_is_suspect_the_least_sure_are_shown():
    clean = make_partition(torch.tensor([0.9, 0.8, 0.95]), torch.arange(3))
    assert repr(clean).startswith("Partition(3 samples, 0 suspect, noise_rate=0.117, status='ok', recipe='label'")
    said = summary_of(clean, top=1).splitlines()
    assert said[0] == "0 of 3 samples are suspect."
    assert said[-3] == "The 1 least certain:"
    assert said[-1].split()[0] == "1"


def test_names_and_a_warning_are_shown_too(partition):
    said = summary_of(make_partition(partition.clean_probability, partition.label, warning="it is a toy"), 1, "abcd")
    assert "Not to be acted upon: it is a toy." in said
    assert said.splitlines()[6].split() == ["3", "d", "a", "0.0500", "label"]


def test_several_labels_are_shown_as_such(partition):
    several = Partition(
        **{
            **vars(partition),
            "label": torch.tensor([[1, 1, 0]] * 5),
            "suggested_label": torch.tensor([[0, 0, 0]] * 5),
            "label_probability": torch.full((5, 3), 0.2),
        }
    )
    assert summary_of(several, 1, review=0).splitlines()[-1].split() == ["3", "0", "1", "none", "0.0500", "label"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npz", "Expected a partition to show, but missing.npz does not exist"),
        ("text.npz", "to be a file that Partition.save wrote, but it cannot be read"),
        (
            "text.ckpt",
            "Expected a Lightning checkpoint of tensors and plain values, but text.ckpt cannot be read as one",
        ),
        ("other.ckpt", "Expected a Lightning checkpoint, but other.ckpt has no state_dict"),
        ("plain.ckpt", "plain.ckpt has none. To score its model: lightning-unlearn partition --config"),
    ],
)
def test_what_holds_no_partition_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.npz").write_text("no")
    Path("text.ckpt").write_text("no")
    torch.save({"weights": {}}, "other.ckpt")
    torch.save({"state_dict": {}, "callbacks": {}}, "plain.ckpt")
    with pytest.raises(SystemExit, match=message):
        main(["show", name])


STATE = {"partition": None, "rounds": [], "provenance": None}
CHECKPOINTS = {
    "no checkpoint": ([1], "has no state_dict"),
    "no weights": ({"state_dict": 3}, "has no state_dict"),
    "callbacks that are none": ({"callbacks": [1]}, "but it holds a list in its place"),
    "a state that is none": ({"callbacks": {"AttributionPartitionCallback": 3}}, "but it holds a int in its place"),
    "a state without a partition": ({"callbacks": {"AttributionPartitionCallback": {}}}, "holds a dict in its place"),
    "no partition yet": ({"callbacks": {"AttributionPartitionCallback": STATE}}, "has none. To score its model"),
    "a partition of text": (
        {"callbacks": {"AttributionPartitionCallback": STATE | {"partition": "x"}}},
        "the state of a partition, a dict, but got a str",
    ),
    "another version": (
        {"callbacks": {"AttributionPartitionCallback": STATE | {"partition": {"version": 3}}}},
        "of format version 7, but got version 3",
    ),
    "fields missing": (
        {"callbacks": {"AttributionPartitionCallback": STATE | {"partition": {"version": 7, "x": 1}}}},
        "it has a field 'x' too many; its clean_probability is missing",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_another_shape_is_refused_with_its_name(name, tmp_path):
    content, message = CHECKPOINTS[name]
    if isinstance(content, dict):
        content = {"state_dict": {}} | content
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=rf"^lightning-unlearn show: error: Expected .*last.ckpt.*{message}") as error:
        main(["show", str(tmp_path / "last.ckpt")])
    assert "\n" not in str(error.value)


def test_a_terminal_is_not_told_what_a_file_says(partition, tmp_path, capsys):
    hostile = replace(partition, recipe="\x1b[2J", layer="\u202egnp.exe", warning="a\rb\x9bc\ud800")
    hostile.save(tmp_path / "partition.npz")
    main(["show", str(tmp_path / "partition.npz")])
    shown = capsys.readouterr().out
    assert all(part in shown for part in (r"\x1b[2J", r"\u202egnp.exe", r"a\rb\x9bc\ud800"))
    assert not set("\x1b\u202e\r\x9b\ud800") & set(shown)
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match=r"\\x1b\[2J"):
        main(["show", str(tmp_path / "\x1b[2J")])


def test_a_run_of_which_no_report_can_be_made_is_refused_with_its_name(partition, tmp_path):
    RunRecord(partition, provenance={"fits": 3}).save(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"report: error: Expected .*run to hold a run .* no report can be made of it"):
        main(["report", str(tmp_path / "run")])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    make_partition(torch.rand(200), torch.arange(200) % 4).save(tmp_path / "partition.npz")
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "lightning_unlearn.cli", "show", str(tmp_path / "partition.npz")]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
