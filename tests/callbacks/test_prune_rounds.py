from dataclasses import replace
from itertools import pairwise
from unittest import mock

import lightning as L
import pytest
import torch

from lightning_unlearn import CleanSubsetFinetuneCallback, SensitivityPruneCallback
from lightning_unlearn.pruning import run as run_module
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.pruning.ranking import rank_neurons
from lightning_unlearn.pruning.state import PruneState
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.trainer.protocols import MaskSource
from tests.callbacks.published import ANTI, FLAG, IDLE, Planted, PlantedData, Published, make_partition
from tests.toys import Blobs, BlobsData, Toy, adamw, fit, mlp, weights

ANY = {"criterion": "random", "max_val_drop": None}


class Watch(L.Callback):
    """How many rows of a layer are zero, and which neurons are pruned, when an epoch ends."""

    def __init__(self, prune, layer):
        self.prune, self.layer = prune, layer
        self.zero, self.pruned = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        rows = pl_module.get_submodule(self.layer).weight
        self.zero.append((rows == 0).all(dim=1).nonzero().flatten().tolist())
        masks = self.prune._state.masks
        self.pruned.append(masks[0].pruned_indices().tolist() if masks else [])


def rounds(data, *epochs, **kwargs):
    """Partitions of those epochs, each with other probabilities."""
    return Published(
        *(
            make_partition(torch.rand(len(data), generator=torch.Generator().manual_seed(e)), data.y, epoch=e)
            for e in epochs
        ),
        **kwargs,
    )


@pytest.mark.parametrize("layer", ["net.4", None])
def test_every_partition_is_acted_upon_once_and_what_was_pruned_stays(layer):
    data, prune = (
        Blobs(101),
        SensitivityPruneCallback(
            layer, amount=0.2, max_val_drop=None, criterion=Sensitivity(fdr_level=None, l2_penalty=0.3)
        ),
    )
    watch = Watch(prune, "net.4")
    fit(Toy(optimizer=adamw), BlobsData(data), [prune, rounds(data, 1, 3, 4), watch], max_epochs=6)
    # Four of 20 in all, all in the first round, if there were as many of the harmful sign: so none is left for later.
    assert [len(pruned) for pruned in watch.pruned] == [0, 4, 4, 4, 4, 4]
    assert watch.zero == watch.pruned
    assert prune.state_dict()["epoch"] == 4


class Sparing(SensitivityPruneCallback):
    """Proposes one neuron in each round."""

    def _prune(self, *arguments):
        def one_each(*given):
            return [replace(ranking, order=ranking.order[:1]) for ranking in rank_neurons(*given)]

        with mock.patch.object(run_module, "rank_neurons", one_each):
            super()._prune(*arguments)


@pytest.mark.parametrize("layer", ["net.4", "net.0", None])
@pytest.mark.parametrize("optimizer", [adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)])
def test_rounds_add_up_to_the_amount(layer, optimizer):
    data, prune = Blobs(101), Sparing(layer, amount=0.15 if layer != "net.0" else 0.1, **ANY)
    watch = Watch(prune, layer or "net.4")
    module = Toy(optimizer=optimizer)
    trainer = fit(module, BlobsData(data), [prune, rounds(data, 1, 2, 3, 4, 5), watch], max_epochs=7)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # of no round
    # 0.15 of 20 and 0.1 of 32 are three: no more, though five rounds would take one each.
    assert [len(pruned) for pruned in watch.pruned] == [0, 1, 2, 3, 3, 3, 3]
    assert all(set(before) <= set(after) for before, after in pairwise(watch.pruned))
    assert watch.zero == watch.pruned
    for old, new in pairwise(watch.pruned[:4]):
        assert set(new) - set(old)


class ResidualPlanted(Planted):
    """What feeds the head is a sum, so that only its columns are pruned and its inputs stay active."""

    def forward(self, x):
        return self.head(self.fc(x).relu() + 0.0 * x + x.relu())


def test_a_neuron_whose_columns_are_gone_is_not_pruned_twice_nor_told_apart_by():
    data = PlantedData()
    first, second = (make_partition(data.probability(), data.y, epoch=e) for e in (1, 2))
    prune, module = SensitivityPruneCallback(amount=0.5, criterion=Sensitivity(l2_penalty=0.0)), ResidualPlanted()
    found = []

    class Keeps(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            found.append(prune.mask if prune.has_result else None)

    fit(module, data, [prune, Published(first, second), Keeps()], max_epochs=4)
    assert prune.mask.layer == "head"
    assert found[1].pruned_indices().tolist() == [FLAG]
    assert FLAG in found[3].pruned_indices()
    # The flag's number is still that of its own round; the others were regressed anew, without it.
    assert found[3].sensitivity[FLAG] == found[1].sensitivity[FLAG]
    x = (2 * data.x.relu())[:, [0, 1, 2, 3, IDLE, ANTI]].double()
    y = data.probability().double()
    x, y = ((v - v.mean(dim=0)) / v.std(dim=0, correction=0) for v in (x, y))
    expected = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0].float()
    torch.testing.assert_close(found[3].sensitivity[[0, 1, 2, 3, IDLE, ANTI]], expected, rtol=1e-3, atol=1e-4)


def test_a_partition_that_is_not_acted_upon_leaves_the_next_its_turn():
    data = PlantedData()
    unsure = make_partition(data.probability(), data.y, epoch=1, warning="it is not sure")
    sure = make_partition(data.probability(), data.y, epoch=2)
    prune = SensitivityPruneCallback("fc", amount=0.5)
    watch = Watch(prune, "fc")
    fit(Planted(), data, [prune, Published(unsure, sure), watch], max_epochs=4)
    assert watch.pruned == [[], [], [FLAG], [FLAG]]


class Saves(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_resuming_between_rounds_goes_on_where_it_was(at, tmp_path):
    data, final, masks = Blobs(101), [], []
    for resumed in (False, True):
        prune, module = Sparing(["net.0", "net.4"], amount=0.2, **ANY), Toy(optimizer=adamw)
        callbacks = [prune, rounds(data, 1, 3)]
        arguments = {"ckpt_path": tmp_path / f"{at}.ckpt"} if resumed else {}
        callbacks += [] if resumed else [Saves(tmp_path)]
        fit(module, BlobsData(data, by_epoch=True), callbacks, max_epochs=5, **arguments)
        final.append(weights(module))
        masks.append(prune.masks)
    assert all(final[0][name].equal(final[1][name]) for name in final[0])
    for one, other in zip(*masks, strict=True):
        assert one.keep.equal(other.keep)
        assert len(one.pruned_indices()) == 2
        assert one.sensitivity.equal(other.sensitivity)


def test_state_holds_tensors_and_primitives_and_comes_back_as_it_was(tmp_path):
    data = PlantedData()
    prune = SensitivityPruneCallback("fc", amount=0.5)
    fit(Planted(), data, [prune, Published(make_partition(data.probability(), data.y))], max_epochs=3)
    torch.save(prune.state_dict(), tmp_path / "state.pt")
    again = SensitivityPruneCallback("fc", amount=0.5)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.summary_clause() == prune.summary_clause() != ""
    assert again.target_layer() == "fc"
    for name in ("layer", "keep", "sensitivity", "standard_error"):
        one, other = getattr(again.mask, name), getattr(prune.mask, name)
        assert one == other if name == "layer" else one.equal(other)
    assert isinstance(again, MaskSource)


@pytest.mark.parametrize("missing", ["epoch", "is_proposal", "note", "sites", "live", "masks"])
def test_a_state_with_something_missing_is_refused(missing):
    state = SensitivityPruneCallback().state_dict()
    SensitivityPruneCallback().load_state_dict(dict(state))
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        SensitivityPruneCallback().load_state_dict(state)


@pytest.mark.parametrize("max_val_drop", [0.5, None])
def test_a_dry_run_in_rounds_leaves_a_fit_with_dropout_and_augmentation_bit_for_bit(max_val_drop):
    final, data = [], Blobs(101, augment="numpy")
    for with_callback in (False, True):
        module = Toy(lambda: mlp(dropout=0.5), adamw)
        prune = Sparing(amount=0.3, criterion="random", max_val_drop=max_val_drop)
        published = rounds(data, 1, 2, dry_run=True)
        fit(module, BlobsData(data), [published, *([prune] if with_callback else [])], max_epochs=4)
        final.append(weights(module))
    assert all(final[0][name].equal(final[1][name]) for name in final[0])
    # A proposal is not built upon: the second round proposes anew.
    assert len(prune.mask.pruned_indices()) == 1
    assert prune.summary_clause().startswith("would prune 1 of 20 neurons of 'net.4'")


def test_layers_from_the_first_pruned_one_on_are_trained():
    data = Blobs(101)
    prune = SensitivityPruneCallback(["net.4", "net.0"], amount=0.2, **ANY)
    tune, module = CleanSubsetFinetuneCallback("layers", lr=0.01), Toy()
    fit(module, BlobsData(data), [prune, tune, rounds(data, 1)], max_epochs=3)
    assert prune.target_layer() == "net.0"
    assert [mask.layer for mask in prune.masks] == ["net.0", "net.4"]
    for layer, mask in zip((module.net[0], module.net[4]), prune.masks, strict=True):
        assert (layer.weight[mask.pruned_indices()] == 0).all()


def test_a_second_fit_starts_anew():
    data, prune = PlantedData(), SensitivityPruneCallback("fc", amount=0.5)
    for _ in range(2):
        module = Planted()
        fit(module, data, [prune, Published(make_partition(data.probability(), data.y))], max_epochs=3)
        assert prune.mask.pruned_indices().tolist() == [FLAG]
        assert (module.fc.weight[FLAG] == 0).all()


def test_averages_and_a_guard_go_together():
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.9)
    data, module = PlantedData(), Planted(lr=0.05)
    prune = SensitivityPruneCallback("fc", amount=0.5)
    fit(module, data, [averaging, prune, Published(make_partition(data.probability(), data.y))], max_epochs=4)
    assert FLAG in prune.mask.pruned_indices()
    assert (module.fc.weight[prune.mask.pruned_indices()] == 0).all()


def test_masks_of_one_layer_are_the_mask():
    prune = SensitivityPruneCallback()
    for ask in (lambda: prune.masks, lambda: prune.mask, lambda: prune.sensitivity):
        with pytest.raises(RuntimeError, match="No mask yet: neurons are pruned when the partition is computed"):
            ask()
    prune._state = PruneState(masks=[NeuronMask("fc", torch.tensor([True, False]), torch.zeros(2))])
    assert prune.masks == (prune.mask,)
