"""Kinds of classification and of batches, in fits of the three callbacks."""

from collections import namedtuple

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import DataFormat, Partition
from lightning_unlearn.results.labels import REASONS
from tests.toys import CLASSES, FEATURES, Blobs, Toy, auroc, fit, quick_trio, trio

AT, EPOCHS = 5, 7
SIZE = 240
Pair = namedtuple("Pair", ["image", "label"])


def separable(labels, noise, seed=0, size=SIZE):
    """Inputs whose labels, each by itself, are clear; the labels given; which of them are wrong."""
    generator = torch.Generator().manual_seed(seed)
    clean = (torch.rand(size, labels, generator=generator) < 0.4).long()
    center = torch.randn(labels, FEATURES, generator=torch.Generator().manual_seed(5))
    x = 1.5 * (2 * clean - 1).float() @ center + torch.randn(size, FEATURES, generator=generator)
    wrong = torch.rand(size, labels, generator=generator) < noise
    return x, torch.where(wrong, 1 - clean, clean), wrong


class Bits(Toy):
    """One logit for each label."""

    def __init__(self, outputs, flat=False):
        def net():
            return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, outputs))

        super().__init__(net, optimizer=lambda module: torch.optim.Adam(module.parameters(), 1e-2))
        self.flat = flat

    def forward(self, x):
        return self.net(x).squeeze(1) if self.flat else self.net(x)

    def training_step(self, batch):
        x, y = batch
        logits = self(x)
        known = y >= 0
        loss = binary_cross_entropy_with_logits(logits, y.reshape(logits.shape).clamp(0, 1).float(), reduction="none")
        return (loss * known.reshape(logits.shape)).mean()

    validation_step = None


def loader(x, y):
    return DataLoader(TensorDataset(x, y), 32, shuffle=True)


@pytest.mark.parametrize(
    ("flat", "dtype", "shape"),
    [  # every pair of the three
        (False, torch.float32, (SIZE,)),
        (True, torch.float32, (SIZE, 1)),
        (False, torch.int64, (SIZE, 1)),
        (True, torch.int64, (SIZE,)),
        (False, torch.bool, (SIZE,)),
        (True, torch.bool, (SIZE, 1)),
    ],
)
def test_one_logit(flat, dtype, shape):
    x, y, wrong = separable(1, 0.2)
    partition, prune, finetune = trio(AT)
    module = Bits(1, flat)
    fit(module, loader(x, y.to(dtype).reshape(shape)), [partition, prune, finetune], max_epochs=EPOCHS)
    drawn = partition.partition
    assert auroc(-drawn.clean_probability, wrong[:, 0]) > 0.99
    assert drawn.noise_rate == pytest.approx(wrong.float().mean().item(), abs=0.03)
    assert drawn.label.equal(y[:, 0])
    assert drawn.suggested_label.equal(torch.where(drawn.is_clean, y[:, 0], 1 - y[:, 0]))
    assert partition.collector.reader.reason == ""
    assert finetune.is_active
    assert prune.has_result


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_several_labels_are_judged_each_by_itself(evidence, tmp_path):
    x, y, wrong = separable(3, 0.1)
    partition, prune, finetune = trio(AT, evidence_from=evidence)
    fit(Bits(3), loader(x, y.float()), [partition, prune, finetune], max_epochs=EPOCHS)
    drawn = partition.partition
    assert drawn.is_multilabel
    assert drawn.label.equal(y)
    assert drawn.label_probability.shape == (SIZE, 3)
    for label in range(3):
        assert auroc(-drawn.label_probability[:, label], wrong[:, label]) > 0.99
    assert drawn.clean_probability.equal(drawn.label_probability.amin(dim=1))
    assert (drawn.suggested_label != y).equal(drawn.label_probability < 0.5)
    right = torch.where(wrong, 1 - y, y)
    assert (drawn.suggested_label == right).float().mean() > 0.99
    assert set(drawn.reasons()) == {"none", "label"}
    assert sorted(finetune.training_subset.index.tolist()) == drawn.clean_indices().tolist()
    rows = drawn.class_summary()
    assert sorted(row.label for row in rows) == [0, 1, 2]
    for row in rows:
        assert row.samples == int(y[:, row.label].sum())
        assert row.suspects == int(((drawn.suggested_label != y) & (y == 1))[:, row.label].sum())
    drawn.save(tmp_path / "partition")
    assert Partition.load(tmp_path / "partition").label_probability.equal(drawn.label_probability)
    drawn.to_csv(tmp_path / "suspects.csv")
    first = int(drawn.suspect_indices()[0])
    given = " ".join(str(label) for label in range(3) if y[first, label])
    assert (tmp_path / "suspects.csv").read_text(encoding="utf-8-sig").splitlines()[1].startswith(f"{first},{given},")


def test_a_first_batch_that_looks_like_one_of_several_classes_is_noticed_before_the_first_step():
    x, y, _ = separable(3, 0.1)
    y[:32] = one_hot(torch.arange(32) % 3, 3)
    module = Bits(3)
    with pytest.raises(ValueError, match="or task='multilabel' if there may be several"):
        fit(module, loader(x, y.float()), trio(AT), max_epochs=EPOCHS)
    assert module.steps == 0
    partition, *_ = ours = trio(AT, data=DataFormat(task="multilabel"))
    fit(Bits(3), loader(x, y.float()), ours, max_epochs=EPOCHS)
    assert partition.partition.is_multilabel


def test_single_labels_of_several_are_replaced():
    x, y, wrong = separable(3, 0.1)
    partition, _, finetune = callbacks = trio(AT, finetune={"on_noisy": "relabel"}, recipe="label")
    known = {row.numpy().tobytes(): index for index, row in enumerate(x)}
    seen = {}

    class Noting(Bits):
        def training_step(self, batch):
            if self.current_epoch >= AT:
                for row, label in zip(*batch, strict=True):
                    seen[known[row.numpy().tobytes()]] = label
            return super().training_step(batch)

    fit(Noting(3), loader(x, y.float()), callbacks, max_epochs=AT + 1)
    assert len(finetune.training_subset.relabeled) > 10
    assert sorted(seen) == finetune.training_subset.index.tolist()
    for index, label in seen.items():
        assert label.long().equal(partition.partition.suggested_label[index])
        assert label.dtype == torch.float32
    right = torch.where(wrong, 1 - y, y)
    trained = torch.tensor(sorted(seen))
    assert (torch.stack([seen[i] for i in sorted(seen)]).long() == right[trained]).float().mean() > 0.99


def test_a_label_that_all_samples_have_is_not_judged(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_unlearn.partitioning.messages.rank_zero_info", said.append)
    x, y, wrong = separable(2, 0.1)
    y = torch.cat([y, torch.ones(SIZE, 1, dtype=torch.int64)], dim=1)
    partition, *_ = callbacks = trio(AT, recipe="label")
    fit(Bits(3), loader(x, y.float()), callbacks, max_epochs=EPOCHS)
    (found,) = [line for line in said if "labels with wrong values: 2 of 3: label" in line]
    assert "label 2" not in found
    assert "  labels with the same value in all samples are skipped: 2" in said
    drawn = partition.partition
    assert (drawn.label_probability[:, 2] == 1).all()
    assert auroc(-drawn.label_probability[:, 0], wrong[:, 0]) > 0.99


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"layer": "net.0"}, "layer='net.0'"),
        ({"attribution_method": "deeplift"}, "attribution_method='deeplift'"),
        ({"recipe": "rlap"}, "recipe="),
    ],
)
def test_what_several_labels_do_not_allow_is_refused_before_the_first_step(options, found):
    x, y, _ = separable(3, 0.1)
    module = Bits(3)
    with pytest.raises(
        ValueError, match=f"Multi-label tasks are attributed at the input of the head .* {found}.* Leave"
    ):
        fit(module, loader(x, y.float()), trio(AT, **options), max_epochs=EPOCHS)
    assert module.steps == 0


class Ignoring(Toy):
    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    validation_step = None


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
@pytest.mark.parametrize("on_noisy", ["drop", "reweight", "relabel"])
def test_samples_with_the_label_to_ignore_are_not_judged_and_stay(evidence, on_noisy):
    data = Blobs(SIZE)
    ignored = torch.arange(SIZE) % 7 == 0
    data.y[ignored] = -100
    make = trio if on_noisy == "drop" else quick_trio
    partition, prune, finetune = make(AT, evidence_from=evidence, finetune={"on_noisy": on_noisy})
    fit(Ignoring(), DataLoader(data, 32, shuffle=True), [partition, prune, finetune], max_epochs=EPOCHS)
    drawn = partition.partition
    assert drawn.label.equal(data.y.masked_fill(ignored, -1))
    assert (drawn.clean_probability[ignored] == 1).all()
    assert drawn.is_clean[ignored].all()
    assert auroc(-drawn.clean_probability[~ignored], data.wrong[~ignored]) > 0.95
    assert sum(row.samples for row in drawn.class_summary()) == int((~ignored).sum())
    assert partition.collector.reader.reason == ""
    assert set(ignored.nonzero().flatten().tolist()) <= set(finetune.training_subset.index.tolist())


def test_labels_that_are_all_to_be_ignored():
    data = Blobs(40)
    data.y[:] = -100
    with pytest.raises(ValueError, match="at least one labeled sample, but all 40 samples have ignore_index=-100"):
        fit(Ignoring(), DataLoader(data, 8), trio(1, evidence_from="eval_passes"), max_epochs=2)


@pytest.mark.parametrize("kind", ["one-hot", "smoothed"])
@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_labels_with_a_column_for_each_class(kind, on_noisy):
    data = Blobs(SIZE)
    given = data.y
    data.y = one_hot(given, CLASSES).float()
    options = {}
    if kind == "smoothed":
        data.y, options = 0.9 * data.y + 0.1 / CLASSES, {"data": DataFormat(soft_labels="argmax")}
    make = trio if on_noisy == "drop" else quick_trio
    partition, _, finetune = callbacks = make(AT, finetune={"on_noisy": on_noisy}, **options)
    module = Toy()
    module.validation_step = None
    fit(module, DataLoader(data, 32, shuffle=True), callbacks, max_epochs=EPOCHS)
    assert partition.partition.label.equal(given)
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.95
    assert partition.collector.reader.reason == ""
    assert finetune.is_active


# Kinds of batches


class Named(Toy):
    def forward(self, image, scale=1.0):
        return self.net(image * scale)

    def training_step(self, batch):
        named = batch._asdict() if isinstance(batch, tuple) else batch
        return cross_entropy(self(named["image"]), named["label"])

    validation_step = None


def as_dict(rows):
    x, y = torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
    return {"image": x, "label": y, "path": ["a"] * len(rows)}


def as_named_tuple(rows):
    return Pair(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


class Halves(Toy):
    """Takes two inputs."""

    def forward(self, left, right):
        return self.net(torch.cat([left, right], dim=1))

    def training_step(self, batch):
        return cross_entropy(self(*batch[:-1]), batch[-1])

    validation_step = None


def as_halves(rows):
    x, y = torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
    return x[:, :8], x[:, 8:], y


class Returns(Toy):
    """Returns its logits among other things."""

    def __init__(self, wrap, unwrap):
        super().__init__()
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, x):
        return self.wrap(self.net(x))

    def training_step(self, batch):
        return cross_entropy(self.unwrap(self(batch[0])), batch[1])

    validation_step = None


class Sequences(Toy):
    """Sequences of different lengths, padded by a collate function; frames are to be averaged."""

    def forward(self, frames, lengths):
        return self.net(frames.sum(dim=1) / lengths.unsqueeze(1))

    def training_step(self, batch):
        return cross_entropy(self(batch["frames"], batch["lengths"]), batch["labels"])

    validation_step = None


def as_sequences(rows):
    frames = [x.expand(2 + int(y) % 3, -1) for x, y in rows]
    return {
        "labels": torch.stack([y for _, y in rows]),
        "lengths": torch.tensor([len(part) for part in frames]),
        "frames": pad_sequence(frames, batch_first=True),
    }


BATCHES = {
    "a dict": (Named, as_dict, {}),
    "a named tuple": (Named, as_named_tuple, {}),
    "several inputs": (Halves, as_halves, {}),
    "padded sequences": (Sequences, as_sequences, {}),
    "forward returns a tuple": (lambda: Returns(lambda z: (z, 1), lambda out: out[0]), None, {}),
    "forward returns a dict": (lambda: Returns(lambda z: {"logits": z}, lambda out: out["logits"]), None, {}),
    "logits_from": (
        lambda: Returns(lambda z: {"scores": [z]}, lambda out: out["scores"][0]),
        None,
        {"data": DataFormat(logits_from=lambda out: out["scores"][0])},
    ),
    "batch_to_xy": (Named, as_dict, {"data": {"batch_to_xy": lambda batch: (batch["image"], batch["label"])}}),
}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_batches_and_outputs_of_every_common_kind(case, on_noisy):
    make, collate, options = BATCHES[case]
    data, make_callbacks = Blobs(SIZE), trio if on_noisy == "drop" else quick_trio
    partition, prune, finetune = callbacks = make_callbacks(AT, finetune={"on_noisy": on_noisy}, **options)
    data_loader = DataLoader(data, 32, shuffle=True, collate_fn=collate)
    fit(make(), data_loader, callbacks, max_epochs=EPOCHS)
    drawn = partition.partition
    assert drawn.label.equal(data.y)
    assert auroc(-drawn.clean_probability, data.wrong) > 0.95
    assert partition.collector.reader.reason == ""
    assert finetune.is_active
    assert prune.has_result
    assert REASONS.index("label") in drawn.reason.tolist()


class ValidatesDicts(Named):
    def validation_step(self, batch):
        self.log("val_loss", cross_entropy(self(batch["image"]), batch["label"]))


def test_validation_batches_are_read_alike():
    data = Blobs(SIZE)
    partition, *_ = callbacks = trio(AT)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data, 32, shuffle=True, collate_fn=as_dict)

        def val_dataloader(self):
            return DataLoader(Blobs(64, 0, seed=7), 16, collate_fn=as_dict)

    fit(ValidatesDicts(), Data(), callbacks, max_epochs=EPOCHS)
    assert partition.summary.accuracy_before is not None
    assert partition.summary.accuracy_after >= partition.summary.accuracy_before - 0.05


def test_labels_that_are_missing_as_nan():
    x, y, wrong = separable(3, 0.1)
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    given = y.float().masked_fill(missing, torch.nan)

    class Known(Bits):
        def training_step(self, batch):
            return super().training_step((batch[0], batch[1].nan_to_num(-1)))

    partition, _, finetune = ours = trio(
        AT, data=DataFormat(task="multilabel", ignore_index=torch.nan), finetune={"on_noisy": "relabel"}, recipe="label"
    )
    fit(Known(3), loader(x, given), ours, max_epochs=AT + 1)
    drawn = partition.partition
    assert drawn.label.equal(y.masked_fill(missing, -1))
    assert partition.collector.reader.reason == ""
    assert auroc(-drawn.label_probability[~missing], wrong[~missing]) > 0.95
    assert (finetune.training_subset.new_label[missing] == -1).all()


@pytest.mark.parametrize("several_first", [True, False])
@pytest.mark.parametrize("at_epoch", [1, 2])
def test_a_fit_is_not_resumed_with_another_kind_of_labels(tmp_path, several_first, at_epoch):
    x, y, _ = separable(3, 0.1, size=40)
    several, single = DataLoader(TensorDataset(x, y.float()), 40), DataLoader(TensorDataset(x, y[:, 0]), 40)

    class Either(Bits):
        def training_step(self, batch):
            return super().training_step(batch) if batch[1].ndim == 2 else cross_entropy(self(batch[0]), batch[1])

    first, second = (several, single) if several_first else (single, several)
    trainer = fit(Either(3), first, trio(at_epoch), max_epochs=3, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module = Either(3)
    tasks = ("multilabel", "multiclass") if several_first else ("multiclass", "multilabel")
    with pytest.raises(ValueError, match=rf"a {tasks[0]} task, as in the checkpoint, but .* a {tasks[1]} task; give"):
        fit(module, second, trio(at_epoch), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert module.steps == 0
