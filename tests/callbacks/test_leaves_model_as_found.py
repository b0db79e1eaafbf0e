import functools
import random
from collections import deque

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback
from lightning_unlearn.trainer import model_state as model_state_module
from tests.toys import (
    Blobs,
    Toy,
    adamw,
    assert_same_weights,
    convnet,
    fit,
    mlp,
    partition_callback,
    sgd,
    weights,
)
from tests.toys import (
    QuickData as BlobsData,
)
from tests.toys import (
    quick_trio as trio,
)


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {(name, kind): len(getattr(part, kind)) for name, part in module.named_modules() for kind in kinds}


def rng():
    return {
        "torch": torch.random.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002 (the global one is meant)
        "python": torch.tensor(random.getstate()[1]),
    }


def found(module):
    """All that a pass could disturb, beside the weights."""
    return {
        "hooks": hooks_of(module),
        "training": {name: part.training for name, part in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "rng": rng(),
    }


def assert_as_found(before, after):
    for part in ("hooks", "training", "requires_grad"):
        assert before[part] == after[part], part
    for part in ("grads", "rng"):
        for name, value in before[part].items():
            if value is None:
                assert after[part][name] is None, name
            else:
                assert value.equal(after[part][name]), name


class Compared(AttributionPartitionCallback):
    """Looks at the module before and after every turn, whatever happens in it."""

    turns = 0

    def act_if_due(self, trainer, pl_module):
        before, stage = found(pl_module), trainer.state.stage
        try:
            super().act_if_due(trainer, pl_module)
        finally:
            self.turns += 1
            assert_as_found(before, found(pl_module))
            assert trainer.state.stage == stage


SETTINGS = {
    "auto": {},
    "label": {"recipe": "label"},
    "rlap": {"recipe": "rlap"},
    "auto by passes": {"evidence_from": "eval_passes"},
}
FITS = {
    "dropout and norm": (lambda: mlp(0.3), {}, {}, {}),
    "torch augmentation": (lambda: mlp(0.3), {"augment": "torch"}, {}, {}),
    "numpy augmentation": (lambda: mlp(0.3), {"augment": "numpy"}, {}, {}),
    "workers": (lambda: mlp(0.3), {"augment": "torch"}, {"num_workers": 2, "persistent_workers": True}, {}),
    "bf16-mixed": (lambda: convnet(0.3), {"image": True}, {}, {"precision": "bf16-mixed"}),
    "accumulation": (lambda: mlp(0.3), {}, {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
}
# The default, which asks more of a fit than "label" does, and passes are looked at with all of them.
CASES = [(settings, name) for settings in ("auto", "auto by passes") for name in FITS]
CASES += [("label", "dropout and norm"), ("label", "workers")]
CASES += [("rlap", "torch augmentation"), ("rlap", "bf16-mixed"), ("rlap", "accumulation")]


def weights_after(name, callbacks):
    net, data, loader, trainer = FITS[name]
    module = Toy(net)
    fit(module, BlobsData(Blobs(101, **data), **loader), callbacks, max_epochs=3, **trainer)
    assert not any(hooks_of(module).values())
    return weights(module)


@pytest.fixture(scope="module")
def without():
    """The weights of a fit without any callback, by its name."""
    return functools.cache(lambda name: weights_after(name, []))


@pytest.mark.parametrize(("settings", "name"), CASES)
def test_weights_are_bit_for_bit_those_of_a_fit_without_it(settings, name, without):
    callback = partition_callback(kind=Compared, at_epoch=2, **SETTINGS[settings])
    assert_same_weights(weights_after(name, [callback]), without(name))
    assert callback.turns == 4
    assert len(callback.partition) == 101


def test_modes_and_flags_of_the_user_survive():
    module = Toy(lambda: mlp(0.3))
    module.net[1].eval()
    module.net[0].requires_grad_(False)
    callback = Compared(at_epoch=2)
    fit(module, BlobsData(Blobs(101)), [callback], max_epochs=3)
    assert callback.turns == 4
    assert not module.net[1].training
    assert module.net[3].training
    assert not module.net[0].weight.requires_grad


class Remembers(Toy):
    """Whose forward, and hooks on it, change whatever a forward can reach, in eval mode too."""

    def __init__(self):
        super().__init__(lambda: mlp(0.3))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(3))
        self.register_buffer("broken", torch.full((2,), torch.nan))
        self.calls, self.history, self.by_size, self.sizes = 0, [], {}, set()
        self.plain = torch.zeros(2)
        self.queue = deque(maxlen=2)
        self.accuracy = torchmetrics.MeanMetric()
        self.unregistered = {"mean": torchmetrics.MeanMetric()}
        self.generator = torch.Generator().manual_seed(0)
        self.numpy = np.random.default_rng(0)
        recorded, sizes = {}, []

        def record(module, inputs, output):
            recorded["last"] = output.detach()
            recorded[len(recorded)] = len(output)

        # Nothing but the hooks has these.
        self.net[0].register_forward_hook(record)
        self.net[2].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs)))
        self.recorded = lambda: (list(map(repr, recorded.values())), list(sizes))
        self.net[6].register_forward_hook(self.note)

    def note(self, module, inputs, output):
        module.last = output.detach()

    def forward(self, x):
        self.total += 1
        self.assigned = self.assigned + 1
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.zeros(1), persistent=False)
            self.made = nn.Identity()
        self.lazy += 1
        self.calls += 1
        self.history.append(x.mean().item())
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        self.sizes.add(self.calls)
        self.queue.append(self.calls)
        self.plain[0] += 1
        for metric in (self.accuracy, self.unregistered["mean"]):
            metric.update(x.mean())
        noise = torch.randn(x.shape, generator=self.generator) + self.numpy.normal()
        self.log("mean", x.mean(), on_step=True)
        self.log_dict({"total": self.total}, on_step=False, on_epoch=True)
        for logger in self.loggers:
            logger.log_metrics({"said": self.calls}, step=self.calls)
        return super().forward(x + 0.1 * noise)

    def remembered(self):
        plain = ("calls", "history", "by_size", "sizes", "queue")
        tensors = {name: buffer.clone() for name, buffer in self.named_buffers()} | {"plain": self.plain.clone()}
        metrics = [metric.compute().item() for metric in (self.accuracy, self.unregistered["mean"])]
        states = (self.generator.get_state().tolist(), self.numpy.bit_generator.state)
        return tensors, [repr(getattr(self, name)) for name in plain], metrics, states, self.recorded()


class Notes(Logger):
    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.logged += [(name, float(value)) for name, value in metrics.items() if "unlearn" not in name]


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_what_forward_and_hooks_of_the_user_remember_is_not_of_our_passes(evidence):
    ends = []
    # A dry run, in which all three look and nothing is changed.
    ours = [
        partition_callback(kind=Compared, at_epoch=1, evidence_from=evidence, dry_run=True),
        *trio(1, prune={"amount": 0.2})[1:],
    ]
    for callbacks in ([], ours):
        seed_everything(0)
        module, notes = Remembers(), Notes()
        fit(module, BlobsData(Blobs(101)), callbacks, max_epochs=3, logger=notes, log_every_n_steps=1)
        ends.append((module.remembered(), weights(module), notes.logged))
    assert ours[0].turns > 0
    (plain, trained, logged), (with_ours, the_same, logged_too) = ends
    for name, tensor in plain[0].items():
        assert tensor.nan_to_num().equal(with_ours[0][name].nan_to_num()), name
    assert plain[1:] == with_ours[1:]
    assert len(logged) > 0
    assert logged == logged_too
    assert_same_weights(trained, the_same)


class MergesInEval(nn.Linear):
    """LoRA that is merged into the weight in eval mode, as by loralib."""

    def __init__(self, features, outputs):
        super().__init__(features, outputs)
        self.down = nn.Parameter(0.3 * torch.randn(2, features))
        self.up = nn.Parameter(0.3 * torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Bounded(nn.Linear):
    """Keeps its weight within bounds when it is called, as networks for EEG do."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


class Looked(nn.Module):
    """An embedding that shortens the rows that are looked up."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 20, max_norm=0.5)

    def forward(self, x):
        return self.embedding((x.abs() * 2).long().clamp(max=7)).mean(dim=1)


FIRST = {
    "lora": lambda: MergesInEval(16, 20),
    "bounded": lambda: Bounded(16, 20),
    "max_norm": Looked,
    "spectral norm": lambda: spectral_norm(nn.Linear(16, 20)),
}


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
# Of a large model only the weights are kept that are known to be written to.
@pytest.mark.parametrize(("first", "most"), [*((first, 2**27) for first in FIRST), ("lora", 0), ("max_norm", 0)])
def test_weights_that_a_pass_would_change_are_put_back(monkeypatch, first, most, evidence):
    monkeypatch.setattr(model_state_module, "_MOST_WEIGHTS", most)
    final = []
    for with_ours in (False, True):
        seed_everything(0)
        module = Toy(lambda: nn.Sequential(FIRST[first](), nn.ReLU(), nn.Linear(20, 4)))
        ours = [
            partition_callback(kind=Compared, at_epoch=1, evidence_from=evidence, dry_run=True),
            *trio(1, prune={"amount": 0.2})[1:],
        ]
        # Lightning's own validation does not undo what a switch to eval mode does.
        fit(module, BlobsData(Blobs(101)), ours if with_ours else [], max_epochs=3, limit_val_batches=0)
        final.append(weights(module) | {name: buffer.clone() for name, buffer in module.named_buffers()})
    assert ours[0].turns > 0
    assert_same_weights(*final)


class MakesItsData(Toy):
    """Its data sets are made when a loader is asked for, and stay."""

    def train_dataloader(self):
        self.train_set = Blobs(101)
        return DataLoader(self.train_set, batch_size=16)

    def val_dataloader(self):
        self.val_set = Blobs(32, 0, seed=7)
        return DataLoader(self.val_set, batch_size=16)

    def attribution_dataloader(self):
        self.scored = Blobs(101)
        return DataLoader(self.scored, batch_size=16)


def test_what_the_user_makes_with_a_loader_stays():
    module = MakesItsData()
    fit(module, None, trio(1), max_epochs=2, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    assert len(module.val_set) == 32
    assert len(module.scored) == 101


class Breaks(Blobs):
    """Raises in the pass over it that comes after the first epoch."""

    allowed = float("inf")

    def __getitem__(self, index):
        if len(self.read) > self.allowed:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Allows(Compared):
    """Lets the first epoch read, and a part of the pass, whatever was read before."""

    def act_if_due(self, trainer, pl_module):
        super().act_if_due(trainer, pl_module)
        data = trainer.train_dataloader.dataset
        if self.turns == 2:
            data.allowed = len(data.read) + 101 + 40


class BreaksInEval(Toy):
    """Raises in the middle of a pass."""

    def forward(self, x):
        if not self.training and self.steps and x.sum() != 0:
            random.random()
            torch.rand(1)
            raise ArithmeticError("not in eval mode")
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "data", "error"),
    [(Toy, Breaks, "the disk is gone"), (BreaksInEval, Blobs, "not in eval mode")],
    ids=["dataset", "forward"],
)
def test_a_pass_that_fails_leaves_all_as_it_was(module, data, error):
    callback, model = partition_callback(kind=Allows, at_epoch=2, evidence_from="eval_passes"), module(lambda: mlp(0.3))
    with pytest.raises((OSError, ArithmeticError), match=error):
        fit(model, BlobsData(data(101)), [callback], max_epochs=3, limit_val_batches=0)
    assert callback.turns == 3  # the third is the one that failed: the comparison in it has been made
    assert model.steps == 4


class SaysNothing:
    """A batch sampler that states no batch size, so that it has to be asked, and that draws from the global state."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(torch.randperm(self.count).split(16))

    def __len__(self):
        return (self.count + 15) // 16


def test_asking_a_batch_sampler_for_its_batch_size_draws_nothing_from_the_users_random_state():
    final = []
    for callbacks in ([], [AttributionPartitionCallback(at_epoch=2)]):
        module, data = Toy(lambda: mlp(0.3)), Blobs(101)
        fit(module, DataLoader(data, batch_sampler=SaysNothing(101)), callbacks, max_epochs=3)
        final.append(weights(module))
    assert_same_weights(*final)


class Halts(Exception):
    pass


@pytest.mark.parametrize("how", ["ends", "fails"])
@pytest.mark.parametrize("mode", ["full", "layers"])
def test_all_three_give_back_what_they_borrowed(how, mode):
    class Stops(Toy):
        def training_step(self, batch):
            if how == "fails" and self.current_epoch == 3:
                raise Halts
            return super().training_step(batch)

    # How many samples are clean is up to the dropout, so to torch's version; a batch norm cannot train on one sample.
    data = BlobsData(Blobs(101), drop_last=True)
    module = Stops(lambda: mlp(0.3))
    module.net[0].bias.requires_grad_(False)
    before = found(module)
    callbacks = trio(2, finetune={"mode": mode, "lr": 0.01})
    if how == "fails":
        with pytest.raises(Halts):
            fit(module, data, callbacks, max_epochs=4)
    else:
        fit(module, data, callbacks, max_epochs=4)
    after = found(module)
    for part in ("hooks", "requires_grad", "training"):
        assert before[part] == after[part], part
    assert callbacks[2].is_active


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_no_hook_is_left_on_the_optimizer(optimizer):
    module = Toy(optimizer=optimizer)
    trainer = fit(module, BlobsData(Blobs(101)), trio(2))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizers[0].step()
    assert all((p != 0).all() for p in module.parameters())


def test_the_pass_sees_no_sample_twice_and_none_of_the_loaders_state():
    data = Blobs(101)
    loader_reads = []

    callback = partition_callback(at_epoch=2, evidence_from="eval_passes")
    pass_over = callback.collector.pass_over

    def counting(context):
        start = len(data.read)
        found = pass_over(context)
        loader_reads.append(data.read[start:])
        return found

    callback.collector.pass_over = counting
    fit(Toy(), BlobsData(data), [callback], max_epochs=3)
    assert loader_reads == [list(range(101))] * 2


def test_a_layer_that_works_in_place_is_attributed_like_one_that_does_not():
    evidence = []
    for inplace in (False, True):

        def net(inplace=inplace):
            return nn.Sequential(nn.Linear(16, 12), nn.ReLU(inplace=inplace), nn.Linear(12, 4))

        callback = AttributionPartitionCallback("net.0", at_epoch=1)
        fit(Toy(net), BlobsData(Blobs(101)), [callback], max_epochs=2)
        evidence.append(callback.partition.label_evidence)
    assert evidence[0].equal(evidence[1])
