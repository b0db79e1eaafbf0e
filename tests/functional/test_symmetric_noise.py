import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_unlearn.functional.symmetric_noise import (
    SymmetricNoiseFit,
    _Likelihood,
    fit_symmetric_noise,
    fit_with_and_without,
)
from tests.ranks import run_ranks


def draw(n, classes, rate, *, seed=0, spread=3.0, factor=1.0):
    """Scores, and labels of which a share is drawn blindly: what the scores say is ``factor`` times too much."""
    generator = torch.Generator().manual_seed(seed)
    score = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(n, generator=generator) < rate
    drawn = torch.randint(0, classes, (n,), generator=generator)
    return factor * score, torch.where(blind, drawn, label)


def by_scipy(score, label):
    """The same likelihood, maximized without gradients."""
    score, label = score.numpy(), label.numpy()
    classes = score.shape[1]

    def surprise(x):
        scaled = np.exp(x[0]) * (score - score.max(axis=1, keepdims=True))
        probability = np.exp(scaled[np.arange(len(label)), label]) / np.exp(scaled).sum(axis=1)
        return -np.log((1 - x[1]) * probability + x[1] / classes + 1e-300).sum()

    options = {"method": "Nelder-Mead", "bounds": [(-4, 4), (0, 1)], "tol": 1e-8}
    found = min((minimize(surprise, [start, 0.1], **options) for start in (-1.0, 1.0)), key=lambda each: each.fun)
    return np.exp(found.x[0]), found.x[1], -found.fun


@pytest.mark.parametrize(("classes", "rate", "factor"), [(2, 0.3, 1.0), (5, 0.1, 4.0), (10, 0.02, 0.3)])
def test_is_the_maximum_that_scipy_finds(classes, rate, factor):
    score, label = draw(600, classes, rate, factor=factor)
    fit = fit_symmetric_noise(score, label, torch.ones(600))
    scale, blind, likelihood = by_scipy(score, label)
    assert fit.log_likelihood == pytest.approx(likelihood, abs=0.02)
    assert fit.scale.item() == pytest.approx(scale, rel=0.02)
    assert fit.blind == pytest.approx(blind, abs=0.003)


@pytest.mark.parametrize(("noisy", "unclear"), [(False, False), (True, False), (True, True), (False, True)])
def test_gradient_is_that_of_the_loss(noisy, unclear):
    score, label = draw(200, 4, 0.2)
    group = torch.arange(200) % 3
    weight, how = torch.rand(200).double(), {"noisy": noisy, "unclear": unclear, "biased": True, "known": False}
    loss_of = _Likelihood(score, label, weight, group, lambda x: x, **how)
    at = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.2, -0.3, -0.4, -2.0, -1.0], dtype=torch.float64)

    def loss(x):
        return loss_of(*x.split([3, 4, 2]))[0]

    _, gradient = loss_of(*at.split([3, 4, 2]))
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = 1e-6
        assert gradient[i].item() == pytest.approx((loss(at + step) - loss(at - step)) / 2e-6, abs=1e-7)


def test_finds_the_rate_whatever_temperature_and_bias_the_scores_have():
    score, label = draw(8000, 5, 0.1)
    shifted = 3 * (score + torch.tensor([2.0, -1.0, 0.0, 1.0, 0.5])) + torch.randn(8000, 1).double()
    plain = fit_symmetric_noise(score, label, torch.ones(8000), biased=True)
    moved = fit_symmetric_noise(shifted, label, torch.ones(8000), biased=True)
    assert plain.rate == pytest.approx(0.08, abs=0.01)
    assert moved.rate == pytest.approx(plain.rate, abs=0.003)


def test_the_interval_holds_the_truth_nine_times_of_ten():
    hit = 0
    for seed in range(40):
        score, label = draw(800, 4, 0.08, seed=seed)
        fit = fit_symmetric_noise(score, label, torch.ones(800))
        hit += abs(fit.blind - 0.08) <= 1.96 * fit.std_error
    assert hit >= 36


def test_clean_labels_show_nothing_and_wrong_ones_do():
    for seed in range(5):
        score, label = draw(3000, 5, 0.0, seed=seed, factor=2.0)
        _, z = fit_with_and_without(score, label, torch.ones(3000))
        assert z < 3
    score, label = draw(3000, 5, 0.02)
    fit, z = fit_with_and_without(score, label, torch.ones(3000))
    assert z > 5
    assert fit.rate == pytest.approx(0.016, abs=0.01)


def test_unclear_samples_are_no_wrong_labels():
    """A third of the samples are less clear than they look: without a part for them they pass for errors."""
    generator = torch.Generator().manual_seed(0)
    score = 3 * torch.randn(6000, 5, generator=generator).double()
    unclear = torch.rand(6000, generator=generator) < 0.3
    label = torch.multinomial((score * torch.where(unclear, 0.5, 1.0).unsqueeze(1)).softmax(1), 1, generator=generator)
    without = fit_symmetric_noise(score, label.squeeze(1), torch.ones(6000))
    fit = fit_symmetric_noise(score, label.squeeze(1), torch.ones(6000), unclear=True)
    assert fit.log_likelihood > without.log_likelihood
    assert without.blind - 1.96 * without.std_error > 0
    assert fit.blind - 1.96 * fit.std_error <= 0


def test_wrong_probability_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    score = 3 * torch.randn(20_000, 5, generator=generator).double()
    truth = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(20_000, generator=generator) < 0.2
    label = torch.where(blind, torch.randint(0, 5, (20_000,), generator=generator), truth)
    wrong = SymmetricNoiseFit(torch.ones(1).double(), torch.zeros(5).double(), 0.2, 0.0, 0.0).wrong_probability(
        score, label
    )
    for low, high in ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0)):
        part = (wrong >= low) & (wrong < high)
        assert (label != truth)[part].double().mean().item() == pytest.approx(wrong[part].mean().item(), abs=0.03)


def test_weights_count_as_copies_do():
    score, label = draw(400, 3, 0.2)
    twice = fit_symmetric_noise(torch.cat([score, score]), torch.cat([label, label]), torch.full((800,), 0.5))
    once = fit_symmetric_noise(score, label, torch.ones(400))
    assert twice.rate == pytest.approx(once.rate, abs=1e-6)
    assert twice.log_likelihood == pytest.approx(once.log_likelihood, abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_finds(world_size):
    score, label = draw(901, 4, 0.2)
    group = torch.arange(901) % 2
    options = {"num_groups": 2, "biased": True, "unclear": True}
    one = fit_symmetric_noise(score, label, torch.ones(901), group=group, **options)

    def on_rank(rank, reduce):
        part = slice(rank, None, world_size)
        ones = torch.ones(len(label[part]))
        return fit_symmetric_noise(score[part], label[part], ones, group=group[part], reduce=reduce, **options)

    for fit in run_ranks(on_rank, world_size):
        assert fit.rate == pytest.approx(one.rate, abs=1e-6)
        assert fit.std_error == pytest.approx(one.std_error, rel=1e-4)


def test_a_rate_that_is_known_stays_and_the_temperature_follows():
    score, label = draw(2000, 4, 0.2)
    free = fit_symmetric_noise(score, label, torch.ones(2000))
    for blind in (0.1, 0.4):
        known = fit_symmetric_noise(score, label, torch.ones(2000), blind=blind)
        assert known.blind == pytest.approx(blind)
        assert known.log_likelihood < free.log_likelihood
        # The more of what differs is blind, the surer the scores are of the others.
        assert (known.scale > free.scale).item() == (blind > free.blind)
