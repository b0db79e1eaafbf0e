import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_unlearn.attribution import Attributor, loss_gradients
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import C


class Checkpointed(nn.Module):
    """Computes its middle a second time in the backward pass, or not at all."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Linear(6, 12)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, C)

    def forward(self, x):
        def rest(h):
            return self.head(self.body(h))

        x = self.stem(x)
        return rest(x) if self.use_reentrant is None else checkpoint(rest, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("point", [LayerPoint("head", "input"), LayerPoint("body.1"), LayerPoint("stem")], ids=str)
def test_activation_checkpointing_changes_nothing(use_reentrant, point):
    x, label = torch.randn(7, 6), torch.arange(7) % C
    models = [Checkpointed(kind).eval() for kind in (None, use_reentrant)]
    models[1].load_state_dict(models[0].state_dict())
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = dict(vars(torch.utils.checkpoint))
    assert all(name in before for name in names)
    for method in ("gradient_x_activation", "integrated_gradients", "deeplift"):
        plain, found = (Attributor(model, point, model, method).attribute(x, label, rows=True) for model in models)
        torch.testing.assert_close(found.per_neuron, plain.per_neuron)
        torch.testing.assert_close(found.class_max, plain.class_max)
    (plain,), (found,) = (loss_gradients(model, [point], model, x, label) for model in models)
    torch.testing.assert_close(found, plain)
    assert plain[1].abs().sum() > 0
    assert dict(vars(torch.utils.checkpoint)) == before


class Unrecorded(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, C)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Using full backpropagation")
@pytest.mark.parametrize("method", ["gradient_x_activation", "integrated_gradients", "conductance"])
def test_a_layer_that_no_gradient_reaches_is_refused(method):
    model, x, label = Unrecorded().eval(), torch.randn(7, 6), torch.arange(7) % C
    refused = pytest.raises(ValueError, match=r"gradients of the logits to reach layer .backbone\.0., but forward does")
    with refused:
        Attributor(model, LayerPoint("backbone.0"), model, method).attribute(x, label)
    with refused:
        loss_gradients(model, [LayerPoint("backbone.0")], model, x, label)
    assert Attributor(model, LayerPoint("head", "input"), model, method).attribute(x, label).logits.shape == (7, C)
