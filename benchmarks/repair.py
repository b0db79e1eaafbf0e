"""What the repair is worth: every way to go on from a network trained on noise, beside the ways to do without it.

A case is taken in two regimes: ``fresh``, where little of the noise has been memorized, and ``memorized``, trained
until the wrong labels are fitted. Each unit (a case in a regime with a seed) has a folder
``runs/repair/CASE-REGIME-SEED`` with a file for every arm; finished arms are kept. The processes of ``--jobs`` share
the units, each taking one that no other is at.

    python -m benchmarks.repair --jobs 2                                 # human noise and spoken digits, seed 0, main
                                                                         # arms: 14 minutes of each of 2 quiet cores
    python -m benchmarks.repair --scale quick                            # features, tables, texts and digits
    python -m benchmarks.repair --scale quick --cases hate --seeds 0     # one case, in both regimes: about a minute
    python -m benchmarks.repair --scale cpu-all --jobs 2                 # nine cases, three seeds, all arms: some hours
    python -m benchmarks.repair --cases spoken-sym40 --regimes memorized --seeds 0 --arms F-FT continue
    python -m benchmarks.repair --scale quick --tables-only --write benchmarks/results/repair-quick-cpu.md
    python -m benchmarks.repair --fast --cases digits-sym40 --seeds 0    # only to see that everything runs
    python -m benchmarks.repair --scale gpu                              # human noise at full size, ResNet-18 and 34

Processor seconds of a seed of ``--scale quick``, fresh + memorized, all arms but ``F-FT start`` and ``weigh`` (of
``results/repair-quick-cpu.json``): features-human40 18 + 32, features-human17 21 + 38, features-human9 22 + 39,
features-sym20 17 + 34, features-clean 19 + 36, music 11 + 18, hate 23 + 32; digits-sym40 17 for the first three
arms, memorized. The five networks of cleanlab, each of four fifths of the data, are not in it. phon-15 and
digits-clean have not been timed. An hour for all three seeds is an estimate. Stopped at any moment, the same command
goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks.arms import Unit
from benchmarks.cases import CASES, DIGITS_CASES, TABLE_CASES, Case
from benchmarks.command import add_run_options, folder_of, run
from benchmarks.plans import (
    ARMS,
    BASE,
    CE,
    CLEANLAB,
    CONTINUE_LONG,
    CONTROLS,
    ELR,
    FFT,
    FRESH,
    KEEP,
    MEMORIZED,
    REGIMES,
    RELABEL,
)
from benchmarks.repair_tables import Results, tables
from benchmarks.sources import DATA

ALL_CASES = CASES | DIGITS_CASES | TABLE_CASES
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
MAIN_ARMS = (BASE, FFT, KEEP, *CONTROLS, RELABEL, "rounds", "rounds + relabel", "oracle", CE, ELR)
# Defaults of the options, by scale.
SCALES = {
    # 27.8 processor minutes in all when last run. The longest units first, so that two jobs
    # end together: 12.3, 8.4, 5.6 and 1.5 minutes.
    "cpu": {
        "cases": ("cifar-human", "spoken-sym40"),
        "regimes": (MEMORIZED, FRESH),
        "arms": (*MAIN_ARMS, CONTINUE_LONG),
        "seeds": [0],
        "accelerator": "cpu",
    },
    # Features, tables, texts and digits.
    "quick": {
        "cases": (*TABLE_CASES, *DIGITS_CASES),
        "regimes": REGIMES,
        "arms": (BASE, FFT, *CONTROLS, KEEP, "F-FT start", "weigh", CLEANLAB),
        "seeds": [0, 1, 2],
        "accelerator": "cpu",
    },
    "cpu-all": {"cases": CPU_TABLE, "regimes": REGIMES, "arms": ARMS, "seeds": [0, 1, 2], "accelerator": "cpu"},
    # With augmentation the base of 85 epochs has memorized too: one regime.
    "gpu": {
        "cases": ("cifar-human-full", "cifar-human-full-34"),
        "regimes": (FRESH,),
        "arms": MAIN_ARMS,
        "seeds": [0, 1, 2],
        "accelerator": "gpu",
    },
}
CPU_TRAIN_SIZE = 10_000  # images of CIFAR-10 that a case of the CPU scale takes


def _case(name: str) -> Case:
    case = ALL_CASES[name]
    return replace(case, train_size=CPU_TRAIN_SIZE) if case.data == "cifar" and not case.large else case


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the files that benchmarks/README.md names")
    parser.add_argument(
        "--scale", choices=SCALES, default="cpu", help="defaults of cases, regimes, arms, accelerator and seeds"
    )
    parser.add_argument("--cases", nargs="+", choices=ALL_CASES, metavar="CASE")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM")
    parser.add_argument("--accelerator")
    add_run_options(parser, seeds=None)
    args = parser.parse_args()
    for name, value in SCALES[args.scale].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    """Runs what is asked for and prints the tables."""
    args = _arguments()
    out = folder_of(args, "repair")
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
    run(args, "benchmarks.repair", units, args.arms, needed=(BASE, FFT), tables=lambda rows: tables(Results(rows)))


if __name__ == "__main__":
    main()
