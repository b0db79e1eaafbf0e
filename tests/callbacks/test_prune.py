from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_unlearn import AttributionPartitionCallback, SensitivityPruneCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.toys import Blobs, Plain, Residual, Swapped, Toy, adamw, convnet, fit, mlp, sgd, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio


def pruned_entries(module, prune, places):
    """The entries that must be zero: (name of the parameter, dimension of the neurons)."""
    neurons = prune.mask.pruned_indices()
    parameters = dict(module.named_parameters())
    return {name: parameters[name].detach().index_select(dimension, neurons) for name, dimension in places}


class Silent(L.Callback):
    """Counts the entries that are not zero, before and after every batch and in validation."""

    def __init__(self, prune, places):
        self.prune, self.places = prune, places
        self.looks, self.violations, self.touched = 0, 0, 0

    def look(self, module):
        if not self.prune.has_result:
            return
        self.looks += 1
        entries = pruned_entries(module, self.prune, self.places)
        self.violations += sum(int((entry != 0).sum()) for entry in entries.values())
        kept = dict(module.named_parameters())[self.places[0][0]]
        self.touched += int((kept != 0).sum())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.look(pl_module)


# What is pruned is not the point of most tests here: as many as amount says, and nothing taken back.
ANY = {"criterion": "random", "max_val_drop": None}
MLP = [("net.4.weight", 0), ("net.4.bias", 0), ("net.5.weight", 0), ("net.5.bias", 0), ("net.7.weight", 1)]
CONV = [("net.0.weight", 0), ("net.0.bias", 0), ("net.1.weight", 0), ("net.1.bias", 0)]


def rmsprop(module):
    return torch.optim.RMSprop(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("optimizer", [sgd, adamw, rmsprop])
@pytest.mark.parametrize(
    ("module", "trainer", "finetune"),
    [
        ({}, {}, None),
        ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, None),
        ({"manual": True}, {}, None),
        ({}, {"precision": "bf16-mixed"}, {}),
        ({}, {}, {"lr": 0.1}),
        ({"manual": True}, {}, {"lr": 0.1}),
    ],
    ids=["plain", "accumulated and clipped", "manual", "bf16-mixed", "rebuilt optimizer", "rebuilt, manual"],
)
def test_pruned_neurons_are_zero_at_every_batch(optimizer, module, trainer, finetune):
    # A recipe without a gate: what is pruned here is not the point, and after two short epochs auto says nothing.
    partition, prune, tune = trio(2, finetune=finetune, recipe="aum", prune=ANY)
    silent = Silent(prune, MLP)
    callbacks = [partition, prune, silent] if finetune is None else [partition, tune, silent, prune]
    toy = Toy(optimizer=optimizer, **module)
    fit(toy, BlobsData(Blobs()), callbacks, **trainer)
    assert prune.mask.layer == "net.4"
    assert len(prune.mask.pruned_indices()) == 3
    # Two epochs, validation included, are seen.
    assert silent.looks > 2 * 2 * 5
    assert silent.violations == 0
    assert silent.touched > 0


def test_a_convolution_by_name_with_its_norm():
    partition, prune, _ = trio(3, prune={"layer": "net.0", "amount": 0.3, **ANY})
    silent = Silent(prune, CONV)
    toy = Toy(convnet, adamw)
    fit(toy, BlobsData(Blobs(image=True)), [prune, partition, silent])
    assert len(prune.mask.pruned_indices()) == 3
    assert (silent.looks > 0, silent.violations) == (True, 0)
    with torch.no_grad():
        after_relu = toy.eval().net[:3](torch.randn(4, 2, 8, 8))
    dead = after_relu.amax(dim=(0, 2, 3)) == 0
    assert dead[prune.mask.pruned_indices()].all()
    assert not dead[prune.mask.keep].all()
    # By name, the layers after it are left alone.
    assert (toy.net[6].weight != 0).all()


def test_a_silent_head_input_comes_with_the_layer_that_feeds_it():
    partition, prune, _ = trio(2, prune=ANY)
    toy = Toy(Swapped)
    fit(toy, BlobsData(Blobs()), [partition, prune], max_epochs=3)
    assert prune.mask.layer == prune.target_layer() == "net.body"
    gone = prune.mask.pruned_indices()
    assert (toy.net.body.weight[gone] == 0).all()
    assert (toy.net.head.weight[:, gone] == 0).all()
    assert (toy.net.body.weight[prune.mask.keep] != 0).any()


class BeforeAndAfter(L.Callback):
    """The weights as the last epoch before the pruning left them, and as its first batch finds them."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch - 1:
            self.before = weights(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.after = weights(pl_module)


def changed(before, after):
    return {name for name in before if not before[name].equal(after[name])}


def test_where_a_residual_feeds_the_head_only_its_columns_are_pruned():
    partition, prune, _ = trio(2, prune=ANY)
    moment = BeforeAndAfter(2)
    toy = Toy(Residual)
    fit(toy, BlobsData(Blobs()), [partition, prune, moment], max_epochs=3)
    assert prune.mask.layer == prune.target_layer() == "net.head"
    assert changed(moment.before, moment.after) == {"net.head.weight"}
    gone = prune.mask.pruned_indices()
    assert (moment.after["net.head.weight"][:, gone] == 0).all()
    assert (toy.net.head.weight[:, gone] == 0).all()


def test_pruning_changes_nothing_but_the_declared_entries():
    partition, prune, _ = trio(2, prune=ANY)
    moment = BeforeAndAfter(2)
    fit(Toy(), BlobsData(Blobs()), [partition, prune, moment], max_epochs=3)
    assert changed(moment.before, moment.after) <= {name for name, _ in MLP}
    for name, dimension in MLP:
        kept = prune.mask.keep.nonzero().flatten()
        assert (
            moment.before[name].index_select(dimension, kept).equal(moment.after[name].index_select(dimension, kept))
        ), name


# The regression alone: no shrinkage, no test, nothing taken back.
PLAIN = {"criterion": Sensitivity(fdr_level=None, l2_penalty=0.0), "max_val_drop": None}


def naive_sensitivity(activation, target):
    """NumPy's least squares on columns of unit variance."""
    x, y = activation.double().numpy(), target.double().numpy()
    scale = x.std(axis=0)
    alive = scale > 1e-9
    out = np.zeros(x.shape[1])
    standardized = (x[:, alive] - x[:, alive].mean(axis=0)) / scale[alive]
    # The rank is up to float32, which the activations were: net.0 has 32 neurons that are linear in 16 features.
    out[alive] = np.linalg.lstsq(standardized, (y - y.mean()) / y.std(), rcond=1e-5)[0]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize(
    ("net", "image", "layer", "recipe", "at_epoch"),
    [
        (mlp, False, None, "label", 2),
        (mlp, False, "net.0", "label", 2),
        (convnet, True, "net.0", "label", 5),
        (convnet, True, "net.6", "rlap", 1),
    ],
)
def test_sensitivity_is_that_of_least_squares_on_the_activations(net, image, layer, recipe, at_epoch):
    data = Blobs(203, noise=0.25 if recipe == "rlap" else 0.4, image=image)
    partition, prune, _ = trio(at_epoch, recipe=recipe, prune={"layer": layer, "amount": 0.2, **PLAIN})
    moment = BeforeAndAfter(at_epoch)
    fit(Toy(net), BlobsData(data), [partition, prune, moment], max_epochs=at_epoch + 1)
    model = Toy(net).eval()
    model.load_state_dict(moment.before)
    with torch.no_grad():
        position = 7 if layer is None else int(layer[-1]) + 1
        activation = model.net[:position](data.x)
    if activation.ndim == 4:
        activation = activation.mean(dim=(2, 3))
    drawn = partition.partition
    target = drawn.is_clean.float() if recipe == "rlap" else drawn.clean_probability
    expected = naive_sensitivity(activation, target)
    torch.testing.assert_close(prune.sensitivity, expected, rtol=1e-3, atol=1e-4)
    assert (expected != 0).all()  # no neuron is dead, so that the share is of all
    count = int(0.2 * len(expected))
    # By the paper, whatever the sign; else those that are more active for noise.
    strongest = (expected.abs() if recipe == "rlap" else -expected).argsort(descending=True)[:count]
    assert recipe == "rlap" or (expected[strongest] < 0).all()
    assert set(prune.mask.pruned_indices().tolist()) == set(strongest.tolist())
    assert prune.mask.sensitivity.equal(prune.sensitivity)


def test_a_ridge_shrinks_the_coefficients():
    norms = []
    for ridge in (0.0, 10.0):
        partition, prune, _ = trio(2, prune={"criterion": Sensitivity(l2_penalty=ridge)})
        fit(Toy(), BlobsData(Blobs()), [partition, prune], max_epochs=3)
        norms.append(prune.sensitivity.norm())
    assert norms[1] < 0.5 * norms[0]


def test_a_checkpoint_loads_strictly_into_the_plain_module(tmp_path):
    partition, prune, finetune = trio(2, prune=ANY)
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Toy(), BlobsData(Blobs()), [saved, partition, prune, finetune], enable_checkpointing=True)
    before, after = (torch.load(tmp_path / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in (1, 3))
    plain = Plain()
    plain.load_state_dict(after, strict=True)
    assert all((entry == 0).all() for entry in pruned_entries(plain, prune, MLP).values())
    # The last checkpoint before the pruning holds what its metric was measured on.
    assert (before["net.4.weight"][prune.mask.pruned_indices()] != 0).any()
    loaded = Plain.load_from_checkpoint(tmp_path / "epoch=3.ckpt")
    assert all((entry == 0).all() for entry in pruned_entries(loaded, prune, MLP).values())


@pytest.mark.parametrize("lightning_ema", [True, False], ids=["EMA", "SWA"])
def test_averaged_weights_do_not_bring_pruned_neurons_back(lightning_ema):
    partition, prune, _ = trio(2, prune=ANY)
    if lightning_ema:
        averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.9)
    else:
        averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)

    def net():
        return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))

    toy = Toy(net)
    fit(toy, BlobsData(Blobs()), [averaging, partition, prune], max_epochs=4)
    places = [("net.0.weight", 0), ("net.0.bias", 0), ("net.2.weight", 1)]
    assert len(prune.mask.pruned_indices()) >= 2
    assert all((entry == 0).all() for entry in pruned_entries(toy, prune, places).values())


def test_gradients_of_pruned_entries_do_not_count_in_the_norm_that_clips():
    norms = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            entries = dict(pl_module.named_parameters())["net.0.weight"].grad
            if prune.has_result:
                norms.append(entries[prune.mask.pruned_indices()].abs().sum().item())

    def net():
        # The gradient of tanh at 0 is not 0, so that a pruned neuron has one.
        return nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4))

    partition, prune, _ = trio(2, prune={"layer": "net.0", **ANY})
    fit(Toy(net), BlobsData(Blobs()), [partition, prune, Norms()], max_epochs=3)
    assert norms == [0.0] * 7


def test_before_there_is_a_mask_the_error_names_the_epoch():
    prune = SensitivityPruneCallback()
    with pytest.raises(RuntimeError, match="No mask yet: neurons are pruned when the partition is computed"):
        _ = prune.mask
    with pytest.raises(RuntimeError, match="known when training starts"):
        prune.target_layer()
    seen = []

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch == 0:
                with pytest.raises(RuntimeError, match="No mask yet: neurons are pruned at epoch 2") as error:
                    _ = prune.sensitivity
                seen.append(error)

    fit(Toy(), BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=2), prune, Asks()], max_epochs=3)
    assert len(seen) == 7


@pytest.mark.filterwarnings("ignore:Partition not applied")
def test_a_partition_that_is_not_acted_upon_prunes_nothing():
    partition, prune, _ = trio(2, recipe="rlap")
    moment = BeforeAndAfter(2)
    fit(Toy(), BlobsData(Blobs()), [partition, prune, moment], max_epochs=3)
    with pytest.raises(RuntimeError, match="the partition was not applied, so no neuron was pruned"):
        _ = prune.mask
    assert not changed(moment.before, moment.after)


class Normed(nn.Module):
    def __init__(self, affine=True, buffered=False):
        super().__init__()
        self.fc = nn.Linear(16, 8)
        if buffered:
            weight = self.fc.weight.detach()
            del self.fc.weight
            self.fc.register_buffer("weight", weight)
        self.norm = nn.BatchNorm1d(8, affine=affine)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.fc(x)).relu())


def test_a_norm_that_cannot_be_silenced_is_refused_before_the_first_step():
    module = Toy(partial(Normed, affine=False))
    partition, prune, _ = trio(1, prune={"layer": "net.fc", "amount": 0.5})
    with pytest.raises(ValueError, match=r"cannot prune layer 'net.fc'. .*BatchNorm1d .*affine=False"):
        fit(module, BlobsData(Blobs()), [partition, prune])
    assert module.steps == 0


@pytest.mark.parametrize("net", [partial(Normed, affine=False), partial(Normed, buffered=True)])
def test_by_default_a_feeding_layer_that_cannot_be_pruned_is_left_alone(net):
    module = Toy(net)
    partition, prune, _ = trio(1, prune={"amount": 0.5, **ANY})
    fit(module, BlobsData(Blobs()), [partition, prune], max_epochs=2)
    assert prune.mask.layer == "net.head"
    assert (module.net.head.weight[:, prune.mask.pruned_indices()] == 0).all()
    assert len(prune.mask.pruned_indices()) == 4


def test_the_classes_themselves_are_not_pruned():
    module = Toy()
    partition, prune, _ = trio(1, prune={"layer": "net.7", "amount": 0.5})
    with pytest.raises(ValueError, match=r"cannot prune layer 'net.7': its 4 outputs are the classes. Leave layer out"):
        fit(module, BlobsData(Blobs()), [partition, prune])
    assert module.steps == 0


def test_less_than_one_live_neuron_prunes_none_and_says_why():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(16, 20), nn.Linear(20, 4)
            with torch.no_grad():
                self.fc.bias[3:] = -1e4

        def forward(self, x):
            return self.head(self.fc(x).relu())

    partition, prune, _ = trio(1, prune={"amount": 0.1})
    with pytest.warns(UserWarning, match=r"No neurons pruned: amount=0.1 of 3 active neurons in 'net.fc' rounds to"):
        fit(Toy(Dead), BlobsData(Blobs()), [partition, prune], max_epochs=2)
    assert prune.mask.keep.all()


class Convolutions(nn.Module):
    """Classifies without a Linear, and has a hidden layer with as many channels as there are classes."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.hidden(x).relu()).mean(dim=(2, 3))


def test_a_hidden_layer_as_wide_as_the_classes_is_not_taken_for_them():
    prune = SensitivityPruneCallback("net.hidden", amount=0.5)
    partition = AttributionPartitionCallback("net.hidden", at_epoch=3)
    fit(Toy(Convolutions), BlobsData(Blobs(image=True)), [partition, prune], max_epochs=4)
    assert partition.partition.layer == "output of 'net.hidden'"


def test_pruned_neurons_are_zero_where_an_optimizer_fails_between_two_calls_of_its_closure():
    class Fails(Toy):
        def training_step(self, batch):
            if self.current_epoch == 2 and self.trainer.optimizers[0].state and self.steps % 3 == 1:
                raise ArithmeticError
            return super().training_step(batch)

    module = Fails(optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.05, max_iter=3))
    _, prune, _ = callbacks = trio(2, prune={"criterion": "magnitude", "max_val_drop": None})
    with pytest.raises(ArithmeticError):
        fit(module, BlobsData(Blobs(101)), callbacks)
    pruned = prune.mask.pruned_indices()
    assert (module.net[7].weight[:, pruned] == 0).all()
    assert (module.net[4].weight[pruned] == 0).all()
