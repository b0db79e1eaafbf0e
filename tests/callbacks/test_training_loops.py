"""What users have around their training loop: flags of the Trainer, schedules, other callbacks, loggers, bars."""

import csv
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ReduceLROnPlateau

from lightning_unlearn import AttributionPartitionCallback
from tests.toys import Blobs, Toy, adamw, assert_same_weights, auroc, fit, mlp, sgd, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio

AT, SIZE = 2, 101
PRUNES_IN_ANY_CASE = {"criterion": "magnitude", "max_val_drop": None}


class Watch(L.Callback):
    """Weights when the epochs on all the data are over; rates and schedulers at every step."""

    def __init__(self):
        self.rates, self.schedulers, self.at_swap = {}, {}, None

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == AT - 1:
            self.at_swap = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.setdefault(trainer.current_epoch, []).append(trainer.optimizers[0].param_groups[0]["lr"])
        self.schedulers[trainer.current_epoch] = [config.scheduler for config in trainer.lr_scheduler_configs]


def pruned_entries(prune, module):
    return [
        entry.parameter.index_select(entry.dimension, entry.neurons)
        for site, mask in zip(prune._state.sites, prune.masks, strict=True)
        for entry in site.entries(module, mask.pruned_indices())
    ]


def assert_repaired(module, data, partition, prune, finetune):
    assert partition.partition.label.equal(data.train.y)
    assert auroc(partition.partition.clean_probability, ~data.train.wrong) > 0.9
    assert partition.collector.reader.reason == ""
    entries = pruned_entries(prune, module)
    assert sum(entry.numel() for entry in entries) > 0
    assert all((entry == 0).all() for entry in entries)
    assert finetune.is_active
    assert len(finetune.training_subset.index) < SIZE


SETTINGS = [
    {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm", "accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"precision": "64-true"},
    {"detect_anomaly": True},
    {"deterministic": True, "benchmark": True},
    {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None},
    {"profiler": "simple"},
    {"limit_val_batches": 0},
    {"num_sanity_val_steps": -1, "check_val_every_n_epoch": 2},
    {"max_steps": 2 * 3 + 2},
    {"max_epochs": -1, "max_steps": 2 * 3 + 2},
    {"inference_mode": False},
    {"use_distributed_sampler": False},
]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_all_three_work_and_the_warm_up_is_as_without_them(settings):
    settings = {"max_epochs": 3, **settings}
    data, watches = BlobsData(Blobs(SIZE), drop_last=True), [Watch(), Watch()]
    for callbacks, watch in (((), watches[0]), (trio(AT, prune=PRUNES_IN_ANY_CASE), watches[1])):
        module = Toy(optimizer=adamw)
        trainer = fit(module, data, [*callbacks, watch], **settings)
    assert_same_weights(*[watch.at_swap for watch in watches])
    assert_repaired(module, data, *callbacks)
    assert module.steps_by_epoch[AT] < module.steps_by_epoch[0]
    if "max_steps" in settings:
        assert trainer.global_step == settings["max_steps"]


@pytest.mark.parametrize("scale", [2.0**4, 2.0**40], ids=["steps", "overflows first"])
def test_half_precision_with_a_scaler(scale):
    """Lightning has none for the CPU, where it takes bfloat16 instead; so its plug-in is given one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-12)
    module, data, callbacks = Toy(optimizer=adamw), BlobsData(Blobs(SIZE)), trio(AT, prune=PRUNES_IN_ANY_CASE)
    fit(module, data, callbacks, max_epochs=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_repaired(module, data, *callbacks)
    assert (scaler.get_scale() < scale) == (scale > 2**16)


def test_max_steps_before_the_partition_ends_the_fit_with_a_warning():
    callbacks = trio(AT)
    with pytest.warns(
        UserWarning, match="ended after 2 epochs: the partition is computed now, too late to prune or fine"
    ):
        fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_steps=6, max_epochs=-1)
    assert not callbacks[2].is_active


@pytest.mark.parametrize("batches", [1, 3])
def test_a_fast_development_run_of_several_batches_goes_through(batches):
    module, callbacks = Toy(), trio(AT)
    fit(module, BlobsData(Blobs(SIZE)), callbacks, fast_dev_run=batches)
    assert module.steps == batches
    assert not callbacks[0].has_result


# Several optimizers


class Adversarial(L.LightningModule):
    """A generator and a discriminator, trained in turns by hand; ``forward`` is one of the three networks."""

    def __init__(self, forward="generator"):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = (
            nn.Linear(16, 16),
            nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1)),
        )
        self.classifier = mlp()
        self.calls, self.steps = forward, 0

    def forward(self, x):
        return getattr(self, self.calls)(x)

    def configure_optimizers(self):
        networks = (self.generator, self.discriminator, self.classifier)
        return [torch.optim.SGD(network.parameters(), lr=0.05) for network in networks]

    def training_step(self, batch):
        self.steps += 1
        x, y = batch
        fake = self.generator(torch.randn_like(x))
        losses = (
            -self.discriminator(fake).mean(),
            (self.discriminator(fake.detach()) - self.discriminator(x)).mean(),
            cross_entropy(self.classifier(x), y),
        )
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


@pytest.mark.parametrize("forward", ["generator", "classifier"])
def test_networks_that_are_trained_in_turns_are_refused_before_the_first_step(forward):
    module = Adversarial(forward)
    with pytest.raises(
        MisconfigurationException, match=r"no module trained by optimizer \d .* name its layer with layer="
    ):
        fit(module, BlobsData(Blobs(SIZE)), trio(AT))
    assert module.steps == 0


def test_a_classifier_beside_them_is_repaired_where_its_layer_is_named():
    module, data = Adversarial("classifier"), BlobsData(Blobs(SIZE))
    callbacks = trio(AT, layer="classifier.4", prune={**PRUNES_IN_ANY_CASE, "layer": "classifier.4"})
    fit(module, data, callbacks, max_epochs=3)
    assert_repaired(module, data, *callbacks)


# Schedules


def scheduled(module, make, **config):
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}


plateau = partial(scheduled, make=partial(ReduceLROnPlateau, patience=0, threshold=1e9), monitor="val_loss")
restarts = partial(scheduled, make=partial(CosineAnnealingWarmRestarts, T_0=4), interval="step")


@pytest.mark.parametrize("restart", [False, True])
def test_a_schedule_that_waits_for_a_metric_goes_on_or_starts_anew(restart):
    watch = Watch()
    _, _, finetune = callbacks = trio(
        AT, prune=PRUNES_IN_ANY_CASE, finetune={"optimizer": "restart" if restart else None}
    )
    fit(Toy(optimizer=plateau), BlobsData(Blobs(SIZE)), [*callbacks, watch], max_epochs=5)
    first = [rates[0] for rates in watch.rates.values()]
    assert finetune.is_active
    expected = [0.05, 0.005, 0.05, 0.005, 5e-4] if restart else [0.05, 0.005, 5e-4, 5e-5, 5e-6]
    assert first == pytest.approx(expected)


@pytest.mark.parametrize("restart", [False, True])
def test_a_schedule_of_steps_with_restarts_goes_on_or_starts_anew(restart):
    watch = Watch()
    callbacks = trio(AT, finetune={"optimizer": "restart" if restart else None})
    fit(Toy(optimizer=restarts), BlobsData(Blobs(SIZE)), [*callbacks, watch], max_epochs=3)
    steps = 2 * 4 + len(watch.rates[AT])
    (schedule,) = watch.schedulers[AT]
    assert schedule.last_epoch == (len(watch.rates[AT]) if restart else steps)
    assert watch.rates[AT][-1] == pytest.approx(
        0.025 * (1 + torch.cos(torch.tensor(torch.pi * schedule.T_cur / 4)).item())
    )


# Other callbacks


def test_the_patience_of_early_stopping_is_counted_across_the_swap():
    stopped = []
    for callbacks in ((), trio(AT, prune=PRUNES_IN_ANY_CASE)):
        stop = EarlyStopping("val_loss", patience=4, min_delta=1e9)
        fit(Toy(), BlobsData(Blobs(SIZE)), [stop, *callbacks], max_epochs=9)
        stopped.append(stop.stopped_epoch)
    assert stopped == [4, 4]
    assert callbacks[2].is_active


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"save_last": True}, {"last.ckpt"}),
        ({"save_top_k": 2, "monitor": "val_loss"}, set()),
        (
            {"every_n_train_steps": 3, "save_top_k": -1},
            {f"epoch={e}-step={s}.ckpt" for e, s in ((0, 3), (1, 6), (2, 9))},
        ),
        ({"save_top_k": -1, "save_on_train_epoch_end": True}, {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"}),
    ],
    # Not the sets, whose order differs between the processes of pytest-xdist.
    ids=["last", "best", "every steps", "every epoch"],
)
def test_checkpoints_from_before_the_swap_hold_what_was_trained_and_later_ones_zeros(settings, names, tmp_path):
    module, callbacks = Toy(optimizer=adamw), trio(AT, prune=PRUNES_IN_ANY_CASE)
    checkpoint = ModelCheckpoint(tmp_path, **settings)
    fit(module, BlobsData(Blobs(SIZE)), [checkpoint, *callbacks], max_epochs=3, enable_checkpointing=True)
    files = {path.name: path for path in tmp_path.glob("*.ckpt")}
    assert names <= set(files)
    assert len(files) >= 2 or "save_last" in settings
    plain = Toy()
    for path in files.values():
        saved = torch.load(path, weights_only=True)
        plain.load_state_dict(saved["state_dict"])
        zeros = all((entry == 0).all() for entry in pruned_entries(callbacks[1], plain))
        # A checkpoint of the end of an epoch is of before the pruning that the next epoch begins with.
        assert zeros == (saved["global_step"] > AT * 4), path


# Loggers and bars


def test_every_logger_is_told(tmp_path):
    loggers = [CSVLogger(tmp_path, name) for name in ("one", "other")]
    callbacks = trio(AT, prune=PRUNES_IN_ANY_CASE)
    fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=3, logger=loggers, log_every_n_steps=1)
    for logger in loggers:
        with Path(logger.log_dir, "metrics.csv").open() as file:
            found = {name: float(row[name]) for row in csv.DictReader(file) for name in row if row[name]}
        assert found["unlearn/noise_rate"] == pytest.approx(callbacks[0].partition.noise_rate, abs=1e-4)
        assert found["unlearn/pruned_neurons"] == len(callbacks[1].mask.pruned_indices())


def test_tensorboard_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, callback = TensorBoardLogger(tmp_path), AttributionPartitionCallback(at_epoch=1)
    fit(Toy(), BlobsData(Blobs(SIZE), batch_size=16), [callback], max_epochs=2, logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("unlearn/noise_rate")[0].value == pytest.approx(callback.partition.noise_rate, abs=1e-4)


def test_the_rich_bar_shows_the_new_number_of_batches():
    pytest.importorskip("rich")
    from lightning.pytorch.callbacks import RichProgressBar

    totals = {}

    class Bar(RichProgressBar):
        def on_train_epoch_start(self, trainer, *args):
            super().on_train_epoch_start(trainer, *args)
            totals[trainer.current_epoch] = self.progress.tasks[self.train_progress_bar_id].total

    module = Toy()
    fit(module, BlobsData(Blobs(SIZE)), [Bar(), *trio(AT)], enable_progress_bar=True, max_epochs=3)
    assert totals == module.steps_by_epoch
    assert totals[AT] < totals[0]
