"""Every sample carries its index in its first feature, so that whose row is whose can be told without the reader."""

import copy
import pickle
import types

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, WeightedRandomSampler

from lightning_unlearn import DataFormat
from lightning_unlearn.data.index_tracking import TrackedBatchSampler
from lightning_unlearn.data.task_format import TaskFormat, split_batch
from lightning_unlearn.evidence.mixed_targets import has_mixed_target
from lightning_unlearn.evidence.step_reader import WINDOW, TrainStepReader
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.fit_loop import live_iterator
from tests.callbacks import forked
from tests.toys import CLASSES, Toy, assert_same_weights, fit, make_trainer, mlp, sgd, weights

N = 101
BATCH = 8
HEAD = "net.7"


class Coded(Dataset):
    """Sample i has i as its first feature."""

    def __init__(self, size=N, classes=4, noise=0.3):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(0, classes, (size,), generator=generator)
        self.x = torch.randn(classes, 16, generator=generator)[self.y] + torch.randn(size, 16, generator=generator)
        self.x[:, 0] = torch.arange(size)
        wrong = torch.rand(size, generator=generator) < noise
        self.y[wrong] = torch.randint(0, classes, (int(wrong.sum()),), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Sink:
    """Keeps everything, by epoch."""

    def __init__(self):
        self.epochs, self.forgotten, self.shapes = [[]], 0, []

    def observe(self, index, logits, label):
        assert index.dtype == label.dtype == torch.int64
        assert index.device.type == "cpu"
        assert logits.dtype == torch.float32
        assert not logits.requires_grad
        assert len(index) == len(logits) == len(label)
        self.epochs[-1].append((index, logits, label))

    def forget(self):
        self.forgotten += 1

    def rows(self, epoch):
        return [torch.cat(parts) for parts in zip(*self.epochs[epoch], strict=True)] if self.epochs[epoch] else []


class Driver(L.Callback):
    """Drives a reader as AttributionPartitionCallback does."""

    def __init__(self, head=HEAD, split=split_batch, late=False):
        self.sink = Sink()
        self.task_format = TaskFormat(DataFormat(batch_to_xy=split))
        self.reader = TrainStepReader(task_format=self.task_format, sink=self.sink)
        self.head, self.late, self.goes_on, self.rows_read = head, late, [], []

    def setup(self, trainer, pl_module, stage):
        if trainer.current_epoch == 0:
            self.reader.reset()
        self.fit = FitContext(trainer, pl_module, self)
        if not self.late:
            self.reader.attach(self.fit)

    def on_train_start(self, trainer, pl_module):
        head = dict(pl_module.named_modules()).get(self.head)
        outputs = getattr(head, "out_features", CLASSES)
        self.task_format.infer_task(torch.zeros(2, outputs), torch.zeros(2, dtype=torch.int64))
        self.reader.start(self.fit, self.head)

    def on_train_epoch_start(self, trainer, pl_module):
        self.reader.start_epoch(self.fit)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reader.start_batch(self.fit, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reader.end_batch()

    def on_train_epoch_end(self, trainer, pl_module):
        self.goes_on.append(self.reader.end_epoch(self.fit))
        self.rows_read.append(self.reader.rows_read)
        self.sink.epochs.append([])

    def teardown(self, trainer, pl_module, stage):
        self.reader.detach()

    def on_exception(self, trainer, pl_module, exception):
        self.reader.detach()

    def state_dict(self):
        return self.reader.state_dict()

    def load_state_dict(self, state_dict):
        self.reader.load_state_dict(state_dict)


class Net(Toy):
    """A Toy whose step can be replaced, and that notes which rows it was given."""

    def __init__(self, step=None, net=mlp, optimizer=sgd, manual=False):
        super().__init__(net, optimizer, manual=manual)
        self.step = step
        self.noted = {}

    def training_step(self, batch):
        index = batch[0][:, 0].round().long()
        loss = self.step(self, *batch) if self.step else None
        if not self.step:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.noted.setdefault(self.current_epoch, []).append((index, logits.detach().clone(), batch[1]))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if loss is not None:
            self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch):
        self(batch[0])


class Data(L.LightningDataModule):
    """Makes its train loader anew whenever it is asked."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()

    def val_dataloader(self):
        return DataLoader(Coded(16), batch_size=8)


def run(loader, module=None, driver=None, epochs=3, **kwargs):
    driver, module = driver or Driver(), module or Net()
    fit(module, loader, [driver], max_epochs=epochs, **kwargs)
    return driver, module


def assert_reads(driver, module, epochs=(0, 1, 2)):
    """What the sink has is what the training step saw."""
    assert driver.reader.reason == ""
    assert driver.sink.forgotten == 0
    for epoch in epochs:
        noted = [torch.cat(parts) for parts in zip(*module.noted[epoch], strict=True)]
        read = driver.sink.rows(epoch)
        assert len(read[0]) > 0
        assert driver.rows_read[epoch] == len(read[0])
        for one, other in zip(read, noted, strict=True):
            assert one.equal(other)


class Odd(BatchSampler):
    """A custom batch sampler without a sampler: uneven batches, the list filled again and again."""

    def __init__(self):
        self.batch_size, self.batch = 5, []

    def __iter__(self):
        order, start = torch.randperm(N).tolist(), 0
        for size in (3, 8, 5, 7) * 4:
            self.batch[:] = order[start : start + size]
            start += size
            yield self.batch

    def __len__(self):
        return 16


class Endless(Odd):
    """Does not say how many batches it has, so Lightning draws one ahead."""

    __len__ = None


LOADERS = {
    "shuffle": {"batch_size": BATCH, "shuffle": True},
    "sequential": {"batch_size": BATCH},
    "workers": {"batch_size": BATCH, "shuffle": True, "num_workers": 2},
    "persistent workers": {"batch_size": BATCH, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    "drop last": {"batch_size": BATCH, "shuffle": True, "drop_last": True},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(N)), 8, drop_last=False)},
    "odd batches": {"batch_sampler": Odd()},
    "unknown length": {"batch_sampler": Endless()},
    "list of batches": {"batch_sampler": torch.arange(N - 1).reshape(-1, 4).tolist()},
    "tensors": {"batch_sampler": list(torch.arange(N - 1).reshape(-1, 4))},
    "weighted": {"batch_size": BATCH, "sampler": WeightedRandomSampler(torch.rand(N), N)},
    "one batch": {"batch_size": N, "shuffle": True},
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_row_has_its_index_label_and_logits(name):
    loader = DataLoader(Coded(), **LOADERS[name])
    before = dict(loader.__dict__)
    driver, module = run(loader)
    assert_reads(driver, module)
    assert driver.goes_on == [True] * 3
    changed = {key for key in before if before[key] is not loader.__dict__[key]}
    assert changed <= {"_DataLoader__multiprocessing_context", "worker_init_fn"}


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3},
        {"limit_train_batches": 5},
        {"limit_train_batches": 0.5, "val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"reload_dataloaders_every_n_epochs": 2},
        {"precision": "bf16-mixed"},
        {"use_distributed_sampler": False},
        {"gradient_clip_val": 0.1, "num_sanity_val_steps": 2},
    ],
)
def test_it_reads_whatever_the_trainer_is_told(settings):
    made = []

    def make():
        made.append(DataLoader(Coded(), batch_size=BATCH, shuffle=True))
        return made[-1]

    driver, module = run(Data(make), **settings)
    if "precision" not in settings:
        assert_reads(driver, module)
    assert driver.reader.reason == ""
    assert driver.sink.rows(2)[0].equal(torch.cat([index for index, _, _ in module.noted[2]]))
    assert all(type(loader.batch_sampler) is BatchSampler for loader in made)


def test_the_loader_may_serve_for_validation_and_be_looped_over_in_between():
    loader = DataLoader(Coded(), batch_size=BATCH, shuffle=True)

    class Meddler(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            next(iter(trainer.train_dataloader.batch_sampler))
            if trainer.global_step % 5 == 0:
                for _ in loader:
                    pass

    driver, module = Driver(), Net()
    L.seed_everything(0, verbose=False)
    trainer = make_trainer([Meddler(), driver], max_epochs=3, val_check_interval=3)
    trainer.fit(module, loader, loader)
    assert_reads(driver, module)


def test_a_loader_that_configure_optimizers_has_asked_for_is_read_from_the_first_batch():
    def planned(module):
        assert module.trainer.estimated_stepping_batches
        return sgd(module)

    loader = DataLoader(Coded(), batch_size=BATCH, shuffle=True, num_workers=1)
    assert_reads(*run(loader, Net(optimizer=planned)))


def test_the_users_loader_looks_as_it_did_during_the_fit():
    class Bucket(BatchSampler):
        """Has something to set and to call."""

        def set_epoch(self, epoch):
            self.epoch = epoch

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            batches = trainer.train_dataloader.batch_sampler
            assert isinstance(batches, Bucket)
            assert type(batches) is TrackedBatchSampler
            batches.set_epoch(trainer.current_epoch)
            batches.drop_last = False

    mine = Bucket(DistributedSampler(Coded(), num_replicas=1, rank=0), 8, drop_last=True)
    loader = DataLoader(Coded(), batch_sampler=mine)
    driver, module = Driver(), Net()
    fit(module, loader, [Look(), driver])
    assert_reads(driver, module)
    assert loader.batch_sampler is mine
    assert (mine.epoch, mine.drop_last, mine.sampler.epoch) == (3, False, 3)


def test_a_loader_that_is_already_under_way_is_read_from_the_next_epoch_on():
    driver, module = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True, num_workers=1), driver=Driver(late=True))
    assert driver.rows_read == [0, N, N]
    assert driver.goes_on == [True] * 3
    assert_reads(driver, module, epochs=(1, 2))


def test_persistent_workers_that_were_there_before_the_fit():
    loader = DataLoader(Coded(), batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    mine = loader.batch_sampler
    next(iter(loader))
    driver, module = run(loader)
    assert_reads(driver, module)
    assert loader.batch_sampler is mine


def test_a_second_fit_reads_anew():
    driver, loader = Driver(), DataLoader(Coded(), batch_size=BATCH, shuffle=True)
    run(loader, driver=driver)
    driver.sink.epochs, driver.rows_read = [[]], []
    assert_reads(*run(loader, driver=driver))


def plain(loss):
    return lambda module, x, y: loss(module(x), y)


def one_hot(y):
    return F.one_hot(y, 4).float()


def focal(z, y):
    logp = F.log_softmax(z, dim=1).gather(1, y[:, None])
    return (-((1 - logp.exp()) ** 2) * logp).mean()


CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 3.0, 10.0])


@torch.no_grad()
def no_grad(module, x):
    return module(x)


def twice_backward(module, x, y):
    z = module(x)
    module.manual_backward(F.cross_entropy(z, y), retain_graph=True)
    return 0.1 * (z**2).mean()


FAITHFUL = {
    "label smoothing": plain(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    "class weights": plain(lambda z, y: F.cross_entropy(z, y, weight=CLASS_WEIGHTS)),
    "sum": plain(lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    "focal": plain(focal),
    "squared error": plain(lambda z, y: F.mse_loss(z, one_hot(y))),
    "binary": plain(lambda z, y: F.binary_cross_entropy_with_logits(z, one_hot(y))),
    "hinge": plain(F.multi_margin_loss),
    "in place afterwards": plain(lambda z, y: F.cross_entropy(z.div_(0.5), y)),
    "small loss only": plain(lambda z, y: F.cross_entropy(z, y, reduction="none").topk(3, largest=False).values.sum()),
    "noise on the input": lambda module, x, y: F.cross_entropy(module(x + 0.1 * torch.randn_like(x)), y),
    "a teacher": lambda module, x, y: F.cross_entropy(module(x), y) + 0 * no_grad(module, x).sum(),
    "two backward passes": twice_backward,
    "a step now and then": lambda module, x, y: F.cross_entropy(module(x), y) if module.global_step % 3 else None,
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_losses_of_the_given_label_are_read(name):
    module = Net(FAITHFUL[name], manual=name in ("two backward passes", "a step now and then"))
    driver, _ = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True), module, epochs=6)
    assert driver.reader.reason == ""
    expected = 5 * N if name != "a step now and then" else 4 * N
    assert sum(len(driver.sink.rows(epoch)[0]) for epoch in range(6)) >= expected
    if name == "in place afterwards":
        with torch.no_grad():
            index, logits, _ = driver.sink.rows(0)
            again = Net().net.train()(Coded().x[index[:BATCH]])
        torch.testing.assert_close(logits[:BATCH], again)


def mixup(alpha, largest=False, classes=4, **loss):
    def step(module, x, y):
        share = torch.distributions.Beta(alpha, alpha).sample()
        share = max(share, 1 - share) if largest else share
        other = torch.randperm(len(x))
        z = module(share * x + (1 - share) * x[other])
        return share * F.cross_entropy(z, y, **loss) + (1 - share) * F.cross_entropy(z, y[other], **loss)

    return step


def cutmix(module, x, y):
    cut = int(torch.randint(4, 12, ()))
    other = torch.randperm(len(x))
    z = module(torch.cat([x[:, :cut], x[other][:, cut:]], dim=1))
    return F.cross_entropy(z, cut / 16 * F.one_hot(y, 4) + (1 - cut / 16) * F.one_hot(y[other], 4))


def sometimes(module, x, y):
    return mixup(1.0)(module, x, y) if torch.rand(()) < 0.2 else F.cross_entropy(module(x), y)


def shuffled(module, x, y):
    return F.cross_entropy(module(x), y[torch.randperm(len(y))])


MIXING = {
    "mixup 1": mixup(1.0),
    "mixup 0.2": mixup(0.2),
    "mixup 0.4, the larger share": mixup(0.4, largest=True),
    "mixup with smoothing": mixup(0.3, label_smoothing=0.1),
    "cutmix": cutmix,
    "mixup in a fifth of the batches": sometimes,
    "other labels": shuffled,
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_never_reach_the_sink(name):
    module, driver = Net(MIXING[name]), Driver()
    loader = DataLoader(Coded(400), batch_size=16, shuffle=True)
    run(loader, module, driver)
    assert "towards a class other than their label, as with MixUp and CutMix" in driver.reader.reason
    assert driver.goes_on == [False] * 3
    assert driver.sink.forgotten == 1
    assert driver.sink.epochs == [[]] * 4
    assert not module.get_submodule(HEAD)._forward_hooks
    assert type(loader.batch_sampler) is BatchSampler


def test_mixing_that_begins_later_makes_the_sink_forget():
    def step(module, x, y):
        return mixup(1.0)(module, x, y) if module.current_epoch == 2 else F.cross_entropy(module(x), y)

    driver, _ = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True), Net(step), epochs=4)
    assert "as with MixUp and CutMix" in driver.reader.reason
    assert driver.goes_on == [True, True, False, False]
    assert driver.sink.forgotten == 1
    assert driver.sink.epochs[2] == driver.sink.epochs[3] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
def test_two_classes(smoothing):
    def small():
        return nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 2))

    loader = DataLoader(Coded(400, classes=2), batch_size=16, shuffle=True)
    step = plain(lambda z, y: F.cross_entropy(z, y, label_smoothing=smoothing))
    driver = Driver(head="net.3")
    run(loader, Net(step, net=small), driver, epochs=10)
    assert driver.reader.reason == ""
    assert driver.rows_read == [400] * 10

    driver = Driver(head="net.3")
    run(loader, Net(mixup(0.5, label_smoothing=smoothing), net=small), driver)
    assert "as with MixUp and CutMix" in driver.reader.reason


def two_views(module, x, y):
    return F.cross_entropy(module(torch.cat([x, x + 0.1])), torch.cat([y, y]))


def two_calls(module, x, y):
    return F.cross_entropy(module(x), y) + F.cross_entropy(module(x + 0.1), y)


def beside_the_head(module, x, y):
    return F.cross_entropy(module.net[:7](x) @ module.net[7].weight.T, y)


def of_no_gradient(module, x, y):
    return module(x).detach().sum() + (module.net[0].weight ** 2).sum()


def of_zero_gradient(module, x, y):
    return 0 * module(x).sum()


def another_number_of_rows(module, x, y):
    return F.cross_entropy(module(x[1:]), y[1:])


OTHERWISE = {
    "two views": (two_views, r"its output \(16, 4\) does not have one row for each of the batch's 8 labels"),
    "two calls": (two_calls, "calls 'net.7' 2 times, not once"),
    "another number of rows": (another_number_of_rows, r"its output \(7, 4\) does not have one row"),
    "beside the head": (beside_the_head, "does not call 'net.7' with gradients, or calls it compiled"),
    "no gradient": (of_no_gradient, "without sending a gradient to its output"),
    "zero gradient": (of_zero_gradient, "zero or not finite in all rows of an epoch"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_cannot_be_told_is_noticed(name):
    step, reason = OTHERWISE[name]
    driver, module = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True), Net(step))
    with pytest.raises(ValueError, match=reason):
        raise ValueError(driver.reader.reason)
    assert driver.goes_on == [False] * 3
    assert driver.sink.epochs == [[]] * 4
    assert driver.sink.forgotten == 1
    assert not module.get_submodule(HEAD)._forward_hooks


def test_no_backward_pass_at_all():
    driver, _ = run(DataLoader(Coded(), batch_size=BATCH), Net(forward_only, manual=True))
    assert "without sending a gradient" in driver.reader.reason


def forward_only(module, x, y):
    module(x)


def soft_labels(module, batch, _):
    x, y = batch
    return x, 0.9 * one_hot(y) + 0.025 if module.trainer.training else y


def doubled(module, batch, _):
    return (torch.cat([batch[0]] * 2), torch.cat([batch[1]] * 2)) if module.trainer.training else batch


def as_dict(module, batch, _):
    return {"x": batch[0], "answer": batch[1]}


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (soft_labels, r"\d+ labels of training batches are out of range"),
        (doubled, "a batch of 8 dataset indices has 16 rows"),
        (as_dict, "cannot be split into input and labels"),
    ],
)
def test_batches_that_are_mixed_on_the_device(hook, reason):
    class Step(Net):
        def training_step(self, batch):
            x, y = batch.values() if isinstance(batch, dict) else batch
            return F.cross_entropy(self(x), y)

    module = Step()
    module.on_after_batch_transfer = types.MethodType(hook, module)
    driver, _ = run(DataLoader(Coded(), batch_size=BATCH), module)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(driver.reader.reason)
    assert driver.sink.epochs == [[]] * 4


def test_a_collate_function_that_sorts_is_noticed_once_an_index_comes_again():
    def by_size(samples):
        return torch.utils.data.default_collate(sorted(samples, key=lambda sample: float(sample[0][1])))

    driver, _ = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True, collate_fn=by_size))
    assert "rows have a different label than the one seen before at their dataset index" in driver.reader.reason
    assert driver.goes_on == [True, False, False]
    assert driver.sink.forgotten == 1


def test_a_collate_function_that_leaves_samples_out_is_noticed():
    def some(samples):
        return torch.utils.data.default_collate(samples[:-1])

    driver, _ = run(DataLoader(Coded(), batch_size=BATCH, shuffle=True, collate_fn=some))
    assert driver.reader.reason == "a batch of 8 dataset indices has 7 rows"


class OwnIterator(DataLoader):
    """Does not draw as torch does."""

    def __iter__(self):
        return iter([torch.utils.data.default_collate([self.dataset[i] for i in range(8)])] * 3)


class Pairs(Coded):
    """Is asked for pairs, as samplers of several resolutions do."""

    def __getitem__(self, index):
        return super().__getitem__(index[0])


def several():
    return {"a": DataLoader(Coded(), batch_size=BATCH), "b": DataLoader(Coded(), batch_size=BATCH)}


@pytest.mark.parametrize(
    ("loader", "reason", "goes_on"),
    [
        (lambda: DataLoader(Coded(), 8, num_workers=1, in_order=False), "in_order=False", [False] * 3),
        (lambda: OwnIterator(Coded(), 8), "cannot be matched with dataset indices", [True, False, False]),
        (
            lambda: DataLoader(Pairs(), batch_sampler=[[(i, 0), (i + 1, 0)] for i in range(0, 60, 2)]),
            "cannot be matched with dataset indices",
            [True, False, False],
        ),
        (lambda: DataLoader(Coded(), batch_sampler=[[-1, -2]] * 20), r"draws indices outside \[0, 101\)", [False] * 3),
    ],
)
def test_loaders_that_cannot_be_followed(loader, reason, goes_on):
    loader = loader()
    mine = loader.batch_sampler
    driver, _ = run(loader)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(driver.reader.reason)
    assert driver.goes_on == goes_on
    assert driver.rows_read == [0] * 3
    assert loader.batch_sampler is mine


def test_several_loaders():
    class Both(Net):
        def training_step(self, batch):
            return F.cross_entropy(self(batch["a"][0]), batch["a"][1])

    driver, _ = run(several(), Both())
    assert "does not draw batches of dataset indices (Expected one" in driver.reader.reason


def test_a_step_that_draws_its_own_batches_is_not_read():
    class Draws(Net):
        def training_step(self, dataloader_iter):
            (x, y), _, _ = next(dataloader_iter)
            return F.cross_entropy(self(x), y)

    driver, _ = run(DataLoader(Coded(), batch_size=BATCH), Draws())
    assert driver.goes_on == [True, False, False]
    assert "cannot be matched" in driver.reader.reason


def ignoring_three(number):
    """A step without the third class, whose label becomes another number."""

    def ignoring(module, x, y):
        return F.cross_entropy(module(x), y, ignore_index=number)

    def relabel(module, batch, _):
        return batch[0], batch[1].where(batch[1] != 3, number)

    module = Net(ignoring)
    module.on_after_batch_transfer = types.MethodType(relabel, module)
    return module


def test_labels_that_name_no_class():
    driver, _ = run(DataLoader(Coded(), batch_size=BATCH), ignoring_three(-7))
    assert "are out of range of the outputs of 'net.7'" in driver.reader.reason


def test_rows_with_the_label_to_ignore_are_left_out():
    data = Coded()
    driver, _ = run(DataLoader(data, batch_size=BATCH), ignoring_three(-100))
    assert driver.reader.reason == ""
    labels = torch.stack([y for _, y in data])
    for epoch in range(len(driver.goes_on)):
        index, _, label = driver.sink.rows(epoch)
        assert sorted(index.tolist()) == (labels != 3).nonzero().flatten().tolist()
        assert label.equal(labels[index])


@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_head_is_not_read_and_its_graph_is_left_alone(full):
    module = Net()
    module.net.compile(backend="eager", fullgraph=full)
    driver, _ = run(DataLoader(Coded(), batch_size=BATCH, drop_last=True), module)
    assert "or calls it compiled" in driver.reader.reason
    torch._dynamo.reset()


def test_a_compiled_body_does_no_harm():
    class Split(Net):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(self.net[:7], backend="eager")

        def forward(self, x):
            return self.net[7](self.body(x))

    assert_reads(*run(DataLoader(Coded(), batch_size=BATCH, drop_last=True), Split()))
    torch._dynamo.reset()


LIVELY = {
    "plain": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 1, "persistent_workers": True},
    "generator": {"generator": True},
}


class Augmented(Coded):
    """Draws from the global random state, in the workers too."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return torch.cat([x[:1], x[1:] + 0.1 * torch.randn(15)]), y


@pytest.mark.parametrize("name", LIVELY)
@pytest.mark.parametrize("step", [None, mixup(1.0)], ids=["reads", "gives up"])
def test_the_fit_is_bit_for_bit_the_same(name, step):
    def weights_after(callbacks):
        more = dict(LIVELY[name])
        if more.pop("generator", False):
            more["generator"] = torch.Generator().manual_seed(5)
        loader = DataLoader(Augmented(), batch_size=BATCH, shuffle=True, **more)
        module = Net(step, net=lambda: mlp(dropout=0.2))
        L.seed_everything(0, workers=True, verbose=False)
        make_trainer(callbacks, max_epochs=3, accumulate_grad_batches=2).fit(module, loader)
        return weights(module), torch.get_rng_state()

    driver = Driver()
    (one, state), (other, other_state) = weights_after([]), weights_after([driver])
    assert bool(driver.reader.reason) == (step is not None)
    assert_same_weights(one, other)
    assert state.equal(other_state)


class Boom(L.Callback):
    """Fails in the middle of the second epoch."""

    def __init__(self, hook):
        setattr(self, hook, self.fail)
        self.count = 0

    def fail(self, trainer, *args):
        self.count += 1
        if trainer.current_epoch == 1 and self.count > 4:
            raise ZeroDivisionError


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"])
def test_an_exception_leaves_everything_as_it_was(hook):
    loader = DataLoader(Coded(), batch_size=BATCH, shuffle=True)
    batches, driver, module = loader.batch_sampler, Driver(), Net()
    trainer = make_trainer([driver, Boom(hook)], max_epochs=3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader)
    assert loader.batch_sampler is batches
    assert not any(part._forward_hooks for part in module.modules())
    assert "_load_combined_loader_states" not in trainer.fit_loop.__dict__
    assert not driver.reader.is_reading


def test_copies_of_the_model_made_during_the_fit_have_no_part_in_it():
    class Copies(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            net = copy.deepcopy(pl_module.net)
            assert isinstance(pickle.loads(pickle.dumps(pl_module.net)), nn.Sequential)
            self.seen = F.cross_entropy(net(batch[0]), batch[1])
            self.reader = [type(hook).__name__ for hook in net[7]._forward_hooks.values()]

    copies, driver, module = Copies(), Driver(), Net()
    fit(module, DataLoader(Coded(), batch_size=BATCH, shuffle=True), [driver, copies])
    assert_reads(driver, module)
    assert copies.reader == ["function"]


class Exports(L.Callback):
    """What users do with a model in the middle of a fit."""

    def __init__(self):
        self.done = 0

    def export(self, trainer, pl_module, *_):
        x, net = torch.randn(2, 16), pl_module.net
        pl_module.eval()
        made = [
            torch.jit.script(net),
            torch.jit.trace(net, x),
            torch.export.export(net, (x,)).module(),
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(net)),
            pl_module.to_torchscript(),
        ]
        symbolic = torch.fx.symbolic_trace(net)
        with torch.no_grad():
            expected = net(x)
            for one in (*made, symbolic):
                torch.testing.assert_close(one(x), expected)
        # With gradients too: what was made is not the model.
        for one in made:
            one(x)
        pl_module.train()
        self.done += 1

    on_train_start = on_train_epoch_start = on_train_epoch_end = export

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.export(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.export(trainer, pl_module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [False, True])
def test_a_model_is_scripted_traced_exported_and_copied_while_it_is_read(first):
    exports, driver, module = Exports(), Driver(), Net()
    callbacks = [exports, driver] if first else [driver, exports]
    # Of two epochs, since torch.export takes longest of all.
    fit(module, DataLoader(Coded(), batch_size=BATCH, shuffle=True), callbacks, max_epochs=2)
    assert exports.done == 9
    assert_reads(driver, module, epochs=(0, 1))


def test_nothing_of_the_batches_is_kept_longer_than_needed():
    kept = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            iteration = live_iterator(trainer)[0]._sampler_iter
            kept.append(len(iteration._kept))
            kept.append(len(driver.reader._held) > WINDOW)

    driver = Driver()
    fit(Net(), DataLoader(Coded(80), batch_size=2, shuffle=True), [driver, Count()], max_epochs=2)
    assert max(kept) == 1
    # After it has given up, an iteration under way keeps nothing.
    kept.clear()
    driver = Driver()
    fit(Net(two_calls), DataLoader(Coded(80), batch_size=2, shuffle=True), [driver, Count()], max_epochs=1)
    assert max(kept[4:]) == 0


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_resumed_fit_is_read(every, tmp_path):
    when = {"every_n_epochs": 1} if every == "epoch" else {"every_n_train_steps": 19}
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **when)
    data = Data(lambda: DataLoader(Coded(), batch_size=BATCH, shuffle=True, num_workers=1))
    fit(Net(), data, [Driver(), saving], max_epochs=2, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    driver, module = Driver(), Net()
    fit(module, data, [driver], max_epochs=4, ckpt_path=paths[0])
    assert driver.reader.reason == ""
    assert driver.sink.forgotten == 0
    for position, epoch in enumerate((1, 2, 3)):
        noted = torch.cat([index for index, _, _ in module.noted[epoch]])
        assert driver.sink.rows(position)[0].equal(noted)


def test_a_fit_that_gave_up_is_not_read_when_it_is_resumed(tmp_path):
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last")
    data = Data(lambda: DataLoader(Coded(), batch_size=BATCH, shuffle=True))
    first = Driver()
    fit(Net(two_calls), data, [first, saving], max_epochs=1, enable_checkpointing=True)
    driver = Driver()
    fit(Net(), data, [driver], max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert driver.reader.reason == first.reader.reason
    assert driver.goes_on == [False, False]
    assert driver.sink.epochs == [[]] * 3


def test_the_head_is_resolved_by_name():
    with pytest.raises(ValueError, match="Expected layer to be the dotted path of a module of Net, but got 'head'"):
        run(DataLoader(Coded(), batch_size=BATCH), driver=Driver(head="head"))


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 65536.0])
def test_the_judgment_does_not_depend_on_scale_and_leaves_out_rows_without_gradient(classes, scale):
    torch.manual_seed(0)
    logits, label = torch.randn(500, classes), torch.randint(0, classes, (500,))
    other = (label + torch.randint(1, classes, (500,))) % classes
    target = 0.6 * F.one_hot(label, classes) + 0.4 * F.one_hot(other, classes)
    mixed, alone = (scale * (logits.softmax(1) - t) for t in (target, F.one_hot(label, classes)))
    alone[0], mixed[0], mixed[1] = 0, torch.nan, torch.inf

    judged, pulled = has_mixed_target(logits, alone, label)
    assert judged.sum() == 499
    assert not pulled.any()
    judged, pulled = has_mixed_target(logits, mixed, label)
    assert judged.sum() == 498
    assert not pulled[:2].any()
    assert 0.1 < pulled.float().mean() < 0.9


@pytest.mark.ddp
def test_each_rank_reads_its_own_rows_and_all_give_up_together(tmp_path):
    from tests.evidence.step_reader_script import run_all  # which imports this file

    done = forked.launch(run_all, tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 6, done.stderr[-4000:]
    for name in ("reads", "own sampler"):
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        for rank in ranks:
            assert rank["reason"] == ""
            assert rank["goes_on"] == [True, True]
            assert rank["read"] == rank["noted"]
        for epoch in range(2):
            assert set(ranks[0]["read"][epoch]) | set(ranks[1]["read"][epoch]) == set(range(N))
    one, other = (torch.load(tmp_path / f"one mixes-{rank}.pt") for rank in range(2))
    assert one["goes_on"] == other["goes_on"] == [False, False]
    assert "as with MixUp and CutMix" in other["reason"]
    assert one["reason"] == "another rank cannot read its training steps"
    assert one["forgotten"] == other["forgotten"] == 1
