"""What fine-tuning starts from, in fits."""

import copy
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn.finetuning.shrink_weights import shrink
from tests.toys import Blobs, BlobsData, Toy, adamw, assert_same_weights, fit, trio, weights

AT = 2
PRUNES = {"significance": None, "guard": False, "amount": 0.3}


class Moments(L.Callback):
    """The weights when the fit begins, and when an epoch begins or ends; last in the list, so after what ours do."""

    def __init__(self):
        self.begun, self.ended = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.begun[trainer.current_epoch] = weights(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended[trainer.current_epoch] = weights(pl_module)


def run(finetune, *, optimizer=adamw, data=None, others=(), partition=None, prune=None, **kwargs):
    moments, module = Moments(), Toy(optimizer=optimizer)
    callbacks = trio(AT, prune=prune, finetune=finetune, **(partition or {}))
    data = BlobsData(Blobs(101), by_epoch=True) if data is None else data
    fit(module, data, [*callbacks, *others, moments], **kwargs)
    return callbacks, module, moments


def is_statistic(name):
    return "running" in name or "tracked" in name


def expected(moments, name, how="shrink"):
    start, trained = moments.begun[0][name], moments.ended[AT - 1][name]
    return start if how == "start" or is_statistic(name) else shrink(trained, start)


@pytest.mark.parametrize("how", ["shrink", "start"])
def test_fine_tuning_starts_from_weights_nearer_to_those_the_fit_began_with(how):
    (partition, prune, finetune), _, moments = run({"warm_start": how}, prune=PRUNES)
    pruned = prune.mask.pruned_indices()
    assert len(pruned)
    now = moments.begun[AT]
    for name, tensor in now.items():
        should = expected(moments, name, how)
        if name.startswith(("net.4.", "net.5.")) and not is_statistic(name):
            should = should.index_fill(0, pruned, 0)
        if name == "net.7.weight":
            should = should.index_fill(1, pruned, 0)
        assert tensor.equal(should), name
    assert finetune.describe().endswith(
        {"shrink": "(F-FT, from weights moved back towards those of the start)", "start": "(F-FT, from the start)"}[how]
    )
    assert partition.provenance["done"]["CleanSubsetFinetuneCallback"]["started_from"] == how
    assert finetune.state_dict()["start_weights"] is None


def test_kept_weights_are_those_of_the_epoch_before():
    (_, _, finetune), _, moments = run({"warm_start": "keep"})
    assert_same_weights(moments.begun[AT], moments.ended[AT - 1])
    assert finetune.state_dict()["start_weights"] is None
    assert finetune.describe().endswith("(F-FT)")


def test_only_what_is_trained_is_moved():
    finetune = {"warm_start": "start", "mode": "layers", "layers": ["net.4", "net.7"]}
    _, _, moments = run(finetune)
    moved = {name for name, tensor in moments.begun[AT].items() if not tensor.equal(moments.ended[AT - 1][name])}
    assert moved == {"net.4.weight", "net.4.bias", "net.7.weight", "net.7.bias"}


def test_only_the_first_partition_moves_weights():
    rounds = {"every_n_epochs": 1, "stable_share": 0}
    (partition, *_), _, moments = run({"warm_start": "start"}, partition=rounds, max_epochs=5)
    assert len(partition.rounds) > 1
    assert moments.begun[AT]["net.0.weight"].equal(moments.begun[0]["net.0.weight"])
    assert_same_weights(moments.begun[AT + 1], moments.ended[AT])


class Ema(L.Callback):
    """A user's own moving average."""

    ema = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.ema is None:
            self.ema = copy.deepcopy(pl_module.net)
        with torch.no_grad():
            for mean, now in zip(self.ema.parameters(), pl_module.net.parameters(), strict=True):
                mean.lerp_(now, 0.1)


class Looks(L.Callback):
    """At an average, before and after."""

    def __init__(self, ema):
        self.at, self.seen = ema, {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen[trainer.current_epoch] = [p.detach().clone() for p in self.at.ema.parameters()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (AT, 0):
            self.seen["after"] = [p.detach().clone() for p in self.at.ema.parameters()]


def test_averages_of_the_weights_follow():
    looks = Looks(Ema())
    _, module, moments = run({"warm_start": "shrink"}, others=[looks.at, looks])
    names = [name for name, _ in module.named_parameters()]
    for name, before, after in zip(names, looks.seen[AT - 1], looks.seen["after"], strict=True):
        assert after.equal(shrink(before, moments.begun[0][name])), name


def test_beside_lightnings_average():
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    (_, _, finetune), module, _ = run({"warm_start": "shrink", "lr": 0.01}, others=[averaging], max_epochs=5)
    assert finetune.is_active
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


class Halts(Exception):
    pass


def failing(_):
    raise Halts


@pytest.mark.parametrize("place", ["optimizer", "head"])
def test_after_a_failure_the_weights_are_the_trained_ones(monkeypatch, place):
    moments, module = Moments(), Toy(optimizer=adamw)
    finetune = {"warm_start": "start"} | ({"optimizer": failing} if place == "optimizer" else {"reset_head": True})
    callbacks = trio(AT, finetune=finetune)
    monkeypatch.setattr(module.net[7], "reset_parameters", lambda: failing(None), raising=True)
    with pytest.raises(Halts):
        fit(module, BlobsData(Blobs(101), by_epoch=True), [*callbacks, moments])
    assert_same_weights(weights(module), moments.ended[AT - 1])
    assert not callbacks[2].is_active
    assert callbacks[2].state_dict()["started_from"] == "keep"
    # Whoever goes on from here still has what to go back to.
    assert callbacks[2].state_dict()["start_weights"]["net.0.weight"].equal(moments.begun[0]["net.0.weight"])


@pytest.fixture
def checkpoints(tmp_path):
    def make(finetune, **kwargs):
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run(finetune, others=[keep], enable_checkpointing=True, **kwargs)
        return tmp_path

    return make


@pytest.mark.parametrize("how", ["shrink", "start"])
def test_a_checkpoint_that_does_not_have_the_start_is_refused(checkpoints, how):
    path, module = checkpoints({"warm_start": "keep"}) / "epoch=0.ckpt", Toy(optimizer=adamw)
    said = (
        rf"CleanSubsetFinetuneCallback\(warm_start='{how}'\) needs the weights that the fit began with, but the"
        r" checkpoint does not have them, .*; set warm_start='keep', or start again without the checkpoint\."
    )
    with pytest.raises(MisconfigurationException, match=said):
        fit(module, BlobsData(Blobs(101), by_epoch=True), trio(AT, finetune={"warm_start": how}), ckpt_path=path)
    assert module.steps == 0


def test_after_the_swap_it_does_not_matter_any_more(checkpoints):
    path, module = checkpoints({"warm_start": "keep"}) / "epoch=2.ckpt", Toy(optimizer=adamw)
    callbacks = trio(AT, finetune={"warm_start": "shrink"})
    fit(module, BlobsData(Blobs(101), by_epoch=True), callbacks, ckpt_path=path)
    assert callbacks[2].state_dict()["started_from"] == "keep"


def test_checkpoints_have_the_start_until_it_is_used(checkpoints):
    folder = checkpoints({"warm_start": "shrink"})
    kept = [torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True) for epoch in (0, 1, 2)]
    states = [one["callbacks"]["CleanSubsetFinetuneCallback"]["start_weights"] for one in kept]
    assert states[0]["net.0.weight"].equal(states[1]["net.0.weight"])
    assert states[2] is None


@pytest.mark.parametrize(
    ("memorised", "how", "said"),
    [
        (0.9, "shrink", "The network predicts 90% of the suspect labels, so it has memorized them: fine-tuning starts"),
        (0.2, "keep", "The network predicts 20% of the suspect labels, fewer than half: fine-tuning goes on from"),
    ],
)
def test_auto_goes_by_what_is_memorized(monkeypatch, caplog, memorised, how, said):
    monkeypatch.setattr("lightning_unlearn.callbacks.partition.share_memorised", lambda *_: memorised)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        (_, _, finetune), _, moments = run({"warm_start": "auto"})
    assert any(line.startswith(said) for line in caplog.messages)
    assert finetune.state_dict()["started_from"] == how
    if how == "keep":
        assert_same_weights(moments.begun[AT], moments.ended[AT - 1])


def test_auto_keeps_the_weights_where_the_checkpoint_does_not_have_those_of_the_start(monkeypatch, caplog, checkpoints):
    monkeypatch.setattr("lightning_unlearn.callbacks.partition.share_memorised", lambda *_: 0.9)
    path, callbacks = checkpoints({"warm_start": "keep"}) / "epoch=0.ckpt", trio(AT, finetune={"warm_start": "auto"})
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Toy(optimizer=adamw), BlobsData(Blobs(101), by_epoch=True), callbacks, ckpt_path=path)
    said = "its weights are kept all the same: the checkpoint that the fit goes on from does not have those that it"
    assert any(said in line for line in caplog.messages)
