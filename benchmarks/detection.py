"""How well wrong labels are found: ranking, suspects, rate and calibration, beside other scores of the same fits.

Fits are kept in a cache, so that a detector that has changed is judged again in a minute a case.

    python -m benchmarks.detection --groups small real            # minutes
    python -m benchmarks.detection --groups vision --seeds 1 2 --rows rows.jsonl --write detection.md
    python -m benchmarks.detection --rows rows.jsonl --write detection.md --only-table
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from benchmarks.detection_cases import GROUPS, DetectionCase, Fit, fit_of
from benchmarks.sources import DATA
from lightning_unlearn.functional import label_margin
from lightning_unlearn.functional.leave_one_out import leave_one_out_scores
from lightning_unlearn.functional.prequential import PrequentialRate, prequential_rate
from lightning_unlearn.recipes.label_noise import LabelHistory, LabelNoise, find_label_noise

PHASES = 4
DEPTHS = (0.005, 0.01, 0.02, 0.05, 0.1)
_LIKE_LOGITS = 10.0
_PATIENCE = 6  # epochs in which a network that still learns fast is waited for


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
        share = torch.bincount(self.label).double()
        for epoch in range(len(self._early), min(epochs, _PATIENCE)):
            if self._early and self._early[-1].is_settled:
                break
            logits = self.training(epoch)
            drawn = logits.isfinite().all(dim=1)
            position = self.fit.position[epoch].nan_to_num()
            self._early.append(prequential_rate(logits, self.label, position, drawn, share=share))
        return self._early[-1]

    def left_out(self) -> PrequentialRate | None:
        """What leave-one-out scores of the network's inputs say."""
        if self.fit.inputs is None:
            return None
        ones = torch.ones(len(self.label))
        scores = leave_one_out_scores(self.fit.inputs.float(), self.label, ones, len(self.present))
        # From indicators to something like logits, where the search for a temperature starts.
        return prequential_rate(_LIKE_LOGITS * scores, self.label, torch.zeros_like(ones), ones, parts=1)

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
        return LabelHistory(phases, last, self.label, torch.ones(len(last)), self.early(epochs), gap)

    def peers(self, epochs: int) -> dict[str, Tensor]:
        """Scores of the same fit, the higher the more suspect."""
        last = self.last(epochs)
        each = [self.training(epoch) for epoch in range(epochs)]
        margins = torch.stack([label_margin(torch.where(x.isfinite(), x, last), self.label) for x in each])
        loss = torch.nn.functional.cross_entropy(last, self.label, reduction="none")
        return {"aum": -margins.mean(dim=0), "loss": loss, "margin": -label_margin(last, self.label)}


def _scores(wrong: Tensor, score: Tensor) -> list[float]:
    return [float(roc_auc_score(wrong, score)), float(average_precision_score(wrong, score))]


def _flags(wrong: Tensor, flagged: Tensor) -> list[float]:
    hit, number = int((wrong & flagged).sum()), int(flagged.sum())
    return [number, hit / max(number, 1), hit / max(int(wrong.sum()), 1)]


def _cleanlab(replay: Replay, epochs: int) -> Tensor:
    from cleanlab.filter import find_label_issues

    probabilities = replay.last(epochs).softmax(1).numpy()
    return torch.from_numpy(find_label_issues(replay.label.numpy(), probabilities, n_jobs=1))


def _before(replay: Replay, epochs: int) -> Tensor:
    """What the recipe ``label`` flags."""
    from benchmarks.evidence import evidence_of_logits
    from lightning_unlearn.functional.mixture import no_reduce
    from lightning_unlearn.recipes.judges import judge_label

    training = [torch.where(x.isfinite(), x, replay.last(epochs)) for x in map(replay.training, range(epochs))]
    return judge_label(evidence_of_logits(training, replay.last(epochs), replay.label), no_reduce).clean_probability


def judged(replay: Replay, epochs: int, seed: int, *, peers: bool, features: bool = False) -> dict[str, Any]:
    """A row: what is found after so many epochs."""
    started = time.process_time()
    replay.early(epochs)
    history = replay.history(epochs)
    if features:
        history = replace(history, left_out=replay.left_out())
    found: LabelNoise = find_label_noise(history)
    seconds = time.process_time() - started
    wrong, n = replay.wrong, len(replay.label)
    order = found.wrong.argsort(descending=True)
    depths = [max(1, round(share * n)) for share in DEPTHS]
    row: dict[str, Any] = {
        "case": replay.case.name,
        "seed": seed,
        "epochs": epochs,
        "rate": wrong.double().mean().item(),
        "status": found.status,
        "structured": found.structured is not None,
        "z": found.z,
        "found_rate": found.rate,
        "interval": found.interval,
        "flags": _flags(wrong, found.suspect),
        "expected": found.expected,
        "depth_expected": found.precision.at_depth(depths),
        "depth_true": [float(wrong[order[:k]].double().mean()) for k in depths],
        "seconds": seconds,
        "fit_seconds": sum(replay.fit.seconds[:epochs]),
        "gap": history.gap,
    }
    if wrong.any():
        row["ours"] = _scores(wrong, found.wrong)
        row |= {name: _scores(wrong, score) for name, score in replay.peers(epochs).items()}
        row["at_truth"] = float(wrong[order[: int(wrong.sum())]].double().mean())
    if peers:
        row["cleanlab"] = _flags(wrong, _cleanlab(replay, epochs))
        before = _before(replay, epochs)
        row["before"] = _flags(wrong, before < 0.5)
        if wrong.any():
            row["before_ranks"] = _scores(wrong, -before)
    return row


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every judgement of every case; peers that take long only in the middle of the fit."""
    for seed in args.seeds:
        for case in (case for group in args.groups for case in GROUPS[group]()):
            if not re.search(args.only, case.name):
                continue
            replay = Replay(case, fit_of(case, args.cache, seed, args.data))
            for epochs in case.judged_after:
                peers = not args.no_peers and epochs == case.judged_after[1]
                yield judged(replay, epochs, seed, peers=peers, features=args.features)


def _short(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value < 1 else f"{value:.3f}"


def _line(row: dict[str, Any]) -> str:
    def pair(name: str) -> str:
        return "/".join(_short(x) for x in row[name]) if name in row else ""

    def flags(name: str) -> str:
        if name not in row:
            return ""
        number, precision, recall = row[name]
        return f"{number:.0f}, {precision:.2f}/{recall:.2f}" if number else "0"

    low, high = row["interval"]
    held = "+" if low <= row["rate"] <= high else "-"
    ends = f"{100 * row['found_rate']:.1f} ({100 * low:.1f}-{100 * high:.1f}) {held}"
    number = row["flags"][0]
    expected = f"{row['expected']:.2f}" if number else ""
    return (
        f"| {row['case']}, {row['epochs']}, {row['seed']} | {100 * row['rate']:.1f} | {pair('ours')} | {pair('aum')}"
        f" | {pair('loss')} | {pair('margin')} | {row['status']}{' S' if row['structured'] else ''} {row['z']:.1f}"
        f" | {flags('flags')} | {expected} | {ends} | {flags('cleanlab')} | {flags('before')} {pair('before_ranks')}"
        f" | {row['seconds']:.1f} |"
    )


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    noisy, clean = [r for r in rows if "ours" in r], [r for r in rows if "ours" not in r]
    peers = ("aum", "loss", "margin")
    behind = [
        [r["ours"][k] - max(r[name][k] for name in peers) for k in (0, 1)] for r in noisy
    ]  # of AUROC and average precision
    failed = sum(a < -0.005 or p < -0.02 for a, p in behind)
    blind = [r for r in noisy if " symmetric " in r["case"]]
    held = sum(r["interval"][0] <= r["rate"] <= r["interval"][1] for r in blind)
    many = [r for r in noisy if r["flags"][0] >= 50]
    off = [r["flags"][1] - r["expected"] for r in many]
    good = [r for r in noisy if r["flags"][0] and r["flags"][1] >= max(0.6, min(3 * r["rate"], 0.9))]
    lines = [
        f"- {len(noisy)} noisy judgements, {len(clean)} clean ones.",
        f"- Ranking behind the best of AUM, loss and margin by more than .005 AUROC or .02 AP: {failed}; by"
        f" {-sum(a for a, _ in behind) / max(len(behind), 1):.4f} and"
        f" {-sum(p for _, p in behind) / max(len(behind), 1):.4f} on average (negative: ahead).",
        f"- Suspects with precision of .6 and three times the base rate: {len(good)} of {len(noisy)}.",
        f"- The interval holds the rate of symmetric noise in {held} of {len(blind)}.",
        f"- Expected precision of 50 and more suspects: within .1 of the true one, or below it, in"
        f" {sum(x >= -0.1 for x in off)} of {len(off)}; within .1 in {sum(abs(x) <= 0.1 for x in off)}.",
    ]
    if clean:
        most = max(clean, key=lambda r: r["flags"][0])
        acted = sum(r["flags"][0] > 0 and r["status"] == "found" for r in clean)
        named = sum(r["flags"][0] > 0 for r in clean)
        lines.append(
            f"- Clean: suspects in {named} of {len(clean)}, acted upon in {acted}; most: {most['flags'][0]:.0f}"
            f" ({most['case']}, {most['epochs']} epochs)."
        )
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table and what it comes to."""
    head = (
        "| case, epochs, seed | wrong % | ours | AUM | loss | margin | status, z | suspects, P/R | expected"
        " | rate % (95 %) | cleanlab in-sample | before | s |\n|" + " --- |" * 13
    )
    return "\n".join([*_summary(rows), "", head, *map(_line, rows), ""])


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["small", "real", "vision"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", default="", help="a regular expression that names of cases must match")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "lightning_unlearn_detection")
    parser.add_argument("--no-peers", action="store_true", help="without cleanlab and the recipe of before")
    parser.add_argument("--features", action="store_true", help="with leave-one-out scores of the networks' inputs")
    parser.add_argument("--rows", type=Path, help="JSON lines that rows are added to")
    parser.add_argument("--only-table", action="store_true", help="of the rows that there are")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Judges the fits and prints the table."""
    args = _arguments(given)
    torch.set_num_threads(args.threads)
    rows = []
    for row in () if args.only_table else rows_of(args):
        print(_line(row), flush=True)
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


if __name__ == "__main__":
    main()
