"""What a mask claims is so in the module as it runs: computed weights, adapters, other pruners, averages."""

import copy
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import (
    parameters_to_vector,
    parametrizations,
    parametrize,
    spectral_norm,
    vector_to_parameters,
    weight_norm,
)
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.pruning import holding as holding_module
from tests.callbacks.published import Published, make_partition
from tests.toys import Blobs, Toy, adamw, fit, make_trainer, weights
from tests.toys import QuickData as BlobsData

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def plain():
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))


def callbacks(layer=None, **arguments):
    data = Blobs(101)
    probability = torch.rand(101, generator=torch.Generator().manual_seed(1))
    published = Published(make_partition(probability, data.y))
    return (
        published,
        SensitivityPruneCallback(layer, criterion="random", amount=0.4, max_val_drop=None, **arguments),
        data,
    )


def run(make=plain, layer=None, more=(), module=Toy, **kwargs):
    """The module and the callback after a fit with the pruning after the first of three epochs."""
    published, prune, data = callbacks(layer)
    toy = module(make, adamw)
    fit(toy, BlobsData(data), [published, prune, *more], **{"max_epochs": 3, **kwargs})
    return toy, prune


def speaks(module, prune, x=None):
    """Which neurons that a mask calls pruned are heard by what comes after, or at all where a layer is named."""
    torch.manual_seed(5)
    x = torch.randn(64, 16) if x is None else x
    mask, seen = prune.mask, []
    gone = mask.pruned_indices()
    assert len(gone) >= 3
    by_name = prune.layer is not None
    part = module.get_submodule(mask.layer if by_name else "net.4")

    def forward(value):
        with torch.no_grad():
            out = module.eval()(x)
        return (value, out)[1]

    if by_name:
        handle = part.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
        forward(None)
        handle.remove()
        return int((seen[0][:, gone] != 0).sum())
    before = forward(None)

    def change(_, inputs):
        changed = inputs[0].clone()
        changed[:, gone] += 7
        return (changed, *inputs[1:])

    handle = part.register_forward_pre_hook(change)
    after = forward(None)
    handle.remove()
    return int((before != after).sum())


class LoraLinear(nn.Linear):
    """A Linear with a low-rank matrix beside it, zero at first."""

    def __init__(self, into, out):
        super().__init__(into, out)
        self.a, self.b = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.zeros(out, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Scaled(nn.Linear):
    """A Linear with a scale of its own."""

    def __init__(self, into, out):
        super().__init__(into, out)
        self.scale = nn.Parameter(torch.ones(out))

    def forward(self, x):
        return super().forward(x) * self.scale


class Rounded(nn.Linear):
    """As quantized while it is trained."""

    def forward(self, x):
        step = self.weight.abs().max() / 127
        rounded = (self.weight / step).round() * step
        return linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class LowRank(nn.Module):
    """A parametrization with weights of its own, zero at first."""

    def __init__(self, out, into):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.zeros(out, 2))

    def forward(self, weight):
        return weight + self.b @ self.a


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.exp()


def parametrized(layer, module):
    parametrize.register_parametrization(layer, "weight", module)
    return layer


def with_layers(two=nn.Linear, head=nn.Linear):
    net = plain()
    net[2], net[4] = two(20, 12), head(12, 4)
    return net


COMPUTED = {
    "weight norm": lambda into, out: parametrizations.weight_norm(nn.Linear(into, out)),
    "older weight norm": lambda into, out: weight_norm(nn.Linear(into, out)),
    "spectral norm": lambda into, out: parametrizations.spectral_norm(nn.Linear(into, out)),
    "older spectral norm": lambda into, out: spectral_norm(nn.Linear(into, out)),
    "torch's pruning": lambda into, out: torch_prune.random_unstructured(nn.Linear(into, out), "weight", amount=0.5),
    "a parametrization": lambda into, out: parametrized(nn.Linear(into, out), nn.Tanh()),
    "a scale": Scaled,
    "rounding": Rounded,
}
HEARD = {
    "an adapter": LoraLinear,
    "an adapter in a parametrization": lambda into, out: parametrized(nn.Linear(into, out), LowRank(out, into)),
    "a parametrization that is not 0 at 0": lambda into, out: parametrized(nn.Linear(into, out), Symmetric()),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("layer", ["net.2", None])
@pytest.mark.parametrize("place", ["two", "head"])
def test_neurons_of_computed_weights_are_silent_after_further_training(kind, layer, place):
    module, prune = run(partial(with_layers, **{place: COMPUTED[kind]}), layer)
    assert prune.mask.layer == "net.2"
    assert speaks(module, prune) == 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("kind", HEARD)
@pytest.mark.parametrize(("layer", "name", "places"), [("net.2", "net.2", ["two"]), (None, "net.4", ["two", "head"])])
def test_what_would_still_be_heard_is_refused_before_the_first_step(kind, layer, name, places):
    published, prune, data = callbacks(layer)
    module = Toy(partial(with_layers, **dict.fromkeys(places, HEARD[kind])))
    before = weights(module)
    with pytest.raises(
        ValueError, match=rf"cannot prune layer '{name}'. .* would not zero their outputs, since forward computes"
    ):
        fit(module, BlobsData(data), [published, prune], max_epochs=3)
    assert module.steps == 0
    assert all(value.equal(before[key]) for key, value in weights(module).items())
    with pytest.raises(RuntimeError, match="No mask"):
        _ = prune.masks


def tied_lengths():
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    for at in (0, 2):
        parametrizations.weight_norm(net[at])
    net[2].parametrizations.weight.original0 = net[0].parametrizations.weight.original0
    return net


def test_computed_weights_that_are_tied_are_refused():
    published, prune, data = callbacks("net.0")
    module = Toy(tied_lengths)
    with pytest.raises(ValueError, match=r"cannot prune layer 'net\.0'. Its parameters are shared with 'net\.2'"):
        fit(module, BlobsData(data), [published, prune], max_epochs=2)
    assert module.steps == 0


@pytest.mark.parametrize("kind", HEARD)
def test_by_default_a_feeding_layer_that_would_be_heard_is_left_alone(kind):
    module, prune = run(partial(with_layers, two=HEARD[kind]))
    assert prune.mask.layer == "net.4"
    assert speaks(module, prune) == 0


def test_a_layer_that_gets_an_adapter_in_training_is_not_pruned_and_that_is_said():
    class Adapts(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                adapter = nn.Linear(20, 12)
                pl_module.net[2].register_forward_hook(lambda _, inputs, out: out + adapter(inputs[0]))

    with pytest.warns(UserWarning, match=r"No neurons pruned in 'net\.2'\. Zeroing .* would not zero their outputs"):
        module, prune = run(layer="net.2", more=[Adapts()])
    assert prune.mask.keep.all()
    assert prune.summary_clause() == ""
    assert (module.net[2].weight != 0).any(dim=1).all()


# Others who write to the weights


class Writes(L.Callback):
    """Puts the weights of the start back, at one hook."""

    def __init__(self, hook, epoch=1):
        self.before, self.epoch = None, epoch
        setattr(self, hook, self.write)

    def on_fit_start(self, trainer, pl_module):
        self.before = weights(pl_module)

    def write(self, trainer, pl_module, *_):
        if trainer.current_epoch >= self.epoch:
            pl_module.load_state_dict(self.before)


WRITES = ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_end"]


class Sees(Toy):
    """Notes whether neurons that are pruned are zero in every training step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alive = []

    def training_step(self, batch):
        prune = next(one for one in self.trainer.callbacks if isinstance(one, SensitivityPruneCallback))
        if prune.has_result:
            gone = prune.mask.pruned_indices()
            self.alive.append(int((self.net[2].weight[gone] != 0).sum() + (self.net[4].weight[:, gone] != 0).sum()))
        return super().training_step(batch)


@pytest.mark.parametrize("hook", [*WRITES, "on_fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_put_back_are_zeroed_again_and_that_is_said_once(hook, first):
    published, prune, data = callbacks()
    module, others = Sees(plain, adamw), [published, prune]
    others.insert(0 if first else 2, Writes(hook))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, BlobsData(data), others, max_epochs=3)
    said = [str(w.message) for w in caught if "became nonzero" in str(w.message)]
    # What is undone before anybody looked is not spoken of.
    assert len(said) == (0 if hook == "on_train_batch_start" or (hook == "on_train_epoch_start" and not first) else 1)
    if hook != "on_train_batch_start" or first:
        assert set(module.alive) == {0}
    assert speaks(module, prune) == 0


def test_the_modules_own_hooks_may_put_weights_back():
    class Restores(Toy):
        def on_fit_start(self):
            self.best = copy.deepcopy(self.state_dict())

        def on_train_end(self):
            self.load_state_dict(self.best)

    with pytest.warns(UserWarning, match=r"Pruned neurons of 'net\.2' became nonzero"):
        module, prune = run(module=Restores)
    assert speaks(module, prune) == 0


def test_a_parameter_that_takes_another_ones_place_is_pruned_too():
    class Replaces(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[2].weight = nn.Parameter(torch.randn(12, 20))

    with pytest.warns(UserWarning, match="became nonzero"):
        module, prune = run(more=[Replaces()])
    assert speaks(module, prune) == 0


@pytest.mark.parametrize("lottery", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Neurons of")
def test_lightnings_pruning_beside_ours(lottery, first, tmp_path):
    published, prune, data = callbacks()
    theirs = ModelPruning("random_unstructured", amount=0.2, use_lottery_ticket_hypothesis=lottery)
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Toy(plain, adamw)
    ours = [published, prune]
    both = [theirs, *ours] if first else [*ours, theirs]
    fit(module, BlobsData(data), [*both, saved], max_epochs=4, enable_checkpointing=True)
    assert speaks(module, prune) == 0
    for epoch in (1, 2, 3):
        again = Toy(plain)
        again.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        assert speaks(again, prune) == 0


def test_a_checkpoint_never_holds_what_was_put_back(tmp_path):
    published, prune, data = callbacks()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="became nonzero"):
        fit(
            Toy(plain, adamw),
            BlobsData(data),
            [published, prune, Writes("on_train_epoch_end"), saved],
            max_epochs=3,
            enable_checkpointing=True,
        )
    for epoch in (1, 2):
        again = Toy(plain)
        again.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        assert speaks(again, prune) == 0


def test_a_test_of_a_checkpoint_from_before_the_pruning_is_warned_of(tmp_path):
    published, prune, data = callbacks()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    class Tested(Toy):
        def test_step(self, batch):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    module = Tested(plain)
    trainer = fit(module, BlobsData(data), [published, prune, saved], max_epochs=3, enable_checkpointing=True)
    loader = BlobsData(data).val_dataloader()
    match = "The weights in use are not those that SensitivityPruneCallback pruned"
    with pytest.warns(UserWarning, match=match):
        trainer.test(module, loader, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", match)
        trainer.test(module, loader, ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)


@pytest.mark.parametrize(
    "other",
    [
        partial(nn.Sequential, nn.Flatten(), nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4)),
    ],
    ids=["other layers", "smaller ones"],
)
@pytest.mark.parametrize("layer", ["net.2", None])
def test_another_model_may_be_validated_afterwards(other, layer):
    published, prune, data = callbacks(layer)
    trainer = fit(Toy(plain), BlobsData(data), [published, prune], max_epochs=2)
    with pytest.warns(UserWarning, match="The weights in use are not those that SensitivityPruneCallback pruned"):
        trainer.validate(Toy(other), BlobsData(data).val_dataloader(), verbose=False)


def test_a_pruned_layer_that_is_replaced_by_a_smaller_one_is_spoken_of():
    class Replaces(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                pl_module.net[2], pl_module.net[4] = nn.Linear(20, 3), nn.Linear(3, 4)

    with pytest.raises(ValueError, match=r"Expected layer 'net\.2', .* to keep its 12 neurons .*, but it now has 3"):
        run(more=[Replaces()], layer="net.2")


# Averages that others keep


class KeepsModule(L.Callback):
    """A user's own average: a copy of the module, put in the module's place when training ends."""

    def on_fit_start(self, trainer, pl_module):
        self.ema = copy.deepcopy(pl_module.net)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        for mine, theirs in zip(self.ema.parameters(), pl_module.net.parameters(), strict=True):
            mine.lerp_(theirs, 0.01)

    def on_train_end(self, trainer, pl_module):
        pl_module.net.load_state_dict(self.ema.state_dict())


class EMAOfNames(KeepsModule):
    """A dict of tensors by name."""

    def on_fit_start(self, trainer, pl_module):
        self.kept = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, value in pl_module.named_parameters():
            self.kept[name].lerp_(value, 0.01)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.kept, strict=False)


class ExponentialMovingAverage:
    """As of the package torch_ema: a list in the order of the parameters."""

    def __init__(self, parameters):
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]

    def update(self, parameters):
        for mine, theirs in zip(self.shadow_params, parameters, strict=True):
            mine.lerp_(theirs.detach(), 0.01)


class KeepsList(KeepsModule):
    def on_fit_start(self, trainer, pl_module):
        self.helper = ExponentialMovingAverage(pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.helper.update(pl_module.parameters())

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        for mine, theirs in zip(self.helper.shadow_params, pl_module.parameters(), strict=True):
            theirs.copy_(mine)


class KeepsVector(KeepsModule):
    def on_fit_start(self, trainer, pl_module):
        self.average = parameters_to_vector(pl_module.parameters()).detach().clone()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.lerp_(parameters_to_vector(pl_module.parameters()).detach(), 0.01)

    def on_train_end(self, trainer, pl_module):
        vector_to_parameters(self.average, pl_module.parameters())


class KeepsAveragedModel(KeepsModule):
    def on_fit_start(self, trainer, pl_module):
        self.other = {"of": AveragedModel(pl_module, multi_avg_fn=get_ema_multi_avg_fn(0.99))}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.other["of"].update_parameters(pl_module)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.other["of"].module.state_dict())


class Inside(Toy):
    """An average that the module itself keeps, beside a teacher that is to stay as it is."""

    def __init__(self, *args):
        super().__init__(*args)
        self.model_ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_):
        self.model_ema.update_parameters(self.net)

    def on_train_end(self):
        self.net.load_state_dict(self.model_ema.module.state_dict())


@pytest.mark.parametrize("keeps", [KeepsModule, EMAOfNames, KeepsList, KeepsVector, KeepsAveragedModel, None])
@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_the_users_does_not_bring_neurons_back(keeps, first):
    published, prune, data = callbacks()
    module = Toy(plain, adamw) if keeps else Inside(plain, adamw)
    more = [] if keeps is None else [keeps()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Pruned neurons of")
        fit(module, BlobsData(data), [*more, published, prune] if first else [published, prune, *more], max_epochs=3)
    assert speaks(module, prune) == 0
    if keeps is None:
        assert (module.teacher[2].weight != 0).all()


def test_an_average_that_forward_runs_in_eval_mode_is_not_pruned():
    class RunsIt(Inside):
        def forward(self, x):
            return self.net(x) if self.training else self.model_ema(x)

    published, prune, data = callbacks()
    module = RunsIt(plain)
    with pytest.raises(ValueError, match=r"cannot prune layer 'model_ema\.module\.2'. It is an average"):
        fit(module, BlobsData(data), [published, prune], max_epochs=2)
    assert module.steps == 0


class SlowFast(nn.Module):
    """Is not an average, for all its name."""

    def __init__(self):
        super().__init__()
        self.slow, self.fast, self.head = nn.Linear(16, 12), nn.Linear(16, 20), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.cat([self.slow(x), self.fast(x)], dim=1).relu())


def test_a_part_that_is_only_called_like_an_average_is_pruned():
    module, prune = run(SlowFast, "net.slow")
    assert speaks(module, prune) == 0


def test_weights_of_the_users_are_left_alone_once_the_fit_has_ended(tmp_path):
    published, prune, data = callbacks()
    module = Toy(plain)
    before = weights(module)
    trainer = fit(module, BlobsData(data), [published, prune], max_epochs=2)
    module.load_state_dict(before)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert all(value.equal(before[name]) for name, value in weights(module).items())


class Lookahead(torch.optim.Optimizer):
    """A wrapper as it is often written: without the constructor of its base class, and with slow weights of its own."""

    def __init__(self, inner):
        self.inner, self.steps = inner, 0
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
                fast.copy_(slow.lerp_(fast, 0.5))
        return loss

    def state_dict(self):
        return self.inner.state_dict()


@pytest.mark.filterwarnings("ignore:Neurons of")
def test_slow_weights_of_an_optimizer_do_not_bring_neurons_back():
    published, prune, data = callbacks()
    module = Sees(plain, lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.1)))
    fit(module, BlobsData(data), [published, prune], max_epochs=3)
    assert set(module.alive) == {0}
    assert speaks(module, prune) == 0


# After an exception


@pytest.mark.parametrize("where", ["zero_parameters", "silence_copies"])
def test_an_error_while_neurons_are_zeroed_claims_nothing(where, monkeypatch):
    def fails(*_):
        raise ArithmeticError

    published, prune, data = callbacks()
    module, before = Toy(plain), {}

    class Arms(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            before.update(weights(pl_module))
            monkeypatch.setattr(
                holding_module if where == "silence_copies" else holding_module.PrunedParameters, where, fails
            )

    with pytest.raises(ArithmeticError):
        fit(module, BlobsData(data), [published, prune, Arms()], max_epochs=3)
    assert all(value.equal(before[name]) for name, value in weights(module).items())
    assert (prune.has_result, prune.summary_clause(), prune.state_dict()["masks"]) == (False, "", [])
    assert prune.provenance_entry(published.partitions[0])["pruned"] == {}
    with pytest.raises(RuntimeError, match="No mask"):
        _ = prune.mask


def test_a_resumed_fit_says_where_the_checkpoint_was_not_pruned(tmp_path):
    published, prune, data = callbacks()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Toy(plain), BlobsData(data), [published, prune, saved], max_epochs=2, enable_checkpointing=True)
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["net.2.weight"].fill_(1.0)
    torch.save(checkpoint, path)
    published, prune, data = callbacks()
    module = Toy(plain)
    with pytest.warns(UserWarning, match=r"Pruned neurons of 'net\.2' became nonzero"):
        make_trainer([published, prune], max_epochs=3).fit(module, datamodule=BlobsData(data), ckpt_path=path)
    assert speaks(module, prune) == 0
