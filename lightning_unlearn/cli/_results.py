"""Looking at what was found: ``report`` and ``show``."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_unlearn.arguments import reason_of
from lightning_unlearn.cli._errors import printable
from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.storage import fits
from lightning_unlearn.types import Partition, held_labels

PARTITION = "partition.npz"


def add_report(commands: Any) -> None:
    """Adds ``report``."""
    report = add_command(
        commands,
        "report",
        "one HTML file of what a fit has found",
        """\
Makes report.html from what UnlearnReport has written when a fit ended: summary and advice, noise estimate, classes, the
most suspect samples, curves, neurons, time. One file, which needs no network. A run directory comes from the callback
UnlearnReport() beside the others, from lightning-unlearn partition, or from the demo; a folder with a partition.npz
alone gives a report without samples and curves.""",
        "lightning-unlearn report lightning_logs/version_0/unlearn --open",
        "lightning-unlearn report runs/repaired --control runs/trained-on --out compared.html",
    )
    report.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="the folder, as lightning_logs/version_0/unlearn, or the one above"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: RUN_DIR/report.html)")
    report.add_argument(
        "--control",
        type=Path,
        metavar="RUN_DIR",
        help="of a fit to compare with, as one with action='report', whose curves are drawn dashed (default: none)",
    )
    report.add_argument("--open", action="store_true", help="show it in the browser (default: no)")


def run_report(options: argparse.Namespace) -> None:
    """Writes the report again."""
    from jinja2 import UndefinedError

    from lightning_unlearn.report import RunRecord, write_report

    run = _run_folder(options.run)
    record = RunRecord.load(run)
    control = None if options.control is None else RunRecord.load(_run_folder(options.control))
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


def _run_folder(folder: Path) -> Path:
    """The run directory, of the logger's folder too, in which it lies by default."""
    inner = folder.expanduser() / "unlearn"
    return inner if not (inner.parent / PARTITION).is_file() and (inner / PARTITION).is_file() else folder


def add_show(commands: Any) -> None:
    """Adds ``show``."""
    show = add_command(
        commands,
        "show",
        "what a saved partition says: noise rate, the most suspect samples",
        """\
Prints what a partition says, and with --csv writes it as a table: a file of Partition.save, a run directory, or a
checkpoint of a fit in which the partition was drawn.""",
        "lightning-unlearn show partition/partition.npz",
        "lightning-unlearn show lightning_logs/version_0/checkpoints/last.ckpt --top 50 --csv suspects.csv",
    )
    show.add_argument("file", type=Path, metavar="FILE", help="partition.npz, a run directory, or a checkpoint")
    show.add_argument("--csv", type=Path, metavar="FILE", help="write the suspects to this table (default: none)")
    show.add_argument(
        "--top", type=int, default=10, metavar="N", help="how many of the most suspect to print (default: %(default)s)"
    )


def run_show(options: argparse.Namespace) -> None:
    """Prints a saved partition."""
    partition = _load(options.file)
    print(printable(summary_of(partition, options.top)))
    if options.csv is not None:
        partition.to_csv(options.csv)
        print(f"\nTable: {options.csv}")


def _load(path: Path) -> Partition:
    path = path.expanduser()
    if path.is_dir():
        path = _run_folder(path) / PARTITION
    if not path.exists():
        raise ValueError(f"Expected a partition to show, but {path} does not exist.")
    if path.suffix != ".ckpt":
        return Partition.load(path)
    found = partition_state(read_checkpoint(path), path)
    if found is None or found["partition"] is None:
        raise ValueError(
            f"Expected a checkpoint of a fit in which the partition was drawn, but {path} holds none; judge the model"
            f" in it: lightning-unlearn partition --config run.yaml --ckpt_path {path}"
        )
    return held_partition(found["partition"], path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, of which no code is unpickled.

    Raises:
        ValueError: for what cannot be read so.
    """
    try:
        # Mapped, since mostly only a few entries are looked at.
        content = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # broken, a folder, or more than tensors and plain values, in one of many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"Expected a Lightning checkpoint of tensors and plain values, but {path} cannot be read as one ({reason})."
            " One that holds objects, as of save_hyperparameters(), is read in Python alone:"
            " Trainer.fit(ckpt_path=..., weights_only=False)."
        ) from error
    if not isinstance(content, dict) or not fits(content.get("state_dict"), dict[str, torch.Tensor]):
        raise ValueError(f"Expected a Lightning checkpoint, but {path} has no state_dict.")
    return content


def partition_state(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any] | None:
    """What an AttributionPartitionCallback has left in a checkpoint; None where there was none.

    Raises:
        ValueError: for one that has not the shape of what it leaves.
    """
    states = checkpoint.get("callbacks", {})
    found = states.get("AttributionPartitionCallback") if isinstance(states, dict) else states
    if found is not None and not (isinstance(found, dict) and "partition" in found):
        raise ValueError(
            f"Expected {path} to hold the state of an AttributionPartitionCallback, but it holds a"
            f" {type(found).__name__} in its place; give a checkpoint as Lightning has written it."
        )
    return found


def held_partition(state: Any, path: str | Path) -> Partition:
    """The partition of a checkpoint.

    Raises:
        ValueError: for one that is broken, or of another version, with the name of the file.
    """
    try:
        return Partition.from_state_dict(state)
    except ValueError as error:
        raise ValueError(f"Expected {path} to hold a partition of this version, but: {error}") from error


def summary_of(partition: Partition, top: int = 10, class_names: Sequence[str] = ()) -> str:
    """What a partition says, in a few lines.

    Args:
        partition: what was drawn.
        top: how many of the most suspect samples to list.
        class_names: by label; empty where they are not known.
    """
    suspects, reasons = partition.suspect_indices(), partition.reasons()
    counts = {word: reasons.count(word) for word in ("label", "input", "both") if word in reasons}
    why = f" ({', '.join(f'{count:,} for {word}' for word, count in counts.items())})" if counts else ""
    lines = [
        f"{len(suspects):,} of {len(partition):,} training samples are suspect{why}.",
        f"Estimated noise rate {partition.noise_rate:.1%}; recipe {partition.recipe!r}, {partition.layer}, after"
        f" {partition.epoch} epochs.",
    ]
    if partition.warning:
        lines.append(f"Not to be acted upon: {partition.warning}.")
    title = "most suspect"
    if not len(suspects):
        # The order of a ranking is worth a look even where nothing is sure.
        suspects, title = partition.clean_probability.argsort(stable=True), "least sure all the same"
    shown = suspects[: max(top, 0)].tolist()
    if shown:
        lines += ["", f"The {len(shown)} {title}:", *_table(partition, shown, class_names)]
    return "\n".join(lines)


def _table(partition: Partition, shown: Sequence[int], class_names: Sequence[str]) -> list[str]:
    given, suggested = (_labels(x[list(shown)], class_names) for x in (partition.label, partition.suggested_label))
    probability = [f"{value:.4f}" for value in partition.clean_probability[list(shown)].tolist()]
    reasons = partition.reasons()
    titles = ("index", "given", "suggested", "p(clean)", "reason")
    columns = [[str(i) for i in shown], given, suggested, probability, [reasons[i] for i in shown]]
    rows = [titles, *zip(*columns, strict=True)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(titles))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _labels(label: torch.Tensor, class_names: Sequence[str]) -> list[str]:
    def name(one: int) -> str:
        return class_names[one] if 0 <= one < len(class_names) else str(one)

    if label.ndim == 2:
        return [" ".join(map(name, row)) or "none" for row in held_labels(label)]
    return [name(one) for one in label.tolist()]
