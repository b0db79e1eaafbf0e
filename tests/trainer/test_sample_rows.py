"""A row of an activation, or of logits, is taken for a sample only where it is one."""

import pytest
import torch
from torch import nn

from lightning_unlearn import AttributionPartitionCallback, SensitivityPruneCallback
from tests.toys import CLASSES, Blobs, BlobsData, Toy, fit, partition_callback

STEPS = 4


class Steps(nn.Module):
    """Four steps of four features, with the steps first inside, or folded into the rows, or the samples sorted."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inp, self.mid, self.head = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x):
        h = x.view(-1, STEPS, 4)
        if self.kind == "time first":
            return self.head(self.mid(self.inp(h.transpose(0, 1)).relu()).relu().mean(dim=0))
        if self.kind == "folded":
            h = self.mid(self.inp(h.flatten(0, 1)).relu()).relu()
            return self.head(h.view(-1, STEPS, 12).mean(dim=1))
        order = x.sum(dim=1).argsort() if self.kind == "sorted" else torch.arange(len(x))
        h = self.mid(self.inp(h[order]).relu()).relu().mean(dim=1)
        if self.kind == "noisy":
            h = nn.functional.dropout(h, 0.1)
        return self.head(h[order.argsort()])


class NoRows(Toy):
    """Logits of the batch's samples in an order of their own."""

    def forward(self, x):
        return self.net(x[x[:, 0].argsort()])


def found(kind, batch_size=STEPS, prune=(), **settings):
    callbacks = [partition_callback(at_epoch=2, dry_run=True, **settings), *prune]
    fit(Toy(lambda: Steps(kind)), BlobsData(Blobs(100), batch_size=batch_size), callbacks, max_epochs=3)
    return callbacks


@pytest.mark.filterwarnings("ignore")
def test_layers_with_the_steps_first_are_read_as_those_with_the_samples_first():
    seen = []
    for kind in ("samples first", "time first"):
        prune = [SensitivityPruneCallback(["net.inp", "net.mid"], amount=0.3, criterion="taylor", max_val_drop=None)]
        callback, pruning = found(kind, prune=prune, layer="net.mid", input_layer="net.inp", recipe=rows_of)
        seen.append([*ROWS.pop(), *(mask.sensitivity for mask in pruning.masks)])
        assert [mask.layer for mask in pruning.masks] == ["net.inp", "net.mid"]
        assert callback.collector.point.samples == callback.collector.early.samples == (kind == "time first")
        assert len(callback.partition) == 100
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


ROWS = []


def rows_of(evidence):
    """Notes what a recipe gets of activations."""
    if len(evidence.index) == 100:
        ROWS[:] = [(evidence.margin, evidence.input_statistics)]
    return evidence.margin.sigmoid()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("criterion", ["sensitivity", "mean_abs_ratio"])
def test_neurons_of_layers_with_the_steps_first_are_ranked_by_sample(criterion):
    seen = []
    for kind in ("samples first", "time first"):
        prune = [SensitivityPruneCallback("net.mid", amount=0.3, criterion=criterion, max_val_drop=None)]
        callback, pruning = found(kind, prune=prune, recipe="label")
        assert callback.partition.is_actionable or criterion
        seen.append([mask.sensitivity for mask in pruning._state.masks])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["folded", "sorted"])
@pytest.mark.parametrize("who", ["layer", "input_layer", "prune"])
def test_a_layer_whose_rows_are_no_samples_is_refused_by_name(kind, who):
    prune = [SensitivityPruneCallback("net.mid", amount=0.3)] if who == "prune" else []
    settings = {} if who == "prune" else {who: "net.mid"}
    with pytest.raises(ValueError, match="has no row for each of the 4 samples of a batch"):
        found(kind, prune=prune, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("kind", ["samples first", "time first", "folded", "noisy"])
def test_what_can_be_told_is_not_refused(kind, batch_size):
    (callback,) = found(kind, batch_size)
    assert (callback.collector.early is None) == (kind == "folded")


@pytest.mark.parametrize("method", ["integrated_gradients", "deeplift", "conductance"])
def test_methods_that_interpolate_are_refused_where_the_steps_are_first(method):
    with pytest.raises(ValueError, match="attribution_method='" + method):
        found("time first", layer="net.mid", attribution_method=method)


def test_logits_that_are_in_another_order_are_refused():
    with pytest.raises(ValueError, match="to return the logits of each sample of a batch, in the order of the batch"):
        fit(NoRows(), BlobsData(Blobs(100)), [AttributionPartitionCallback(at_epoch=2)])
