"""``report``: one HTML file of what a fit has found."""

from __future__ import annotations

import argparse
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.cli._results import run_folder
from lightning_unlearn.utilities.checks import check_whole, reason_of


def add_report(commands: Any) -> None:
    """Add ``report``."""
    report = add_command(
        commands,
        "report",
        "one HTML file of what a fit has found",
        """\
Makes report.html from a run directory: summary and advice, noise estimate, classes, the most suspect samples, curves,
neurons and run times, in one file that works offline. The callback UnlearnReport(), lightning-unlearn partition and the
demo write run directories. A folder with only a partition.npz gives a report without samples and curves.""",
        "lightning-unlearn report lightning_logs/version_0/unlearn --open",
        "lightning-unlearn report runs/repaired --control runs/trained-on --out compared.html",
        "lightning-unlearn report partition --samples 1000 --open",
    )
    report.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="the folder, as lightning_logs/version_0/unlearn, or the one above"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: RUN_DIR/report.html)")
    report.add_argument(
        "--control",
        type=Path,
        metavar="RUN_DIR",
        help=(
            "run directory of a fit to compare with, for example with dry_run=True; its curves are dashed"
            " (default: none)"
        ),
    )
    report.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=(
            "read this many samples from the data and show them instead of those in the run directory, with"
            " the configuration of the fit (default: those of the run directory)"
        ),
    )
    report.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="where --samples finds the data (default: RUN_DIR/config.yaml, as partition writes it)",
    )
    for name, what in (("model", "LightningModule"), ("data", "LightningDataModule")):
        report.add_argument(
            f"--{name}",
            metavar="CLASS",
            help=f"with --config: the {what}, of a YAML of your own LightningCLI script (default: its class_path)",
        )
    report.add_argument("--open", action="store_true", help="show it in the browser (default: no)")


def run_report(options: argparse.Namespace) -> None:
    """Write the report again."""
    from jinja2 import UndefinedError

    from lightning_unlearn.report import RunRecord, write_report

    run = run_folder(options.run)
    if options.samples is None and (options.config or options.model or options.data):
        raise ValueError(
            "--config, --model and --data need --samples N: they describe the data that the samples are read from."
        )
    record = RunRecord.load(run)
    if options.samples is not None:
        record = _with_samples(record, run, options)
    control = None if options.control is None else RunRecord.load(run_folder(options.control))
    try:
        file = write_report(record, options.out or run / "report.html", control)
    except (ArithmeticError, AttributeError, LookupError, TypeError, UndefinedError, ValueError) as error:
        # A folder of others may hold anything where a run's files leave a value open.
        raise ValueError(
            f"Expected {run} to hold a run that UnlearnReport has written, but no report can be made of it"
            f" ({type(error).__name__}: {reason_of(error)}); run the fit again."
        ) from error
    print(file)
    if options.open:
        webbrowser.open(file.resolve().as_uri())


def _with_samples(record: Any, run: Path, options: argparse.Namespace) -> Any:
    """Return the run with other samples, read from the data, and written into its directory."""
    samples = check_whole("--samples", options.samples, least=1)
    config = options.config or run / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"--samples needs the configuration of the fit, but there is no {config}. Pass it with --config"
            " FILE (and --model and --data if it is the YAML of your own LightningCLI script). In Python:"
            f" UnlearnReport(samples={samples})."
        )
    from lightning_unlearn.cli._samples import read_samples

    named = [(f"--{name}", getattr(options, name)) for name in ("model", "data")]
    given = ["--config", str(config), *(part for pair in named if pair[1] is not None for part in pair)]
    gallery = read_samples(given, record, samples)
    record = replace(record, gallery=gallery)
    record.save(run)
    return record
