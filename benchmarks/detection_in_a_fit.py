"""What the callback finds by default: the cases of :mod:`benchmarks.detection`, in fits of Lightning.

python -m benchmarks.detection_in_a_fit --seeds 3 --write detection-in-a-fit.md
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.detection_cases import GROUPS, DetectionCase, Source, _loss, _network, load, noisy_labels
from benchmarks.sources import DATA
from lightning_unlearn import AttributionPartitionCallback, Partition

NAMES = (
    r"cifar (linear|mlp) (clean|symmetric 0.01|symmetric 0.03|symmetric 0.1|human 0.09|next 0.2)",
    r"digits wide (clean|symmetric 0.1|next 0.3) 40ep",
    r"(hate text given|music-mv wide given|bank77-10 wide given)",
)


class _Classifier(L.LightningModule):
    def __init__(self, case: DetectionCase, label: Tensor, source: Source) -> None:
        super().__init__()
        self.case = case
        self.network = _network(case.network, source.x.shape[1], source.classes)
        self.loss = _loss(case, label, source.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.case.learning_rate)


def fitted(case: DetectionCase, epochs: int, seed: int, folder: Path) -> tuple[Partition, Tensor, float]:
    """The partition after some epochs of a case, which labels are wrong, and seconds of the fit."""
    source = load(case.data, folder, seed)
    label = noisy_labels(source, case, seed)
    L.seed_everything(seed, verbose=False)
    callback = AttributionPartitionCallback(at_epoch=epochs, action="report")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [DataLoader(TensorDataset(source.x, label), case.batch, shuffle=True)]
    if source.val_x is not None and source.val_y is not None:
        loaders.append(DataLoader(TensorDataset(source.val_x, source.val_y), 500))
    started = time.process_time()
    trainer.fit(_Classifier(case, label, source), *loaders)
    return callback.partition, label != source.truth, time.process_time() - started


def _line(case: DetectionCase, epochs: int, seed: int, folder: Path) -> str:
    partition, wrong, seconds = fitted(case, epochs, seed, folder)
    flagged, number = ~partition.is_clean, int(wrong.sum())
    hit = int((flagged & wrong).sum())
    found = f"{int(flagged.sum())}, {hit / max(int(flagged.sum()), 1):.2f}/{hit / max(number, 1):.2f}"
    expected = getattr(partition, "expected_precision", None)
    interval = getattr(partition, "noise_rate_interval", None)
    ends = "" if interval is None else f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"
    ranks = f"{average_precision_score(wrong, 1 - partition.clean_probability):.3f}" if number else ""
    return (
        f"| {case.name}, {epochs}, {seed} | {100 * wrong.double().mean():.1f} | {found if flagged.any() else '0'}"
        f" | {'' if expected is None else f'{expected:.2f}'} | {100 * partition.noise_rate:.1f}{ends} | {ranks}"
        f" | {seconds:.1f} |"
    )


def lines(only: str, seeds: Sequence[int], folder: Path) -> Iterator[str]:
    """A row for each case that is asked for, judged in the middle of its fit."""
    import re

    for seed in seeds:
        for case in (case for group in ("vision", "small", "real") for case in GROUPS[group]()):
            if re.match(only, case.name) and case.loss == "plain" and not case.outputs:
                epochs = case.judged_after[1]
                yield _line(replace(case, epochs=epochs), epochs, seed, folder)


def main(given: Sequence[str] | None = None) -> None:
    """Fits the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3])
    parser.add_argument("--only", default="|".join(NAMES), help="a regular expression that names of cases must match")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args(given)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    head = "| case, epochs, seed | wrong % | flagged, P/R | expected P | rate % (95 %) | AP | s |\n|" + " --- |" * 7
    print(head, flush=True)
    rows = []
    for line in lines(args.only, args.seeds, args.data):
        print(line, flush=True)
        rows.append(line)
    if args.write:
        args.write.write_text("\n".join([head, *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
