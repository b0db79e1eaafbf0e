"""When the partition is computed: a number of epochs, a share of them, or once the evidence has peaked."""

import logging
import math
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback
from lightning_unlearn.evidence.when import PartitionTime, check_at_epoch, similarity
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.trainer.limits import limits_of
from tests.toys import Blobs, BlobsData, Toy, adamw, assert_same_weights, auroc, by_margin, fit, sgd, trio, weights

SIZE = 101
LOGGER = "lightning.pytorch.utilities.rank_zero"
LATE = "is computed now, too late to prune or fine-tune"
ON = "EarlyStopping would have ended training on all data here. Training continues"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == LOGGER)


def same(value):
    return value


def limits_at(epoch, **limits):
    settings = {"max_epochs": -1, "max_steps": -1, "global_step": 10 * epoch, "callbacks": [], **limits}
    return limits_of(SimpleNamespace(current_epoch=epoch, **settings))


def decided(*notes, is_settled=True, is_stopped=False, **limits):
    """The epoch after which it was time, and why."""
    when = PartitionTime("auto")
    for epoch, note in enumerate(notes, start=1):
        when.note(epoch, **note)
        when.decide(limits_at(epoch, **limits), is_settled=is_settled, is_stopped=is_stopped, reduce=same)
        if when.epoch is not None:
            return when.epoch, when.why
    return None, ""


# What is asked for


@pytest.mark.parametrize(
    ("value", "kept"),
    [("auto", "auto"), (3, 3), (3.0, 3), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(2), 2), (torch.tensor(4), 4)],
)
def test_three_forms_are_taken(value, kept):
    assert check_at_epoch(value) == kept
    assert type(check_at_epoch(value)) is type(kept)


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, None, "20", "Auto", [2]])
def test_others_are_refused_in_a_sentence_that_names_them(value):
    message = r"^Expected at_epoch to be 'auto', a whole number of epochs of at least 1, or a share of max_epochs"
    with pytest.raises(ValueError, match=message):
        AttributionPartitionCallback(at_epoch=value)


@pytest.mark.parametrize(("share", "epochs", "drawn"), [(0.5, 6, 3), (0.5, 5, 2), (0.1, 5, 1), (0.99, 4, 3)])
def test_a_share_counts_whole_epochs(share, epochs, drawn):
    callbacks = trio(share)
    fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=epochs)
    assert callbacks[0].partition.epoch == drawn
    assert callbacks[2].first_epoch == drawn


def test_a_share_is_the_number_bit_for_bit():
    found = []
    for at_epoch in (0.5, 3):
        module, callbacks = Toy(optimizer=adamw), trio(at_epoch)
        fit(module, BlobsData(Blobs(SIZE)), callbacks, max_epochs=6)
        found.append((weights(module), callbacks[0].partition.clean_probability))
    assert_same_weights(found[0][0], found[1][0])
    assert found[0][1].equal(found[1][1])


def test_a_share_of_no_number_is_refused():
    with pytest.raises(MisconfigurationException, match=r"at_epoch=0\.5 is a share of max_epochs, but the Trainer has"):
        fit(Toy(), BlobsData(Blobs(SIZE)), trio(0.5), max_epochs=-1, max_steps=20)


def test_before_it_exists_the_error_says_when():
    with pytest.raises(RuntimeError, match="it is computed once the evidence has peaked, after two thirds of the"):
        _ = AttributionPartitionCallback().partition
    with pytest.raises(RuntimeError, match="it is computed when 25% of the epochs are complete"):
        _ = AttributionPartitionCallback(at_epoch=0.25).partition


# When the evidence has peaked


def test_the_order_of_the_samples_has_settled():
    epoch, why = decided({"similarity": 0.999}, {"similarity": 0.99}, {"similarity": 0.998})
    assert (epoch, why) == (3, "the ranking of the samples hardly changes any more")
    # Before the noise rate is read off an early epoch it is not looked for.
    assert decided({"similarity": 0.999}, {"similarity": 0.999}, is_settled=False) == (None, "")


def test_labels_are_being_memorized():
    validation = {"accuracy": 0.75, "samples": 1000.0}
    epoch, why = decided(*[{"agreement": 0.5 + 0.1 * at, **validation} for at in range(1, 6)])
    assert epoch == 4
    assert "accuracy is 90.0% in training steps, 75.0% in validation" in why
    # Of few samples the accuracy says nothing.
    assert decided(*[{"agreement": 1.0, "accuracy": 0.5, "samples": 199.0}] * 3) == (None, "")


def test_validation_has_got_worse():
    falls = [{"accuracy": accuracy, "samples": 1000.0} for accuracy in (0.6, 0.8, 0.79, 0.7)]
    assert decided(*falls) == (4, "validation accuracy has fallen from 80.0% to 70.0%")


def test_a_monitored_metric_stands_in_where_validation_cannot_be_read():
    values = [{"metric": value} for value in (1.0, 3.0, 2.0, 2.0, 3.0)]
    assert decided(*values) == (5, "the monitored metric has not improved in 3 validations")
    accuracy = {"accuracy": 0.5, "samples": 1000.0}
    assert decided(*[{**one, **accuracy} for one in values]) == (None, "")
    # Not every epoch validates.
    assert decided(*[one for value in values for one in ({}, value)])[0] == 10


@pytest.mark.parametrize(
    ("limits", "epoch"),
    [
        ({"max_epochs": 10}, 6),
        ({"max_epochs": 3}, 2),
        ({"max_epochs": 2}, 2),
        ({"max_steps": 90}, 6),
        ({"max_epochs": 30, "max_steps": 45}, 3),
        ({}, None),
    ],
)
def test_the_latest_is_two_thirds_of_what_is_allowed(limits, epoch):
    assert decided(*[{}] * 12, **limits)[0] == epoch


def test_time_that_is_over_counts_too():
    class Timer(L.pytorch.callbacks.Timer):
        def time_elapsed(self, *_):
            return 70.0

    assert decided({}, {}, callbacks=[Timer(timedelta(seconds=100))]) == (2, "two thirds of training are complete")
    assert decided({}, {}, callbacks=[Timer(timedelta(seconds=200))]) == (None, "")


def test_it_is_never_before_the_second_epoch_but_for_early_stopping():
    assert decided({"similarity": 1.0}, max_epochs=1) == (None, "")
    assert decided({}, is_stopped=True) == (1, "EarlyStopping was about to end training")


def test_rank_correlation():
    one = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert similarity(one, one.exp()) == pytest.approx(1)
    assert similarity(one, -one) == pytest.approx(-1)
    assert similarity(one, torch.tensor([1.0, 0.0, 2.0, 3.0])) == pytest.approx(0.8)
    assert math.isnan(similarity(one[:1], one[:1]))


def test_parts_of_training_are_joined_in_pairs_where_the_end_is_open():
    phases = {epoch: PartitionTime("auto").phase(epoch) for epoch in (1, 4, 5, 8, 9, 16, 17)}
    assert phases == {1: (0, 1), 4: (3, 1), 5: (2, 2), 8: (3, 2), 9: (2, 4), 16: (3, 4), 17: (2, 8)}
    assert [PartitionTime(6).phase(epoch)[0] for epoch in range(1, 7)] == [0, 0, 1, 2, 2, 3]


# In a fit


def noted(callback):
    return callback.state_dict()["when"]["notes"]


def test_by_default_it_works_in_any_fit(said):
    module, data = Toy(optimizer=adamw), BlobsData(Blobs(203))
    partition, finetune = AttributionPartitionCallback(), CleanSubsetFinetuneCallback()
    fit(module, data, [finetune, partition], max_epochs=9)
    assert 2 <= partition.partition.epoch <= 6
    assert auroc(partition.partition.clean_probability, ~data.train.wrong) > 0.95
    assert finetune.first_epoch == partition.partition.epoch
    why = f"The partition is computed after {partition.partition.epoch} epochs: "
    assert said().index(why) < said().index("Fine-tuning from epoch")
    assert partition.provenance["fits"][0]["settings"]["AttributionPartitionCallback"]["at_epoch"] == "auto"


def test_what_the_fits_own_validation_and_its_steps_show_is_read(monkeypatch):
    class Both(Toy):
        def __init__(self):
            super().__init__()
            self.right, self.seen, self.steps_right = {}, {}, {}

        def forward(self, x):
            self.logits = super().forward(x)
            return self.logits

        def training_step(self, batch):
            loss, epoch = super().training_step(batch), self.current_epoch + 1
            right = int((self.logits.argmax(1) == batch[1]).sum())
            self.steps_right[epoch] = self.steps_right.get(epoch, 0) + right
            return loss

        def validation_step(self, batch):
            x, y = batch
            logits = self(x)
            self.log("val_loss", torch.nn.functional.cross_entropy(logits, y))
            epoch = self.current_epoch + 1
            self.right[epoch] = self.right.get(epoch, 0) + int((logits.argmax(1) == y).sum())
            self.seen[epoch] = self.seen.get(epoch, 0) + len(y)

    module, callback = Both(), AttributionPartitionCallback(dry_run=True)
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    stop = EarlyStopping("val_loss", patience=99)
    fit(module, BlobsData(Blobs(SIZE)), [callback, stop], max_epochs=6, num_sanity_val_steps=2)
    notes = noted(callback)
    assert sorted(notes) == ["1", "2", "3", "4", "5", "6"]
    for epoch, note in notes.items():
        # Sanity checking counts with the first epoch in the module.
        extra = 32 if epoch == "1" else 0
        assert note["samples"] == 32 == module.seen[int(epoch)] - extra
        if not extra:
            assert note["accuracy"] == module.right[int(epoch)] / 32
        assert note["agreement"] == module.steps_right[int(epoch)] / SIZE
        assert note["metric"] < 0


@pytest.mark.parametrize("limits", [{"max_epochs": 6}, {"max_epochs": None, "max_steps": 36}], ids=str)
def test_the_latest_is_the_end_of_training_where_nothing_is_to_act(limits, monkeypatch, said):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    callback, data = AttributionPartitionCallback(), DataLoader(Blobs(SIZE), -(-SIZE // 6), shuffle=True)
    fit(Toy(), data, [callback], **limits)
    assert callback.partition.epoch == 6
    assert "The partition is computed after 6 epochs: training has ended." in said()
    assert "is computed now" not in said()


def test_what_is_computed_again_is_computed_first_after_two_thirds(monkeypatch):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    callback = AttributionPartitionCallback(every_n_epochs=1)
    fit(Toy(), BlobsData(Blobs(SIZE)), [callback], max_epochs=6)
    assert callback.state.rounds[0].epoch == 4


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({"check_val_every_n_epoch": 2}, {2, 4}),
        ({"val_check_interval": 0.25}, {1, 2, 3, 4}),
        ({"limit_val_batches": 0}, set()),
        ({"limit_train_batches": 3}, {1, 2, 3, 4}),
        ({"accumulate_grad_batches": 3}, {1, 2, 3, 4}),
        ({"min_epochs": 5}, {1, 2, 3, 4}),
        ({"precision": "bf16-mixed"}, {1, 2, 3, 4}),
    ],
    ids=str,
)
def test_settings_of_the_trainer(settings, validated, monkeypatch):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    callbacks = trio("auto")
    fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=6, **settings)
    notes = noted(callbacks[0])
    assert {int(epoch) for epoch, note in notes.items() if note["samples"]} == validated
    assert all(note["samples"] in (0, 32) for note in notes.values())
    assert callbacks[0].partition.epoch == 4
    assert callbacks[2].first_epoch == 4


def test_what_validation_shows_in_another_form_is_left_out(monkeypatch):
    class Twice(Toy):
        def validation_step(self, batch):
            self(batch[0])
            super().validation_step(batch)

    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    callbacks = trio("auto")
    fit(Twice(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=4)
    assert not any(note["samples"] for note in noted(callbacks[0]).values())
    assert callbacks[0].partition.epoch == 2


@pytest.mark.parametrize("only", [0, 2])
def test_a_validation_set_of_one_class_is_named_once_and_not_used(only, monkeypatch, recwarn):
    class OneClass(BlobsData):
        def val_dataloader(self):
            x, _ = next(iter(DataLoader(super().val_dataloader().dataset, 32)))
            return DataLoader(TensorDataset(x, torch.full((32,), only)), batch_size=16)

    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    callback = AttributionPartitionCallback(recipe=by_margin, dry_run=True)
    fit(Toy(), OneClass(Blobs(SIZE)), [callback, EarlyStopping("val_loss", patience=99)], max_epochs=4)
    for note in noted(callback).values():
        assert note["samples"] == 0
        assert not {"accuracy", "metric"} & set(note)
    said = [str(one.message) for one in recwarn if "validation samples" in str(one.message)]
    assert said == [
        f"All 32 validation samples are labeled as class {only}. Validation is not used to tell when labels are being"
        " memorized. Split the data so that validation holds every class."
    ]


@pytest.mark.parametrize(
    "settings", [{"evidence_from": "eval_passes"}, {"recipe": "rlap"}, {"recipe": "loss"}], ids=str
)
def test_without_evidence_of_training_steps(settings):
    callbacks = trio("auto", **settings)
    fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=6)
    assert 2 <= callbacks[0].partition.epoch <= 4


def test_rounds_count_from_it():
    callbacks = trio("auto", every_n_epochs=2, min_change=0, recipe="label")
    fit(Toy(optimizer=adamw), BlobsData(Blobs(SIZE)), callbacks, max_epochs=9)
    first = callbacks[0].rounds[0].epoch
    assert [one.epoch for one in callbacks[0].rounds] == list(range(first, 9, 2))


def test_the_weights_are_those_of_a_fit_without_it():
    found = []
    for callbacks in (
        [],
        [AttributionPartitionCallback()],
        [AttributionPartitionCallback(), EarlyStopping("val_loss")],
    ):
        module = Toy(optimizer=adamw)
        fit(module, BlobsData(Blobs(SIZE)), callbacks, max_epochs=5)
        found.append(weights(module))
    assert_same_weights(found[0], found[1])
    assert_same_weights(found[0], found[2])


# EarlyStopping


@pytest.mark.parametrize("at_epoch", ["auto", 6, 0.9])
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("at_end", [True, False], ids=["epoch end", "validation end"])
def test_early_stopping_leads_to_the_partition_and_the_fit_goes_on(at_epoch, order, at_end, said, monkeypatch):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    stop = EarlyStopping("val_loss", patience=2, min_delta=1e9, check_on_train_epoch_end=at_end)
    ours = trio(at_epoch, recipe="label")
    callbacks = [stop, *ours] if order == "first" else [*ours, stop]
    trainer = fit(Toy(optimizer=adamw), BlobsData(Blobs(203)), callbacks, max_epochs=9)
    partition, _, finetune = ours
    assert partition.partition.epoch == 3  # the first epoch is the best, two more do not improve
    assert partition.partition.is_actionable
    assert finetune.first_epoch == 3
    # Two more epochs, which do not improve either.
    assert stop.stopped_epoch == 4
    assert trainer.current_epoch == 5
    assert trainer.fit_loop.min_epochs == 0
    assert ON in said()
    assert "EarlyStopping was about to end training" in said()


def test_where_nothing_is_to_be_done_it_ends_the_fit(said):
    class Starts(L.Callback):
        started = 0

        def on_train_epoch_start(self, *_):
            self.started += 1

    def nothing(evidence):
        return torch.ones_like(evidence.loss)

    for more in ([], [AttributionPartitionCallback(dry_run=True)], [AttributionPartitionCallback(at_epoch=6)]):
        stop = EarlyStopping("val_loss", patience=2, min_delta=1e9)
        trainer = fit(Toy(), BlobsData(Blobs(SIZE)), [*more, stop, Starts()], max_epochs=9)
        assert trainer.current_epoch == 3
    ours = trio(6, recipe=nothing)
    trainer = fit(
        Toy(), BlobsData(Blobs(SIZE)), [*ours, EarlyStopping("val_loss", patience=2, min_delta=1e9)], max_epochs=9
    )
    assert ours[0].has_result
    assert trainer.current_epoch == 3
    assert ours[0].summary.samples == SIZE
    assert ON not in said()


def test_a_goal_that_is_reached_ends_the_fit(said):
    ours = trio(6)
    stop = EarlyStopping("val_loss", stopping_threshold=1e9)
    with pytest.warns(UserWarning, match=LATE):
        trainer = fit(Toy(), BlobsData(Blobs(SIZE)), [*ours, stop], max_epochs=9)
    assert trainer.current_epoch == 1
    assert ours[0].has_result


def test_another_stop_ends_the_fit_and_the_partition_is_drawn_all_the_same(monkeypatch):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop = trainer.current_epoch == 2

    for more in ([], [EarlyStopping("val_loss", patience=99)]):
        ours = trio("auto" if more else 6)
        with pytest.warns(UserWarning, match=f"Training has ended after 3 epochs: the partition, due .*, {LATE}"):
            trainer = fit(Toy(), BlobsData(Blobs(SIZE)), [*ours, Stops(), *more], max_epochs=40)
        assert trainer.current_epoch == 3
        assert ours[0].partition.epoch == 3
        assert not ours[2].is_active
        assert "No callback acted on the partition" in ours[0].summary.advice


# The end comes first


@pytest.mark.parametrize("at_epoch", ["auto", 7])
def test_a_fit_that_is_too_short_gets_its_partition_at_its_end(at_epoch, said):
    alone = AttributionPartitionCallback(at_epoch=at_epoch)
    fit(Toy(), BlobsData(Blobs(SIZE)), [alone], max_epochs=8 if at_epoch == 7 else 2, max_steps=14)
    assert alone.partition.epoch == 2
    assert ("Training has ended after 2 epochs: the partition, due " in said()) == (at_epoch == 7)
    ours = trio(at_epoch)
    with pytest.warns(UserWarning, match=f"Training has ended after 2 epochs: the partition, due .*, {LATE}"):
        fit(Toy(), BlobsData(Blobs(SIZE)), ours, max_epochs=8 if at_epoch == 7 else 2, max_steps=14)
    assert ours[0].partition.clean_probability.equal(alone.partition.clean_probability)
    assert ours[0].summary.done == ()


@pytest.mark.parametrize("at_epoch", ["auto", 3])
def test_a_single_epoch_is_not_relied_upon(at_epoch):
    callback = AttributionPartitionCallback(at_epoch=at_epoch)
    fit(Toy(), BlobsData(Blobs(SIZE)), [callback], max_epochs=5 if at_epoch == 3 else 1, max_steps=7)
    assert "it was computed after a single epoch" in callback.partition.warning
    assert callback.partition.status is PartitionStatus.TOO_EARLY
    assert not callback.partition.is_actionable
    asked = AttributionPartitionCallback(at_epoch=1, recipe="label")
    fit(Toy(optimizer=adamw), BlobsData(Blobs(SIZE)), [asked], max_epochs=2)
    assert "single epoch" not in asked.partition.warning


# Resumed


def run(folder, at_epoch="auto", ckpt_path=None, max_epochs=8, patience=99, optimizer=adamw):
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    module, callbacks = Toy(optimizer=optimizer), trio(at_epoch, recipe="label")
    stop = EarlyStopping("val_loss", patience=patience, min_delta=1e9)
    data = BlobsData(Blobs(SIZE), by_epoch=True)
    more = {"ckpt_path": ckpt_path, "max_epochs": max_epochs, "enable_checkpointing": True}
    trainer = fit(module, data, [*callbacks, stop, keep], **more)
    return callbacks[0], weights(module), trainer.current_epoch


@pytest.mark.parametrize("patience", [99, 2], ids=["peaked", "early stopping"])
def test_resumed_from_any_epoch_it_is_drawn_as_in_a_fit_that_went_through(patience, tmp_path):
    whole, expected, epochs = run(tmp_path, patience=patience)
    drawn = whole.partition.epoch
    for epoch in (0, drawn - 1, drawn):
        path = tmp_path / f"epoch={epoch}.ckpt"
        again, found, ended = run(tmp_path / "again", ckpt_path=path, patience=patience)
        assert again.partition.epoch == drawn
        assert again.partition.clean_probability.equal(whole.partition.clean_probability)
        # As text, since NaN is not equal to itself.
        assert str(noted(again)) == str(noted(whole))
        assert_same_weights(found, expected)
        assert ended == epochs


@pytest.mark.parametrize(("first", "then", "drawn"), [("auto", 5, 5), (6, "auto", 4), (6, 0.5, 4), ("auto", 3, 3)])
def test_another_wish_applies_where_the_fit_goes_on(first, then, drawn, tmp_path, monkeypatch, said):
    monkeypatch.setattr(PartitionTime, "_peaked", lambda *_: "")
    monkeypatch.setattr(PartitionTime, "_late", lambda _, __, epoch: "it is" if epoch >= 4 else "")
    run(tmp_path, first)
    again, *_ = run(tmp_path / "again", then, tmp_path / "epoch=1.ckpt")
    assert again.partition.epoch == drawn
    assert f"at_epoch={then!r} instead of {first!r}: the evidence of 2 epochs is kept" in said()


def test_a_share_is_of_the_epochs_of_the_fit_that_goes_on(tmp_path):
    run(tmp_path, 0.5, max_epochs=6)
    again, *_ = run(tmp_path / "again", 0.5, tmp_path / "epoch=1.ckpt", max_epochs=10)
    assert again.partition.epoch == 5


def test_a_checkpoint_of_before_there_was_a_choice_is_gone_on_from(tmp_path):
    run(tmp_path, 6)
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["AttributionPartitionCallback"]
    del state["when"], state["trajectory"]["epochs_each"]
    torch.save(checkpoint, path)
    again, *_ = run(tmp_path / "again", "auto", path)
    assert 3 <= again.partition.epoch <= 5


def test_a_fit_without_validation_data():
    callbacks, data = trio("auto"), Blobs(SIZE)
    fit(Toy(), DataLoader(data, 16, shuffle=True), callbacks, max_epochs=6)
    assert 2 <= callbacks[0].partition.epoch <= 4
    notes = noted(callbacks[0]).values()
    assert notes and not any("accuracy" in note for note in notes)  # noqa: PT018


def test_plain_sgd_and_step_limits_alone():
    callbacks = trio("auto")
    trainer = fit(Toy(optimizer=sgd), BlobsData(Blobs(SIZE)), callbacks, max_epochs=-1, max_steps=35)
    assert 2 <= callbacks[0].partition.epoch <= 3
    assert trainer.global_step == 35
    assert callbacks[2].is_active
