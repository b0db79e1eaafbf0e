"""A model with more outputs than there are classes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.toys import CLASSES, FEATURES, Blobs, Toy, auroc, fit, partition_callback

OUTPUTS = 300


def wide(outputs=OUTPUTS):
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, outputs))


def judged(data, outputs=OUTPUTS, **kwargs):
    partition = partition_callback(at_epoch=6, dry_run=True, **kwargs)
    fit(Toy(lambda: wide(outputs)), DataLoader(data, 32, shuffle=True), [partition], max_epochs=6)
    return partition.partition


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_outputs_that_no_label_names_make_nothing_suspect(evidence):
    assert judged(Blobs(400, 0), evidence_from=evidence).is_clean.all()


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_wrong_labels_are_found_among_many_outputs_and_only_classes_that_occur_are_suggested(evidence):
    data = Blobs(400)
    found = judged(data, evidence_from=evidence)
    assert auroc(1 - found.clean_probability, data.wrong) > 0.97
    assert data.wrong[~found.is_clean].float().mean() > 0.9
    assert (~found.is_clean).sum() > 0.8 * data.wrong.sum()
    assert (found.suggested_label < CLASSES).all()


@pytest.mark.parametrize("recipe", ["aum", "argmax", "loss"])
def test_baselines_suggest_only_classes_that_occur(recipe):
    data = Blobs(200)
    data.y[:2], data.clean[:2] = 250, 250  # two samples of a class that the network never predicts
    assert torch.isin(judged(data, recipe=recipe).suggested_label, torch.tensor([0, 1, 2, 3, 250])).all()
