"""Looking at what was found: ``show``, and what the commands share that do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_unlearn.cli._errors import printable
from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.results.finding import epochs_in_words, finding_of
from lightning_unlearn.results.labels import positive_labels
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review_csv import check_undecided
from lightning_unlearn.results.storage import fits

PARTITION, RUN = "partition.npz", "run.json"
OF_VALIDATION = f"validation_{PARTITION}"
# Of --review without a number.
_WORTH = -1


def run_folder(folder: Path) -> Path:
    """Return the run directory, of the logger's folder too, in which it lies by default.

    Args:
        folder: one of the two.
    """
    inner = folder.expanduser() / "unlearn"
    return inner if not (inner.parent / PARTITION).is_file() and (inner / PARTITION).is_file() else folder


def add_show(commands: Any) -> None:
    """Add ``show``."""
    show = add_command(
        commands,
        "show",
        "show a saved partition: noise rate, suspects, and samples worth a look",
        (
            "Prints a partition, and with --csv writes it as a table. PATH is a file of Partition.save, a run"
            " directory, or a\ncheckpoint of a fit that computed a partition."
        ),
        "lightning-unlearn show partition/partition.npz",
        "lightning-unlearn show lightning_logs/version_0/checkpoints/last.ckpt --top 50 --csv suspects.csv",
        "lightning-unlearn show partition --review --csv review.csv",
    )
    show.add_argument("file", type=Path, metavar="FILE", help="partition.npz, a run directory, or a checkpoint")
    show.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write the suspects, and those of --review, to this table (default: none)",
    )
    show.add_argument(
        "--top", type=int, default=10, metavar="N", help="how many of the most suspect to print (default: %(default)s)"
    )
    show.add_argument(
        "--review",
        type=int,
        nargs="?",
        const=_WORTH,
        metavar="K",
        help="how many samples after the suspects to print; without a number, all that are worth a look (default: as"
        " many as --top)",
    )


def run_show(options: argparse.Namespace) -> None:
    """Print a saved partition."""
    partition = _load(options.file)
    if options.csv is not None:
        check_undecided(options.csv)
    names = _class_names(options.file, partition)
    review = partition.worth_review() if options.review == _WORTH else options.review
    print(printable(summary_of(partition, options.top, names, review)))
    if options.csv is not None:
        partition.to_csv(options.csv, review=max(review or 0, 0), class_names=names or None)
        print(f"\nTable: {options.csv}")


def _load(path: Path) -> Partition:
    path = path.expanduser()
    if path.is_dir():
        path = run_folder(path) / PARTITION
    if not path.exists():
        raise ValueError(f"Expected a partition to show, but {path} does not exist.")
    if path.suffix != ".ckpt":
        return Partition.load(path)
    found = partition_state(read_checkpoint(path), path)
    if found is None or found["partition"] is None:
        raise ValueError(
            f"Expected a checkpoint with a partition, but {path} has none. To score its model:"
            f" lightning-unlearn partition --config run.yaml --ckpt_path {path}"
        )
    return held_partition(found["partition"], path)


def _class_names(path: Path, partition: Partition) -> list[str]:
    """Return the class names of a run directory; empty if it is none or does not fit the partition."""
    if partition.class_names:
        return list(partition.class_names)
    path = path.expanduser()
    folder = run_folder(path) if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (PARTITION, OF_VALIDATION):
        return []
    try:
        names = json.loads((folder / RUN).read_text(encoding="utf-8"))["class_names"]
        return list(partition.names_of(names).values()) if names else []
    except (OSError, LookupError, RecursionError, TypeError, ValueError):
        # Names are a help; what the file is broken in, the command report says.
        return []


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content, of which no code is unpickled.

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
    """Return what an AttributionPartitionCallback has left in a checkpoint; None where there was none.

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
    """Return the partition of a checkpoint.

    Raises:
        ValueError: for one that is broken, or of another version, with the name of the file.
    """
    try:
        return Partition.from_state_dict(state)
    except ValueError as error:
        raise ValueError(f"Expected {path} to hold a partition of this version, but: {error}") from error


def summary_of(partition: Partition, top: int = 10, class_names: Sequence[str] = (), review: int | None = None) -> str:
    """Return what a partition says, in a few lines.

    Args:
        partition: what was drawn.
        top: how many of the most suspect samples to list.
        class_names: by label; empty where they are not known.
        review: how many of those that come after the suspects; None for as many as ``top``.
    """
    suspects, others, reasons = partition.suspect_indices(), partition.review_ranking(), partition.reasons()
    counts = {word: reasons.count(word) for word in ("label", "input", "both") if word in reasons}
    why = f" ({', '.join(f'{count:,} for {word}' for word, count in counts.items())})" if counts else ""
    drawn = f"recipe {partition.recipe!r}, {partition.layer}, after {epochs_in_words(partition.epoch)}"
    lines = [f"{len(suspects):,} of {len(partition):,} samples are suspect{why}."]
    if partition.noise_rate_interval is None:
        rate = (
            "Noise rate not known"
            if partition.noise_rate is None
            else f"Estimated noise rate {partition.noise_rate:.1%}"
        )
        lines.append(f"{rate}; {drawn}.")
    else:
        found = f"{finding_of(partition, class_names)}." if len(suspects) else "No list of suspects."
        lines = [f"{found[0].upper()}{found[1:]}", f"{lines[0][:-1]}; {drawn}."]
    if partition.warning:
        lines.append(f"Not to be acted upon: {partition.warning}.")
    first = suspects[: max(top, 0)].tolist()
    then = others[: max(top if review is None else review, 0)].tolist()
    rows = _table(partition, [*first, *then], class_names) if first or then else []
    if first:
        lines += ["", f"The {len(first)} most suspect of {len(suspects):,}:", *rows[: 1 + len(first)]]
    if then:
        title = _review_title(partition, len(then), bool(first))
        lines += ["", f"{title}:", *([] if first else rows[:1]), *rows[1 + len(first) :]]
    return "\n".join(lines)


def _review_title(partition: Partition, shown: int, follow: bool) -> str:
    """Return what the second list is, which may follow one of suspects."""
    worth = partition.worth_review()
    if not follow:
        return f"The {shown} least certain ({worth:,} worth a look)" if worth else f"The {shown} least certain"
    if partition.noise_rate is None or partition.noise_rate_interval is None:
        return f"The {shown} that come next"
    return f"The {shown} that come next ({f'{worth:,}' if worth else 'none of them'} worth a look)"


def _table(partition: Partition, shown: Sequence[int], class_names: Sequence[str]) -> list[str]:
    given, suggested = (_labels(x[list(shown)], class_names) for x in (partition.label, partition.suggested_label))
    probability = [f"{value:.4f}" for value in partition.clean_probability[list(shown)].tolist()]
    reasons, curve = partition.reasons(), partition.precision_curve()
    columns = {
        "index": [str(i) for i in shown],
        **({"file": ["/".join(Path(partition.files[i]).parts[-2:]) for i in shown]} if partition.files else {}),
        "given": given,
        "suggested": suggested,
        **({} if partition.noise_rate is None else {"p(clean)": probability}),
        "reason": [reasons[i] for i in shown],
    }
    if curve is not None:
        place = partition.ranking().argsort()[list(shown)]
        columns |= {
            "rank": [f"{int(at) + 1:,}" for at in place],
            "precision@rank": [f"{value:.0%}" for value in curve[place].tolist()],
        }
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(columns))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _labels(label: torch.Tensor, class_names: Sequence[str]) -> list[str]:
    def name(one: int) -> str:
        return class_names[one] if 0 <= one < len(class_names) else str(one)

    if label.ndim == 2:
        return [" ".join(map(name, row)) or "none" for row in positive_labels(label)]
    return [name(one) for one in label.tolist()]
