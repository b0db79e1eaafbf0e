import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrized_spectral_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_unlearn.pruning.masking import (
    PrunedEntries,
    PrunedParameters,
    consumer_entries,
    is_computed,
    neuron_entries,
)

NEURONS = torch.tensor([0, 2])

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def conv_entries(net):
    return neuron_entries(net[0], net[1], NEURONS)


def train(net, optimizer, steps=5, pruning=None):
    torch.manual_seed(1)
    x, y = torch.randn(12, 2, 4, 4), torch.randint(3, (12,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        if pruning is not None:
            pruning.zero_gradients()
        optimizer.step()


def pruned_values(net):
    return torch.cat([p[NEURONS].flatten() for p in (net[0].weight, net[0].bias, net[1].weight, net[1].bias)])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("mask_gradients", [True, False])
def test_zeros_stay_exactly_zero(name, steps_before, mask_gradients):
    net = conv_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, steps_before)
    kept = net[0].weight[1].detach().clone()

    pruning = PrunedParameters(conv_entries(net))
    pruning.zero_parameters()
    pruning.watch(optimizer)
    train(net, optimizer, pruning=pruning if mask_gradients else None)

    assert (pruned_values(net) == 0).all()
    assert (net[0].weight[1] != kept).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_watching_they_come_back(name):
    net = conv_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3)
    PrunedParameters(conv_entries(net)).zero_parameters()
    train(net, optimizer)
    assert (pruned_values(net) != 0).any()


def test_a_pruned_channel_is_silent_behind_its_norm():
    net = conv_net()
    train(net, OPTIMIZERS["sgd"](net.parameters()), 5)
    PrunedParameters(conv_entries(net)).zero_parameters()
    out = net.eval()[:3](torch.randn(3, 2, 4, 4))
    assert (out[:, NEURONS] == 0).all()
    assert (out[:, [1, 3]] != 0).any()


def test_the_other_entries_are_untouched():
    net = conv_net()
    before = copy.deepcopy(net)
    PrunedParameters(conv_entries(net)).zero_parameters()
    for now, then in zip(net.parameters(), before.parameters(), strict=True):
        if now.shape[0] == 4:
            assert torch.equal(now[[1, 3]], then[[1, 3]])
        else:
            assert torch.equal(now, then)


def test_optimizer_state_is_zeroed_when_the_watch_begins():
    net = conv_net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    train(net, optimizer, 3)
    PrunedParameters(conv_entries(net)).watch(optimizer)
    state = optimizer.state[net[0].weight]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert (state[name][NEURONS] == 0).all()
        assert (state[name][[1, 3]] != 0).any()
    assert state["step"] == 3


def test_parameters_that_the_optimizer_does_not_train_are_no_trouble():
    net = conv_net()
    pruning = PrunedParameters(conv_entries(net))
    pruning.zero_gradients()  # there are none yet
    optimizer = OPTIMIZERS["sgd"](net[4].parameters())
    pruning.watch(optimizer)
    assert len(optimizer.state) == 0


def test_what_another_optimizer_steps_may_be_between_its_forward_and_backward_pass():
    net, other = conv_net(), nn.Parameter(torch.ones(2))
    pruning = PrunedParameters(conv_entries(net))
    pruning.zero_parameters()
    optimizers = [OPTIMIZERS["sgd"]([other]), OPTIMIZERS["sgd"](net.parameters())]
    for _ in range(2):
        losses = [other.sum(), net(torch.randn(3, 2, 4, 4)).square().mean()]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            pruning.watch(optimizer, optimizers)
            optimizer.step()
        assert (pruned_values(net) == 0).all()


def test_gradients_are_zeroed_and_no_others():
    net = conv_net()
    net(torch.randn(3, 2, 4, 4)).square().sum().backward()
    other = net[4].weight.grad.clone()
    PrunedParameters(conv_entries(net)).zero_gradients()
    assert (net[0].weight.grad[NEURONS] == 0).all()
    assert (net[0].weight.grad[[1, 3]] != 0).any()
    assert torch.equal(net[4].weight.grad, other)


def test_watching_twice_is_watching_once_and_release_ends_it():
    net = conv_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruning = PrunedParameters(conv_entries(net))
    pruning.watch(optimizer)
    pruning.watch(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1

    pruning.release()
    assert len(optimizer._optimizer_step_post_hooks) == 0
    train(net, optimizer, 1)
    assert (pruned_values(net) != 0).all()


def test_two_optimizers_are_watched():
    net = conv_net()
    first, second = OPTIMIZERS["sgd"](net.parameters()), OPTIMIZERS["adamw"](net.parameters())
    pruning = PrunedParameters(conv_entries(net))
    pruning.zero_parameters()
    for optimizer in (first, second):
        pruning.watch(optimizer)
        train(net, optimizer, 2)
    assert (pruned_values(net) == 0).all()


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Linear(3, 4), None, torch.randn(2, 3)),
        (nn.Linear(3, 4, bias=False), None, torch.randn(2, 3)),
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), torch.randn(2, 2, 6)),
        (nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), torch.randn(2, 2, 6, 6)),
        (nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), torch.randn(2, 2, 6, 6)),
        (nn.Linear(3, 4), nn.LayerNorm(4), torch.randn(2, 3)),
        (nn.Linear(3, 4), nn.LayerNorm((5, 4)), torch.randn(2, 5, 3)),
        (nn.Conv2d(2, 4, 3), nn.LayerNorm((4, 4, 4)), torch.randn(2, 2, 6, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_neurons_of_every_kind_of_layer_fall_silent(layer, norm, x):
    with torch.no_grad():
        for parameter in [*layer.parameters(), *(norm.parameters() if norm else ())]:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    PrunedParameters(neuron_entries(layer, norm, NEURONS)).zero_parameters()
    out = layer(x)
    out = (norm(out) if norm else out).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)
    assert (out[NEURONS] == 0).all()
    assert (out[[1, 3]] != 0).all()


def test_a_head_does_not_listen_to_pruned_inputs():
    head = nn.Linear(4, 3)
    PrunedParameters(consumer_entries(head, NEURONS)).zero_parameters()
    x = torch.randn(5, 4)
    changed = x.clone()
    changed[:, NEURONS] = 99.0
    torch.testing.assert_close(head(changed), head(x))
    assert (head.weight[:, [1, 3]] != 0).all()
    assert (head.bias != 0).all()


def test_entries_of_any_dimension():
    tensor = torch.ones(2, 3)
    PrunedEntries(nn.Parameter(torch.ones(2, 3)), 1, NEURONS).zero_(tensor)
    assert tensor.tolist() == [[0, 1, 0], [0, 1, 0]]


COMPUTED = {
    "weight norm": parametrized_weight_norm,
    "weight norm of the whole": lambda layer: parametrized_weight_norm(layer, dim=None),
    "weight norm of columns": lambda layer: parametrized_weight_norm(layer, dim=1),
    "older weight norm": weight_norm,
    "older weight norm of the whole": lambda layer: weight_norm(layer, dim=None),
    "spectral norm": parametrized_spectral_norm,
    "older spectral norm": spectral_norm,
    "torch's pruning": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    "torch's pruning of the bias": lambda layer: prune.random_unstructured(layer, "bias", amount=0.5),
    "both": lambda layer: prune.random_unstructured(weight_norm(layer), "bias", amount=0.5),
    "a parametrization": lambda layer: register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize(
    ("make", "x"),
    [(lambda: nn.Linear(3, 6), torch.randn(5, 3)), (lambda: nn.Conv2d(3, 6, 2), torch.randn(5, 3, 4, 4))],
    ids=["linear", "convolution"],
)
def test_what_a_weight_is_computed_from_is_zeroed(computed, make, x):
    layer = COMPUTED[computed](make())
    PrunedParameters(neuron_entries(layer, None, NEURONS)).zero_parameters()
    out = layer(x)
    silent = (out == 0).movedim(1, 0).flatten(1).all(dim=1)
    assert silent.nonzero().flatten().tolist() == NEURONS.tolist()
    assert out.isfinite().all()
    assert is_computed(layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("computed", [name for name in COMPUTED if "bias" not in name and name != "both"])
def test_columns_that_are_computed_are_zeroed(computed):
    # Spectral norm goes on estimating while it is trained.
    head = COMPUTED[computed](nn.Linear(6, 3)).eval()
    PrunedParameters(consumer_entries(head, NEURONS)).zero_parameters()
    x = torch.randn(5, 6)
    out = head(x)
    assert out.isfinite().all()
    x[:, NEURONS] = 7.0
    assert head(x).equal(out)
    x[:, [i for i in range(6) if i not in NEURONS]] += 1
    assert (head(x) != out).any(dim=1).all()


def test_a_weight_that_is_computed_in_another_way_is_refused():
    layer = nn.Linear(3, 4)
    del layer.weight
    layer.register_buffer("weight", torch.ones(4, 3))
    with pytest.raises(
        ValueError, match="Expected the weight of a Linear to be a parameter, or computed from one by weight"
    ):
        neuron_entries(layer, None, NEURONS)
    with pytest.raises(ValueError, match="Name another layer to prune"):
        consumer_entries(layer, NEURONS)


def test_a_transposed_convolution_in_groups_is_refused():
    with pytest.raises(ValueError, match="ConvTranspose1d with groups=1, but it has groups=2"):
        neuron_entries(nn.ConvTranspose1d(2, 4, 3, groups=2), None, NEURONS)
