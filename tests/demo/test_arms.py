import csv
import json
import re
import time

import pytest

from lightning_unlearn import Partition
from lightning_unlearn.cli import main
from lightning_unlearn.demo import outcomes
from lightning_unlearn.demo.arms import run_demo
from lightning_unlearn.demo.outcomes import (
    ARMS,
    AUTO,
    BASE,
    CEILING,
    CONTINUE,
    KEPT_WEIGHTS,
    REPAIR,
    RETRAIN,
    RETRAIN_SHORT,
    SHRINK_ALL,
    Settings,
    table,
)
from lightning_unlearn.report import RunRecord


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every arm for a few epochs: nothing is memorized yet, but everything runs."""
    out = tmp_path_factory.mktemp("demo")
    settings = Settings(base_epochs=3, repair_epochs=2, seeds=(0,))
    return settings, run_demo(settings, out), out


def test_every_arm_runs_and_those_of_the_same_steps_have_them(small):
    _, (outcome,), _ = small
    assert tuple(outcome.arms) == ARMS
    steps = {name: arm.steps for name, arm in outcome.arms.items()}
    assert steps[BASE] == 3 * 19
    assert 0 < steps[REPAIR] < 2 * 19
    for control in (KEPT_WEIGHTS, CONTINUE, SHRINK_ALL, RETRAIN_SHORT, CEILING):
        assert steps[control] == steps[REPAIR], control
    assert steps[RETRAIN] == steps[REPAIR] // 2 * 3
    assert steps[AUTO] <= 5 * 19
    assert all(arm.seconds > 0 for arm in outcome.arms.values())


def test_the_controls_are_different_ways_to_train(small):
    """After so few steps no two of them answer alike by chance."""
    _, (outcome,), _ = small
    controls = (CONTINUE, SHRINK_ALL, RETRAIN_SHORT, RETRAIN)
    assert len({outcome.arms[name].accuracy for name in controls}) == len(controls)


def test_the_partition_finds_the_wrong_labels_and_is_written(small):
    _, (outcome,), out = small
    assert outcome.detection.auroc > 0.9
    assert outcome.detection.memorized < 0.2
    partition = Partition.load(out / "partition.npz")
    with (out / "suspects.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == partition.suspect_indices().tolist()


def test_the_demo_has_a_report_of_its_fit(small):
    _, _, out = small
    record = RunRecord.load(out)
    assert record.gallery[int(record.partition.suspect_indices()[0])]["kind"] == "image"
    assert len(record.curves["training loss"]) == len(record.curves["val_acc"]) == 5
    assert "CleanSubsetFinetuneCallback" in (out / "report.html").read_text(encoding="utf-8")


def test_the_table_names_every_arm_and_the_partition(small):
    settings, measured, _ = small
    text = table(settings, measured)
    assert "40 % symmetric label noise" in text
    for name in measured[0].arms:
        assert re.search(rf"^ *{re.escape(name)}[ ,].* {100 * measured[0].arms[name].accuracy:.1f} ", text, re.M), name
    assert f"AUROC {100 * measured[0].detection.auroc:.1f} %" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "mean ± standard deviation of 2 seeds" in table(settings, measured * 2)


def outcome(seed, repair, **controls):
    """Of which only the accuracies matter."""
    detection = outcomes.Detection(1.0, 1.0, 1.0, 1.0, 0.4, 1.0)
    named = {"train_on": CONTINUE, "retrain": RETRAIN, "ceiling": CEILING}
    accuracy = dict.fromkeys(ARMS, 0.5) | {REPAIR: repair} | {named[k]: v for k, v in controls.items()}
    arms = {name: outcomes.Arm(value, 1.0, 480 if name == RETRAIN else 240) for name, value in accuracy.items()}
    return outcomes.Outcome(seed, arms, detection)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([outcome(0, 0.98, train_on=0.90, retrain=0.97, ceiling=0.99)], ["+8.0 points, a gain", "+1.0 points, a gain"]),
        ([outcome(0, 0.97, train_on=0.90, retrain=0.975, ceiling=0.99)], ["-0.5 points, no difference to speak of"]),
        ([outcome(s, 0.95, train_on=0.90, retrain=0.98, ceiling=0.99) for s in (0, 1)], ["-3.0 ± 0.0 points, a loss"]),
        (
            [outcome(s, 0.95, train_on=0.90, retrain=0.93 + 0.03 * s, ceiling=0.94) for s in (0, 1)],
            ["+0.5 ± 2.1 points, no difference", "1.0 points below it"],
        ),
    ],
)
def test_the_last_lines_say_against_which_control_and_call_a_loss_a_loss(measured, said):
    last = table(Settings(), measured).splitlines()[-3:]
    assert last[0].startswith("Against training on: +")
    assert last[1].startswith("Against the strongest control (retrain on the kept, in full): ")
    assert last[1].endswith(", for 0.50 of its steps.")
    for part in said:
        assert part in "\n".join(last)


def test_where_training_on_is_the_strongest_control_it_is_named_once():
    last = table(Settings(), [outcome(0, 0.9, train_on=0.95, ceiling=0.96)]).splitlines()[-2:]
    assert last == [
        "Against training on: -5.0 points, a loss.",
        "The ceiling (retrain on the truly clean) is 6.0 points above it.",
    ]


def test_the_command_writes_json_and_shows_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outcomes, "Settings", lambda **given: Settings(base_epochs=1, repair_epochs=1, **given))
    started = time.perf_counter()
    main(["demo", "--fast", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "results" / "demo.json")])
    elapsed = time.perf_counter() - started
    result = json.loads((tmp_path / "results" / "demo.json").read_text())
    shown = capsys.readouterr().out
    assert result["settings"]["seeds"] == [0]
    (outcome,) = result["outcomes"]
    assert outcome["arms"][REPAIR]["seconds"] < elapsed
    assert f" {100 * outcome['arms'][BASE]['accuracy']:.1f} " in shown
    assert (tmp_path / "out" / "suspects.csv").exists()
    assert result["versions"]["torch"].startswith("2.")
