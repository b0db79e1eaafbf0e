"""When the gate of the recipe ``label`` opens: many small fits of scikit-learn's data, with and without wrong labels.

Each fit is judged several times, as if each had been ``at_epoch``: from hardly learned to memorised. On clean data the
gate should stay closed, with wrong labels it should open and the suspects should be right. What is known of the truth
is used for that alone.

    python -m benchmarks.gate                                        # some 15 minutes on one core
    python -m benchmarks.gate --families wine --write gate.md
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_wine, make_classification
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.evidence import evidence_of_logits
from benchmarks.runs import head, where_and_when, write_tables
from benchmarks.sources import digits
from lightning_unlearn.demo import DigitsClassifier
from lightning_unlearn.functional.mixture import no_reduce
from lightning_unlearn.noise import symmetric_labels
from lightning_unlearn.recipes.judges import judge_label

RATES = (0.0, 0.05, 0.15, 0.3, 0.4)


@dataclass(frozen=True)
class Fit:
    """A data set, and how it is learned.

    Args:
        family: its row of the table.
        x: (N, ...) inputs, standardised.
        true_label: (N,) int64.
        network: makes the network.
        num_classes: C.
        batch: samples of a step.
        judged_after: epochs; the last one ends the fit.
        seed: of noise, weights and order.
    """

    family: str
    x: Tensor
    true_label: Tensor
    network: Callable[[], nn.Module]
    num_classes: int
    batch: int
    judged_after: tuple[int, ...]
    seed: int


def mlp(inputs: int, classes: int, *hidden: int) -> nn.Sequential:
    """A multi-layer perceptron."""
    widths = (inputs, *hidden)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _digits() -> Iterator[Fit]:
    source = digits(0)
    for few, after in ((None, (4, 8, 16, 40)), (500, (8, 16, 30, 60)), (200, (8, 16, 30, 60))):
        for seed in (0, 1):
            x, y = source.train[:few], source.true_label[:few]
            name = "digits" if few is None else f"{few} digits"
            yield Fit(name, x, y, DigitsClassifier, 10, 32 if few else 64, after, seed)


def _table(name: str, load: Callable[..., Any], classes: int) -> Iterator[Fit]:
    rows, label = (torch.as_tensor(part) for part in load(return_X_y=True))
    few = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: int(0.7 * len(rows))]
    x = rows[few].float()
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    for seed in range(3):
        yield Fit(
            name, x, label[few], partial(mlp, x.shape[1], classes, 256, 128), classes, 32, (5, 10, 20, 40, 80), seed
        )


def _drawn() -> Iterator[Fit]:
    """From classes that overlap by far to such that hardly do."""
    for classes, total, apart, seed in itertools.product((2, 5, 10), (600, 3000), (0.5, 1.0, 2.0), (0, 1)):
        rows, label = make_classification(
            total,
            n_features=30,
            n_informative=12,
            n_redundant=5,
            n_classes=classes,
            class_sep=apart,
            flip_y=0.0,
            random_state=seed,
        )
        x = torch.from_numpy(rows).float()
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        network = partial(mlp, 30, classes, 128, 64)
        yield Fit(f"drawn, {total}", x, torch.from_numpy(label), network, classes, 64, (4, 8, 16, 40), seed)


FAMILIES: dict[str, Callable[[], Iterator[Fit]]] = {
    "digits": _digits,
    "wine": partial(_table, "wine", load_wine, 3),
    "breast cancer": partial(_table, "breast cancer", load_breast_cancer, 2),
    "drawn": _drawn,
}


def judged(fit: Fit, rate: float) -> Iterator[dict[str, Any]]:
    """What the recipe says after some epochs of a fit with so many wrong labels.

    Args:
        fit: which.
        rate: share of the labels that are wrong.
    """
    label = symmetric_labels(fit.true_label, rate, fit.num_classes, seed=fit.seed) if rate else fit.true_label
    wrong = label != fit.true_label
    torch.manual_seed(fit.seed)
    network = fit.network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    logits: list[Tensor] = []
    for epoch in range(1, fit.judged_after[-1] + 1):
        logits.append(_epoch(network, optimizer, fit, label))
        if epoch not in fit.judged_after:
            continue
        network.eval()
        with torch.no_grad():
            last = network(fit.x)
        verdict = judge_label(evidence_of_logits(logits, last, label), no_reduce)
        suspect = verdict.clean_probability < 0.5
        found = int((suspect & wrong).sum())
        yield {
            "family": fit.family,
            "rate": rate,
            "seed": fit.seed,
            "epoch": epoch,
            "opened": bool(suspect.any()),
            "auroc": float(roc_auc_score(wrong, 1 - verdict.clean_probability)) if rate else None,
            "precision": found / int(suspect.sum()) if suspect.any() else None,
            "recall": found / int(wrong.sum()) if rate and suspect.any() else None,
            "memorised": float((last.argmax(1) == label)[wrong].double().mean()) if rate else None,
        }


def _epoch(network: nn.Module, optimizer: torch.optim.Optimizer, fit: Fit, label: Tensor) -> Tensor:
    """Trains for an epoch and returns what its steps said, (N, C)."""
    said = torch.zeros(len(label), fit.num_classes)
    network.train()
    for rows in torch.randperm(len(label)).split(fit.batch):
        output = network(fit.x[rows])
        said[rows] = output.detach()
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, label[rows]).backward()
        optimizer.step()
    return said


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every family and rate; half of the wrong labels predicted is memorised."""
    lines = [
        "| data | wrong labels | judged | opened | ... when memorised | AUROC of all | precision | recall |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family, rate in dict.fromkeys((row["family"], row["rate"]) for row in rows):
        own = [row for row in rows if (row["family"], row["rate"]) == (family, rate)]
        opened = [row for row in own if row["opened"]]
        late = [row for row in own if row["memorised"] is not None and row["memorised"] >= 0.5]
        of_late = f"{sum(row['opened'] for row in late)} of {len(late)}" if late else ""
        lines.append(
            f"| {family} | {rate:.0%} | {len(own)} | {len(opened)} | {of_late} | {_mean(own, 'auroc')}"
            f" | {_mean(opened, 'precision') if rate else ''} | {_mean(opened, 'recall')} |"
        )
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{sum(values) / len(values):.3f}".lstrip("0") if values else ""


def main(given: Sequence[str] | None = None) -> None:
    """Runs the fits and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="shares of wrong labels")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--write", type=Path, help="file for the table; the numbers go beside it as JSON")
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    of_run = where_and_when("cpu")
    rows = [
        {**row, **of_run}
        for family in args.families
        for rate in args.rates
        for fit in FAMILIES[family]()
        for row in judged(fit, rate)
    ]
    text = head("benchmarks.gate", rows) + table(rows)
    print(text)
    if args.write:
        write_tables(args.write, text, rows)


if __name__ == "__main__":
    main()
