"""What fine-tuning starts from, in fits."""

import copy
import logging
import math
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn.finetuning.shrink_weights import shrink
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.toys import Blobs, Toy, adamw, assert_same_weights, fit, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio

AT = 2
PRUNES = {"criterion": Sensitivity(fdr_level=None), "max_val_drop": None, "amount": 0.3}


class Moments(L.Callback):
    """The weights when the fit begins, and when an epoch begins or ends; last in the list, so after what ours do."""

    def __init__(self):
        self.begun, self.ended = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.begun[trainer.current_epoch] = weights(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended[trainer.current_epoch] = weights(pl_module)


def run(finetune, *, optimizer=adamw, data=None, others=(), partition=None, prune=None, **kwargs):
    moments, module = Moments(), Toy(optimizer=optimizer)
    callbacks = trio(AT, prune=prune, finetune=finetune, **(partition or {}))
    data = BlobsData(Blobs(101), by_epoch=True) if data is None else data
    fit(module, data, [*callbacks, *others, moments], **kwargs)
    return callbacks, module, moments


def is_statistic(name):
    return "running" in name or "tracked" in name


def expected(moments, name, how="shrink"):
    start, trained = moments.begun[0][name], moments.ended[AT - 1][name]
    return start if how == "start" or is_statistic(name) else shrink(trained, start)


@pytest.mark.parametrize("how", ["shrink", "start"])
def test_fine_tuning_starts_from_weights_nearer_to_those_the_fit_began_with(how):
    (partition, prune, finetune), _, moments = run({"warm_start": how}, prune=PRUNES)
    pruned = prune.mask.pruned_indices()
    assert len(pruned)
    now = moments.begun[AT]
    for name, tensor in now.items():
        should = expected(moments, name, how)
        if name.startswith(("net.4.", "net.5.")) and not is_statistic(name):
            should = should.index_fill(0, pruned, 0)
        if name == "net.7.weight":
            should = should.index_fill(1, pruned, 0)
        assert tensor.equal(should), name
    assert finetune.summary_clause().endswith(
        {"shrink": "(F-FT, from weights moved back towards those of the start)", "start": "(F-FT, from the start)"}[how]
    )
    assert partition.provenance["done"]["CleanSubsetFinetuneCallback"]["started_from"] == how
    assert finetune.state_dict()["start_weights"] is None


def test_kept_weights_are_those_of_the_epoch_before():
    (_, _, finetune), _, moments = run({"warm_start": "keep"})
    assert_same_weights(moments.begun[AT], moments.ended[AT - 1])
    assert finetune.state_dict()["start_weights"] is None
    assert finetune.summary_clause().endswith("(F-FT)")


def test_only_what_is_trained_is_moved():
    finetune = {"warm_start": "start", "mode": "layers", "layers": ["net.4", "net.7"]}
    _, _, moments = run(finetune)
    moved = {name for name, tensor in moments.begun[AT].items() if not tensor.equal(moments.ended[AT - 1][name])}
    assert moved == {"net.4.weight", "net.4.bias", "net.7.weight", "net.7.bias"}


def test_only_the_first_partition_moves_weights():
    rounds = {"every_n_epochs": 1, "min_change": 0}
    (partition, *_), _, moments = run({"warm_start": "start"}, partition=rounds, max_epochs=5)
    assert len(partition.rounds) > 1
    assert moments.begun[AT]["net.0.weight"].equal(moments.begun[0]["net.0.weight"])
    assert_same_weights(moments.begun[AT + 1], moments.ended[AT])


class Ema(L.Callback):
    """A user's own moving average."""

    ema = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.ema is None:
            self.ema = copy.deepcopy(pl_module.net)
        with torch.no_grad():
            for mean, now in zip(self.ema.parameters(), pl_module.net.parameters(), strict=True):
                mean.lerp_(now, 0.1)


class Looks(L.Callback):
    """At an average, before and after."""

    def __init__(self, ema):
        self.at, self.seen = ema, {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen[trainer.current_epoch] = [p.detach().clone() for p in self.at.ema.parameters()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (AT, 0):
            self.seen["after"] = [p.detach().clone() for p in self.at.ema.parameters()]


def test_averages_of_the_weights_follow():
    looks = Looks(Ema())
    _, module, moments = run({"warm_start": "shrink"}, others=[looks.at, looks])
    names = [name for name, _ in module.named_parameters()]
    for name, before, after in zip(names, looks.seen[AT - 1], looks.seen["after"], strict=True):
        assert after.equal(shrink(before, moments.begun[0][name])), name


def test_beside_lightnings_average():
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    (_, _, finetune), module, _ = run({"warm_start": "shrink", "lr": 0.01}, others=[averaging], max_epochs=5)
    assert finetune.is_active
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


class Halts(Exception):
    pass


def failing(_):
    raise Halts


def test_after_a_failure_the_weights_are_the_trained_ones():
    moments, module = Moments(), Toy(optimizer=adamw)
    callbacks = trio(AT, finetune={"warm_start": "start", "optimizer": failing})
    with pytest.raises(Halts):
        fit(module, BlobsData(Blobs(101), by_epoch=True), [*callbacks, moments])
    assert_same_weights(weights(module), moments.ended[AT - 1])
    assert not callbacks[2].is_active
    assert callbacks[2].state_dict()["started_from"] == "keep"
    # Whoever goes on from here still has what to go back to.
    assert callbacks[2].state_dict()["start_weights"]["net.0.weight"].equal(moments.begun[0]["net.0.weight"])


@pytest.fixture
def checkpoints(tmp_path):
    def make(finetune, **kwargs):
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run(finetune, others=[keep], enable_checkpointing=True, **kwargs)
        return tmp_path

    return make


@pytest.mark.parametrize("how", ["shrink", "start"])
def test_a_checkpoint_that_does_not_have_the_start_is_refused(checkpoints, how):
    path, module = checkpoints({"warm_start": "keep"}) / "epoch=0.ckpt", Toy(optimizer=adamw)
    said = (
        rf"CleanSubsetFinetuneCallback\(warm_start='{how}'\) needs the initial weights of the fit, but the"
        r" checkpoint lacks them: .* Set warm_start='keep', or train without ckpt_path\."
    )
    with pytest.raises(MisconfigurationException, match=said):
        fit(module, BlobsData(Blobs(101), by_epoch=True), trio(AT, finetune={"warm_start": how}), ckpt_path=path)
    assert module.steps == 0


def test_after_the_swap_it_does_not_matter_any_more(checkpoints):
    path, module = checkpoints({"warm_start": "keep"}) / "epoch=2.ckpt", Toy(optimizer=adamw)
    callbacks = trio(AT, finetune={"warm_start": "shrink"})
    fit(module, BlobsData(Blobs(101), by_epoch=True), callbacks, ckpt_path=path)
    assert callbacks[2].state_dict()["started_from"] == "keep"


def test_checkpoints_have_the_start_until_it_is_used(checkpoints):
    folder = checkpoints({"warm_start": "shrink"})
    kept = [torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True) for epoch in (0, 1, 2)]
    states = [one["callbacks"]["CleanSubsetFinetuneCallback"]["start_weights"] for one in kept]
    assert states[0]["net.0.weight"].equal(states[1]["net.0.weight"])
    assert states[2] is None


@pytest.mark.parametrize(
    ("memorized", "how", "said"),
    [
        (0.9, "shrink", "the network predicts 90% of the suspect labels, so it has memorized them."),
        (0.2, "keep", "the network predicts 20% of the suspect labels, so it has not memorized them."),
    ],
)
def test_auto_goes_by_what_is_memorized(monkeypatch, caplog, memorized, how, said):
    monkeypatch.setattr("lightning_unlearn.partitioning.run.memorized_fraction", lambda *_: memorized)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        (_, _, finetune), _, moments = run({"warm_start": "auto"})
    assert any(line.endswith(said) for line in caplog.messages)
    assert finetune.state_dict()["started_from"] == how
    if how == "keep":
        assert_same_weights(moments.begun[AT], moments.ended[AT - 1])


@pytest.mark.parametrize(("held_out", "how"), [(0.2, "shrink"), (0.9, "keep"), (None, "keep")])
def test_auto_goes_by_the_gap_to_validation_too(monkeypatch, held_out, how):
    monkeypatch.setattr("lightning_unlearn.partitioning.run.memorized_fraction", lambda *_: 0.1)
    monkeypatch.setattr("lightning_unlearn.partitioning.run.validation_accuracy", lambda *_: held_out)
    monkeypatch.setattr("lightning_unlearn.partitioning.run.share_predicted", lambda *_: 0.95)
    (partition, _, finetune), _, _ = run({"warm_start": "auto"})
    assert partition.accuracy_gap == (None if held_out is None else pytest.approx(0.95 - held_out))
    assert finetune.state_dict()["started_from"] == how


def test_auto_keeps_the_weights_where_the_checkpoint_does_not_have_those_of_the_start(monkeypatch, caplog, checkpoints):
    monkeypatch.setattr("lightning_unlearn.partitioning.run.memorized_fraction", lambda *_: 0.9)
    path, callbacks = checkpoints({"warm_start": "keep"}) / "epoch=0.ckpt", trio(AT, finetune={"warm_start": "auto"})
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Toy(optimizer=adamw), BlobsData(Blobs(101), by_epoch=True), callbacks, ckpt_path=path)
    said = "the weights are kept: the checkpoint lacks the initial weights"
    assert any(said in line for line in caplog.messages)


class Falls(L.Callback):
    """Logs a score that is best just before the weights are moved, and then climbs again from far below."""

    def __init__(self, mode):
        self.sign = 1 if mode == "max" else -1

    def on_validation_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch
        pl_module.log("score", torch.tensor(self.sign * (1.0 - 0.5 * (epoch >= AT) + 0.01 * epoch)))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_counts_anew_from_weights_that_were_moved(caplog, mode):
    def ends(how):
        stopper = EarlyStopping("score", patience=2, mode=mode)
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            _, _, moments = run({"warm_start": how}, others=[Falls(mode), stopper], max_epochs=8)
        return len(moments.ended), stopper

    assert ends("keep")[0] == AT + 2
    assert not any("EarlyStopping" in line for line in caplog.messages)
    epochs, stopper = ends("shrink")
    assert (epochs, stopper.stopped_epoch) == (8, 0)
    assert float(stopper.best_score) == pytest.approx((1 if mode == "max" else -1) * 0.57)
    assert any(
        line.startswith("EarlyStopping counts from zero again (patience=2 on 'score') without the best score")
        for line in caplog.messages
    )
    said = "to zero at the end of the fit. That is planned for max_epochs=8: EarlyStopping may end the fit sooner, at a"
    assert any(f"{said} higher rate." in line for line in caplog.messages)


class Rates(L.Callback):
    """Optimizers, and the learning rates of their groups at each step."""

    def __init__(self):
        self.rates, self.optimizers, self.momenta = {}, [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        groups = [group for one in trainer.optimizers for group in one.param_groups]
        self.rates.setdefault(trainer.current_epoch, []).append([group["lr"] for group in groups])
        if batch_idx == 0:
            self.momenta[trainer.current_epoch] = [group.get("momentum") for group in groups]
            self.optimizers.append(list(trainer.optimizers))
            self.has_state = [bool(one.state) for one in trainer.optimizers]


def scheduled(make, interval="epoch"):
    def optimizer(module):
        groups = [{"params": module.net[:4].parameters()}, {"params": module.net[4:].parameters(), "lr": 0.02}]
        made = torch.optim.SGD(groups, 0.04, momentum=0.9)
        schedule = {"scheduler": make(made), "interval": interval, "monitor": "val_loss"}
        return {"optimizer": made, "lr_scheduler": schedule}

    return optimizer


S = torch.optim.lr_scheduler
SCHEDULES = {
    "StepLR": scheduled(lambda o: S.StepLR(o, 1, 0.5)),
    "ReduceLROnPlateau": scheduled(S.ReduceLROnPlateau),
    "LambdaLR": scheduled(lambda o: S.LambdaLR(o, lambda step: min(1.0, (step + 1) / 3)), "step"),
    "OneCycleLR": scheduled(
        lambda o: S.OneCycleLR(o, [0.04, 0.02], total_steps=60, pct_start=0.1, cycle_momentum=False), "step"
    ),
}


def cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_falls_from_its_peak_to_zero_step_by_step(caplog, name):
    watch = Rates()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run({"warm_start": "shrink"}, optimizer=SCHEDULES[name], others=[watch], max_epochs=5)
    assert watch.optimizers[AT - 1][0] is not watch.optimizers[AT][0]
    seen = [rates for epoch in range(AT, 5) for rates in watch.rates[epoch]]
    expected = [[rate * cosine(step / len(seen)) for rate in (0.04, 0.02)] for step in range(len(seen))]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    said = f"The learning rate follows a cosine from 0.04 to zero at the end of the fit, in place of {name}."
    assert sum(line.endswith(said) for line in caplog.messages) == 1


def test_the_schedule_of_a_callback_that_is_replaced_is_named(caplog):
    averaging = StochasticWeightAveraging(0.003, swa_epoch_start=1, annealing_epochs=1)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run({"warm_start": "shrink"}, others=[averaging])
    assert any(line.endswith("to zero at the end of the fit, in place of SWALR.") for line in caplog.messages)


def test_without_a_schedule_it_falls_from_the_rate_there_is(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        _, module, _ = run({"warm_start": "start"})
    assert any(line.endswith("follows a cosine from 0.01 to zero at the end of the fit.") for line in caplog.messages)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_of_a_schedule_that_gives_rates_outright_the_highest_so_far_is_the_peak():
    watch, make = Rates(), scheduled(lambda o: S.LambdaLR(o, [lambda _: 0.25, lambda e: 0.5**e]))
    run({"warm_start": "shrink"}, optimizer=make, others=[watch])
    assert watch.rates[AT][0] == [0.01, 0.02]


def test_momentum_is_that_of_before_the_schedule_that_is_dropped():
    watch = Rates()

    def make(module):
        made = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.6)
        return {"optimizer": made, "lr_scheduler": {"scheduler": S.OneCycleLR(made, 0.08, 60), "interval": "step"}}

    run({"warm_start": "shrink"}, optimizer=make, others=[watch])
    assert watch.momenta[AT] == [0.6]
    assert watch.rates[AT][0] == [0.08]


def test_several_optimizers_are_made_anew():
    class Two(Toy):
        def configure_optimizers(self):
            made = [torch.optim.SGD(self.net[i].parameters(), lr=0.05 * (i + 1), momentum=0.9) for i in (0, 7)]
            return made, [S.StepLR(one, 1) for one in made]

        def training_step(self, batch):
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    watch, module = Rates(), Two(manual=True)
    fit(module, BlobsData(Blobs(101)), [*trio(AT, finetune={"warm_start": "shrink"}), watch])
    assert len(watch.optimizers[AT]) == 2
    assert all(one is not other for one, other in zip(*watch.optimizers[AT - 1 : AT + 1], strict=True))


@pytest.mark.parametrize(
    ("manual", "limits", "why"),
    [
        (True, {}, "the module uses manual optimization."),
        (False, {"max_epochs": -1, "max_time": {"seconds": 2}}, "neither max_epochs nor max_steps gives the number"),
    ],
    ids=["manual", "no end in sight"],
)
def test_where_no_rate_can_be_planned_the_own_schedule_starts_anew(caplog, manual, limits, why):
    watch, module = Rates(), Toy(optimizer=SCHEDULES["StepLR"], manual=manual)
    callbacks = [*trio(AT, finetune={"warm_start": "shrink"}), watch]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(module, BlobsData(Blobs(101)), callbacks, **limits)
    said = f"Reran configure_optimizers, and its schedules restart: {why}"
    assert any(said in line for line in caplog.messages)
    assert watch.rates[AT][0] == [0.04, 0.02]
    assert watch.optimizers[AT - 1][0] is not watch.optimizers[AT][0]


class Steps(L.Callback):
    """How many steps the optimizers remember, and how many parameters they have, when fine-tuning begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (AT, 0):
            self.made = [float(state.get("step", 0)) for one in trainer.optimizers for state in one.state.values()]
            self.held = sum(len(group["params"]) for one in trainer.optimizers for group in one.param_groups)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_that_the_module_returns_again_forgets_the_old_weights(optimizer):
    class Cached(Toy):
        made = None

        def configure_optimizers(self):
            self.made = self.made or optimizer(self.parameters(), 0.01)
            return self.made

    steps, watch, moments = Steps(), Rates(), Moments()
    fit(Cached(), BlobsData(Blobs(101)), [*trio(AT, finetune={"warm_start": "shrink"}), steps, watch, moments])
    assert not any(steps.made)
    assert watch.rates[AT][0] == [0.01]


def test_groups_that_were_added_later_are_trained_on(caplog):
    class Unfreezes(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[4:].parameters(), 0.05)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[:4].parameters()), "lr": 0.02})

    steps, watch, moments = Steps(), Rates(), Moments()
    callbacks = [*trio(AT, finetune={"warm_start": "shrink"}), steps, watch, moments]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Unfreezes(), BlobsData(Blobs(101)), callbacks)
    assert (steps.held, watch.rates[AT][0]) == (10, [0.05, 0.02])
    assert not moments.begun[AT]["net.0.weight"].equal(moments.ended[AT]["net.0.weight"])
    assert any("all parameter groups are kept" in line for line in caplog.messages)


def test_parameters_that_a_fresh_optimizer_leaves_out_are_named():
    class Unfreezes(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[4:].parameters(), 0.05)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[:4].parameters()), "lr": 0.02})

    with pytest.warns(UserWarning, match="leaves out 608 parameters that were trained until now"):
        fit(Unfreezes(), BlobsData(Blobs(101)), trio(AT, finetune={"warm_start": "shrink", "lr": 0.01}))


@pytest.mark.parametrize("lr", [None, 0.001])
def test_a_module_that_keeps_an_optimizer_from_before_is_told(lr):
    class Keeps(Toy):
        def on_train_start(self):
            self.kept = self.optimizers()

        def training_step(self, batch):
            self.kept.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.kept.step()

    callbacks = trio(AT, finetune={"warm_start": "shrink", "lr": lr})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Keeps(manual=True), BlobsData(Blobs(101)), callbacks)
    assert sum("training_step uses an optimizer that was replaced" in str(one.message) for one in caught) == 1


def test_after_a_failure_a_kept_optimizer_has_its_state():
    class Cached(Toy):
        made = None

        def configure_optimizers(self):
            self.made = self.made or torch.optim.Adam(self.parameters(), 0.01)
            return self.made

        def named_parameters(self, *args, **kwargs):
            # When the optimizer has been made anew, as the first thing of moving weights.
            if self.made and self.trainer.current_epoch == AT and not self.made.state:
                raise Halts
            return super().named_parameters(*args, **kwargs)

    module = Cached()
    with pytest.raises(Halts):
        fit(module, BlobsData(Blobs(101)), trio(AT, prune=None, finetune={"warm_start": "shrink"}))
    assert len(module.made.state) == 10


def test_what_only_training_makes_lazily_has_its_own_start():
    class Auxiliary(Toy):
        def __init__(self):
            super().__init__(optimizer=lambda module: torch.optim.SGD(module.parameters(), 0.05))
            self.aux, self.seen = torch.nn.LazyLinear(4), {}

        def training_step(self, batch):
            (x, y), loss = batch, torch.nn.functional.cross_entropy
            total = loss(self(x), y) + loss(self.aux(x), y)
            if self.global_step == 0:
                self.seen["start"] = self.aux.weight.detach().clone()
            if self.current_epoch == AT:
                self.seen.setdefault("after", self.aux.weight.detach().clone())
            return total

    module = Auxiliary()
    fit(module, BlobsData(Blobs(101)), trio(AT, finetune={"warm_start": "start"}))
    assert module.seen["after"].equal(module.seen["start"])


def test_pruned_neurons_are_zero_in_moved_averages_at_once():
    looks = Looks(Ema())
    (_, prune, _), _, _ = run({"warm_start": "shrink"}, prune=PRUNES, others=[looks.at, looks])
    assert looks.at.ema[4].weight.shape == looks.seen["after"][4].shape
    assert len(pruned := prune.mask.pruned_indices())
    assert not looks.seen["after"][4][pruned].any()


class OwnSchedule:
    """As timm's: it is stepped with the epoch and a metric."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch, metric):
        self.optimizer.param_groups[0]["lr"] = 0.04 * 0.5**epoch

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_module_that_steps_schedules_in_its_own_way_keeps_its_own(caplog):
    class Steps(Toy):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch + 1, metric=metric)

    watch, module = Rates(), Steps(optimizer=scheduled(OwnSchedule))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(module, BlobsData(Blobs(101)), [*trio(AT, finetune={"warm_start": "shrink"}), watch])
    assert watch.optimizers[AT - 1][0] is not watch.optimizers[AT][0]
    assert [rates[0][0] for rates in watch.rates.values()] == [0.04, 0.02, 0.04, 0.04 * 0.5**3]
    assert any("schedules restart: the module overrides lr_scheduler_step" in line for line in caplog.messages)


def test_after_an_exception_at_the_start_of_an_epoch_the_rate_goes_on_where_it_was(tmp_path):
    class Fails(Toy):
        fails = True

        def on_train_epoch_start(self):
            if self.fails and self.current_epoch == AT:
                raise Halts

    def start(module, *more, **kwargs):
        callbacks = trio(AT, finetune={"warm_start": "shrink"})
        fit(module, BlobsData(Blobs(101), by_epoch=True), [*callbacks, *more], max_epochs=5, **kwargs)

    with pytest.raises(Halts):
        start(Fails(optimizer=adamw), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    again, watch = Fails(optimizer=adamw), Rates()
    again.fails = False
    start(again, watch, ckpt_path=next(tmp_path.glob("*.ckpt")))
    assert watch.rates[3][0][0] == pytest.approx(0.01 * cosine(1 / 3))
    assert watch.rates[4][0][0] == pytest.approx(0.01 * cosine(2 / 3))


def test_where_steps_end_the_fit_the_rate_falls_with_them():
    watch = Rates()
    run({"warm_start": "shrink"}, others=[watch], max_epochs=-1, max_steps=22)
    seen = [rates[0] for epoch in sorted(watch.rates) if epoch >= AT for rates in watch.rates[epoch]]
    first = 22 - len(seen)
    assert seen == pytest.approx([0.01 * cosine(step / (22 - first)) for step in range(len(seen))])


def test_in_rounds_a_larger_subset_is_trained_on_whole_and_the_rate_still_ends_at_zero():
    watch = Rates()
    rounds = {"every_n_epochs": 1, "min_change": 0}
    _, module, _ = run({"warm_start": "shrink"}, others=[watch], partition=rounds, max_epochs=6)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert watch.rates[5][0][0] == pytest.approx(0.01 * cosine(3 / 4))


@pytest.mark.parametrize("finetune", [{"lr": 0.007}, {"optimizer": partial(torch.optim.SGD, lr=0.007)}], ids=str)
def test_what_is_asked_for_makes_the_optimizer(finetune):
    watch = Rates()
    run({"warm_start": "shrink", **finetune}, others=[watch])
    assert {rates[0] for epoch in (AT, AT + 1) for rates in watch.rates[epoch]} == {0.007}


def test_an_own_schedule_that_is_asked_for_starts_anew():
    watch = Rates()
    run({"warm_start": "shrink", "optimizer": "restart"}, optimizer=SCHEDULES["StepLR"], others=[watch])
    assert [rates[0][0] for rates in watch.rates.values()] == [0.04, 0.02, 0.04, 0.02]


def test_a_fit_that_goes_on_longer_falls_from_where_that_leaves_it(checkpoints):
    path, watch = checkpoints({"warm_start": "shrink"}) / "epoch=3.ckpt", Rates()
    run({"warm_start": "shrink"}, others=[watch], max_epochs=6, ckpt_path=path)
    # The first step is made with the rate of the checkpoint.
    assert watch.rates[4][0][0] == pytest.approx(0, abs=1e-9)
    steps = len(watch.rates[4])
    assert watch.rates[4][1][0] == pytest.approx(0.01 * cosine((2 + 1 / steps) / 4))
