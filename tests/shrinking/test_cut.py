import sys
import warnings
from itertools import pairwise

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn import shrink
from tests.shrinking.nets import (
    IMAGES,
    X,
    assert_same_outputs,
    assert_whole,
    lived_in,
    outputs,
    perceptron,
    residual,
    separable,
    silence,
    size,
)
from tests.toys import FEATURES, Blobs, BlobsData, Plain, Toy, assert_same_weights, convnet, fit, weights
from tests.toys import quick_trio as trio


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
    with pytest.warns(UserWarning, match="kept pruned neurons in '0'"):
        small = shrink(net, X)
    assert small[0].out_features == 1
    assert_same_outputs(net, small, X)


def test_a_residual_stream_is_cut_where_all_that_add_to_it_are_silent():
    net = residual()
    silence(net.stem, neurons=[0, 1, 2])
    silence(net.block, neurons=[1, 2, 3])
    with pytest.warns(UserWarning, match="kept pruned neurons in 'stem', 'block'"):
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
    callbacks = trio(prune={"layer": "net.4", "amount": 0.3, "criterion": "magnitude", "max_val_drop": None})
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


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
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


def test_only_the_layers_that_are_named_are_cut():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[:2], layer.bias[:2] = 0, 0
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="shrink kept pruned neurons in '0'"):
        small = shrink(net, x, layers=["2"])
    assert (small[0].out_features, small[2].out_features) == (6, 4)
    with pytest.raises(ValueError, match="Expected layers to be among the Linears and convolutions of Sequential"):
        shrink(net, x, layers=["1"])
