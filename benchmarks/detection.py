"""The detector of wrong labels on fits whose logits are kept, so that a change of it is judged in seconds a case.

Where it is developed; what users get in a fit: :mod:`benchmarks.partition`, which has the same tables.

    python -m benchmarks.detection --groups small real            # minutes
    python -m benchmarks.detection --groups vision --seeds 1 2 --rows rows.jsonl --write detection.md
    python -m benchmarks.detection --rows rows.jsonl --write detection.md --only-table
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from benchmarks.detection_cases import GROUPS, DetectionCase, Fit, fit_of
from benchmarks.measures import flags, ranking
from benchmarks.partition_tables import FOUND, found_cells, markdown, summary
from benchmarks.sources import DATA
from lightning_unlearn.evidence.early_epochs import MOST_EPOCHS
from lightning_unlearn.functional import label_margin
from lightning_unlearn.functional.leave_one_out import leave_one_out_logits, left_out_rate, objection_to, skill_of
from lightning_unlearn.functional.prequential import PrequentialRate, class_shift, following, prequential_rate
from lightning_unlearn.functional.suspects import expected_precision, longest_list
from lightning_unlearn.recipes.label_evidence import LabelHistory
from lightning_unlearn.recipes.label_noise import LabelNoise, find_label_noise

PHASES = 4
SUSPECT_PRECISION = 0.85  # as by default


class Replay:
    """A fit as the callback would have seen it, in the classes that occur.

    Args:
        case: which.
        fit: what it said.
    """

    def __init__(self, case: DetectionCase, fit: Fit) -> None:
        self.case, self.fit = case, fit
        self.present = torch.unique(fit.label)
        self.label = torch.searchsorted(self.present, fit.label)
        self.wrong = fit.label != fit.truth
        self._early: list[PrequentialRate] = []

    def early(self, epochs: int) -> PrequentialRate:
        """What the earliest epoch says in which the network no longer learns fast."""
        found: PrequentialRate | None = None
        for epoch in range(min(epochs, MOST_EPOCHS)):
            if epoch == len(self._early):
                logits = self.training(epoch)
                drawn = logits.isfinite().all(dim=1)
                position = self.fit.position[epoch].nan_to_num()
                given, seen = (torch.bincount(x, minlength=len(self.present)) for x in (self.label, self.label[drawn]))
                weight = drawn * (given / seen.clamp(min=1))[self.label]
                each = prequential_rate(logits, self.label, position, weight, favored=self.favored(), known=found)
                self._early.append(each)
            found = following(found, self._early[epoch])
            if found.is_confirmed:
                break
        if found is None:
            raise ValueError("Expected a fit of at least one epoch.")
        return found

    def favored(self) -> Tensor | None:
        """What the sampler did, by what it was asked for: the steps of a sample in an epoch are not kept apart."""
        if self.case.loss != "sampler":
            return None
        given = torch.bincount(self.label)
        return -class_shift(given, torch.ones_like(given))

    def with_left_out(self, history: LabelHistory) -> LabelHistory:
        """With what leave-one-out scores of the network's inputs say, where a fit would trust them."""
        if self.fit.inputs is None:
            return history
        ones = torch.ones(len(self.label))
        logits = leave_one_out_logits(self.fit.inputs.float(), self.label, ones, len(self.present))
        rate = left_out_rate(logits, self.label, ones)
        largest = torch.bincount(self.label).max().item() / len(self.label)
        predicted = (history.last.argmax(1) == self.label).double().mean().item()
        validated = None if history.gap is None else skill_of(predicted - history.gap, largest)
        early = history.early.skill if history.early is not None and history.early.is_settled else None
        if not rate.is_settled or objection_to(rate, skill_of(predicted, largest), validated, early):
            return history
        return replace(history, left_out=rate, left_out_logits=logits.float())

    def training(self, epoch: int) -> Tensor:
        """(N, C) of an epoch's steps."""
        return self.fit.training[epoch][:, self.present].float()

    def last(self, epochs: int) -> Tensor:
        """(N, C) of a pass after so many epochs."""
        return self.fit.last[epochs][:, self.present].float()

    def history(self, epochs: int) -> LabelHistory:
        """What is known after so many epochs."""
        parts: list[list[Tensor]] = [[] for _ in range(PHASES)]
        for epoch in range(epochs):
            parts[epoch * PHASES // epochs].append(self.training(epoch))
        phases = torch.stack([torch.stack(part).nanmean(dim=0) for part in parts if part], dim=1)
        last, gap = self.last(epochs), None
        if self.fit.accuracy:
            validation = self.fit.accuracy[epochs - 1]
            if self.case.data == "cifar":  # whose validation labels are clean; a user's are as noisy as the rest
                validation *= 1 - self.wrong.double().mean().item()
            gap = (last.argmax(1) == self.label).double().mean().item() - validation
        history = LabelHistory(phases, last, self.label, torch.ones(len(last)), self.early(epochs), gap)
        return replace(history, favored=self.favored())

    def peers(self, epochs: int) -> dict[str, Tensor]:
        """Scores of the same fit, the higher the more suspect."""
        last = self.last(epochs)
        each = [self.training(epoch) for epoch in range(epochs)]
        margins = torch.stack([label_margin(torch.where(x.isfinite(), x, last), self.label) for x in each])
        loss = torch.nn.functional.cross_entropy(last, self.label, reduction="none")
        return {"aum": -margins.mean(dim=0), "loss": loss, "margin": -label_margin(last, self.label)}


def judged(replay: Replay, epochs: int, seed: int, *, features: bool = False) -> dict[str, Any]:
    """A row, as of :mod:`benchmarks.partition`: what is found after so many epochs."""
    started = time.process_time()
    replay.early(epochs)
    history = replay.history(epochs)
    if features:
        history = replay.with_left_out(history)
    found: LabelNoise = find_label_noise(history)
    ones = torch.ones(len(found.wrong))
    suspect, stated = longest_list(found.wrong, ones, SUSPECT_PRECISION)
    suspect &= found.status in {"found", "weak"}
    seconds = time.process_time() - started
    wrong, case = replay.wrong, replay.case
    at: dict[str, Any] = {
        "epoch": epochs,
        "flags": flags(wrong, suspect),
        "stated": stated if suspect.any() else None,
        "rate": found.rate,
        "interval": found.interval,
    }
    if wrong.any():
        at["ours"] = ranking(wrong, found.wrong)
        at["stated_at_depth"] = expected_precision(found.wrong, ones).at_depth([int(wrong.sum())])[0]
        at |= {name: ranking(wrong, score) for name, score in replay.peers(epochs).items()}
    return {
        "case": case.name,
        "seed": seed,
        "noise": case.noise,
        "named_rate": case.rate,
        "true_rate": wrong.double().mean().item(),
        "samples": len(wrong),
        "epochs": case.epochs,
        "is_slow": False,
        "peers": {},
        "auto": at,
        "status": f"{found.status}{' S' if found.structured else ''} {found.z:.1f}",
        "seconds": [sum(replay.fit.seconds[:epochs]), seconds],
    }


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every judgment of every case."""
    for seed in args.seeds:
        for case in (case for group in args.groups for case in GROUPS[group]()):
            if not re.search(args.only, case.name):
                continue
            replay = Replay(case, fit_of(case, args.cache, seed, args.data))
            for epochs in case.judged_after:
                yield judged(replay, epochs, seed, features=args.features)


def _cells(row: dict[str, Any]) -> list[str]:
    seconds = " ".join(f"{value:.1f}" for value in row["seconds"])
    return [f"{row['case']}, {row['seed']}", *found_cells(row, row["auto"]), row["status"], seconds]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What it comes to, and the table."""
    return "\n".join(
        [*summary(rows), *markdown(("case, seed", *FOUND, "status z", "s: fit, judging"), map(_cells, rows))]
    )


def study_options(about: str | None, cache: str) -> argparse.ArgumentParser:
    """The options of a study of kept fits.

    Args:
        about: its docstring.
        cache: the name of the folder that its fits are kept in by default.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["small", "real", "vision"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", default="", help="a regular expression that names of cases must match")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / cache)
    parser.add_argument("--rows", type=Path, help="JSON lines that rows are added to")
    parser.add_argument("--only-table", action="store_true", help="of the rows that there are")
    parser.add_argument("--write", type=Path)
    return parser


def run_study(
    args: argparse.Namespace,
    rows_of: Callable[[argparse.Namespace], Iterator[dict[str, Any]]],
    shown: Callable[[dict[str, Any]], str],
    table: Callable[[Sequence[dict[str, Any]]], str],
) -> None:
    """Makes rows, keeps them, and prints and writes their table.

    Args:
        args: of :func:`study_options`.
        rows_of: makes them.
        shown: of a row, while it runs.
        table: of all.
    """
    rows = []
    for row in () if args.only_table else rows_of(args):
        print(shown(row), flush=True)
        rows.append(row)
        if args.rows:
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if args.rows:
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    text = table(rows)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    """Judges the fits and prints the table."""
    parser = study_options(__doc__, "lightning_unlearn_detection")
    parser.add_argument("--features", action="store_true", help="with leave-one-out scores of the networks' inputs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    run_study(args, rows_of, lambda row: f"| {' | '.join(_cells(row))} |", table)


if __name__ == "__main__":
    main()
