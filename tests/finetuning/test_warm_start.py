import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_unlearn.finetuning import warm_start
from lightning_unlearn.finetuning.messages import prospect, start_of
from lightning_unlearn.finetuning.optimizer_checks import take_over
from lightning_unlearn.finetuning.shrink_weights import KEPT, shrink
from lightning_unlearn.finetuning.warm_start import GAP, Memory, Start, StartWeights, choose_start
from tests.toys import assert_same_weights, mlp, weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shrinking_keeps_a_tenth_of_the_way(dtype):
    start, weight = torch.randn(2, 50, 3, dtype=torch.float64).to(dtype)
    moved = shrink(weight, start)
    expected = (start.double() + KEPT * (weight.double() - start.double())).to(dtype)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, expected)
    assert shrink(weight, start, 1.0).equal(weight)
    assert shrink(weight, start, 0.0).equal(start)
    assert shrink(torch.tensor([float("nan")]), torch.ones(1), 0.0).equal(torch.ones(1))


def trained(net):
    """The same network, every parameter and buffer of it changed."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(1)
    return net


def norms(net):
    return {name for name in net.state_dict() if "running" in name or "tracked" in name}


def test_all_that_is_trained_is_moved_and_norms_begin_anew():
    net, start = mlp(), StartWeights()
    before = weights(net)
    start.remember(net)
    moved, undo = start.move(trained(net), "shrink", [], ())
    assert moved == dict.fromkeys(dict(net.named_parameters()), True)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name] if name in norms(net) else before[name] + KEPT, msg=name)
    undo()
    assert_same_weights(weights(net), weights(trained(copy.deepcopy(load(net, before)))))


def load(net, state):
    net.load_state_dict(state)
    return net


def test_back_to_the_start():
    net, start = mlp(), StartWeights()
    before = weights(net)
    start.remember(net)
    start.move(trained(net), "start", [], ())
    assert_same_weights(weights(net), before)


def test_what_is_frozen_stays_as_it_is():
    net, start = mlp(), StartWeights()
    net[4].weight.requires_grad_(False)
    start.remember(net)
    now = weights(trained(net))
    moved, _ = start.move(net, "start", [], {"0.weight", "1"})
    assert "0.weight" not in moved
    assert moved["0.bias"]
    same = {name for name in now if now[name].equal(net.state_dict()[name])}
    assert same == {"0.weight", "4.weight", *(name for name in norms(net) if name.startswith("1."))}


def test_what_is_unfrozen_later_is_remembered_before_it_changes():
    net, start = mlp(), StartWeights()
    net[0].requires_grad_(False)
    start.remember(net)
    known = set(start.state_dict())
    net[0].requires_grad_(True)
    before = weights(net)
    start.remember(net)
    assert set(start.state_dict()) - known == {"0.weight", "0.bias"}
    trained(net)
    start.remember(net)
    start.move(net, "start", [], ())
    assert_same_weights(weights(net), before)


def test_tied_and_computed_weights_are_moved_once_by_what_they_are_computed_from():
    net, start = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))), StartWeights()
    net[1].weight = net[0].weight
    before = weights(net)
    start.remember(net)
    start.move(trained(net), "shrink", [], ())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + KEPT, msg=name)
    assert "2.parametrizations.weight.original1" in start.state_dict()
    assert "1.weight" not in start.state_dict()


def test_averages_follow_once_even_where_they_ask_for_gradients():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.ema = nn.Linear(3, 2), nn.Linear(3, 2)

    net, start = Averaged(), StartWeights()
    before, outside = weights(net), {"net.weight": torch.full((2, 3), 5.0)}
    start.remember(net)
    inside = {f"net.{name}": parameter for name, parameter in trained(net).ema.named_parameters()}
    _, undo = start.move(net, "shrink", [inside, outside, outside], ())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + KEPT, msg=name)
    torch.testing.assert_close(outside["net.weight"], before["net.weight"].lerp(torch.tensor(5.0), KEPT))
    undo()
    assert outside["net.weight"].eq(5).all()


def test_a_failure_in_the_middle_leaves_nothing_changed():
    net, start = mlp(), StartWeights()
    start.remember(net)
    now = weights(trained(net))
    # An average on which a graph still depends cannot be written to.
    leaf = torch.zeros(20, 32, requires_grad=True).expand(20, 32)
    with pytest.raises(RuntimeError):
        start.move(net, "shrink", [{"4.weight": leaf[:1].expand(20, 32)}], ())
    assert_same_weights(weights(net), now)


def test_shards_that_are_too_large_for_a_checkpoint_are_not_in_it(monkeypatch):
    net, start = mlp(), StartWeights()
    start.remember(net)
    assert start.state_dict(net).keys() == start.state_dict().keys()
    monkeypatch.setattr(warm_start, "MOST_GATHERED", 1_000)
    with pytest.warns(UserWarning, match="does not hold the initial weights of the fit, which are 0.0 GiB, more than"):
        assert start.state_dict(net) is None
    assert start.is_known


def test_a_state_that_was_restored_is_taken_over_by_an_optimizer_of_the_same_class():
    net = mlp()
    one, other = (torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9) for lr in (0.1, 0.5))
    net(torch.randn(8, 16)).sum().backward()
    one.step()
    take_over([one], [other])
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in net.parameters():
        assert other.state[parameter]["momentum_buffer"].equal(one.state[parameter]["momentum_buffer"])
    with pytest.raises(MisconfigurationException, match=r"here SGD, but CleanSubsetFinetuneCallback makes Adam; let"):
        take_over([one], [torch.optim.Adam(net.parameters())])
    with pytest.raises(MisconfigurationException, match="so its state cannot be loaded"):
        take_over([one], [torch.optim.SGD(net[0].parameters(), lr=0.1)])


HALF, NONE = Memory(0.5), Memory()


@pytest.mark.parametrize(
    ("asked", "memory", "obstacle", "how", "said"),
    [
        ("keep", Memory(0.9), "", "keep", "Fine-tuning continues from the current weights."),
        ("auto", NONE, "", "keep", "continues from the current weights: no label is suspect."),
        ("auto", Memory(None, 0.9), "", "keep", "continues from the current weights: no label is suspect."),
        ("auto", Memory(0.49), "", "keep", "predicts 49% of the suspect labels, so it has not memorized them."),
        ("auto", Memory(0.1, GAP - 0.001), "", "keep", "of the validation labels, so it has not memorized them."),
        ("auto", Memory(0.1, -0.2), "", "keep", "10% of the suspect labels, and 20 points less of the training labels"),
        ("auto", Memory(0.1, GAP), "", "shrink", "of the validation labels, so it has begun to memorize."),
        ("auto", Memory(0.8, -0.2), "", "shrink", "than of the validation labels, so it has memorized them."),
        ("auto", HALF, "", "shrink", "is kept): the network predicts 50% of the suspect labels, so it has memorized"),
        ("auto", Memory(0.9), "of this", "keep", "memorized them, but the weights are kept: of this."),
        ("shrink", NONE, "", "shrink", "Fine-tuning starts from weights moved back towards the initial ones"),
        ("shrink", Memory(0.1), "", "shrink", "(10% of the change is kept)."),
        ("start", Memory(0.1), "", "start", "Fine-tuning starts from the initial weights of the fit."),
    ],
)
def test_where_fine_tuning_starts_from(asked, memory, obstacle, how, said):
    start = choose_start(asked, memory, obstacle)
    assert start.how == how
    assert said in start_of(start)
    assert start.moves == (how != "keep")


@pytest.mark.parametrize(
    ("memory", "how", "precision", "epochs", "said"),
    [
        (
            Memory(0.9),
            "shrink",
            0.84,
            12,
            "The accuracy lost to memorized labels (about 8 in 10 of them wrong) may be recovered in the remaining 12",
        ),
        (
            Memory(0.9),
            "keep",
            None,
            1,
            "Part of the accuracy lost to memorized labels may be recovered in one epoch: the weights are kept.",
        ),
        (
            Memory(0.1),
            "keep",
            0.02,
            None,
            "Little to gain: fine-tuning mainly keeps the suspect labels (about 1 in 10 of them wrong) from being",
        ),
        (
            Memory(0.1, GAP),
            "shrink",
            0.97,
            3,
            "Some accuracy to gain in the remaining 3 epochs: memorization has begun, mostly not of the suspect labels",
        ),
    ],
)
def test_what_is_to_be_won_is_said_before(memory, how, precision, epochs, said):
    assert prospect(memory, Start(how), precision, epochs).startswith(said)
