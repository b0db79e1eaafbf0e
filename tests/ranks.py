"""Ranks without processes (a thread each, and a sum that waits for all of them), and scripts that start processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor


def run_ranks(work: Callable[[int, Callable[[Tensor], Tensor]], Any], world_size: int) -> list[Any]:
    """Runs ``work(rank, reduce)`` on every rank at once and returns what each returned.

    A rank that calls ``reduce`` more often than another, or with another shape, breaks the barrier or the sum.
    """
    barrier = Barrier(world_size, timeout=20)
    parts: list[Any] = [None] * world_size

    def on_rank(rank: int) -> Any:
        def reduce(part: Tensor) -> Tensor:
            parts[rank] = part.clone()
            barrier.wait()
            total = torch.stack(parts).sum(dim=0)
            barrier.wait()
            return total

        try:
            return work(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(on_rank, rank) for rank in range(world_size)]
        return [future.result() for future in futures]


def exchanges(world_size: int) -> list[Callable[[Sequence[Any]], list[Any]]]:
    """One exchange for each rank, all of which wait for each other."""
    barrier, board = Barrier(world_size, timeout=20), [[] for _ in range(world_size)]

    def of(rank: int) -> Callable[[Sequence[Any]], list[Any]]:
        def exchange(parts: Sequence[Any]) -> list[Any]:
            assert len(parts) == world_size
            board[rank] = list(parts)
            barrier.wait()
            found = [board[other][rank] for other in range(world_size)]
            barrier.wait()
            return found

        return exchange

    return [of(rank) for rank in range(world_size)]


def run_script(script: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs ``script folder arguments...``, which starts its ranks itself, with the checkout on its path."""
    return run_python(folder, "-W", "ignore", script, folder, *arguments, OMP_NUM_THREADS="1")


def run_python(folder: Path, *arguments: Path | str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a new interpreter in a folder, with the checkout on its path."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
