import math
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.preprocessing import StandardScaler

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.functional import gaussian, standardization
from lightning_unlearn.functional import mixture as module
from lightning_unlearn.functional.gaussian import GaussianMixture
from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.standardization import standardize
from tests.ranks import run_ranks


def two_clouds(n, dimension, distance, seed=0):
    """Two correlated Gaussians of unequal size and shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, dimension, generator=generator, dtype=torch.float64)
    second = torch.rand(n, generator=generator) < 0.35
    shear = torch.eye(dimension, dtype=torch.float64) + 0.3 * torch.ones(dimension, dimension).triu(1)
    return torch.where(second.unsqueeze(1), 0.6 * rows @ shear + distance, rows)


def sklearn_from_our_start(rows, **kwargs):
    """scikit-learn's EM from the two halves at which ours starts: the sign along the first principal component."""
    centered = rows - rows.mean(dim=0)
    axis = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    above = centered @ axis > 0
    weights, means, precisions = [], [], []
    for half in (rows[~above], rows[above]):
        covariance = torch.cov(half.T, correction=0).reshape(rows.shape[1], rows.shape[1])
        weights.append(len(half) / len(rows))
        means.append(half.mean(dim=0))
        precisions.append(torch.linalg.inv(covariance + 1e-6 * torch.eye(rows.shape[1])))
    mixture = SklearnMixture(
        2,
        weights_init=weights,
        means_init=torch.stack(means).numpy(),
        precisions_init=torch.stack(precisions).numpy(),
        **kwargs,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where max_iter ends the fit
        return mixture.fit(rows.numpy())


def in_order(mixture):
    """Weight, mean and covariance with the component of the smaller mean sum first."""
    order = mixture.mean.sum(dim=1).argsort()
    return mixture.weight[order], mixture.mean[order], mixture.covariance[order]


def assert_same_mixture(ours, theirs, **tolerance):
    expected = GaussianMixture(
        torch.from_numpy(theirs.weights_), torch.from_numpy(theirs.means_), torch.from_numpy(theirs.covariances_)
    )
    for got, want in zip(in_order(ours), in_order(expected), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("dimension", [1, 2, 8])
@pytest.mark.parametrize("max_iter", [1, 2, 7, 100])
def test_each_em_step_is_that_of_sklearn(dimension, max_iter):
    rows = two_clouds(500, dimension, distance=1.5)

    ours = fit_mixture(rows, torch.ones(500), max_iter=max_iter)
    theirs = sklearn_from_our_start(rows, max_iter=max_iter)

    assert ours.n_iter == theirs.n_iter_
    assert ours.converged == theirs.converged_
    assert ours.log_likelihood == pytest.approx(theirs.lower_bound_, abs=1e-6)
    assert_same_mixture(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tolerance_decides_when_to_stop():
    rows = two_clouds(500, 2, distance=1.5)
    loose, tight = (fit_mixture(rows, torch.ones(500), tol=tol) for tol in (1e-1, 1e-9))

    assert loose.converged
    assert loose.n_iter == sklearn_from_our_start(rows, tol=1e-1).n_iter_
    assert tight.n_iter > 5 * loose.n_iter
    assert tight.log_likelihood > loose.log_likelihood


@pytest.mark.parametrize("dimension", [1, 3])
def test_separated_data_gives_what_sklearn_finds_from_its_own_start(dimension):
    rows = two_clouds(800, dimension, distance=8.0)
    ours = fit_mixture(rows, torch.ones(800), tol=1e-9)
    theirs = SklearnMixture(2, tol=1e-9, random_state=0).fit(rows.numpy())
    assert_same_mixture(ours, theirs, rtol=1e-5, atol=1e-5)


def wide_rows(n=3000, dimension=48, narrow=1.0):
    """Two overlapping clouds, standardized, float32; along half of the axes the second is narrower."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(n, dimension, generator=generator)
    second = torch.rand(n, 1, generator=generator) < 0.4
    scale = torch.where(torch.arange(dimension) % 2 == 0, narrow, 1.3)
    mixing = torch.eye(dimension) + 0.3 * torch.randn(dimension, dimension, generator=generator) / dimension**0.5
    return standardize(torch.where(second, rows * scale + 0.5, rows) @ mixing, torch.ones(n))


def assert_near_sklearn(ours, theirs):
    assert ours.n_iter == theirs.n_iter_
    assert ours.log_likelihood == pytest.approx(theirs.lower_bound_, rel=1e-5)
    assert_same_mixture(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("narrow", [1.0, 1e-2, 1e-4], ids=["difference", "shared coordinates", "separate coordinates"])
def test_wide_float32_rows_give_the_mixture_of_double_precision(narrow):
    rows = wide_rows(narrow=narrow)
    assert standardization.work_dtype(rows) == torch.float32
    assert_near_sklearn(fit_mixture(rows, torch.ones(3000)), sklearn_from_our_start(rows.double()))


def test_where_float32_products_are_rounded_the_work_is_done_in_float64(monkeypatch):
    rows = wide_rows(100)
    # What torch.set_float32_matmul_precision("medium") allows, and only some processors do.
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.mm(a.bfloat16().float(), b))
    assert standardization.work_dtype(rows) == torch.float64


def test_rows_of_low_rank_can_be_fitted_in_float32():
    rows = wide_rows(dimension=40)
    rows = torch.cat([rows[:, :30], rows[:, :20] @ torch.ones(20, 10), torch.zeros(3000, 3)], dim=1)
    mixture = fit_mixture(standardize(rows, torch.ones(3000)), torch.ones(3000))
    assert math.isfinite(mixture.log_likelihood)
    torch.linalg.cholesky(mixture.covariance)


@pytest.mark.parametrize(("limit", "value"), [("SIMILAR", math.inf), ("NARROWEST", math.inf)])
def test_every_way_to_the_moments_gives_the_same(monkeypatch, limit, value):
    rows = two_clouds(500, 4, distance=1.5)
    expected = fit_mixture(rows, torch.ones(500))
    monkeypatch.setattr(gaussian if limit == "NARROWEST" else module, limit, value)
    got = fit_mixture(rows, torch.ones(500))
    assert got.n_iter == expected.n_iter
    for ours, theirs in zip(in_order(got), in_order(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ranks_that_choose_other_ways_agree(monkeypatch):
    rows = two_clouds(400, 4, distance=1.5)
    whole = fit_mixture(rows, torch.ones(400))
    decided, shared = threading.local(), gaussian._shared
    monkeypatch.setattr(gaussian, "_shared", lambda *args: None if decided.separate else shared(*args))

    def fit(rank, reduce):
        decided.separate = rank == 0
        return fit_mixture(rows[rank::2], torch.ones(200), reduce=reduce)

    for got in run_ranks(fit, 2):
        for ours, theirs in zip(in_order(got), in_order(whole), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_rows_that_require_a_gradient_can_be_fitted():
    rows = two_clouds(50, 2, distance=2.0).requires_grad_()
    assert not fit_mixture(rows, torch.ones(50)).mean.requires_grad


def test_log_prob_and_posterior_match_scipy():
    rows = two_clouds(300, 3, distance=2.0)
    mixture = fit_mixture(rows, torch.ones(300))
    density = torch.stack(
        [
            mixture.weight[k]
            * torch.from_numpy(multivariate_normal(mixture.mean[k], mixture.covariance[k]).pdf(rows.numpy()))
            for k in range(2)
        ],
        dim=1,
    )
    torch.testing.assert_close(mixture.log_prob(rows), density.log())
    torch.testing.assert_close(mixture.posterior(rows), density / density.sum(dim=1, keepdim=True))


def test_posterior_of_no_rows_has_two_columns():
    mixture = fit_mixture(two_clouds(50, 2, distance=2.0), torch.ones(50))
    assert mixture.posterior(torch.zeros(0, 2)).shape == (0, 2)


def test_chunks_change_nothing(monkeypatch):
    rows = two_clouds(500, 3, distance=1.5)
    whole = fit_mixture(standardize(rows, torch.ones(500)), torch.ones(500))
    monkeypatch.setattr(standardization, "CHUNK", 3 * 64)
    chunked = fit_mixture(standardize(rows, torch.ones(500)), torch.ones(500))
    torch.testing.assert_close(chunked.covariance, whole.covariance)
    torch.testing.assert_close(chunked.posterior(rows), whole.posterior(rows))


def test_an_offset_far_larger_than_the_spread_does_not_matter():
    rows = two_clouds(400, 2, distance=4.0)
    near, far = (fit_mixture(rows + offset, torch.ones(400)) for offset in (0.0, 1e7))
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(far.mean - 1e7, near.mean, rtol=1e-5, atol=1e-5)


def test_rows_of_weight_zero_do_not_count():
    rows = two_clouds(200, 2, distance=2.0)
    padded = torch.cat([rows, torch.full((30, 2), 50.0)])
    weight = torch.cat([torch.ones(200), torch.zeros(30)])
    for got, want in zip(
        in_order(fit_mixture(padded, weight)), in_order(fit_mixture(rows, torch.ones(200))), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_give_the_mixture_of_the_whole(world_size):
    n = 301  # no multiple of any world size, so that some ranks hold a padding row
    rows = two_clouds(n, 3, distance=2.0)
    rows[-1] = 40.0  # the row that is repeated as padding would move every mean if it counted twice

    def fit(rank, reduce):
        index, weight = shard_indices(n, rank, world_size)
        share = standardize(rows[index], weight, reduce)
        return share, fit_mixture(share, weight, reduce=reduce)

    whole = standardize(rows, torch.ones(n))
    expected = fit_mixture(whole, torch.ones(n))
    for rank, (share, got) in enumerate(run_ranks(fit, world_size)):
        torch.testing.assert_close(share, whole[shard_indices(n, rank, world_size)[0]])
        assert got.n_iter == expected.n_iter
        assert got.log_likelihood == pytest.approx(expected.log_likelihood)
        for ours, theirs in zip(in_order(got), in_order(expected), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_standardize_matches_sklearn(offset):
    rows = two_clouds(300, 4, distance=2.0) * torch.tensor([1.0, 1e-6, 1e6, 3.0]) + offset
    torch.testing.assert_close(
        standardize(rows, torch.ones(300)),
        torch.from_numpy(StandardScaler().fit_transform(rows.numpy())),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e8, 1e-30])
def test_constant_columns_become_zero(constant):
    rows = torch.randn(101, 2, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = constant
    scaled = standardize(rows, torch.ones(101))
    assert (scaled[:, 1] == 0).all()
    assert scaled[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_standardize_keeps_the_dtype():
    assert standardize(torch.randn(5, 2), torch.ones(5)).dtype == torch.float32
    assert standardize(torch.randn(5, 2).double(), torch.ones(5)).dtype == torch.float64


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(40, 3),
        torch.full((40, 1), 7.0),
        torch.cat([torch.randn(40, 1, generator=torch.Generator().manual_seed(1)), torch.ones(40, 1)], dim=1),
        torch.cat([torch.zeros(39, 2), torch.full((1, 2), 1e4)]),
        torch.cat([torch.zeros(20, 1), torch.ones(20, 1)]),
    ],
    ids=["all zero", "all equal", "one constant column", "one outlier", "two values"],
)
@pytest.mark.parametrize("standardized", [True, False])
def test_degenerate_rows_give_finite_results(rows, standardized):
    weight = torch.ones(len(rows))
    rows = standardize(rows, weight) if standardized else rows
    mixture = fit_mixture(rows, weight)
    posterior = mixture.posterior(rows)
    assert mixture.mean.isfinite().all()
    assert mixture.covariance.isfinite().all()
    assert math.isfinite(mixture.log_likelihood)
    assert mixture.weight.sum().item() == pytest.approx(1)
    torch.testing.assert_close(posterior.sum(dim=1), torch.ones(len(rows), dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_raise(value):
    rows = two_clouds(30, 2, distance=2.0)
    rows[7, 1] = value
    message = "needs finite evidence, but some rows are NaN or infinite. Check whether training has diverged"
    with pytest.raises(ValueError, match=message):
        fit_mixture(rows, torch.ones(30))
    with pytest.raises(ValueError, match=message):
        fit_mixture(standardize(rows, torch.ones(30)), torch.ones(30))


def test_rows_that_are_not_finite_raise_on_the_other_ranks_too():
    def fit(rank, reduce):
        rows = two_clouds(30, 1, distance=2.0)
        rows[3] = math.nan if rank == 0 else 0.0
        with pytest.raises(ValueError, match="needs finite evidence"):
            fit_mixture(rows, torch.ones(30), reduce=reduce)
        return True

    assert run_ranks(fit, 2) == [True, True]


finite = st.floats(-5, 5, allow_subnormal=False)
variance = st.floats(0.01, 10)


@given(first=finite, second=finite, v1=variance, v2=variance, share=st.floats(0.01, 0.99), component=st.integers(0, 1))
@settings(deadline=None, max_examples=150)
def test_posterior_monotone_is_monotone_and_exact_between_the_means(first, second, v1, v2, share, component):
    mixture = GaussianMixture(
        weight=torch.tensor([share, 1 - share], dtype=torch.float64),
        mean=torch.tensor([[first], [second]], dtype=torch.float64),
        covariance=torch.tensor([[[v1]], [[v2]]], dtype=torch.float64),
    )
    x = torch.linspace(-30, 30, 601, dtype=torch.float64).unsqueeze(1)
    probability = mixture.posterior_monotone(x, component)
    step = probability.diff()
    mean = mixture.mean.flatten()
    rises = mean[component] > mean[1 - component]
    assert ((step if rises else -step) >= -1e-9).all()
    assert ((probability >= 0) & (probability <= 1)).all()

    # The parabola of the log-odds never turns between the means, so there nothing is changed.
    between = torch.linspace(min(first, second), max(first, second), 50, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(
        mixture.posterior_monotone(between, component), mixture.posterior(between)[:, component], rtol=1e-7, atol=1e-9
    )


def test_posterior_monotone_is_held_past_the_vertex():
    # Log-odds of component 1 against 0 with variances 1 and 4: 0.375 x^2 + 0.5 x + const, lowest at x = -2/3.
    mixture = GaussianMixture(
        weight=torch.tensor([0.5, 0.5], dtype=torch.float64),
        mean=torch.tensor([[0.0], [2.0]], dtype=torch.float64),
        covariance=torch.tensor([[[1.0]], [[4.0]]], dtype=torch.float64),
    )
    x = torch.tensor([[-10.0], [-2 / 3], [1.0], [10.0]], dtype=torch.float64)
    exact = mixture.posterior(x)[:, 1]
    held = mixture.posterior_monotone(x, 1)
    torch.testing.assert_close(held, torch.stack([exact[1], exact[1], exact[2], exact[3]]))
    assert exact[0] > 0.99  # the wider component takes the far tail of the other


def test_posterior_monotone_of_equal_variances_is_the_posterior():
    mixture = GaussianMixture(
        weight=torch.tensor([0.3, 0.7], dtype=torch.float64),
        mean=torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        covariance=torch.ones(2, 1, 1, dtype=torch.float64),
    )
    x = torch.linspace(-9, 9, 31, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(mixture.posterior_monotone(x, 0), mixture.posterior(x)[:, 0])


def test_posterior_monotone_refuses_rows_of_several_columns():
    mixture = fit_mixture(two_clouds(50, 2, distance=2.0), torch.ones(50))
    with pytest.raises(ValueError, match=r"Expected rows of shape \(n, 1\), but got \(4, 2\)"):
        mixture.posterior_monotone(torch.zeros(4, 2), 0)
