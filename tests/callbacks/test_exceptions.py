"""An exception anywhere leaves all as plain Lightning does: compared with a plain fit that ends at the same point."""

import functools
import random
import signal
import sys
import traceback

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, default_collate

from lightning_unlearn.attribution import Attributor
from lightning_unlearn.callbacks import prune as prune_module
from lightning_unlearn.data.subset_sampler import SamplerSwap
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.finetuning import run as finetuning_module
from lightning_unlearn.partitioning import messages as messages_module
from lightning_unlearn.partitioning import run as partitioning_module
from lightning_unlearn.pruning import run as run_module
from lightning_unlearn.pruning.guard import ScoreMonitor
from lightning_unlearn.pruning.masking import PrunedParameters
from lightning_unlearn.trainer import context as context_module
from lightning_unlearn.trainer import data_checks as data_checks_module
from lightning_unlearn.trainer.train_data import TrainDataSwap
from tests.callbacks import snapshot
from tests.toys import Blobs, Toy, make_trainer, mlp, sgd, trio, weights

THIS = sys.modules[__name__]
AT, EPOCHS = 2, 4
PRUNES = {"criterion": "magnitude", "amount": 0.3, "max_val_drop": 0.5}


class Fault(Exception):
    """What is raised on purpose."""


class Faults:
    """Raises at one call of one function, and counts the calls of all that it was told of."""

    def __init__(self, monkeypatch, fault=None, error=Fault):
        self.monkeypatch, self.fault, self.error = monkeypatch, fault, error
        self.counts = {}
        self.epoch, self.trainer = -1, None

    def at(self, name, owner, attribute):
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def watched(*args, **kwargs):
            self.count(name)
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, attribute, watched)

    def count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.fault == (name, self.counts[name]):
            self.epoch = self.trainer.current_epoch
            raise self.error("on purpose")


class Model(Toy):
    """Tells forward passes of training from others."""

    def __init__(self):
        super().__init__(lambda: mlp(0.3), scheduled)

    def forward(self, x):
        (self.forward_in_training if self.training else self.forward_in_eval)()
        return super().forward(x)

    def forward_in_training(self):
        """To be counted."""

    def forward_in_eval(self):
        """To be counted."""

    def on_train_epoch_end(self):
        """To be counted."""


def scheduled(module):
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)}


class Data(Blobs):
    """Augmented, so that reading it draws from a random state."""

    def __init__(self):
        super().__init__(101, augment="torch")
        self.trainer = None

    def __getitem__(self, index):
        in_pass = self.trainer is not None and self.trainer.state.stage == RunningStage.VALIDATING
        (self.read_in_pass if in_pass else self.read_in_training)()
        return super().__getitem__(index)

    def read_in_pass(self):
        """To be counted."""

    def read_in_training(self):
        """To be counted."""


class Collates:
    def __init__(self, data):
        self.data = data

    def __call__(self, items):
        in_pass = self.data.trainer is not None and self.data.trainer.state.stage == RunningStage.VALIDATING
        (self.collate_in_pass if in_pass else self.collate_in_training)()
        return default_collate(items)

    def collate_in_pass(self):
        """To be counted."""

    def collate_in_training(self):
        """To be counted."""


class Makes:
    """A user's ``optimizer=`` and ``lr_scheduler=``."""

    def optimizer(self, parameters):
        return torch.optim.Adam(parameters, 0.01)

    def schedule(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def judges(evidence):
    return recipe_of_a_user(evidence)


def recipe_of_a_user(evidence):
    return (evidence.margin / 4).sigmoid()


class Quiet(ProgressBar):
    """A bar that shows nothing, before which ours move."""

    def disable(self):
        pass


class Shows(Callback):
    """Lets the data see the stage, and the faults the epoch."""

    def __init__(self, data, faults):
        self.data, self.faults = data, faults

    def setup(self, trainer, pl_module, stage):
        self.data.trainer = self.faults.trainer = trainer


class Ends(Callback):
    """Ends a plain fit in the hook in which one of ours has failed."""

    def __init__(self, hook, epoch, error):
        self.hook, self.epoch, self.error = hook, epoch, error

    def end(self, hook, trainer):
        if (hook, trainer.current_epoch) == (self.hook, self.epoch):
            raise self.error("on purpose")

    def on_train_start(self, trainer, pl_module):
        self.end("on_train_start", trainer)

    def on_train_epoch_start(self, trainer, pl_module):
        self.end("on_train_epoch_start", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.end("on_train_epoch_end", trainer)

    def on_train_end(self, trainer, pl_module):
        self.end("on_train_end", trainer)


def hook_of(error):
    """The hook in which an error arose."""
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next(name for name in frames if hasattr(Ends, name) and name.startswith("on_"))


# Called as often by a plain fit, up to the swap.
USERS = {
    "reading a training sample": (Data, "read_in_training"),
    "collating a training batch": (Collates, "collate_in_training"),
    "forward in training": (Model, "forward_in_training"),
    "training step": (Model, "training_step"),
    "validation step": (Model, "validation_step"),
    "backward": (torch.Tensor, "backward"),
    "optimizer step": (torch.optim.SGD, "step"),
    "end of an epoch": (Model, "on_train_epoch_end"),
}
OURS = {
    "reading in a pass": (Data, "read_in_pass"),
    "collating in a pass": (Collates, "collate_in_pass"),
    "fingerprint": (data_checks_module, "fingerprint"),
    "rehearsal": (context_module, "probe"),
    "attribution": (Attributor, "attribute"),
    "evidence of a pass": (TrainingDynamics, "observe"),
    "merging": (TrainingDynamics, "merge"),
    "recipe": (THIS, "recipe_of_a_user"),
    "memorized": (partitioning_module, "memorized_fraction"),
    "score before": (partitioning_module.Partitioning, "validate"),
    "report of the partition": (messages_module, "log_partition"),
    "gauge": (run_module, "make_gauge"),
    "ranking": (run_module, "rank_neurons"),
    "guard": (ScoreMonitor, "is_worse"),
    "pruning for good": (PrunedParameters, "zero_parameters"),
    "report of the pruning": (prune_module, "report_pruning"),
    "draw": (finetuning_module, "make_training_subset"),
    "narrowing": (SamplerSwap, "narrow"),
    "new length": (TrainDataSwap, "_fit_val_check_interval"),
    "optimizer of the swap": (Makes, "optimizer"),
    "schedule of the swap": (Makes, "schedule"),
}


def start(monkeypatch, fault=None, error=Fault, *, plain=False, ends=None, workers=0, callbacks=(), **settings):
    """A fit that may fail; what there was before it and is after it."""
    module = Model()
    with monkeypatch.context() as patch:
        faults = Faults(patch, fault, error)
        for name, (owner, attribute) in (USERS | OURS).items():
            faults.at(name, owner, attribute)
        data, makes = Data(), Makes()
        loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=Collates(data), num_workers=workers)
        values = DataLoader(Blobs(32, 0, seed=7), batch_size=16)
        makes_all = {"optimizer": makes.optimizer, "lr_scheduler": makes.schedule, "mode": "layers"}
        ours = [] if plain else [*trio(AT, prune=PRUNES, **{"recipe": judges, "finetune": makes_all} | settings)]
        module.net[1].eval()
        module.net[0].bias.requires_grad_(False)
        before = {"modules": snapshot.of_modules(module), "loader": snapshot.of_loader(loader)}
        extra = [*callbacks, *([Ends(*ends, error)] if ends is not None else [])]
        L.seed_everything(0, verbose=False)
        trainer = make_trainer(
            [Quiet(), Shows(data, faults), *extra, *ours],
            max_epochs=EPOCHS,
            val_check_interval=7,
            enable_progress_bar=True,
            enable_checkpointing=bool(callbacks),
        )
        raised = None
        try:
            trainer.fit(module, loader, values)
        except (Fault, RuntimeError, SystemExit) as problem:
            raised = problem
    return {
        "before": before,
        "after": {"modules": snapshot.of_modules(module), "loader": snapshot.of_loader(loader)},
        "trainer": snapshot.of_trainer(trainer, [*ours, *extra]),
        "random": snapshot.random_states(),
        "process": snapshot.of_process(),
        "weights": weights(module),
        "optimizers": snapshot.of_optimizers(trainer),
        "raised": raised,
        "faults": faults,
        "live": trainer,
        "module": module,
        "ours": ours,
        "loaders": (loader, values),
        "order": [type(callback).__name__ for callback in trainer.callbacks],
    }


PLAIN = {}


def plain_that_ends(monkeypatch, found, *, acted):
    """A plain fit that fails where the user's code does, or where ours has."""
    (name, number), error = found["faults"].fault, found["raised"].__context__ or found["raised"]
    if name not in USERS:
        key = {"ends": (hook_of(error), found["faults"].epoch)}
    elif not acted:
        key = {"fault": (name, number)}
    else:  # at the same place, but by then there are other numbers of batches
        key = {"fault": (name, plain_fit(monkeypatch)["faults"].counts[name])}
    key["error"] = found["faults"].error
    if str(key) not in PLAIN:
        PLAIN[str(key)] = start(monkeypatch, plain=True, **key)
    assert type(PLAIN[str(key)]["raised"]) is type(found["raised"])
    return PLAIN[str(key)]


def plain_fit(monkeypatch):
    if "whole" not in PLAIN:
        PLAIN["whole"] = start(monkeypatch, plain=True)
    return PLAIN["whole"]


def assert_left_as_plain_lightning_would(monkeypatch, found, *, acted):
    """Compares with a plain fit that ended at the same point.

    Args:
        monkeypatch: of the test.
        found: of :func:`start`.
        acted: whether neurons had been pruned or the data swapped, from where on training is another.
    """
    assert found["after"]["loader"] == found["before"]["loader"]
    plain = plain_that_ends(monkeypatch, found, acted=acted)
    snapshot.assert_same(found["after"]["modules"], plain["after"]["modules"], "modules")
    # After the swap, training is another; the swap itself draws nothing.
    swapped = found["ours"][2].is_active
    parts = ["process", "trainer"] if swapped else ["process", "trainer", "random"]
    for part in parts:
        snapshot.assert_same(found[part], plain[part], part)
    if not acted:
        snapshot.assert_same(found["weights"], plain["weights"], "weights")
        snapshot.assert_same(found["optimizers"], plain["optimizers"], "optimizers")
    assert found["order"][:2] == ["Quiet", "Shows"]


def assert_nothing_is_half_done(found):
    """What a checkpoint written of the exception would hold."""
    partition, prune, finetune = (one.state_dict() for one in found["ours"])
    drawn = partition["partition"] is not None
    for name in ("memorized", "accuracy_before"):
        assert (partition[name] is not None) == drawn
    assert bool(partition["rounds"]) == drawn
    assert not (drawn and partition["trajectory"] is not None)
    assert (prune["epoch"] >= 0) == bool(prune["masks"])
    assert (
        (finetune["training_subset"] is not None)
        == bool(finetune["first_epoch"])
        == (finetune["remaining"] is not None)
    )


def test_a_fit_that_does_not_fail_does_what_is_to_be_tested(monkeypatch):
    found = start(monkeypatch)
    assert found["raised"] is None
    assert found["faults"].counts.keys() == (USERS | OURS).keys()
    assert found["ours"][1].mask.pruned_indices().tolist()
    assert found["ours"][2].is_active
    plain = plain_fit(monkeypatch)
    assert plain["raised"] is None
    for part in ("process", "trainer"):
        snapshot.assert_same(found[part], plain[part], part)
    snapshot.assert_same(found["after"]["modules"], plain["after"]["modules"], "modules")
    assert found["after"]["loader"] == found["before"]["loader"]
    assert found["order"] == [*plain["order"][:2], *(type(one).__name__ for one in found["ours"]), *plain["order"][2:]]


@pytest.mark.parametrize("place", OURS)
def test_ours(monkeypatch, place):
    # A schedule and a recipe are tried once, before the first step; where a pass reads much, somewhere in the last.
    number = {
        "schedule of the swap": 2,
        "recipe": 2,
        "reading in a pass": 205,
        "collating in a pass": 20,
        "merging": 3,
        "evidence of a pass": 4,
    }.get(place, 1)
    found = start(monkeypatch, (place, number))
    assert isinstance(found["raised"], Fault)
    _, prune, finetune = found["ours"]
    assert_left_as_plain_lightning_would(monkeypatch, found, acted=prune._state.holds)
    assert not finetune.is_active
    assert_nothing_is_half_done(found)


# In the first epoch, in the second, and in the last, on the clean subset.
USERS_CALLS = {
    "reading a training sample": (50, 150, 350),
    "collating a training batch": (3, 9, 24),
    "forward in training": (1, 10, 20),
    "training step": (7, 8, 21),
    "validation step": (1, 5, 9),
    "backward": (2, 14, 22),
    "optimizer step": (4, 14),
    "end of an epoch": (1, 2, 4),
}


@pytest.mark.parametrize(("place", "number"), [(place, n) for place, calls in USERS_CALLS.items() for n in calls])
def test_the_users(monkeypatch, place, number):
    found = start(monkeypatch, (place, number))
    assert isinstance(found["raised"], Fault)
    assert_left_as_plain_lightning_would(monkeypatch, found, acted=found["ours"][2].is_active)
    assert_nothing_is_half_done(found)


SETTINGS = [
    {},
    {"evidence_from": "eval_passes"},
    {"every_n_epochs": 1, "min_change": 0},
    {"finetune": {"on_noisy": "relabel", "relabel_threshold": 0.4}},
    {"finetune": {"lr": 0.01}},
]


@pytest.mark.parametrize("seed", range(len(SETTINGS)))
def test_at_random(monkeypatch, seed):
    draw, settings = random.Random(seed), SETTINGS[seed]
    counts = start(monkeypatch, **settings)["faults"].counts
    for _ in range(2):
        place = draw.choice(sorted(counts))
        found = start(monkeypatch, (place, draw.randint(1, counts[place])), **settings)
        if place == "schedule of the swap" and found["faults"].fault[1] == 1:
            assert found["raised"] is None  # it was only tried
            continue
        assert isinstance(found["raised"], Fault)
        assert_left_as_plain_lightning_would(monkeypatch, found, acted=found["ours"][1]._state.holds)


@pytest.mark.parametrize("place", ["reading a training sample", "reading in a pass"])
def test_in_a_worker(monkeypatch, place):
    found = start(monkeypatch, (place, 235 if "pass" in place else 30), workers=1)
    assert "Fault" in str(found["raised"])
    snapshot.assert_same(found["after"]["loader"], found["before"]["loader"])
    plain = start(monkeypatch, plain=True, ends=("on_train_epoch_start", 0))
    for part in ("trainer", "process"):
        snapshot.assert_same(found[part], plain[part], part)
    snapshot.assert_same(found["after"]["modules"], plain["after"]["modules"])


@pytest.fixture
def _interrupts():
    """Lightning ignores further interrupts from the first one on, and lets the process end."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize(
    ("place", "number"),
    [("reading in a pass", 205), ("attribution", 5), ("recipe", 1), ("guard", 1), ("ranking", 1), ("training step", 9)],
)
def test_an_interrupt_keeps_what_lightning_keeps_and_the_fit_can_go_on(monkeypatch, tmp_path, place, number):
    keep = OnExceptionCheckpoint(tmp_path)
    found = start(monkeypatch, (place, number), KeyboardInterrupt, callbacks=[keep])
    assert isinstance(found["raised"], SystemExit)
    assert found["live"].interrupted
    assert_left_as_plain_lightning_would(monkeypatch, found, acted=False)
    assert_nothing_is_half_done(found)
    partition, prune, finetune = found["ours"]
    assert partition.has_result == (place in ("guard", "ranking"))
    assert not prune.has_result
    # Under another name, since Lightning removes it when a fit ends well.
    path = (tmp_path / "on_exception.ckpt").rename(tmp_path / "kept.ckpt")
    kept = torch.load(path, weights_only=True)
    snapshot.assert_same(kept["callbacks"]["AttributionPartitionCallback"], partition.state_dict())
    # With the same objects, where it was.
    found["live"].fit(found["module"], *found["loaders"])
    assert found["live"].current_epoch == EPOCHS
    assert len(partition.rounds) == 1
    assert finetune.is_active
    # And in a new process.
    module, ours = Model(), trio(AT, prune=PRUNES, recipe=judges)
    trainer = make_trainer(ours, max_epochs=EPOCHS)
    trainer.fit(module, *found["loaders"], ckpt_path=path)
    assert ours[0].partition.epoch == AT
    assert ours[2].is_active
