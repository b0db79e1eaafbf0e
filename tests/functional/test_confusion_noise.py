import pytest
import torch

from lightning_unlearn.functional.confusion_noise import _Likelihood, asks_of_confusion, confusion_rate
from lightning_unlearn.functional.symmetric_noise import fit_symmetric_noise
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

C = 6


def draw(n, matrix, *, own=1.5, seed=0):
    """Scores of true classes, two of which are alike each but for their own part, and labels from rows of a matrix."""
    generator = torch.Generator().manual_seed(seed)
    alike = torch.randn(n, C // 2, generator=generator, dtype=torch.float64).repeat_interleave(2, dim=1)
    score = 4 * alike + own * torch.randn(n, C, generator=generator, dtype=torch.float64)
    truth = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    label = torch.multinomial(matrix[truth], 1, generator=generator).squeeze(1)
    return score, label, (label != truth).double().mean().item()


def pairs(rate):
    """Classes 0 and 1, 2 and 3, 4 and 5 are taken for each other."""
    return (1 - rate) * torch.eye(C) + rate * torch.eye(C).reshape(-1, 2, C).flip(1).reshape(C, C)


def more(score, label, **options):
    weight = torch.ones(len(label), dtype=torch.float64)
    fit = fit_symmetric_noise(score, label, weight, biased=True)
    return fit, confusion_rate(score, label, weight, fit, **options)


def test_gradient_is_that_of_the_loss():
    score, label, _ = draw(300, pairs(0.3))
    loss_of = _Likelihood(score, label, torch.rand(300).double(), torch.arange(300) % 2, 2, no_reduce)
    at = torch.randn(2 + C + C * C, generator=torch.Generator().manual_seed(1)).double()
    _, gradient = loss_of(at)
    for k in range(len(at)):
        step = torch.zeros_like(at)
        step[k] = 1e-5
        assert gradient[k].item() == pytest.approx((loss_of(at + step)[0] - loss_of(at - step)[0]) / 2e-5, abs=1e-6)


def test_what_falls_on_the_class_beside_is_added():
    score, label, wrong = draw(6000, pairs(0.3), own=6.0)
    fit, (best, most) = more(score, label)
    assert fit.rate < wrong - 0.03
    assert fit.rate + best == pytest.approx(wrong, abs=0.02)
    assert best <= most


def test_classes_that_a_linear_map_of_the_scores_takes_for_each_other_may_only_be_alike():
    score, label, wrong = draw(6000, pairs(0.3))
    fit, (best, most) = more(score, label)
    assert best == 0
    assert fit.rate + most == pytest.approx(wrong, abs=0.03)


def test_scores_that_tell_classes_apart_which_are_the_same_show_no_wrong_labels():
    generator = torch.Generator().manual_seed(0)
    score = 4 * torch.randn(6000, C, generator=generator, dtype=torch.float64)
    true = score.reshape(6000, -1, 2).mean(2).repeat_interleave(2, dim=1)  # what tells them apart is chance
    label = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    _, (best, most) = more(score, label)
    assert most > 0.1
    assert best == 0


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_of_right_labels_and_blind_errors_nothing_is_added(rate):
    score, label, _ = draw(6000, (1 - rate) * torch.eye(C) + rate / C)
    assert more(score, label)[1][0] == 0


def test_ranks_find_the_same():
    score, label, _ = draw(1001, pairs(0.3), own=6.0)
    fit, whole = more(score, label)
    assert whole[0] > 0

    def on_rank(rank, reduce):
        rows = slice(rank, None, 2)
        return confusion_rate(score[rows], label[rows], torch.ones(1001).double()[rows], fit, reduce=reduce)

    for found in run_ranks(on_rank, 2):
        assert found == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(("classes", "samples", "asked"), [(2, 1e6, False), (10, 200, True), (10, 199, False)])
def test_is_asked_of_more_than_two_classes_and_enough_samples(classes, samples, asked):
    assert asks_of_confusion(classes, samples) == asked
