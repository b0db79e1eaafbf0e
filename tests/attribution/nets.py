"""Models and batches of the tests of attribution."""

import torch
from captum.attr import (
    InternalInfluence,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import nn
from torch.nn import functional as F

from lightning_unlearn.attribution import record_activation, resolve_layer
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional import runner_up_class

C = 4


class ConvNet(nn.Module):
    """Convolution, in-place ReLU, pooling, two Linears; ``unused`` is never called, ``shared`` twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.hidden = nn.Linear(5 * 4, 6)
        self.shared = nn.Linear(6, 6)
        self.fc = nn.Linear(6, C)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.relu_(self.hidden(F.max_pool2d(x, 2).flatten(1)))
        return self.fc(self.shared(F.gelu(self.shared(x))))


class ResNetLike(nn.Module):
    """The head reads a sum that is made in place; the next norm reads it too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.block = nn.Conv2d(5, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, C)

    def forward(self, x):
        stem = self.stem(x)
        out = self.block(F.relu(stem))
        out += stem
        return self.fc(F.relu(self.norm(out)).mean(dim=(2, 3)))


class TokenNet(nn.Module):
    """Tokens (B, T, D), as in a ViT."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Linear(6, 6)
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = tokens + F.gelu(self.mlp(self.norm(tokens)))
        return self.fc(tokens.mean(dim=1))


IMAGES = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(7) % C
POINTS = [
    (ConvNet, LayerPoint("conv")),
    (ConvNet, LayerPoint("conv", "input")),
    (ConvNet, LayerPoint("norm")),
    (ConvNet, LayerPoint("hidden")),
    (ConvNet, LayerPoint("hidden", "input")),
    (ConvNet, LayerPoint("fc", "input")),
    (ConvNet, LayerPoint("fc")),
    (ResNetLike, LayerPoint("block")),
    (ResNetLike, LayerPoint("fc", "input")),
    (TokenNet, LayerPoint("mlp")),
    (TokenNet, LayerPoint("mlp", "input")),
    (TokenNet, LayerPoint("patch")),
    (TokenNet, LayerPoint("fc", "input")),
]


def make(net):
    torch.manual_seed(3)
    model = net()
    model(IMAGES)  # running statistics of the norms
    return model.eval()


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def captum_per_class(model, point, multiply):
    """(C, B, ...): Captum, called once per class."""
    method = LayerGradientXActivation(model, resolve_layer(model, point.name), multiply_by_inputs=multiply)
    at_input = point.at == "input"
    return torch.stack(
        [method.attribute(IMAGES.clone(), target=c, attribute_to_layer_input=at_input) for c in range(C)]
    ).detach()


def naive_margin(model, point):
    """The margin's attribution is that of the label's logit minus that of the rival's."""
    per_class, rows = captum_per_class(model, point, multiply=True), torch.arange(len(LABEL))
    return per_class[LABEL, rows] - per_class[runner_up_class(model(IMAGES), LABEL), rows]


def naive_class_max(model, point):
    """Positions are summed per neuron; the neuron is in dimension 1 of images, in the last one of tokens."""
    gradients = captum_per_class(model, point, multiply=False)
    # A product that Captum makes with gradient 1 is the activation.
    with record_activation(model, point) as take:
        model(IMAGES)
        activation = take()
    product = gradients.max(dim=0).values * activation
    if product.ndim == 3:
        return product.sum(dim=1).abs()
    return product.flatten(2).sum(dim=2).abs() if product.ndim == 4 else product.abs()


def attribute_all(attributor, x=IMAGES):
    return attributor.margin(x, LABEL).per_neuron, attributor.class_max(x, LABEL, C)


class Plain(nn.Module):
    """Every activation is a module and called once, as DeepLift needs it; one works in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(5 * 4, 6)
        self.act2 = nn.ReLU()
        self.fc = nn.Linear(6, C)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.fc(self.act2(self.hidden(x.flatten(1))))


CAPTUM = {
    "integrated_gradients": (LayerIntegratedGradients, {"n_steps": 16}),
    "conductance": (LayerConductance, {"n_steps": 16}),
    "internal_influence": (InternalInfluence, {"n_steps": 16}),
    "deeplift": (LayerDeepLift, {}),
}


def short_of_memory(function, most, message="CUDA out of memory. Tried to allocate 2 GiB"):
    """The function, for as many rows; ``sizes`` of the batches it was called with."""
    sizes = []

    def limited(x):
        first = x
        while not isinstance(first, torch.Tensor):
            first = next(iter(first.values())) if isinstance(first, dict) else first[0]
        sizes.append(len(first))
        if len(first) > most:
            raise RuntimeError(message)
        return function(x)

    return limited, sizes
