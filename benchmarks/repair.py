"""What the repair is worth: every way to go on from a network trained on noise, beside the ways to do without it.

A case is taken in two regimes: ``fresh``, where little of the noise has been memorised, and ``memorised``, trained
until the wrong labels are fitted. Each unit (a case in a regime with a seed) has a folder
``runs/repair/CASE-REGIME-SEED`` with a file for every arm; finished arms are kept. Several processes may be given the
same command: each takes units that no other one is at, and the last one, or ``--tables-only``, has the whole table.

    python -m benchmarks.repair                                          # the CPU table, some two hours on 2 cores if
                                                                         # two processes are given the same command
    python -m benchmarks.repair --cases spoken-sym40 --regimes memorised --seeds 0 --arms F-FT continue
    python -m benchmarks.repair --tables-only --write benchmarks/results/repair-cpu.md
    python -m benchmarks.repair --fast --cases digits-sym40 --seeds 0    # only to see that everything runs
    python -m benchmarks.repair --scale gpu                              # human noise at full size, ResNet-18 and 34
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks.arms import Unit
from benchmarks.cases import CASES, DIGITS_CASES, Case
from benchmarks.plans import ARMS, BASE, CE, CONTINUE, ELR, FFT, FRESH, REGIMES, RELABEL, RETRAIN
from benchmarks.repair_tables import Results, tables
from benchmarks.runs import finished, head, run_unit, write_tables
from benchmarks.sources import DATA

ALL_CASES = CASES | DIGITS_CASES
# In the order of what they tell.
CPU_TABLE = (
    "spoken-sym40",
    "digits-sym40",
    "cifar-human",
    "spoken-asym40",
    "spoken-clean",
    "cifar-clean",
    "digits-clean",
    "spoken-both",
    "cifar-sym40",
)
# Defaults of the options, by scale. With augmentation the base of 85 epochs has memorised too: one regime.
SCALES = {
    "cpu": {"cases": CPU_TABLE, "regimes": REGIMES, "arms": ARMS, "accelerator": "cpu"},
    "gpu": {
        "cases": ("cifar-human-full", "cifar-human-full-34"),
        "regimes": (FRESH,),
        "arms": (BASE, FFT, CONTINUE, RETRAIN, RELABEL, "rounds", "rounds + relabel", "oracle", CE, ELR),
        "accelerator": "gpu",
    },
}
CPU_TRAIN_SIZE = 10_000  # images of CIFAR-10 that a case of the CPU scale takes


def _case(name: str) -> Case:
    case = ALL_CASES[name]
    return replace(case, train_size=CPU_TRAIN_SIZE) if case.data == "cifar" and not case.large else case


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10n.npz and fsdd.zip")
    parser.add_argument("--out", type=Path, default=None, help="where results are kept; by default runs/repair")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="defaults for the next four options")
    parser.add_argument("--cases", nargs="+", choices=ALL_CASES, metavar="CASE")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM")
    parser.add_argument("--accelerator")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of the processor; processor time counts them all")
    parser.add_argument("--fast", action="store_true", help="500 samples and few epochs, to see that everything runs")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--write", type=Path, default=None, help="file for the tables; the numbers go beside it as JSON"
    )
    args = parser.parse_args()
    for name, value in SCALES[args.scale].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    """Runs what is asked for and prints the tables."""
    args = _arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    out = args.out or Path("runs/repair-fast" if args.fast else "runs/repair")
    # Seeds outermost, so that a table over all cases is there early.
    units = [
        Unit(
            _case(name),
            regime,
            seed,
            folder=out / f"{name}-{regime}-{seed}",
            data=args.data,
            accelerator=args.accelerator,
            fast=args.fast,
        )
        for seed, name, regime in product(args.seeds, args.cases, args.regimes)
    ]
    failed = [] if args.tables_only else [name for unit in units for name in run_unit(unit, args.arms, (BASE, FFT))]
    rows = finished(units, args.arms)
    text = head("benchmarks.repair", rows) + tables(Results(rows))
    print(text)
    if args.write:
        write_tables(args.write, text, rows)
    if failed:
        raise SystemExit("Failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
