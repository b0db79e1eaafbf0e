"""Batches of other kinds: each is read as the model takes it, or refused with the line to write."""

import dataclasses
from collections import UserDict, namedtuple

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback
from tests.toys import CLASSES, FEATURES, Blobs, fit

SIZE = 48
Row = namedtuple("Row", ["image", "target", "path"])


class Encoding(UserDict):
    """As Hugging Face's BatchEncoding."""

    def to(self, device):
        return self


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    extra: torch.Tensor
    y: torch.Tensor


class Net(L.LightningModule):
    """Takes a batch as ``given`` says in training, and what ``takes`` says in ``forward``."""

    def __init__(self, takes, given):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.rnn = nn.GRU(FEATURES, FEATURES, batch_first=True)
        self.emb = nn.EmbeddingBag(60, FEATURES)
        self.given = given
        self.forward = takes.__get__(self)

    def training_step(self, batch):
        x, y = self.given(batch)
        return cross_entropy(self(*x), y.flatten().long())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(self, image):
    return self.net(image)


def whole(self, batch):
    return self.net(batch["input_ids"] + 0 * batch["labels"].unsqueeze(1))


def of_dict(self, inputs):
    return self.net(inputs["input_ids"])


def of_pair(self, batch):
    return self.net(batch[0])


def of_ids(self, input_ids, labels=None):
    return self.net(input_ids)


def of_two(self, ids, mask):
    return self.net(ids * mask)


def of_packed(self, packed):
    return self.net(self.rnn(packed)[1][-1])


def of_bag(self, text, offsets):
    return self.net(self.emb(text, offsets))


def paths(y):
    return [f"{at}.png" for at in range(len(y))]


CASES = {
    "a path in the dict": (
        lambda x, y: {"x": x, "label": y, "path": paths(y)},
        plain,
        lambda b: ((b["x"],), b["label"]),
    ),
    "paths last": (lambda x, y: (x, y, paths(y)), plain, lambda b: ((b[0],), b[1])),
    "a dict of more last": (lambda x, y: (x, y, {"id": y + 1}), plain, lambda b: ((b[0],), b[1])),
    "a dict of targets": (lambda x, y: (x, {"boxes": x, "labels": y}), plain, lambda b: ((b[0],), b[1]["labels"])),
    "nested": (
        lambda x, y: {"inputs": {"ids": x, "mask": x * 0 + 1}, "meta": {"label": y}},
        of_two,
        lambda b: (b["inputs"].values(), b["meta"]["label"]),
    ),
    "the whole batch": (lambda x, y: {"input_ids": x, "labels": y}, whole, lambda b: ((b,), b["labels"])),
    "a dict of one input": (lambda x, y: {"input_ids": x, "labels": y}, of_dict, lambda b: ((b,), b["labels"])),
    "the whole pair": (lambda x, y: (x, y), of_pair, lambda b: ((b,), b[1])),
    "named tuple": (lambda x, y: Row(x, y, paths(y)), plain, lambda b: ((b.image,), b.target)),
    "dataclass": (lambda x, y: Record(x, y // 2, y), plain, lambda b: ((b.x,), b.y)),
    "encoding": (lambda x, y: Encoding(input_ids=x, labels=y), of_ids, lambda b: ((b["input_ids"],), b["labels"])),
    "labels first": (lambda x, y: (y, x), plain, lambda b: ((b[1],), b[0])),
    "uint8": (lambda x, y: (x, y.to(torch.uint8)), plain, lambda b: ((b[0],), b[1])),
    "int32 column": (lambda x, y: (x, y.int().unsqueeze(1)), plain, lambda b: ((b[0],), b[1])),
    "packed": (
        lambda x, y: (pack_sequence([row.expand(1 + at % 3, -1) for at, row in enumerate(x)], enforce_sorted=False), y),
        of_packed,
        lambda b: ((b[0],), b[1]),
    ),
    "labels, text, offsets": (
        lambda x, y: (y, (y.repeat_interleave(2) * 9), 2 * torch.arange(len(y))),
        of_bag,
        lambda b: ((b[1], b[2]), b[0]),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_batches_are_read_as_the_model_takes_them(case, on_noisy):
    collate, takes, given = CASES[case]
    data = Blobs(SIZE)
    loader = DataLoader(
        data,
        8,
        shuffle=True,
        collate_fn=lambda rows: collate(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])),
    )
    partition = AttributionPartitionCallback(at_epoch=1, recipe="aum")
    fit(Net(takes, given), loader, [partition, CleanSubsetFinetuneCallback(on_noisy=on_noisy)], max_epochs=2)
    assert partition.partition.label.equal(data.y)
