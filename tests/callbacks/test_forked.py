"""The processes that other tests run in are like fresh ones, and end."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.callbacks import forked

GROUP = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def look(folder):
    found = {
        "folder": str(Path.cwd()),
        "method": multiprocessing.get_start_method(),
        "mine": os.environ.get("MINE"),
        "group": [os.environ.get(name) for name in GROUP],
        "draws": [random.random(), np.random.random()],  # noqa: NPY002
        "seed": torch.initial_seed(),
        "is in a group": torch.distributed.is_initialized(),
    }
    (folder / f"{os.environ.get('LOCAL_RANK', 'alone')}.json").write_text(json.dumps(found))
    sys.stdout.write("seen\n")


def fail_on_1(folder, waits):
    if os.environ["LOCAL_RANK"] == "1":
        raise ZeroDivisionError("on one rank")
    if waits:
        time.sleep(100)


def test_ranks_are_like_processes_that_torchrun_started(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "now")
    before, folder = dict(os.environ), Path.cwd()
    done = forked.launch(look, tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("seen") == 2
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [found["group"][:3] for found in (one, other)] == [["0", "0", "2"], ["1", "0", "2"]]
    assert one["group"][3:] == other["group"][3:]
    for found in (one, other):
        assert found["folder"] == str(tmp_path)
        assert found["mine"] == "now"
        assert not found["is in a group"]
    # As in fresh processes torch's seed is the same, other seeds are not.
    assert one["seed"] == other["seed"]
    assert all(mine != yours for mine, yours in zip(one["draws"], other["draws"], strict=True))
    assert (dict(os.environ), Path.cwd()) == (before, folder)


def test_a_process_of_no_group_knows_nothing_of_earlier_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("MINE", raising=False)
    assert forked.call(look, tmp_path).returncode == 0
    found = json.loads((tmp_path / "alone.json").read_text())
    assert found["group"] == [None] * 5
    assert found["mine"] is None
    default = "forkserver" if sys.version_info >= (3, 14) else "fork"
    assert found["method"] == (default if sys.platform == "linux" else "spawn")


@pytest.mark.parametrize("waits", [False, True])
def test_a_rank_that_fails_is_shown_and_leaves_no_other_waiting(tmp_path, monkeypatch, waits):
    monkeypatch.setattr(forked, "ALONE", 0.5)
    done = forked.launch(fail_on_1, tmp_path, waits)
    assert done.returncode == 1
    assert "ZeroDivisionError: on one rank" in done.stderr
    assert ("rank 0 did not end and was killed" in done.stderr) == waits


def test_processes_that_take_too_long_are_killed(tmp_path):
    done = forked.call(endless, tmp_path, timeout=0.5)
    assert done.returncode == -signal.SIGKILL
    assert "alone did not end and was killed" in done.stderr


def endless(folder):
    time.sleep(100)
