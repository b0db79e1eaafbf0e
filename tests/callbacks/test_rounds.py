"""The partition computed again while fine-tuning goes on, and everybody who follows it."""

from functools import partial
from itertools import permutations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import OneCycleLR

from lightning_unlearn import CleanSubsetFinetuneCallback
from lightning_unlearn.recipes import RecipeResult
from lightning_unlearn.results.summary import PartitionRound
from tests.toys import (
    Blobs,
    IndexRecorder,
    Toy,
    adamw,
    assert_same_weights,
    fit,
    mlp,
    partition_callback,
    quick_trio,
    trio,
    weights,
)
from tests.toys import (
    QuickData as BlobsData,
)

SIZE = 101
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{line}:UserWarning")
    for line in ("Be aware that when using `ckpt_path`", ".*in eval mode at the start of training")
]


class Scripted:
    """A recipe that calls given samples clean, other ones each time.

    Args:
        kept: one function from dataset indices to whether they are clean for each round; the last one stays.
    """

    def __init__(self, *kept):
        self.kept = kept
        self.calls = 0

    def __call__(self, evidence):
        if evidence.margin.equal(evidence.aum):  # the trial before the first step
            return torch.ones_like(evidence.weight)
        kept = self.kept[min(self.calls, len(self.kept) - 1)]
        self.calls += 1
        return torch.where(kept(evidence.index), 0.9, 0.1).to(evidence.weight)


def below(number):
    return lambda index: index < number


def growing():
    return Scripted(below(40), below(70), below(95))


def everything(index):
    return index >= 0


class Follows(L.Callback):
    """What is known when each epoch ends."""

    def __init__(self, partition, data):
        self.partition, self.record = partition, IndexRecorder(data)
        self.rounds, self.clean, self.trajectory = [], [], []

    def on_train_batch_start(self, *args):
        self.record.on_train_batch_start(*args)

    def on_train_epoch_end(self, trainer, pl_module):
        drawn = self.partition.has_result
        self.rounds.append(tuple(r.epoch for r in self.partition.rounds))
        self.clean.append(self.partition.partition.clean_indices().tolist() if drawn else list(range(SIZE)))
        self.trajectory.append(self.partition.collector.trajectory is not None)


def drawn_again(recipe="label", *, at=2, every=2, epochs=8, net=mlp, optimizer=adamw, finetune=None, **kwargs):
    data, module = Blobs(SIZE), Toy(net, optimizer)
    callbacks = trio(
        at,
        finetune=finetune,
        recipe=recipe,
        **{"every_n_epochs": every, "min_change": 0, "min_class_fraction": 0} | kwargs,
    )
    follows = Follows(callbacks[0], data)
    fit(module, BlobsData(data, by_epoch=True), [*callbacks, follows], max_epochs=epochs)
    return callbacks, follows, module


@pytest.mark.parametrize(
    ("at", "every", "rounds"),
    [(2, 2, [2, 4, 6]), (1, 3, [1, 4, 7]), (3, 1, [3, 4, 5, 6, 7]), (2, 9, [2]), (2, None, [2])],
)
def test_it_is_drawn_again_at_these_epochs(at, every, rounds):
    (partition, _, _), follows, _ = drawn_again(at=at, every=every)
    assert [drawn.epoch for drawn in partition.rounds] == rounds
    assert follows.rounds == [tuple(r for r in rounds if r <= epoch) for epoch in range(8)]


def test_training_follows_the_partition_of_each_round():
    (partition, _, finetune), follows, module = drawn_again(growing())
    assert [len(clean) for clean in follows.clean] == [101, 101, 40, 40, 70, 70, 95, 95]
    for epoch, clean in enumerate(follows.clean):
        assert sorted(follows.record.by_epoch[epoch]) == clean, epoch
    assert module.steps_by_epoch == dict(enumerate([4, 4, 2, 2, 3, 3, 3, 3]))
    assert partition.rounds == tuple(
        PartitionRound(epoch, SIZE - kept, pytest.approx(rate), pytest.approx(changed))
        for epoch, kept, rate, changed in [
            (2, 40, (0.1 * 40 + 0.9 * 61) / SIZE, 1.0),
            (4, 70, (0.1 * 70 + 0.9 * 31) / SIZE, 30 / SIZE),
            (6, 95, (0.1 * 95 + 0.9 * 6) / SIZE, 25 / SIZE),
        ]
    )
    assert finetune.training_subset.index.tolist() == list(range(95))


@pytest.mark.parametrize("on_noisy", ["reweight", "relabel"])
def test_so_do_weights_and_new_labels(on_noisy):
    (partition, _, finetune), follows, _ = drawn_again(growing(), finetune={"on_noisy": on_noisy})
    drawn, draw = partition.partition, finetune.training_subset
    if on_noisy == "reweight":
        assert draw.index.tolist() == list(range(SIZE))
        assert draw.probability.equal(drawn.clean_probability)
        assert len(follows.record.by_epoch[7]) == int(drawn.clean_probability.double().sum())
    else:
        assert sorted(draw.index.tolist()) == sorted([*range(95), *draw.relabeled.tolist()])
        assert len(draw.relabeled) > 0
        assert sorted(follows.record.by_epoch[7]) == draw.index.tolist()
    # Our own passes saw the labels as they are given.
    assert drawn.label.equal(Blobs(SIZE).y)


@pytest.mark.parametrize(
    ("recipe", "stable", "rounds"),
    [
        # The first one changes nobody's side but is no redraw, so it cannot be stable.
        (Scripted(below(40)), 0.01, [2, 3]),
        (Scripted(below(40)), 0, [2, 3, 4, 5, 6, 7]),
        (growing(), 0.29, [2, 3, 4]),
        (growing(), 0.2, [2, 3, 4, 5]),
        (growing(), 0.99, [2, 3]),
    ],
    ids=["same again", "never", "less than before", "stays", "at once"],
)
def test_it_stops_once_stable(recipe, stable, rounds):
    recipe.calls = 0
    (partition, _, _), follows, _ = drawn_again(recipe, every=1, min_change=stable)
    assert [drawn.epoch for drawn in partition.rounds] == rounds
    # Then what was gathered for a further round is let go.
    goes_on = stable == 0
    assert follows.trajectory == [epoch < rounds[-1] or goes_on for epoch in range(8)]
    assert (partition.state_dict()["trajectory"] is not None) == goes_on


def test_without_rounds_what_was_gathered_is_let_go_at_once():
    (partition, _, _), follows, _ = drawn_again(growing(), every=None)
    assert follows.trajectory == [True, True] + [False] * 6
    assert partition.state_dict()["trajectory"] is None


def test_a_later_partition_that_cannot_be_acted_upon_leaves_the_one_before_in_force():
    recipe = Scripted(below(40), everything, below(70))
    (partition, _, finetune), follows, _ = drawn_again(recipe)
    assert [len(clean) for clean in follows.clean] == [101, 101, 40, 40, 40, 40, 70, 70]
    for epoch, clean in enumerate(follows.clean):
        assert sorted(follows.record.by_epoch[epoch]) == clean, epoch
    assert [drawn.suspects for drawn in partition.rounds] == [61, 0, 31]
    assert [drawn.changed for drawn in partition.rounds] == pytest.approx([1, 61 / SIZE, 30 / SIZE])
    assert partition.partition.epoch == 6
    assert finetune.is_active


def test_a_first_partition_that_cannot_be_acted_upon_leaves_the_next_its_turn():
    recipe = Scripted(everything, below(70))
    with pytest.warns(UserWarning, match="not applied; training continues on all data: all"):
        (partition, _, finetune), follows, _ = drawn_again(recipe, finetune={"lr": 0.01})
    assert [len(clean) for clean in follows.clean] == [101] * 4 + [70] * 4
    for epoch, clean in enumerate(follows.clean):
        assert sorted(follows.record.by_epoch[epoch]) == clean, epoch
    assert finetune.is_active
    summary = partition.summary
    assert summary.suspects == SIZE - 70
    assert "from epoch 4 on" in finetune.summary_clause()
    assert summary.accuracy_before is not None
    assert summary.accuracy_after is not None
    assert "is not known" not in summary.advice


class Unsure(Scripted):
    """A recipe that can tell nothing the first two times, and calls the same samples clean as later."""

    def __call__(self, evidence):
        warning = "nothing can be told yet" if self.calls < 2 else ""
        return RecipeResult(super().__call__(evidence), evidence.prediction, warning=warning)


def test_what_cannot_be_told_twice_is_not_stable():
    (partition, _, finetune), *_ = drawn_again(Unsure(below(70)), every=1, min_change=0.01, epochs=7)
    assert [drawn.epoch for drawn in partition.rounds] == [2, 3, 4, 5]
    assert [drawn.changed for drawn in partition.rounds] == [1, 0, 0, 0]
    assert partition.partition.is_actionable
    assert finetune.is_active


def test_a_data_set_without_noise_is_not_looked_at_for_ever(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_unlearn.partitioning.messages.rank_zero_info", said.append)
    (partition, _, _), *_ = drawn_again(Scripted(everything), every=1, min_change=0.01)
    assert [drawn.epoch for drawn in partition.rounds] == [2, 3]
    (line,) = [line for line in said if "Partition recomputed" in line]
    assert line.endswith("classified as clean), the previous one stays, and none is computed again.")
    assert "stable" not in line


VARIANTS = {
    "drop": {},
    "relabel": {"on_noisy": "relabel", "relabel_threshold": 0.4},
    "reweight": {"on_noisy": "reweight", "lr": 0.01},
    "layers": {"mode": "layers", "lr": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_between_rounds_equals_the_uninterrupted_fit(tmp_path, variant):
    # The default keeps more of what it has seen than others.
    epochs, make = 6, trio if variant == "drop" else quick_trio

    def start(epoch=None, beside=()):
        data = Blobs(SIZE)
        callbacks = make(2, finetune=VARIANTS[variant], every_n_epochs=2, min_change=0)
        module, record = Toy(optimizer=adamw), IndexRecorder(data)
        fit(
            module,
            BlobsData(data, by_epoch=True),
            [*callbacks, record, *beside],
            ckpt_path=None if epoch is None else tmp_path / f"epoch={epoch}.ckpt",
            max_epochs=epochs,
            enable_checkpointing=bool(beside),
        )
        return callbacks, module, record

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    (partition, prune, finetune), whole, record = start(beside=[keep])
    assert [drawn.epoch for drawn in partition.rounds] == [2, 4]
    for epoch in range(epochs - 1):
        ours, module, again = start(epoch)
        assert ours[0].rounds == partition.rounds, epoch
        for name, value in partition.partition.state_dict().items():
            other = ours[0].partition.state_dict()[name]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5, msg=f"{epoch} {name}")
            else:
                assert other == pytest.approx(value) if isinstance(value, float) else other == value, (epoch, name)
        assert ours[1].has_result == prune.has_result
        for one, other in zip(ours[1].masks, prune.masks, strict=True):
            assert one.keep.equal(other.keep), epoch
        assert again.by_epoch == {e: record.by_epoch[e] for e in range(epoch + 1, epochs)}, epoch
        assert_same_weights(weights(module), weights(whole), 1e-6)
        assert ours[0].summary == partition.summary, epoch
        assert ours[2].summary_clause() == finetune.summary_clause()


def test_the_order_of_the_callbacks_does_not_matter():
    final = []
    for order in permutations(range(3)):
        callbacks = quick_trio(2, finetune={"on_noisy": "relabel"}, every_n_epochs=1, min_change=0)
        module = Toy(lambda: mlp(0.3), adamw)
        fit(module, BlobsData(Blobs(SIZE)), [callbacks[i] for i in order], max_epochs=5)
        assert len(callbacks[0].rounds) == 3
        final.append((weights(module), callbacks[0].rounds, callbacks[0].partition.clean_probability))
    for other in final[1:]:
        assert_same_weights(final[0][0], other[0])
        assert final[0][1] == other[1]
        assert final[0][2].equal(other[2])


def one_cycle(module, made):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    made.append((steps, scheduler))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("on_noisy", ["drop", "reweight"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_of_steps_is_not_overrun_by_a_later_rounds_larger_subset(accumulate, on_noisy):
    made, data = [], Blobs(SIZE)
    callbacks = trio(
        2,
        finetune={"optimizer": "restart", "on_noisy": on_noisy},
        recipe=growing(),
        every_n_epochs=2,
        min_change=0,
        min_class_fraction=0,
    )
    follows, module = Follows(callbacks[0], data), Toy(optimizer=partial(one_cycle, made=made))
    fit(module, BlobsData(data, batch_size=16), [*callbacks, follows], max_epochs=8, accumulate_grad_batches=accumulate)
    first = 3  # for 40 of the samples, and for all with their weights, which sum to 42
    assert module.steps_by_epoch == dict(enumerate([7, 7] + [first] * 6))
    assert made[1][0] == 6 * -(-first // accumulate)
    assert made[1][1].last_epoch == made[1][0]
    if on_noisy == "drop":
        # In full batches, from all of the larger subset.
        for epoch in (4, 5, 6, 7):
            assert len(follows.record.by_epoch[epoch]) == 3 * 16
            assert set(follows.record.by_epoch[epoch]) <= set(follows.clean[epoch])
        assert max(follows.record.by_epoch[4] + follows.record.by_epoch[5]) >= 48


def test_without_a_schedule_of_steps_nothing_is_left_out():
    _, follows, _ = drawn_again(growing(), finetune={"lr": 0.01})
    assert [len(follows.record.by_epoch[epoch]) for epoch in (2, 4, 6)] == [40, 70, 95]


def test_the_state_between_rounds_is_tensors_and_primitives(tmp_path):
    data = Blobs(SIZE)
    settings = {"finetune": {"on_noisy": "relabel"}, "every_n_epochs": 1, "min_change": 0, "recipe": "label"}
    callbacks = trio(2, **settings)
    fit(Toy(), BlobsData(data), callbacks, max_epochs=4)
    for callback, again in zip(callbacks, trio(2, **settings), strict=True):
        torch.save(callback.state_dict(), tmp_path / "state.pt")
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert again.has_result == callback.has_result
    state = callbacks[0].state_dict()
    assert [set(drawn) for drawn in state["rounds"]] == [{"epoch", "suspects", "noise_rate", "changed"}] * 2
    assert state["trajectory"]["label"].equal(data.y)


def test_rounds_that_a_checkpoint_was_not_made_for_are_not_drawn(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Toy(), BlobsData(Blobs(SIZE)), [*trio(2), keep], enable_checkpointing=True, max_epochs=4)
    partition = partition_callback(at_epoch=2, every_n_epochs=1, min_change=0)
    module, finetune = Toy(), CleanSubsetFinetuneCallback()
    with pytest.warns(UserWarning, match="every_n_epochs=1 has no effect: the checkpoint was saved without it"):
        fit(module, BlobsData(Blobs(SIZE)), [partition, finetune], max_epochs=6, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert set(module.steps_by_epoch) == {3, 4, 5}
    assert [drawn.epoch for drawn in partition.rounds] == [2]


def test_rounds_reload_and_workers_go_together():
    data = Blobs(SIZE)
    for loader, trainer in [
        ({"num_workers": 1, "persistent_workers": True}, {}),
        ({}, {"reload_dataloaders_every_n_epochs": 1}),
        ({}, {"val_check_interval": 4}),
    ]:
        callbacks = trio(1, finetune={"on_noisy": "relabel"}, recipe=growing(), every_n_epochs=1, min_class_fraction=0)
        follows = Follows(callbacks[0], data)
        fit(Toy(), BlobsData(data, **loader), [*callbacks, follows], max_epochs=4, **trainer)
        for epoch in (1, 2, 3):
            clean = set(follows.clean[epoch])
            drawn = follows.record.by_epoch[epoch]
            assert len(drawn) == len(set(drawn))
            assert clean <= set(drawn)
        assert set(follows.record.by_epoch[3]) == set(callbacks[2].training_subset.index.tolist())
        assert [len(clean) for clean in follows.clean] == [101, 40, 70, 95]


def test_a_schedule_of_steps_is_not_overrun_where_the_fit_is_resumed_between_rounds_either(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    final = []
    for epoch in (None, 1, 2, 3, 4):
        recipe, made = growing(), []
        recipe.calls = 0 if epoch is None else sum(at <= epoch for at in (2, 4))
        callbacks = trio(
            2,
            finetune={"optimizer": "restart", "on_noisy": "relabel"},
            recipe=recipe,
            every_n_epochs=2,
            min_change=0,
            min_class_fraction=0,
        )
        module, beside = Toy(optimizer=partial(one_cycle, made=made)), [keep] if epoch is None else []
        fit(
            module,
            BlobsData(Blobs(SIZE), by_epoch=True),
            [*callbacks, *beside],
            ckpt_path=None if epoch is None else tmp_path / f"epoch={epoch}.ckpt",
            max_epochs=6,
            enable_checkpointing=epoch is None,
        )
        steps, schedule = made[-1]
        assert schedule.last_epoch == steps, epoch
        assert len(callbacks[0].partition.clean_indices()) == 70
        final.append((weights(module), callbacks[2].training_subset.index.tolist()))
    for other in final[1:]:
        assert_same_weights(other[0], final[0][0], 1e-6)
        assert other[1] == final[0][1]


def test_a_fit_that_goes_on_with_the_same_trainer_draws_on():
    data = Blobs(SIZE)
    callbacks = trio(2, recipe=growing(), every_n_epochs=2, min_change=0, min_class_fraction=0)
    follows, module = Follows(callbacks[0], data), Toy(optimizer=adamw)
    trainer = fit(module, BlobsData(data), [*callbacks, follows], max_epochs=5)
    assert [drawn.epoch for drawn in callbacks[0].rounds] == [2, 4]
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, datamodule=BlobsData(data))
    assert [drawn.epoch for drawn in callbacks[0].rounds] == [2, 4, 6]
    for epoch, clean in enumerate(follows.clean):
        assert sorted(follows.record.by_epoch[epoch]) == clean, epoch
