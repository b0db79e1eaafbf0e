import doctest
import json
import time
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
pytest.importorskip("cleanlab")
from benchmarks import measures, partition, partition_tables, peers, problems
from benchmarks.detection_cases import DetectionCase, load, noisy_validation
from benchmarks.partition_tables import flags_well, summary

CASES = [
    DetectionCase("wine", "symmetric", 0.2, "wide", 8, batch=32),
    DetectionCase("iris", network="wide", epochs=8, loss="sampler", batch=32),
    DetectionCase("iris", "symmetric", 0.3, "wide", 4, batch=32),
]


def made(case, *rest):
    return replace(problems._quick(case, *rest), is_slow=case is CASES[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command on two small cases, run twice; the rows, the text and how many fits there were each time."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--seeds", "1", "--out", str(folder), "--cache", str(folder / "peers"), "--write", str(folder / "t.md")]
    fits = []
    fit = problems.Problem.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "problems", lambda: {case.name: partial(made, case) for case in CASES})
        patch.setattr(problems.Problem, "fit", lambda self, *rest: [fits.append(self.name), fit(self, *rest)][1])
        patch.setattr(torch, "set_num_threads", lambda number: None)
        partition.main([*options, "--only", "wine", "--moments", "second", "end"])
        first = len(fits)
        partition.main([*options, "--moments"])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return rows, (folder / "t.md").read_text(), first, len(fits) - first


@pytest.mark.parametrize("module", [measures, partition_tables])
def test_the_examples_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_a_run_goes_on_where_it_was_stopped(run):
    rows, _, first, then = run
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    # Of the scores, of five folds, and at three moments; then of another case, at one moment, and of a slow one.
    assert (first, then) == (1 + 5 + 3, 1 + 5 + 1 + 1)


def test_a_row_holds_the_partition_against_its_peers(run):
    row = run[0][0]
    assert row["true_rate"] == pytest.approx(0.2, abs=0.01)
    assert set(row["peers"]) == {"plain", "folds", "logistic"}
    assert (row["second"]["epoch"], row["end"]["epoch"]) == (2, 8)
    assert "middle" not in row
    for moment in ("auto", "second", "end"):
        assert all(len(row[moment][name]) == 3 for name in ("ours", "aum", "loss", "margin"))
    assert row["end"]["ours"][0] > 0.9
    assert row["cost"]["added"] > 0


def test_the_scores_are_those_of_the_same_fit(run):
    assert all(row["cost"]["is_same_fit"] for row in run[0])


def test_a_slow_case_is_fitted_once_with_its_scores(run):
    row = run[0][-1]
    assert set(row["peers"]) == {"plain"}
    assert row["auto"]["aum"][0] > 0.8
    assert 0 < row["peers"]["plain"]["seconds"] < row["cost"]["seconds"]


def test_the_tables_have_every_case_and_what_was_asked_for(run):
    _, text, *_ = run
    assert "| wine wide symmetric 0.2 8ep, 1 | " in text
    assert "### At fixed epochs" in text
    assert "seeds 1, 2 and 3 are reported" in text


def test_seconds_of_a_hook_that_calls_another_are_counted_once():
    class Waits(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            started = time.process_time()
            while time.process_time() < started + 0.02:
                pass

        def on_fit_end(self, trainer, pl_module):
            self.on_fit_start(trainer, pl_module)

    callback = Waits()
    own = partition.CountSeconds(callback)
    callback.on_fit_end(None, None)
    assert 0.02 <= own.seconds < 0.04


def found(number, precision, recall, **more):
    return {"flags": [number, precision, recall], "epoch": 5, "stated": None, "interval": None, **more}


@pytest.mark.parametrize(
    ("rate", "precision", "holds"), [(0.01, 0.6, True), (0.25, 0.7, False), (0.4, 0.9, True), (0.1, 0.59, False)]
)
def test_flags_are_good_above_their_base_rate(rate, precision, holds):
    assert flags_well({"true_rate": rate}, found(10, precision, 0.5)) == holds
    assert not flags_well({"true_rate": rate}, found(0, 0.0, 0.0))


def test_the_summary_names_what_misses():
    of = {"named_rate": 0.0, "true_rate": 0.0, "samples": 1000, "noise": "clean", "is_slow": True}
    rows = [
        of | {"case": name, "seed": 1, "auto": found(number, 0.0, 0.0), "peers": {}}
        for name, number in (("good", 3), ("bad", 4))
    ]
    assert "| clean: at most .3 % flagged, at any epoch | 1 of 2 | **missed** | bad, 1, epoch 5 |" in summary(rows)
    slow = of | {"case": "spoken-sym40", "seed": 1, "peers": {}, "true_rate": 0.4, "noise": "symmetric"}
    scores = {name: [0.9, 0.9, 0.9] for name in ("aum", "loss", "margin")}
    (line,) = (
        x for x in summary([slow | {"auto": found(9, 1.0, 0.5, ours=[0.99, 0.9, 0.9], **scores)}]) if "conv" in x
    )
    assert line.endswith("| 0.9900 over 1 cases (0.9965) | **missed** | spoken-sym40 0.9900 (0.9965) |")


def test_validation_labels_are_as_noisy_as_the_others(tmp_path):
    source = load("digits", tmp_path, 0)
    held_out = torch.arange(len(source.x)) % 3 == 0
    whole = type(source)(
        source.x[~held_out],
        source.truth[~held_out],
        human=(source.truth[~held_out] + 1) % 10,
        val_x=source.x[held_out],
        val_y=source.truth[held_out],
        classes=10,
    )
    for noise in ("symmetric", "human"):
        x, y = noisy_validation(whole, DetectionCase("digits", noise, 0.3), 0)
        wrong = y != source.truth[held_out]
        assert x is whole.val_x
        assert wrong.double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y[wrong].equal((source.truth[held_out][wrong] + 1) % 10)
    assert noisy_validation(source, DetectionCase("digits", "symmetric", 0.3), 0) is None


def test_labels_that_do_not_occur_are_left_out_of_cleanlab():
    label = torch.tensor([0, 7] * 100)
    probability = torch.full((200, 9), 0.01)
    probability[torch.arange(200), label] = 0.9
    # Three that are called 7 look like 0.
    probability[1:6:2] = probability[0]
    answer = peers.cleanlab_on(label, probability)
    assert answer["flagged"].nonzero().flatten().tolist() == [1, 3, 5]
    assert sorted(answer["score"].topk(3).indices.tolist()) == [1, 3, 5]
