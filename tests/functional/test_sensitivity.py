from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge

from lightning_unlearn.functional import regression_sums, select_neurons, solve_sensitivity


def problem(n=200, neurons=6, seed=0):
    """Correlated activations and a target that two of the neurons explain."""
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(n, neurons, generator=generator).relu() @ (
        torch.eye(neurons) + 0.2 * torch.rand(neurons, neurons, generator=generator)
    )
    noise = 0.1 * torch.randn(n, generator=generator)
    return activation.double(), (0.5 * activation[:, 1] - activation[:, 4] + noise).sigmoid().double()


def z_score(values):
    return (values - values.mean(dim=0)) / values.std(dim=0, correction=0)


def sensitivity_of(activation, target, weight=None, ridge=0.0):
    weight = torch.ones(len(target)) if weight is None else weight
    return solve_sensitivity(regression_sums(activation, target, weight), ridge).coefficient


def test_matches_least_squares_on_standardised_data():
    activation, target = problem()
    expected = LinearRegression().fit(z_score(activation), z_score(target)).coef_
    torch.testing.assert_close(sensitivity_of(activation, target), torch.from_numpy(expected))


def test_ridge_is_per_sample():
    activation, target = problem()
    expected = Ridge(alpha=0.3 * len(target)).fit(z_score(activation), z_score(target)).coef_
    torch.testing.assert_close(sensitivity_of(activation, target, ridge=0.3), torch.from_numpy(expected))


def test_batches_add_up_to_the_whole():
    activation, target = problem()
    weight = torch.rand(len(target))
    sums = [regression_sums(*batch) for batch in zip(*(t.split(17) for t in (activation, target, weight)), strict=True)]
    torch.testing.assert_close(
        solve_sensitivity(reduce(add, sums)).coefficient,
        sensitivity_of(activation, target, weight),
        rtol=1e-9,
        atol=1e-12,
    )


def test_rows_of_weight_zero_do_not_count():
    activation, target = problem()
    padded = torch.cat([activation, 100 * torch.ones(5, 6)])
    sums = regression_sums(padded, torch.cat([target, torch.ones(5)]), torch.cat([torch.ones(200), torch.zeros(5)]))
    torch.testing.assert_close(solve_sensitivity(sums).coefficient, sensitivity_of(activation, target))


def test_weight_two_is_the_row_twice():
    activation, target = problem()
    weight = torch.ones(200)
    weight[:50] = 2
    twice = sensitivity_of(torch.cat([activation, activation[:50]]), torch.cat([target, target[:50]]))
    torch.testing.assert_close(sensitivity_of(activation, target, weight), twice)


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_constant_neurons_have_no_sensitivity_and_change_no_other(constant):
    activation, target = problem()
    with_dead = torch.cat([activation, torch.full((200, 1), constant)], dim=1)
    sensitivity = sensitivity_of(with_dead, target)
    assert sensitivity[-1] == 0
    torch.testing.assert_close(sensitivity[:-1], sensitivity_of(activation, target))


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
def test_a_constant_target_gives_zero(value):
    activation, _ = problem()
    assert (sensitivity_of(activation, torch.full((200,), value)) == 0).all()


def test_only_constant_neurons_give_zero():
    assert sensitivity_of(torch.ones(10, 3), torch.rand(10)).tolist() == [0.0, 0.0, 0.0]


def test_two_equal_neurons_share_the_coefficient():
    activation, target = problem(neurons=5)
    twins = sensitivity_of(torch.cat([activation, activation[:, :1]], dim=1), target)
    torch.testing.assert_close(twins[0], twins[-1])
    torch.testing.assert_close(2 * twins[0], sensitivity_of(activation, target)[0])


def test_more_neurons_than_samples_gives_the_smallest_solution():
    activation, target = problem(n=12, neurons=30)
    expected = torch.linalg.pinv(z_score(activation)) @ z_score(target)
    torch.testing.assert_close(sensitivity_of(activation, target), expected, rtol=1e-5, atol=1e-7)


def test_float32_activations_with_a_large_mean():
    activation, target = problem()
    shifted = (activation.float() + 1000).double()  # what float32 keeps of them
    expected = LinearRegression().fit(z_score(shifted), z_score(target)).coef_
    torch.testing.assert_close(
        sensitivity_of(shifted.float(), target.float()), torch.from_numpy(expected), rtol=1e-4, atol=1e-5
    )


@given(neuron=st.integers(0, 5), scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3))
@settings(deadline=None, max_examples=50)
def test_scale_and_shift_of_a_neuron_do_not_matter(neuron, scale, shift):
    activation, target = problem()
    changed = activation.clone()
    changed[:, neuron] = scale * (changed[:, neuron] + shift)
    torch.testing.assert_close(
        sensitivity_of(changed, target), sensitivity_of(activation, target), rtol=1e-6, atol=1e-8
    )


def test_shapes_that_do_not_fit_are_refused():
    message = r"Expected activation \(B, D\), target \(B,\) and weight \(B,\), but got"
    for shapes in (((4, 2, 2), (4,), (4,)), ((4, 2), (3,), (3,)), ((4, 2), (4,), (4, 1))):
        with pytest.raises(ValueError, match=message):
            regression_sums(*(torch.zeros(shape) for shape in shapes))


def test_the_largest_magnitudes_are_pruned():
    sensitivity = torch.tensor([0.1, -0.9, 0.4, 0.5, -0.2])
    assert select_neurons(sensitivity, 0.4).tolist() == [True, False, True, False, True]


def test_the_share_is_rounded_down():
    assert (~select_neurons(torch.arange(1.0, 11), 0.29)).sum() == 2


@pytest.mark.parametrize(("amount", "neurons", "count"), [(0.29, 100, 29), (0.57, 100, 57), (1 / 49, 49, 1)])
def test_a_whole_number_of_neurons_is_not_lost_to_rounding(amount, neurons, count):
    assert int(amount * neurons) < count  # what the plain product gives
    assert (~select_neurons(torch.arange(1.0, neurons + 1), amount)).sum() == count


def test_the_share_is_of_the_live_neurons():
    dead = torch.zeros(6)
    live = torch.tensor([0.2, -0.4, 0.1, 0.3])
    keep = select_neurons(torch.cat([dead, live]), 0.5)
    assert keep.tolist() == [True] * 6 + [True, False, True, False]


def test_the_last_live_neuron_is_kept():
    assert select_neurons(torch.tensor([0.0, 0.0, 0.3, 0.0]), 0.75).all()


def test_equal_magnitudes_are_taken_in_order():
    assert select_neurons(torch.tensor([0.5, -0.5, 0.5, 0.5]), 0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("neurons", "least"), [(4, "0.25"), (3, "0.333334"), (512, "0.001954")])
def test_less_than_one_neuron_is_refused_with_an_amount_that_works(neurons, least):
    with pytest.raises(ValueError, match=rf"amount=0.001 of {neurons} neurons is less than one.* at least {least}\."):
        select_neurons(torch.ones(neurons), 0.001)
    assert (~select_neurons(torch.ones(neurons), float(least))).sum() == 1
