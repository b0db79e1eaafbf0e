import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_unlearn.attribution import (
    Attributor,
    named_layers,
    neuron_count,
    neuron_dimension,
    neuron_means,
    record_activation,
    resolve_layer,
    response,
    trace_forward,
)
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import ConvNet, make


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
        lambda: record_activation(model, LayerPoint("hiden")).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"module of ConvNet, but got 'hiden'. The nearest names are: hidden"):
            build()
    with pytest.raises(ValueError, match="The nearest names are: conv, norm, act, hidden, shared, fc, unused"):
        resolve_layer(model, "zzzzzzz")
    with pytest.raises(ValueError, match="The nearest names are: none, it has no submodules"):
        resolve_layer(nn.ReLU(), "fc")
    with pytest.raises(ValueError, match="but got ''"):
        resolve_layer(model, "")


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


def test_what_is_the_same_in_every_place_has_no_spread():
    value = 1000 * torch.rand(4, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    found = response(nn.Sequential(nn.Conv2d(3, 5, 1)), LayerPoint("0"), value.expand(4, 5, 7, 3))
    assert found[:, 1].tolist() == [0.0] * 4
    torch.testing.assert_close(found[:, 0], value.flatten(1).norm(dim=1))


def test_response_of_a_layer_without_positions_is_one_norm():
    activation = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    found = response(nn.Sequential(nn.Linear(3, 2)), LayerPoint("0"), activation)
    assert found.tolist() == [[5.0], [2.0]]


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
