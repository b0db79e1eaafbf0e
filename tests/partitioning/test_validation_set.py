"""``judge_validation=True``: validation samples are judged too, by one pass, and nothing else changes."""

import copy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, Partition
from lightning_unlearn.results.finding import finding_of
from tests.callbacks.snapshot import random_states
from tests.toys import CLASSES, Blobs, BlobsData, Toy, assert_same_weights, fit, mlp, partition_callback, weights

pytestmark = pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler:UserWarning")
AT = 2
QUICK = {"dry_run": True, "judge_validation": True, "recipe": "aum"}
VALID = Blobs(301, 0.2, seed=7)


class Data(BlobsData):
    """With a validation loader of one's own."""

    def __init__(self, make, size=301, **kwargs):
        super().__init__(Blobs(size), **kwargs)
        self.make = make

    def val_dataloader(self):
        return self.make()


def loader(data=VALID, **kwargs):
    return lambda: DataLoader(data, **{"batch_size": 16, **kwargs})


def judged(make=None, *, size=301, epochs=AT, module=None, callbacks=(), ckpt_path=None, trainer=None, **kwargs):
    """A dry run, its module and its callback."""
    module = module or Toy()
    callback = partition_callback(at_epoch=AT, **{**QUICK, **kwargs})
    data = Data(make or loader(), size, by_epoch=True)
    fit(module, data, [callback, *callbacks], max_epochs=epochs, ckpt_path=ckpt_path, **(trainer or {}))
    return callback, module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A fit of the default recipe, and where it keeps a checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp("whole")
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback, module = judged(
        loader(shuffle=True), epochs=AT + 2, callbacks=[keep], recipe="auto", trainer={"enable_checkpointing": True}
    )
    return folder, callback, module


def test_wrong_labels_of_validation_samples_are_found(whole):
    _, callback, _ = whole
    partition = callback.validation_partition
    assert partition.label.equal(VALID.y)
    flagged = ~partition.is_clean
    assert (flagged & VALID.wrong).sum() >= 0.9 * VALID.wrong.sum()
    assert VALID.wrong[flagged].float().mean() >= 0.9
    # Of errors that the network has learned from the training labels nothing shows.
    assert partition.noise_rate_interval[0] <= VALID.wrong.float().mean() < partition.noise_rate_interval[1] == 1
    assert partition.epoch == AT
    assert partition.fingerprint != callback.partition.fingerprint


def test_it_is_said_and_recorded(whole, tmp_path):
    _, callback, _ = whole
    partition = callback.validation_partition
    suspects = partition.suspect_indices()
    said = callback.summary.advice
    assert f" Validation set, 301 samples: {finding_of(partition)}; nothing was changed. " in said
    assert "Validation accuracy counts these labels as correct." in said
    record = callback.provenance["validation"]
    assert (record["samples"], record["suspects"]) == (301, suspects.sort().values.tolist())
    partition.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().count("\n") == 1 + len(suspects)


class Keeps(L.Callback):
    """A copy of the model as it is when the partition is computed."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == AT:
            self.net = copy.deepcopy(pl_module.net).eval()


def test_it_is_what_the_model_says_in_eval_mode_at_that_moment():
    keeps = Keeps()
    callback, _ = judged(
        loader(shuffle=True), epochs=AT + 1, module=Toy(lambda: mlp(dropout=0.5)), callbacks=[keeps], recipe="argmax"
    )
    partition = callback.validation_partition
    with torch.no_grad():
        logits = keeps.net(VALID.x)
    # What is attributed is a logit less the head's bias.
    suspect = (logits - keeps.net[-1].bias).argmax(dim=1) != VALID.y
    assert partition.suspect_indices().sort().values.equal(suspect.nonzero().flatten())
    assert partition.suggested_label[suspect].equal(logits.argmax(dim=1)[suspect])


def test_the_limit_of_validation_batches_is_none_of_it():
    callback, _ = judged(trainer={"limit_val_batches": 2})
    assert len(callback.validation_partition) == 301
    assert (callback.validation_partition.label >= 0).all()


def test_samples_that_the_sampler_leaves_out_are_not_judged():
    chosen = torch.arange(0, 301, 2)
    callback, _ = judged(loader(sampler=SubsetRandomSampler(chosen.tolist())))
    partition = callback.validation_partition
    assert partition.label[chosen].equal(VALID.y[chosen])
    assert (partition.label[1::2] == -1).all()
    assert partition.is_clean[1::2].all()
    assert callback.provenance["validation"]["samples"] == len(chosen)


def test_training_and_validation_may_be_parts_of_one_data_set():
    data = Blobs(400)

    class Both(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data, 16, sampler=SubsetRandomSampler(range(250)))

        def val_dataloader(self):
            return DataLoader(data, 16, sampler=range(250, 400))

    callback = AttributionPartitionCallback(at_epoch=AT, **QUICK)
    fit(Toy(), Both(), [callback], max_epochs=AT)
    assert (callback.validation_partition.label[:250] == -1).all()
    assert callback.validation_partition.label[250:].equal(data.y[250:])


@pytest.mark.parametrize("kwargs", [{}, {"sanity": 0}, {"acts": True}], ids=["dry", "no sanity check", "fine-tuned"])
def test_the_fit_is_bit_for_bit_the_same_without_it(kwargs):
    ends = []
    for judge in (False, True):
        generator = torch.Generator().manual_seed(5)
        module = Toy(lambda: mlp(dropout=0.5))
        callback = AttributionPartitionCallback(
            at_epoch=AT, judge_validation=judge, recipe="aum", dry_run=not kwargs.get("acts")
        )
        callbacks = [callback, *([CleanSubsetFinetuneCallback()] if kwargs.get("acts") else [])]
        data = Data(loader(Blobs(101, 0.2, seed=7, augment="torch"), shuffle=True, generator=generator), 101)
        fit(module, data, callbacks, max_epochs=AT + 2, num_sanity_val_steps=kwargs.get("sanity", 2))
        ends.append((weights(module), generator.get_state(), random_states(), callback.partition))
    (one, state, randomness, partition), (other, other_state, other_randomness, other_partition) = ends
    assert_same_weights(one, other)
    assert state.equal(other_state)
    assert randomness["torch"].equal(other_randomness["torch"])
    assert randomness["numpy"] == other_randomness["numpy"]
    assert partition.clean_probability.equal(other_partition.clean_probability)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(VALID)


class OwnSampler(Sampler):
    def __init__(self, size=301):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))

    def __len__(self):
        return self.size


def backwards(items):
    return default_collate(items[::-1])


def fewer(items):
    return default_collate(items[: max(1, len(items) - 1)])


REFUSED = {
    "several": (lambda: [loader()(), loader()()], MisconfigurationException, "one validation loader .* the fit has 2"),
    "a stream": (loader(Stream()), TypeError, "judged .*but: Expected a map-style dataset, but Stream is an Iterable"),
    "few": (loader(Blobs(9)), ValueError, "at least 10 validation samples to partition, but the dataset has 9"),
    "no batches": (loader(batch_size=None), ValueError, "but: Expected a DataLoader that batches samples"),
    "own sampler": (loader(sampler=OwnSampler()), TypeError, "as its loader uses a OwnSampler; use one"),
    "another order": (
        loader(collate_fn=backwards),
        TypeError,
        r"\(backwards\) puts .* in the order given\.$",
    ),
    "fewer rows": (loader(collate_fn=fewer), TypeError, r"of 16 samples .* makes 15 rows; keep one row for each"),
    "other inputs": (loader(TensorDataset(VALID.x[:, :3], VALID.y)), ValueError, "RuntimeError: mat1 and mat2"),
    "other labels": (loader(TensorDataset(VALID.x, VALID.y + 3)), ValueError, r"but: Expected labels in \[0, 4\)"),
    "no labels": (loader(TensorDataset(VALID.x)), TypeError, "but: Expected a batch"),
    "trained on": (loader(Blobs(301)), ValueError, "but 301 of its 301 samples are also in the training set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused_before_the_first_step(name):
    make, kind, said = REFUSED[name]

    class Any(Toy):
        def validation_step(self, batch, batch_idx=0, dataloader_idx=0):
            return None

    module = Any()
    callback = AttributionPartitionCallback(at_epoch=AT, **QUICK)
    with pytest.raises(kind, match=said) as caught:
        fit(module, Data(make), [callback], max_epochs=AT)
    assert "attribution_dataloader" not in str(caught.value)
    assert module.steps == 0
    # It is no fault where nobody asks.
    plain = AttributionPartitionCallback(at_epoch=AT, **{**QUICK, "judge_validation": False})
    fit(Any(), Data(make, 51), [plain], max_epochs=AT)


def test_a_fit_without_validation_is_refused():
    callback = AttributionPartitionCallback(at_epoch=AT, **QUICK)
    with pytest.raises(MisconfigurationException, match="judge_validation=True needs a fit with validation"):
        fit(Toy(), DataLoader(Blobs(101), 16), [callback], max_epochs=AT)
    with pytest.raises(MisconfigurationException, match="and no limit_val_batches=0"):
        judged(trainer={"limit_val_batches": 0})


def test_when_to_ask():
    with pytest.raises(RuntimeError, match="of the validation set: set judge_validation=True to compute it with"):
        _ = AttributionPartitionCallback(at_epoch=AT).validation_partition
    with pytest.raises(RuntimeError, match="of the validation set yet: it is computed with that of the training set"):
        _ = AttributionPartitionCallback(at_epoch=AT, judge_validation=True).validation_partition
    with pytest.raises(ValueError, match="Expected judge_validation to be True or False, but got 1"):
        AttributionPartitionCallback(at_epoch=AT, judge_validation=1)


class Breaks(Blobs):
    """Cannot be read any more once the fit has begun."""

    broken = False

    def __getitem__(self, index):
        if self.broken and index == 77:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_validation_data_that_fail_in_the_middle_end_no_fit():
    data = Breaks(101, 0.2, seed=7)

    class Later(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            data.broken = True

    class Blind(Toy):
        def validation_step(self, batch):
            data.broken = False

    with pytest.warns(UserWarning, match="The validation set was not judged: OSError: the disk is gone"):
        callback, _ = judged(loader(data), module=Blind(), callbacks=[Later()], trainer={"check_val_every_n_epoch": 10})
    assert len(callback.partition) == 301
    assert callback.provenance["validation"] is None
    with pytest.raises(RuntimeError, match="No partition of the validation set: OSError: the disk is gone"):
        _ = callback.validation_partition


def test_validation_labels_that_are_all_equal_are_not_judged():
    same = TensorDataset(VALID.x, torch.zeros_like(VALID.y))
    with pytest.warns(UserWarning, match="not judged: all of its samples have the same label, or none"):
        callback, _ = judged(loader(same))
    assert len(callback.partition) == 301


def assert_same_partition(one: Partition, other: Partition):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("epoch", [0, AT])
def test_a_fit_that_goes_on_has_it(whole, epoch):
    folder, callback, module = whole
    resumed, other = judged(
        loader(shuffle=True), epochs=AT + 2, recipe="auto", ckpt_path=folder / f"epoch={epoch}.ckpt"
    )
    assert_same_partition(resumed.validation_partition, callback.validation_partition)
    assert_same_weights(weights(other), weights(module))
    assert resumed.summary.advice == callback.summary.advice


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_partition_without_it(whole, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    judged(epochs=AT + 1, callbacks=[keep], judge_validation=False, trainer={"enable_checkpointing": True})
    with pytest.warns(UserWarning, match="judge_validation=True has no effect: the checkpoint's partition"):
        callback, _ = judged(epochs=AT + 2, ckpt_path=tmp_path / f"epoch={AT}.ckpt")
    with pytest.raises(RuntimeError, match="No partition of the validation set"):
        _ = callback.validation_partition


def test_it_is_drawn_again_with_that_of_the_training_set():
    callback, _ = judged(epochs=AT + 2, every_n_epochs=1, min_change=0, dry_run=False)
    assert [drawn.epoch for drawn in callback.rounds] == [AT, AT + 1]
    assert callback.validation_partition.epoch == AT + 1


class Several(Toy):
    """Three labels, each of which a sample may have."""

    def training_step(self, batch):
        self.steps += 1
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch):
        return None


def of_several(seed):
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :CLASSES] > 0).float())


def test_of_several_labels_each_is_judged():
    train, valid = of_several(1), of_several(2)
    valid.tensors[1][:30, 0] = 1 - valid.tensors[1][:30, 0]
    callback = AttributionPartitionCallback(at_epoch=10, **{**QUICK, "recipe": "auto"})
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Several(), DataLoader(train, 16, shuffle=True), DataLoader(valid, 16))
    partition = callback.validation_partition
    assert partition.label.shape == (300, CLASSES)
    assert partition.label_probability[:30, 0].mean() < partition.label_probability[30:, 0].mean()


def test_a_part_of_a_data_set_that_is_read_otherwise():
    callback, _ = judged(loader(Subset(VALID, range(0, 300, 2))))
    assert callback.validation_partition.label.equal(VALID.y[:300:2])
