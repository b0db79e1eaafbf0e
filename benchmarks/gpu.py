"""What one large GPU is needed for, in at most 8 minutes: tests, what a step costs, and ResNet-18 on all of CIFAR-10.

    benchmarks/gpu.sh --data DIR                    # DIR holds cifar10n.npz; tables go to runs/gpu
    benchmarks/gpu.sh --data DIR --only fits --minutes 30 --epochs 40
    benchmarks/gpu.sh --data DIR --tiny             # the same on a CPU, with little data and small networks

Parts, each of which is written as soon as it is done:

- ``tests``: ``pytest -m gpu``.
- ``attribution``: against inference, as :mod:`benchmarks.attribution`.
- ``steps``: training steps with the callbacks, in float32 and with bf16 and channels last, as :mod:`benchmarks.speed`.
- ``fits``: 40 % wrong by people (CIFAR-10N, "worse"), and 25 % symmetric, for which SAP has published what it comes to:
  all data with cross-entropy, the callbacks by default, new weights on what they kept and on the truly clean set. The
  images lie in the memory of the GPU. A fit that would end too late is left out, by name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import attribution, speed
from benchmarks.arms import Unit
from benchmarks.cases import CASES, Case
from benchmarks.plans import CE, CLEAN, DEFAULT, FRESH, RETRAIN_DEFAULT, Plan, plan_of
from benchmarks.repair_tables import markdown
from benchmarks.runs import fast_precision, head, where_and_when, write_tables
from benchmarks.sources import DATA

PARTS = ("tests", "attribution", "steps", "fits")
ROOT = Path(__file__).resolve().parents[1]
FITS: dict[str, tuple[str, ...]] = {
    "cifar-human-full": (CE, DEFAULT, RETRAIN_DEFAULT, CLEAN),
    "cifar-sym25-full": (CE, DEFAULT, RETRAIN_DEFAULT, CLEAN),
}
"""In the order in which they are run."""
TINY = 300  # images
PUBLISHED = """\
Published for 25 % symmetric, ResNet-18, means of three seeds (Kodge et al. 2024, arXiv 2403.08618): as trained 79.47,
after SAP 85.49, retrained on the truly clean part 92.45.
"""
FAILED = "**Failed**"
Row = dict[str, Any]


def lacking(args: argparse.Namespace) -> list[str]:
    """What is missing, by name."""
    found = []
    if not args.tiny and not torch.cuda.is_available():
        found.append("a GPU (torch.cuda.is_available() is False; --tiny runs on the CPU)")
    if "fits" in args.only and not (args.data / "cifar10n.npz").is_file():
        found.append(f"cifar10n.npz in {args.data} (--data; its arrays are named in benchmarks/sources.py)")
    if "tests" in args.only and not (ROOT / "tests").is_dir():
        found.append(f"the folder tests in {ROOT} (a checkout)")
    return found


def tests(args: argparse.Namespace) -> list[str]:
    """The tests that need CUDA, in a process of their own; without it they are skipped, and the line says so."""
    # By file, since to collect all tests takes longer than to run these.
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-6_000:], done.stderr[-2_000:], flush=True)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:] or ["pytest said nothing"]
    return ["### Tests: `pytest -m gpu`", "", f"{'' if done.returncode == 0 else f'{FAILED}: '}{last[0]}", ""]


def attributions(args: argparse.Namespace) -> list[str]:
    """Attribution against inference, on drawn images."""
    repeats, batch = (1, 8) if args.tiny else (11, 512)
    asked = argparse.Namespace(seed=0, batch=batch, device=args.device, batches=1 if args.tiny else 4, repeats=repeats)
    cases = ["small_cnn"] if args.tiny else list(attribution.CASES)
    found = [attribution.measure(case, asked) for case in cases]
    return ["### Attribution against inference", "", attribution.table(found), ""]


def steps(args: argparse.Namespace) -> list[str]:
    """A training step without callbacks, with callbacks that wait, and with evidence from it."""
    rows: list[Row] = []
    for precision, last in (("32-true", False), ("bf16-mixed", True)):
        asked = argparse.Namespace(
            networks=["digits"] if args.tiny else ["ResNet-18"],
            batch=64 if args.tiny else 512,
            repeats=1 if args.tiny else 5,
            device=args.device,
            precision=fast_precision(precision, "cpu" if args.tiny else "gpu"),
            channels_last=last,
        )
        rows += speed.steps(asked)
    return ["### Training steps", "", speed.tables({"steps": rows})]


def plan(args: argparse.Namespace, case: Case) -> Plan:
    """As that of the large networks, with as many epochs for every arm."""
    return replace(plan_of(case, FRESH), base_epochs=args.epochs, alone_epochs=args.epochs)


def units(args: argparse.Namespace) -> list[Unit]:
    """The noises, each with its folder."""
    cases = [CASES[name] for name in FITS]
    return [
        Unit(
            replace(case, depth=0, train_size=TINY) if args.tiny else case,
            FRESH,
            args.seed,
            folder=args.out / f"{case.name}-{args.epochs}-{args.seed}",
            data=args.data,
            accelerator="cpu" if args.tiny else "gpu",
            fast=args.tiny,
            plan=plan(args, case),
        )
        for case in cases
    ]


def fits(args: argparse.Namespace, deadline: float, rows: list[Row]) -> list[str]:
    """All arms for which there is time; adds to the rows, and returns their table.

    Args:
        args: of the command.
        deadline: on the clock of ``time.perf_counter``.
        rows: of the fits, for the JSON.
    """
    left_out: list[str] = []
    for unit in units(args):
        unit.folder.mkdir(parents=True, exist_ok=True)
        # Read before it is asked whether there is time.
        most = args.epochs * -(-len(unit.data.train) // unit.case.batch)
        for arm in FITS[unit.case.name]:
            # None is longer than that on all the data.
            seconds = max((most * row["seconds"] / row["steps"] for row in rows), default=0.0)
            is_kept = (unit.folder / f"{arm}.json").exists()
            if arm == RETRAIN_DEFAULT and not (unit.folder / f"{DEFAULT}.json").exists():
                left_out.append(f"{unit.case.name}, {arm}: not without the partition")
            elif not is_kept and time.perf_counter() + seconds > deadline:
                left_out.append(f"{unit.case.name}, {arm}: some {seconds:.0f} s more than --minutes {args.minutes:g}")
            else:
                rows.append(unit.result(arm))
                told = f"{100 * rows[-1]['accuracy']:.2f} in {rows[-1]['seconds']:.0f} s"
                print(f"{unit.case.name}: {arm} {told}", flush=True)
    of = f"{TINY} images" if args.tiny else "all"
    text = [f"### Fits of {args.epochs} epochs on {of} of CIFAR-10", "", *_table(args, rows), PUBLISHED]
    return [*text, *(f"- Left out: {what}." for what in left_out), ""]


def _table(args: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    columns = ("noise", "arm", "test accuracy", "AUROC", "precision", "recall", "called wrong", "noise rate, true")
    cells = []
    for row in rows:
        of = row.get("partition", {})
        told = [of.get(name) for name in ("auroc", "precision", "recall", "flagged")]
        cells.append(
            [
                row["case"],
                row["arm"],
                f"{100 * row['accuracy']:.2f}",
                *("" if value is None else f"{value:.3f}" for value in told),
                "" if not of else f"{of['noise_rate']}, {of['true_rate']:.3f}",
                "" if not of else f"{row['partition_epoch']}, {'yes' if row['acted'] else 'no'}",
                str(row["steps"]),
                f"{row['seconds'] / args.epochs:.1f}",
            ]
        )
    return markdown((*columns, "drawn after epoch, acted upon", "steps", "seconds per epoch"), cells)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10n.npz")
    parser.add_argument("--out", type=Path, help="folder of the tables, by default runs/gpu; fits in it are kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--epochs", type=int, help="of every fit; 12 by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no fit is begun that would not end")
    parser.add_argument("--tiny", action="store_true", help="little data and small networks, on the CPU")
    args = parser.parse_args(given)
    args.device = "cpu" if args.tiny else "cuda"
    args.epochs = args.epochs or (4 if args.tiny else 12)
    args.out = args.out or Path("runs", "gpu-tiny" if args.tiny else "gpu")
    return args


def main(given: Sequence[str] | None = None) -> None:
    """Runs what is asked for, prints and writes the tables."""
    args = arguments(given)
    if lacks := lacking(args):
        raise SystemExit("Missing: " + "; ".join(lacks) + ".")
    deadline = time.perf_counter() + 60 * args.minutes
    told = where_and_when("cpu" if args.tiny else "gpu") | {"seed": args.seed}
    rows: list[Row] = []
    text = head("benchmarks.gpu", [told], ("torchvision",))
    parts: dict[str, Callable[[argparse.Namespace], list[str]]] = {
        "tests": tests,
        "attribution": attributions,
        "steps": steps,
        "fits": lambda args: fits(args, deadline, rows),
    }
    for part in args.only:
        started = time.perf_counter()
        with speed.quietly():
            lines = parts[part](args)
        text += "\n".join([*lines, f"{part}: {time.perf_counter() - started:.0f} s.\n\n"])
        write_tables(args.out / "gpu.md", text, rows)
    print(text)
    if FAILED in text:
        raise SystemExit("Tests failed.")


if __name__ == "__main__":
    main()
