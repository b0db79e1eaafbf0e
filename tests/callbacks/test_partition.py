import csv
import logging
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from captum.attr import LayerGradientXActivation
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, get_worker_info

from lightning_unlearn import AttributionPartitionCallback, DataFormat, Partition
from lightning_unlearn.evidence import collector as collector_module
from lightning_unlearn.evidence.collector import EvidenceCollector
from tests.toys import (
    CLASSES,
    Blobs,
    Plain,
    Swapped,
    Toy,
    adamw,
    auroc,
    convnet,
    fit,
    mlp,
    partition_callback,
)
from tests.toys import (
    QuickData as BlobsData,
)


class Snapshots(L.Callback):
    """The model as it is when an epoch ends, in eval mode."""

    def __init__(self):
        self.nets = {}

    def on_train_epoch_end(self, trainer, pl_module):
        clone = Toy(pl_module_net(pl_module))
        clone.load_state_dict(pl_module.state_dict())
        self.nets[trainer.current_epoch + 1] = clone.eval()


def pl_module_net(module):
    return {9: convnet, 8: mlp}[len(module.net)] if isinstance(module.net, nn.Sequential) else Swapped


@pytest.fixture
def passes(monkeypatch):
    """The epochs and training steps at which the training set is passed over."""
    noted, pass_over = [], EvidenceCollector.pass_over

    def noting(self, fit):
        noted.append((fit.epoch, fit.pl_module.steps))
        return pass_over(self, fit)

    monkeypatch.setattr(EvidenceCollector, "pass_over", noting)
    return noted


def naive_support(net, data, layer, at_input):
    """One sample at a time, plain Captum: its label's logit and the strongest other's are attributed separately."""
    out = []
    for x, y in zip(data.x, data.y, strict=True):
        logits = net(x.unsqueeze(0))[0]
        rival = max((c for c in range(CLASSES) if c != y), key=lambda c: logits[c].item())
        method = LayerGradientXActivation(net, layer)
        label, other = (
            method.attribute(x.unsqueeze(0), target=target, attribute_to_layer_input=at_input).sum()
            for target in (int(y), rival)
        )
        out.append((label - other).item())
    return torch.tensor(out).sigmoid()


@pytest.mark.parametrize(("net", "image"), [(mlp, False), (convnet, True)])
def test_finds_the_planted_wrong_labels(net, image):
    data = BlobsData(Blobs(image=image))
    callback = AttributionPartitionCallback(at_epoch=3)
    fit(Toy(net, adamw), data, [callback])
    partition = callback.partition
    assert not partition.warning
    assert auroc(partition.clean_probability, ~data.train.wrong) > 0.97
    assert partition.noise_rate == pytest.approx(data.train.wrong.float().mean().item(), abs=0.08)
    assert partition.label.equal(data.train.y)
    assert partition.epoch == 3
    assert partition.suggested_label[partition.is_clean].equal(partition.label[partition.is_clean])
    suspects = partition.suspect_indices()
    right = (partition.suggested_label[suspects] == data.train.clean[suspects]).float().mean()
    assert right > 0.8


def test_the_papers_recipe_yields_a_partition():
    callback = AttributionPartitionCallback(at_epoch=1, recipe="rlap")
    fit(Toy(convnet), BlobsData(Blobs(image=True)), [callback], max_epochs=2)
    assert callback.partition.recipe == "rlap"
    assert not callback.partition.warning
    assert 0 < len(callback.partition.suspect_indices()) < 203


def test_the_papers_recipe_says_why_there_is_none():
    callback = AttributionPartitionCallback(at_epoch=1, recipe="rlap")
    with pytest.warns(UserWarning, match="not applied; .*: the two do not differ in the model's loss"):
        fit(Toy(), BlobsData(Blobs()), [callback], max_epochs=2)
    assert len(callback.partition.suspect_indices()) == 0


def test_passes_when_epochs_are_complete(passes):
    callback = partition_callback(at_epoch=3, evidence_from="eval_passes")
    module = Toy()
    fit(module, BlobsData(Blobs()), [callback], max_epochs=5)
    assert passes == [(epoch, 7 * epoch) for epoch in (1, 2, 3)]
    assert callback.partition.epoch == 3


def test_a_recipe_that_does_not_average_passes_once(passes):
    callback = partition_callback(at_epoch=3, recipe="rlap", evidence_from="eval_passes")
    fit(Toy(), BlobsData(Blobs()), [callback])
    assert [epoch for epoch, _ in passes] == [3]


@pytest.mark.parametrize("recipe", ["auto", "rlap"])
def test_where_training_is_read_there_is_one_pass(recipe, passes):
    callback = AttributionPartitionCallback(at_epoch=3, recipe=recipe)
    fit(Toy(), BlobsData(Blobs()), [callback])
    assert passes == [(3, 21)]


def test_before_it_exists_the_error_names_the_epoch():
    with pytest.raises(RuntimeError, match="it is computed when 7 epochs are complete"):
        _ = AttributionPartitionCallback(at_epoch=7).partition


def test_fast_dev_run_neither_partitions_nor_complains(recwarn):
    fit(Toy(), BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=3)], fast_dev_run=True)
    assert not [w for w in recwarn if "partition" in str(w.message)]


@pytest.mark.parametrize(
    ("net", "image", "layer", "at_input"),
    [(mlp, False, None, True), (Swapped, False, None, True), (convnet, True, "net.0", False)],
    ids=["default layer", "attributes in another order than calls", "a convolution by name"],
)
def test_evidence_is_the_mean_over_the_passes_of_captum_on_the_model_as_it_was(net, image, layer, at_input):
    data = Blobs(41, image=image)
    callback, snapshots = partition_callback(layer, at_epoch=3, evidence_from="eval_passes"), Snapshots()
    fit(Toy(net), BlobsData(data), [callback, snapshots])
    name = layer or ("net.head" if net is Swapped else "net.7")
    expected = torch.stack(
        [
            naive_support(model, data, model.get_submodule(name), at_input)
            for epoch, model in snapshots.nets.items()
            if epoch <= 3
        ]
    ).mean(dim=0)
    torch.testing.assert_close(callback.partition.label_evidence, expected, rtol=1e-4, atol=1e-5)
    assert callback.partition.layer == f"{'input' if at_input else 'output'} of '{name}'"


class OddSampler(BatchSampler):
    """Batches of one class after the other, drawn twice."""

    def __init__(self, data):
        super().__init__(RandomSampler(data), batch_size=10, drop_last=False)
        self.data = data

    def __iter__(self):
        order = self.data.y.argsort().repeat(2).tolist()
        return iter([order[i : i + 10] for i in range(0, len(order), 10)])

    def __len__(self):
        return (2 * len(self.data) + 9) // 10


class OwnLoader(DataLoader):
    """Cannot be made again by whoever does not know its arguments."""

    def __init__(self, data, secret):
        super().__init__(data, batch_size=secret, shuffle=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, batch_size=16, shuffle=True),
        lambda data: DataLoader(data, batch_size=16, shuffle=True, drop_last=True),
        lambda data: DataLoader(data, batch_size=16, shuffle=True, num_workers=2),
        lambda data: DataLoader(data, batch_sampler=OddSampler(data)),
        lambda data: OwnLoader(data, 7),
        lambda data: DataLoader(data, batch_size=300),
    ],
    ids=["shuffled", "drop_last", "workers", "batch sampler", "subclass", "one batch"],
)
def test_rows_are_in_dataset_order_however_the_loader_draws(make):
    data = Blobs(101)
    callback, snapshots = partition_callback(at_epoch=1, evidence_from="eval_passes"), Snapshots()
    fit(Toy(), make(data), [callback, snapshots], max_epochs=2)
    model = snapshots.nets[1]
    expected = naive_support(model, data, model.net[7], at_input=True)
    torch.testing.assert_close(callback.partition.label_evidence, expected, rtol=1e-4, atol=1e-5)
    assert callback.partition.label.equal(data.y)


class TransferHooks(BlobsData):
    """Samples are made right only on their way to the device; augmentation is guarded as Lightning recommends."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = lambda rows: {"x": torch.stack([x for x, _ in rows]), "y": [int(y) for _, y in rows]}
        return loader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return (batch["x"], torch.tensor(batch["y"])) if isinstance(batch, dict) else batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 1000 if self.trainer.training else x * 2), y


def test_transfer_hooks_are_applied_and_augmentation_is_off():
    data = Blobs(41)
    callback, snapshots = partition_callback(at_epoch=1, evidence_from="eval_passes"), Snapshots()
    fit(Toy(), TransferHooks(data), [callback, snapshots], max_epochs=2)
    model = snapshots.nets[1]
    data.x = data.x * 2
    expected = naive_support(model, data, model.net[7], at_input=True)
    torch.testing.assert_close(callback.partition.label_evidence, expected, rtol=1e-4, atol=1e-5)


class TwoInputs(Toy):
    """Takes its batch as a dict of two inputs and a label."""

    def forward(self, left, right):
        return self.net(torch.cat([left, right], dim=1))

    def training_step(self, batch):
        self.steps += 1
        return cross_entropy(self(batch["left"], batch["right"]), batch["label"].long())


def test_batch_to_xy_feeds_a_forward_with_several_arguments():
    data = Blobs(101)

    def collate(rows):
        x, y = torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
        return {"left": x[:, :8], "right": x[:, 8:], "label": y.to(torch.int32)}

    def to_xy(batch):
        return (batch["left"], batch["right"]), batch["label"]

    callback = AttributionPartitionCallback(at_epoch=2, data=DataFormat(batch_to_xy=to_xy))
    fit(TwoInputs(), DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate), [callback], max_epochs=3)
    assert auroc(callback.partition.clean_probability, ~data.wrong) > 0.9


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("recipe", ["label", "rlap"])
def test_works_in_every_precision(precision, recipe):
    data = Blobs(101)
    callback = AttributionPartitionCallback(at_epoch=2, recipe=recipe)
    fit(Toy(optimizer=adamw), BlobsData(data), [callback], max_epochs=3, precision=precision)
    assert callback.partition.label.equal(data.y)
    if recipe == "label":
        assert auroc(callback.partition.clean_probability, ~data.wrong) > 0.9


def test_saves_loads_and_exports(tmp_path):
    callback = AttributionPartitionCallback(at_epoch=2)
    fit(Toy(), BlobsData(Blobs()), [callback], max_epochs=3)
    partition = callback.partition
    partition.save(tmp_path / "partition.pt")
    loaded = Partition.load(tmp_path / "partition.pt")
    assert loaded.clean_probability.equal(partition.clean_probability)
    assert (loaded.layer, loaded.noise_rate, loaded.epoch) == ("input of 'net.7'", partition.noise_rate, 2)
    partition.to_csv(tmp_path / "suspects.csv")
    with (tmp_path / "suspects.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == partition.suspect_indices().tolist()


def test_state_is_tensors_and_primitives(tmp_path):
    for epochs in (2, 4):  # while evidence is gathered, and once the partition is computed
        callback = AttributionPartitionCallback(at_epoch=epochs - 1 if epochs == 4 else 3)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit(Toy(), BlobsData(Blobs()), [callback, keep], max_epochs=4, enable_checkpointing=True)
        held = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]["AttributionPartitionCallback"]
        torch.save(held if epochs == 2 else callback.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert (state["partition"] is None) == (epochs == 2)
        fresh = AttributionPartitionCallback(at_epoch=3)
        fresh.load_state_dict(state)
        assert re.sub(r"\s", "", str(fresh.state_dict())) == re.sub(r"\s", "", str(state))


def test_a_recipe_that_does_not_count_wrong_labels_goes_by_one_half():
    callback = partition_callback(at_epoch=1, recipe="aum", suspect_precision=0.99, min_class_fraction=0)
    fit(Toy(convnet), BlobsData(Blobs(noise=0.4, image=True)), [callback], max_epochs=2)
    assert callback.partition.is_clean.equal(callback.partition.clean_probability >= 0.5)
    assert callback.partition.expected_precision is None


def test_the_earlier_threshold_is_an_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'threshold'"):
        AttributionPartitionCallback(at_epoch=1, threshold=0.5)


def test_a_dataset_whose_labels_change_is_refused_between_passes_and_not_read_in_training(monkeypatch):
    class Drifting(Blobs):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, (y + len(self.read) // 600) % CLASSES

    with pytest.raises(ValueError, match=r"every dataset index to keep its label, but \d+ of 32 changed"):
        fit(Toy(), BlobsData(Drifting()), [partition_callback(at_epoch=3, evidence_from="eval_passes")])
    # Training steps are no longer read then.
    said = []
    monkeypatch.setattr(collector_module, "rank_zero_info", said.append)
    callback = AttributionPartitionCallback(at_epoch=3)
    fit(Toy(), BlobsData(Drifting()), [callback])
    assert [line for line in said if "rows have a different label than the one seen before" in line] == said[:1]
    assert not callback.partition.label.equal(Drifting().y)


class Dressed(Toy):
    """Returns its logits in something, as Hugging Face models do."""

    as_mapping = True

    def forward(self, x):
        logits = self.net(x)
        return {"logits": logits, "loss": None} if self.as_mapping else SimpleNamespace(logits=logits)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_logits_may_come_in_a_mapping_or_an_object(as_mapping):
    plain, dressed = AttributionPartitionCallback(at_epoch=2), AttributionPartitionCallback(at_epoch=2)
    fit(Toy(), BlobsData(Blobs()), [plain], max_epochs=3, limit_val_batches=0)
    module = Dressed()
    module.as_mapping = as_mapping
    fit(module, BlobsData(Blobs()), [dressed], max_epochs=3, limit_val_batches=0)
    assert dressed.partition.clean_probability.equal(plain.partition.clean_probability)


def test_the_input_may_be_keyword_arguments():
    plain = AttributionPartitionCallback(at_epoch=2)
    named = AttributionPartitionCallback(
        at_epoch=2, data=DataFormat(batch_to_xy=lambda batch: ({"x": batch[0]}, batch[1]))
    )
    for callback in (plain, named):
        fit(Toy(), BlobsData(Blobs()), [callback], max_epochs=3)
    assert named.partition.clean_probability.equal(plain.partition.clean_probability)


def test_a_module_without_forward_is_told_to_have_one():
    class NoForward(Plain):
        pass

    with pytest.raises(TypeError, match="Expected NoForward to have a forward that returns logits, but it has none"):
        fit(NoForward(), BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=2)], limit_val_batches=0)


def test_probabilities_instead_of_logits_are_warned_of():
    with pytest.warns(UserWarning, match="forward appears to return probabilities"):
        fit(
            Toy(lambda: nn.Sequential(mlp(), nn.Softmax(1))),
            BlobsData(Blobs()),
            [AttributionPartitionCallback(at_epoch=2)],
        )


def condemns_class_2(evidence):
    return (evidence.label != 2).float()


def test_a_partition_that_loses_a_class_is_not_acted_upon():
    partition = partition_callback(at_epoch=1, recipe=condemns_class_2, min_class_fraction=0)
    with pytest.warns(UserWarning, match="not applied; .*: no sample is kept of class 2"):
        fit(Toy(), BlobsData(Blobs()), [partition], max_epochs=2)
    assert not partition.partition.is_actionable


def test_a_linear_called_after_the_head_is_not_taken_for_it():
    class SideTrack(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head, self.side = nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(8, 1)

        def forward(self, x):
            z = self.fc(x).relu()
            logits = self.head(z)
            self.seen = self.side(z)
            return logits

    callback = AttributionPartitionCallback(at_epoch=1)
    fit(Toy(SideTrack), BlobsData(Blobs()), [callback], max_epochs=2)
    assert callback.partition.layer == "input of 'net.head'"


def test_files_opened_by_a_worker_are_there_in_the_first_look_too():
    data = NeedsWorker(Blobs())
    loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=1, worker_init_fn=open_file)
    callback = AttributionPartitionCallback(at_epoch=1)
    fit(Toy(), loader, [callback], max_epochs=2)
    assert callback.partition.label.equal(data.inner.y)


class NeedsWorker(Dataset):
    def __init__(self, inner):
        self.inner, self.file = inner, None

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.file[index]


def open_file(_):
    dataset = get_worker_info().dataset
    dataset.file = dataset.inner


@pytest.mark.parametrize(("size", "few"), [(199, True), (200, False)])
def test_few_samples_for_a_class_are_spoken_of(size, few, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    fit(Toy(), BlobsData(Blobs(size)), [AttributionPartitionCallback(at_epoch=1)], max_epochs=2)
    assert any("fewer than 50 samples per class" in record.getMessage() for record in caplog.records) is few
