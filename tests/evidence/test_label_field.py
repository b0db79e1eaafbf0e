"""Which field of a batch the loss follows."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    mse_loss,
    multi_margin_loss,
    one_hot,
)
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback, DataFormat
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.label_field import agreement
from tests.toys import CLASSES, FEATURES, Blobs, fit, partition_callback, weights

SIZE, AT = 96, 2
TEACHER = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(5))


class Net(L.LightningModule):
    def __init__(self, loss, *, outputs=CLASSES, optional=True, manual=False, compiled=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, outputs))
        self.loss, self.automatic_optimization = loss, not manual
        self.forward = self.of_more if optional else self.of_one
        if compiled:
            self.net[2].compile(backend="eager")

    def of_one(self, x):
        return self.net(x)

    def of_more(self, x, *more):
        return self.net(x)

    def training_step(self, batch):
        loss = self.loss(self, batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def flag(x):
    return (x[:, 0] > 0).long()


def loader_of(collate, data, batch_size=16):
    return DataLoader(
        data,
        batch_size,
        shuffle=True,
        collate_fn=lambda rows: collate(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])),
    )


def judged(collate, loss, *, batch_size=16, callbacks=(), data=None, trainer=None, partition=None, **net):
    """The partition of a fit whose batches are collated so, and the callback that has drawn it."""
    partition = partition_callback(at_epoch=AT, recipe="aum", **(partition or {}))
    data = data or Blobs(SIZE)
    module = Net(loss, **net)
    fit(module, loader_of(collate, data, batch_size), [partition, *callbacks], max_epochs=AT + 1, **(trainer or {}))
    return partition


def pair(x, y):
    return x, y


def last(x, y):
    return x, y, flag(x)


def of(at):
    return lambda module, batch: cross_entropy(module(batch[0]), batch[at])


def of_name(name):
    return lambda module, batch: cross_entropy(module(batch["x"]), batch[name])


# Where there is a choice

CHOICES = {
    "a flag last": (last, of(1), {}),
    "a flag last, one input": (last, of(1), {"optional": False}),
    "a flag first": (lambda x, y: (x, flag(x), y), of(2), {}),
    "a flag first, one input": (lambda x, y: (x, flag(x), y), of(2), {"optional": False}),
    "two usual names": (lambda x, y: {"x": x, "label": flag(x), "target": y}, of_name("target"), {}),
    "another name": (lambda x, y: {"x": x, "label": flag(x), "fine": y}, of_name("fine"), {}),
    "the usual name": (lambda x, y: {"x": x, "label": y, "coarse": y // 2}, of_name("label"), {}),
    "batches of two": (last, of(1), {"batch_size": 2}),
    "by hand": (last, of(1), {"manual": True}),
    "accumulated": (last, of(1), {"trainer": {"accumulate_grad_batches": 3}}),
    "half precision": (last, of(1), {"trainer": {"precision": "bf16-mixed"}}),
    "passes": (last, of(1), {"partition": {"evidence_from": "eval_passes"}}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_field_that_the_loss_follows_is_judged(case):
    collate, loss, kwargs = CHOICES[case]
    data = Blobs(SIZE)
    partition = judged(collate, loss, data=data, **kwargs)
    assert partition.partition.label.equal(data.y)


def test_what_was_read_before_is_dropped_and_training_is_as_it_was():
    data = Blobs(SIZE)
    partition, module, alone = AttributionPartitionCallback(at_epoch=AT), Net(of(1)), Net(of(1))
    fit(module, loader_of(last, data), [partition], max_epochs=AT + 1)
    fit(alone, loader_of(last, data), max_epochs=AT + 1)
    assert all(one.equal(other) for one, other in zip(weights(module).values(), weights(alone).values(), strict=True))
    assert partition.rounds
    assert partition.collector.reader.reason == ""
    assert partition.partition.label.equal(data.y)


def test_one_logit_and_several_labels_beside_another_field():
    data = Blobs(SIZE)
    binary = judged(
        lambda x, y: (x, (y > 1).float().unsqueeze(1), flag(x)),
        lambda module, batch: binary_cross_entropy_with_logits(module(batch[0]), batch[1]),
        data=data,
        outputs=1,
    )
    assert binary.partition.label.equal((data.y > 1).long())
    partition = AttributionPartitionCallback(at_epoch=AT)
    loss = lambda module, batch: binary_cross_entropy_with_logits(module(batch[0]), batch[1])  # noqa: E731
    collate = lambda x, y: (x, torch.stack([y % 2, y // 2, y > 1], dim=1).float(), flag(x))  # noqa: E731
    fit(Net(loss, outputs=3), loader_of(collate, data), [partition], max_epochs=AT + 1)
    assert partition.partition.label.equal(torch.stack([data.y % 2, data.y // 2, (data.y > 1).long()], dim=1))


def test_it_is_known_on_a_resume(tmp_path):
    data = Blobs(SIZE)
    loader, path = loader_of(last, data), tmp_path / "first.ckpt"
    first = AttributionPartitionCallback(at_epoch=2)
    fit(Net(of(1)), loader, [first], max_epochs=1 + 2).save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"][first.state_key]["label_at"] == [1]
    again = AttributionPartitionCallback(at_epoch=2, every_n_epochs=1)
    fit(Net(of(1)), loader, [again], max_epochs=4, ckpt_path=path)
    assert again.task_format.layout.label == (1,)


def test_a_choice_that_no_gradient_can_make_is_refused_before_the_first_step():
    module = Net(of(1), compiled=True)
    before = {name: value.clone() for name, value in weights(module).items()}
    match = (
        r"which field of a batch holds the labels, batch\[2\] or batch\[1\]: no gradient at the output of 'net.2'"
        r" .* pass data=DataFormat\(batch_to_xy=lambda batch: \(batch\[0\], batch\[1\]\)\) to"
    )
    with pytest.raises(TypeError, match=match):
        fit(module, loader_of(last, Blobs(SIZE)), [AttributionPartitionCallback(at_epoch=AT)])
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_a_choice_without_a_head_is_refused_before_the_first_step():
    module = Net(of(1))
    module.forward = lambda x, *more: module.net(x) / 2
    with pytest.raises(TypeError, match=r"holds the labels, batch\[2\] or batch\[1\]: no module of the model"):
        fit(module, loader_of(last, Blobs(SIZE)), [AttributionPartitionCallback(at_epoch=AT, layer="net.0")])


def test_fields_that_forward_needs_are_no_choice_and_need_no_gradient():
    data = Blobs(SIZE)

    def forward(x, group):
        return module.net(x + group.unsqueeze(1))

    module = Net(lambda net, batch: cross_entropy(net(batch[0], batch[1]), batch[2]), compiled=True)
    module.forward = forward
    partition = AttributionPartitionCallback(at_epoch=AT)
    fit(module, loader_of(lambda x, y: (x, flag(x), y), data), [partition], max_epochs=AT + 1)
    assert partition.partition.label.equal(data.y)


# Losses that follow no field


def test_labels_under_other_numbers_are_refused_before_the_first_step():
    module = Net(lambda net, batch: cross_entropy(net(batch[0]), (batch[1] + 1) % CLASSES))
    before = {name: value.clone() for name, value in weights(module).items()}
    match = (
        r"follow the labels, batch\[1\], but it raises the logit of that class in 0% of 16 rows, for example"
        r" because training_step renumbers the classes; pass data=DataFormat"
        r"\(batch_to_xy=lambda batch: \(batch\[0\], \.\.\.\)\) to"
    )
    with pytest.raises(TypeError, match=match):
        fit(module, loader_of(pair, Blobs(SIZE)), [AttributionPartitionCallback(at_epoch=AT)])
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_a_loss_of_something_else_is_refused():
    loss = lambda net, batch: cross_entropy(net(batch[0]), (batch[0][:, 1] * 5).long() % CLASSES)  # noqa: E731
    with pytest.raises(
        TypeError,
        match=r"follow the labels, batch\[1\], but it .* rows, which is chance level; pass .*batch_to_xy",
    ):
        fit(Net(loss), loader_of(pair, Blobs(400)), [AttributionPartitionCallback(at_epoch=AT)])


def test_labels_of_batch_to_xy_that_the_loss_does_not_follow_are_refused():
    ours = AttributionPartitionCallback(at_epoch=AT, data=DataFormat(batch_to_xy=lambda batch: (batch[0], batch[2])))
    match = r"the labels, what batch_to_xy returns, but .* and follows batch\[1\]; pass .*batch_to_xy=lambda batch: "
    with pytest.raises(TypeError, match=match):
        fit(Net(of(1)), loader_of(last, Blobs(SIZE)), [ours])


# Losses that are left alone


def mixed(module, batch):
    x, y = batch[:2]
    share = float(torch.distributions.Beta(0.2, 0.2).sample())
    order = torch.randperm(len(x))
    logits = module(share * x + (1 - share) * x[order])
    return share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])


def focal(module, batch):
    each = cross_entropy(module(batch[0]), batch[1], reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def distilled(module, batch):
    logits = module(batch[0])
    target = (batch[0] @ TEACHER).softmax(dim=1)
    return cross_entropy(logits, batch[1]) + kl_div(logits.log_softmax(dim=1), target, reduction="batchmean")


LEFT_ALONE = {
    "mixed": mixed,
    "smoothed": lambda m, b: cross_entropy(m(b[0]), b[1], label_smoothing=0.3),
    "weighted": lambda m, b: cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 5.0, 0.1, 1.0])),
    "focal": focal,
    "distilled": distilled,
    "squared": lambda m, b: mse_loss(m(b[0]), one_hot(b[1], CLASSES).float()),
    "hinge": lambda m, b: multi_margin_loss(m(b[0]), b[1]),
    "each class by itself": lambda m, b: binary_cross_entropy_with_logits(m(b[0]), one_hot(b[1], CLASSES).float()),
}


@pytest.mark.parametrize("loss", LEFT_ALONE)
@pytest.mark.parametrize("collate", [pair, last])
def test_losses_of_the_label_are_left_alone(collate, loss):
    data = Blobs(SIZE)
    assert judged(collate, LEFT_ALONE[loss], data=data).partition.label.equal(data.y)


def test_labels_to_ignore_say_nothing():
    data = Blobs(SIZE)
    data.y[::2] = -100
    found = judged(pair, of(1), data=data).partition
    assert found.label[1::2].equal(data.y[1::2])


# Agreement


@pytest.mark.parametrize(
    ("value", "gradient", "expected"),
    [
        (torch.tensor([1, 0]), torch.tensor([[0.5, -0.5], [0.5, -0.5]]), [True, False]),
        (torch.tensor([[1], [0]]), torch.tensor([[0.5, -0.5], [0.5, -0.5]]), [True, False]),
        (torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.tensor([[0.5, -0.5], [0.5, -0.5]]), [True, False]),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[-0.5, -0.5], [0.5, -0.5]]), [True, False]),
        (torch.tensor([1.0, 0.0]), torch.tensor([[-0.5], [-0.5]]), [True, False]),
    ],
    ids=["index", "column", "soft", "several", "one logit"],
)
def test_a_row_agrees_where_the_loss_raises_the_class_of_the_field(value, gradient, expected):
    task_format = TaskFormat()
    assert agreement(value, gradient, task_format).tolist() == expected
