import pytest
import torch
from torch import nn

from lightning_unlearn import shrink
from lightning_unlearn.shrinking import ModelCost, compare, measure
from tests.shrinking.nets import IMAGES, X, perceptron, silence
from tests.toys import assert_same_weights, convnet, weights


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
