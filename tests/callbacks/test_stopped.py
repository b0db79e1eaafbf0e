"""A fit that stopped within an epoch, or after its last checkpoint, and goes on from there."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_unlearn import AttributionPartitionCallback, UnlearnReport
from lightning_unlearn.report import RunRecord
from tests.toys import Blobs, Toy, assert_same_weights, fit, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio

AT, EPOCHS = 2, 4
LOST = "The checkpoint was written before an epoch had ended"


class Halts(Exception):
    pass


class StopsAtTheEnd(ModelCheckpoint):
    """Writes the last checkpoint, and then the process ends."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == EPOCHS - 1:
            raise Halts


def callbacks_in(folder, order):
    ours = trio(AT, finetune={"lr": 0.01})
    report = UnlearnReport(folder, samples=3)
    return ours, [report, *ours] if order == "report first" else [*ours, report]


@pytest.mark.parametrize("order", ["report first", "report last"])
@pytest.mark.parametrize("bar", [False, True], ids=["quiet", "progress bar"])
def test_after_the_last_checkpoint_the_summary_and_the_report_are_made_on_resume(tmp_path, order, bar):
    (whole, *_), callbacks = callbacks_in(tmp_path / "whole", order)
    fit(Toy(), BlobsData(Blobs(101), by_epoch=True), callbacks, max_epochs=EPOCHS)
    keep = StopsAtTheEnd(tmp_path, save_last=True, save_on_train_epoch_end=True)
    stops = [*callbacks_in(tmp_path / "first", order)[1], keep]
    data = BlobsData(Blobs(101), by_epoch=True)
    with pytest.raises(Halts):
        fit(Toy(), data, stops, max_epochs=EPOCHS, enable_checkpointing=True)
    assert not (tmp_path / "first").exists()

    (partition, prune, finetune), callbacks = callbacks_in(tmp_path / "second", order)
    module, kwargs = Toy(), {"max_epochs": EPOCHS, "enable_progress_bar": bar, "ckpt_path": tmp_path / "last.ckpt"}
    trainer = fit(module, BlobsData(Blobs(101), by_epoch=True), callbacks, **kwargs)
    assert module.steps == 0
    assert partition.summary == whole.summary
    assert partition.summary.accuracy_after is not None
    assert (tmp_path / "second" / "report.html").is_file()
    assert RunRecord.load(tmp_path / "second").summary["advice"] == whole.summary.advice
    # As the checkpoint has them, and the loader as the user has it.
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same_weights(weights(module), saved)
    assert len(trainer.train_dataloader.sampler) == 101
    assert finetune.summary_clause()
    assert prune.has_result


def test_a_dry_run_of_the_whole_training_too(tmp_path):
    keep = StopsAtTheEnd(tmp_path, save_last=True, save_on_train_epoch_end=True)
    settings = {"at_epoch": EPOCHS, "dry_run": True}
    whole = AttributionPartitionCallback(**settings)
    fit(Toy(), BlobsData(Blobs(101), by_epoch=True), [whole], max_epochs=EPOCHS)
    data, callbacks = BlobsData(Blobs(101), by_epoch=True), [AttributionPartitionCallback(**settings), keep]
    with pytest.raises(Halts):
        fit(Toy(), data, callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    again = AttributionPartitionCallback(**settings)
    path = tmp_path / "last.ckpt"
    fit(Toy(), BlobsData(Blobs(101), by_epoch=True), [again], max_epochs=EPOCHS, ckpt_path=path)
    assert again.partition.clean_probability.equal(whole.partition.clean_probability)
    assert again.summary == whole.summary


@pytest.fixture
def lost(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return lambda: sum(line.startswith(LOST) for line in caplog.messages)


STEPS = "train_steps"


@pytest.mark.parametrize(
    ("step", "evidence", "times"),
    [(2, STEPS, 1), (6, STEPS, 1), (4, STEPS, 0), (2, "eval_passes", 0), (10, STEPS, 0)],
    ids=["first epoch", "second epoch", "end of an epoch", "passes", "after the partition"],
)
def test_what_the_open_epoch_had_shown_is_said_to_be_lost(tmp_path, lost, step, evidence, times):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    if step == 4:
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    data = BlobsData(Blobs(101), by_epoch=True)
    fit(Toy(), data, [*trio(AT, evidence_from=evidence), keep], max_epochs=EPOCHS, enable_checkpointing=True)
    ours = trio(AT, evidence_from=evidence)
    path = tmp_path / f"step={step}.ckpt"
    fit(Toy(), BlobsData(Blobs(101), by_epoch=True), ours, max_epochs=EPOCHS, ckpt_path=path)
    assert lost() == times
    assert ours[0].partition.epoch == AT
