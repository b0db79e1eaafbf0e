"""What ``judge_validation=True`` finds: a quarter of each set is not trained on, its labels as noisy as the others'.

python -m benchmarks.validation --seeds 1 --write validation-cpu.md
python -m benchmarks.validation --only "hate|phon" --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.detection_cases import DetectionCase, load, noisy_labels
from benchmarks.problems import Classifier
from benchmarks.sources import DATA
from lightning_unlearn import AttributionPartitionCallback, Partition

_NOISE = (
    ("clean", 0.0),
    ("symmetric", 0.01),
    ("symmetric", 0.03),
    ("symmetric", 0.1),
    ("human", 0.09),
    ("human", 0.17),
    ("next", 0.2),
)
CASES = [
    *(DetectionCase("cifar", noise, rate, epochs=5) for noise, rate in _NOISE),
    DetectionCase("hate", "given", 0.1, network="text", epochs=4, learning_rate=3e-3),
    *(DetectionCase(name, "given", 0.1, network="wide", epochs=20) for name in ("phon-5", "phon-15")),
]
_COLUMNS = "| case, seed | samples | wrong % | flagged, P/R | expected P | rate % (95 %) | AP, of the loss | accuracy |"


def judged(case: DetectionCase, seed: int, folder: Path) -> tuple[Partition, Tensor, Tensor]:
    """The partition of the held-out quarter, its true labels, and what the network says of it in the end (n, C)."""
    source = load(case.data, folder, seed)
    label = noisy_labels(source, case, seed)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 4], order[len(order) // 4 :]
    L.seed_everything(seed, verbose=False)
    callback = AttributionPartitionCallback(at_epoch=case.epochs, dry_run=True, judge_validation=True)
    trainer = L.Trainer(
        max_epochs=case.epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = Classifier(case, label[kept], source.x.shape[1], source.classes)
    trainer.fit(
        network,
        DataLoader(TensorDataset(source.x[kept], label[kept]), case.batch, shuffle=True),
        DataLoader(TensorDataset(source.x[held], label[held]), 500),
    )
    with torch.no_grad():
        return callback.validation_partition, source.truth[held], network.eval()(source.x[held])


def line(case: DetectionCase, seed: int, folder: Path) -> str:
    """A row of the table."""
    partition, truth, logits = judged(case, seed, folder)
    label, flagged = partition.label, ~partition.is_clean
    wrong = label != truth
    number, hit = int(flagged.sum()), int((flagged & wrong).sum())
    found = f"{number}, {hit / number:.2f}/{hit / int(wrong.sum()):.2f}" if number and wrong.any() else str(number)
    expected = "" if partition.expected_precision is None else f"{partition.expected_precision:.2f}"
    rate = "" if partition.noise_rate is None else f"{100 * partition.noise_rate:.1f}"
    interval = partition.noise_rate_interval
    ends = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    loss = nn.functional.cross_entropy(logits, label, reduction="none")
    scores = (1 - partition.clean_probability, loss) if wrong.any() else ()
    ranks = ", ".join(f"{average_precision_score(wrong, score):.3f}" for score in scores)
    accuracy = ", ".join(f"{(logits.argmax(1) == of).float().mean():.3f}" for of in (label, truth))
    return (
        f"| {case.name}, {seed} | {len(label)} | {100 * wrong.double().mean():.1f} | {found} | {expected}"
        f" | {rate}{ends} | {ranks} | {accuracy} |"
    )


def main(given: Sequence[str] | None = None) -> None:
    """Fits the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--only", default="", help="a regular expression that is looked for in the names of cases")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args(given)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [_COLUMNS, "|" + " --- |" * (_COLUMNS.count("|") - 1)]
    print(*rows, sep="\n", flush=True)
    for seed in args.seeds:
        for case in (case for case in CASES if re.search(args.only, case.name)):
            rows.append(line(case, seed, args.data))
            print(rows[-1], flush=True)
    if args.write:
        args.write.write_text("\n".join([*rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
