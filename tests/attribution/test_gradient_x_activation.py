import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_unlearn.attribution import Attributor, gradient_x_activation
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import IMAGES, LABEL, C, ConvNet, make, naive_class_max, naive_margin


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
    with torch.no_grad(), pytest.warns(UserWarning, match="Using full backpropagation"):
        found = attributor.attribute(x, LABEL, rows=True)
    assert attributor._is_fast is False
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


@pytest.mark.parametrize("elements", [1, 2 * 7 * 6, 10**9], ids=["one by one", "two at a time", "all at once"])
def test_many_classes_are_taken_in_turns(monkeypatch, elements):
    monkeypatch.setattr(gradient_x_activation, "_GRADIENT_ELEMENTS", elements)
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


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_fast_path_is_taken_where_all_ranks_agree(everywhere):
    model, point, asked = make(ConvNet), LayerPoint("hidden"), []
    attributor = Attributor(model, point, model, agree=lambda here: asked.append(here) or everywhere)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attributor.margin(IMAGES, LABEL)
    assert asked == [True]
    assert attributor._is_fast is everywhere
    torch.testing.assert_close(found.per_neuron, Attributor(model, point, model).margin(IMAGES, LABEL).per_neuron)
