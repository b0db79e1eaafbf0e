"""What the callback finds by default, in fits of Lightning, beside other scores of the same fits and beside cleanlab.

    python -m benchmarks.partition                                   # every case with seeds 1, 2 and 3: hours
    python -m benchmarks.partition --seeds 1 --only "digits|hate"    # cases by a regular expression of their names
    python -m benchmarks.partition --peers-only --seeds 1            # what no change of the callback changes
    python -m benchmarks.partition --tables-only --write partition-cpu.md

A row for each case and seed is added to ``OUT/rows.jsonl``; the same command goes on where one was stopped, and several
may run at a time. After a change of the callback name another ``--out``; ``--cache`` keeps what is held against it.
cleanlab is needed: ``pip install cleanlab``. Detectors are compared on kept logits in :mod:`benchmarks.detection`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.measures import flags, ranking
from benchmarks.models import StopAfter
from benchmarks.partition_tables import tables
from benchmarks.peers import OUT_OF_FOLD, SCORES, Recorder, peer
from benchmarks.problems import Problem, problems
from benchmarks.runs import head, where_and_when
from benchmarks.sources import DATA
from lightning_unlearn import AttributionPartitionCallback, Partition

AUTO, SECOND, MIDDLE, END = MOMENTS = ("auto", "second", "middle", "end")


class CountSeconds:
    """Counts the processor seconds of the hooks of a callback; of one that calls another, once.

    Args:
        callback: whose hooks are counted from now on.

    Attributes:
        seconds: so far.
    """

    def __init__(self, callback: L.Callback) -> None:
        self.seconds = 0.0
        self._is_counting = False
        for name in dir(L.Callback):
            if name.startswith("on_") or name in {"setup", "teardown"}:
                setattr(callback, name, self._counted(getattr(callback, name)))

    def _counted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_counting:
                return hook(*args, **kwargs)
            self._is_counting, started = True, time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started
                self._is_counting = False

        return call


def _peak_mib(*, again: bool = False) -> float:
    """Most memory of this process so far; ``again`` forgets what was before, where Linux lets it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if again:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii"))[0]) / 1024


def partition_at(
    problem: Problem, seed: int, moment: str, recorder: Recorder | None = None
) -> tuple[Partition, dict[str, Any]]:
    """The partition that the callback draws in a fit, and what it cost.

    Args:
        problem: which.
        seed: of weights and order.
        moment: one of :data:`MOMENTS`; ``"auto"`` leaves it to the callback, which is told nothing.
        recorder: that reads the same fit.
    """
    others: list[L.Callback] = [] if recorder is None else [recorder]
    if moment == AUTO:
        callback = AttributionPartitionCallback()
    else:
        epochs = {SECOND: 2, MIDDLE: problem.epochs // 2, END: problem.epochs}[moment]
        callback = AttributionPartitionCallback(at_epoch=epochs, dry_run=True)
        others += [StopAfter(epochs)]
    own = CountSeconds(callback)
    L.seed_everything(seed, verbose=False)
    model, before, started = problem.network(), _peak_mib(again=True), time.process_time()
    # The first of all, as a callback of ours may ask the network for something of its own.
    problem.fit(model, problem.loader(sampler=recorder and recorder.sampler), [*others, callback])
    return callback.partition, {
        "seconds": time.process_time() - started,
        "added": own.seconds,
        "mib": _peak_mib() - before,
        "weight": next(model.parameters()).detach().double().sum().item(),
    }


def judged(partition: Partition, bad: Tensor, plain: dict[str, Any]) -> dict[str, Any]:
    """How good a partition is, beside the scores of the network that it has seen."""
    # The order in which a user is shown them.
    position = torch.empty(len(bad))
    position[partition.ranking()] = torch.arange(len(bad)).float()
    row: dict[str, Any] = {
        "epoch": partition.epoch,
        "flags": flags(bad, ~partition.is_clean),
        "stated": partition.expected_precision,
        "rate": partition.noise_rate,
        "interval": partition.noise_rate_interval,
        "warning": partition.warning,
    }
    if bad.any():
        row["ours"] = ranking(bad, -position)
        row["stated_at_depth"] = partition.expected_precision_at(int(bad.sum()))
        row |= {name: ranking(bad, plain[name][partition.epoch - 1]) for name in SCORES}
    return row


def _listed(bad: Tensor, found: dict[str, Any]) -> dict[str, Any]:
    issues = found["cleanlab"]
    row: dict[str, Any] = {"flags": flags(bad, issues["flagged"]), "seconds": found["seconds"]}
    return row | ({"ranks": ranking(bad, issues["score"])} if bad.any() else {})


def row_of(problem: Problem, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """All that is known of a case with a seed."""
    # The folds of a slow case take as long as five fits, and there are no features; its own scores come with its fit.
    names = ["plain", *args.peers]
    if problem.is_slow:
        names = ["folds"] if args.slow_folds else []
    found = {name: peer(name, problem, seed, args.cache) for name in names}
    if args.peers_only:
        return {}
    row: dict[str, Any] = {
        "case": problem.name,
        "seed": seed,
        "noise": problem.noise,
        "named_rate": problem.rate,
        "true_rate": problem.bad.double().mean().item(),
        "samples": len(problem.bad),
        "epochs": problem.epochs,
        "is_slow": problem.is_slow,
    }
    for moment in MOMENTS if not problem.is_slow else (AUTO,):
        if moment != AUTO and moment not in args.moments:
            continue
        recorder = Recorder(problem) if problem.is_slow else None
        partition, cost = partition_at(problem, seed, moment, recorder)
        if recorder is not None:
            found["plain"] = recorder.found(cost["seconds"] - cost["added"])
        row[moment] = judged(partition, problem.bad, found["plain"])
        if moment == AUTO:
            row["cost"] = cost | {"is_same_fit": cost["weight"] == found["plain"].get("weight", cost["weight"])}
    row["peers"] = {name: _listed(problem.bad, value) for name, value in found.items()}
    return row | where_and_when("cpu")


def _known(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _add(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as rows:
        fcntl.flock(rows, fcntl.LOCK_EX)
        rows.write(json.dumps(_rounded(row)) + "\n")


def _rounded(value: Any) -> Any:
    """To five digits, which is what a reader needs."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def run(args: argparse.Namespace) -> None:
    """Adds the rows that are missing."""
    file = args.out / "rows.jsonl"
    for seed in args.seeds:
        for name, make in problems().items():
            if not re.search(args.only, name) or any((r["case"], r["seed"]) == (name, seed) for r in _known(file)):
                continue
            started = time.perf_counter()
            row = row_of(make(seed, args.data), seed, args)
            if row:
                _add(file, row)
            print(f"{name}, {seed}: {time.perf_counter() - started:.0f} s", flush=True)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that names of cases must match")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="0 is the one that was chosen on")
    parser.add_argument(
        "--moments", nargs="*", choices=MOMENTS[1:], default=MOMENTS[1:], help="besides the default one"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data files")
    parser.add_argument("--out", type=Path, default=Path("runs/partition"), help="where rows are kept")
    parser.add_argument("--cache", type=Path, default=Path("runs/partition/peers"))
    parser.add_argument("--peers", nargs="*", choices=OUT_OF_FOLD, default=OUT_OF_FOLD, help="five trainings each")
    parser.add_argument("--slow-folds", action="store_true", help="five folds of the convolutional networks too")
    parser.add_argument("--peers-only", action="store_true", help="fill the cache")
    parser.add_argument("--tables-only", action="store_true", help="of the rows that there are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="file for the tables; the rows go beside it as JSON lines")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Runs what is asked for and prints the tables."""
    args = _arguments(given)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_unlearn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    if not args.tables_only:
        run(args)
    rows = [row for row in _known(args.out / "rows.jsonl") if re.search(args.only, row["case"])]
    order = list(problems())
    rows.sort(key=lambda row: (order.index(row["case"]), row["seed"]))
    if not rows or args.peers_only:
        return
    text = head("benchmarks.partition", rows, ["cleanlab"]) + tables(rows)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
        lines = (json.dumps(row) for row in rows)
        args.write.with_suffix(".jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
