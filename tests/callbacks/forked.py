"""Processes that start in no time: forked from one that has imported what they need, and has run nothing.

A fresh interpreter takes longer to import torch and Lightning than most tests here take to train. test_ddp.py launches
its ranks as users do all the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
PRELOAD = [
    f"tests.{name}"
    for name in (
        "callbacks.kill_script",
        "callbacks.plain_script",
        "callbacks.ddp_kinds_script",
        "callbacks.fsdp_script",
        "callbacks.prune_script",
        "callbacks.rounds_script",
        "callbacks.simulated_device_script",
        "callbacks.streams_script",
        "evidence.step_reader_script",
        "callbacks.imported_last",
    )
]
"""Whose functions are run; with them comes all that takes long to import."""
ALONE = 30
"""Seconds that a rank has to end in when another has failed."""


def start() -> None:
    """Starts the one that is forked, unless it runs already; it goes on importing after the return."""
    multiprocessing.set_forkserver_preload(PRELOAD)
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
    start()
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    process.join(100)
    if process.exitcode is None:
        process.kill()
        process.join()
    return int(process.exitcode or 0)


def launch(
    target: Callable[..., Any], folder: Path, *args: Any, world_size: int = 2, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Runs ``target(folder, *args)`` on ranks, which Lightning takes for started by something like torchrun.

    Returns:
        the exit code of the rank that failed first (0 if none has), and what all of them wrote. A rank that is left
        waiting by one that failed, and one that takes too long, is killed.
    """
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
    }
    ranks = {f"rank {rank}": {**group, "LOCAL_RANK": str(rank)} for rank in range(world_size)}
    return complete(ranks, timeout, target, folder, *args)


def call(
    target: Callable[..., Any], folder: Path, *args: Any, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Runs ``target(folder, *args)`` in one process, which is of no group."""
    return complete({"alone": {}}, timeout, target, folder, *args)


def complete(
    processes: dict[str, dict[str, str]], timeout: float, target: Callable[..., Any], folder: Path, *args: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a function in processes that have a name and variables of the environment."""
    start()
    context, running = multiprocessing.get_context("forkserver"), []
    for name, variables in processes.items():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        process = context.Process(target=as_if_fresh, args=(environment, name, target, folder, *args), name=name)
        process.start()
        running.append(process)
    code, killed = wait(running, timeout)
    logs = [log for log in (folder / f"{name}.log" for name in processes) if log.exists()]
    said = "".join(f"--- {log.stem}\n{log.read_text()}" for log in logs) + "".join(killed)
    return subprocess.CompletedProcess(target.__name__, code, said, said)


def wait(processes: list[BaseProcess], timeout: float) -> tuple[int, list[str]]:
    """Waits for all to end, not for long once one has failed.

    Returns:
        the exit code of the first to fail, or 0, and a line for each that had to be killed.
    """
    code, until = 0, time.monotonic() + timeout
    waiting = list(processes)
    while waiting and (left := until - time.monotonic()) > 0:
        connection.wait([process.sentinel for process in waiting], left)
        for process in [process for process in waiting if process.exitcode is not None]:
            waiting.remove(process)
            if process.exitcode and not code:
                code, until = process.exitcode, min(until, time.monotonic() + ALONE)
    for process in waiting:
        process.kill()
        process.join()
    return code or (-9 if waiting else 0), [f"{process.name} did not end and was killed\n" for process in waiting]


def as_if_fresh(environment: dict[str, str], name: str, target: Callable[..., Any], folder: Path, *args: Any) -> None:
    """Calls a function in the state that a fresh interpreter would be in."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with (folder / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # or a loader's workers would be started as this process was
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    np.random.seed()  # noqa: NPY002 - or ranks that draw with it would agree by chance of their birth
    target(folder, *args)


def free_port() -> int:
    """A port that nobody listens on, of those that the system does not give to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return port
