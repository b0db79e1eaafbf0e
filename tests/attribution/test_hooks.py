import pytest
import torch
from torch import nn

from lightning_unlearn.attribution import ATTRIBUTION_METHODS, Attributor, record_activation, trace_forward
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import IMAGES, LABEL, C, ConvNet, Plain, hooks_of, make


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
            with record_activation(model, LayerPoint("hidden")):
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


@pytest.mark.parametrize(
    ("method", "fast"), [("gradient_x_activation", True), *((method, False) for method in ATTRIBUTION_METHODS)]
)
def test_tap_and_watch_read_other_layers_in_the_same_pass(method, fast):
    torch.manual_seed(0)
    model = make(Plain)
    watch = (LayerPoint("conv"), LayerPoint("fc", "input"))
    attributor = Attributor(model, LayerPoint("hidden"), model, method, fast=fast, watch=watch)
    with record_activation(model, watch[0]) as take, record_activation(model, watch[1]) as take_input:
        model(IMAGES)
        expected = take(), take_input()
        for _ in range(2):
            watched = attributor.attribute(IMAGES, LABEL, rows=True).watched
            torch.testing.assert_close((take(), take_input()), expected)
            torch.testing.assert_close(watched, expected)
    assert hooks_of(model) == 0


def test_tap_hands_over_each_pass_once():
    model = make(ConvNet)
    with (
        record_activation(model, LayerPoint("fc", "input")) as take,
        record_activation(model, LayerPoint("fc")) as take_logits,
    ):
        for x in (IMAGES, IMAGES[:2]):
            logits = model(x)
            torch.testing.assert_close(take_logits(), logits)
            torch.testing.assert_close(model.fc(take()), logits)
            take(), take_logits()  # of the call just made
    assert hooks_of(model) == 0


def test_tap_reads_the_layer_before_a_function_in_place():
    model = make(ConvNet)
    with record_activation(model, LayerPoint("norm")) as take:
        model(IMAGES)
        activation = take()
    torch.testing.assert_close(activation, model.norm(model.conv(IMAGES)).detach())
    assert activation.min() < 0
    assert not activation.requires_grad


def test_tap_says_how_often_the_layer_was_called():
    model = make(ConvNet)
    with record_activation(model, LayerPoint("shared")) as take:
        with pytest.raises(ValueError, match=r"Expected layer 'shared' to be called once .* but it was 0"):
            take()
        model(IMAGES)
        with pytest.raises(ValueError, match=r"Expected layer 'shared' to be called once .* but it was 2"):
            take()
