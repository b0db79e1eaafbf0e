"""What it costs to have the callbacks in a fit: attribution, training steps, the share of the whole, the mixture.

    python -m benchmarks.speed                                    # everything, some 15 minutes on one quiet core
    python -m benchmarks.speed --only steps share
    python -m benchmarks.speed --device cuda --batch 512          # one GPU, for which nothing was run yet
    python -m benchmarks.speed --write speed.md --json speed.json

All ways are taken in turns within a repeat, in one process, and what counts are the medians over the repeats of the
ratios within a repeat; on a CPU of processor time, since the machine may do other things too. How it grows with
samples, classes, neurons and processes: :mod:`benchmarks.scaling`.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import attribution, mixture
from benchmarks.models import ResNetClassifier, StopAfter, cifar_classifier
from benchmarks.sources import Rows, as_it_is
from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    SensitivityPruneCallback,
)
from lightning_unlearn.demo import DigitsClassifier
from lightning_unlearn.noise import symmetric_labels
from lightning_unlearn.utilities.files import replacing, write_json

_CLASSES = 10
_WARM_UP, _STEPS = 1, 12
Row = dict[str, Any]


def images(total: int, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Images of ten classes that a network can learn, a fifth of them called something else."""
    generator = torch.Generator().manual_seed(0)
    of = torch.randint(_CLASSES, (total,), generator=generator)
    kinds = torch.randn(_CLASSES, channels, size, size, generator=generator)
    x = kinds[of] + 2 * torch.randn(total, channels, size, size, generator=generator)
    return x, symmetric_labels(of, 0.2, _CLASSES, seed=0)


class _Clock(L.Callback):
    """When epochs start and when the last one has ended, the last in the list that looks."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.ended = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads it."""
        self.started.append(seconds_now(pl_module.device))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads it before a partition is computed, since training ends."""
        self.ended = seconds_now(pl_module.device)


def seconds_now(device: torch.device) -> float:
    """Of the processor; with a GPU, on the clock once it is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def processor_clock(device: str) -> Iterator[None]:
    """Within, whoever asks how long something took is told the seconds of the processor, unless there is a GPU."""
    before = time.perf_counter
    try:
        if device == "cpu":
            time.perf_counter = time.process_time
        yield
    finally:
        time.perf_counter = before


def trainer_of(epochs: int, callbacks: list[L.Callback], device: str, precision: Any = "32-true") -> L.Trainer:
    """A Trainer that does nothing but train."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
    )


def _idle() -> list[L.Callback]:
    """Three callbacks that wait: no evidence is gathered in the epochs that are measured."""
    partition = AttributionPartitionCallback(at_epoch=90, recipe="loss")
    return [partition, SensitivityPruneCallback(), CleanSubsetFinetuneCallback()]


def _gathering() -> list[L.Callback]:
    return [AttributionPartitionCallback(at_epoch=90), SensitivityPruneCallback(), CleanSubsetFinetuneCallback()]


WAYS: dict[str, Callable[[], list[L.Callback]]] = {"plain": list, "idle": _idle, "evidence": _gathering}
NETWORKS: dict[str, tuple[Callable[[], L.LightningModule], int, int, int]] = {
    # Network, channels, side of the images, images.
    "small CNN, 3 x 32 x 32": (cifar_classifier, 3, 32, 5_000),
    "digits CNN, 1 x 8 x 8": (DigitsClassifier, 1, 8, 5_000),
    "ResNet-18 for 3 x 32 x 32": (ResNetClassifier, 3, 32, 6_144),
}
LARGE = ("ResNet-18",)  # only where it is asked for


def asked_for(args: argparse.Namespace) -> list[tuple[str, tuple[Callable[[], L.LightningModule], int, int, int]]]:
    """The networks that are measured."""
    return [(name, made) for name, made in NETWORKS.items() if name.split()[0] in args.networks]


def steps(args: argparse.Namespace) -> list[Row]:
    """A training step with the callbacks against one without, by network."""
    found = []
    for name, (network, channels, size, total) in asked_for(args):
        x, y = images(min(total, _STEPS * args.batch), size, channels)
        # Where the network is, so that no step waits for its batch.
        rows = Rows(x.to(args.device), y.to(args.device))
        loader = DataLoader(rows, args.batch, shuffle=True, collate_fn=as_it_is)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(args.repeats):
            for way in list(WAYS)[:: 1 if repeat % 2 == 0 else -1]:
                model = network()
                if args.channels_last:
                    model.to(memory_format=torch.channels_last)
                times[way].append(_step_seconds(model, loader, WAYS[way](), args))
        middle = {
            way: statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True))
            for way, taken in times.items()
        }
        plain = statistics.median(times["plain"])
        of = [name, *([] if args.precision == "32-true" else [args.precision])]
        told = ", ".join([*of, "channels last"] if args.channels_last else of)
        found.append({"network": told, "batch": args.batch, "seconds": plain, "ratio": middle, "all": times})
    return found


def _step_seconds(
    model: L.LightningModule, loader: DataLoader[Any], callbacks: list[L.Callback], args: argparse.Namespace
) -> float:
    clock, epochs = _Clock(), _WARM_UP + 1
    # Of more epochs than are run, so that the partition lies ahead.
    callbacks = [*callbacks, StopAfter(epochs), clock]
    trainer_of(100, callbacks, args.device, args.precision).fit(model, loader)
    return (clock.ended - clock.started[_WARM_UP]) / len(loader)


def share(args: argparse.Namespace) -> list[Row]:
    """Partition and pruning as a share of a fit that has both."""
    found = []
    for name, (network, channels, size, total) in asked_for(args):
        x, y = images(total, size, channels)
        loader = DataLoader(Rows(x, y), args.batch, shuffle=True, collate_fn=as_it_is)
        partition, prune = AttributionPartitionCallback(at_epoch=12), SensitivityPruneCallback()
        callbacks = [partition, prune, CleanSubsetFinetuneCallback()]
        torch.manual_seed(0)
        with processor_clock(args.device):
            started = time.perf_counter()
            trainer_of(16, callbacks, args.device).fit(network(), loader)
            whole = time.perf_counter() - started
        suspects = len(partition.partition.suspect_indices())
        found.append(
            {
                "network": name,
                "images": total,
                "fit": whole,
                "partition": partition.seconds,
                "prune": prune.seconds,
                "suspects": suspects,
            }
        )
    return found


def tables(found: dict[str, Any]) -> str:
    """Markdown of all that was measured."""
    lines: list[str] = []
    if rows := found.get("steps"):
        lines += [
            "| a training step | batch | plain, ms | callbacks that wait | evidence from the steps |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {row['network']} | {row['batch']} | {1000 * row['seconds']:.2f} | x {row['ratio']['idle']:.3f} |"
                f" x {row['ratio']['evidence']:.3f} |"
                for row in rows
            ),
            "",
        ]
    if rows := found.get("share"):
        lines += [
            "| a fit of 12 + 4 epochs | images | seconds | partition | pruning | both, share of the fit | suspects |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(
                f"| {row['network']} | {row['images']:,} | {row['fit']:.1f} | {row['partition']:.2f} |"
                f" {row['prune']:.2f} | {(row['partition'] + row['prune']) / row['fit']:.1%} | {row['suspects']:,} |"
                for row in rows
            ),
            "",
        ]
    if rows := found.get("attribution"):
        lines += [attribution.table(rows), ""]
    return "\n".join(lines)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what Lightning and we say of every one of many fits."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_unlearn")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("steps", "share", "attribution", "mixture")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    networks = [name.split()[0] for name in NETWORKS]
    small = [name for name in networks if name not in LARGE]
    parser.add_argument("--networks", nargs="+", choices=networks, default=small, help="of the steps and the fit")
    parser.add_argument("--precision", default="32-true", help="of the Trainer, for the steps")
    parser.add_argument("--channels-last", action="store_true", help="also of the weights, for the steps")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--write", type=Path, help="the tables as Markdown")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = arguments(given)
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "date": str(datetime.datetime.now(tz=datetime.timezone.utc).date()),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, one thread",
        "versions": {name: version(name) for name in ("torch", "lightning", "captum", "scikit-learn")},
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
    }
    with quietly():
        if "steps" in args.only:
            found["steps"] = steps(args)
        if "share" in args.only:
            found["share"] = share(args)
    if "attribution" in args.only:
        asked = argparse.Namespace(seed=0, batch=None, device=args.device, batches=2, repeats=args.repeats)
        found["attribution"] = [attribution.measure(case, asked) for case in attribution.CASES]
    text = tables(found).strip()
    print(text)
    if "mixture" in args.only:
        found["mixture"] = mixture.compare(device=args.device)
    if args.write:
        with replacing(args.write) as file:
            file.write(f"{text}\n".encode())
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
