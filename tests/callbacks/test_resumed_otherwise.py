"""A fit that goes on from a checkpoint with other settings, batches or optimizers than it was made with."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.callbacks.test_finetune import Optimizers
from tests.toys import (
    Blobs,
    BlobsData,
    IndexRecorder,
    Toy,
    adamw,
    assert_same_weights,
    by_margin,
    fit,
    sgd,
    trio,
    weights,
)

AT, EPOCHS, FROM = 2, 6, 3
GOES_ON = "Resuming with "


def per_step(module, total=None):
    """A schedule that is stepped with each batch; with a total, one that cannot be stepped more often."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    steps = total and int(module.trainer.estimated_stepping_batches)
    schedule = OneCycleLR(optimizer, 0.1, total_steps=steps) if total else LambdaLR(optimizer, lambda step: 0.99**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Run:
    """A fit of ``EPOCHS`` epochs, or the rest of one."""

    def __init__(self, ckpt_path=None, *, optimizer=sgd, batch_size=16, finetune=None, keep=None, **partition):
        self.data = BlobsData(Blobs(101), by_epoch=True, batch_size=batch_size)
        self.module, self.record, self.watch = Toy(optimizer=optimizer), IndexRecorder(self.data.train), Optimizers()
        self.ours = trio(partition.pop("at_epoch", AT), finetune=finetune, **partition)
        callbacks = [*self.ours, self.record, self.watch, *([] if keep is None else [keep])]
        kwargs = {"max_epochs": EPOCHS, "enable_checkpointing": keep is not None, "ckpt_path": ckpt_path}
        fit(self.module, self.data, callbacks, **kwargs)

    @property
    def clean(self):
        return self.ours[0].partition.clean_indices().tolist()

    def trained_on(self, epoch):
        return sorted(self.record.by_epoch[epoch])


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint of the end of an epoch."""

    def make(epoch=FROM, **kwargs):
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return Run(keep=keep, **kwargs), tmp_path / f"epoch={epoch}.ckpt"

    return make


@pytest.fixture
def lines(caplog):
    """What the log says of other settings."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return lambda: [line for line in caplog.messages if line.startswith(GOES_ON)]


@pytest.mark.parametrize("finetune", [{}, {"optimizer": "restart"}], ids=["kept", "restarted"])
@pytest.mark.parametrize("size", [8, 32])
def test_no_sample_is_left_out_for_another_size_of_batches(checkpoint, lines, size, finetune):
    first, path = checkpoint(optimizer=per_step, finetune=finetune)
    run = Run(path, optimizer=per_step, finetune=finetune, batch_size=size)
    assert run.clean == first.clean
    assert [run.trained_on(epoch) for epoch in (FROM + 1, EPOCHS - 1)] == [first.clean] * 2
    assert lines() == [
        f"{GOES_ON}batch size {size} instead of 16. The partition of the checkpoint (epoch {AT}) and what"
        " followed from it stay unchanged. Every sample that was kept is still trained on."
    ]


def test_and_a_third_fit_goes_by_the_size_of_the_second(checkpoint, tmp_path, lines):
    first, path = checkpoint(optimizer=per_step, epoch=AT)
    keep = ModelCheckpoint(tmp_path / "again", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    Run(path, optimizer=per_step, batch_size=8, keep=keep)
    run = Run(tmp_path / "again" / f"epoch={FROM}.ckpt", optimizer=per_step, batch_size=8)
    assert run.trained_on(EPOCHS - 1) == first.clean
    assert len(lines()) == 1


def test_smaller_batches_than_a_one_cycle_schedule_was_planned_for_are_refused(checkpoint):
    one_cycle = partial(per_step, total=True)
    first, path = checkpoint(optimizer=one_cycle)
    with pytest.raises(
        MisconfigurationException, match=r"OneCycleLR of the checkpoint has \d+ steps left, .* lower max"
    ):
        Run(path, optimizer=one_cycle, batch_size=4)
    run = Run(path, optimizer=one_cycle, batch_size=32)
    assert run.trained_on(EPOCHS - 1) == first.clean


@pytest.mark.parametrize("on_noisy", ["reweight", "relabel"])
def test_other_use_of_noisy_samples_comes_too_late(checkpoint, lines, on_noisy):
    first, path = checkpoint()
    run = Run(path, finetune={"on_noisy": on_noisy})
    assert run.trained_on(EPOCHS - 1) == first.clean
    assert run.ours[2].training_subset.new_label is run.ours[2].training_subset.probability is None
    (line,) = lines()
    assert f"with on_noisy='{on_noisy}' instead of 'drop'. The partition of the checkpoint (epoch {AT})" in line
    assert line.endswith("The new settings of the callbacks have no effect.")


@pytest.mark.parametrize("now", ["drop", "reweight"])
def test_a_fit_that_has_re_labeled_goes_on_so(checkpoint, lines, now):
    relabels = {"on_noisy": "relabel", "relabel_threshold": 0.5}
    first, path = checkpoint(finetune=relabels, optimizer=adamw)
    assert len(first.ours[2].training_subset.relabeled)
    run = Run(path, finetune={"on_noisy": now}, optimizer=adamw)
    assert run.ours[2].training_subset.new_label.equal(first.ours[2].training_subset.new_label)
    assert run.trained_on(EPOCHS - 1) == run.ours[2].training_subset.index.tolist()
    assert_same_weights(weights(run.module), weights(first.module), 1e-6)
    assert f"on_noisy='{now}' instead of 'relabel'" in lines()[0]


def test_in_rounds_a_fit_that_did_not_re_label_does_so_from_the_next_round_on(checkpoint):
    rounds = {"every_n_epochs": 2, "min_change": 0, "optimizer": adamw}
    _, path = checkpoint(**rounds, epoch=AT)
    run = Run(path, **rounds, finetune={"on_noisy": "relabel", "relabel_threshold": 0.5})
    assert len(run.ours[2].training_subset.relabeled)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"at_epoch": 1}, "at_epoch=1 instead of 2"),
        ({"at_epoch": 5}, "at_epoch=5 instead of 2"),
        ({"recipe": "loss"}, "recipe='loss' instead of 'auto'"),
        ({"recipe": by_margin}, "recipe='by_margin' instead of 'auto'"),
        ({"layer": "net.0"}, "layer='net.0' instead of None"),
        ({"suspect_precision": 0.9, "attribution_method": "deeplift"}, "attribution_method='deeplift' instead of "),
    ],
    ids=["earlier", "later", "recipe", "own recipe", "layer", "suspect_precision, method"],
)
def test_a_partition_that_is_drawn_holds(checkpoint, lines, settings, said):
    first, path = checkpoint()
    run = Run(path, **settings)
    assert run.ours[0].partition.clean_probability.equal(first.ours[0].partition.clean_probability)
    assert run.ours[0].partition.epoch == AT
    assert run.trained_on(EPOCHS - 1) == first.clean
    (line,) = lines()
    assert said in line


@pytest.mark.parametrize("at_epoch", [1, 5])
def test_in_rounds_the_new_settings_count_for_those_to_come(checkpoint, lines, at_epoch):
    rounds = {"every_n_epochs": 2, "min_change": 0}
    _, path = checkpoint(**rounds, epoch=AT)
    run = Run(path, **rounds, at_epoch=at_epoch, recipe="label")
    assert [drawn.epoch for drawn in run.ours[0].rounds] == [AT, AT + 2]
    assert run.ours[0].partition.recipe == "label"
    (line,) = lines()
    assert line.endswith("The new settings of the callbacks apply to partitions computed from now on.")


@pytest.mark.parametrize("at_epoch", [1, 4])
def test_evidence_is_kept_until_the_partition_is_drawn(checkpoint, lines, at_epoch):
    _, path = checkpoint(epoch=1, at_epoch=3)
    run = Run(path, at_epoch=at_epoch)
    assert run.ours[0].partition.epoch == max(at_epoch, 2)
    assert run.trained_on(EPOCHS - 1) == run.clean
    (line,) = lines()
    assert f"with at_epoch={at_epoch} instead of 3: the evidence of 2 epochs is kept" in line


def test_the_same_settings_are_not_spoken_of(checkpoint, lines):
    _, path = checkpoint(finetune={"lr": 0.01})
    Run(path, finetune={"lr": 0.01})
    assert lines() == []


RATES = {"a rate": ({"lr": 0.01}, 0.01), "none": ({}, 0.05)}


@pytest.mark.parametrize(("made", "now"), [("a rate", "none"), ("none", "a rate")])
def test_the_optimizer_goes_on_as_the_checkpoint_has_it(checkpoint, lines, made, now):
    finetune, rate = RATES[made]
    _, path = checkpoint(finetune=finetune)
    run = Run(path, finetune=RATES[now][0])
    assert set(run.watch.rates[EPOCHS - 1]) == {rate}
    (line,) = lines()
    assert "lr=" in line
    assert line.endswith("The new settings of the callbacks have no effect.")


def halving(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch)


@pytest.mark.parametrize(
    ("made", "now", "message"),
    [
        ({"optimizer": torch.optim.Adam}, {}, "was fine-tuned with optimizer, but .* does not set it. Pass the same"),
        ({"lr": 0.01, "lr_scheduler": halving}, {"lr": 0.01}, "was fine-tuned with lr_scheduler, but"),
        ({"optimizer": torch.optim.Adam}, {"optimizer": partial(torch.optim.SGD, lr=0.1)}, r"has options \['amsgrad'"),
        (
            {"optimizer": torch.optim.Adam},
            {"optimizer": lambda parameters: torch.optim.Adam([{"params": [p]} for p in parameters])},
            r"has groups of \[\[10\]\] parameters, but the one that",
        ),
    ],
    ids=["no optimizer", "no schedule", "another kind", "other groups"],
)
def test_what_an_optimizer_cannot_take_over_is_refused(checkpoint, made, now, message):
    _, path = checkpoint(finetune=made)
    with pytest.raises(MisconfigurationException, match=message):
        Run(path, finetune=now)
