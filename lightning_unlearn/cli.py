"""The command ``lightning-unlearn``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning_unlearn
from lightning_unlearn.storage import replacing, target_file, target_folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-unlearn", description=lightning_unlearn.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {lightning_unlearn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,fit,report}")
    demo = commands.add_parser(
        "demo",
        help="train on digits with wrong labels, repair, and compare with controls",
        description=(
            "Trains a small network on scikit-learn's digits with 40 %% of the training labels wrong until it has"
            " memorised them, then partitions, prunes and fine-tunes, beside every control. Needs no network."
        ),
    )
    demo.add_argument("--fast", action="store_true", help="one seed instead of five")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="for suspects.csv and report.html (%(default)s)",
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    commands.add_parser(
        "fit",
        add_help=False,
        help="LightningCLI's fit, with the callbacks in the YAML: lightning-unlearn fit --config run.yaml",
    )
    _add_report(commands)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one HTML file of what a fit has found: lightning-unlearn report RUN_DIR",
        description=(
            "Makes report.html from what UnlearnReport has written when a fit ended: summary and advice, noise"
            " estimate, classes, the most suspect samples, curves, neurons, time. One file, which needs no network."
        ),
        epilog=(
            "A run directory comes from the callback UnlearnReport() beside the others, or from lightning-unlearn demo;"
            " a folder with a partition.npz alone gives a report without samples and curves."
        ),
    )
    report.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder, as 'lightning_logs/version_0/unlearn'")
    report.add_argument("--out", type=Path, metavar="FILE", help="the file to write (RUN_DIR/report.html)")
    report.add_argument(
        "--control",
        type=Path,
        metavar="RUN_DIR",
        help="of a fit to compare with, as one with action='report', whose curves are drawn dashed",
    )
    report.add_argument("--open", action="store_true", help="show it in the browser")


def _report(options: argparse.Namespace) -> None:
    from lightning_unlearn.report import RunRecord, write_report

    try:
        record = RunRecord.load(options.run)
        control = None if options.control is None else RunRecord.load(options.control)
        file = write_report(record, options.out or options.run / "report.html", control)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-unlearn report: {error}") from error
    print(file)
    if options.open:
        webbrowser.open(file.resolve().as_uri())


def _fit(arguments: Sequence[str] | None) -> None:
    try:
        import jsonargparse  # noqa: F401  (LightningCLI can be imported without it, but not made)
    except ImportError as error:
        raise ImportError(
            "lightning-unlearn fit needs jsonargparse, which is not installed: pip install 'lightning-unlearn[cli]'."
        ) from error
    from lightning.pytorch.cli import LightningCLI

    # As with `python script.py`: a YAML names the user's own classes, which lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))
    LightningCLI(args=None if arguments is None else list(arguments), parser_kwargs={"prog": "lightning-unlearn"})


def _versions() -> dict[str, str]:
    packages = ("lightning-unlearn", "torch", "lightning", "captum", "torchmetrics", "scikit-learn")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _demo(options: argparse.Namespace) -> None:
    from lightning_unlearn.demo.arms import Settings, run_demo, table

    # Before the work, not after it.
    try:
        out, result_file = target_folder(options.out), None if options.json is None else target_file(options.json)
    except ValueError as error:
        raise SystemExit(f"lightning-unlearn demo: {error}") from error
    settings = Settings(seeds=(0,)) if options.fast else Settings()
    outcomes = run_demo(settings, out)
    print(f"\n{table(settings, outcomes)}\nSuspects: {out / 'suspects.csv'}\nReport: {out / 'report.html'}")
    if result_file is not None:
        result: dict[str, Any] = {
            "settings": asdict(settings),
            "outcomes": [asdict(outcome) for outcome in outcomes],
            "versions": _versions(),
            "machine": platform.machine(),
        }
        with replacing(result_file) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: instead of those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["fit"]:
        # LightningCLI has its own parser, help included, and reads the process's arguments itself.
        _fit(arguments)
        return
    options = _parser().parse_args(given)
    {"demo": _demo, "report": _report}[options.command](options)


if __name__ == "__main__":
    main()
