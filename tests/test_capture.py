import copy
import gc
import warnings

import pytest
import torch
from captum.attr import (
    InternalInfluence,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unlearn import capture
from lightning_unlearn.capture import (
    ATTRIBUTION_METHODS,
    Attributor,
    SmallerBatches,
    check_reached,
    is_out_of_memory,
    loss_gradients,
    named_layers,
    neuron_count,
    neuron_dimension,
    neuron_means,
    resolve_layer,
    response,
    take_rows,
    tap,
    trace_forward,
    whole_batches,
)
from lightning_unlearn.functional import label_margin, strongest_other
from lightning_unlearn.types import LayerPoint

C = 4


class ConvNet(nn.Module):
    """Convolution, in-place ReLU, pooling, two Linears; ``unused`` is never called, ``shared`` twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.hidden = nn.Linear(5 * 4, 6)
        self.shared = nn.Linear(6, 6)
        self.fc = nn.Linear(6, C)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.relu_(self.hidden(F.max_pool2d(x, 2).flatten(1)))
        return self.fc(self.shared(F.gelu(self.shared(x))))


class ResNetLike(nn.Module):
    """The head reads a sum that is made in place; the next norm reads it too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.block = nn.Conv2d(5, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, C)

    def forward(self, x):
        stem = self.stem(x)
        out = self.block(F.relu(stem))
        out += stem
        return self.fc(F.relu(self.norm(out)).mean(dim=(2, 3)))


class TokenNet(nn.Module):
    """Tokens (B, T, D), as in a ViT."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Linear(6, 6)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = tokens + F.gelu(self.mlp(self.norm(tokens)))
        return self.fc(tokens.mean(dim=1))


IMAGES = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(7) % C
POINTS = [
    (ConvNet, LayerPoint("conv")),
    (ConvNet, LayerPoint("conv", "input")),
    (ConvNet, LayerPoint("norm")),
    (ConvNet, LayerPoint("hidden")),
    (ConvNet, LayerPoint("hidden", "input")),
    (ConvNet, LayerPoint("fc", "input")),
    (ConvNet, LayerPoint("fc")),
    (ResNetLike, LayerPoint("block")),
    (ResNetLike, LayerPoint("fc", "input")),
    (TokenNet, LayerPoint("mlp")),
    (TokenNet, LayerPoint("mlp", "input")),
    (TokenNet, LayerPoint("patch")),
    (TokenNet, LayerPoint("fc", "input")),
]


def make(net):
    torch.manual_seed(3)
    model = net()
    model(IMAGES)  # running statistics of the norms
    return model.eval()


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def captum_per_class(model, point, multiply):
    """(C, B, ...): Captum, called once per class."""
    method = LayerGradientXActivation(model, resolve_layer(model, point.name), multiply_by_inputs=multiply)
    at_input = point.at == "input"
    return torch.stack(
        [method.attribute(IMAGES.clone(), target=c, attribute_to_layer_input=at_input) for c in range(C)]
    ).detach()


def naive_margin(model, point):
    """The margin's attribution is that of the label's logit minus that of the rival's."""
    per_class, rows = captum_per_class(model, point, multiply=True), torch.arange(len(LABEL))
    return per_class[LABEL, rows] - per_class[strongest_other(model(IMAGES), LABEL), rows]


def naive_class_max(model, point):
    """Positions are summed per neuron; the neuron is in dimension 1 of images, in the last one of tokens."""
    gradients = captum_per_class(model, point, multiply=False)
    # A product that Captum makes with gradient 1 is the activation.
    with tap(model, point) as take:
        model(IMAGES)
        activation = take()
    product = gradients.max(dim=0).values * activation
    if product.ndim == 3:
        return product.sum(dim=1).abs()
    return product.flatten(2).sum(dim=2).abs() if product.ndim == 4 else product.abs()


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "captum"])
@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_margin_is_what_captum_says_of_the_two_classes(net, point, fast):
    model = make(net)
    attributor = Attributor(model, point, model, fast=fast)
    found = attributor.margin(IMAGES, LABEL)
    assert attributor.is_fast is fast
    torch.testing.assert_close(found.per_neuron, naive_margin(model, point), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, model(IMAGES).detach())
    torch.testing.assert_close(found.total(), found.per_neuron.flatten(1).sum(dim=1))
    assert not found.per_neuron.requires_grad
    assert not found.logits.requires_grad


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "captum"])
@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_class_max_is_what_captum_says_class_by_class(net, point, fast):
    model = make(net)
    found = Attributor(model, point, model, fast=fast).class_max(IMAGES, LABEL, C)
    torch.testing.assert_close(found, naive_class_max(model, point), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


def hand_net():
    """z = relu(x), logits = (z0 + 2 z1, 3 z0 - z1)."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    return model


def test_hand_computed():
    model, x = hand_net(), torch.tensor([[2.0, 5.0], [4.0, -1.0]])
    attributor = Attributor(model, LayerPoint("1", "input"), model)
    margin = attributor.margin(x, torch.tensor([0, 1]))
    # Row 0, class 0 against 1: gradient (-2, 3) on z = (2, 5); row 1, class 1 against 0: (2, -3) on (4, 0).
    assert margin.per_neuron.tolist() == [[-4.0, 15.0], [8.0, 0.0]]
    assert margin.total().tolist() == [11.0, 8.0]
    assert margin.logits.tolist() == [[12.0, 1.0], [4.0, 12.0]]
    # The largest gradient over the classes is (3, 2).
    assert attributor.class_max(x, torch.tensor([0, 1]), 2).tolist() == [[6.0, 10.0], [12.0, 0.0]]


def test_at_the_input_of_a_bias_free_head_the_total_is_the_margin():
    model = hand_net()
    x, label = torch.rand(9, 2), torch.arange(9) % 2
    found = Attributor(model, LayerPoint("1", "input"), model).margin(x, label)
    torch.testing.assert_close(found.total(), label_margin(model(x), label).detach())


def attribute_all(attributor, x=IMAGES):
    return attributor.margin(x, LABEL).per_neuron, attributor.class_max(x, LABEL, C)


@pytest.mark.parametrize(
    "point",
    [LayerPoint("conv"), LayerPoint("norm"), LayerPoint("hidden"), LayerPoint("hidden", "input")],
    ids=str,
)
def test_frozen_parameters_and_no_grad_change_nothing(point):
    model = make(ConvNet)
    expected = attribute_all(Attributor(model, point, model))
    model.requires_grad_(False)
    with torch.no_grad():
        found = attribute_all(Attributor(model, point, model))
    torch.testing.assert_close(found, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_under_bf16_autocast_the_results_are_float32_and_near():
    model = make(ConvNet)
    attributor = Attributor(model, LayerPoint("hidden"), model)
    expected = attribute_all(attributor)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        margin = attributor.margin(IMAGES, LABEL)
        class_max = attributor.class_max(IMAGES, LABEL, C)
    assert margin.logits.dtype == margin.total().dtype == class_max.dtype == torch.float32
    torch.testing.assert_close(margin.per_neuron.float(), expected[0], rtol=0.1, atol=0.05)
    torch.testing.assert_close(class_max, expected[1], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("x", [(IMAGES, IMAGES), {"left": IMAGES, "right": IMAGES}], ids=["tuple", "dict"])
def test_the_input_may_be_any_structure(x):
    model = make(ConvNet)

    def forward(pair):
        left, right = pair.values() if isinstance(pair, dict) else pair
        return model((left + right) / 2)

    found = Attributor(model, LayerPoint("hidden"), forward).margin(x, LABEL)
    torch.testing.assert_close(found.per_neuron, naive_margin(model, LayerPoint("hidden")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_the_model_is_left_as_found(net, point):
    model, x = make(net), IMAGES.clone()
    before = copy.deepcopy(model.state_dict())
    attribute_all(Attributor(model, point, model), x)
    assert hooks_of(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(x, IMAGES)
    assert not x.requires_grad


@pytest.mark.parametrize(
    "point", [LayerPoint("0", "input"), LayerPoint("0"), LayerPoint("1", "input"), LayerPoint("1")], ids=str
)
def test_the_users_input_does_not_come_to_require_grad(point):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3, C)), torch.randn(7, 3)
    margin, _ = attribute_all(Attributor(model, point, model), x)  # Flatten hands over the very tensor
    assert (margin != 0).any()
    assert not x.requires_grad


@pytest.mark.parametrize("method", ["margin", "class_max", "trace", "tap"])
def test_no_hook_survives_an_exception_in_forward(method):
    model = make(ConvNet)

    def fails(x):
        model(x)
        raise RuntimeError("out of memory")

    def run():
        attributor = Attributor(model, LayerPoint("hidden"), fails)
        if method == "margin":
            attributor.margin(IMAGES, LABEL)
        elif method == "class_max":
            attributor.class_max(IMAGES, LABEL, C)
        elif method == "trace":
            trace_forward(model, fails, IMAGES)
        else:
            with tap(model, LayerPoint("hidden")):
                fails(IMAGES)

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert hooks_of(model) == 0


def test_a_layer_with_several_tensors_is_refused():
    class Splits(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.pair = Pair()
            self.fc = nn.Linear(4, C)

        def forward(self, x):
            left, right = self.pair(self.lstm(x)[0])
            return self.fc((left + right).mean(dim=1))

    class Pair(nn.Module):
        def forward(self, x):
            return x, 2 * x

    model = Splits()
    with pytest.raises(ValueError, match="Layer 'pair' has several tensors as its output; name a layer with one"):
        Attributor(model, LayerPoint("pair"), model).margin(torch.randn(7, 5, 3), LABEL)


class Wrapped(nn.Module):
    """Holds a compiled block and a checkpointed one."""

    def __init__(self):
        super().__init__()
        self.one = torch.compile(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), backend="eager")
        self.two = checkpoint_wrapper(nn.Sequential(nn.Linear(3, 2)))

    def forward(self, x):
        return self.two(self.one(x))


def test_layers_go_by_the_names_that_their_author_gave():
    model = Wrapped()
    assert list(named_layers(model)) == ["one", "one.0", "one.1", "two", "two.0"]
    for name in ("one.0", "one._orig_mod.0"):
        assert resolve_layer(model, name) is model.one._orig_mod[0]
    # Not the wrapper, whose class says nothing.
    assert resolve_layer(model, "one") is model.one._orig_mod
    assert resolve_layer(model, "two._checkpoint_wrapped_module.0") is resolve_layer(model, "two.0")
    with torch.compiler.set_stance("force_eager"):
        trace = trace_forward(model, model, torch.ones(5, 4))
    assert [call.name for call in trace.calls] == ["one", "one.0", "one.1", "two", "two.0"]


def test_an_unknown_layer_is_refused_with_near_names():
    model = make(ConvNet)
    for build in (
        lambda: resolve_layer(model, "hiden"),
        lambda: Attributor(model, LayerPoint("hiden"), model),
        lambda: tap(model, LayerPoint("hiden")).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"module of ConvNet, but got 'hiden'. The nearest names are: hidden"):
            build()
    with pytest.raises(ValueError, match="The nearest names are: conv, norm, act, hidden, shared, fc, unused"):
        resolve_layer(model, "zzzzzzz")
    with pytest.raises(ValueError, match="The nearest names are: none, it has no submodules"):
        resolve_layer(nn.ReLU(), "fc")
    with pytest.raises(ValueError, match="but got ''"):
        resolve_layer(model, "")


# The fast path


class Residual(nn.Module):
    """The input of the norm goes past it too; of ``early`` even before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.mlp = nn.Linear(5, 5)
        self.fc = nn.Linear(5, C)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(x + F.gelu(self.mlp(self.norm(x))))


class SwitchesRecording(nn.Module):
    """Puts back, after the layer, that nothing is recorded."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 5)
        self.fc = nn.Linear(5, C)

    def forward(self, x):
        with torch.enable_grad():
            hidden = self.hidden(x)
        return self.fc(F.gelu(hidden))


@pytest.mark.parametrize(
    ("net", "point"),
    [(Residual, LayerPoint("norm", "input")), (SwitchesRecording, LayerPoint("hidden"))],
    ids=["residual", "switches recording"],
)
@pytest.mark.parametrize("broken", [False, True], ids=["", "one sample is NaN"])
def test_where_the_fast_path_would_say_something_else_captum_is_used(net, point, broken):
    torch.manual_seed(0)
    model, x = net(), torch.randn(7, 4)
    if broken:
        x[0] = torch.nan
    attributor = Attributor(model, point, model)
    with torch.no_grad(), pytest.warns(UserWarning, match="Every batch is recorded from end to end"):
        found = attributor.attribute(x, LABEL, rows=True)
    assert attributor.is_fast is False
    expected = Attributor(model, point, model, fast=False).attribute(x, LABEL, rows=True)
    torch.testing.assert_close(found.per_neuron, expected.per_neuron, equal_nan=True)
    torch.testing.assert_close(found.class_max, expected.class_max, equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attributor.margin(x, LABEL)  # said once


def test_the_fast_path_records_from_the_layer_on_only():
    model, recorded = make(ConvNet), {}
    names = ["conv", "norm", "hidden", "shared", "fc"]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: recorded.update({name: output.requires_grad}))
    attributor = Attributor(model, LayerPoint("hidden"), model)
    attributor.margin(IMAGES, LABEL)
    recorded.clear()
    attributor.margin(IMAGES, LABEL)
    assert recorded == {"conv": False, "norm": False, "hidden": False, "shared": True, "fc": True}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_the_modes_of_recording_are_put_back(mode, fails):
    model = make(ConvNet)

    def forward(x):
        logits = model(x)
        if fails:
            raise KeyError
        return logits

    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        attributor = Attributor(model, LayerPoint("conv", "input"), forward)
        if fails:
            with pytest.raises(KeyError):
                attributor.margin(IMAGES, LABEL)
        else:
            # Made in inference mode, where it is on.
            found = attributor.attribute(IMAGES + 0, LABEL, rows=True)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    if not fails:
        expected = naive_margin(model, LayerPoint("conv", "input"))
        torch.testing.assert_close(found.per_neuron, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("point", [LayerPoint("conv"), LayerPoint("hidden"), LayerPoint("fc", "input")], ids=str)
def test_one_pass_gives_both(point):
    model, passes = make(ConvNet), []

    def forward(x):
        passes.append(len(x))
        return model(x)

    attributor = Attributor(model, point, forward)
    attributor.margin(IMAGES, LABEL)
    passes.clear()
    found = attributor.attribute(IMAGES, LABEL, rows=True)
    assert passes == [7]
    torch.testing.assert_close(found.per_neuron, naive_margin(model, point), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.class_max, naive_class_max(model, point), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 2 * 7 * 6, 10**9], ids=["one by one", "two at a time", "all at once"])
def test_many_classes_are_taken_in_turns(monkeypatch, elements):
    monkeypatch.setattr(capture, "_GRADIENT_ELEMENTS", elements)
    model, point, taken = make(ConvNet), LayerPoint("hidden"), []
    grad = torch.autograd.grad

    def counted(*args, **kwargs):
        found = grad(*args, **kwargs)
        taken.extend([len(found[0])] if kwargs.get("is_grads_batched") else [])
        return found

    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = Attributor(model, point, model).class_max(IMAGES, LABEL, C)
    assert taken == {1: [1, 1, 1, 1], 2 * 7 * 6: [2, 2], 10**9: [4]}[elements]
    monkeypatch.undo()
    torch.testing.assert_close(found, naive_class_max(model, point), rtol=1e-5, atol=1e-6)


class NotBatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, gradient):
        if gradient.sum().item() == 0:  # what vmap cannot do
            return gradient
        return 3 * gradient


def test_an_operation_that_cannot_be_batched_is_taken_class_by_class():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, C)), torch.randn(7, 3)
    for scale in (NotBatched.apply, lambda logits: 3 * logits):
        found = Attributor(model, LayerPoint("1", "input"), lambda x, scale=scale: scale(model(x))).class_max(
            x, LABEL, C
        )
        expected = 3 * (model[0](x) * model[1].weight.amax(dim=0)).abs()
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(
    "head",
    [lambda x: x, lambda x: x * 2, lambda x: x.mul_(2), lambda x: x.log_softmax(1)],
    ids=["as is", "*", "*=", "log"],
)
def test_what_follows_the_head_counts(head):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, C)), torch.randn(7, 3)
    point = LayerPoint("2", "input")
    found, expected = (
        Attributor(model, point, lambda x: head(model(x)), fast=fast).class_max(x, LABEL, C) for fast in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_hook_that_changes_the_heads_output_counts():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, C)), torch.randn(7, 3)
    model[1].register_forward_hook(lambda _, __, output: 2 * output)
    point = LayerPoint("1", "input")
    found, expected = (Attributor(model, point, model, fast=fast).class_max(x, LABEL, C) for fast in (True, False))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("method", "fast"), [("gradient_x_activation", True), *((method, False) for method in ATTRIBUTION_METHODS)]
)
def test_tap_and_watch_read_other_layers_in_the_same_pass(method, fast):
    torch.manual_seed(0)
    model = make(Plain)
    watch = (LayerPoint("conv"), LayerPoint("fc", "input"))
    attributor = Attributor(model, LayerPoint("hidden"), model, method, fast=fast, watch=watch)
    with tap(model, watch[0]) as take, tap(model, watch[1]) as take_input:
        model(IMAGES)
        expected = take(), take_input()
        for _ in range(2):
            watched = attributor.attribute(IMAGES, LABEL, rows=True).watched
            torch.testing.assert_close((take(), take_input()), expected)
            torch.testing.assert_close(watched, expected)
    assert hooks_of(model) == 0


def test_nothing_of_a_batch_is_kept():
    model = make(ConvNet)
    attributor = Attributor(model, LayerPoint("conv"), model)

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    attributor.attribute(IMAGES, LABEL, rows=True)
    gc.collect()
    gc.disable()  # what only the collector would free piles up in between
    try:
        before = tensors()
        for _ in range(5):
            attributor.attribute(IMAGES, LABEL, rows=True)
        assert tensors() <= before
    finally:
        gc.enable()


def test_a_layer_that_is_called_twice_or_never_is_refused():
    model = make(ConvNet)
    for name, count in (("shared", 2), ("unused", 0)):
        with pytest.raises(ValueError, match=f"Expected layer '{name}' to be called once .* but it was {count}"):
            Attributor(model, LayerPoint(name), model).margin(IMAGES, LABEL)


def test_another_number_of_classes_is_refused():
    model = make(ConvNet)
    with pytest.raises(ValueError, match="Expected logits of 9 classes, but got 4"):
        Attributor(model, LayerPoint("fc", "input"), model).class_max(IMAGES, LABEL, 9)


# Captum's other methods


class Plain(nn.Module):
    """Every activation is a module and called once, as DeepLift needs it; one works in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(5 * 4, 6)
        self.act2 = nn.ReLU()
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.fc(self.act2(self.hidden(x.flatten(1))))


CAPTUM = {
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 16}),
    "conductance": (LayerConductance, {"n_steps": 16}),
    "internal_influence": (InternalInfluence, {"n_steps": 16}),
    "deeplift": (LayerDeepLift, {}),
}
METHOD_POINTS = [LayerPoint("norm"), LayerPoint("hidden"), LayerPoint("hidden", "input"), LayerPoint("fc", "input")]


def plainly(method, point, target):
    """Captum's class, called as its documentation does, for one class of every row."""
    # In place, plain Captum fails for integrated gradients, as functions in place refuse the leaf it hands on.
    model = make(Plain)
    model.act.inplace = False
    kind, options = CAPTUM[method]
    found = kind(model, resolve_layer(model, point.name)).attribute(
        IMAGES.clone(), target=target, attribute_to_layer_input=point.at == "input", **options
    )
    return (found[0] if isinstance(found, tuple) else found).detach()


@pytest.mark.parametrize("point", METHOD_POINTS, ids=str)
@pytest.mark.parametrize("method", CAPTUM)
def test_margin_of_a_method_is_the_difference_of_captums_classes(method, point):
    model = make(Plain)
    rival = strongest_other(model(IMAGES), LABEL)
    with torch.no_grad():
        found = Attributor(model, point, model, method).margin(IMAGES, LABEL)
    expected = plainly(method, point, LABEL) - plainly(method, point, rival)
    torch.testing.assert_close(found.per_neuron, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, model(IMAGES).detach())
    assert hooks_of(model) == 0
    assert not found.per_neuron.requires_grad


@pytest.mark.parametrize("point", METHOD_POINTS, ids=str)
@pytest.mark.parametrize("method", CAPTUM)
def test_class_max_of_a_method_is_the_largest_of_captums_classes(method, point):
    model = make(Plain)
    found = Attributor(model, point, model, method).class_max(IMAGES, LABEL, C)
    largest = torch.stack([plainly(method, point, c) for c in range(C)]).amax(dim=0)
    expected = (largest.flatten(2).sum(dim=2) if largest.ndim > 2 else largest).abs()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("method", CAPTUM)
def test_a_method_takes_a_tuple_and_leaves_the_model_as_found(method):
    model, x = make(Plain), (IMAGES.clone(), torch.ones(7, 1, 1, 1))
    model.fc.input = "the user's own"
    before = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
    scaled = Attributor(model, LayerPoint("hidden"), lambda pair: model(pair[0] * pair[1]), method)
    found = scaled.margin(x, LABEL).per_neuron
    assert (found != 0).any()
    assert all(torch.equal(before[0][name], value) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == before[1]
    assert model.fc.input == "the user's own"
    assert hooks_of(model) == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(value.requires_grad for value in x)
    assert torch.equal(x[0], IMAGES)


@pytest.mark.parametrize(("method", "most"), [("integrated_gradients", 4), ("conductance", 4), ("deeplift", 2)])
def test_a_method_holds_few_steps_at_a_time(method, most):
    model, seen = make(Plain), []

    def forward(x):
        seen.append(len(x))
        return model(x)

    Attributor(model, LayerPoint("hidden"), forward, method).margin(IMAGES, LABEL)
    assert max(seen) == most * len(IMAGES)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(7, 2, dtype=torch.int64), "a tensor of torch.int64"),
        ((IMAGES, torch.zeros(7, dtype=torch.bool)), "a tensor of torch.bool"),
        ({"images": IMAGES, "mask": torch.zeros(7, dtype=torch.bool)}, "a tensor of torch.bool"),
        ((), "a tuple"),
        ({}, "a dict"),
    ],
    ids=["integers", "a mask", "a mask in a dict", "nothing", "an empty dict"],
)
@pytest.mark.parametrize("method", CAPTUM)
def test_an_input_without_a_baseline_is_refused(method, x, got):
    model = make(Plain)
    expected = (
        f"float tensor, or a tuple or dict of them, since method='{method}' .* but got {got}; set method='gradient_x_"
    )
    with pytest.raises(TypeError, match=expected):
        Attributor(model, LayerPoint("hidden"), lambda _: model(IMAGES), method).margin(x, LABEL)


@pytest.mark.parametrize("method", CAPTUM)
def test_a_dict_of_float_tensors_has_a_baseline(method):
    model = make(Plain)
    plain = Attributor(model, LayerPoint("hidden"), model, method).margin(IMAGES, LABEL)
    named = Attributor(model, LayerPoint("hidden"), lambda x: model(x["images"]), method)
    assert named.margin({"images": IMAGES}, LABEL).per_neuron.equal(plain.per_neuron)


def test_deeplift_refuses_an_activation_that_is_called_twice():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.hidden = nn.Linear(3, 5)
            self.middle = nn.Linear(5, 5)
            self.fc = nn.Linear(5, C)

        def forward(self, x):
            return self.fc(self.act(self.middle(self.act(self.hidden(x)))))

    torch.manual_seed(0)
    model = Reuses()
    with pytest.raises(ValueError, match=r"calls each of its activation modules .* once .*'integrated_gradients'"):
        Attributor(model, LayerPoint("hidden"), model, "deeplift").margin(torch.randn(7, 3), LABEL)
    assert hooks_of(model) == 0
    assert not {"input", "output"} & set(vars(model.act))


def test_deeplift_sees_through_frozen_layers():
    x, label, found = torch.randn(7, 6), torch.arange(7) % C, []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C)).eval()
        model[0].requires_grad_(not frozen)
        found.append(Attributor(model, LayerPoint("2", "input"), model, "deeplift").attribute(x, label).per_neuron)
    assert found[0].equal(found[1])
    assert not x.requires_grad


class Checkpointed(nn.Module):
    """Computes its middle a second time in the backward pass, or not at all."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Linear(6, 12)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, C)

    def forward(self, x):
        def rest(h):
            return self.head(self.body(h))

        x = self.stem(x)
        return rest(x) if self.use_reentrant is None else checkpoint(rest, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("point", [LayerPoint("head", "input"), LayerPoint("body.1"), LayerPoint("stem")], ids=str)
def test_activation_checkpointing_changes_nothing(use_reentrant, point):
    x, label = torch.randn(7, 6), torch.arange(7) % C
    models = [Checkpointed(kind).eval() for kind in (None, use_reentrant)]
    models[1].load_state_dict(models[0].state_dict())
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    private = [getattr(torch.utils.checkpoint, name) for name in names]
    for method in ("gradient_x_activation", "integrated_gradients", "deeplift"):
        plain, found = (Attributor(model, point, model, method).attribute(x, label, rows=True) for model in models)
        torch.testing.assert_close(found.per_neuron, plain.per_neuron)
        torch.testing.assert_close(found.class_max, plain.class_max)
    (plain,), (found,) = (loss_gradients(model, [point], model, x, label) for model in models)
    torch.testing.assert_close(found, plain)
    assert plain[1].abs().sum() > 0
    assert [getattr(torch.utils.checkpoint, name) for name in names] == private


class Unrecorded(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, C)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Every batch is recorded")
@pytest.mark.parametrize("method", ["gradient_x_activation", "integrated_gradients", "conductance"])
def test_a_layer_that_no_gradient_reaches_is_refused(method):
    model, x, label = Unrecorded().eval(), torch.randn(7, 6), torch.arange(7) % C
    refused = pytest.raises(ValueError, match=r"gradients of the logits to reach layer .backbone\.0., but forward does")
    with refused:
        Attributor(model, LayerPoint("backbone.0"), model, method).attribute(x, label)
    with refused:
        loss_gradients(model, [LayerPoint("backbone.0")], model, x, label)
    assert Attributor(model, LayerPoint("head", "input"), model, method).attribute(x, label).logits.shape == (7, C)


@pytest.mark.parametrize(
    ("method", "hint"),
    [("deep_lift", r" Did you mean 'deeplift'\?"), ("zzz", ""), ("Conductance", r" Did you mean 'conductance'\?")],
)
def test_an_unknown_method_is_refused_at_once(method, hint):
    model = make(Plain)
    names = ".*".join(ATTRIBUTION_METHODS)
    with pytest.raises(ValueError, match=f"{names}.*but got '{method}'\\.{hint}$"):
        Attributor(model, LayerPoint("hidden"), model, method)


# Memory


def short_of_memory(function, most, message="CUDA out of memory. Tried to allocate 2 GiB"):
    """The function, for as many rows; ``sizes`` of the batches it was called with."""
    sizes = []

    def limited(x):
        first = x
        while not isinstance(first, torch.Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        sizes.append(len(first))
        if len(first) > most:
            raise RuntimeError(message)
        return function(x)

    return limited, sizes


@pytest.mark.parametrize(
    ("structure", "back"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: (x, None, 1.5), lambda x: x[0]),
        (lambda x: {"images": [x], "scale": torch.tensor(1.0)}, lambda x: x["images"][0]),
    ],
    ids=["tensor", "tuple", "dict"],
)
@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_that_does_not_fit_is_taken_in_parts(most, structure, back):
    model, point = make(ConvNet), LayerPoint("hidden")
    expected = Attributor(model, point, model, watch=[LayerPoint("conv")]).attribute(IMAGES, LABEL, rows=True)
    forward, sizes = short_of_memory(lambda x: model(back(x)), most)
    attributor = Attributor(model, point, forward, watch=[LayerPoint("conv")])
    found = attributor.attribute(structure(IMAGES), LABEL, rows=True)
    for name in ("per_neuron", "logits", "class_max"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.watched, expected.watched)
    assert attributor.is_fast
    sizes.clear()
    attributor.margin(structure(IMAGES), LABEL)
    assert max(sizes) <= most  # the size is remembered
    assert sum(sizes) == 7
    assert hooks_of(model) == 0


def test_where_ranks_must_take_as_many_passes_no_batch_is_taken_in_parts():
    model, point = make(ConvNet), LayerPoint("hidden")
    forward, _ = short_of_memory(model, 3)
    with whole_batches(), pytest.raises(RuntimeError, match="out of memory"):
        Attributor(model, point, forward, "integrated_gradients").margin(IMAGES, LABEL)
    Attributor(model, point, forward).margin(IMAGES, LABEL)  # outside, it is


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_fast_path_is_taken_where_all_ranks_agree(everywhere):
    model, point, asked = make(ConvNet), LayerPoint("hidden"), []
    attributor = Attributor(model, point, model, agree=lambda here: asked.append(here) or everywhere)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attributor.margin(IMAGES, LABEL)
    assert asked == [True]
    assert attributor.is_fast is everywhere
    torch.testing.assert_close(found.per_neuron, Attributor(model, point, model).margin(IMAGES, LABEL).per_neuron)


@pytest.mark.parametrize("method", CAPTUM)
def test_other_methods_are_taken_in_parts_too(method):
    model = make(Plain)
    forward, sizes = short_of_memory(model, 12)
    found = Attributor(model, LayerPoint("hidden"), forward, method).margin(IMAGES, LABEL)
    expected = Attributor(model, LayerPoint("hidden"), model, method).margin(IMAGES, LABEL)
    torch.testing.assert_close(found.per_neuron, expected.per_neuron, rtol=1e-5, atol=1e-5)
    assert max(sizes) > 12


def test_one_row_that_does_not_fit_is_an_error():
    model = make(ConvNet)
    forward, sizes = short_of_memory(model, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        Attributor(model, LayerPoint("hidden"), forward).margin(IMAGES, LABEL)
    assert min(sizes) == 1
    assert hooks_of(model) == 0


def test_a_batch_that_cannot_be_split_keeps_its_error_and_says_so():
    tries = []

    def fails(x, label):
        tries.append(len(label))
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\n.*Expected tensors with 7 rows.*but got a set"):
        SmallerBatches()(fails, {1, 2}, LABEL)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\n.*but got a tensor of shape \(3, 7\)"):
        SmallerBatches()(fails, torch.zeros(3, 7), LABEL)
    assert tries == [7, 7]


def test_another_error_is_not_tried_again():
    forward, sizes = short_of_memory(make(ConvNet), 4, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Attributor(make(ConvNet), LayerPoint("hidden"), forward, fast=False).margin(IMAGES, LABEL)
    assert sizes == [7]


def test_parts_that_are_done_are_not_done_again():
    done = []

    def first_rows_are_small(x, label):
        if len(x) > (4 if x[0] == 0 else 1):
            raise MemoryError
        done.extend(x.tolist())
        return len(x)

    in_parts = SmallerBatches()
    assert in_parts(first_rows_are_small, torch.arange(8), torch.zeros(8)) == [4, 1, 1, 1, 1]
    assert done == list(range(8))
    assert in_parts.rows == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_memory_that_the_cpu_does_not_have_is_noticed():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_take_rows_keeps_the_structure():
    from collections import namedtuple

    pair = namedtuple("pair", "left right")(IMAGES, [LABEL, "name", None])
    found = take_rows(pair, slice(2, 5), 7)
    assert type(found) is type(pair)
    assert torch.equal(found.left, IMAGES[2:5])
    assert torch.equal(found.right[0], LABEL[2:5])
    assert found.right[1:] == ["name", None]


def test_take_rows_of_a_list_of_samples():
    assert take_rows((list("abcdefg"), IMAGES), slice(2, 5), 7)[0] == ["c", "d", "e"]
    assert take_rows(list(range(7)), slice(0, 2), 7) == [0, 1]
    with pytest.raises(ValueError, match="but got a list of as many, perhaps one for each sample"):
        take_rows([torch.zeros(7)] * 7, slice(0, 2), 7)
    with pytest.raises(ValueError, match=r"Expected tensors with 7 rows, .* but got a tensor of shape \(3, 7\)"):
        take_rows([torch.zeros(3, 7)], slice(0, 2), 7)


# Trace


def traced(net):
    model = make(net)
    return trace_forward(model, model, IMAGES)


def test_trace_records_calls_in_the_order_of_entry():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, C))
    trace = trace_forward(model, model, torch.randn(5, 2))
    assert [call.name for call in trace.calls] == ["0", "0.0", "0.1", "1"]
    assert trace.output.shape == (5, C)
    assert not trace.output.requires_grad
    assert hooks_of(model) == 0


def test_last_linear_is_the_last_that_is_called():
    assert (
        traced(ConvNet).last_linear(traced(ConvNet).output.shape[1]) == "fc"
    )  # "unused" comes later in the model, but is not called


def test_a_model_without_linear_is_refused():
    model = nn.Sequential(nn.Conv2d(2, C, 6), nn.Flatten())
    with pytest.raises(ValueError, match=r"calls a torch.nn.Linear with 3 outputs, .* name the layer with layer='...'"):
        trace_forward(model, model, IMAGES).last_linear(3)


def test_linear_refuses_another_layer():
    assert traced(ConvNet).linear("fc").out_features == C
    with pytest.raises(TypeError, match="Expected 'conv' to be a Linear, but it is a Conv2d"):
        traced(ConvNet).linear("conv")


def test_feeder_is_the_nearest_layer_of_matching_size():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, C))
    assert trace_forward(model, model, IMAGES).feeder("4") == "0"
    assert traced(ConvNet).feeder("fc") == "shared"
    assert traced(ConvNet).feeder("hidden") is None  # 5 channels, 20 inputs
    first = nn.Sequential(nn.Flatten(), nn.Linear(72, C))
    assert trace_forward(first, first, IMAGES).feeder("1") is None


def test_norm_after_takes_the_output_directly():
    assert traced(ConvNet).norm_after("conv") == "norm"
    assert traced(ConvNet).norm_after("hidden") is None


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_norm_after_a_function_is_not_direct(between):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), between, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, C))
    assert trace_forward(model, model, IMAGES).norm_after("0") is None


def test_norm_of_a_residual_sum_made_in_place_is_not_the_blocks_own():
    assert traced(ResNetLike).norm_after("block") is None


def test_modules_before_leaves_out_those_that_contain_the_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, C)))
    trace = trace_forward(model, model, torch.randn(5, 2))
    assert trace.modules_before("1.1") == ["0", "0.0", "0.1", "1.0"]
    assert trace.modules_before("0") == []


def test_a_layer_that_is_not_reached_is_refused():
    with pytest.raises(ValueError, match=r"'unused' exists but is never reached in forward.*Layers that are reached: "):
        check_reached(traced(ConvNet), LayerPoint("unused"))


def test_a_layer_that_is_called_twice_is_refused():
    trace = traced(ConvNet)
    assert len(trace.calls_of("shared")) == 2
    with pytest.raises(ValueError, match=r"'shared' is called 2 times in one forward pass, .* name a layer that is"):
        check_reached(trace, LayerPoint("shared"))
    check_reached(trace, LayerPoint("fc", "input"))


# Blocks and logits that the trace finds


class Text(nn.Module):
    """Tokens that are embedded, then a Linear for each, or one for their mean."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.embedding = nn.Embedding(9, 5)
        self.body = nn.Linear(5, 6)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.embedding(x)
        x = self.body(x.mean(dim=1) if self.pooled else x).relu()
        return self.fc(x if self.pooled else x.mean(dim=1))


class Repeated(nn.Module):
    """Convolutions and a Linear, called in the order of their names."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.a, self.b = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(72, C)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x).relu()
        return self.fc(x.flatten(1))


class Frames(nn.Module):
    """The rows that the convolutions see are frames, of which a sample has two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.b(self.a(x.reshape(-1, 1, 6, 6)).relu()).mean(dim=(2, 3))
        return self.fc(x.reshape(-1, 6))


def blocks(*layers):
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("model", "x", "point"),
    [
        (
            blocks(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 2), nn.Flatten()),
            IMAGES,
            LayerPoint("4", "input"),
        ),
        (ResNetLike(), IMAGES, LayerPoint("block", "input")),
        (ConvNet(), IMAGES, LayerPoint("conv")),  # the next layer is a Linear
        (TokenNet(), IMAGES, LayerPoint("patch")),
        (blocks(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, C)), IMAGES, LayerPoint("1")),
        (blocks(nn.Flatten(), nn.Linear(72, C)), IMAGES, LayerPoint("1")),
        (Text(pooled=False), torch.arange(28).reshape(7, 4) % 9, LayerPoint("body")),
        (Text(pooled=True), torch.arange(28).reshape(7, 4) % 9, LayerPoint("body")),
        (Repeated("ab"), IMAGES, LayerPoint("b", "input")),
        (Repeated("abb"), IMAGES, LayerPoint("a")),
        (Repeated("aa"), IMAGES, None),
        (Repeated("aba"), IMAGES, LayerPoint("b", "input")),
        (Frames(), IMAGES, None),
        (blocks(nn.Flatten(), nn.ReLU()), IMAGES, None),
    ],
    ids=[
        "convolutions",
        "resnet",
        "one convolution",
        "tokens",
        "mlp",
        "one linear",
        "text",
        "pooled text",
        "two",
        "the second twice",
        "the first twice",
        "the first again later",
        "frames",
        "no layer",
    ],
)
def test_first_block(model, x, point):
    model.eval()
    trace = trace_forward(model, model, x)
    assert trace.first_block(len(x)) == point
    if point is not None:
        with tap(model, point) as take, torch.no_grad():
            model(x)
            assert response(model, point, take()).shape[0] == len(x)


def test_first_block_reads_what_the_first_block_made():
    model = make(ResNetLike)
    point = trace_forward(model, model, IMAGES).first_block(len(IMAGES))
    with tap(model, point) as take, torch.no_grad():
        model(IMAGES)
        torch.testing.assert_close(take(), F.relu(model.stem(IMAGES)))


class Logits(nn.Module):
    """A head, and what is done with its output."""

    def __init__(self, after):
        super().__init__()
        self.after = after
        self.body = nn.Linear(3, C)
        self.fc = nn.Linear(C, C)
        self.unused = nn.Linear(C, C)

    def forward(self, x):
        return self.after(self, self.fc(self.body(x)))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda model, out: out, True),
        (lambda model, out: out.view(5, C), True),
        (lambda model, out: out.double(), True),
        # Zero now, and something else once it is trained.
        (lambda model, out: out + torch.zeros(C), False),
        (lambda model, out: out.log_softmax(dim=1), False),
        (lambda model, out: out / 2, False),
        (lambda model, out: out.div_(2), False),
        (lambda model, out: out[:, :2], False),
        (lambda model, out: model.fc(out), False),
        (lambda model, out: model.body(torch.zeros(len(out), 3)), False),
    ],
    ids=[
        "as it is",
        "viewed",
        "cast",
        "added to",
        "log-softmax",
        "scaled",
        "scaled in place",
        "cut",
        "called twice",
        "another's",
    ],
)
@pytest.mark.parametrize("broken", [0, 2], ids=["", "two samples are NaN"])
def test_makes_logits(after, expected, broken):
    torch.manual_seed(0)
    model = Logits(after)
    x = torch.randn(5, 3)
    x[:broken] = torch.nan
    trace = trace_forward(model, model, x)
    assert trace.makes_logits("fc") is expected
    assert not trace.makes_logits("unused")
    assert not trace.makes_logits("body")


def test_what_a_cast_makes_of_logits_cannot_be_told_from_nan_alone():
    model = Logits(lambda model, out: out.double())
    trace = trace_forward(model, model, torch.full((5, 3), torch.nan))
    assert not trace.makes_logits("fc")


# Activations


def naive_response(by_neuron):
    """By hand, from (B, D, positions)."""
    out = []
    for sample in by_neuron:
        means = [sum(neuron) / len(neuron) for neuron in sample]
        spreads = [
            (sum((v - m) ** 2 for v in neuron) / len(neuron)) ** 0.5 for neuron, m in zip(sample, means, strict=True)
        ]
        out.append([sum(v * v for v in values) ** 0.5 for values in (means, spreads)])
    return torch.tensor(out)


@pytest.mark.parametrize(
    ("layer", "point", "shape", "to_neurons"),
    [
        (nn.Conv2d(3, 5, 1), LayerPoint("0"), (4, 5, 3, 2), lambda x: x.reshape(4, 5, 6)),
        (nn.Conv2d(3, 5, 1), LayerPoint("0", "input"), (4, 3, 3, 2), lambda x: x.reshape(4, 3, 6)),
        (nn.Conv1d(3, 5, 1), LayerPoint("0"), (4, 5, 6), lambda x: x),
        (nn.Linear(3, 5), LayerPoint("0"), (4, 6, 5), lambda x: x.transpose(1, 2)),
        (nn.Linear(3, 5), LayerPoint("0"), (4, 3, 2, 5), lambda x: x.reshape(4, 6, 5).transpose(1, 2)),
        (nn.ReLU(), LayerPoint("0"), (4, 5, 3, 2), lambda x: x.reshape(4, 5, 6)),
    ],
    ids=["convolution", "its input", "sequence", "tokens", "grid of tokens", "function"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_response_matches_a_loop(layer, point, shape, to_neurons, dtype):
    activation = (2 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = response(nn.Sequential(layer), point, activation)
    assert found.shape == (4, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive_response(to_neurons(activation.float()).tolist()))


def test_response_of_a_layer_without_positions_is_one_norm():
    activation = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    found = response(nn.Sequential(nn.Linear(3, 2)), LayerPoint("0"), activation)
    assert found.tolist() == [[5.0], [2.0]]


def test_tap_hands_over_each_pass_once():
    model = make(ConvNet)
    with tap(model, LayerPoint("fc", "input")) as take, tap(model, LayerPoint("fc")) as take_logits:
        for x in (IMAGES, IMAGES[:2]):
            logits = model(x)
            torch.testing.assert_close(take_logits(), logits)
            torch.testing.assert_close(model.fc(take()), logits)
            take(), take_logits()  # of the call just made
    assert hooks_of(model) == 0


def test_tap_reads_the_layer_before_a_function_in_place():
    model = make(ConvNet)
    with tap(model, LayerPoint("norm")) as take:
        model(IMAGES)
        activation = take()
    torch.testing.assert_close(activation, model.norm(model.conv(IMAGES)).detach())
    assert activation.min() < 0
    assert not activation.requires_grad


def test_tap_says_how_often_the_layer_was_called():
    model = make(ConvNet)
    with tap(model, LayerPoint("shared")) as take:
        with pytest.raises(ValueError, match=r"Expected layer 'shared' to be called once .* but it was 0"):
            take()
        model(IMAGES)
        with pytest.raises(ValueError, match=r"Expected layer 'shared' to be called once .* but it was 2"):
            take()


@pytest.mark.parametrize(
    ("layer", "x", "dimension"),
    [
        (nn.Linear(3, 6), torch.randn(4, 3), 1),
        (nn.Linear(3, 6), torch.randn(4, 5, 3), 2),
        (nn.Linear(3, 6), torch.randn(4, 5, 7, 3), 3),
        (nn.Conv1d(3, 6, 1), torch.randn(4, 3, 5), 1),
        (nn.Conv2d(3, 6, 1), torch.randn(4, 3, 5, 7), 1),
        (nn.ConvTranspose2d(3, 6, 1), torch.randn(4, 3, 5, 7), 1),
        (nn.BatchNorm1d(6), torch.randn(4, 6, 5), 1),
        (nn.BatchNorm1d(6), torch.randn(4, 6), 1),
        (nn.GroupNorm(2, 6), torch.randn(4, 6, 5), 1),
        (nn.LayerNorm(6), torch.randn(4, 5, 6), 2),
        (nn.LayerNorm(6), torch.randn(4, 5, 7, 6), 3),
        (nn.ReLU(), torch.randn(4, 6), 1),
        (nn.ReLU(), torch.randn(4, 5, 6), 2),
        (nn.ReLU(), torch.randn(4, 6, 5, 7), 1),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_neuron_dimension_and_means(layer, x, dimension):
    out = layer(x).detach()
    assert neuron_dimension(layer, out.ndim) == dimension
    means = neuron_means(out, dimension)
    assert means.shape == (4, 6)
    for neuron in range(6):
        torch.testing.assert_close(means[:, neuron], out.select(dimension, neuron).reshape(4, -1).mean(dim=1))


def test_neuron_count():
    assert neuron_count(nn.Linear(3, 6)) == 6
    assert neuron_count(nn.Conv1d(3, 5, 1)) == 5
    assert neuron_count(nn.ConvTranspose2d(3, 4, 1)) == 4
    with pytest.raises(ValueError, match="Expected a Linear or a convolution, but got a BatchNorm2d"):
        neuron_count(nn.BatchNorm2d(3))
