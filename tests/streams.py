"""Streams of learnable samples with keys, for tests of what has no dataset index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.toys import CLASSES, FEATURES, Blobs, Toy, auroc


def key_of(index: int) -> str:
    """What a sample of :class:`Blobs` is called."""
    return f"blob-{index:04d}"


def index_of(keys: Any) -> Tensor:
    """(n,) int64, which samples of :class:`Blobs` these are."""
    return torch.tensor([int(key.removeprefix("blob-")) for key in keys], dtype=torch.int64)


class Stream(IterableDataset[dict[str, Any]]):
    """The samples of a :class:`Blobs`, in another order in each epoch, split over ranks and workers.

    Args:
        data: where they are from.
        rank: of this process.
        ranks: how many processes.
        shuffle: whether the order is another one each time.
    """

    def __init__(self, data: Blobs, rank: int = 0, ranks: int = 1, *, shuffle: bool = True) -> None:
        self.data, self.rank, self.ranks, self.shuffle = data, rank, ranks, shuffle
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        total = len(self.data) // self.ranks * self.ranks
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        worker = get_worker_info()
        part = order[self.rank :: self.ranks]
        for index in (part if worker is None else part[worker.id :: worker.num_workers]).tolist():
            yield self.item(index)

    def item(self, index: int) -> dict[str, Any]:
        """One sample."""
        return {"key": key_of(index), "x": self.data.x[index], "label": self.data.y[index]}


def narrow_net() -> nn.Module:
    """16 -> 24 -> 4 without batch norm."""
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), nn.Linear(24, CLASSES))


class OfDicts(Toy):
    """Takes batches with names, and remembers which samples it was trained on, and under which labels."""

    def __init__(self, net: Any = narrow_net, optimizer: Any = None) -> None:
        super().__init__(net, optimizer or (lambda module: torch.optim.Adam(module.parameters(), lr=1e-2)))
        self.trained: dict[int, list[tuple[str, int]]] = {}

    def training_step(self, batch: Any) -> Tensor:
        rows = zip(batch["key"], batch["label"].tolist(), strict=True)
        self.trained.setdefault(self.current_epoch, []).extend(rows)
        self.steps_by_epoch[self.current_epoch] = self.steps_by_epoch.get(self.current_epoch, 0) + 1
        return nn.functional.cross_entropy(self(batch["x"]), batch["label"])

    def keys_of(self, epoch: int) -> set[str]:
        """The samples that an epoch was trained on."""
        return {key for key, _ in self.trained[epoch]}


def loader_of(stream: Any, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    """A loader of it."""
    return DataLoader(stream, batch_size=batch_size, **kwargs)


def finds(partition: Any, data: Blobs, keys: Any = None) -> float:
    """How well a partition ranks the wrong labels (AUROC)."""
    index = index_of(partition.keys if keys is None else keys)
    assert partition.label.equal(data.y[index])
    return auroc(1 - partition.clean_probability, data.wrong[index])
