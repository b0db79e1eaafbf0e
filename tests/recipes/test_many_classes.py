"""Wrong labels of more classes than have coordinates, by soft margins."""

from dataclasses import replace

import pytest
import torch

from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.functional.soft_margin import rivals_of, soft_margins
from lightning_unlearn.recipes import argmax_recipe, aum_recipe, auto_recipe, label_recipe
from lightning_unlearn.recipes.evidence import OutOfSample
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.recipes.test_recipes import make_evidence, normal, share_of

CLASSES, N = 150, 4500


def scene(rate=0.05, *, spread=1.0, seed=0, out_of_sample=None, classes=CLASSES, outputs=CLASSES):
    """A network that learns well: its logits of training, in two phases, and of the last pass."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(N) % classes
    wrong = torch.rand(N, generator=generator) < rate
    label = torch.where(wrong, (true + torch.randint(1, classes, (N,), generator=generator)) % classes, true)
    at_true = torch.nn.functional.one_hot(true, outputs).float()
    blocks = [size * (5 * spread * at_true + normal(N, outputs, seed=seed + k)) for k, size in enumerate((0.5, 1, 1))]
    margins = torch.stack([soft_margins(block, label) for block in blocks], dim=1)
    rival, share = rivals_of(blocks[-1], label)
    evidence = make_evidence(
        blocks, label, soft_margins=margins, runner_up=rival, runner_up_probability=share, out_of_sample=out_of_sample
    )
    # As the trajectory keeps it: no coordinates.
    few = replace(evidence, attribution=evidence.attribution[..., :0], basis=evidence.basis[:, :0])
    return few, label != true, true


def early(rate=0.05, *, settled=True, bias=False, classes=CLASSES):
    shift = torch.zeros(classes, dtype=torch.float64)
    shift[0] = 0.5 * bias
    return PrequentialRate(rate - 0.005, rate, rate + 0.005, 9.0, 0.8, settled, shift)


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_blind_errors_are_found_with_their_rate_and_their_class(rate):
    evidence, wrong, true = scene(rate)
    verdict = label_recipe(evidence, no_reduce)
    assert verdict.noise.status == "found"
    assert verdict.noise.rate == pytest.approx(rate, rel=0.15)
    assert verdict.noise.interval[0] <= wrong.float().mean()
    assert verdict.noise.interval[1] == 1  # without an early epoch it is a lower bound
    flagged = verdict.suspects(evidence.weight, no_reduce, 0.85)
    assert wrong[flagged].float().mean() > 0.85
    assert (flagged & wrong).sum() > 0.9 * wrong.sum()
    stated = (1 - verdict.clean_probability)[flagged].mean().item()
    assert stated == pytest.approx(wrong[flagged].float().mean().item(), abs=0.1)
    assert verdict.suggested_label[flagged & wrong].eq(true[flagged & wrong]).float().mean() > 0.9
    assert verdict.noise_matrix.sum(dim=1).allclose(torch.ones(CLASSES))
    assert "150 classes" in verdict.notes[0]


def test_clean_labels_are_left_alone():
    for seed in range(3):
        evidence, _, _ = scene(0.0, spread=0.8, seed=seed)
        verdict = auto_recipe(evidence, no_reduce)
        assert verdict.noise.status == "none"
        assert not verdict.suspects(evidence.weight, no_reduce, 0.85).any()


def test_an_early_epoch_tells_what_was_memorized_later():
    seen = OutOfSample(early=early(0.08), drawn=torch.full((CLASSES,), 30.0), accuracy=0.4)
    evidence, _, _ = scene(0.08)
    memorized = replace(evidence, soft_margins=evidence.soft_margins.abs(), prediction=evidence.label)
    assert label_recipe(memorized, no_reduce).noise.status == "none"
    verdict = label_recipe(replace(memorized, out_of_sample=seen), no_reduce)
    assert verdict.noise.rate == pytest.approx(0.08)
    assert verdict.noise.interval == (pytest.approx(0.075, abs=0.01), 1)
    assert any("has memorized labels" in note for note in verdict.notes)
    assert not label_recipe(replace(evidence, out_of_sample=replace(seen, accuracy=0.9)), no_reduce).notes[1:]


@pytest.mark.parametrize("how", ["expected", "drawn"])
def test_a_shift_of_the_classes_is_named_only(how):
    drawn = torch.full((CLASSES,), 30.0)
    if how == "drawn":
        drawn[: CLASSES // 2] = 3
    seen = OutOfSample(early=early(bias=how == "expected"), drawn=drawn)
    evidence, _, _ = scene(out_of_sample=seen)
    verdict = label_recipe(evidence, no_reduce)
    assert verdict.noise.status == "weak"
    assert verdict.noise.sampled == (how == "drawn")
    assert "shift the outputs" in verdict.notes[-1]


def test_a_network_that_knows_few_classes_tells_nothing():
    evidence, _, _ = scene()
    constant = replace(evidence, prediction=torch.zeros_like(evidence.prediction))
    verdict = label_recipe(constant, no_reduce)
    assert verdict.noise is None
    assert verdict.warning
    assert not verdict.suspects(constant.weight, no_reduce, 0.85).any()


@pytest.mark.parametrize("divided", [30, 300])
def test_logits_that_are_smaller_than_the_scales_reach_make_nothing_suspect(divided):
    evidence, _, _ = scene(0.0, spread=0.8)
    blocks = torch.stack([normal(N, CLASSES, seed=k) for k in range(3)], dim=1)
    blocks += 4 * torch.nn.functional.one_hot(evidence.label, CLASSES).unsqueeze(1)
    margins = [soft_margins(block / divided, evidence.label) for block in blocks.unbind(dim=1)]
    verdict = label_recipe(replace(evidence, soft_margins=torch.stack(margins, dim=1)), no_reduce)
    assert verdict.noise.status == "none"
    assert not verdict.suspects(evidence.weight, no_reduce, 0.85).any()


def test_rows_without_weight_do_not_count_among_many_classes():
    evidence, _, _ = scene()
    weight = torch.ones(N)
    weight[: N // 3] = 0
    columns = {name: getattr(evidence, name).clone() for name in ("soft_margins", "aum", "margin")}
    for column in columns.values():
        column[: N // 3] = -70.0
    expected = label_recipe(replace(evidence, weight=weight), no_reduce)
    found = label_recipe(replace(evidence, weight=weight, **columns), no_reduce)
    torch.testing.assert_close(found.clean_probability[N // 3 :], expected.clean_probability[N // 3 :])


def test_ranks_judge_many_classes_as_one_does():
    seen = OutOfSample(early=early(), drawn=torch.full((CLASSES,), 30.0), accuracy=0.9)
    evidence, _, _ = scene(out_of_sample=seen)
    expected = label_recipe(evidence, no_reduce)
    shares = [share_of(evidence, rank, 2) for rank in range(2)]
    for share, found in zip(shares, run_ranks(lambda rank, reduce: label_recipe(shares[rank], reduce), 2), strict=True):
        counts = share.weight > 0
        torch.testing.assert_close(
            found.clean_probability[counts], expected.clean_probability[share.index[counts]], atol=1e-3, rtol=0
        )
        assert found.noise.rate == pytest.approx(expected.noise.rate, rel=1e-3)
        assert found.notes == expected.notes


def test_of_ten_thousand_outputs_no_matrix_is_made():
    evidence, _, _ = scene(outputs=3000)
    verdict = label_recipe(evidence, no_reduce)
    assert verdict.noise_matrix is None
    assert verdict.noise.status == "found"


def test_other_recipes_suggest_the_rival_of_the_last_pass():
    evidence, wrong, true = scene()
    for judge in (aum_recipe, argmax_recipe):
        verdict = judge(evidence, no_reduce)
        assert verdict.suggested_label[wrong].eq(true[wrong]).float().mean() > 0.9
