"""Copied and pickled callbacks, as trials of a search and spawned processes get them, do what the originals do."""

import copy
import pickle

import lightning as L
import pytest
import torch

from lightning_unlearn import UnlearnReport
from tests.toys import Blobs, BlobsData, Toy, assert_same_weights, fit, weights
from tests.toys import quick_trio as trio

HOW = {"deep copy": copy.deepcopy, "pickle": lambda made: pickle.loads(pickle.dumps(made))}


def ours(folder):
    callbacks = trio(2, prune={"amount": 0.3}, finetune={"lr": 1e-2, "mode": "full", "on_noisy": "relabel"})
    return [*callbacks, UnlearnReport(dir=str(folder))]


def end_of(callbacks, *others):
    module = Toy()
    fit(module, BlobsData(Blobs(203)), [*callbacks, *others])
    partition, prune, finetune = callbacks[:3]
    # Read, and not fallen back on passes.
    assert partition.collector.reader.reason == ""
    assert finetune.is_active
    return partition.partition.clean_probability, prune.mask.keep, weights(module)


def assert_same_end(one, other):
    for mine, yours in zip(one[:2], other[:2], strict=True):
        assert mine.equal(yours)
    assert_same_weights(one[2], other[2])


class Grabs(L.Callback):
    """Copies the callbacks, the model and the Trainer in the middle of a fit."""

    def __init__(self, how):
        self.how, self.copies, self.models = how, [], []

    def grab(self, trainer, pl_module, *_):
        self.copies.append(self.how(trainer.callbacks[:4]))
        self.models.append(self.how(pl_module))
        self.how(trainer)

    on_train_epoch_start = on_train_end = grab

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.grab(trainer, pl_module)

    def __getstate__(self):
        return {"how": None, "copies": [], "models": []}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    callbacks = ours(tmp_path_factory.mktemp("original"))
    return callbacks, end_of(callbacks)


# Every pair of two of the three.
@pytest.mark.parametrize(
    ("how", "each", "when"),
    [
        ("deep copy", False, "before"),
        ("deep copy", True, "after"),
        ("pickle", False, "after"),
        ("pickle", True, "before"),
    ],
)
def test_a_copy_does_what_the_original_does(original, tmp_path, how, each, when):
    callbacks = ours(tmp_path) if when == "before" else original[0]
    copies = [HOW[how](one) for one in callbacks] if each else HOW[how](callbacks)
    if when == "after":
        assert copies[0].partition.clean_probability.equal(callbacks[0].partition.clean_probability)
    assert_same_end(original[1], end_of(copies))


@pytest.mark.parametrize("how", HOW)
def test_copies_made_in_the_middle_of_a_fit_have_no_part_in_it(original, tmp_path, how):
    grabs = Grabs(HOW[how])
    assert_same_end(original[1], end_of(ours(tmp_path), grabs))
    assert len(grabs.copies) > 8
    for copies in (grabs.copies[0], grabs.copies[3], grabs.copies[-2]):
        assert_same_end(original[1], end_of(copies))
    for model in grabs.models:
        assert model.net(torch.randn(2, 16)).shape == (2, 4)
