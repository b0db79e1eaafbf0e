"""NaN, infinity and 16-bit numbers in a running fit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback, SensitivityPruneCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.toys import (
    CLASSES,
    FEATURES,
    Blobs,
    BlobsData,
    Toy,
    adamw,
    auroc,
    convnet,
    fit,
    partition_callback,
    trio,
    weights,
)

BROKEN = torch.tensor([1, 30, 31, 77])


class BrokenBlobs(Blobs):
    """Some inputs hold NaN or infinity."""

    def __init__(self, *args, broken=BROKEN, **kwargs):
        super().__init__(*args, **kwargs)
        self.x[broken] = torch.tensor([torch.nan, torch.inf])[torch.arange(len(broken)) % 2].reshape(
            -1, *(1,) * (self.x.ndim - 1)
        )


def no_norms():
    """Without a batch norm, whose running averages would keep a NaN."""
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


class LeavesRowsOut(Toy):
    """Trains on the rows that are finite."""

    def training_step(self, batch):
        x, y = batch
        finite = x.flatten(1).isfinite().all(dim=1)
        return cross_entropy(self(x[finite]), y[finite]) if finite.any() else None


class LeavesStepsOut(Toy):
    """Trains on the batches that are finite."""

    def training_step(self, batch):
        loss = cross_entropy(self(batch[0]), batch[1])
        return loss if loss.isfinite() else None


@pytest.fixture(scope="module", params=[(LeavesRowsOut, "eval_passes"), (LeavesStepsOut, "train_steps")], ids=str)
def broken(request):
    module, evidence = request.param
    data = BrokenBlobs(size=400)
    prune = {"criterion": Sensitivity(fdr_level=None), "max_val_drop": 1.0}
    callbacks = trio(3, evidence_from=evidence, prune=prune, finetune={"lr": 0.01})
    module = module(no_norms, adamw)
    fit(module, BlobsData(data, batch_size=4), callbacks, max_epochs=5)
    assert callbacks[0].collector.reader.reason == ""
    return data, module, callbacks


def test_broken_inputs_are_suspects_and_the_others_are_judged(broken):
    data, _, (partition, _, _) = broken
    found = partition.partition
    assert {found.reasons()[i] for i in BROKEN.tolist()} == {"input"}
    assert not found.is_clean[BROKEN].any()
    assert (found.clean_probability[BROKEN] == 0).all()
    assert torch.equal(found.suggested_label[BROKEN], data.y[BROKEN])
    others = torch.ones(len(data), dtype=torch.bool)
    others[BROKEN] = False
    assert auroc(found.clean_probability[others], ~data.wrong[others]) > 0.95
    assert found.is_actionable
    assert found.suspect_indices()[: len(BROKEN)].sort().values.tolist() == BROKEN.tolist()
    for value in (found.clean_probability, found.suggested_probability, found.label_evidence, found.noise_matrix):
        assert value.isfinite().all()


def test_after_the_partition_broken_inputs_are_no_longer_trained_on(broken):
    data, module, (_, _, finetune) = broken
    assert finetune.is_active
    assert all(value.isfinite().all() for value in weights(module).values())
    assert torch.tensor([data.x[i].isfinite().all() for i in data.read[-300:]]).all()


def test_a_broken_input_in_the_first_batch_does_not_hide_what_feeds_the_head(broken):
    # Else only the head's columns would be pruned, and no rows of the layer before it.
    _, module, (_, prune, _) = broken
    assert BROKEN.min() < 4  # in the first batch
    pruned = prune.mask.pruned_indices()
    assert len(pruned) > 0
    assert (module.net[0].bias[pruned] == 0).all()


def test_a_table_of_broken_inputs_can_be_written(broken, tmp_path):
    _, _, (partition, _, _) = broken
    partition.partition.to_csv(tmp_path / "suspects.csv")
    lines = (tmp_path / "suspects.csv").read_text(encoding="utf-8-sig").splitlines()
    assert not any("nan" in line.lower() for line in lines)
    assert {line.split(",")[6] for line in lines[1:5]} == {"input"}
    assert sum(row.samples for row in partition.partition.class_summary()) == 400


@pytest.mark.parametrize("net", [no_norms, convnet])
def test_a_class_whose_inputs_are_all_broken_is_not_trained_on(net):
    # The least share of each class must not be made of them; and without the class nothing is acted upon.
    image = net is convnet
    of_2 = (Blobs(image=image).y == 2).nonzero().flatten()
    data = BrokenBlobs(broken=of_2, image=image)

    callback = partition_callback(at_epoch=2, evidence_from="eval_passes")
    with pytest.warns(UserWarning, match="Partition not applied.*no sample is kept of class 2"):
        fit(LeavesRowsOut(net, adamw), BlobsData(data), [callback], max_epochs=3)
    assert not callback.partition.is_clean[of_2].any()
    assert callback.partition.is_clean[data.y != 2].float().mean() > 0.5


def test_weights_that_are_nan_end_the_fit_at_once():
    class Diverges(Toy):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[0].bias[0] = torch.nan

    module = Diverges(no_norms, adamw)
    with pytest.raises(ValueError, match=r"those of .* samples are NaN or infinite, and so is the model's net\.0\."):
        fit(module, BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=50)], max_epochs=60)
    assert module.current_epoch <= 2


def test_batch_norms_that_keep_a_nan_are_named():
    # A step is left out, but the running averages have seen its batch.
    module = LeavesStepsOut(convnet, adamw)
    data = BlobsData(BrokenBlobs(image=True))
    with pytest.raises(
        ValueError, match=r"and so is the model's net\.1\.running_mean: training has diverged.*BatchNorm"
    ):
        fit(module, data, [AttributionPartitionCallback(at_epoch=2)], max_epochs=3)


def test_classes_that_forward_rules_out_with_minus_infinity_are_told_of():
    class Masked(Toy):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0, 0, 0, -torch.inf])

    data = Blobs()
    data.y = data.y.clamp(max=2)
    with (
        pytest.warns(UserWarning, match="of 203 training samples were NaN or infinite in epoch 1"),
        pytest.raises(
            ValueError, match=r"weights are finite\. Check .* no logits of -inf for classes that it rules out"
        ),
    ):
        fit(Masked(), BlobsData(data), [partition_callback(at_epoch=2, evidence_from="eval_passes")], max_epochs=3)


class Breaks(nn.Linear):
    """All its neurons are infinite or NaN for a few inputs."""

    value = torch.inf

    def forward(self, x):
        return super().forward(x) + torch.where(x[:, :1] > 4, self.value, 0.0)


class Mends(nn.Module):
    """The logits do not show it."""

    def forward(self, x):
        return x.nan_to_num(posinf=9.0).relu()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("criterion", [Sensitivity(fdr_level=None), "rms_ratio", "taylor"], ids=str)
def test_neurons_are_ranked_without_the_samples_that_break_them(broken, criterion):
    module = Toy(lambda: nn.Sequential(Breaks(FEATURES, 32), Mends(), nn.Linear(32, CLASSES)), adamw)
    module.net[0].value = broken
    data = Blobs(400)
    few = int((data.x[:, 0] > 4).sum())
    assert 0 < few < 40
    partition = partition_callback(at_epoch=3, recipe="aum", evidence_from="eval_passes")
    prune = SensitivityPruneCallback(layer="net.0", amount=0.2, max_val_drop=None, criterion=criterion)
    with pytest.warns(UserWarning, match=f"Excluding {few} of 400 training samples with NaN or infinite activations"):
        fit(module, BlobsData(data), [partition, prune], max_epochs=4)
    assert partition.partition.clean_probability.isfinite().all()
    assert prune.mask.sensitivity.isfinite().all()
    assert len(prune.mask.pruned_indices()) > 0


def test_logits_that_are_nan_are_right_about_no_class():
    # Else they would be about class 0, and the accuracy that of a guess.
    class Validation(BlobsData):
        def val_dataloader(self):
            data = BrokenBlobs(32, broken=torch.arange(32))
            data.y[:] = 0
            return DataLoader(data, batch_size=16)

    callbacks = trio(2, finetune={"lr": 0.01})
    fit(Toy(no_norms, adamw), Validation(Blobs()), callbacks, max_epochs=3)
    assert callbacks[2].is_active
    assert (callbacks[0].summary.accuracy_before, callbacks[0].summary.accuracy_after) == (0, 0)


class Dead(nn.Module):
    """Its ReLUs never fire, so that all samples have the logits of the bias."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES)
        nn.init.constant_(self.body.bias, -1e4)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("recipe", ["auto", "label", "loss", "aum", "argmax", "rlap"])
def test_a_dead_network_changes_nothing_and_says_so(recipe):
    callbacks = trio(2, recipe=recipe, finetune={"lr": 0.01})
    with pytest.warns(
        UserWarning,
        match="Partition not applied; .*: (the model separates fewer than two classes|cannot tell which group is clean"
        "|the model predicts the same class for all samples)",
    ):
        fit(Toy(Dead, adamw), BlobsData(Blobs()), callbacks, max_epochs=4, limit_val_batches=0)
    partition, _, finetune = callbacks
    assert partition.partition.is_clean.all()
    assert not finetune.is_active
    assert partition.summary.advice.startswith(
        "The 203 training samples could not be assessed, and nothing was changed: "
    )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_logits_of_any_precision(precision, evidence):
    data, callbacks = Blobs(), trio(2, evidence_from=evidence, finetune={"lr": 0.01})
    fit(Toy(no_norms, adamw), BlobsData(data), callbacks, max_epochs=3, limit_val_batches=0, precision=precision)
    assert auroc(callbacks[0].partition.clean_probability, ~data.wrong) > 0.95


def test_ten_samples():
    data, callback = Blobs(10), AttributionPartitionCallback(at_epoch=2)
    with pytest.warns(
        UserWarning, match="not applied; .*: (no suspects were found|the model separates fewer than two)"
    ):
        fit(Toy(no_norms, adamw), BlobsData(data), [callback], max_epochs=3)
    assert len(callback.partition) == 10
    assert sum(row.samples for row in callback.partition.class_summary()) == 10


def test_ten_thousand_classes_in_a_fit(tmp_path):
    def wide():
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 10_000))

    data, callback = Blobs(32), AttributionPartitionCallback(at_epoch=1)
    data.y *= 3000
    module = Toy(wide, adamw)
    fit(module, BlobsData(data), [callback], max_epochs=2, limit_val_batches=0)
    assert callback.partition.noise_matrix.shape == (0, 0)
    assert {row.label for row in callback.partition.class_summary()} <= {0, 3000, 6000, 9000}
    callback.partition.to_csv(tmp_path / "all.csv", suspects_only=False)
    assert len((tmp_path / "all.csv").read_text(encoding="utf-8-sig").splitlines()) == 33
