import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_unlearn.attribution import check_reached, record_activation, response, trace_forward
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import IMAGES, C, ConvNet, ResNetLike, TokenNet, hooks_of, make


def traced(net):
    model = make(net)
    return trace_forward(model, model, IMAGES)


def test_trace_records_calls_in_the_order_of_entry():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, C))
    trace = trace_forward(model, model, torch.randn(5, 2))
    assert [call.name for call in trace.calls] == ["0", "0.0", "0.1", "1"]
    assert trace.output.shape == (5, C)
    assert not trace.output.requires_grad
    assert hooks_of(model) == 0


def test_last_linear_is_the_last_that_is_called():
    assert (
        traced(ConvNet).last_linear(traced(ConvNet).output.shape[1]) == "fc"
    )  # "unused" comes later in the model, but is not called


def test_a_model_without_linear_is_refused():
    model = nn.Sequential(nn.Conv2d(2, C, 6), nn.Flatten())
    with pytest.raises(ValueError, match=r"calls a torch.nn.Linear with 3 outputs, .* name the layer with layer='...'"):
        trace_forward(model, model, IMAGES).last_linear(3)


def test_linear_refuses_another_layer():
    assert traced(ConvNet).linear("fc").out_features == C
    with pytest.raises(TypeError, match="Expected 'conv' to be a Linear, but it is a Conv2d"):
        traced(ConvNet).linear("conv")


def test_feeder_is_the_nearest_layer_of_matching_size():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, C))
    assert trace_forward(model, model, IMAGES).producer_of("4") == "0"
    assert traced(ConvNet).producer_of("fc") == "shared"
    assert traced(ConvNet).producer_of("hidden") is None  # 5 channels, 20 inputs
    first = nn.Sequential(nn.Flatten(), nn.Linear(72, C))
    assert trace_forward(first, first, IMAGES).producer_of("1") is None


def test_norm_after_takes_the_output_directly():
    assert traced(ConvNet).norm_after("conv") == "norm"
    assert traced(ConvNet).norm_after("hidden") is None


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_norm_after_a_function_is_not_direct(between):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), between, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, C))
    assert trace_forward(model, model, IMAGES).norm_after("0") is None


def test_norm_of_a_residual_sum_made_in_place_is_not_the_blocks_own():
    assert traced(ResNetLike).norm_after("block") is None


def test_modules_before_leaves_out_those_that_contain_the_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, C)))
    trace = trace_forward(model, model, torch.randn(5, 2))
    assert trace.modules_before("1.1") == ["0", "0.0", "0.1", "1.0"]
    assert trace.modules_before("0") == []


def test_a_layer_that_is_not_reached_is_refused():
    with pytest.raises(ValueError, match=r"'unused' exists but is never reached in forward.*Layers that are reached: "):
        check_reached(traced(ConvNet), LayerPoint("unused"))


def test_a_layer_that_is_called_twice_is_refused():
    trace = traced(ConvNet)
    assert len(trace.calls_of("shared")) == 2
    with pytest.raises(ValueError, match=r"'shared' is called 2 times in one forward pass, .* name a layer that is"):
        check_reached(trace, LayerPoint("shared"))
    check_reached(trace, LayerPoint("fc", "input"))


class Text(nn.Module):
    """Tokens that are embedded, then a Linear for each, or one for their mean."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.embedding = nn.Embedding(9, 5)
        self.body = nn.Linear(5, 6)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.embedding(x)
        x = self.body(x.mean(dim=1) if self.pooled else x).relu()
        return self.fc(x if self.pooled else x.mean(dim=1))


class Repeated(nn.Module):
    """Convolutions and a Linear, called in the order of their names."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.a, self.b = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(72, C)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x).relu()
        return self.fc(x.flatten(1))


class Frames(nn.Module):
    """The rows that the convolutions see are frames, of which a sample has two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.b(self.a(x.reshape(-1, 1, 6, 6)).relu()).mean(dim=(2, 3))
        return self.fc(x.reshape(-1, 6))


def blocks(*layers):
    return nn.Sequential(*layers)


def one_rows(trace, point):
    (call,) = trace.calls_of(point.name)
    return len(call.output if point.at == "output" else call.inputs[0])


@pytest.mark.parametrize(
    ("model", "x", "point"),
    [
        (
            blocks(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 2), nn.Flatten()),
            IMAGES,
            LayerPoint("4", "input"),
        ),
        (ResNetLike(), IMAGES, LayerPoint("block", "input")),
        (ConvNet(), IMAGES, LayerPoint("conv")),  # the next layer is a Linear
        (TokenNet(), IMAGES, LayerPoint("patch")),
        (blocks(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, C)), IMAGES, LayerPoint("1")),
        (blocks(nn.Flatten(), nn.Linear(72, C)), IMAGES, LayerPoint("1")),
        (Text(pooled=False), torch.arange(28).reshape(7, 4) % 9, LayerPoint("body")),
        (Text(pooled=True), torch.arange(28).reshape(7, 4) % 9, LayerPoint("body")),
        (Repeated("ab"), IMAGES, LayerPoint("b", "input")),
        (Repeated("abb"), IMAGES, LayerPoint("a")),
        (Repeated("aa"), IMAGES, None),
        (Repeated("aba"), IMAGES, LayerPoint("b", "input")),
        (Frames(), IMAGES, None),
        (blocks(nn.Flatten(), nn.ReLU()), IMAGES, None),
    ],
    ids=[
        "convolutions",
        "resnet",
        "one convolution",
        "tokens",
        "mlp",
        "one linear",
        "text",
        "pooled text",
        "two",
        "the second twice",
        "the first twice",
        "the first again later",
        "frames",
        "no layer",
    ],
)
def test_first_block(model, x, point):
    model.eval()
    trace = trace_forward(model, model, x)
    assert next((one for one in trace.first_blocks(len(x)) if len(x) == one_rows(trace, one)), None) == point
    if point is not None:
        with record_activation(model, point) as take, torch.no_grad():
            model(x)
            assert response(model, point, take()).shape[0] == len(x)


def test_first_block_reads_what_the_first_block_made():
    model = make(ResNetLike)
    point = trace_forward(model, model, IMAGES).first_blocks(len(IMAGES))[0]
    with record_activation(model, point) as take, torch.no_grad():
        model(IMAGES)
        torch.testing.assert_close(take(), F.relu(model.stem(IMAGES)))


class Logits(nn.Module):
    """A head, and what is done with its output."""

    def __init__(self, after):
        super().__init__()
        self.after = after
        self.body = nn.Linear(3, C)
        self.fc = nn.Linear(C, C)
        self.unused = nn.Linear(C, C)

    def forward(self, x):
        return self.after(self, self.fc(self.body(x)))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda model, out: out, True),
        (lambda model, out: out.view(5, C), True),
        (lambda model, out: out.double(), True),
        # Zero now, and something else once it is trained.
        (lambda model, out: out + torch.zeros(C), False),
        (lambda model, out: out.log_softmax(dim=1), False),
        (lambda model, out: out / 2, False),
        (lambda model, out: out.div_(2), False),
        (lambda model, out: out[:, :2], False),
        (lambda model, out: model.fc(out), False),
        (lambda model, out: model.body(torch.zeros(len(out), 3)), False),
    ],
    ids=[
        "as it is",
        "viewed",
        "cast",
        "added to",
        "log-softmax",
        "scaled",
        "scaled in place",
        "cut",
        "called twice",
        "another's",
    ],
)
@pytest.mark.parametrize("broken", [0, 2], ids=["", "two samples are NaN"])
def test_makes_logits(after, expected, broken):
    torch.manual_seed(0)
    model = Logits(after)
    x = torch.randn(5, 3)
    x[:broken] = torch.nan
    trace = trace_forward(model, model, x)
    assert trace.makes_logits("fc") is expected
    assert not trace.makes_logits("unused")
    assert not trace.makes_logits("body")


def test_what_a_cast_makes_of_logits_cannot_be_told_from_nan_alone():
    model = Logits(lambda model, out: out.double())
    trace = trace_forward(model, model, torch.full((5, 3), torch.nan))
    assert not trace.makes_logits("fc")
