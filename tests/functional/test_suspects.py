import pytest
import torch

from lightning_unlearn.functional.suspects import LEAST, expected_precision, in_order_of, longest_list, with_mean
from tests.ranks import run_ranks


def drawn(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, generator=generator).sigmoid().double() ** 3,
        torch.randn(n, generator=generator).double(),
        torch.rand(n, generator=generator),
    )


def test_with_mean_has_that_mean_and_keeps_the_order():
    p, _, w = drawn(5000)
    for mean in (1e-3, 0.05, 0.5):
        moved = with_mean(p, w, mean)
        assert ((moved * w).sum() / w.sum()).item() == pytest.approx(mean, rel=0.02)
        assert moved.argsort().equal(p.argsort())


def test_in_order_of_hands_out_the_same_values_in_the_order_of_the_score():
    p, score, _ = drawn(3000)
    out = in_order_of(score, p, torch.ones(3000))
    assert out.argsort().equal(score.argsort())
    # The naive twin sorts both.
    naive = torch.empty_like(p)
    naive[score.argsort()] = p.sort().values
    assert (torch.logit(out) - torch.logit(naive)).abs().max() < 0.05
    assert out.mean().item() == pytest.approx(p.mean().item(), rel=0.01)


def test_in_order_of_survives_scores_that_are_all_the_same():
    p, _, w = drawn(50)
    out = in_order_of(torch.zeros(50), p, w)
    assert out.isfinite().all()
    assert out.unique().numel() == 1


def test_the_longest_list_is_that_of_a_sort():
    p, _, w = drawn(2000)
    order = p.argsort(descending=True)
    mean = (p * w)[order].cumsum(0) / w[order].cumsum(0)
    for precision in (0.3, 0.5, 0.8):
        length, threshold, expected = expected_precision(p, w).longest(precision)
        naive = w[order][mean >= precision].sum().item()
        assert length == pytest.approx(naive, abs=3)
        assert (w * (p >= threshold)).sum().item() == pytest.approx(length, abs=1e-3)
        assert expected == pytest.approx(precision, abs=0.01)


def test_no_list_is_as_good_as_that():
    assert expected_precision(torch.full((10,), 0.1), torch.ones(10)).longest(0.5) == (0.0, 1.0, 0.0)


def test_no_sample_of_a_list_is_surely_clean():
    # Two fifths are surely wrong, the others surely right: half of the list would be of the others.
    p = torch.cat([torch.full((400,), 0.999), torch.linspace(0.0005, 0.002, 600)])
    found = expected_precision(p, torch.ones(1000))
    assert found.longest(0.5)[0] > 790
    assert found.longest(0.5, LEAST)[0] == 400
    assert found.longest(0.5, 0.9995)[0] == 0


def test_expected_precision_at_depth_is_the_mean_of_the_first():
    p, _, _ = drawn(1000)
    first = p.sort(descending=True).values
    found = expected_precision(p, torch.ones(1000)).at_depth([1, 10, 100, 1000])
    for depth, each in zip([1, 10, 100, 1000], found, strict=True):
        assert each == pytest.approx(first[:depth].mean().item(), abs=0.005)


def test_ranks_find_what_one_finds():
    p, score, w = drawn(1001)
    one = in_order_of(score, with_mean(p, w, 0.1), w)

    def on_rank(rank, reduce):
        part = slice(rank, None, 2)
        return in_order_of(score[part], with_mean(p[part], w[part], 0.1, reduce=reduce), w[part], reduce=reduce)

    for rank, of_rank in enumerate(run_ranks(on_rank, 2)):
        torch.testing.assert_close(of_rank, one[rank::2])


def test_the_longest_list_leaves_out_what_is_hardly_wrong_and_ranks_make_the_same():
    probability = torch.tensor([0.99, 0.98, 0.9, 0.8, 0.5, LEAST - 0.05, 0.01])
    weight = torch.tensor([1.0, 1, 1, 0, 1, 1, 1])
    listed, expected = longest_list(probability, weight, 0.8)
    assert listed.tolist() == [True, True, True, True, True, False, False]
    assert expected == pytest.approx((0.99 + 0.98 + 0.9 + 0.5) / 4, abs=1e-6)
    both = run_ranks(lambda rank, reduce: longest_list(probability[rank::2], weight[rank::2], 0.8, reduce=reduce), 2)
    for rank, (of_rank, share) in enumerate(both):
        assert of_rank.equal(listed[rank::2])
        assert share == pytest.approx(expected)
    assert not longest_list(probability[-1:], weight[-1:], 0.8)[0].any()
