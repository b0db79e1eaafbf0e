"""A head that forgets before fine-tuning begins."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_unlearn import CleanSubsetFinetuneCallback, SensitivityPruneCallback
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.toys import (
    Blobs,
    BlobsData,
    Residual,
    Swapped,
    Toy,
    adamw,
    assert_same_weights,
    fit,
    make_trainer,
    sgd,
    trio,
    weights,
)

AT = 2


class Swap(L.Callback):
    """Weights and optimizer right before the partition is acted upon, and right after it."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == AT - 1:
            self.before, self.state_before = weights(pl_module), self.state(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == AT and batch_idx == 0:
            self.after, self.state_after = weights(pl_module), self.state(trainer, pl_module)

    @staticmethod
    def state(trainer, pl_module):
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        return {names[p] for p, state in trainer.optimizers[0].state.items() if state}


def a_fit(net=None, optimizer=adamw, seed=0, **finetune):
    partition, prune, tune = trio(
        AT, finetune={"reset_head": True, **finetune}, prune={"criterion": "random", "guard": False}
    )
    module, swap = Toy(*([net] if net else []), optimizer=optimizer), Swap()
    L.seed_everything(seed, verbose=False)
    make_trainer([partition, prune, tune, swap]).fit(module, datamodule=BlobsData(Blobs(101)))
    return module, swap, prune


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize(("net", "head"), [(None, "net.7"), (Residual, "net.head"), (Swapped, "net.head")])
def test_the_head_has_new_weights_when_fine_tuning_begins_and_nothing_else_has(net, head, optimizer):
    _, swap, prune = a_fit(net, optimizer)
    old, new = (nn.Linear(20, 4) for _ in range(2))
    for linear, state in ((old, swap.before), (new, swap.after)):
        linear.load_state_dict({name: state[f"{head}.{name}"] for name in ("weight", "bias")})
    gone = torch.zeros(20, dtype=torch.bool)
    gone[prune.mask.pruned_indices()] = True
    assert 0 < gone.sum() < 10
    # Columns of pruned neurons are zero at once, and no other is.
    assert (new.weight[:, gone] == 0).all()
    assert (new.weight[:, ~gone] != old.weight[:, ~gone]).all()
    assert (new.bias != old.bias).all()
    # As a new Linear is initialized.
    assert new.weight.abs().max() <= 20**-0.5
    assert new.weight[:, ~gone].std().item() == pytest.approx(20**-0.5 / 3**0.5, rel=0.25)
    assert new.bias.abs().max() <= 20**-0.5
    changed = {name for name in swap.before if not swap.before[name].equal(swap.after[name])}
    pruned = set() if prune.mask.layer == head else {"net.4.weight", "net.4.bias", "net.5.weight", "net.5.bias"}
    assert changed - {f"{head}.weight", f"{head}.bias"} <= pruned | {
        f"{prune.mask.layer}.{n}" for n in ("weight", "bias")
    }
    assert swap.state_before - swap.state_after == {f"{head}.weight", f"{head}.bias"}


def test_the_new_weights_are_a_function_of_the_seed_and_not_drawn_from_the_users_generator():
    heads = [a_fit(seed=seed)[1].after["net.7.weight"] for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    live = heads[0] != 0
    assert (heads[0] != heads[2])[live & (heads[2] != 0)].all()

    class Draws(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == AT:
                drawn.append(torch.rand(3))

    drawn = []
    for reset in (True, False):
        fit(Toy(), BlobsData(Blobs(101)), [*trio(AT, finetune={"reset_head": reset}), Draws()], max_epochs=3)
    assert drawn[0].equal(drawn[1])


def test_pruned_columns_stay_zero_to_the_end():
    module, swap, prune = a_fit()
    gone = prune.mask.pruned_indices()
    assert (module.net[7].weight[:, gone] == 0).all()
    assert not module.net[7].weight.equal(swap.after["net.7.weight"])


def test_without_pruning_all_columns_are_new():
    data, swap = PlantedData(), Swap()
    source = Published(make_partition(data.probability(), data.y, epoch=AT))
    fit(Planted(lr=0.01), data, [source, CleanSubsetFinetuneCallback(reset_head=True), swap], max_epochs=4)
    assert (swap.after["head.weight"] != swap.before["head.weight"]).all()
    assert swap.after["fc.weight"].equal(swap.before["fc.weight"])


def test_layers_that_hold_the_head_are_trained_with_a_new_one():
    module, swap, _ = a_fit(mode="layers", layers=["net.7"], lr=0.01)
    after = weights(module)
    assert not after["net.7.weight"].equal(swap.after["net.7.weight"])
    assert after["net.0.weight"].equal(swap.after["net.0.weight"])
    assert (swap.before["net.7.bias"] != swap.after["net.7.bias"]).all()


def test_layers_that_leave_the_head_out_are_refused_before_the_first_step():
    partition, _, finetune = trio(AT, finetune={"mode": "layers", "layers": ["net.4", "net.5"], "reset_head": True})
    module = Toy()
    with pytest.raises(ValueError, match=r"Expected layers to hold the head 'net\.7' where reset_head=True.*add 'net"):
        fit(module, BlobsData(Blobs(101)), [partition, finetune])
    assert module.steps == 0


def test_a_dry_run_and_a_partition_that_is_not_acted_upon_leave_the_head():
    data = PlantedData()
    for source in (
        Published(make_partition(data.probability(), data.y, epoch=AT), dry_run=True),
        Published(make_partition(data.probability(), data.y, epoch=AT, warning="it is not sure")),
    ):
        module = Planted()
        before = weights(module)
        fit(module, data, [source, CleanSubsetFinetuneCallback(reset_head=True)])
        assert_same_weights(weights(module), before)


def test_a_later_round_does_not_reset_it_again():
    data, found = PlantedData(), []

    class Keeps(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            found.append(pl_module.head.bias.detach().clone())

    rounds = [make_partition(data.probability(seed), data.y, epoch=AT + seed) for seed in range(3)]
    callbacks = [SensitivityPruneCallback("fc"), CleanSubsetFinetuneCallback(reset_head=True)]
    fit(Planted(), data, [Published(*rounds), *callbacks, Keeps()], max_epochs=6)  # which learns nothing
    assert found[0].equal(found[1])
    assert not found[1].equal(found[2])
    assert all(found[2].equal(other) for other in found[3:])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("epoch", [AT - 1, AT])
def test_a_resumed_fit_has_the_same_head(tmp_path, epoch):
    final = []
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for path in (None, tmp_path / f"epoch={epoch}.ckpt"):
        module, beside = Toy(optimizer=adamw), [keep] if path is None else []
        callbacks = [*trio(AT, finetune={"reset_head": True}), *beside]
        data = BlobsData(Blobs(101), by_epoch=True)
        fit(module, data, callbacks, ckpt_path=path, max_epochs=5, enable_checkpointing=path is None)
        final.append(weights(module))
    assert_same_weights(*final, 1e-6)


@pytest.mark.parametrize("place", ["first", "last"])
def test_averages_begun_before_have_the_new_head_too(place):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.999)
    ours, module, swap = trio(AT, finetune={"reset_head": True}), Toy(optimizer=adamw), Swap()
    callbacks = [averaging, *ours, swap] if place == "first" else [*ours, swap, averaging]
    fit(module, BlobsData(Blobs(101)), callbacks, max_epochs=AT + 1)
    # The final weights are the average, which has hardly moved from what it was at the swap.
    new, old = swap.after["net.7.weight"], swap.before["net.7.weight"]
    assert (module.net[7].weight - new).abs().max() < 0.05 < (new - old).abs().max()


def test_averages_begun_before_do_not_bring_pruned_columns_back_with_the_new_head():
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.9)
    prune = {"criterion": "magnitude", "guard": False}
    ours, module = trio(AT, prune=prune, finetune={"reset_head": True}), Toy(optimizer=adamw)
    fit(module, BlobsData(Blobs(101)), [averaging, *ours], max_epochs=AT + 1)
    pruned = ours[1].mask.pruned_indices()
    assert len(pruned) > 0
    assert (module.net[7].weight[:, pruned] == 0).all()
