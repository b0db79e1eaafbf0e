"""``demo``: the whole of it on data that come along, beside every control."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.utilities.files import replacing, target_file, target_folder

_PACKAGES = ("torch", "lightning", "captum", "torchmetrics", "scikit-learn")


def add_demo(commands: Any) -> None:
    """Add ``demo``."""
    demo = add_command(
        commands,
        "demo",
        "train on digits with wrong labels, repair, and compare with controls",
        (
            "Trains a small network on scikit-learn's digits with 40 % symmetric label noise until it has"
            " memorized the wrong labels;\nthen the callbacks find them and repair the network, compared with"
            " all controls: continued training, shrinking the\nweights, retraining. Takes about two minutes,"
            " --fast less than one; downloads nothing."
        ),
        "lightning-unlearn demo --fast",
        "lightning-unlearn demo --out runs/demo --json runs/demo/results.json",
    )
    demo.add_argument("--fast", action="store_true", help="one seed instead of three (default: three)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="for suspects.csv and report.html (default: %(default)s)",
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well (default: nowhere)")


def run_demo(options: argparse.Namespace) -> None:
    """Run every arm and print the table."""
    from lightning_unlearn.demo import arms, outcomes
    from lightning_unlearn.results.provenance import versions

    # Before the work, not after it.
    out, result_file = target_folder(options.out), None if options.json is None else target_file(options.json)
    settings = outcomes.Settings(seeds=(0,)) if options.fast else outcomes.Settings()
    measured = arms.run_demo(settings, out)
    print(f"\n{outcomes.table(settings, measured)}\n\nFiles: suspects.csv, report.html in {out}")
    print(f"Next:\n  lightning-unlearn show {out}\n  lightning-unlearn report {out} --open")
    if result_file is not None:
        result: dict[str, Any] = {
            "settings": asdict(settings),
            "outcomes": [asdict(outcome) for outcome in measured],
            "versions": versions(_PACKAGES),
            "machine": platform.machine(),
        }
        with replacing(result_file) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
