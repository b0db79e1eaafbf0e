"""What the benchmarks of units share; processes that are spawned import this file, so it imports little."""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
from benchmarks import command
from benchmarks.command import add_run_options, folder_of, run, run_units
from benchmarks.runs import finished, head, kept, run_unit
from tests.callbacks import forked

ARMS = ("first", "broken", "last")


class Counting:
    """A unit of which the arm "broken" fails."""

    def __init__(self, folder, **settings):
        self.folder, self._settings, self.runs = folder, settings, []

    def settings(self):
        return self._settings

    def result(self, arm):
        self.runs.append(arm)
        if arm == "broken":
            raise RuntimeError("broken")
        return kept(self.folder / f"{arm}.json", lambda: self.find(arm))

    def find(self, arm):
        return {"seed": 0, "arm": arm, "accuracy": 0.5, "steps": 1, "process": os.getpid()}


class Meeting(Counting):
    """One of two that are only finished at the same time."""

    def find(self, arm):
        (self.folder / "here").touch()
        wait_for(lambda: len(list(self.folder.parent.glob("*/here"))) >= 2)
        return super().find(arm)


class Endless(Counting):
    """Says which process it is in, and never ends."""

    def find(self, arm):
        part = self.folder / "part"
        part.write_text(str(os.getpid()))
        part.rename(self.folder / "process")
        while True:
            time.sleep(0.1)


class Killing(Counting):
    """Ends its process as a lack of memory does."""

    def find(self, arm):
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for(happens, seconds=120):
    last = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < last, "it did not happen"
        time.sleep(0.02)


def is_running(process):
    """A process that nobody has waited for yet is not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def read(*words, seeds=(0,)):
    parser = argparse.ArgumentParser()
    add_run_options(parser, seeds=list(seeds))
    return parser.parse_args(words)


def names_of(rows):
    return "\n".join(row["arm"] for row in rows)


@pytest.fixture
def quiet(monkeypatch):
    """This process keeps its warnings, its log and its threads."""
    monkeypatch.setattr(command, "_prepare", lambda threads: None)


@pytest.fixture
def forks(monkeypatch):
    """Processes are forked from one that has imported torch, as spawned ones take longest to import it."""
    forked.start()
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _: context)


def test_finished_arms_are_kept_and_failed_ones_do_not_keep_the_rest_from_being_run(tmp_path, capsys):
    unit = Counting(tmp_path / "unit", lr=1)
    assert run_unit(unit, ARMS, needed=("first",)) == ["unit: broken"]
    assert unit.runs == list(ARMS)
    assert run_unit(unit, ARMS, needed=("broken",)) == ["unit: broken"]
    assert unit.runs[3:] == ["broken"]
    rows = finished([unit], ARMS)
    assert [row["arm"] for row in rows] == ["first", "last"]
    assert "seeds [0]" in head("benchmarks.paper", rows)
    assert "unit: last 50.00 in 1 steps" in capsys.readouterr().out


def test_a_run_on_the_cpu_beside_a_gpu_is_one_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a large one")
    found = [kept(tmp_path / f"{name}.json", dict, name)["device"] for name in ("cpu", "gpu")]
    assert found == [platform.machine(), "a large one"]


def test_what_an_arm_needs_is_run_before_it_or_not_at_all(tmp_path):
    unit = Counting(tmp_path / "unit")
    assert run_unit(unit, ["broken", "last"], needed=("broken",)) == ["unit: broken"]
    assert unit.runs == ["broken"]


def test_results_of_other_settings_are_refused(tmp_path):
    run_unit(Counting(tmp_path / "unit", lr=1), [], needed=())
    with pytest.raises(SystemExit, match="holds results of other settings"):
        run_unit(Counting(tmp_path / "unit", lr=2), [], needed=())


def test_two_jobs_share_the_units_and_tell_each_failure_once(tmp_path, forks):
    units = [Meeting(tmp_path / name) for name in "ab"] + [Counting(tmp_path / name) for name in "cde"]
    failed = run_units(units, ARMS, (), jobs=2)
    assert sorted(failed) == [f"{name}: broken" for name in "abcde"]
    rows = finished(units, ARMS)
    assert [row["arm"] for row in rows] == ["first", "last"] * 5
    processes = [row["process"] for row in rows]
    assert processes[0] != processes[2]
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    # A unit is never divided.
    assert processes[::2] == processes[1::2]


def test_one_unit_and_one_job_need_no_process_of_their_own(tmp_path, quiet):
    unit = Counting(tmp_path / "unit")
    assert run_units([unit], ["first"], (), jobs=8) == []
    assert run_units([unit, Counting(tmp_path / "other")], ["last"], ()) == []
    assert {row["process"] for row in finished([unit], ["first", "last"])} == {os.getpid()}


def test_a_unit_that_is_run_does_not_hold_on_to_its_data(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(Counting, "find", lambda self, arm: vars(self).setdefault("data", {"accuracy": 1, "steps": 1}))
    unit = Counting(tmp_path / "unit")
    run_units([unit], ["first"], ())
    assert unit.runs == ["first"]
    assert not hasattr(unit, "data")


def test_a_process_that_is_killed_is_a_failure_of_what_had_not_finished(tmp_path, forks, monkeypatch):
    # The pool does not see the end of a process that it began to start before it last looked.
    start = ForkServerProcess.start
    monkeypatch.setattr(ForkServerProcess, "start", lambda self: [time.sleep(0.5), start(self)])
    units = [Endless(tmp_path / "endless"), Killing(tmp_path / "killing")]
    failed = run_units(units, ["first"], (), jobs=2)
    assert sorted(failed) == [f"{name}: not finished, since a process was killed" for name in ("endless", "killing")]


def test_other_settings_in_one_of_several_processes_stop_them_all(tmp_path, forks):
    run_unit(Counting(tmp_path / "other", lr=1), [], ())
    with pytest.raises(SystemExit, match="holds results of other settings"):
        run_units([Endless(tmp_path / "endless"), Counting(tmp_path / "other", lr=2)], ["first"], (), jobs=2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_all_processes_end_with_the_first_the_idle_ones_too(tmp_path, how):
    script = (
        "import signal, sys; from pathlib import Path\n"
        "from tests.test_benchmarks_command import Counting, Endless, run_units\n"
        # A shell starts what it runs in the background, these tests too, with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "units = [Endless(Path(sys.argv[1], 'endless')), Counting(Path(sys.argv[1], 'finished'))]\n"
        "run_units(units, ['first'], (), jobs=2)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    at_work, row = tmp_path / "endless" / "process", tmp_path / "finished" / "first.json"
    wait_for(lambda: at_work.exists() and row.exists())
    others = [int(at_work.read_text()), json.loads(row.read_text())["process"]]
    assert all(map(is_running, others))
    if how == signal.SIGINT:
        # Ctrl-C reaches all, of which one answers.
        for process in others:
            os.kill(process, how)
        time.sleep(0.5)
        assert all(map(is_running, others))
    first.send_signal(how)
    _, said = first.communicate(timeout=60)
    wait_for(lambda: not any(map(is_running, others)), seconds=60)
    assert len(set(others)) == 2
    assert said.count("Traceback") == (how == signal.SIGINT)


def test_tables_are_printed_and_written_before_a_failure_is_told(tmp_path, quiet, capsys):
    units, file = [Counting(tmp_path / "out" / "unit")], tmp_path / "tables" / "t.md"
    with pytest.raises(SystemExit, match=r"^Failed: unit: broken$"):
        run(read("--write", str(file)), "benchmarks.paper", units, ARMS, needed=(), tables=names_of)
    assert file.read_text().endswith("\n\nfirst\nlast")
    assert "python -m benchmarks.paper" in file.read_text()
    assert file.read_text() in capsys.readouterr().out
    run(read("--tables-only"), "benchmarks.paper", units, ARMS, needed=(), tables=names_of)
    assert units[0].runs == list(ARMS)


def test_tables_of_nothing_are_an_error(tmp_path):
    units = [Counting(tmp_path / "unit")]
    with pytest.raises(SystemExit, match=rf"a finished arm in {tmp_path}, but there is none; leave out --tables-only"):
        run(read("--tables-only"), "benchmarks.paper", units, ARMS, needed=(), tables=names_of)


def test_options(capsys):
    assert folder_of(read(), "paper-cpu") == Path("runs/paper-cpu")
    assert folder_of(read("--fast"), "paper-cpu") == Path("runs/paper-cpu-fast")
    assert folder_of(read("--fast", "--out", "there"), "paper-cpu") == Path("there")
    assert (read().jobs, read().threads, read().seeds, read("--seeds", "3", "4").seeds) == (1, 1, [0], [3, 4])
    with pytest.raises(SystemExit):
        read("--jobs", "0")
    assert "argument --jobs: expected at least 1, but got 0" in capsys.readouterr().err
