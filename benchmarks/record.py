"""One training run of a case, and what every method may look at afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.cases import Case, Noisy


class Rows(Dataset[Any]):
    """Tensors that are fetched a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.x[rows].contiguous(memory_format=torch.channels_last), self.y[rows]


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function of :class:`Rows`."""
    return batch


class RememberedShuffle(Sampler[int]):
    """Shuffles, and remembers the last order."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.order = torch.arange(total)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        self.order = torch.randperm(self.total)
        return iter(self.order.tolist())


class Recorder(L.Callback):
    """Keeps the logits of every epoch: those of the training steps, and those of a pass in eval mode after it."""

    def __init__(self, data: Noisy, sampler: RememberedShuffle, epochs: int, batch: int) -> None:
        self.data, self.sampler, self.batch = data, sampler, batch
        shape = (epochs, len(data.train), 10)
        self.train_logits = torch.zeros(shape, dtype=torch.float16)
        self.eval_logits = torch.zeros(shape, dtype=torch.float16)
        self.early = torch.zeros(0)
        self.features = torch.zeros(0)
        self.pass_seconds: list[float] = []
        self._last = torch.zeros(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the logits of the training steps."""

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            self._last = output.detach().float()

        pl_module.head.register_forward_hook(keep)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """By dataset index."""
        index = self.sampler.order[batch_idx * self.batch :][: len(self._last)]
        self.train_logits[trainer.current_epoch, index] = self._last.half().cpu()

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A pass in eval mode."""
        epoch = trainer.current_epoch
        pl_module.eval()
        is_last = epoch == len(self.eval_logits) - 1
        seen: dict[str, list[Tensor]] = {"block0": [], "fc": []}

        def stats(module: Any, inputs: Any, output: Tensor) -> None:
            mean = output.mean(dim=(2, 3), dtype=torch.float32)
            square = output.square().mean(dim=(2, 3), dtype=torch.float32)
            seen["block0"].append(torch.cat([mean, (square - mean**2).clamp(min=0).sqrt()], dim=1).cpu())

        handles = []
        if is_last:
            handles = [
                pl_module.blocks[0].register_forward_hook(stats),
                pl_module.head.register_forward_pre_hook(lambda _, x: seen["fc"].append(x[0].half().cpu())),
            ]
        started = time.perf_counter()
        for first in range(0, len(self.data.train), 500):
            rows = slice(first, first + 500)
            x = self.data.train[rows].to(pl_module.device).contiguous(memory_format=torch.channels_last)
            with trainer.precision_plugin.forward_context():
                self.eval_logits[epoch, rows] = pl_module(x).half().cpu()
        self.pass_seconds.append(time.perf_counter() - started)
        for handle in handles:
            handle.remove()
        if is_last:
            self.early, self.features = torch.cat(seen["block0"]), torch.cat(seen["fc"])
        pl_module.train()


def _trainer(epochs: int, accelerator: str, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
    )


def _network(case: Case) -> L.LightningModule:
    return case.network().to(memory_format=torch.channels_last)


def record(case: Case, data: Noisy, seed: int, file: Path, accelerator: str = "cpu") -> None:
    """Trains the network of the case and writes what was seen, with the truth for evaluation.

    Args:
        case: which.
        data: its data.
        seed: of weights and order.
        file: ``.npz`` to write.
        accelerator: of the Trainer.
    """
    L.seed_everything(seed, verbose=False)
    sampler = RememberedShuffle(len(data.train))
    loader = DataLoader(Rows(data.train, data.given_label), case.batch, sampler=sampler, collate_fn=as_it_is)
    module = _network(case)
    recorder = Recorder(data, sampler, case.epochs, case.batch)
    trainer = _trainer(case.epochs, accelerator, [recorder])
    started = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - started
    tests = DataLoader(Rows(data.test, data.test_label), 500, collate_fn=as_it_is)
    accuracy = trainer.test(module, tests, verbose=False)[0]["test_acc"]
    _write(
        file,
        train_logits=recorder.train_logits.numpy(),
        eval_logits=recorder.eval_logits.numpy(),
        early=recorder.early.numpy(),
        features=recorder.features.numpy(),
        given_label=data.given_label.numpy(),
        true_label=data.true_label.numpy(),
        wrong_label=data.wrong_label.numpy(),
        corrupted=data.corrupted.numpy(),
        seconds=seconds,
        pass_seconds=np.array(recorder.pass_seconds),
        test_accuracy=accuracy,
    )


@torch.no_grad()
def out_of_sample(case: Case, data: Noisy, seed: int, file: Path, folds: int = 5, accelerator: str = "cpu") -> None:
    """Predicted probabilities of every sample by a network that was trained without it, as cleanlab wants them.

    Args:
        case: which.
        data: its data.
        seed: of folds, weights and order.
        file: ``.npz`` to write.
        folds: how many networks to train.
        accelerator: of the Trainer.
    """
    fold = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)) % folds
    probability = torch.zeros(len(data.train), 10)
    started = time.perf_counter()
    for k in range(folds):
        L.seed_everything(seed * folds + k, verbose=False)
        kept, left_out = fold != k, (fold == k).nonzero().flatten()
        rows = Rows(data.train[kept], data.given_label[kept])
        module = _network(case)
        with torch.enable_grad():
            _trainer(case.epochs, accelerator, []).fit(
                module, DataLoader(rows, case.batch, shuffle=True, collate_fn=as_it_is)
            )
        module.to(module.trainer.strategy.root_device).eval()  # a fit leaves it on the CPU
        for part in torch.split(left_out, 500):
            probability[part] = module(data.train[part].to(module.device)).softmax(dim=1).cpu()
    _write(file, probability=probability.numpy(), seconds=time.perf_counter() - started)


def _write(file: Path, **arrays: Any) -> None:
    """Writes a file that is there only when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.rename(file)
