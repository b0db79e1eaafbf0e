"""Units of work whose finished parts are kept, so that a benchmark can be stopped, resumed and shared by processes."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch


class Unit(Protocol):
    """What is run arm by arm, in a folder of its own."""

    folder: Path

    def settings(self) -> dict[str, Any]:
        """All that its results depend on."""

    def result(self, arm: str) -> dict[str, Any]:
        """What an arm came to, run now if it has not been."""


def fast_precision(precision: str, accelerator: str = "cpu") -> str:
    """The Trainer's precision, or float32 where the processor emulates bfloat16, in five times the time."""
    emulated = accelerator == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "32-true" if precision == "bf16-mixed" and emulated else precision


def where_and_when(accelerator: str) -> dict[str, Any]:
    """What a later reader of a number wants to know: the table may be made of runs of several days."""
    # The CPU scale runs beside a GPU too.
    uses_gpu = accelerator != "cpu" and torch.cuda.is_available()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return {
        "date": str(datetime.datetime.now(tz=datetime.timezone.utc).date()),
        "commit": commit.strip() or "unknown",
        "device": torch.cuda.get_device_name() if uses_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def kept(file: Path, find: Callable[[], dict[str, Any]], accelerator: str = "cpu") -> dict[str, Any]:
    """The row in a file; where there is none yet, what ``find`` finds is written there first."""
    if not file.exists():
        row = {**find(), **where_and_when(accelerator)}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(row, indent=1), encoding="utf-8")
        part.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process is at work in the folder; none will be inside. A lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _check_settings(unit: Unit) -> None:
    """Refuses results of other settings."""
    file, now = unit.folder / "settings.json", json.dumps(unit.settings(), indent=1)
    if not file.exists():
        file.write_text(now, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != now:
        raise SystemExit(f"{unit.folder} holds results of other settings; move it away, or name another --out.")


def run_unit(unit: Unit, arms: Sequence[str], needed: Collection[str]) -> list[str]:
    """Runs what is missing; returns what failed, which does not keep the rest from being run.

    Args:
        unit: which.
        arms: in this order.
        needed: those without which the others cannot be run.
    """
    failed: list[str] = []
    with _claimed(unit.folder) as is_ours:
        if not is_ours:
            print(f"{unit.folder.name}: another process is at it", flush=True)
            return failed
        _check_settings(unit)
        for arm in arms:
            if (unit.folder / f"{arm}.json").exists():
                continue
            started = time.perf_counter()
            try:
                found = unit.result(arm)
            except Exception:
                traceback.print_exc()
                failed.append(f"{unit.folder.name}: {arm}")
                if arm in needed:
                    break
                continue
            print(
                f"{unit.folder.name}: {arm} {100 * found['accuracy']:.2f} in {found['steps']} steps,"
                f" {time.perf_counter() - started:.1f} s",
                flush=True,
            )
    return failed


def finished(units: Sequence[Unit], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the arms that are there."""
    files = [unit.folder / f"{arm}.json" for unit in units for arm in arms]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def head(module: str, rows: Sequence[dict[str, Any]], packages: Sequence[str] = ()) -> str:
    """When, where and how rows were made, for the head of a file of tables."""
    names = ("torch", "lightning", "captum", "scikit-learn", *packages)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    known = {key: ", ".join(sorted({str(row[key]) for row in rows})) for key in ("date", "commit", "device", "threads")}
    seeds = sorted({row["seed"] for row in rows})
    return (
        f"Run {known['date']} at commit {known['commit']} on {known['device']}, threads {known['threads']},"
        f" {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; seeds {seeds}. Made by\n\n"
        f"    python -m {module} {shlex.join(sys.argv[1:])}\n\n"
    )


def write_tables(file: Path, text: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes tables, and their numbers beside them as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    # A row per line, so that a changed row is a changed line.
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
