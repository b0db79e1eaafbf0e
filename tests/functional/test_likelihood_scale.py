import pytest
import torch

from lightning_unlearn.functional import likelihood_scale
from lightning_unlearn.functional.likelihood_scale import _label_log_likelihood, fit_likelihood_scale
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks


def draw(n, classes, rate, *, too_sure=1.0, seed=0):
    """Log-likelihoods that are so many times too sure, labels of which a share is drawn blindly, and a first matrix."""
    generator = torch.Generator().manual_seed(seed)
    score = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    label = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(n, generator=generator) < rate
    drawn = torch.randint(0, classes, (n,), generator=generator)
    return too_sure * score, torch.where(blind, drawn, label), 0.8 * torch.eye(classes).double() + 0.2 / classes


@pytest.mark.parametrize("too_sure", [2.0, 5.0, 12.0])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_scale_undoes_what_is_too_sure(too_sure, rate):
    log_likelihood, label, start = draw(4000, 4, rate, too_sure=too_sure)
    fitted = fit_likelihood_scale(log_likelihood, label, torch.ones(4000), start)
    assert fitted.scale == pytest.approx(1 / too_sure, rel=0.3)


def test_only_wrong_labels_gain_by_a_matrix():
    gains = []
    for rate in (0.0, 0.05, 0.3):
        log_likelihood, label, start = draw(4000, 4, rate, too_sure=5.0)
        gains.append(fit_likelihood_scale(log_likelihood, label, torch.ones(4000), start).gain)
    assert gains[0] < 4 < 8 < gains[1] < gains[2]


def test_where_all_samples_are_told_equally_well_the_largest_scale_tells():
    truth = torch.arange(3000) % 2
    log_likelihood = 40 * torch.nn.functional.one_hot(truth, 2).double()
    label = torch.where(torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.3, 1 - truth, truth)
    fitted = fit_likelihood_scale(log_likelihood, label, torch.ones(3000), torch.full((2, 2), 0.5).double() + 0.2)
    assert fitted.gain < 4.5  # a scale of next to nothing explains the same
    assert fitted.gain_at_largest > -1


def test_no_scale_above_the_largest_is_tried():
    log_likelihood, label, start = draw(500, 3, 0.1, too_sure=0.2)
    assert fit_likelihood_scale(log_likelihood, label, torch.ones(500), start, largest=0.7).scale == 0.7


@pytest.mark.parametrize("has_matrix", [False, True])
def test_log_likelihood_is_the_sum_over_true_classes(has_matrix):
    log_likelihood, label, matrix = draw(50, 3, 0.3)
    weight, total = torch.rand(50).double(), 0.0
    matrix = matrix.roll(1, 1) + 0.1 if has_matrix else None
    for row, y, w in zip(log_likelihood, label, weight, strict=True):
        share = (0.5 * row).exp() / (0.5 * row).exp().sum()
        likely = share[y] if matrix is None else sum(share[k] * matrix[k, y] for k in range(3))
        total += w * likely.log()
    found = _label_log_likelihood(log_likelihood, label, weight, 0.5, matrix, no_reduce)
    assert found == pytest.approx(total.item())


def test_rows_without_weight_do_not_count():
    log_likelihood, label, start = draw(1000, 3, 0.2, too_sure=3.0)
    weight = (torch.arange(1000) < 600).double()
    some = fit_likelihood_scale(log_likelihood[:600], label[:600], torch.ones(600), start)
    with_others = fit_likelihood_scale(log_likelihood, 0 * label, weight, start)
    of_same = fit_likelihood_scale(log_likelihood, torch.where(weight > 0, label, 0), weight, start)
    assert of_same.scale == some.scale
    assert of_same.gain == pytest.approx(some.gain)
    assert with_others.scale != some.scale


def test_every_so_many_rows_say_about_the_same(monkeypatch):
    log_likelihood, label, start = draw(8000, 4, 0.2, too_sure=5.0)
    whole = fit_likelihood_scale(log_likelihood, label, torch.ones(8000), start)
    monkeypatch.setattr(likelihood_scale, "MAX_NUMBERS", 8000)
    thinned = fit_likelihood_scale(log_likelihood, label, torch.ones(8000), start)
    assert thinned.scale == pytest.approx(whole.scale, rel=0.3)
    assert thinned.gain == pytest.approx(whole.gain, rel=0.2)


def test_two_ranks_and_one_without_rows_find_what_one_finds():
    log_likelihood, label, start = draw(1001, 3, 0.2, too_sure=3.0)
    one = fit_likelihood_scale(log_likelihood, label, torch.ones(1001), start)

    def on_rank(rank, reduce):
        rows = slice(rank, 1001 if rank < 2 else 2, 2)
        part = log_likelihood[rows], label[rows], torch.ones(len(label[rows]))
        return fit_likelihood_scale(*part, start, reduce=reduce)

    for found in run_ranks(on_rank, 3):
        assert found.scale == one.scale
        assert found.gain == pytest.approx(one.gain)
