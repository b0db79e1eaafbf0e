"""When ``at_epoch="auto"`` would have drawn the partition, and what the best epoch would have brought.

On the fits of :mod:`benchmarks.detection`, with a look after each epoch, as if other callbacks acted on the
partition. Parts of training are quarters of a fixed number here; the pairs of the callback differed by at most .001.

    python -m benchmarks.at_epoch --groups small real --seeds 0 --rows rows.jsonl --write at-epoch.md
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.detection import Replay, judged, run_study, study_options
from benchmarks.detection_cases import GROUPS, DetectionCase, fit_of, load
from lightning_unlearn.evidence.early_epochs import MOST_EPOCHS
from lightning_unlearn.evidence.when import EARLIEST, PartitionTime, similarity
from lightning_unlearn.functional import label_margin
from lightning_unlearn.trainer.limits import TrainingLimits

_EVERY = 12  # epoch is looked at up to here, and then those that follow
_LATER = (15, 20, 25, 30, 40)
_CLOSE = 0.01


def gate_messages(replay: Replay, samples: int) -> list[dict[str, Any]]:
    """What the callback would have noted after each epoch.

    Args:
        replay: of a fit.
        samples: for validation.
    """
    found: list[dict[str, Any]] = []
    total, count = torch.zeros(len(replay.label)), torch.zeros(len(replay.label))
    for epoch in range(replay.case.epochs):
        logits = replay.training(epoch)
        drawn = logits.isfinite().all(dim=1)
        margin = label_margin(logits.nan_to_num(), replay.label) * drawn
        before, seen = total / count.clamp(min=1), count > 0
        total, count = total + margin, count + drawn
        note = {"agreement": float((margin[drawn] > 0).double().mean())}
        if seen.any():
            note["similarity"] = similarity(before[seen], (total / count.clamp(min=1))[seen])
        if replay.fit.accuracy:
            accuracy = replay.fit.accuracy[epoch]
            if replay.case.data == "cifar":  # whose validation labels are clean; a user's are as noisy as the rest
                accuracy *= 1 - replay.wrong.double().mean().item()
            note |= {"accuracy": accuracy, "samples": float(samples)}
        found.append({"note": note, "settled": replay.early(epoch + 1).is_settled})
    return found


def chosen(row: dict[str, Any]) -> tuple[int, str]:
    """The epoch after which the partition would have been drawn, and why."""
    when, epochs = PartitionTime("auto"), len(row["notes"])
    for epoch, noted in enumerate(row["notes"], start=1):
        when.note(epoch, **noted["note"])
        limits = TrainingLimits(epoch=epoch, step=epoch, max_epochs=epochs)
        settled = noted["settled"] or epoch >= MOST_EPOCHS
        when.decide(limits, is_settled=settled, is_stopped=False, reduce=lambda part: part)
        if when.epoch is not None:
            return epoch, when.why
    return epochs, "training has ended"


def row_of(case: DetectionCase, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A fit with a look after each epoch."""
    whole = replace(case, judged_after=tuple(range(1, case.epochs + 1)))
    replay, val = Replay(case, fit_of(whole, args.cache, seed, args.data)), load(case.data, args.data, seed).val_y
    row: dict[str, Any] = {"case": case.name, "seed": seed, "rate": replay.wrong.double().mean().item()}
    row["notes"] = gate_messages(replay, 0 if val is None else len(val))
    looked = {e for e in range(EARLIEST, case.epochs + 1) if e <= _EVERY or e in _LATER} | {chosen(row)[0]}
    looks = {epoch: judged(replay, epoch, seed) for epoch in sorted(looked)}
    row["looks"] = {
        str(epoch): {"auroc": look["ours"][0] if "ours" in look else math.nan, "flags": look["flags"]}
        for epoch, look in looks.items()
    }
    return row


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case that is asked for."""
    for seed in args.seeds:
        for case in (case for group in args.groups for case in GROUPS[group]()):
            if re.search(args.only, case.name):
                yield row_of(case, args, seed)


def _cells(row: dict[str, Any]) -> tuple[list[str], float]:
    epoch, why = chosen(row)
    looks = {int(at): look for at, look in row["looks"].items() if int(at) >= EARLIEST}
    best = max(looks, key=lambda at: -1 if math.isnan(looks[at]["auroc"]) else looks[at]["auroc"])
    # Rows may have been made with other settings.
    look = looks[min(looks, key=lambda at: abs(at - epoch))]
    number, precision, recall = look["flags"]
    told = f"{number:.0f}, {precision:.2f}/{recall:.2f}" if number and row["rate"] else f"{number:.0f}"
    cells = [f"{row['case']}, {row['seed']}", f"{100 * row['rate']:.1f}", str(epoch), why.split(",")[0]]
    if not row["rate"]:
        return [*cells, "", "", "", told], 0.0
    behind = look["auroc"] - looks[best]["auroc"]
    return [*cells, f"{look['auroc']:.3f}", f"{looks[best]['auroc']:.3f} ({best})", f"{behind:+.3f}", told], behind


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table and what it comes to."""
    made, lines = [_cells(row) for row in rows], []
    for seed in sorted({row["seed"] for row in rows}):
        behind = [gap for (_, gap), row in zip(made, rows, strict=True) if row["seed"] == seed and row["rate"]]
        close, average = sum(gap >= -_CLOSE for gap in behind), sum(behind) / max(len(behind), 1)
        lines.append(
            f"- Seed {seed}: within {_CLOSE} of the best epoch in {close} of {len(behind)} noisy fits,"
            f" {-average:.4f} behind it on average."
        )
    head = ["case, seed", "wrong %", "epoch", "why", "AUROC", "best (epoch)", "", "suspects, P/R"]
    body = [head, ["---"] * len(head), *(cells for cells, _ in made)]
    return "\n".join([*lines, "", *(f"| {' | '.join(cells)} |" for cells in body), ""])


def main(given: Sequence[str] | None = None) -> None:
    """Judges the fits and prints the table."""
    args = study_options(__doc__, "lightning_unlearn_at_epoch").parse_args(given)
    torch.set_num_threads(1)
    run_study(args, rows_of, lambda row: " ".join(map(str, (row["case"], row["seed"], *chosen(row)))), table)


if __name__ == "__main__":
    main()
