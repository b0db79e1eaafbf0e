import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.attribution import loss_gradients
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.pruning.criteria import CRITERIA, Random, Sensitivity
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.callbacks.test_leaves_model_as_found import hooks_of
from tests.toys import Blobs, BlobsData, Toy, convnet, fit, mlp

GRADIENTS = ("taylor", "hessian")
STATISTICS = {
    "mean_abs_ratio": lambda a: np.abs(a).mean(axis=0),
    "rms_ratio": lambda a: np.sqrt((a**2).mean(axis=0)),
    "std_ratio": lambda a: a.std(axis=0),
    "frequency_ratio": lambda a: (a > 0).mean(axis=0),
    "taylor": lambda a: np.abs(a.mean(axis=0)),
    "hessian": lambda a: (a**2).mean(axis=0),
}


def still(module):
    return torch.optim.SGD(module.parameters(), lr=0.0)


def by_hand(module, layer, at, x, y):
    """Activations (N, D, ...) and gradients of each sample's loss, one sample and one backward pass at a time."""
    activations, gradients = [], []
    part = module.get_submodule(layer)

    def keep(value):
        value.retain_grad()
        activations.append(value)

    if at == "output":
        handle = part.register_forward_hook(lambda _, __, output: keep(output))
    else:
        handle = part.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    for i in range(len(x)):
        cross_entropy(module(x[i : i + 1]), y[i : i + 1]).backward()
        gradients.append(activations[-1].grad)
    handle.remove()
    module.zero_grad()
    return torch.cat(activations).detach(), torch.cat(gradients)


class NotInPlace(nn.Module):
    """The convolutional toy, without functions in place, so that gradients can be retained."""

    def __init__(self):
        super().__init__()
        self.net = convnet()
        self.net[2] = nn.ReLU()
        self.net[7] = nn.ReLU()

    def forward(self, x):
        return self.net(x)


def run(criterion, layer, image=True, size=101, **arguments):
    data = Blobs(size, image=image)
    probability = torch.rand(size, generator=torch.Generator().manual_seed(1))
    module = Toy(NotInPlace if image else mlp, still)
    # So that the norms' statistics are not those of a fit.
    callback = SensitivityPruneCallback(layer, criterion=criterion, amount=0.3, max_val_drop=None, **arguments)
    untouched = Toy(NotInPlace if image else mlp, still)

    class Remembers(Published):
        def get_partition(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not callback.has_result:
                untouched.load_state_dict(pl_module.state_dict())
            return super().get_partition(trainer, pl_module)

    published = Remembers(make_partition(probability, data.y))
    fit(module, BlobsData(data), [published, callback], max_epochs=2)
    return callback, untouched.eval(), data, probability >= 0.5


@pytest.mark.parametrize("criterion", STATISTICS)
@pytest.mark.parametrize("layer", ["net.net.0", "net.net.6", None])
def test_a_ratio_is_that_of_the_samples_one_by_one(criterion, layer):
    callback, module, data, is_clean = run(criterion, layer)
    a, g = by_hand(module, layer or "net.net.8", "output" if layer else "input", data.x, data.y)
    a, g = (v.flatten(2).movedim(2, 1).double().numpy() if v.ndim == 4 else v[:, None].double().numpy() for v in (a, g))
    # Of gradient x activation, a sample has one number: what it loses where all positions are silent.
    rows = (a * g).sum(axis=1, keepdims=True) if criterion in GRADIENTS else a
    above, below = (STATISTICS[criterion](rows[mask.numpy()].reshape(-1, a.shape[2])) for mask in (~is_clean, is_clean))
    used = below > 0
    # What only suspects use comes first, what nobody uses last.
    expected = torch.where(torch.from_numpy(above > 0), 1e4, 0.0)
    expected[torch.from_numpy(used)] = torch.from_numpy(above[used] / below[used]).float()
    torch.testing.assert_close(callback.sensitivity[used], expected[used], rtol=1e-3, atol=1e-5)
    live = torch.from_numpy(a.reshape(-1, a.shape[2]).std(axis=0) > 1e-6)
    count = int(0.3 * live.sum())
    worst = torch.where(live, expected, -1).argsort(descending=True)[:count]
    assert count >= 3
    assert set(callback.mask.pruned_indices().tolist()) == set(worst.tolist())
    assert callback.mask.standard_error is None


@pytest.mark.parametrize(("layer", "parameter"), [("net.net.0", "net.net.0.weight"), (None, "net.net.6.weight")])
def test_magnitude_prunes_the_smallest_rows(layer, parameter):
    callback, module, data, _ = run("magnitude", layer)
    norms = module.get_parameter(parameter).detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(callback.sensitivity, -norms)
    activation, _ = by_hand(module, layer or "net.net.8", "output" if layer else "input", data.x, data.y)
    live = activation.flatten(2).mean(dim=2).std(dim=0) > 0 if layer else activation.std(dim=0) > 0
    smallest = torch.where(live, norms, torch.inf).argsort()[: int(0.3 * live.sum())]
    assert set(callback.mask.pruned_indices().tolist()) == set(smallest.tolist())
    assert len(smallest) >= 3


def test_random_depends_on_the_seed_alone():
    pruned = [run(Random(seed), "net.4", image=False)[0].mask.pruned_indices().tolist() for seed in (0, 0, 1)]
    assert pruned[0] == pruned[1] != pruned[2]
    assert len(pruned[0]) == 6


def test_random_draws_for_each_layer_by_itself():
    def net():
        return nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))

    data = Blobs(101)
    half = torch.arange(101) % 2
    callback = SensitivityPruneCallback(["net.0", "net.2"], criterion="random", amount=0.5, max_val_drop=None)
    published = Published(*(make_partition(half * 0.8, data.y, epoch) for epoch in (1, 2)))
    fit(Toy(net, still), BlobsData(data), [published, callback], max_epochs=2)
    first, second = callback.masks
    assert (len(first.pruned_indices()), len(second.pruned_indices())) == (10, 10)
    assert not first.keep.equal(second.keep)
    # The draw of a layer does not depend on which others are pruned.
    alone = SensitivityPruneCallback("net.2", criterion="random", amount=0.5, max_val_drop=None)
    fit(Toy(net, still), BlobsData(data), [published, alone], max_epochs=2)
    assert alone.mask.keep.equal(second.keep)


@pytest.mark.parametrize("criterion", [*list(CRITERIA)[1:], Sensitivity(fdr_level=None)])
def test_every_criterion_works_on_several_layers_at_once(criterion):
    callback, module, _, _ = run(criterion, ["net.0", "net.4"], image=False)
    assert [mask.layer for mask in callback.masks] == ["net.0", "net.4"]
    for layer, mask in zip(("net.0", "net.4"), callback.masks, strict=True):
        alone = run(criterion, layer, image=False)[0].mask
        torch.testing.assert_close(mask.sensitivity, alone.sensitivity)
        assert mask.keep.equal(alone.keep)
        assert len(mask.pruned_indices()) > 0
    assert not any(hooks_of(module).values())


@pytest.mark.parametrize("fdr_level", [0.05, 1e-9])
def test_the_papers_regression_knows_no_test_no_sign_and_no_ridge(fdr_level):
    data = PlantedData()
    callback = SensitivityPruneCallback("fc", amount=0.3, max_val_drop=None, criterion=Sensitivity(fdr_level))
    partition = make_partition(data.probability(), data.y)
    fit(Planted(), data, [callback, Published(partition, soft=False)], max_epochs=2)
    x, y = data.x[:, :7].double(), partition.is_clean.double()
    x, y = ((v - v.mean(dim=0)) / v.std(dim=0, correction=0) for v in (x, y))
    expected = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(callback.sensitivity[:7], expected.float(), rtol=1e-4, atol=1e-5)
    assert set(callback.mask.pruned_indices().tolist()) == set(expected.abs().argsort()[-2:].tolist())
    assert (expected[callback.mask.pruned_indices()] > 0).any()  # one that is active for clean samples


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"criterion": "talyor"}, "Expected criterion to be one of 'sensitivity', .*Did you mean 'taylor'?"),
        ({"criterion": "xyz"}, r"but got 'xyz'\.$"),
        ({"criterion": Sensitivity}, r"Expected criterion to be one of 'sensitivity', .*, but got <class"),
        ({"max_val_drop": -0.1}, "Expected max_val_drop to be at least 0, or None for no guard, but got -0.1"),
        ({"layer": []}, r"Expected layer to name at least one layer, and each once, but got \[\]"),
        ({"layer": ["a", "b", "a"]}, "each of the dotted paths of layers once"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        SensitivityPruneCallback(**arguments)


# Gradients at a layer


@pytest.mark.parametrize("net", [NotInPlace, convnet])
def test_gradients_are_those_of_the_samples_one_by_one(net):
    torch.manual_seed(0)
    model = Toy(NotInPlace).eval()
    data = Blobs(20, image=True)
    prefix = "net.net" if net is NotInPlace else "net"
    points = [LayerPoint(f"{prefix}.0"), LayerPoint(f"{prefix}.6"), LayerPoint(f"{prefix}.8", "input")]
    # With functions in place, the same numbers.
    other = Toy(net).eval()
    other.load_state_dict({name.replace("net.net", prefix): v for name, v in model.state_dict().items()})
    found = loss_gradients(other, points, other, data.x, data.y)
    for (activation, gradient), layer, at in zip(
        found, ("net.net.0", "net.net.6", "net.net.8"), ("output", "output", "input"), strict=True
    ):
        a, g = by_hand(model, layer, at, data.x, data.y)
        torch.testing.assert_close(activation, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, g, rtol=1e-4, atol=1e-7)
        assert not activation.requires_grad
    assert all(p.grad is None for p in other.parameters())
    assert not any(hooks_of(other).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_nothing_is_recorded_or_all_is_frozen(mode):
    model, data = Toy(mlp).eval().requires_grad_(False), Blobs(20)
    free = Toy(mlp).eval()
    point = [LayerPoint("net.4")]
    with mode():
        found = loss_gradients(model, point, model, data.x, data.y)[0]
    expected = loss_gradients(free, point, free, data.x, data.y)[0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_agree_with_finite_differences():
    model, data = Toy(mlp).eval().double(), Blobs(6)
    x = data.x.double()
    ((activation, gradient),) = loss_gradients(model, [LayerPoint("net.4")], model, x, data.y)
    bias, step = model.net[4].bias, 1e-6
    for neuron in (0, 7, 19):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[neuron] += sign * step
                losses.append(cross_entropy(model(x), data.y, reduction="sum").item())
                bias[neuron] -= sign * step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[:, neuron].sum().item(), abs=1e-6)
    assert activation.shape == gradient.shape == (6, 20)


class Twice(nn.Module):
    def __init__(self, records=True):
        super().__init__()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.records = records

    def forward(self, x):
        with torch.set_grad_enabled(self.records):
            return self.head(self.fc(self.fc(x)))


def test_gradients_that_cannot_be_had_are_refused():
    data = Blobs(6)
    twice, silent = Twice().eval(), Twice(records=False).eval()
    with pytest.raises(ValueError, match="Expected layer 'fc' to be called once in a forward pass, but it was 2"):
        loss_gradients(twice, [LayerPoint("fc")], twice, data.x, data.y)
    with pytest.raises(ValueError, match="Expected a forward that can be differentiated"):
        loss_gradients(silent, [LayerPoint("head", "input")], silent, data.x, data.y)
    assert not any(hooks_of(twice).values())
    assert not any(hooks_of(silent).values())


@pytest.mark.parametrize("criterion", [Sensitivity(fdr_level=None), "mean_abs_ratio"])
def test_copies_of_a_sample_are_one_sample_where_neurons_are_ranked(criterion):
    def net():
        return nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4))

    def ranked(copies):
        data = Blobs(101)
        probability = torch.rand(101, generator=torch.Generator().manual_seed(1))
        data.x, data.y, probability = (
            torch.cat([value, value[3:4].repeat_interleave(copies, dim=0)]) for value in (data.x, data.y, probability)
        )
        published = Published(make_partition(probability, data.y))
        published.sample_weight = torch.ones(101 + copies)
        published.sample_weight[[3, *range(101, 101 + copies)]] = 1 / (1 + copies)
        callback = SensitivityPruneCallback("net.0", criterion=criterion, amount=0.3, max_val_drop=None)
        fit(Toy(net, still), BlobsData(data), [published, callback], max_epochs=2)
        return callback.mask

    torch.manual_seed(0)
    one = ranked(0)
    torch.manual_seed(0)
    many = ranked(80)
    torch.testing.assert_close(many.sensitivity, one.sensitivity, rtol=1e-4, atol=1e-6)
    assert many.keep.equal(one.keep)
