from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.linear_model import LinearRegression, Ridge

from lightning_unlearn.functional import Sensitivity, regression_sums, solve_sensitivity


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


def test_matches_least_squares_on_standardized_data():
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


def found_of(activation, target, ridge=0.0):
    return solve_sensitivity(regression_sums(activation, target, torch.ones(len(target))), ridge)


def test_standard_errors_are_those_of_least_squares():
    activation, target = problem()
    # The textbook's: residual variance times the inverse of X'X, intercept included.
    x = np.column_stack([z_score(activation).numpy(), np.ones(len(target))])
    y = z_score(target).numpy()
    residual = y - x @ np.linalg.solve(x.T @ x, x.T @ y)
    variance = residual @ residual / (len(y) - x.shape[1])
    expected = np.sqrt(variance * np.linalg.inv(x.T @ x).diagonal())[:-1]
    torch.testing.assert_close(found_of(activation, target).standard_error, torch.from_numpy(expected))


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 5.0])
def test_standard_errors_of_a_ridge_are_those_of_the_linear_map_that_it_is(ridge):
    activation, target = problem()
    x, y, n = z_score(activation).numpy(), z_score(target).numpy(), len(target)
    to_coefficient = np.linalg.solve(x.T @ x + ridge * n * np.eye(6), x.T)
    residual = y - x @ to_coefficient @ y
    freedom = n - 1 - np.trace(x @ to_coefficient)
    expected = np.sqrt(residual @ residual / freedom * (to_coefficient @ to_coefficient.T).diagonal())
    torch.testing.assert_close(found_of(activation, target, ridge).standard_error, torch.from_numpy(expected))


def test_the_errors_are_as_large_as_the_coefficients_scatter():
    activation, _ = problem(n=120)
    truth = torch.tensor([0.0, 0.5, 0.0, 0.0, -1.0, 0.2]).double()
    generator = torch.Generator().manual_seed(1)
    draws, errors = [], []
    for _ in range(400):
        target = z_score(activation) @ truth + torch.randn(120, generator=generator).double()
        found = found_of(activation, target)
        # In the target's own units, in which the truth is fixed.
        draws.append(found.coefficient * target.std(correction=0))
        errors.append(found.standard_error * target.std(correction=0))
    scatter = torch.stack(draws).std(dim=0)
    torch.testing.assert_close(torch.stack(errors).mean(dim=0), scatter, rtol=0.12, atol=0.0)
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), truth, rtol=0.0, atol=0.03)


def test_p_values_are_those_of_the_normal_distribution():
    z = torch.tensor([-4.0, -1.0, 0.0, 0.5, 2.0]).double()
    found = Sensitivity(2 * z, torch.full((5,), 2.0).double(), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(found.p_value(), torch.from_numpy(2 * norm.sf(np.abs(z.numpy()))))


def test_what_is_not_known_has_a_p_value_of_one():
    inf, zero = torch.tensor([torch.inf]).double(), torch.zeros(1).double()
    assert Sensitivity(zero + 1, inf, torch.ones(1, dtype=torch.bool)).p_value().tolist() == [1.0]
    assert Sensitivity(zero, zero, torch.zeros(1, dtype=torch.bool)).p_value().tolist() == [1.0]


def test_constant_neurons_are_not_live_and_have_no_error():
    activation, target = problem()
    found = found_of(torch.cat([activation, torch.full((200, 1), 7.0)], dim=1), target)
    assert found.is_live.tolist() == [True] * 6 + [False]
    assert found.standard_error[-1] == torch.inf
    assert found.standard_error[:-1].isfinite().all()


def test_neurons_that_cannot_be_told_apart_have_large_errors():
    activation, target = problem(neurons=5)
    copy = activation[:, 1:2] + 1e-3 * torch.randn(200, 1, generator=torch.Generator().manual_seed(2)).double()
    alone, both = found_of(activation, target), found_of(torch.cat([activation, copy], dim=1), target)
    assert alone.p_value()[1] < 1e-6
    # Neither of the two is sure, whatever the signs and sizes that least squares gives them.
    assert (both.p_value()[[1, 5]] > 1e-3).all()
    assert (both.standard_error[[1, 5]] > 50 * alone.standard_error[1]).all()
    # The ridge of the callbacks' default keeps what they have in common, and is sure of it.
    shrunk = found_of(torch.cat([activation, copy], dim=1), target, ridge=1e-3)
    torch.testing.assert_close(shrunk.coefficient[[1, 5]].sum(), alone.coefficient[1], rtol=0.02, atol=0.0)
    assert (shrunk.p_value()[[1, 5]] < 1e-3).all()
    assert (shrunk.coefficient[[1, 5]].sign() == alone.coefficient[1].sign()).all()


def test_with_more_neurons_than_samples_nothing_is_sure():
    activation, target = problem(n=12, neurons=30)
    found = found_of(activation, target)
    assert found.standard_error.isinf().all()
    assert (found.p_value() == 1).all()


def test_padding_does_not_make_the_errors_smaller():
    activation, target = problem()
    weight = torch.cat([torch.ones(200), torch.zeros(300)])
    padded = regression_sums(torch.cat([activation, activation, activation[:100]]), target.repeat(3)[:500], weight)
    torch.testing.assert_close(solve_sensitivity(padded).standard_error, found_of(activation, target).standard_error)


@given(order=st.permutations(range(6)), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
@settings(deadline=None, max_examples=30)
def test_the_order_of_neurons_does_not_matter(order, ridge):
    activation, target = problem()
    one, other = found_of(activation, target, ridge), found_of(activation[:, list(order)], target, ridge)
    torch.testing.assert_close(other.coefficient, one.coefficient[list(order)], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(other.standard_error, one.standard_error[list(order)], rtol=1e-8, atol=1e-10)


@given(cut=st.integers(1, 199), ridge=st.sampled_from([0.0, 0.1]))
@settings(deadline=None, max_examples=30)
def test_the_sums_of_two_parts_are_those_of_the_whole(cut, ridge):
    activation, target = problem()
    ones = torch.ones(200)
    parts = [regression_sums(activation[part], target[part], ones[part]) for part in (slice(cut), slice(cut, None))]
    one, other = solve_sensitivity(parts[0] + parts[1], ridge), found_of(activation, target, ridge)
    torch.testing.assert_close(one.coefficient, other.coefficient, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one.standard_error, other.standard_error, rtol=1e-8, atol=1e-10)


@given(neuron=st.integers(0, 5), scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_scale_and_shift_do_not_matter_to_the_errors(neuron, scale, shift):
    activation, target = problem()
    changed = activation.clone()
    changed[:, neuron] = scale * (changed[:, neuron] + shift)
    one, other = found_of(changed, target, 1e-3), found_of(activation, target, 1e-3)
    torch.testing.assert_close(one.standard_error, other.standard_error, rtol=1e-5, atol=1e-8)
