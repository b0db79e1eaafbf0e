"""Models of the tests of shrinking, and what is compared."""

import pytest
import torch
from torch import nn

from lightning_unlearn import shrink
from tests.toys import FEATURES, Residual, assert_same_weights, weights

X = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))


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


def assert_whole(model, x, match="kept pruned neurons in"):
    with pytest.warns(UserWarning, match=match):
        small = shrink(model, x)
    assert_same_weights(weights(model), weights(small))
    assert small is not model


def perceptron(*after, hidden=8):
    return nn.Sequential(nn.Linear(FEATURES, hidden), *after, nn.Linear(hidden, 3))


def residual():
    net = Residual()
    # So that nothing of the stream is dead by chance.
    nn.init.constant_(net.stem.bias, 1.0)
    return net


def separable():
    return lived_in(
        nn.Sequential(
            *(nn.Conv2d(2, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(216, 3)),
        )
    )
