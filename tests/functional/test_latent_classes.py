import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from lightning_unlearn.functional import (
    LatentClasses,
    fit_latent_classes,
    fit_transition,
    given_posterior,
    latent_classes,
    transition,
)
from lightning_unlearn.functional.transition import log_odds_of
from lightning_unlearn.utilities import chunks
from lightning_unlearn.utilities.chunks import LEAST_ROWS, ROWS, rows_at_a_time, softmax
from tests.ranks import run_ranks

C, D = 4, 3
PRIOR = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
MEAN = 4 * torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
SYMMETRIC = 0.6 * torch.eye(C) + 0.1
ASYMMETRIC = 0.6 * torch.eye(C) + 0.4 * torch.eye(C).roll(1, dims=1)


def draw(transition, n=2000, *, seed=0, apart=1.0):
    """Rows, given and true labels."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.multinomial(PRIOR, n, replacement=True, generator=generator)
    given = torch.multinomial(transition[true], 1, generator=generator).squeeze(1)
    return apart * MEAN[true] + torch.randn(n, D, generator=generator), given, true


def nearest_mean(x):
    """A first guess of the true classes that does not know the labels."""
    return (-(x.double().unsqueeze(1) - MEAN.double()).square().sum(dim=2) / 8).softmax(dim=1)


def fit(rows, label, weight=None, **options):
    return fit_latent_classes(
        rows, label, torch.ones(len(rows)) if weight is None else weight, nearest_mean, C, **options
    )


def assert_same(found, expected, **tolerance):
    for name in ("prior", "mean", "factor", "transition"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


def happened(true, given):
    """(C, C), what the samples drawn of each class were called; the draw differs between versions of torch."""
    counts = torch.zeros(C, C).double().index_put_((true, given), torch.tensor(1.0).double(), accumulate=True)
    return counts / counts.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("transition", [SYMMETRIC, ASYMMETRIC, torch.eye(C)], ids=["symmetric", "asymmetric", "clean"])
def test_prior_means_and_transition_are_recovered(transition):
    rows, given, true = draw(transition, 4000)
    classes = fit(rows, given)
    torch.testing.assert_close(classes.prior, PRIOR, atol=0.03, rtol=0)
    torch.testing.assert_close(classes.mean, MEAN.double(), atol=0.15, rtol=0)
    torch.testing.assert_close(classes.transition, happened(true, given), atol=0.04, rtol=0)
    covariance = classes.factor @ classes.factor.mT
    torch.testing.assert_close(covariance, torch.eye(D).double().expand(C, D, D), atol=0.15, rtol=0)
    posterior = given_posterior(classes.log_likelihood(rows), given, classes.transition)
    assert (posterior.argmax(dim=1) == true).float().mean() > 0.99


def test_wrong_labels_are_found_where_the_margin_is_blind():
    # A network that has learned that two in five of class c are called c + 1 prefers either by log .6 - log .4 only,
    # which its noise drowns; but which pair it wavers between shows the true class.
    _, given, true = draw(ASYMMETRIC)
    wrong = given != true
    log_p = (0.96 * ASYMMETRIC[true] + 0.01).log()
    rows = log_p + 0.6 * torch.randn(len(true), C, generator=torch.Generator().manual_seed(1))
    margin_calls_wrong = rows.argmax(dim=1) != given
    assert (margin_calls_wrong == wrong).float().mean() < 0.75

    classes = fit_latent_classes(rows, given, torch.ones(len(rows)), lambda x: (4 * x).softmax(dim=1), C)
    log_odds = log_odds_of(given_posterior(classes.log_likelihood(rows), given, classes.transition), given)
    assert ((log_odds < 0) == wrong).float().mean() > 0.97
    torch.testing.assert_close(classes.transition, ASYMMETRIC.double(), atol=0.1, rtol=0)


def naive_posterior(rows, given, prior, mean, covariance, transition):
    out = []
    for x, y in zip(rows.tolist(), given.tolist(), strict=True):
        p = [
            prior[k] * multivariate_normal(mean[k], covariance[k]).pdf(x) * transition[k][y] for k in range(len(prior))
        ]
        out.append([value / sum(p) for value in p])
    return torch.tensor(out, dtype=torch.float64)


def random_classes(shared, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(1 if shared else C, D, D, generator=generator).double()
    covariance = a @ a.mT + 0.5 * torch.eye(D)
    transition = torch.rand(C, C, generator=generator).double()
    transition /= transition.sum(dim=1, keepdim=True)
    mean = torch.randn(C, D, generator=generator).double()
    return LatentClasses(PRIOR, mean, torch.linalg.cholesky(covariance), transition), covariance.expand(C, D, D)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_log_likelihood_is_scipys(shared):
    classes, covariance = random_classes(shared)
    rows, _, _ = draw(SYMMETRIC, 50)
    found = classes.log_likelihood(rows)
    assert found.dtype == torch.float64
    for k in range(C):
        expected = np.log(PRIOR[k].item()) + multivariate_normal(classes.mean[k], covariance[k]).logpdf(rows.double())
        np.testing.assert_allclose(found[:, k], expected, rtol=1e-10)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_posterior_is_that_of_a_bayes_loop(shared):
    classes, covariance = random_classes(shared, seed=1)
    rows, given, _ = draw(SYMMETRIC, 60, apart=0.3)
    found = given_posterior(classes.log_likelihood(rows), given, classes.transition).exp()
    expected = naive_posterior(rows, given, PRIOR, classes.mean, covariance, classes.transition.tolist())
    torch.testing.assert_close(found, expected)


def test_posterior_survives_what_is_impossible():
    log_likelihood = torch.tensor([[-1e4, -2e4], [0.0, -1.0]])
    found = given_posterior(log_likelihood, torch.tensor([1, 0]), torch.eye(2).double())
    assert found.isfinite().all()
    assert found.argmax(dim=1).tolist() == [0, 0]


def test_log_odds_match_a_loop():
    generator = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(40, C, generator=generator)).double().log_softmax(dim=1)
    label = torch.randint(0, C, (40,), generator=generator)
    expected = [math.log(p[y] / (1 - p[y])) for p, y in zip(log_p.exp().tolist(), label.tolist(), strict=True)]
    torch.testing.assert_close(log_odds_of(log_p, label), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(log_odds_of(log_p + 7, label), log_odds_of(log_p, label))


def test_log_odds_are_exact_far_beyond_the_precision_of_a_probability():
    assert log_odds_of(torch.tensor([[0.0, -90.0]]), torch.tensor([0])).item() == 90


def padded_shares(columns, rank, world_size):
    """Every ``world_size``-th row; shorter shares are filled up with rows that would change the fit if they counted."""
    rows, label = (column[rank::world_size] for column in columns)
    weight = torch.ones(-(-len(columns[0]) // world_size) + 2)
    padding = len(weight) - len(rows)
    weight[len(rows) :] = 0
    rows = torch.cat([rows, torch.full((padding, D), 1e3)])
    return rows, torch.cat([label, label.new_zeros(padding)]), weight


@pytest.mark.parametrize("most_moments", [2**20, 10], ids=["own", "shared"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_fit_what_one_fits(world_size, most_moments, monkeypatch):
    monkeypatch.setattr(latent_classes, "MOST_MOMENTS", most_moments)
    rows, given, _ = draw(ASYMMETRIC, 301, apart=0.5)
    whole = fit(rows, given)
    transition = fit_transition(whole.log_likelihood(rows), given, torch.ones(301), whole.transition)

    def work(rank, reduce):
        share, label, weight = padded_shares((rows, given), rank, world_size)
        classes = fit(share, label, weight, reduce=reduce)
        of_share = fit_transition(classes.log_likelihood(share), label, weight, classes.transition, reduce=reduce)
        return classes, of_share

    for classes, of_share in run_ranks(work, world_size):
        assert_same(classes, whole)
        torch.testing.assert_close(of_share, transition)


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(random):
    rows, given, _ = draw(SYMMETRIC, 200, apart=0.5)
    order = list(range(200))
    random.shuffle(order)
    assert_same(fit(rows[order], given[order]), fit(rows, given))


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_more_rows_than_a_chunk_are_as_one(offset, monkeypatch):
    n = 100
    rows, given, _ = draw(SYMMETRIC, n, apart=0.5)
    assert n < ROWS
    whole, log_likelihood = fit(rows, given), fit(rows, given).log_likelihood(rows)
    transition = fit_transition(log_likelihood, given, torch.ones(n), whole.transition)
    monkeypatch.setattr(chunks, "ROWS", n // 2 + offset)
    assert_same(fit(rows, given), whole)
    torch.testing.assert_close(whole.log_likelihood(rows), log_likelihood)
    torch.testing.assert_close(fit_transition(log_likelihood, given, torch.ones(n), whole.transition), transition)
    in_parts = fit_transition(lambda part: log_likelihood[part], given, torch.ones(n), whole.transition)
    torch.testing.assert_close(in_parts, transition)


def test_real_chunks():
    rows, given, true = draw(SYMMETRIC, ROWS + 5)
    classes = fit(rows, given)
    torch.testing.assert_close(classes.transition, SYMMETRIC.double(), atol=0.04, rtol=0)
    assert (classes.log_likelihood(rows).argmax(dim=1) == true)[-5:].all()


def test_many_classes_share_a_covariance(monkeypatch):
    rows, given, true = draw(SYMMETRIC)
    assert fit(rows, given).factor.shape == (C, D, D)
    monkeypatch.setattr(latent_classes, "MOST_MOMENTS", C * D**2)
    assert fit(rows, given).factor.shape == (C, D, D)
    monkeypatch.setattr(latent_classes, "MOST_MOMENTS", C * D**2 - 1)
    classes = fit(rows, given)
    assert classes.factor.shape == (1, D, D)
    posterior = given_posterior(classes.log_likelihood(rows), given, classes.transition)
    assert (posterior.argmax(dim=1) == true).float().mean() > 0.99
    # It is what is left of the total once the classes' means are out.
    share = torch.nn.functional.one_hot(true, C).double()
    within = rows.double() - (share / share.sum(0)).T[true] @ rows.double()
    expected = within.T @ within / len(rows)
    torch.testing.assert_close((classes.factor @ classes.factor.mT)[0], expected, atol=0.05, rtol=0)


def test_a_large_class_has_a_covariance_of_its_own_in_part():
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(4000) % 2
    scale = torch.tensor([1.0, 3.0])[true].unsqueeze(1)
    rows = torch.tensor([[-20.0], [20.0]])[true] + scale * torch.randn(4000, 1, generator=generator)

    def sides(x):
        return torch.stack([x[:, 0] < 0, x[:, 0] > 0], dim=1).double()

    variance = fit_latent_classes(rows, true, torch.ones(4000), sides, 2).factor.flatten().square()
    # A fifth of 1 and 9, four fifths of their mean 5.
    torch.testing.assert_close(variance, torch.tensor([4.2, 5.8]).double(), rtol=0.05, atol=0)


def test_classes_that_never_occur_draw_nothing():
    rows, given, true = draw(SYMMETRIC, 400)
    keep = (true < 2) & (given < 2)
    rows, given, true = rows[keep], given[keep], true[keep]

    def sides(x):
        guess = nearest_mean(x)
        guess[:, 2:] = 0
        return guess / guess.sum(dim=1, keepdim=True)

    classes = fit_latent_classes(rows, given, torch.ones(len(rows)), sides, C)
    for name in ("prior", "mean", "factor", "transition"):
        assert getattr(classes, name).isfinite().all()
    assert classes.prior[2:].max() < 1e-200
    torch.testing.assert_close(classes.transition.sum(dim=1), torch.ones(C).double())
    log_likelihood = classes.log_likelihood(rows)
    assert log_likelihood.isfinite().all()
    posterior = given_posterior(log_likelihood, given, classes.transition)
    assert (posterior.argmax(dim=1) == true).float().mean() > 0.98
    assert posterior[:, 2:].exp().max() < 1e-9


def test_rows_without_spread_can_be_factorized():
    rows, given, _ = draw(SYMMETRIC, 50)
    rows[:, 1] = 5.0
    assert fit(rows, given).log_likelihood(rows).isfinite().all()
    assert fit(torch.zeros(50, D), given).log_likelihood(torch.zeros(50, D)).isfinite().all()


def test_rows_far_from_the_origin_keep_their_covariance():
    rows, given, _ = draw(SYMMETRIC, 500)
    rows, far = rows.double(), 1e6

    def moved(x):
        return nearest_mean(x - far)

    found = fit_latent_classes(rows + far, given, torch.ones(500), moved, C)
    expected = fit(rows, given)
    torch.testing.assert_close(found.factor, expected.factor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.transition, expected.transition, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transition", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_fit_transition_finds_it_from_the_true_likelihoods(transition):
    rows, given, true = draw(transition, 4000)
    classes = LatentClasses(PRIOR, MEAN.double(), torch.eye(D).double().unsqueeze(0), torch.eye(C).double())
    flat = torch.full((C, C), 1 / C).double()
    found = fit_transition(classes.log_likelihood(rows), given, torch.ones(4000), flat)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(C).double())
    assert (found > 0).all()
    torch.testing.assert_close(found, happened(true, given), atol=0.04, rtol=0)


def test_one_step_of_the_transition_matches_a_loop():
    _, given, _ = draw(SYMMETRIC, 30)
    log_likelihood = torch.randn(30, C, generator=torch.Generator().manual_seed(5)).double()
    weight = (torch.arange(30) % 3 > 0).float()
    start = SYMMETRIC.double()
    counts = np.full((C, C), 1 / C)
    for i in range(30):
        p = [math.exp(log_likelihood[i, k]) * start[k, given[i]].item() for k in range(C)]
        for k in range(C):
            counts[k, given[i]] += weight[i].item() * p[k] / sum(p)
    expected = torch.tensor(counts / counts.sum(axis=1, keepdims=True))
    torch.testing.assert_close(fit_transition(log_likelihood, given, weight, start, steps=1), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused_on_every_rank(value):
    def work(rank, reduce):
        with pytest.raises(ValueError, match=r"Latent classes need finite evidence, .* whether training has diverged"):
            fit(rows[rank::2], given[rank::2], reduce=reduce)
        return True

    rows, given, _ = draw(SYMMETRIC, 20)
    rows[4, 1] = value
    assert run_ranks(work, 2) == [True, True]


@pytest.mark.parametrize(("held", "single", "tolerance"), [(0, 2**26, 1e-6), (0, 0, 1e-14)])
def test_the_transition_is_the_same_whether_likelihoods_are_held(held, single, tolerance, monkeypatch):
    (rows, given, _), start = draw(SYMMETRIC, 300), SYMMETRIC.double()
    log_likelihood = fit(rows, given).log_likelihood(rows)
    calls = []

    def asked(part):
        calls.append(part)
        return log_likelihood[part]

    expected = fit_transition(asked, given, torch.ones(300), start, steps=4)
    assert len(calls) == 1
    monkeypatch.setattr(transition, "MOST_HELD", held)
    monkeypatch.setattr(transition, "MOST_HELD_SINGLE", single)
    monkeypatch.setattr(chunks, "ROWS", 100)
    found = fit_transition(asked, given, torch.ones(300), start, steps=4)
    assert len(calls) == 1 + (3 if single else 12)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_the_transition_of_likelihoods_far_below_any_number():
    rows = [[-2000.0, -1000.0, -1000.0 + math.log(3)], [0.0, -5000.0, -5000.0]]
    log_likelihood = torch.tensor(rows, dtype=torch.float64)
    start = torch.full((3, 3), 1 / 3).double()
    found = fit_transition(log_likelihood, torch.tensor([1, 2]), torch.ones(2), start, steps=1)
    counts = torch.tensor([[0, 0, 1], [0, 0.25, 0], [0, 0.75, 0]]).double() + 1 / 3
    torch.testing.assert_close(found, counts / counts.sum(dim=1, keepdim=True))
    # What is said to be impossible is all that there is.
    found = fit_transition(log_likelihood, torch.tensor([1, 2]), torch.ones(2), torch.eye(3).double(), steps=1)
    counts = torch.tensor([[0, 0, 1.0], [0, 1.0, 0], [0, 0, 0]]).double() + 1 / 3
    torch.testing.assert_close(found, counts / counts.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("classes", [2, 10, 64, 65, 1000])
def test_softmax_is_torchs(classes):
    logits = 50 * torch.randn(20, classes, generator=torch.Generator().manual_seed(1)).double() - 900
    expected = logits.softmax(dim=1)
    torch.testing.assert_close(softmax(logits.clone()), expected, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(softmax(logits.T.contiguous().T), expected, atol=1e-15, rtol=1e-12)


def test_fewer_rows_at_a_time_of_more_classes(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert rows_at_a_time(10, cpu) == rows_at_a_time(10, cuda) == rows_at_a_time(1024, cuda) == ROWS
    assert rows_at_a_time(1024, cpu) == 256
    assert rows_at_a_time(10_000, cpu) == LEAST_ROWS
    assert rows_at_a_time(10_000, cuda) == 838
    assert rows_at_a_time(10**9, cpu) == rows_at_a_time(10**9, cuda) == 1
    rows, given, _ = draw(SYMMETRIC, 301)
    whole = fit(rows, given)
    monkeypatch.setattr(chunks, "MOST_NUMBERS", 7 * C)
    assert rows_at_a_time(C, cpu) == rows_at_a_time(C, cuda) == 7
    assert_same(fit(rows, given), whole)
    torch.testing.assert_close(whole.log_likelihood(rows), fit(rows, given).log_likelihood(rows))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, 1e15])
def test_classes_that_do_not_vary_can_be_factorized(scale):
    # Their variance is the rounding of two large sums, which had no factor where it came out negative.
    true = torch.arange(700) % C
    given = torch.where(torch.arange(700) % 10 == 0, (true + 1) % C, true)
    rows = (scale * MEAN[true]).double() + 0.1 * scale
    first = torch.nn.functional.one_hot(true, C).double()
    classes = fit_latent_classes(
        rows, given, torch.ones(700), lambda x: first[((x.unsqueeze(1) - rows[:C]).abs().sum(2)).argmin(1)], C
    )
    assert classes.log_likelihood(rows).argmax(dim=1).equal(true)
    torch.testing.assert_close(classes.transition, happened(true, given), atol=0.02, rtol=0)


def test_the_first_guess_and_the_likelihoods_are_left_as_they_are():
    rows, given, _ = draw(SYMMETRIC, 200)
    guess, weight = nearest_mean(rows), torch.full((200,), 0.5)
    before = guess.clone()
    classes = fit_latent_classes(rows, given, weight, lambda x: guess, C)
    assert guess.equal(before)
    likelihood = classes.log_likelihood(rows)
    before = likelihood.clone()
    given_posterior(likelihood, given, classes.transition)
    fit_transition(likelihood, given, weight, classes.transition)
    assert likelihood.equal(before)
