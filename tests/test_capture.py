import copy

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn
from torch.nn import functional as F

from lightning_unlearn.capture import (
    Attributor,
    check_reached,
    neuron_count,
    neuron_dimension,
    neuron_means,
    resolve_layer,
    tap,
    trace_forward,
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


@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_margin_is_what_captum_says_of_the_two_classes(net, point):
    model = make(net)
    found = Attributor(model, point, model).margin(IMAGES, LABEL)
    torch.testing.assert_close(found.per_neuron, naive_margin(model, point), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, model(IMAGES).detach())
    torch.testing.assert_close(found.total(), found.per_neuron.flatten(1).sum(dim=1))
    assert not found.per_neuron.requires_grad


@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_class_max_is_what_captum_says_class_by_class(net, point):
    model = make(net)
    found = Attributor(model, point, model).class_max(IMAGES, LABEL, C)
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


# Activations


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
