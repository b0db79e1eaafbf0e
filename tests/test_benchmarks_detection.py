import json

import pytest
import torch

from benchmarks import detection
from benchmarks.detection import Replay, judged, table
from benchmarks.detection_cases import GROUPS, DetectionCase, fit_of, load, noisy_labels

CASE = DetectionCase("wine", "symmetric", 0.2, "wide", 8, (4, 8), batch=32, outputs=9)


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    return Replay(CASE, fit_of(CASE, tmp_path_factory.mktemp("cache"), 0))


def test_a_fit_is_kept_and_read_again(tmp_path):
    first = fit_of(CASE, tmp_path, 0)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = fit_of(CASE, tmp_path, 0)
    assert file.stat().st_mtime_ns == written
    torch.testing.assert_close(again.training, first.training)
    assert again.last.keys() == {4, 8}


def test_noise_is_what_it_is_called(tmp_path):
    source = load("digits", tmp_path, 0)
    next_class = noisy_labels(source, DetectionCase("digits", "next", 0.3), 0)
    moved = next_class != source.truth
    assert moved.double().mean().item() == pytest.approx(0.3, abs=1e-3)
    assert next_class[moved].equal((source.truth[moved] + 1) % 10)
    confusable = noisy_labels(source, DetectionCase("digits", "confusable", 0.1), 0)
    assert (confusable != source.truth).double().mean().item() == pytest.approx(0.1, abs=1e-3)


def test_only_classes_that_occur_are_handed_over(replay):
    history = replay.history(8)
    assert history.last.shape == (178, 3)
    assert history.phases.shape == (178, 4, 3)
    assert replay.early(8).bias.shape == (3,)


def test_a_row_says_what_was_found(replay, tmp_path, monkeypatch, capsys):
    row = judged(replay, 8, 0)
    assert row["true_rate"] == pytest.approx(0.2, abs=0.01)
    assert row["auto"]["ours"][0] > 0.9
    assert set(row["auto"]) >= {"aum", "loss", "margin", "stated_at_depth", "interval"}
    monkeypatch.setitem(GROUPS, "small", lambda: [CASE])
    arguments = ["--groups", "small", "--cache", str(tmp_path)]
    detection.main([*arguments, "--rows", str(tmp_path / "rows.jsonl"), "--write", str(tmp_path / "table.md")])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["auto"]["epoch"] for line in lines] == [4, 8]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    text = table([json.loads(line) for line in lines])
    # Of both judgments, however the detector ranks these few samples.
    (line,) = (line for line in text.splitlines() if line.startswith("| ranking at most .005 AUROC"))
    assert " of 2 |" in line


def test_a_case_without_the_labels_it_needs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels of people"):
        noisy_labels(load("iris", tmp_path, 0), DetectionCase("iris", "human", 0.1), 0)
