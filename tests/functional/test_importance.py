import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn.functional import importance_ratio, magnitude, neuron_sums
from lightning_unlearn.functional.importance import STATISTICS
from tests.ranks import run_ranks

NAIVE = {
    "mean_abs": lambda a: np.abs(a).mean(axis=0),
    "rms": lambda a: np.sqrt((a**2).mean(axis=0)),
    "std": lambda a: a.std(axis=0),
    "frequency": lambda a: (a > 0).mean(axis=0),
    "taylor": lambda a: np.abs(a.mean(axis=0)),
    "hessian": lambda a: (a**2).mean(axis=0),
}


def values(rows=40, positions=None, seed=0):
    shape = (rows, 5) if positions is None else (rows, positions, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def whole(of):
    return neuron_sums(of, torch.ones(len(of)))


def test_every_statistic_has_a_naive_twin():
    assert STATISTICS.keys() == NAIVE.keys()


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("positions", [None, 3])
def test_ratios_are_those_of_numpy(name, positions):
    suspect, clean = values(30, positions), values(50, positions, seed=1)
    expected = NAIVE[name](suspect.double().numpy().reshape(-1, 5)) / NAIVE[name](clean.double().numpy().reshape(-1, 5))
    found = importance_ratio(whole(suspect), whole(clean), name)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", [None, 3])
def test_rows_of_weight_zero_do_not_count(positions):
    rows = values(40, positions)
    weight = (torch.arange(40) % 3 > 0).float()
    for name in STATISTICS:
        one, other = STATISTICS[name](neuron_sums(rows, weight)), STATISTICS[name](whole(rows[weight > 0]))
        torch.testing.assert_close(one, other)


@given(cut=st.integers(1, 39))
@settings(deadline=None, max_examples=20)
def test_two_parts_are_the_whole(cut):
    rows = values()
    for name, statistic in STATISTICS.items():
        one = statistic(whole(rows[:cut]) + whole(rows[cut:]))
        torch.testing.assert_close(one, statistic(whole(rows)), msg=name)


@given(scale=st.floats(1e-3, 1e3), neuron=st.integers(0, 4))
@settings(deadline=None, max_examples=20)
def test_the_scale_of_a_neuron_does_not_matter_to_a_ratio(scale, neuron):
    suspect, clean = values(), values(seed=1)
    factor = torch.ones(5)
    factor[neuron] = scale
    for name in STATISTICS:
        one = importance_ratio(whole(suspect * factor), whole(clean * factor), name)
        torch.testing.assert_close(one, importance_ratio(whole(suspect), whole(clean), name), rtol=1e-4, atol=1e-6)


def test_the_order_of_neurons_does_not_matter():
    suspect, clean, order = values(), values(seed=1), [3, 1, 0, 4, 2]
    for name in STATISTICS:
        one = importance_ratio(whole(suspect[:, order]), whole(clean[:, order]), name)
        torch.testing.assert_close(one, importance_ratio(whole(suspect), whole(clean), name)[order])


def test_ranks_add_up():
    rows = values(41)

    def on_rank(rank, reduce):
        return STATISTICS["std"](whole(rows[rank::2]).reduced(reduce))

    for found in run_ranks(on_rank, 2):
        torch.testing.assert_close(found, STATISTICS["std"](whole(rows)))


def test_a_neuron_that_only_suspects_use_is_large_and_finite_and_a_dead_one_is_zero():
    suspect = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    clean = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
    for name in ("mean_abs", "rms", "frequency", "taylor", "hessian"):
        found = importance_ratio(whole(suspect), whole(clean), name)
        assert found.isfinite().all()
        assert found.argmax() == 0
        assert found[0] > 1e5
        assert found[1] == 0
    assert importance_ratio(whole(0 * suspect), whole(0 * clean), "rms").tolist() == [0.0] * 3


def test_constant_neurons_are_not_live():
    rows = torch.stack([torch.zeros(6), torch.full((6,), 3.0), torch.linspace(0, 1, 6)], dim=1)
    assert whole(rows).is_live().tolist() == [False, False, True]


def test_shapes_that_do_not_fit_are_refused():
    for shape in ((4,), (4, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"Expected values \(B, D\) or \(B, P, D\) and weight \(B,\), but got"):
            neuron_sums(torch.zeros(shape), torch.zeros(4))
    with pytest.raises(ValueError, match="Expected values"):
        neuron_sums(torch.zeros(4, 2), torch.zeros(3))


@pytest.mark.parametrize(
    ("layer", "dimension", "neurons"),
    [(nn.Linear(3, 4), 0, 4), (nn.Linear(3, 4), 1, 3), (nn.Conv2d(2, 5, 3), 0, 5), (nn.ConvTranspose2d(2, 5, 3), 1, 5)],
)
def test_magnitudes_are_the_norms_of_slices(layer, dimension, neurons):
    found = magnitude(layer.weight, dimension)
    expected = [layer.weight.detach().select(dimension, i).flatten().norm().item() for i in range(neurons)]
    assert found.tolist() == pytest.approx(expected)
    assert not found.requires_grad
