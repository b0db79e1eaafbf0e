import copy

import pytest
import torch
from torch import nn

from lightning_unlearn.attribution import ATTRIBUTION_METHODS, Attributor, resolve_layer
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional import runner_up_class
from tests.attribution.nets import CAPTUM, IMAGES, LABEL, C, Plain, hooks_of, make

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
    rival = runner_up_class(model(IMAGES), LABEL)
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
        f"float tensor, or a tuple or dict .*, since attribution_method='{method}' .* but got {got}; use 'gradient_x_"
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


@pytest.mark.parametrize(
    ("method", "hint"),
    [("deep_lift", r" Did you mean 'deeplift'\?"), ("zzz", ""), ("Conductance", r" Did you mean 'conductance'\?")],
)
def test_an_unknown_method_is_refused_at_once(method, hint):
    model = make(Plain)
    names = ".*".join(ATTRIBUTION_METHODS)
    with pytest.raises(ValueError, match=f"{names}.*but got '{method}'\\.{hint}$"):
        Attributor(model, LayerPoint("hidden"), model, method)
