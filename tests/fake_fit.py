"""A fit as the steps see it, with a network, a data set, one rank, and no Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn.attribution import ForwardTrace, trace_forward
from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.trainer.context import IndexedBatch
from lightning_unlearn.trainer.limits import TrainingLimits


class FakeFit:
    """What the steps ask of a :class:`~lightning_unlearn.trainer.context.FitContext`; nothing else.

    Args:
        model: the network.
        dataset: of pairs ``(x, y)``.
        batch_size: of the passes.
        source: attributes of the callback that publishes the partition.
    """

    rank, world_size, is_sharded, keyed, device = 0, 1, False, None, torch.device("cpu")
    has_validation_data = validates = hashes_inputs = False

    def __init__(self, model: nn.Module, dataset: Dataset[Any], batch_size: int = 16, **source: Any) -> None:
        self.model, self.task_format = model, TaskFormat()
        self.train_loader = self.scoring_loader = DataLoader(dataset, batch_size=batch_size)
        known = {"dry_run": False, "uses_soft_targets": True, "sample_weight": None, "memorized": None}
        self.source = SimpleNamespace(**{**known, "accuracy_gap": None, **source})
        self.epoch = self.step = 0
        self.limits = TrainingLimits(max_epochs=4)
        self.callbacks: list[Any] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.logged: dict[str, float] = {}
        first = self.rows(torch.arange(batch_size))
        with torch.no_grad():
            self.task_format.infer_task(model(first.x), first.label)

    @property
    def total(self) -> int:
        return len(self.train_loader.dataset)

    def shard(self, total: int) -> tuple[Tensor, Tensor]:
        return shard_indices(total, self.rank, self.world_size)

    def reduce(self, value: Tensor) -> Tensor:
        return value

    def exchange(self, parts: list[Any]) -> list[Any]:
        return parts

    def agree(self, decision: bool, *, of_all: bool) -> bool:
        return decision

    @contextmanager
    def isolated_eval(self, *, keep: bool = True) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def output(self, x: Any) -> Tensor:
        return self.task_format.output(self.model, x)

    def logits(self, x: Any) -> Tensor:
        return self.task_format.logits(self.output(x))

    def rows(self, index: Tensor) -> IndexedBatch:
        """Some samples as one batch."""
        items = [self.train_loader.dataset[i] for i in index.tolist()]
        x, label = (torch.stack([torch.as_tensor(item[at]) for item in items]) for at in (0, 1))
        return IndexedBatch(index, torch.ones(len(index)), x, label)

    def batches(self, loader: DataLoader[Any], title: str, absent: set[int] | None = None) -> Iterator[IndexedBatch]:
        yield from (self.rows(index) for index in torch.arange(self.total).split(loader.batch_size))

    def probe(self) -> tuple[ForwardTrace, IndexedBatch]:
        first = self.rows(torch.arange(self.train_loader.batch_size))
        with self.isolated_eval(), torch.no_grad():
            return trace_forward(self.model, self.output, first.x), first

    def rewrap_ddp(self) -> None: ...

    def log(self, values: dict[str, float]) -> None:
        self.logged |= values
