import json
import subprocess

import numpy as np
import pytest

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
pytest.importorskip("torchvision")
from benchmarks import gpu
from benchmarks.plans import CE, CLEAN, DEFAULT, RETRAIN_DEFAULT
from examples.cifar10.cifar10 import made_up


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with images whose class is their brightness; of a fifth, people said the next class."""
    folder = tmp_path_factory.mktemp("images")
    file = made_up(folder / "cifar10n.npz", train=100, test=20)
    with np.load(file) as arrays:
        label = arrays["train_label"]
        given = np.where(np.arange(len(label)) % 5, label, (label + 1) % 10)
        np.savez(file, **arrays, train_human_label=given)
    return folder


def test_the_command_runs_on_a_cpu(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.speed, "_STEPS", 2)
    monkeypatch.setattr(gpu, "FITS", {"cifar-human-full": gpu.FITS["cifar-human-full"]})
    gpu.main(["--tiny", "--data", str(images), "--out", str(tmp_path), "--only", "attribution", "steps", "fits"])
    text = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text() in text
    assert "| small_cnn | input of 'head' | 8 | margin |" in text
    assert "| digits CNN, 1 x 8 x 8 | 64 |" in text
    assert "channels last | 64 |" in text
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["arm"] for row in rows] == [CE, DEFAULT, RETRAIN_DEFAULT, CLEAN]
    assert [row["steps"] for row in rows] == [4] * 4
    (partition,) = (row["partition"] for row in rows if "partition" in row)
    assert 0 <= partition["auroc"] <= 1
    assert partition["true_rate"] == pytest.approx(0.2)
    assert "Left out" not in text


def test_a_fit_that_would_end_too_late_is_left_out_by_name(images, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Unit, "result", lambda unit, arm: {**ROW, "arm": arm, "case": unit.case.name})
    args = gpu.arguments(["--tiny", "--data", str(images), "--out", str(tmp_path), "--minutes", "2"])
    rows = []
    # The first takes an hour a step.
    lines = gpu.fits(args, gpu.time.perf_counter() + 120, rows)
    assert [row["arm"] for row in rows] == [CE]
    left_out = [line for line in lines if line.startswith("- Left out")]
    assert left_out[0] == f"- Left out: cifar-human-full, {DEFAULT}: some 14400 s more than --minutes 2."
    assert left_out[1] == f"- Left out: cifar-human-full, {RETRAIN_DEFAULT}: not without the partition."
    assert len(left_out) == 7


ROW = {"accuracy": 0.5, "seconds": 3600.0 * 4, "steps": 4}


def test_the_shell_script_names_what_is_missing(tmp_path):
    script = gpu.ROOT / "benchmarks" / "gpu.sh"
    asked = ["--tiny", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([str(script), *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Missing: cifar10n.npz in {tmp_path} (--data;" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_the_tiny_one_runs(images, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"Missing: a GPU \(.*; --tiny runs on the CPU"):
        gpu.main(["--data", str(images)])


def test_failing_tests_fail_the_command(images, tmp_path, monkeypatch):
    said = subprocess.CompletedProcess([], 1, stdout="...\n2 failed, 9 passed in 3.00s\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(SystemExit, match="Tests failed"):
        gpu.main(["--tiny", "--data", str(images), "--out", str(tmp_path), "--only", "tests"])
    assert "**Failed**: 2 failed, 9 passed" in (tmp_path / "gpu.md").read_text()
