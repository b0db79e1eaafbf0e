import pytest
import torch

from lightning_unlearn.functional import confident_disagreement, evidence
from tests.ranks import run_ranks


def draw(n, groups, seed, spread=6.0):
    """Log-odds, whether the sample agrees (the less likely, the more confident), group, weight."""
    generator = torch.Generator().manual_seed(seed)
    log_odds = spread * torch.randn(n, generator=generator)
    agrees = torch.rand(n, generator=generator) < (log_odds / 3).sigmoid()
    group = torch.randint(0, groups, (n,), generator=generator)
    return log_odds, agrees, group, (torch.rand(n, generator=generator) < 0.8).float()


def naive_disagreement(log_odds, agrees, group, weight, groups, share):
    """Sorts each group; the sample at the edge counts in part."""
    asked = disagree = 0.0
    for k in range(groups):
        members = [i for i in range(len(group)) if group[i] == k and weight[i] > 0]
        members.sort(key=lambda i: -log_odds[i].item())
        left = share * len(members)
        for i in members:
            part = min(1.0, max(0.0, left))
            asked += part
            disagree += part * (not agrees[i])
            left -= 1
    return disagree / asked


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_confident_disagreement_matches_a_sort_of_each_group(share, seed):
    sample = draw(600, 4, seed)
    naive = naive_disagreement(*sample, 4, share)
    assert 0 < naive < 0.6
    # Samples in one bin of .04 nats at the edge share what is left of the group.
    assert confident_disagreement(*sample, 4, share=share) == pytest.approx(naive, abs=0.01)


def test_a_quarter_is_asked_by_default():
    sample = draw(600, 4, 0)
    assert confident_disagreement(*sample, 4) == confident_disagreement(*sample, 4, share=0.25)
    assert confident_disagreement(*sample, 4) != confident_disagreement(*sample, 4, share=0.3)


def test_each_group_counts_by_its_size():
    # The confident half of the large group agrees, that of the small one does not: 1 of 3 + 1.
    group = torch.tensor([0] * 6 + [1] * 2)
    log_odds = torch.tensor([6.0, 5, 4, 3, 2, 1, 30, 20])
    agrees = torch.tensor([True] * 3 + [False] * 3 + [False, True])
    assert confident_disagreement(log_odds, agrees, group, torch.ones(8), 2, share=0.5) == pytest.approx(0.25)


def test_equal_samples_at_the_edge_count_in_part():
    # Two of three are asked: the first, and half of the two that are equally confident.
    agrees = torch.tensor([True, False, False])
    log_odds, group = torch.tensor([9.0, 5.0, 5.0]), torch.zeros(3, dtype=torch.int64)
    assert confident_disagreement(log_odds, agrees, group, torch.ones(3), 1, share=2 / 3) == pytest.approx(0.5)


def test_rows_without_weight_and_groups_without_rows_do_not_count():
    log_odds, agrees, group, weight = draw(300, 3, 1)
    expected = confident_disagreement(log_odds, agrees, group, weight, 3)
    junk = torch.where(weight > 0, log_odds, 1e6)
    assert confident_disagreement(junk, agrees & (weight > 0), group, weight, 7) == pytest.approx(expected, abs=1e-12)


def test_log_odds_beyond_the_histogram_are_the_most_confident():
    log_odds = torch.tensor([torch.inf, 1e30, 39.0, -1e30, -torch.inf, 0.0])
    agrees = torch.tensor([False, False, True, True, True, True])
    asked = confident_disagreement(log_odds, agrees, torch.zeros(6, dtype=torch.int64), torch.ones(6), 1, share=1 / 3)
    assert asked == pytest.approx(1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_what_one_gives(world_size):
    sample = draw(301, 4, 2)
    whole = confident_disagreement(*sample, 4)

    def work(rank, reduce):
        log_odds, agrees, group, weight = (column[rank::world_size] for column in sample)
        return confident_disagreement(log_odds, agrees, group, weight, 4, reduce=reduce)

    for found in run_ranks(work, world_size):
        assert found == pytest.approx(whole, abs=1e-12)


def test_very_many_groups_have_coarser_histograms(monkeypatch):
    sample = draw(300, 3, 1)
    expected = confident_disagreement(*sample, 3)
    assert confident_disagreement(*sample, 100_000) == pytest.approx(expected, abs=0.02)
    monkeypatch.setattr(evidence, "_MOST_NUMBERS", 3 * 400)
    assert confident_disagreement(*sample, 3) == pytest.approx(expected, abs=0.02)
