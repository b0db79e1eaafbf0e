import importlib
import pickle
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn import shrink
from lightning_unlearn.shrinking import FORMAT, ModelCost, compare, load_shrunk, measure, save_shrunk
from tests.callbacks import forked
from tests.toys import (
    FEATURES,
    Blobs,
    BlobsData,
    Plain,
    Residual,
    Toy,
    assert_same_weights,
    convnet,
    fit,
    trio,
    weights,
)

X = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def silence(*modules, neurons=(1, 4)):
    """As the prune callback does: row and bias of the layer, scale and shift of the norm."""
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter[list(neurons)] = 0


@torch.no_grad()
def lived_in(model):
    """Norms and biases as after training: a norm that is 0 or 1 would let wrong cuts through."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 2)
            module.bias.normal_()
    return model


@torch.no_grad()
def outputs(model, *args, **kwargs):
    modes = [(module, module.training) for module in model.modules()]
    result = model.eval()(*args, **kwargs)
    for module, mode in modes:
        module.training = mode
    return result


def assert_same_outputs(model, small, *args):
    """On inputs that shrink has not seen too."""
    for strength in (0, 0.5, 5):
        others = [x + strength * torch.randn_like(x) for x in args]
        expected = outputs(model, *others)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(outputs(small, *others), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def assert_whole(model, x, match="left silent neurons in"):
    with pytest.warns(UserWarning, match=match):
        small = shrink(model, x)
    assert_same_weights(weights(model), weights(small))
    assert small is not model


def perceptron(*after, hidden=8):
    return nn.Sequential(nn.Linear(FEATURES, hidden), *after, nn.Linear(hidden, 3))


# What is cut.


def test_an_mlp_is_what_slicing_by_hand_gives():
    net = perceptron(nn.ReLU())
    silence(net[0])
    keep = [0, 2, 3, 5, 6, 7]
    small = shrink(net, X)
    expected = {"0.weight": net[0].weight[keep], "0.bias": net[0].bias[keep]}
    expected |= {"2.weight": net[2].weight[:, keep], "2.bias": net[2].bias}
    assert_same_weights({name: value.detach() for name, value in expected.items()}, weights(small))
    assert (small[0].out_features, small[2].in_features) == (6, 6)
    by_hand = (X @ net[0].weight[keep].T + net[0].bias[keep]).relu() @ net[2].weight[:, keep].T + net[2].bias
    torch.testing.assert_close(outputs(small, X), by_hand.detach())
    assert_same_outputs(net, small, X)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_mlps_lose_their_silent_neurons_and_nothing_else(data):
    widths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    silent = [data.draw(st.sets(st.integers(0, width - 1), max_size=width - 1)) for width in widths]
    bias = data.draw(st.booleans())
    sizes = [FEATURES, *widths, 3]
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    for layer, neurons in zip(layers, silent, strict=False):
        silence(layer, neurons=sorted(neurons))
    net = nn.Sequential(*(x for layer in layers[:-1] for x in (layer, nn.Tanh())), layers[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = shrink(net, X)
    left = [FEATURES, *(width - len(s) for width, s in zip(widths, silent, strict=True)), 3]
    assert size(small) == sum(a * b + b * bias for a, b in pairwise(left))
    torch.testing.assert_close(outputs(small, X), outputs(net, X), rtol=0, atol=1e-5)


def test_a_convnet_through_norm_pooling_and_flatten():
    net = lived_in(convnet())
    silence(net[0], net[1])
    silence(net[6], neurons=[5])
    small = shrink(net, IMAGES)
    assert (small[0].out_channels, small[1].num_features) == (10, 10)
    assert (small[6].in_features, small[6].out_features) == (40, 19)
    assert len(small[1].running_mean) == len(small[1].running_var) == 10
    assert_same_outputs(net, small, IMAGES)


@pytest.mark.parametrize(
    ("layers", "x", "kept"),
    [
        ([nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)], torch.randn(6, 2, 8), 6),
        ([nn.ConvTranspose2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)], IMAGES, 6),
        ([nn.Conv2d(2, 8, 3, bias=False), nn.PReLU(8), nn.Conv2d(8, 3, 1)], IMAGES, 6),
        ([nn.Conv2d(2, 8, 3, bias=False), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)], IMAGES, 6),
    ],
    ids=["conv1d", "transposed", "prelu", "instancenorm"],
)
def test_other_layers(layers, x, kept):
    net = nn.Sequential(*layers)
    with torch.no_grad():
        # A transposed convolution has its output channels second.
        rows = net[0].weight.movedim(int(net[0].transposed), 0)
        rows[[1, 4]] = 0
        if net[0].bias is not None:
            net[0].bias[[1, 4]] = 0
    small = shrink(net, x)
    assert small[0].out_channels == kept
    assert_same_outputs(net, small, x)


def test_neurons_to_which_nobody_listens():
    net = perceptron(nn.Sigmoid())
    with torch.no_grad():
        net[2].weight[:, 3:5] = 0
    small = shrink(net, X)
    assert (small[0].out_features, small[2].in_features) == (6, 6)
    assert_same_outputs(net, small, X)


def test_a_neuron_to_which_one_of_two_listens_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.other = nn.Linear(FEATURES, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            hidden = self.body(x).tanh()
            return self.one(hidden) * self.other(hidden).exp()

    net = Two()
    with torch.no_grad():
        net.one.weight[:, :5] = 0
        net.other.weight[:, 3:] = 0
    small = shrink(net, X)
    assert torch.equal(small.body.weight, net.body.weight[[0, 1, 2, 5, 6, 7]])
    assert_same_outputs(net, small, X)


def test_of_a_silent_layer_one_neuron_stays():
    net = perceptron(nn.ReLU())
    silence(net[0], neurons=range(8))
    with pytest.warns(UserWarning, match="left silent neurons in '0'"):
        small = shrink(net, X)
    assert small[0].out_features == 1
    assert_same_outputs(net, small, X)


def residual():
    net = Residual()
    # So that nothing of the stream is dead by chance.
    nn.init.constant_(net.stem.bias, 1.0)
    return net


def test_a_residual_stream_is_cut_where_all_that_add_to_it_are_silent():
    net = residual()
    silence(net.stem, neurons=[0, 1, 2])
    silence(net.block, neurons=[1, 2, 3])
    with pytest.warns(UserWarning, match="left silent neurons in 'stem', 'block'"):
        small = shrink(net, X)
    assert (small.stem.out_features, small.block.in_features, small.block.out_features) == (18, 18, 18)
    assert small.head.in_features == 18
    assert_same_outputs(net, small, X)


@pytest.mark.parametrize("layer", ["stem", "block"])
def test_a_residual_stream_is_whole_where_one_layer_is_silent(layer):
    net = residual()
    silence(net.get_submodule(layer))
    assert_whole(net, X)


def test_a_residual_stream_is_whole_where_only_the_head_does_not_listen():
    net = residual()
    with torch.no_grad():
        net.head.weight[:, :5] = 0
    assert_whole(net, X, match="found no neuron to cut")


def test_resnet18_loses_the_inner_channels_of_its_blocks():
    net = lived_in(torchvision.models.resnet18(num_classes=4))
    silence(net.layer1[0].conv1, net.layer1[0].bn1, neurons=range(24))
    x = torch.randn(2, 3, 32, 32)
    small = shrink(net, x)
    assert small.layer1[0].conv1.weight.shape == (40, 64, 3, 3)
    assert small.layer1[0].conv2.weight.shape == (64, 40, 3, 3)
    # 24 channels of two 3 x 3 convolutions on 64 channels, with scale and shift of each.
    assert size(net) - size(small) == 24 * (2 * 9 * 64 + 2)
    assert_same_outputs(net, small, x)


def test_the_hidden_layer_of_a_transformer_block():
    net = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    silence(net.linear1, neurons=range(7))
    x = torch.randn(3, 5, 16)
    small = shrink(net, x)
    assert (small.linear1.out_features, small.linear2.in_features) == (25, 25)
    assert_same_outputs(net, small, x)


def separable():
    return lived_in(
        nn.Sequential(
            *(nn.Conv2d(2, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(216, 3)),
        )
    )


def test_a_silent_depthwise_channel_takes_the_one_before_along():
    net = separable()
    silence(net[3], net[4])
    small = shrink(net, IMAGES)
    depthwise = small[3]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups, len(depthwise.weight)) == (10,) * 4
    assert small[0].out_channels == small[6].in_channels == 10
    assert_same_outputs(net, small, IMAGES)


def test_a_depthwise_channel_stays_whose_norm_makes_a_constant_of_silence():
    net = separable()
    silence(net[0], net[1])
    assert_whole(net, IMAGES)


def test_a_silent_gate_is_a_silent_product():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.value, self.gate, self.head = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.value(x) * nn.functional.silu(self.gate(x)))

    net = Gated()
    silence(net.gate)
    small = shrink(net, X)
    assert small.value.out_features == small.gate.out_features == small.head.in_features == 6
    assert_same_outputs(net, small, X)


def test_a_concatenation():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(torch.cat([self.left(x), self.right(x)], 1).relu())

    net = Fork()
    silence(net.right)
    small = shrink(net, X)
    keep = [*range(8), 8, 10, 11, 13, 14, 15]
    assert torch.equal(small.head.weight, net.head.weight[:, keep])
    assert_same_outputs(net, small, X)


# What is left whole.


@pytest.mark.parametrize(
    "after",
    [
        [nn.LayerNorm(8), nn.ReLU()],
        [nn.Sigmoid()],
        [nn.Softmax(1)],
        [nn.BatchNorm1d(8), nn.ReLU()],
        [nn.BatchNorm1d(8, affine=False), nn.ReLU()],
    ],
    ids=["layernorm", "sigmoid", "softmax", "shift", "mean"],
)
def test_a_layer_stays_whose_silence_is_heard(after):
    net = perceptron(*after)
    if isinstance(after[0], nn.BatchNorm1d):
        net[1].running_mean.fill_(-1.0)
        if net[1].affine:
            nn.init.constant_(net[1].bias, 0.5)
    silence(net[0])
    if isinstance(after[0], nn.LayerNorm):
        silence(net[1])
    assert_whole(net, X)


@torch.no_grad()
def test_a_constant_of_a_norm_keeps_its_neuron_and_lets_others_go():
    net = lived_in(perceptron(nn.BatchNorm1d(8), nn.ReLU()))
    silence(net[0], net[1], neurons=[1])
    silence(net[0], neurons=[4])
    net[1].bias[4] = 0.5
    with pytest.warns(UserWarning, match="left silent neurons in '0'"):
        small = shrink(net, X)
    assert torch.equal(small[0].weight, net[0].weight[[0, 2, 3, 4, 5, 6, 7]])
    assert_same_outputs(net, small, X)


def test_what_a_layer_norm_mixes_is_whole_though_no_output_tells():
    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.other = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return 0 * self.head(self.norm(self.body(x)) + self.other(x))

    net = Mute()
    silence(net.body, net.other, net.norm)
    assert_whole(net, X)


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 10, 11]])
def test_halves_of_a_layer_stay(rows):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, 20), nn.Linear(10, 3)

        def forward(self, x):
            value, gate = self.body(x).chunk(2, 1)
            return self.head(value * gate.sigmoid())

    net = Halves()
    silence(net.body, neurons=rows)
    assert_whole(net, X)


def test_the_group_of_a_layer_is_not_asked_for_where_it_cannot_be_cut(monkeypatch):
    # torch-pruning 1.6 does not come back with that of a Swin Transformer's residual stream.
    asked = []
    monkeypatch.setattr("torch_pruning.DependencyGraph.get_pruning_group", lambda *_: asked.append(1))
    net = perceptron(nn.LayerNorm(8), nn.ReLU())
    silence(net[0], net[1])
    assert_whole(net, X)
    assert_whole(perceptron(nn.ReLU()), X, match="found no neuron")
    assert not asked
    net = perceptron(nn.ReLU())
    silence(net[0])
    assert_whole(net, X)
    assert asked


@pytest.mark.parametrize("groups", [1, 4])
def test_a_group_norm_keeps_its_groups(groups):
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(groups, 8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    silence(net[0], net[1], neurons=[0, 1])
    assert_whole(net, IMAGES)


def test_a_grouped_convolution_stays():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1))
    silence(net[0], net[2], neurons=[0, 4])
    assert_whole(net, IMAGES)


def test_the_classes_stay():
    net = perceptron(nn.ReLU())
    silence(net[2], neurons=[1])
    assert_whole(net, X, match="left silent neurons in '2'")


def test_sizes_written_into_forward_keep_a_layer_whole_and_let_others_go():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.body, self.head = nn.Conv2d(2, 6, 3), nn.Linear(216, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(self.conv(x).relu().view(-1, 6 * 36)).relu())

    net = View()
    silence(net.conv, net.body)
    with pytest.warns(UserWarning, match="left silent neurons in 'conv'"):
        small = shrink(net, IMAGES)
    assert small.conv.out_channels == 6
    assert small.body.out_features == small.head.in_features == 6
    assert_same_outputs(net, small, IMAGES)


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    silence(net[0], net[2])
    with pytest.warns(UserWarning, match="left silent"):
        small = shrink(net, torch.randn(5, 8))
    assert small[0].weight is small[2].weight
    assert size(small) == size(net)


def test_a_parametrised_layer_stays():
    net = perceptron(nn.ReLU())
    silence(net[0])
    nn.utils.parametrizations.weight_norm(net[2])
    assert_whole(net, X)


@torch.no_grad()
def test_a_neuron_that_is_all_but_silent_stays():
    net = perceptron(nn.ReLU())
    net[0].weight[2] = 0
    net[0].bias[2] = 1e-30
    assert_whole(net, X, match="found no neuron to cut")


def test_nothing_silent_is_said_with_what_would_have_to_be():
    assert_whole(perceptron(nn.ReLU()), X, match="found no neuron to cut.*row and bias are exactly zero")


# The model and its copy.


def test_the_model_is_left_as_it_was():
    net = lived_in(convnet(dropout=0.5))
    silence(net[0], net[1])
    net[1].eval()
    net[6].weight.requires_grad_(False)
    calls = []
    net[2].register_forward_hook(lambda *_: calls.append(1))
    net(IMAGES).sum().backward()
    calls.clear()
    before, modes = weights(net), [module.training for module in net.modules()]
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    hooks = [len(module._forward_hooks) for module in net.modules()]
    random = torch.get_rng_state()
    small = shrink(net, IMAGES)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_weights(before, weights(net))
    assert_same_weights(grads, {name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    for model in (net, small):
        assert [module.training for module in model.modules()] == modes
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["6.weight"]
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    small(IMAGES).sum().backward()
    assert small[0].weight.grad.shape == (10, 2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_stay(dtype):
    net = perceptron(nn.ReLU()).to(dtype)
    silence(net[0])
    small = shrink(net, X.to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert torch.equal(small[0].weight, net[0].weight[[0, 2, 3, 5, 6, 7]])


def test_a_forward_that_runs_in_its_own_type_alone():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron(nn.ReLU())

        def forward(self, x):
            return self.net(x.float())

    net = Single()
    silence(net.net[0])
    small = shrink(net, X)
    assert small.net[0].out_features == 6
    assert_same_outputs(net, small, X)


def test_a_forward_that_draws_random_numbers():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron(nn.ReLU())

        def forward(self, x):
            return self.net(x) + torch.randn(3)

    net = Noisy()
    silence(net.net[0])
    assert shrink(net, X).net[0].out_features == 6


def test_arguments_by_place_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.net = nn.Embedding(5, FEATURES), perceptron(nn.ReLU())

        def forward(self, x, token, *, scale=1.0):
            return {"logits": self.net(x + self.embed(token)) * scale, "aux": [None, scale]}

    net = Two()
    silence(net.net[0])
    token = torch.tensor([0, 1, 2, 3, 4, 0])
    for example in ((X, token), {"x": X, "token": token, "scale": 2.0}):
        small = shrink(net, example)
        assert small.net[0].out_features == 6
        torch.testing.assert_close(outputs(small, X, token)["logits"], outputs(net, X, token)["logits"])


def test_a_module_after_a_real_fit():
    data = Blobs()
    callbacks = trio(prune={"layer": "net.4", "amount": 0.3, "criterion": "magnitude", "guard": False})
    module = Toy()
    trainer = fit(module, BlobsData(data), callbacks)
    pruned = len(callbacks[1].mask.pruned_indices())
    assert pruned > 0
    before = weights(module)
    small = shrink(module, data.x[:16])
    assert small.net[4].out_features == 20 - pruned
    assert_same_outputs(module, small, data.x[:16])
    assert_same_weights(before, weights(module))
    assert module.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = small.trainer
    assert small.dtype == torch.float32
    fit(small, BlobsData(data), max_epochs=1)
    assert small.net[4].out_features == 20 - pruned


def test_a_frozen_model():
    net = perceptron(nn.ReLU()).requires_grad_(False)
    silence(net[0])
    small = shrink(net, X)
    assert small[0].out_features == 6
    assert not any(p.requires_grad for p in small.parameters())


def test_in_inference_mode():
    net = perceptron(nn.ReLU())
    silence(net[0])
    with torch.inference_mode():
        assert shrink(net, X)[0].out_features == 6


# Errors.


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-unlearn\[shrink\]'"):
        shrink(perceptron(), X)


def test_an_example_of_another_kind():
    with pytest.raises(ValueError, match=r"Expected example_input to be a tensor, a tuple .*, but got a list"):
        shrink(perceptron(), [X])


@pytest.mark.parametrize(("x", "what"), [(X * float("nan"), "NaN or infinity"), (torch.zeros(0), "no tensor")])
def test_outputs_that_cannot_be_compared(x, what):
    net = perceptron() if len(x) else Nothing()
    with pytest.raises(ValueError, match=f"finite numbers for example_input, but it returned {what}"):
        shrink(net, x)


class Nothing(nn.Module):
    def forward(self, x):
        return "nothing"


def test_a_model_that_cannot_be_traced():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron()

        def forward(self, x):
            return self.net(x).argmax(1)

    with pytest.raises(ValueError, match=r"Expected a Labels that torch-pruning can trace.*carry no gradient"):
        shrink(Labels(), X)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_copied():
    net = perceptron()
    nn.utils.weight_norm(net[0])
    with pytest.raises(ValueError, match=r"Expected a Sequential that copy\.deepcopy can copy"):
        shrink(net, X)


def test_an_error_of_forward_is_not_hidden():
    with pytest.raises(NotImplementedError):
        shrink(Plain(), X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        shrink(perceptron(), X[:, :3])


# What it costs.


def test_the_costs_of_a_layer_by_hand():
    cost = measure(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 3)), IMAGES, repeats=3)
    assert cost.parameters == 2 * 4 * 9 + 4 + 144 * 3 + 3
    assert cost.macs == 6 * (36 * 4 * 2 * 9 + 144 * 3)
    assert 0 < cost.latency < 1000


def test_a_fused_transformer_layer_is_counted():
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    # In and out projections, attention twice, and the two linear layers, of 5 tokens.
    expected = 5 * 4 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32
    assert measure(net, torch.randn(1, 5, 16), repeats=1).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_measuring_leaves_the_model_as_it_was():
    net = convnet(dropout=0.5)
    net[1].eval()
    before, modes = weights(net), [module.training for module in net.modules()]
    measure(net, IMAGES, repeats=2)
    assert_same_weights(before, weights(net))
    assert [module.training for module in net.modules()] == modes


def test_timed_calls_take_turns():
    calls = []

    class Said(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.layer = name, nn.Linear(1, 1)

        def forward(self, x):
            calls.append(self.name)
            return self.layer(x)

    compare(Said("a"), Said("b"), torch.zeros(1, 1), repeats=5)
    assert calls[:16] == ["a", "b"] * 8


def test_a_table_of_before_and_after():
    net = perceptron(nn.ReLU())
    silence(net[0], neurons=range(4))
    lines = compare(net, shrink(net, X), X, repeats=2).splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    assert lines[1].split() == ["parameters", "163", "83", "-49.1%"]
    assert lines[2].split() == ["MACs", "912", "456", "-50.0%"]
    assert lines[3].startswith("latency / ms")
    assert len({len(line) for line in lines}) == 1


def test_a_cost_reads_well():
    assert str(ModelCost(1234567, 89012, 0.5)) == "1,234,567 parameters, 89,012 MACs, 0.5 ms"


def test_repeats_are_at_least_one():
    with pytest.raises(ValueError, match="repeats to be at least 1, but got 0"):
        measure(perceptron(), X, repeats=0)


# To a file and back.


def shrunk_convnet():
    net = lived_in(convnet())
    silence(net[0], net[1])
    silence(net[6], neurons=[5])
    return shrink(net, IMAGES)


@pytest.mark.parametrize("make", [convnet, separable])
def test_saved_and_loaded(tmp_path, make):
    net = lived_in(make())
    silence(*((net[0], net[1]) if make is convnet else (net[3], net[4])))
    small = shrink(net, IMAGES)
    path = tmp_path / "a" / "b" / "small.pt"
    save_shrunk(small, path)
    fresh = make()
    fresh[0].weight.requires_grad_(False)
    loaded = load_shrunk(fresh, path)
    assert loaded is fresh
    assert_same_weights(weights(small), weights(loaded))
    # str tells the integer attributes.
    assert str(loaded) == str(small)
    assert not loaded[0].weight.requires_grad
    assert torch.equal(outputs(loaded, IMAGES), outputs(small, IMAGES))
    loaded(IMAGES).sum().backward()


def leaves(x):
    return [y for v in x.values() for y in leaves(v)] if isinstance(x, dict) else [x]


def load_without_torch_pruning(folder):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning_unlearn", "torch_pruning")]:
        del sys.modules[name]
    sys.modules["torch_pruning"] = None
    load = importlib.import_module("lightning_unlearn.shrinking").load_shrunk
    content = torch.load("small.pt", weights_only=True)
    assert {type(x) for x in leaves(content)} <= {torch.Tensor, int, str, tuple}, leaves(content)
    net = load(convnet(), "small.pt").eval()
    with torch.no_grad():
        torch.save(net(torch.load("x.pt")), folder / "y.pt")


def test_loaded_in_a_process_without_torch_pruning(tmp_path):
    small = shrunk_convnet()
    save_shrunk(small, tmp_path / "small.pt")
    torch.save(IMAGES, tmp_path / "x.pt")
    done = forked.call(load_without_torch_pruning, tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), outputs(small, IMAGES))


def test_a_module_of_lightning_saved_and_loaded(tmp_path):
    module = Toy()
    silence(module.net[0], module.net[1])
    small = shrink(module, X)
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(Toy(), tmp_path / "small.pt")
    assert isinstance(loaded, L.LightningModule)
    assert torch.equal(outputs(loaded, X), outputs(small, X))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: convnet()[:8], "the model has no '8.weight'"),
        (lambda: nn.Sequential(*convnet(), nn.Linear(4, 4)), "'9.weight' is missing in the file"),
        (perceptron, "the model has no"),
        (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), *convnet()[1:]), r"has shape \(10, 2, 3, 3\)"),
        (lambda: nn.Sequential(nn.Conv1d(2, 12, 3), *convnet()[1:]), r"full model has \(12, 2, 3\)"),
    ],
)
def test_a_file_of_another_model(tmp_path, make, match):
    save_shrunk(shrunk_convnet(), tmp_path / "small.pt")
    net = make()
    before = weights(net)
    with pytest.raises(ValueError, match=match):
        load_shrunk(net, tmp_path / "small.pt")
    assert_same_weights(before, weights(net))


def test_another_file(tmp_path):
    torch.save(convnet().state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="Expected a file that save_shrunk wrote"):
        load_shrunk(convnet(), tmp_path / "other.pt")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def shrunk_file(**changes):
    return {"format": FORMAT, "state": shrunk_convnet().state_dict(), "sizes": {"0": {"out_channels": 12}}} | changes


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: shrunk_file(state=Evil()), "cannot be read as one; check the path, or save it again"),
        (lambda: shrunk_file(state={"0.weight": 3}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(state=None), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes=None), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"forward": 1}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"__class__": 1}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"out_channels": "1"}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": 3}), "to hold tensors and sizes of layers only"),
    ],
)
def test_a_file_that_would_do_more_is_refused(tmp_path, monkeypatch, make, match):
    monkeypatch.chdir(tmp_path)
    torch.save(make(), "bad.pt")
    net = convnet()
    before = weights(net)
    with pytest.raises(ValueError, match=match):
        load_shrunk(net, "bad.pt")
    assert not Path("ran").exists()
    assert_same_weights(before, weights(net))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", pickle.dumps(Evil())])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as one"):
        load_shrunk(convnet(), tmp_path / "bad.pt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file to write, but .* is a folder"):
        save_shrunk(convnet(), tmp_path)
    with pytest.raises(ValueError, match=r"Expected a file to read, but .* is a folder"):
        load_shrunk(convnet(), tmp_path)


def test_a_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"odd": object()}

    with pytest.raises(ValueError, match="Expected a state of tensors, but '_extra_state' is a dict"):
        save_shrunk(Odd(2, 2), tmp_path / "odd.pt")


def test_only_the_layers_that_are_named_are_cut():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:2], layer.bias[:2] = 0, 0
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="shrink left silent neurons in '0'"):
        small = shrink(net, x, layers=["2"])
    assert (small[0].out_features, small[2].out_features) == (6, 4)
    with pytest.raises(ValueError, match="Expected layers to be among the Linears and convolutions of Sequential"):
        shrink(net, x, layers=["1"])
