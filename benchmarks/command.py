"""The command line of the benchmarks that are made of units: common options, processes that share the units, tables."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import Unit, finished, head, run_unit, write_tables


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, but got {number}")
    return number


def add_run_options(parser: argparse.ArgumentParser, *, seeds: Sequence[int] | None) -> None:
    """The options that say what is run again, by how many, and where it goes.

    Args:
        parser: that they are added to.
        seeds: of ``--seeds``.
    """
    parser.add_argument("--out", type=Path, help="where results are kept; by default a folder below runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument(
        "--jobs",
        type=_at_least_one,
        default=1,
        help="processes that share the units; a unit is never divided, so no more than there are units are started",
    )
    parser.add_argument(
        "--threads",
        type=_at_least_one,
        default=1,
        help="of the processor, for each of the jobs; processor time counts them all",
    )
    parser.add_argument("--fast", action="store_true", help="hardly any training, to see that everything runs")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    parser.add_argument("--write", type=Path, help="file for the tables; the numbers go beside it as JSON")


def folder_of(args: argparse.Namespace, name: str) -> Path:
    """Where results are kept: as asked for, or by the name of what is run."""
    return args.out or Path("runs", f"{name}-fast" if args.fast else name)


def run(
    args: argparse.Namespace,
    module: str,
    units: Sequence[Unit],
    arms: Sequence[str],
    *,
    needed: Collection[str],
    tables: Callable[[list[dict[str, Any]]], str],
    packages: Sequence[str] = (),
) -> None:
    """Runs what is missing, and prints and writes the tables of all that is there.

    Args:
        args: those of :func:`add_run_options`.
        module: that was called, for the head of the tables.
        units: in the order in which they are begun.
        arms: of every unit.
        needed: those without which the others cannot be run.
        tables: from the rows of the finished arms to Markdown.
        packages: whose versions are told beside the usual ones.

    Raises:
        SystemExit: if an arm failed, or tables were asked for and there is nothing to show.
    """
    failed = [] if args.tables_only else run_units(units, arms, needed, jobs=args.jobs, threads=args.threads)
    rows = finished(units, arms)
    if rows:
        text = head(module, rows, packages) + tables(rows)
        print(text)
        if args.write:
            write_tables(args.write, text, rows)
    if failed:
        raise SystemExit("Failed: " + "; ".join(failed))
    if args.tables_only and not rows:
        folders = ", ".join(sorted({str(unit.folder.parent) for unit in units}))
        raise SystemExit(f"Expected a finished arm in {folders}, but there is none; leave out --tables-only.")


def run_units(
    units: Sequence[Unit], arms: Sequence[str], needed: Collection[str], *, jobs: int = 1, threads: int = 1
) -> list[str]:
    """Runs what is missing in so many processes; returns what failed.

    Args:
        units: picklable if there are several jobs. Each is run whole by one process.
        arms: of every unit.
        needed: those without which the others cannot be run.
        jobs: how many processes; 1 for this one.
        threads: of each.
    """
    if min(jobs, len(units)) > 1:
        return _share(units, arms, needed, jobs, threads)
    _prepare(threads)
    # Copies, since a unit holds its data as long as it lives.
    return [name for unit in units for name in run_unit(copy(unit), arms, needed)]


def _share(units: Sequence[Unit], arms: Sequence[str], needed: Collection[str], jobs: int, threads: int) -> list[str]:
    # Spawned, since CUDA and the threads of OpenMP do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(units)), context, _begin, (threads,)) as pool:
        try:
            running = {pool.submit(run_unit, unit, arms, needed): unit for unit in units}
            # The pool sees the end only of those processes that had been started when it last got something to do.
            pool.submit(int)
            return [name for done in as_completed(running) for name in _failed(done, running[done])]
        finally:
            # After Ctrl-C or an error nothing is waited for; what is finished is kept. Not terminated, since a Trainer
            # takes that as the end of its fit, after which the next unit would begin.
            for process in multiprocessing.active_children():
                process.kill()


def _failed(done: Future[list[str]], unit: Unit) -> list[str]:
    try:
        return done.result()
    except BrokenProcessPool:
        return [f"{unit.folder.name}: not finished, since a process was killed"]


def _begin(threads: int) -> None:
    """Makes a process one that shares the units: Ctrl-C is left to its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _prepare(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare(threads: int) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
