"""Layers that are named when the callbacks are made, and exist only once the module has been set up."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_unlearn import CleanSubsetFinetuneCallback, SensitivityPruneCallback
from tests.toys import Blobs, BlobsData, Toy, assert_same_weights, fit, mlp, partition_callback, weights


class InSetup(Toy):
    def __init__(self, placeholder=nn.Identity):
        super().__init__(placeholder)

    def make(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = mlp()

    def setup(self, stage):
        self.make()


class InConfigureModel(InSetup):
    def setup(self, stage):
        pass

    def configure_model(self):
        # Lightning may call it again.
        if not isinstance(self.net, nn.Sequential):
            self.make()


def named(**changes):
    """All of ours that name layers."""
    names = {
        "layer": "net.4",
        "input_layer": "net.0",
        "prune": "net.4",
        "layers": ["net.4", "net.5", "net.7"],
    } | changes
    return [
        partition_callback(names["layer"], at_epoch=2, input_layer=names["input_layer"]),
        SensitivityPruneCallback(names["prune"], criterion="random", max_val_drop=None),
        CleanSubsetFinetuneCallback("layers", layers=names["layers"]),
    ]


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
def test_names_are_those_of_the_net_that_is_trained(late):
    early = Toy()
    fit(early, BlobsData(Blobs()), named())
    module = late()
    fit(module, BlobsData(Blobs()), callbacks := named())
    assert callbacks[0].partition.layer == "output of 'net.4'"
    assert callbacks[1].mask.layer == "net.4"
    assert_same_weights(weights(module), weights(early))


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
@pytest.mark.parametrize(
    "wrong", [{"layer": "net.9"}, {"input_layer": "net.9"}, {"prune": "net.9"}, {"layers": ["net.9"]}]
)
def test_an_unknown_name_is_refused_before_the_first_step_with_the_names_of_that_net(late, wrong):
    module = late()
    with pytest.raises(ValueError, match=r"but got 'net.9'. The nearest names are: .*net\.[0-7]"):
        fit(module, BlobsData(Blobs()), named(**wrong))
    assert module.steps == 0


def test_a_placeholder_of_the_same_name_is_not_taken_for_the_layer():
    module = InConfigureModel(lambda: nn.ModuleDict({"4": nn.Identity()}))
    fit(module, BlobsData(Blobs()), callbacks := named())
    assert callbacks[1].mask.layer == "net.4"


def test_a_module_that_makes_no_layers_later_is_refused_when_it_is_set_up():
    seen = []

    class Seen(Toy):
        def on_fit_start(self):
            seen.append(self)

    with pytest.raises(ValueError, match=r"but got 'net\.9'"):
        fit(Seen(), BlobsData(Blobs()), named(prune="net.9"))
    assert not seen


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
def test_a_resumed_fit_ends_as_one_that_was_not_interrupted(late, tmp_path):
    whole = late()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, BlobsData(Blobs(), by_epoch=True), [*named(), saved], enable_checkpointing=True)
    for epoch in (0, 2):
        module = late()
        callbacks = named()
        fit(module, BlobsData(Blobs(), by_epoch=True), callbacks, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_weights(weights(module), weights(whole))
