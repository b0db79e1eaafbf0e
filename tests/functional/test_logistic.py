import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lightning_unlearn.functional import fit_logistic
from lightning_unlearn.functional.logistic import gradient_scatter, logistic_sums
from tests.functional.test_sensitivity import problem, z_score
from tests.ranks import run_ranks

RIDGE = 1e-2


def ones(target):
    return torch.ones(len(target))


def by_sklearn(activation, target, ridge):
    """A soft target is a row of each class, weighed by it; the penalty is per sample."""
    x = np.repeat(z_score(activation).numpy(), 2, axis=0)
    y = np.tile([1, 0], len(target))
    weight = np.stack([target.numpy(), 1 - target.numpy()], axis=1).ravel()
    model = LogisticRegression(C=1 / (ridge * len(target)), tol=1e-12, max_iter=1000)
    return model.fit(x, y, sample_weight=weight)


@pytest.mark.parametrize("ridge", [RIDGE, 1e-4, 1.0])
def test_matches_sklearn_on_soft_targets(ridge):
    activation, target = problem()
    expected = torch.from_numpy(by_sklearn(activation, target, ridge).coef_[0])
    torch.testing.assert_close(
        fit_logistic(activation, target, ones(target), ridge=ridge).coefficient, expected, rtol=1e-5, atol=1e-6
    )


def test_matches_sklearn_on_hard_targets_in_float32():
    activation, target = problem()
    hard = (target > torch.rand(200, generator=torch.Generator().manual_seed(3)).double()).double()
    expected = torch.from_numpy(by_sklearn(activation, hard, RIDGE).coef_[0])
    found = fit_logistic(activation.float(), hard.float(), ones(hard), ridge=RIDGE)
    torch.testing.assert_close(found.coefficient, expected, rtol=1e-4, atol=1e-5)


def test_standard_errors_are_the_sandwich():
    activation, target = problem()
    model = by_sklearn(activation, target, RIDGE)
    x = np.column_stack([z_score(activation).numpy(), np.ones(200)])
    p = expit(x @ np.append(model.coef_[0], model.intercept_))
    penalty = 200 * RIDGE * np.diag([1.0] * 6 + [0.0])
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + penalty)
    residual = x * (p - target.numpy())[:, None]
    expected = np.sqrt((bread @ residual.T @ residual @ bread).diagonal() * 200 / (200 - 7))[:-1]
    found = fit_logistic(activation, target, ones(target), ridge=RIDGE).standard_error
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=0.0)


def test_the_errors_are_as_large_as_the_coefficients_scatter():
    activation = problem(n=300)[0][:, :3]
    truth = torch.tensor([0.8, 0.0, -0.5]).double()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        # Soft targets of the right mean that scatter less than zeros and ones would.
        mean = (z_score(activation) @ truth).sigmoid()
        target = mean + torch.minimum(mean, 1 - mean) * (2 * torch.rand(300, generator=generator).double() - 1)
        found.append(fit_logistic(activation, target, ones(target)))
    scatter = torch.stack([one.coefficient for one in found]).std(dim=0)
    errors = torch.stack([one.standard_error for one in found]).mean(dim=0)
    torch.testing.assert_close(errors, scatter, rtol=0.15, atol=0.0)


def test_gradient_and_hessian_are_the_derivatives_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    z, at = torch.randn(30, 4, generator=generator).double(), torch.randn(4, generator=generator).double()
    target, weight = torch.rand(30, generator=generator).double(), torch.rand(30, generator=generator).double()
    here, step = logistic_sums(at, z, target, weight), 1e-5
    for i in range(4):
        off = torch.zeros(4).double()
        off[i] = step
        above, below = (logistic_sums(at + sign * off, z, target, weight) for sign in (1, -1))
        torch.testing.assert_close((above.loss - below.loss) / (2 * step), here.gradient[i], rtol=1e-6, atol=1e-8)
        slope = (above.gradient - below.gradient) / (2 * step)
        torch.testing.assert_close(slope, here.hessian[i], rtol=1e-6, atol=1e-8)
    own = torch.stack([logistic_sums(at, z[i : i + 1], target[i : i + 1], ones(z[:1])).gradient for i in range(30)])
    torch.testing.assert_close(gradient_scatter(at, z, target, weight), (own * weight[:, None]).T @ own)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_find_what_one_process_finds(world):
    activation, target = problem(n=101)
    rows = -(-101 // world)

    def on_rank(rank, reduce):
        index = torch.arange(rank, world * rows, world)
        weight, index = (index < 101).float(), index.clamp(max=100)
        return fit_logistic(activation[index], target[index], weight, reduce, RIDGE)

    alone = fit_logistic(activation, target, ones(target), ridge=RIDGE)
    ranks = run_ranks(on_rank, world)
    for found in ranks:
        assert found.coefficient.equal(ranks[0].coefficient)
        torch.testing.assert_close(found.coefficient, alone.coefficient, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.standard_error, alone.standard_error, rtol=1e-7, atol=1e-9)


def test_many_rows_are_taken_in_parts():
    activation, target = problem(n=20000, neurons=5)
    expected = torch.from_numpy(by_sklearn(activation, target, RIDGE).coef_[0])
    found = fit_logistic(activation, target, ones(target), ridge=RIDGE).coefficient
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_separated_samples_have_finite_coefficients_with_a_ridge():
    x = torch.linspace(-1, 1, 40).double().unsqueeze(1)
    y = (x[:, 0] > 0).double()
    found = fit_logistic(x, y, ones(y), ridge=1e-3)
    expected = by_sklearn(x, y, 1e-3).coef_[0]
    torch.testing.assert_close(found.coefficient, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert found.standard_error.isfinite().all()


def test_collinear_and_constant_neurons_do_no_harm():
    activation, target = problem(neurons=5)
    wide = torch.cat([activation, activation[:, :1], torch.full((200, 1), 5.0).double()], dim=1)
    found = fit_logistic(wide, target, ones(target), ridge=RIDGE)
    torch.testing.assert_close(found.coefficient[0], found.coefficient[5])
    assert found.coefficient[6] == 0
    assert found.standard_error[6] == torch.inf
    assert found.is_live.tolist() == [True] * 6 + [False]
    free = fit_logistic(wide, target, ones(target))
    assert free.coefficient.isfinite().all()
    alone = fit_logistic(activation, target, ones(target)).coefficient
    torch.testing.assert_close(free.coefficient[0] + free.coefficient[5], alone[0], rtol=1e-5, atol=1e-6)


def test_nothing_to_tell():
    assert fit_logistic(torch.ones(10, 3), torch.rand(10), torch.ones(10)).coefficient.tolist() == [0.0] * 3
    activation, _ = problem()
    flat = fit_logistic(activation, torch.full((200,), 0.3), torch.ones(200), ridge=RIDGE)
    torch.testing.assert_close(flat.coefficient, torch.zeros(6).double(), rtol=0.0, atol=1e-8)
    assert (flat.p_value() > 0.05).all()
