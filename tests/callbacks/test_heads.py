"""Heads that are more than a Linear, and the loader that a user offers for the passes."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, default_collate

from lightning_unlearn import DataFormat
from lightning_unlearn.trainer.scoring_loader import OFFER
from tests.toys import CLASSES, FEATURES, Blobs, Toy, auroc, fit, partition_callback, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio

AT, EPOCHS, SIZE = 5, 7, 240


class Adapted(nn.Module):
    """A frozen Linear with a low-rank one beside it, new and therefore zero, as LoRA adds it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def body():
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU())


def adapted():
    return nn.Sequential(*body(), Adapted(nn.Linear(20, CLASSES)))


class Inline(nn.Module):
    """The adapter is added where no module of its own sees it."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = body(), nn.Linear(20, CLASSES)
        self.up = nn.Linear(20, CLASSES, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        h = self.body(x)
        return self.up(h) + self.fc(h)


class Cast(nn.Module):
    """Casts what its head returns, to which something is added that is zero at first."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = body(), nn.Linear(20, CLASSES)
        self.shift = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        return (self.fc(self.body(x)) + self.shift).double()


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(*body(), nn.Linear(20, CLASSES))

    def forward(self, x):
        return self.inner(x) / 2


def callbacks(**kwargs):
    return trio(AT, prune={"layer": "net.2"}, **kwargs)


def test_an_adapted_head_is_attributed_at_its_input_and_read_as_a_whole():
    data = Blobs(SIZE)
    partition, prune, finetune = ours = callbacks()
    module = Toy(adapted)
    fit(module, DataLoader(data, 32, shuffle=True), ours, max_epochs=EPOCHS, limit_val_batches=0)
    assert partition.partition.layer == "input of 'net.4'"
    assert partition.collector.reader.reason == ""
    assert partition.collector.reader.head == "net.4"
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.95
    assert module.net[4].up.weight.abs().sum() > 0
    assert prune.has_result
    assert finetune.is_active


def test_an_adapted_head_is_not_pruned():
    module = Toy(adapted)
    message = "head to be a torch.nn.Linear, but 'net.4', which makes the logits, is a Adapted around one; name the"
    with pytest.raises(ValueError, match=message):
        fit(module, DataLoader(Blobs(SIZE), 16), trio(AT), max_epochs=EPOCHS, limit_val_batches=0)
    assert module.steps == 0


def test_an_adapter_that_no_module_holds_is_not_overlooked():
    data = Blobs(SIZE)
    partition, *_ = ours = trio(AT, prune={"layer": "net.body.2"})
    fit(Toy(Inline), DataLoader(data, 32, shuffle=True), ours, max_epochs=EPOCHS, limit_val_batches=0)
    # At the start the Linear's numbers are the logits, but not later: the network that holds both is read.
    assert partition.collector.reader.head == "net"
    assert partition.collector.reader.reason == ""
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.95


class InlineModule(Toy):
    """As Inline, but in the LightningModule itself, with a cast."""

    def __init__(self):
        super().__init__(body)
        self.fc = nn.Linear(20, CLASSES)
        self.shift = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        return (self.fc(self.net(x)) + self.shift).double()


def test_evidence_that_turns_out_not_to_be_of_the_logits_is_dropped():
    data = Blobs(SIZE)
    partition, *_ = ours = trio(AT, prune={"layer": "net.2"})
    with pytest.warns(UserWarning, match="The output of 'fc' no longer equals the logits that forward returns."):
        fit(InlineModule(), DataLoader(data, 32, shuffle=True), ours, max_epochs=EPOCHS, limit_val_batches=0)
    assert partition.collector.epochs_seen == [AT]
    assert partition.partition.layer == "input of 'fc'"


def test_what_is_scaled_after_the_head_is_read_as_it_leaves_the_network():
    data = Blobs(SIZE)
    partition, *_ = ours = trio(AT)
    fit(Toy(Tempered), DataLoader(data, 32, shuffle=True), ours, max_epochs=EPOCHS, limit_val_batches=0)
    assert partition.collector.reader.head == "net"
    assert partition.partition.layer == "input of 'net.inner.4'"
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.95


# The loader for the passes


class Offers(BlobsData):
    """Augments in training, and offers the samples as they are."""

    def __init__(self, offered, **kwargs):
        super().__init__(Blobs(SIZE, augment="torch"), **kwargs)
        self.offered, self.asked = offered, 0

    def attribution_dataloader(self):
        self.asked += 1
        return DataLoader(self.offered, batch_size=64)


class ListensToInfo(L.Callback):
    def __init__(self, monkeypatch):
        self.said = []
        monkeypatch.setattr("lightning_unlearn.trainer.data_checks.rank_zero_info", self.said.append)

    def of_augmentation(self):
        return [line for line in self.said if "random augmentation" in line]


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_passes_draw_from_the_loader_that_is_offered(monkeypatch, evidence):
    offered = Blobs(SIZE)
    data, listens = Offers(offered), ListensToInfo(monkeypatch)
    *_, finetune = ours = trio(AT, evidence_from=evidence)
    fit(Toy(), data, ours, max_epochs=EPOCHS)
    assert data.asked == 1
    passes = AT if evidence == "passes" else 1
    assert all(offered.read.count(index) >= passes for index in range(SIZE))
    assert listens.of_augmentation() == []
    assert finetune.is_active
    # A new fit asks again.
    fit(Toy(), data, ours, max_epochs=EPOCHS)
    assert data.asked == 2


def test_that_samples_are_scored_as_augmented_is_said_once(monkeypatch):
    listens = ListensToInfo(monkeypatch)
    fit(Toy(), BlobsData(Blobs(SIZE, augment="torch")), trio(AT), max_epochs=EPOCHS)
    assert len(listens.of_augmentation()) == 1
    assert f"{OFFER}()" in listens.of_augmentation()[0]
    listens.said.clear()
    fit(Toy(), BlobsData(Blobs(SIZE)), trio(AT), max_epochs=EPOCHS)
    assert listens.of_augmentation() == []


@pytest.mark.parametrize("holder", ["data", "module"])
def test_scores_are_those_of_the_samples_as_they_are_and_training_is_undisturbed(holder):
    """The loader is offered by the DataModule or by the LightningModule."""
    plain = fit_weights = None
    for offers in (False, True):
        module, data = Toy(), BlobsData(Blobs(SIZE, augment="torch"))
        if offers:
            owner = data if holder == "data" else module
            owner.attribution_dataloader = lambda: DataLoader(Blobs(SIZE), batch_size=50)
        partition = partition_callback(at_epoch=2, dry_run=True, evidence_from="eval_passes")
        fit(module, data, [partition], max_epochs=3)
        if not offers:
            plain, fit_weights = partition.partition, weights(module)
    assert all(value.equal(weights(module)[name]) for name, value in fit_weights.items())
    assert not plain.label_evidence.equal(partition.partition.label_evidence)


@pytest.mark.parametrize(
    ("offered", "error", "message"),
    [
        (Blobs(SIZE - 1), Exception, f"return a loader of the {SIZE} samples .*, but its data set has {SIZE - 1}"),
        (Blobs(SIZE, seed=1), ValueError, r"samples in the same order, but \d+ of 16 labels that were compared differ"),
    ],
    ids=["another number", "other labels"],
)
def test_a_loader_of_other_samples_is_refused_before_the_first_step(offered, error, message):
    module = Toy()
    with pytest.raises(error, match=message):
        fit(module, Offers(offered), trio(AT), max_epochs=EPOCHS)
    assert module.steps == 0


def test_an_offer_that_is_no_loader_is_refused():
    module, data = Toy(), BlobsData(Blobs(SIZE))
    data.attribution_dataloader = lambda: [1, 2, 3]
    with pytest.raises(TypeError, match=r"Expected one torch.utils.data.DataLoader"):
        fit(module, data, trio(AT), max_epochs=EPOCHS)
    assert module.steps == 0


def mixing(samples):
    """A collate function for MixUp, which makes soft labels."""
    x, y = default_collate(samples)
    share, other = float(torch.rand(1)), torch.randperm(len(x))
    hot = one_hot(y, CLASSES).float()
    return share * x + (1 - share) * x[other], share * hot + (1 - share) * hot[other]


class Unvalidated(Toy):
    validation_step = None


@pytest.mark.parametrize("soft_labels", ["error", "argmax"])
def test_what_collate_fn_mixes_is_scored_unmixed_where_a_loader_is_offered(soft_labels):
    data = BlobsData(Blobs(SIZE), collate_fn=mixing)
    data.attribution_dataloader = lambda: DataLoader(data.train, batch_size=50)
    partition, _, finetune = ours = trio(AT, data=DataFormat(soft_labels=soft_labels))
    fit(Unvalidated(), data, ours, max_epochs=EPOCHS)
    assert partition.collector.reader.reason
    assert partition.partition.label.equal(data.train.y)
    assert auroc(-partition.partition.clean_probability, data.train.wrong) > 0.95
    assert finetune.is_active


@pytest.mark.parametrize(
    ("offers", "settings", "error", "message"),
    [
        (False, {}, ValueError, r"a single 1 in each row, .* mixed .*, offer attribution_dataloader\(\)"),
        (
            False,
            {"data": {"soft_labels": "argmax"}},
            ValueError,
            r"same label on every read, .* define attr",
        ),
        (
            True,
            {"finetune": {"on_noisy": "relabel"}},
            TypeError,
            "differ between .*, for example because collate_fn mixes samples",
        ),
    ],
    ids=["soft", "the largest", "re-labeled"],
)
def test_mixed_samples_that_cannot_be_judged_or_relabeled_are_refused_before_the_first_step(
    offers, settings, error, message
):
    data, module = BlobsData(Blobs(40), collate_fn=mixing), Unvalidated()
    if offers:
        data.attribution_dataloader = lambda: DataLoader(data.train, batch_size=50)
    with pytest.raises(error, match=message):
        fit(module, data, trio(1, **settings), max_epochs=2)
    assert module.steps == 0
