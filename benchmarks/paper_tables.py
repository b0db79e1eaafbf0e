"""The tables of the paper's protocol, with the paper's printed figures beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.paper_arms import ARMS, CRITERIA, INITIAL
from benchmarks.repair_tables import markdown, spread

METRICS = ("accuracy", "precision", "recall", "f1", "top3")
# Of CIFAR-10 (arXiv 2506.11615, MDPI make7030095, the first table), by training images; the seconds are of an A10.
PRINTED: dict[int, dict[str, dict[str, float]]] = {
    50_000: {
        INITIAL: {"accuracy": 0.6944, "precision": 0.6962, "f1": 0.6962, "seconds": 20.48},
        "rlap, L-FT": {"accuracy": 0.7508, "precision": 0.7546, "f1": 0.7500, "seconds": 7.98},
        "rlap, F-FT": {"accuracy": 0.8020, "precision": 0.8075, "f1": 0.8024, "seconds": 14.44},
        "rlap, retrain": {"accuracy": 0.7299, "precision": 0.7450, "f1": 0.7298, "seconds": 15.0},
    },
    25_000: {
        INITIAL: {"accuracy": 0.6196},
        "rlap, L-FT": {"accuracy": 0.6818},
        "rlap, F-FT": {"accuracy": 0.7253},
        "rlap, retrain": {"accuracy": 0.6616},
    },
}
"""What could be had of it; its other rows, the table of pruning and that of speech could not."""

_ABOUT_TIME = (
    "Seconds of an epoch are those on the clock, without partition and pruning, which happen once; processor seconds"
    " hold them too, shared out over the epochs."
)

Row = dict[str, Any]


def printed(arm: str, size: int) -> str:
    """The paper's accuracy, and its other numbers, of an arm of CIFAR-10 with so many training images.

    Example:
        >>> printed("rlap, F-FT", 25_000), printed("auto, F-FT", 25_000)
        ('72.53', '')
    """
    found = PRINTED[size].get(arm, {})
    if not found:
        return ""
    text = f"{100 * found['accuracy']:.2f}"
    rest = [f"{name} {100 * found[key]:.2f}" for name, key in (("P", "precision"), ("F1", "f1")) if key in found]
    if "seconds" in found:
        rest.append(f"{found['seconds']:g} s")
    return f"{text} ({', '.join(rest)})" if rest else text


def _values(rows: Iterable[Row], column: str) -> list[float]:
    return [row[column] for row in rows if row.get(column) is not None]


def _main(rows: Sequence[Row], *, with_printed: bool) -> list[str]:
    names = [name for name in ARMS if not name.startswith("prune ")]
    columns = ["arm", *METRICS, "steps", "s per epoch", "processor s per epoch", "s of partition and pruning"]
    sizes = PRINTED if with_printed else ()
    lines = []
    for name in names:
        of = [row for row in rows if row["arm"] == name]
        if not of:
            continue
        cells = [spread([100 * value for value in _values(of, metric)], 2) for metric in METRICS]
        cells.append(spread(_values(of, "steps"), 0))
        cells += [spread([row[column] / row["epochs"] for row in of], 2) for column in ("seconds", "process_seconds")]
        cells.append(spread([row["partition_seconds"] + row["prune_seconds"] for row in of if "partition" in row], 1))
        lines.append([name, *cells, *(printed(name, size) for size in sizes)])
    return markdown([*columns, *(f"the paper, {size // 1000}k" for size in sizes)], lines)


def _partitions(rows: Sequence[Row]) -> list[str]:
    columns = ("auroc", "flagged", "precision", "recall", "noise_rate", "true_rate")
    lines = []
    for recipe in ("rlap", "auto"):
        of = [row for row in rows if row["arm"] == f"{recipe}, F-FT"]
        if of:
            cells = [spread(_values([row["partition"] for row in of], column), 3) for column in columns]
            lines.append([recipe, *cells, f"{sum(row['acted'] for row in of)} of {len(of)}"])
    return markdown(["recipe", *columns, "acted upon"], lines)


def _pruning(rows: Sequence[Row]) -> list[str]:
    lines = []
    for criterion in CRITERIA:
        both = [[row for row in rows if row["arm"] == f"prune {criterion}, {mode}"] for mode in ("L-FT", "F-FT")]
        if any(both):
            accuracy = [spread([100 * value for value in _values(of, "accuracy")], 2) for of in both]
            lines.append([criterion, *accuracy, spread(_values([*both[0], *both[1]], "pruned"), 0)])
    return markdown(["criterion", "L-FT", "F-FT", "pruned"], lines)


def tables(rows: Sequence[Row]) -> str:
    """All tables in Markdown.

    Args:
        rows: what :meth:`benchmarks.paper_arms.PaperUnit.result` returned.
    """
    lines: list[str] = []
    for key in dict.fromkeys((row["task"], row["noise"], row["train_size"]) for row in rows):
        task, noise, size = key
        of = [row for row in rows if (row["task"], row["noise"], row["train_size"]) == key]
        seeds = ", ".join(map(str, sorted({row["seed"] for row in of})))
        lines += [
            f"## {task}, noise: {noise}, {size:,} training samples, seeds: {seeds}",
            "",
        ]
        lines += ["### Test metrics in per cent, mean ± standard deviation over the seeds", "", _ABOUT_TIME, ""]
        lines += _main(of, with_printed=task == "cifar10" and noise == "paper")
        lines += ["### The partition", "", *_partitions(of)]
        lines += [
            "### What is pruned: accuracy with 40 of 256 of the live neurons gone, on the partition of auto",
            "",
            *_pruning(of),
        ]
    return "\n".join(lines)
