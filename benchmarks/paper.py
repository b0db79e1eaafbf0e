"""The paper's protocol on its two tasks: initial model, L-FT, F-FT, retraining, and the controls that it lacks.

Each unit (a task with a noise, a number of training samples and a seed) has a folder below ``runs/paper`` with a file
for every arm; finished arms are kept. The processes of ``--jobs`` share the units, each taking one that no other is at.

    python -m benchmarks.paper --task cifar10 --scale cpu --jobs 2    # some 20 minutes on 2 quiet cores
    python -m benchmarks.paper --task speech --scale cpu --jobs 2
    python -m benchmarks.paper --task cifar10 --scale gpu --data DIR     # DIR: torchvision's folder, or with an .npz
    python -m benchmarks.paper --task speech --scale gpu --data DIR      # DIR: torchaudio's folder
    python -m benchmarks.paper --task cifar10 speech --scale cpu --tables-only --write benchmarks/results/paper-cpu.md
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from benchmarks.command import add_run_options, folder_of, run
from benchmarks.paper_arms import ARMS, INITIAL, LONG, NOISES, PaperUnit, Setting
from benchmarks.paper_tables import tables
from benchmarks.sources import DATA

PAPER_SIZES = (50_000, 25_000, 12_500)
# A subset and fewer epochs; of images the paper's own network, of sounds a convolution with half of the channels.
SCALES: dict[tuple[str, str], list[Setting]] = {
    ("cifar10", "gpu"): [Setting("cifar10", noise, size) for noise in ("paper", "gaussian") for size in PAPER_SIZES],
    ("cifar10", "cpu"): [
        Setting("cifar10", noise, 4_000, base_epochs=20, repair_epochs=10, test_size=4_000)
        for noise in ("paper", "gaussian")
    ],
    ("speech", "gpu"): [Setting("speech", noise, None, precision="32-true") for noise in ("paper", "snr", "symmetric")],
    ("speech", "cpu"): [
        Setting(
            "speech",
            noise,
            None,
            base_epochs=24,
            repair_epochs=12,
            network={"channels": 16},
            precision="32-true",
        )
        for noise in ("paper", "symmetric")
    ],
}
FAST = {"base_epochs": 2, "repair_epochs": 1}


def _data(task: str, data: Path) -> Path:
    """The one file in a folder that holds all of a task, or the folder itself."""
    file = data / {"cifar10": "cifar10n.npz", "speech": "fsdd.zip"}[task]
    return file if file.exists() else data


def _settings(args: argparse.Namespace) -> list[Setting]:
    found: list[Setting] = []
    for task in args.task:
        preset = SCALES[task, args.scale]
        if unknown := set(args.noise or ()) - set(NOISES[task]):
            raise SystemExit(f"{task} has no noise {', '.join(sorted(unknown))}; it has {', '.join(NOISES[task])}.")
        noises = args.noise or list(dict.fromkeys(setting.noise for setting in preset))
        sizes = args.train_sizes or list(dict.fromkeys(setting.train_size for setting in preset))
        more = FAST if args.fast else {}
        found += [
            Setting(**{**vars(preset[0]), "noise": noise, "train_size": size, **more})
            for noise, size in product(noises, sizes)
        ]
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("cifar10", "speech"), required=True)
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="a folder, or the file of the task")
    parser.add_argument("--noise", nargs="+", choices=sorted({*NOISES["cifar10"], *NOISES["speech"]}))
    parser.add_argument("--train-sizes", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    add_run_options(parser, seeds=[0])
    return parser.parse_args()


def main() -> None:
    """Runs what is asked for and prints the tables."""
    args = _arguments()
    out = folder_of(args, f"paper-{args.scale}")
    arms = args.arms or [name for name in ARMS if args.scale == "gpu" or name not in LONG]
    # Seeds outermost, so that a table over all settings is there early.
    units = [
        PaperUnit(
            setting,
            seed,
            folder=out / f"{setting.task}-{setting.noise}-{setting.train_size or 'all'}-{seed}",
            data=_data(setting.task, args.data),
            accelerator=args.scale,
        )
        for seed, setting in product(args.seeds, _settings(args))
    ]
    packages = ("torchvision", "torchaudio", "torchmetrics")
    run(args, "benchmarks.paper", units, arms, needed=(INITIAL,), tables=tables, packages=packages)


if __name__ == "__main__":
    main()
