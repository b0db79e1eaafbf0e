import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_unlearn.functional import fit_lapses, lapse
from tests.ranks import run_ranks


def draw(n, classes, rate, *, seed=0, spread=3.0, factor=1.0):
    """Scores, and labels of which a share is drawn blindly: what the scores say is ``factor`` times too much."""
    generator = torch.Generator().manual_seed(seed)
    score = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(n, generator=generator) < rate
    drawn = torch.randint(0, classes, (n,), generator=generator)
    return factor * score, torch.where(blind, drawn, label)


def fit(score, label, weight=None, **options):
    weight = torch.ones(len(label)) if weight is None else weight
    return fit_lapses(score.__getitem__, label, weight, score.shape[1], **options)


def by_scipy(score, label):
    """The same likelihood, maximised without a histogram or a grid."""
    score, label = score.numpy(), label.numpy()
    classes = score.shape[1]

    def surprise(log_factor, rate):
        scaled = np.exp(log_factor) * score
        scaled -= scaled.max(axis=1, keepdims=True)
        probability = np.exp(scaled[np.arange(len(label)), label]) / np.exp(scaled).sum(axis=1)
        return -np.log((1 - rate) * probability + rate / classes + 1e-300).sum()

    never = min(minimize(lambda x: surprise(x[0], 0.0), [a], method="Nelder-Mead").fun for a in (-1.0, 0.0, 1.0))
    ever = min(
        (
            minimize(lambda x: surprise(x[0], x[1]), [a, 0.2], method="Nelder-Mead", bounds=[(-4, 4), (0, 1)], tol=1e-8)
            for a in (-1.0, 0.0, 1.0)
        ),
        key=lambda found: found.fun,
    )
    return ever.x[1] * (1 - 1 / classes), np.sqrt(2 * max(0.0, never - ever.fun))


def test_the_level_above_is_the_one_that_a_search_finds():
    levels = lapse._levels(torch.device("cpu"))
    between = (levels[1:] + levels[:-1]) / 2
    assert lapse._level_above(between).equal(torch.searchsorted(levels, between))
    assert lapse._level_above(torch.tensor([0.0, 30.0]).double()).tolist() == [1, len(levels) - 1]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("classes", "rate"), [(2, 0.1), (3, 0.3), (10, 0.05), (10, 0.4)])
def test_it_is_what_scipy_finds(classes, rate, factor):
    score, label = draw(1500, classes, rate, factor=factor)
    found = fit(score, label)
    expected_rate, expected_z = by_scipy(score, label)
    assert found.rate == pytest.approx(expected_rate, abs=0.012)
    assert found.z == pytest.approx(expected_z, rel=0.04, abs=0.15)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_labels_that_only_uncertainty_makes_differ_do_not_lapse_whatever_the_temperature(classes, factor):
    # A third of two classes' labels, half of ten's, are not what is predicted.
    for seed in range(5):
        score, label = draw(2000, classes, 0.0, seed=seed, spread=1.0, factor=factor)
        assert (score.argmax(1) != label).double().mean() > 0.2
        assert fit(score, label).z < 3


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.4])
def test_the_share_of_wrong_labels_is_found(rate):
    lapses = fit(*draw(4000, 5, rate, seed=3))
    assert lapses.rate == pytest.approx(0.8 * rate, abs=0.03)  # a fifth of those drawn blindly are right
    assert lapses.z > 10


def test_rows_without_weight_do_not_count():
    score, label = draw(1000, 4, 0.2)
    wrong = (label + 1) % 4
    weight = torch.cat([torch.ones(1000), torch.zeros(1000)])
    assert fit(torch.cat([score, score]), torch.cat([label, wrong]), weight) == fit(score, label)


def test_ranks_come_to_what_one_does():
    score, label = draw(1001, 4, 0.2)

    def of_rank(rank, reduce):
        return fit(score[rank::3], label[rank::3], reduce=reduce)

    whole = fit(score, label)
    for lapses in run_ranks(of_rank, 3):
        assert lapses.rate == pytest.approx(whole.rate, abs=1e-9)
        assert lapses.z == pytest.approx(whole.z, abs=1e-6)


@pytest.mark.parametrize("label", [torch.zeros(50, dtype=torch.int64), torch.arange(50) % 2])
def test_scores_that_say_nothing_show_no_lapses(label):
    assert fit(torch.zeros(50, 2, dtype=torch.float64), label).z < 0.01
