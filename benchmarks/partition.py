"""How well each way of telling wrong samples from right ones does, all on the same training runs.

A run of a case is recorded once (``runs/partition/CASE-SEED.npz``) and every method is judged on the recording, so that
one method can be changed without training again; finished runs are kept. Ours sees what the callback sees: the logits
of the training steps and one pass in eval mode, through the same ``Trajectory`` and recipe.

    python -m benchmarks.partition                                  # everything at CPU scale, some two hours on 2 cores
    python -m benchmarks.partition --cases spoken-sym40 --seeds 0    # one case
    python -m benchmarks.partition --cases cifar-human-full cifar-clean-full --accelerator gpu --folds
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score
from torch import Tensor

from benchmarks.cases import CASES, CPU_CASES, FOLD_CASES, make
from benchmarks.evidence import evidence_of_logits
from benchmarks.record import out_of_sample, record
from benchmarks.sources import DATA
from lightning_unlearn.functional.mixture import no_reduce
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.types import Evidence

# The default of the callback.
PRECISION = 0.85
BASELINES = ("paper", "loss", "loss mixture", "AUM", "argmax", "cleanlab", "cleanlab 5-fold")


@dataclass(frozen=True)
class Answer:
    """What a method says.

    Args:
        score: (N,), higher is cleaner.
        suspect: (N,) bool, at the method's own default cut; None if it has none.
        noise_rate: estimated share that is not clean; None if the method does not estimate it.
    """

    score: np.ndarray
    suspect: np.ndarray | None = None
    noise_rate: float | None = None


def evidence_of(recording: Any, epochs: int | None = None) -> Evidence:
    """The evidence that the callback would have after some of the recorded epochs.

    Args:
        recording: the opened file.
        epochs: how many; by default all. The early layer's response is always that of the last epoch.
    """
    label = torch.from_numpy(recording["given_label"])
    training = torch.from_numpy(recording["train_logits"]).float()
    epochs = epochs or len(training)
    last = torch.from_numpy(recording["eval_logits"][epochs - 1]).float()
    mean, spread = torch.from_numpy(recording["early"]).chunk(2, dim=1)
    return replace(
        evidence_of_logits(training[:epochs], last, label),
        response=torch.stack([mean.norm(dim=1), spread.norm(dim=1)], dim=1),
        rows=_paper_rows(recording, last),
    )


def _paper_rows(recording: Any, last: Tensor) -> Tensor:
    """The paper's attribution at the head's input: the largest gradient over the classes, times the activation.

    The gradient of a linear head is its weight, and the logits are linear in the features, so the weight is what least
    squares makes of the two.
    """
    features = torch.from_numpy(recording["features"]).double()
    with_bias = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    weight = torch.linalg.lstsq(with_bias, last.double(), driver="gelsd").solution[:-1].T
    return (weight.amax(dim=0) * features).abs().float()


def _recipe(name: str, score: Callable[[Evidence], Tensor] | None = None) -> Callable[[Evidence, Any], Answer]:
    def judge(evidence: Evidence, folds: Any) -> Answer:
        verdict = get_recipe(name).judge(evidence, no_reduce)
        probability, suspects = verdict.clean_probability, verdict.suspects(evidence.weight, no_reduce, PRECISION)
        ranked = probability if score is None else score(evidence)
        return Answer(ranked.numpy(), suspects.numpy(), 1 - probability.double().mean().item())

    return judge


def _loss(evidence: Evidence, folds: Any) -> Answer:
    return Answer(-evidence.loss.numpy())


def _cleanlab_on(probability: np.ndarray, label: np.ndarray) -> Answer:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    score = get_label_quality_scores(label, probability, method="normalized_margin")
    suspect = find_label_issues(label, probability, n_jobs=1)
    return Answer(score, suspect, float(suspect.mean()))


def _cleanlab(evidence: Evidence, folds: Any) -> Answer:
    logits = evidence.attribution[:, -1] @ evidence.basis.T
    return _cleanlab_on(logits.softmax(dim=1).double().numpy(), evidence.label.numpy())


def _cleanlab_folds(evidence: Evidence, folds: Any) -> Answer | None:
    return None if folds is None else _cleanlab_on(folds["probability"].astype(np.float64), evidence.label.numpy())


METHODS: dict[str, Callable[[Evidence, Any], Answer | None]] = {
    "paper": _recipe("rlap"),
    "loss": _loss,
    "loss mixture": _recipe("loss"),
    "AUM": _recipe("aum", lambda evidence: evidence.mean_margin),
    "argmax": _recipe("argmax"),
    "cleanlab": _cleanlab,
    "cleanlab 5-fold": _cleanlab_folds,
    "ours": _recipe("auto"),
}


def scores(answer: Answer, bad: np.ndarray) -> dict[str, float | None]:
    """The columns of the table.

    Args:
        answer: of a method.
        bad: (N,) bool, the truth.
    """
    row: dict[str, float | None] = {"noise_rate": answer.noise_rate, "true_rate": float(bad.mean())}
    if bad.any():
        row["auroc"] = float(roc_auc_score(~bad, answer.score))
        row["average_precision"] = float(average_precision_score(bad, -answer.score))
    if answer.suspect is not None:
        row["flagged"] = float(answer.suspect.mean())
        row["kept_purity"] = float((~bad[~answer.suspect]).mean()) if (~answer.suspect).any() else None
        if bad.any():
            precision, recall, f1, _ = precision_recall_fscore_support(
                bad, answer.suspect, average="binary", zero_division=0
            )
            row |= {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return row


def judged(recording: Any, folds: Any) -> dict[str, dict[str, float | None]]:
    """Every method on one recorded run."""
    evidence = evidence_of(recording)
    bad = recording["wrong_label"] | recording["corrupted"]
    table = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        answer = method(evidence, folds)
        if answer is not None:
            table[name] = scores(answer, bad) | {
                "seconds": time.perf_counter() - started,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
    return table


def _run(case: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    file, fold_file = args.out / f"{case}-{seed}.npz", args.out / f"{case}-{seed}-folds.npz"
    wants_folds = case in args.folds and seed in args.fold_seeds and not fold_file.exists()
    if not file.exists() or wants_folds:
        data = make(CASES[case], seed, args.data)
        if not file.exists():
            record(CASES[case], data, seed, file, args.accelerator)
        if wants_folds:
            out_of_sample(CASES[case], data, seed, fold_file, accelerator=args.accelerator)
    recording = np.load(file)
    folds = np.load(fold_file) if fold_file.exists() else None
    result = {
        "case": case,
        "seed": seed,
        "methods": judged(recording, folds),
        "test_accuracy": float(recording["test_accuracy"]),
        "fit_seconds": float(recording["seconds"] - recording["pass_seconds"].sum()),
        "pass_seconds": float(np.median(recording["pass_seconds"])),
        "fold_seconds": None if folds is None else float(folds["seconds"]),
    }
    ours = result["methods"]["ours"]
    print(f"{case} {seed}: ours {ours.get('auroc') or float('nan'):.4f}, flagged {ours['flagged']:.3f}", flush=True)
    return result


def _mean(results: list[dict[str, Any]], case: str, method: str, column: str) -> float | None:
    values = [r["methods"].get(method, {}).get(column) for r in results if r["case"] == case]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def _spread(results: list[dict[str, Any]], case: str, method: str, column: str) -> float:
    values = [r["methods"].get(method, {}).get(column) for r in results if r["case"] == case]
    return float(np.std([value for value in values if value is not None]))


def _cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1) if value < 1 else f"{value:.{digits}f}"


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _auroc_table(results: list[dict[str, Any]], cases: list[str]) -> list[str]:
    rows, kept = [], {name: [] for name in METHODS}
    for case in cases:
        means = {name: _mean(results, case, name, "auroc") for name in METHODS}
        if means["ours"] is None:
            continue
        for name, value in means.items():
            kept[name] += [] if value is None else [value]
        best = max(value for name, value in means.items() if name in BASELINES and value is not None)
        cells = [_cell(means[name], 4) for name in METHODS]
        cells[-1] += f" ± {_spread(results, case, 'ours', 'auroc'):.4f}"
        rows.append([case, *cells, f"{means['ours'] - best:+.4f}"])
    # A mean over fewer cases would not compare.
    full = max(len(values) for values in kept.values())
    rows.append(["**mean**", *(_cell(float(np.mean(v)), 4) if len(v) == full else "" for v in kept.values()), ""])
    return _table(["case", *METHODS, "ours - best baseline"], rows)


def _column_table(results: list[dict[str, Any]], cases: list[str], column: str) -> list[str]:
    names = [name for name in METHODS if any(_mean(results, case, name, column) is not None for case in cases)]
    rows = []
    for case in cases:
        cells = [_cell(_mean(results, case, name, column)) for name in names]
        if any(cells):
            rows.append([case, *cells, _cell(_mean(results, case, "ours", "true_rate"))])
    return _table(["case", *names, "true rate"], rows)


def _detail_table(results: list[dict[str, Any]], cases: list[str]) -> list[str]:
    columns = ["precision", "recall", "f1", "flagged", "kept_purity", "noise_rate", "true_rate"]
    rows = []
    for case in cases:
        own = [result for result in results if result["case"] == case]
        timing = [_cell(float(np.mean([r[key] for r in own])), 1) for key in ("fit_seconds", "pass_seconds")]
        folds = [r["fold_seconds"] for r in own if r["fold_seconds"] is not None]
        cells = [_cell(_mean(results, case, "ours", column)) for column in columns]
        accuracy = _cell(float(np.mean([r["test_accuracy"] for r in own])))
        judge = _cell(_mean(results, case, "ours", "seconds"), 2)
        rows.append([case, accuracy, *cells, *timing, judge, _cell(float(np.mean(folds)), 0) if folds else ""])
    return _table(["case", "test accuracy", *columns, "fit s", "pass s", "judge s", "folds s"], rows)


def tables(results: list[dict[str, Any]]) -> str:
    """The tables in Markdown, means over the seeds."""
    cases = list(dict.fromkeys(result["case"] for result in results))
    lines = ["### AUROC of telling bad samples from good ones", "", *_auroc_table(results, cases)]
    for title, column in (
        ("F1 of the suspects at the default cut", "f1"),
        ("Average precision of the suspects", "average_precision"),
        ("Share of the kept set that is good", "kept_purity"),
        ("Share flagged", "flagged"),
    ):
        lines += [f"### {title}", "", *_column_table(results, cases, column)]
    lines += ["### Ours in detail", "", *_detail_table(results, cases)]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10n.npz and fsdd.zip")
    parser.add_argument("--out", type=Path, default=Path("runs/partition"), help="where runs are kept")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CPU_CASES, metavar="CASE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folds", nargs="*", default=FOLD_CASES, metavar="CASE", help="cases to train five times more")
    parser.add_argument("--fold-seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of the processor")
    parser.add_argument(
        "--write", type=Path, default=None, help="file for the tables; the numbers go beside it as JSON"
    )
    return parser.parse_args()


def main() -> None:
    """Runs what is asked for and prints the tables."""
    args = _arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = [_run(case, seed, args) for case in args.cases for seed in args.seeds]
    packages = ("torch", "lightning", "captum", "scikit-learn", "cleanlab")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = (
        f"{datetime.datetime.now(tz=datetime.timezone.utc).date()}, {platform.processor() or platform.machine()},"
        f" {torch.get_num_threads()} threads, accelerator {args.accelerator}; Python {platform.python_version()},"
        f" {versions}; seeds {args.seeds}, cleanlab's folds on seeds {args.fold_seeds}.\n\n"
    )
    text = head + tables(results)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")
        args.write.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
