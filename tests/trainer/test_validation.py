import copy
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn import AttributionPartitionCallback
from lightning_unlearn.trainer import validation as validation_module
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.validation import Score, score_samples, score_validation
from tests.callbacks.test_leaves_model_as_found import hooks_of
from tests.toys import CLASSES, Blobs, BlobsData, Toy, fit, mlp, weights

SOURCE = AttributionPartitionCallback(at_epoch=1)
SOURCE.task_format.infer_task(torch.zeros(2, CLASSES), torch.zeros(2, dtype=torch.int64))


class Asks(L.Callback):
    """Asks for a score when an epoch starts, and does the same by hand."""

    def __init__(self, ask, epoch=1):
        self.ask, self.epoch = ask, epoch
        self.score, self.model = None, None

    def setup(self, trainer, pl_module, stage):
        self.fit = FitContext(trainer, pl_module, SOURCE)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.model = copy.deepcopy(pl_module.net).eval()
            self.score = self.ask(self.fit)


def validation(context):
    return score_validation(context)


def by_hand(model, x, y):
    with torch.no_grad():
        logits = model(x)
    return (logits.argmax(dim=1) == y).float().mean().item(), cross_entropy(logits, y).item(), len(y)


def assert_is(score, expected):
    assert score.samples == expected[2]
    assert (score.accuracy, score.loss) == pytest.approx(expected[:2], rel=1e-5)


class Data(BlobsData):
    """With validation loaders of one's own."""

    def __init__(self, make, size=103):
        super().__init__(Blobs(size))
        self.make, self.made = make, 0

    def val_dataloader(self):
        self.made += 1
        return self.make()


HELD_OUT = Blobs(45, 0.3, seed=7)


def test_the_score_is_that_of_the_validation_data_in_eval_mode():
    asks = Asks(validation)
    fit(Toy(lambda: mlp(dropout=0.5)), Data(lambda: DataLoader(HELD_OUT, 16)), [asks], max_epochs=2)
    assert_is(asks.score, by_hand(asks.model, HELD_OUT.x, HELD_OUT.y))
    # The rows are the samples' own: the last batch, which is smaller, does not count more.
    assert 0 < asks.score.accuracy < 1


@pytest.mark.parametrize(("limit", "samples"), [(2, 32), (1, 16), (0.34, 16), (1.0, 45)])
def test_the_limit_of_validation_batches_holds(limit, samples):
    asks = Asks(validation)
    fit(Toy(), Data(lambda: DataLoader(HELD_OUT, 16)), [asks], max_epochs=2, limit_val_batches=limit)
    assert_is(asks.score, by_hand(asks.model, HELD_OUT.x[:samples], HELD_OUT.y[:samples]))


def test_several_loaders_are_one_set_of_samples():
    class Two(Toy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    other = Blobs(10, 0.5, seed=8)
    asks = Asks(validation)
    fit(Two(), Data(lambda: [DataLoader(HELD_OUT, 16), DataLoader(other, 4)]), [asks], max_epochs=2)
    expected = by_hand(asks.model, torch.cat([HELD_OUT.x, other.x]), torch.cat([HELD_OUT.y, other.y]))
    assert_is(asks.score, expected)


def test_a_sampler_says_which_samples_are_for_validation():
    chosen = list(range(5, 25))
    asks = Asks(validation)
    fit(Toy(), Data(lambda: DataLoader(HELD_OUT, 8, sampler=SubsetRandomSampler(chosen))), [asks], max_epochs=2)
    assert_is(asks.score, by_hand(asks.model, HELD_OUT.x[chosen], HELD_OUT.y[chosen]))


def test_validation_that_is_not_due_yet_has_its_loader_made_once():
    asks, module = Asks(validation), Toy()
    data = Data(lambda: DataLoader(HELD_OUT, 16))
    fit(module, data, [asks], max_epochs=4, num_sanity_val_steps=0, check_val_every_n_epoch=3)
    assert asks.score.samples == 45
    assert data.made == 1
    assert module.validations_by_epoch == {2: 1}


def test_the_users_loaders_are_made_again_when_they_are_due():
    made = []
    for asking in ([], [Asks(validation)]):
        data = Data(lambda: DataLoader(HELD_OUT, 16))
        fit(
            Toy(),
            data,
            asking,
            max_epochs=4,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=2,
            reload_dataloaders_every_n_epochs=2,
        )
        made.append(data.made)
    assert made[1] == made[0] + 1  # the one that was made early


class NoLabels(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0]


UNUSABLE = {
    "no validation batches": (list, {}),
    "TypeError: Expected a batch": (lambda: DataLoader(NoLabels(HELD_OUT.x), 16), {}),
    "ValueError: Expected integer labels": (lambda: DataLoader(TensorDataset(HELD_OUT.x, HELD_OUT.x), 16), {}),
    r"ValueError: Expected labels in \[0, 4\)": (lambda: DataLoader(TensorDataset(HELD_OUT.x, HELD_OUT.y + 3), 16), {}),
    "RuntimeError: mat1 and mat2": (lambda: DataLoader(TensorDataset(HELD_OUT.x[:, :3], HELD_OUT.y), 16), {}),
    "the fit has no validation batches": (lambda: DataLoader(HELD_OUT, 16), {"limit_val_batches": 0}),
}


class Ignores(Toy):
    """Has validation batches of some other task."""

    def validation_step(self, batch):
        return None


@pytest.mark.parametrize("reason", UNUSABLE)
def test_where_there_is_no_score_the_log_says_why_once(reason, monkeypatch):
    make, trainer = UNUSABLE[reason]
    said = []
    monkeypatch.setattr(validation_module, "rank_zero_info", said.append)
    asks = Asks(lambda *both: (validation(*both), validation(*both)))
    module = Ignores()
    fit(module, Data(make), [asks], max_epochs=2, **trainer)
    assert asks.score == (None, None)
    assert len(said) == 1
    assert re.search(f"No validation score available: .*{reason}", said[0])
    assert module.steps == 14  # the fit went on


def test_a_module_without_validation_has_no_score():
    class Untold(Toy):
        validation_step = L.LightningModule.validation_step

    asks = Asks(lambda *both: (validation(*both),))
    fit(Untold(), Data(lambda: DataLoader(HELD_OUT, 16)), [asks], max_epochs=2)
    assert asks.score == (None,)


def shuffled():
    generator = torch.Generator().manual_seed(5)
    return DataLoader(HELD_OUT, 16, sampler=RandomSampler(HELD_OUT, generator=generator), generator=generator)


class Order(L.Callback):
    def __init__(self):
        self.batches = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.batches.append(batch[0])


@pytest.mark.parametrize("make", [shuffled, lambda: DataLoader(Blobs(45, augment="torch", seed=7), 16)])
def test_the_fit_goes_on_as_without_a_score(make):
    seen = []
    for asking in ([], [Asks(validation), Asks(lambda context: score_samples(context, torch.arange(20)))]):
        module, order = Toy(lambda: mlp(dropout=0.3)), Order()
        fit(module, Data(make), [*asking, order], max_epochs=3)
        seen.append((weights(module), torch.cat(order.batches)))
        assert not any(hooks_of(module).values())
    (one, first), (other, second) = seen
    assert all(one[name].equal(other[name]) for name in one)
    assert first.equal(second)


@pytest.mark.parametrize("index", [[3], [5, 3, 3, 90], list(range(103))])
def test_samples_are_scored_by_dataset_index(index):
    index = torch.tensor(index)
    data = Data(lambda: DataLoader(HELD_OUT, 16))
    asks = Asks(lambda context: score_samples(context, index))
    fit(Toy(), data, [asks], max_epochs=2)
    assert_is(asks.score, by_hand(asks.model, data.train.x[index], data.train.y[index]))


def test_two_scores_in_a_row_see_the_same_augmentation():
    data = Data(lambda: DataLoader(HELD_OUT, 16))
    data.train.augment = "numpy"

    def ask(context):
        return [score_samples(context, torch.arange(50)) for _ in range(2)]

    asks = Asks(ask)
    fit(Toy(), data, [asks], max_epochs=2)
    assert asks.score[0] == asks.score[1]
    plain = by_hand(asks.model, data.train.x[:50], data.train.y[:50])
    assert asks.score[0].loss != pytest.approx(plain[1], rel=1e-4)


def test_no_samples_have_no_score():
    with pytest.raises(ValueError, match="Expected at least one sample to score"):
        score_samples(None, torch.zeros(0, dtype=torch.int64))


def test_memory_that_does_not_suffice_for_a_batch_is_used_in_parts():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            if not self.training and len(x) > 5:
                raise torch.OutOfMemoryError("out of memory")
            return self.net(x)

    asks = Asks(validation)
    fit(Ignores(Small), Data(lambda: DataLoader(HELD_OUT, 16)), [asks], max_epochs=2, num_sanity_val_steps=0)
    assert_is(asks.score, by_hand(asks.model.net, HELD_OUT.x, HELD_OUT.y))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "world"), [(45, 2), (7, 3), (2, 3), (6, 3)])
def test_what_a_distributed_sampler_repeats_is_counted_once(shuffle, size, world):
    data = TensorDataset(torch.arange(size))
    counted = torch.zeros(size)
    for rank in range(world):
        sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=shuffle)
        for (index,), weigh in validation_module._weighed(DataLoader(data, 3, sampler=sampler)):
            counted.index_add_(0, index, weigh(len(index)))
    assert counted.tolist() == [1] * size


def test_a_rank_that_cannot_go_on_leaves_none_with_a_score():
    reduced = torch.tensor([8.0, 4.0, 10.0, 1.0], dtype=torch.float64)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: reduced)
    context = FitContext(SimpleNamespace(strategy=strategy), None, SOURCE)
    tally = validation_module._ScoreAccumulator(context)
    assert tally.score() is None
    reduced[3] = 0
    assert tally.score() == Score(0.8, 0.4, 10)
    assert str(Score(0.8, 0.4, 1000)) == "accuracy 0.800, loss 0.400 on 1,000 samples"


def changed_in_place(module):
    with torch.no_grad():
        module.net[-1].weight.neg_()


def changed_by_data(module):
    module.net[-1].weight.data = -module.net[-1].weight.data


def a_buffer(module):
    module.net[1].running_mean.add_(3)


@pytest.mark.parametrize("change", [None, changed_in_place, changed_by_data, a_buffer])
def test_the_same_weights_are_measured_once(monkeypatch, change):
    measured, scores = [], []
    measure = validation_module._measure_validation
    monkeypatch.setattr(validation_module, "_measure_validation", lambda *args: measured.append(1) or measure(*args))

    def twice(context):
        for changes in (None, change):
            if changes is not None:
                changes(context.model)
            scores.append(validation(context))

    fit(Toy(), BlobsData(Blobs(40)), [Asks(twice)], max_epochs=2)
    assert len(measured) == (1 if change is None else 2)
    assert (scores[0].loss == scores[1].loss) == (change is None)
