"""dry_run=True: what would be done is said, and nothing is."""

import logging
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.toys import (
    CLASSES,
    Blobs,
    IndexRecorder,
    Toy,
    adamw,
    assert_same_weights,
    fit,
    mlp,
    weights,
)
from tests.toys import (
    QuickData as BlobsData,
)
from tests.toys import (
    quick_trio as trio,
)

LOGGER = "lightning.pytorch.utilities.rank_zero"
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


@pytest.fixture
def said(caplog):
    """What is logged, a function, since more is to come."""
    caplog.set_level(logging.INFO, logger=LOGGER)
    return lambda: [record.getMessage() for record in caplog.records if record.name == LOGGER]


VARIANTS = {
    "drop": {},
    "reweight": {"on_noisy": "reweight", "lr": 0.01},
    "relabel": {"on_noisy": "relabel", "relabel_threshold": 0.4},
    "layers": {"mode": "layers", "optimizer": "restart"},
}


@pytest.fixture(scope="module")
def alone():
    """Final weights and order of a fit without our callbacks, by what the tests vary."""
    torch.set_num_threads(1)
    data, made = Blobs(101), {}
    for augment in ("", "torch"):
        record, module = IndexRecorder(data), Toy(lambda: mlp(0.3), adamw)
        fit(module, BlobsData(Blobs(101, augment=augment)), [] if augment else [record], max_epochs=5)
        made[augment] = weights(module), record.by_epoch
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("every", [None, 1])
def test_the_weights_are_bit_for_bit_those_of_a_fit_without_the_callbacks(variant, every, alone):
    data = Blobs(101)
    callbacks = trio(2, dry_run=True, finetune=VARIANTS[variant], every_n_epochs=every, min_change=0)
    record, module = IndexRecorder(data), Toy(lambda: mlp(0.3), adamw)
    trainer = fit(module, BlobsData(data), [*callbacks, record], max_epochs=5)
    assert_same_weights(weights(module), alone[""][0])
    assert record.by_epoch == alone[""][1]
    partition, _, finetune = callbacks
    assert len(partition.rounds) == (1 if every is None else 3)
    assert 10 < len(partition.partition.suspect_indices()) < 50
    assert not finetune.is_active
    assert finetune.summary_clause() == ""
    with pytest.raises(RuntimeError, match="the partition was not applied, and training continues on all data"):
        finetune.training_subset  # noqa: B018
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert "_on_before_batch_transfer" not in module.__dict__
    assert len(trainer.optimizers) == 1


def test_so_they_are_with_augmentation(alone):
    module = Toy(lambda: mlp(0.3), adamw)
    data = BlobsData(Blobs(101, augment="torch"))
    fit(module, data, trio(2, dry_run=True, finetune={"on_noisy": "relabel"}), max_epochs=5)
    assert_same_weights(weights(module), alone["torch"][0])


@pytest.mark.parametrize(
    ("on_noisy", "wording"),
    [
        ("drop", "152 clean samples"),
        ("reweight", "203 samples, each drawn with its probability of being clean"),
        ("relabel", "152 clean samples and 51 re-labeled ones"),
    ],
)
def test_the_log_says_what_would_be_trained_on_and_what_that_would_cost(said, on_noisy, wording):
    data = Blobs()
    partition = make_partition(torch.where(torch.arange(203) < 152, 0.95, 0.05), data.y, epoch=2)
    object.__setattr__(partition, "suggested_label", (data.y + 1) % CLASSES)
    source = Published(partition, dry_run=True)
    finetune, module = CleanSubsetFinetuneCallback(on_noisy=on_noisy), Toy()
    fit(module, BlobsData(data), [source, finetune], max_epochs=6)
    (line,) = [text for text in said() if "would train" in text]
    assert "Dry run: Fine-tuning continues from the current weights: no label is suspect." in said()
    assert module.steps_by_epoch == dict.fromkeys(range(6), 7)
    if on_noisy == "relabel":  # everything, so at the same cost
        assert line == f"Dry run: would train on {wording}, 4 epochs of as many batches as before."
        return
    found = re.fullmatch(
        r"Dry run: would train on (.+), 4 epochs of (\d+) batches instead of 7: at the last epoch's speed about"
        r" ([\d.]+) s instead of ([\d.]+) s\.",
        line,
    )
    assert found, line
    assert found[1] == wording
    # 152 samples; .95 and .05 of all.
    assert int(found[2]) == 5
    assert 0 <= float(found[3]) <= float(found[4])


def test_the_cost_is_that_of_the_epochs_that_remain(said):
    data = Blobs()
    source = Published(make_partition(torch.where(torch.arange(203) < 100, 0.9, 0.1), data.y, epoch=2), dry_run=True)
    finetune = CleanSubsetFinetuneCallback()

    class Slow(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                finetune._finetuning.seconds_per_epoch = 14.0  # 2 s a batch

    fit(Toy(), BlobsData(data), [Slow(), source, finetune], max_epochs=12)
    (line,) = [text for text in said() if "would train" in text]
    assert "10 epochs of 4 batches instead of 7: at the last epoch's speed about 80.0 s instead of 140.0 s" in line


def test_an_open_end_has_no_cost(said):
    data = Blobs()
    source = Published(make_partition(torch.where(torch.arange(203) < 100, 0.9, 0.1), data.y, epoch=2), dry_run=True)
    fit(Toy(), BlobsData(data), [source, CleanSubsetFinetuneCallback()], max_epochs=-1, max_steps=40)
    assert "Dry run: would train on 100 clean samples." in said()


def test_neurons_that_would_be_pruned_are_only_named():
    data = PlantedData()
    source = Published(make_partition(data.probability(), data.y), dry_run=True)
    prune, finetune, module = SensitivityPruneCallback("fc", amount=0.5), CleanSubsetFinetuneCallback(), Planted()
    before = weights(module)
    fit(module, data, [source, prune, finetune], max_epochs=3)
    assert_same_weights(weights(module), before)
    assert prune.summary_clause().startswith("would prune")
    assert prune.get_mask(module.trainer, module) is None


def test_a_partition_that_would_not_be_acted_upon_has_nothing_to_report(said):
    data = Blobs()
    source = Published(make_partition(torch.full((203,), 0.9), data.y, epoch=1, warning="it is not sure"), dry_run=True)
    finetune = CleanSubsetFinetuneCallback()
    fit(Toy(), BlobsData(data), [source, finetune], max_epochs=3)
    assert not [text for text in said() if "Dry run" in text]


def test_every_round_is_reported_once_also_where_the_fit_is_resumed(said, tmp_path):
    final = []
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for epoch in (None, 1, 2, 3):
        data = Blobs(101)
        callbacks = trio(2, dry_run=True, every_n_epochs=2, min_change=0, finetune={"on_noisy": "relabel"})
        module, record = Toy(optimizer=adamw), IndexRecorder(data)
        lines = len(said())
        fit(
            module,
            BlobsData(data, by_epoch=True),
            [*callbacks, record, *([keep] if epoch is None else [])],
            ckpt_path=None if epoch is None else tmp_path / f"epoch={epoch}.ckpt",
            max_epochs=6,
            enable_checkpointing=epoch is None,
        )
        assert [drawn.epoch for drawn in callbacks[0].rounds] == [2, 4]
        reported = [text for text in said()[lines:] if "would train" in text]
        left = [int(re.search(r"(\d) epochs of", text)[1]) for text in reported]
        assert left == {None: [4, 2], 1: [4, 2], 2: [2], 3: [2]}[epoch], epoch
        assert not callbacks[2].is_active
        assert all(sorted(indices) == list(range(101)) for indices in record.by_epoch.values())
        final.append(weights(module))
    plain = Toy(optimizer=adamw)
    fit(plain, BlobsData(Blobs(101), by_epoch=True), max_epochs=6)
    assert_same_weights(final[0], weights(plain))
    for other in final[1:]:
        assert_same_weights(other, final[0], 1e-6)


def test_the_summary_of_a_dry_run_says_that_nothing_was_changed(said):
    callbacks = trio(2, dry_run=True)
    fit(Toy(), BlobsData(Blobs()), callbacks)
    summary = callbacks[0].summary
    assert summary.accuracy_before is None
    assert summary.accuracy_after is None
    assert "Dry run: nothing was changed." in summary.advice
    assert "helped" not in summary.advice
    assert "pay here" not in summary.advice
    assert summary.advice in said()


def test_no_validation_data_are_read_for_a_dry_run():
    class Counting(BlobsData):
        made = 0

        def val_dataloader(self):
            self.made += 1
            return super().val_dataloader()

    data = Counting(Blobs(101))
    fit(
        Toy(),
        data,
        trio(2, dry_run=True, prune={"max_val_drop": None}),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=9,
    )
    assert data.made == 0


def test_anything_but_a_flag_is_refused():
    with pytest.raises(ValueError, match="Expected dry_run to be True or False, but got 'report'"):
        AttributionPartitionCallback(at_epoch=1, dry_run="report")


def test_what_a_dry_run_spoke_of_is_done_where_it_is_resumed_in_earnest(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    data = Blobs(101)
    fit(Toy(), BlobsData(data), [*trio(2, dry_run=True), keep], enable_checkpointing=True)
    callbacks, record, module = trio(2), IndexRecorder(data), Toy()
    fit(module, BlobsData(data), [*callbacks, record], max_epochs=5, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [sorted(record.by_epoch[epoch]) for epoch in (3, 4)] == [callbacks[0].partition.clean_indices().tolist()] * 2
    assert callbacks[2].is_active
    assert "from epoch 3 on" in callbacks[2].summary_clause()


def test_a_fit_that_has_acted_cannot_be_resumed_as_a_dry_run(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Toy(), BlobsData(Blobs(101)), [*trio(2), keep], enable_checkpointing=True)
    module = Toy()
    with pytest.raises(MisconfigurationException, match=r"dry_run=True changes nothing, but .* had already acted"):
        fit(module, BlobsData(Blobs(101)), trio(2, dry_run=True), max_epochs=5, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert module.steps == 0
    assert "_on_before_batch_transfer" not in module.__dict__
    fit(module, BlobsData(Blobs(101)), trio(2, dry_run=True), max_epochs=5, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_the_whole_training_is_judged_where_nothing_is_to_follow():
    for dry in (True, False):
        partition = AttributionPartitionCallback(at_epoch=3, dry_run=dry)
        fit(Toy(), BlobsData(Blobs(101)), [partition], max_epochs=3)
        assert partition.partition.epoch == 3
        assert partition.summary.advice
    with pytest.raises(MisconfigurationException, match="at_epoch to be less than the Trainer's max_epochs"):
        fit(Toy(), BlobsData(Blobs(101)), trio(3, dry_run=True), max_epochs=3)


@pytest.mark.parametrize(
    ("memorized", "start"), [(0.9, "starts from weights moved back"), (0.1, "continues from the current weights")]
)
def test_the_log_says_what_fine_tuning_would_start_from(said, memorized, start):
    data = Blobs()
    source = Published(make_partition(torch.where(torch.arange(203) < 100, 0.9, 0.1), data.y, epoch=2), dry_run=True)
    source.memorized = memorized
    finetune, module = CleanSubsetFinetuneCallback(), Toy()
    fit(module, BlobsData(data), [source, finetune], max_epochs=4)
    assert any(line.startswith(f"Dry run: Fine-tuning {start}") for line in said())
    assert finetune.state_dict()["start_weights"] is None
