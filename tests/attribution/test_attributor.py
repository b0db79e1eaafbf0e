import copy
import gc

import pytest
import torch
from torch import nn

from lightning_unlearn.attribution import Attributor
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional import label_margin
from tests.attribution.nets import (
    IMAGES,
    LABEL,
    POINTS,
    C,
    ConvNet,
    attribute_all,
    hooks_of,
    make,
    naive_class_max,
    naive_margin,
)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "captum"])
@pytest.mark.parametrize(("net", "point"), POINTS, ids=str)
def test_margin_is_what_captum_says_of_the_two_classes(net, point, fast):
    model = make(net)
    attributor = Attributor(model, point, model, fast=fast)
    found = attributor.margin(IMAGES, LABEL)
    assert attributor._is_fast is fast
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
