import pytest
import torch
from torch import nn

from lightning_unlearn import shrink
from tests.shrinking.nets import IMAGES, X, assert_same_outputs, assert_whole, lived_in, perceptron, silence, size
from tests.toys import FEATURES


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
    with pytest.warns(UserWarning, match="kept pruned neurons in '0'"):
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
    assert_whole(net, X, match="kept pruned neurons in '2'")


def test_sizes_written_into_forward_keep_a_layer_whole_and_let_others_go():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.body, self.head = nn.Conv2d(2, 6, 3), nn.Linear(216, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(self.conv(x).relu().view(-1, 6 * 36)).relu())

    net = View()
    silence(net.conv, net.body)
    with pytest.warns(UserWarning, match="kept pruned neurons in 'conv'"):
        small = shrink(net, IMAGES)
    assert small.conv.out_channels == 6
    assert small.body.out_features == small.head.in_features == 6
    assert_same_outputs(net, small, IMAGES)


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    silence(net[0], net[2])
    with pytest.warns(UserWarning, match="kept pruned"):
        small = shrink(net, torch.randn(5, 8))
    assert small[0].weight is small[2].weight
    assert size(small) == size(net)


def test_a_parametrized_layer_stays():
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
