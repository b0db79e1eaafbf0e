import csv
import json
import time

import pytest

from lightning_unlearn import Partition
from lightning_unlearn.cli import main
from lightning_unlearn.demo import arms
from lightning_unlearn.demo.arms import (
    BASE,
    CONTINUE,
    FFT,
    LFT,
    ORACLE,
    RELABEL,
    RETRAIN,
    RETRAIN_SHORT,
    Settings,
    run_demo,
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
    assert list(outcome.arms) == [BASE, CONTINUE, RETRAIN_SHORT, RETRAIN, LFT, FFT, RELABEL, ORACLE]
    steps = outcome.arms[FFT].steps
    assert outcome.arms[BASE].steps == 3 * 19
    assert 0 < steps < 2 * 19
    assert outcome.arms[CONTINUE].steps == outcome.arms[RETRAIN_SHORT].steps == outcome.arms[LFT].steps == steps
    assert outcome.arms[RETRAIN].steps == steps // 2 * 3
    assert steps <= outcome.arms[RELABEL].steps <= 2 * 19
    assert all(arm.seconds > 0 for arm in outcome.arms.values())


def test_the_partition_finds_the_wrong_labels_and_is_written(small):
    _, (outcome,), out = small
    assert outcome.detection.auroc > 0.9
    assert outcome.detection.memorised < 0.2
    partition = Partition.load(out / "partition.npz")
    with (out / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == partition.suspect_indices().tolist()


def test_the_demo_has_a_report_of_its_fit(small):
    _, _, out = small
    record = RunRecord.load(out)
    assert record.gallery[int(record.partition.suspect_indices()[0])]["kind"] == "image"
    assert len(record.curves["training loss"]) == 5
    assert "CleanSubsetFinetuneCallback" in (out / "report.html").read_text()


def test_the_table_names_every_arm_and_the_partition(small):
    settings, outcomes, _ = small
    text = table(settings, outcomes)
    for name in outcomes[0].arms:
        assert f"\n{name} " in text
    assert f"AUROC {outcomes[0].detection.auroc:.3f}" in text
    several = table(settings, outcomes * 2)
    assert "mean ± standard deviation of 2 seeds" in several


def test_the_command_writes_json_and_shows_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arms, "Settings", lambda **given: Settings(base_epochs=1, repair_epochs=1, **given))
    started = time.perf_counter()
    main(["demo", "--fast", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "results" / "demo.json")])
    elapsed = time.perf_counter() - started
    result = json.loads((tmp_path / "results" / "demo.json").read_text())
    shown = capsys.readouterr().out
    assert result["settings"]["seeds"] == [0]
    (outcome,) = result["outcomes"]
    assert outcome["arms"][FFT]["seconds"] < elapsed
    assert f"{outcome['arms'][BASE]['accuracy']:.3f}" in shown
    assert (tmp_path / "out" / "suspects.csv").exists()
    assert result["versions"]["torch"].startswith("2.")
