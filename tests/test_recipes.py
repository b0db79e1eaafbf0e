import pytest
import torch

from lightning_unlearn.data import rank_share
from lightning_unlearn.functional.mixture import no_reduce
from lightning_unlearn.recipes import RECIPES, get_recipe, judge_label, judge_rlap
from lightning_unlearn.types import Evidence
from tests.ranks import run_ranks

N = 301


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_evidence(noisy, margin, loss, rows=None):
    """Rows in index order; the classes tell the columns apart: given 0, predicted 1, rival 2."""
    n = len(noisy)
    return Evidence(
        index=torch.arange(n),
        weight=torch.ones(n),
        label=torch.zeros(n, dtype=torch.int64),
        support=margin.sigmoid(),
        loss=loss,
        prediction=torch.ones(n, dtype=torch.int64),
        rival=torch.full((n,), 2),
        rows=rows,
    )


def margins(evidence):
    return evidence.support.logit()


def bimodal(*, seed=0, separation=3.0):
    """60 % clean samples with high margin and low loss, and rows that lie apart."""
    noisy = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.4
    sign = torch.where(noisy, -1.0, 1.0)
    return noisy, make_evidence(
        noisy,
        margin=separation * sign + normal(N, seed=1),
        loss=1 - 0.8 * sign + 0.1 * normal(N, seed=2).abs(),
        rows=2 * sign.unsqueeze(1) * torch.tensor([1.0, -1.0, 0.5, 0.0]) + normal(N, 4, seed=3),
    )


def share_of(evidence, rank, world_size):
    """One rank's share, with padding rows that would change the fit if they counted."""
    index, weight = rank_share(len(evidence.index), rank, world_size)
    columns = {name: getattr(evidence, name)[index].clone() for name in ("support", "loss", "rows")}
    for column in columns.values():
        column[weight == 0] = 50.0
    return Evidence(
        index=index,
        weight=weight,
        label=evidence.label[index],
        prediction=evidence.prediction[index],
        rival=evidence.rival[index],
        **columns,
    )


@pytest.mark.parametrize("judge", [judge_label, judge_rlap])
def test_clean_and_noisy_are_told_apart(judge):
    noisy, evidence = bimodal()
    verdict = judge(evidence, no_reduce)
    assert verdict.warning == ""
    assert verdict.clean_probability.dtype == torch.float32
    assert ((verdict.clean_probability < 0.5) == noisy).float().mean() > 0.97


def test_label_rises_with_the_margin():
    _, evidence = bimodal(separation=1.5)
    probability = judge_label(evidence, no_reduce).clean_probability
    assert (probability[evidence.support.argsort()].diff() >= 0).all()
    assert probability.min() < 0.1
    assert probability.max() > 0.9


def test_label_rises_with_the_margin_where_the_noisy_samples_are_the_wider_component():
    noisy, _ = bimodal()
    # The plain posterior would call the highest margins noisy, since only the wide component reaches them.
    margin = torch.where(noisy, -2 + 3 * normal(N, seed=1), 2 + 0.3 * normal(N, seed=2))
    probability = judge_label(make_evidence(noisy, margin, torch.zeros(N)), no_reduce).clean_probability
    assert (probability[margin.argsort()].diff() >= 0).all()
    assert margin.max() > 4
    assert probability[margin.argmax()] > 0.9


def test_label_falls_where_the_margin_is_turned_around():
    noisy, evidence = bimodal()
    turned = make_evidence(noisy, -margins(evidence), evidence.loss)
    probability = judge_label(turned, no_reduce).clean_probability
    assert ((probability > 0.5) == noisy).float().mean() > 0.97


def test_label_suggests_the_rival_and_rlap_the_prediction():
    _, evidence = bimodal()
    assert (judge_label(evidence, no_reduce).suggested_label == 2).all()
    assert (judge_rlap(evidence, no_reduce).suggested_label == 1).all()


def test_label_is_blind_to_the_loss():
    noisy, evidence = bimodal()
    other = make_evidence(noisy, margins(evidence), normal(N, seed=9))
    torch.testing.assert_close(
        judge_label(other, no_reduce).clean_probability, judge_label(evidence, no_reduce).clean_probability
    )


def test_rlap_calls_the_cluster_of_lower_loss_clean_wherever_it_lies():
    noisy, evidence = bimodal()
    for rows in (evidence.rows, -evidence.rows):
        for loss, suspect in ((evidence.loss, noisy), (3 - evidence.loss, ~noisy)):
            verdict = judge_rlap(make_evidence(noisy, margins(evidence), loss, rows), no_reduce)
            assert ((verdict.clean_probability < 0.5) == suspect).float().mean() > 0.97


def test_rlap_is_blind_to_the_margin():
    noisy, evidence = bimodal()
    other = make_evidence(noisy, normal(N, seed=9), evidence.loss, evidence.rows)
    torch.testing.assert_close(
        judge_rlap(other, no_reduce).clean_probability, judge_rlap(evidence, no_reduce).clean_probability
    )


def test_constant_margins_cannot_be_told_apart():
    noisy, evidence = bimodal()
    verdict = judge_label(make_evidence(noisy, torch.full((N,), 2.5), evidence.loss), no_reduce)
    assert "do not differ in how well the model supports the given labels" in verdict.warning
    assert (verdict.clean_probability == 1).all()
    assert torch.equal(verdict.suggested_label, evidence.label)


@pytest.mark.parametrize("loss", [torch.full((N,), 0.7), normal(N, seed=7).abs()], ids=["constant", "unrelated"])
def test_clusters_of_equal_loss_cannot_be_told_apart(loss):
    noisy, evidence = bimodal()
    verdict = judge_rlap(make_evidence(noisy, margins(evidence), loss, evidence.rows), no_reduce)
    assert "do not differ in the model's loss on them" in verdict.warning
    assert (verdict.clean_probability == 1).all()
    assert torch.equal(verdict.suggested_label, evidence.label)


def test_rlap_without_rows_says_what_it_needs():
    noisy, evidence = bimodal()
    with pytest.raises(ValueError, match=r"'rlap' needs Evidence.rows, the per-neuron attributions \(n, D\)"):
        judge_rlap(make_evidence(noisy, margins(evidence), evidence.loss), no_reduce)


@pytest.mark.parametrize("judge", [judge_label, judge_rlap])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_give_the_verdict_of_the_whole(judge, world_size):
    _, evidence = bimodal(separation=1.5)
    whole = judge(evidence, no_reduce)
    shards = run_ranks(lambda rank, reduce: judge(share_of(evidence, rank, world_size), reduce), world_size)
    for rank, verdict in enumerate(shards):
        index, weight = rank_share(N, rank, world_size)
        counts = weight > 0
        torch.testing.assert_close(
            verdict.clean_probability[counts], whole.clean_probability[index[counts]], rtol=1e-4, atol=1e-5
        )
        assert verdict.warning == whole.warning


def test_all_ranks_are_undecided_together():
    def judge(rank, reduce):
        share = share_of(make_evidence(noisy, torch.zeros(N), evidence.loss, evidence.rows), rank, 2)
        share.support.zero_()
        return judge_label(share, reduce).warning

    noisy, evidence = bimodal()
    first, second = run_ranks(judge, 2)
    assert first == second != ""


def test_what_each_recipe_asks_for():
    assert set(RECIPES) == {"label", "rlap"}
    label, rlap = get_recipe("label"), get_recipe("rlap")
    assert (label.needs_rows, label.averages, label.soft) == (False, True, True)
    assert (rlap.needs_rows, rlap.averages, rlap.soft) == (True, False, False)


def test_an_unknown_recipe_is_refused_with_the_near_name():
    with pytest.raises(ValueError, match=r"one of 'label', 'rlap', but got 'labels'. Did you mean 'label'\?"):
        get_recipe("labels")
    with pytest.raises(ValueError, match=r"one of 'label', 'rlap', but got 'xyz'\.$"):
        get_recipe("xyz")
