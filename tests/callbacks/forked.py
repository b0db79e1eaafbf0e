"""Processes that start in no time: forked from one that has imported what they need, and has run nothing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(*modules: str) -> None:
    """Starts the one that is forked, with these modules imported."""
    multiprocessing.set_forkserver_preload(list(modules))
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before["PYTHONPATH"]])])
    os.environ["OMP_NUM_THREADS"] = "1"  # what more threads have begun, a fork cannot go on with
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(target: Callable[..., Any], *args: Any) -> int:
    """Runs a function of an imported module in a process of its own.

    Returns:
        its exit code, below zero the signal that killed it.
    """
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    process.join(100)
    if process.exitcode is None:
        process.kill()
        process.join()
    return int(process.exitcode or 0)
