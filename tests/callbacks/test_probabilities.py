"""What training has said of each class, kept for other tools."""

import importlib
import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_unlearn import AttributionPartitionCallback, DataFormat
from tests.callbacks import forked
from tests.toys import CLASSES, FEATURES, Blobs, BlobsData, Toy, fit

SIZE, AT = 101, 4


class Recording(Toy):
    """Keeps the logits of its training steps, by epoch and sample."""

    def __init__(self, data):
        super().__init__(lambda: nn.Sequential(nn.Linear(FEATURES, 20), nn.ReLU(), nn.Linear(20, CLASSES)))
        self.known = {row.numpy().tobytes(): index for index, row in enumerate(data.x)}
        self.logits = torch.zeros(AT, SIZE, CLASSES)

    def training_step(self, batch):
        x, y = batch
        logits = self(x)
        if self.current_epoch < AT:
            index = [self.known[row.numpy().tobytes()] for row in x]
            self.logits[self.current_epoch, index] = logits.detach()
        return cross_entropy(logits, y)


def fitted(**kwargs):
    data = Blobs(SIZE)
    partition = AttributionPartitionCallback(at_epoch=AT, recipe="label", keep_probabilities=True)
    module = Recording(data)
    fit(module, BlobsData(data, batch_size=16), [partition], max_epochs=AT + 1, **kwargs)
    return data, module.logits, partition


def test_they_are_the_softmax_of_the_logits_averaged_over_the_epochs():
    data, logits, partition = fitted()
    assert partition.probabilities.shape == (SIZE, CLASSES)
    torch.testing.assert_close(partition.probabilities, logits.mean(dim=0).softmax(dim=1))
    # Of the label that is right, though the network is fitted to the wrong one.
    assert (partition.probabilities.argmax(dim=1)[data.wrong] == data.clean[data.wrong]).float().mean() > 0.8


def test_cleanlab_takes_them():
    filters = importlib.import_module("cleanlab.filter")
    data, _, partition = fitted()
    issues = filters.find_label_issues(partition.partition.label.numpy(), partition.probabilities.double().numpy())
    found = torch.from_numpy(issues)
    assert data.wrong[found].float().mean() > 0.8
    assert found[data.wrong].float().mean() > 0.7


def test_without_them_it_says_what_to_set():
    partition = AttributionPartitionCallback(at_epoch=2)
    with pytest.raises(RuntimeError, match="set keep_probabilities=True, and read them in the fit that comp"):
        partition.probabilities  # noqa: B018  (a property)
    assert "probabilities" not in AttributionPartitionCallback(keep_probabilities=True).state_dict()


class Many(Toy):
    def __init__(self):
        super().__init__(lambda: nn.Linear(FEATURES, 130))


def one_hot(batch):
    return batch[0], torch.eye(CLASSES)[batch[1]]


@pytest.mark.parametrize(
    ("module", "data", "words"),
    [
        (Many, None, "at most 129 classes, but found 130 classes"),
        (
            Toy,
            DataFormat(task="multilabel", batch_to_xy=lambda batch: (batch[0], torch.eye(CLASSES)[batch[1]])),
            "several",
        ),
    ],
)
def test_where_there_are_none_it_is_refused_before_the_first_step(module, data, words):
    net = module()
    with pytest.raises(ValueError, match=words):
        fit(net, BlobsData(Blobs(SIZE)), [AttributionPartitionCallback(keep_probabilities=True, data=data)])
    assert net.steps == 0


def ranks_keep(folder):
    """What each of two ranks has."""
    _, logits, partition = fitted(devices=2, strategy="ddp")
    rank = int(os.environ["LOCAL_RANK"])
    torch.save({"probabilities": partition.probabilities, "logits": logits}, folder / f"{rank}.pt")


@pytest.mark.ddp
def test_both_ranks_have_those_of_all_samples(tmp_path):
    done = forked.launch(ranks_keep, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one["probabilities"], other["probabilities"])
    # Each has seen its part of every epoch; where both have seen a sample that pads, nearly the same.
    seen = torch.stack([one["logits"], other["logits"]])
    count = (seen != 0).any(dim=3, keepdim=True).sum(dim=0).clamp(min=1)
    wanted = (seen.sum(dim=0) / count).mean(dim=0).softmax(dim=1)
    torch.testing.assert_close(one["probabilities"], wanted, atol=1e-5, rtol=1e-4)
