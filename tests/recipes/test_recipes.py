import functools
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.functional import label_confidence, label_margin
from lightning_unlearn.functional.coordinates import class_coordinates
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.recipes import (
    RECIPES,
    Recipe,
    RecipeResult,
    argmax_recipe,
    aum_recipe,
    auto_recipe,
    get_recipe,
    input_recipe,
    label_recipe,
    loss_recipe,
    registry,
    rlap_recipe,
)
from lightning_unlearn.recipes.evidence import NOT_BY_SAMPLE, Evidence, OutOfSample
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

N, C = 1001, 5
CLEAN = torch.eye(C)
SYMMETRIC = 0.6 * torch.eye(C) + 0.1 * (1 - torch.eye(C))
ASYMMETRIC = 0.6 * torch.eye(C) + 0.4 * torch.eye(C).roll(1, dims=1)
NOISE = {"symmetric": SYMMETRIC, "asymmetric": ASYMMETRIC}
HERE = __name__


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_evidence(blocks, label, **changes):
    """What logits (n, C) of the two halves and of the last pass amount to."""
    basis, last = class_coordinates(blocks[0].shape[1]), blocks[-1]
    margins = torch.stack([label_margin(block, label) for block in blocks])
    log_p = torch.stack([block.log_softmax(dim=1) for block in blocks])
    columns = {
        "index": torch.arange(len(label)),
        "weight": torch.ones(len(label)),
        "label": label,
        "attribution": torch.stack([block @ basis for block in blocks], dim=1),
        "basis": basis,
        "margin": margins[-1],
        "aum": margins.mean(dim=0),
        "label_confidence": label_confidence(margins).mean(dim=0),
        "uncertainty": -(log_p.exp() * log_p).sum(dim=2).mean(dim=0),
        "loss": -log_p[-1].gather(1, label.unsqueeze(1)).squeeze(1),
        "prediction": last.argmax(dim=1),
    }
    return Evidence(**(columns | changes))


def memorized(label, seed):
    return 8 * torch.eye(C)[label] + normal(len(label), C, seed=seed)


def scene(transition=CLEAN, *, apart=3.0, seed=0, memorizes=False, n=N, **changes):
    """True labels, and the evidence of a network that learned noisy labels of Gaussian classes as well as can be.

    Its logits are those of the best classifier of the *given* labels, more so in the second half of training than in
    the first, and uncertain. With ``memorizes`` it repeats the given labels from the second half on.
    """
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % C
    x = apart * torch.eye(C)[true] + torch.randn(n, C, generator=generator)
    label = torch.multinomial(transition[true], 1, generator=generator).squeeze(1)
    log_p = (0.97 * (apart * x).softmax(dim=1) @ transition + 0.03 / C).log()
    blocks = [s * log_p + e * torch.randn(n, C, generator=generator) for s, e in ((0.6, 0.3), (0.9, 0.3), (1.0, 0.4))]
    if memorizes:
        blocks[1:] = [memorized(label, seed=1), memorized(label, seed=2)]
    return true, make_evidence(blocks, label, **changes)


CORRUPTED = torch.arange(N) % 7 == 0


def with_response(evidence, corrupted=CORRUPTED, *, gap=8.0, unsure=1.0, columns=2, seed=9):
    """An early layer that responds otherwise to corrupted inputs, of which the model is less sure."""
    response = torch.tensor([3.0, 1.0])[:columns] + 0.3 * normal(len(corrupted), columns, seed=seed)
    response[corrupted] += 0.3 * gap * torch.tensor([-0.8, 0.6])[:columns]
    return replace(evidence, input_statistics=response, uncertainty=evidence.uncertainty + unsure * corrupted)


def share_of(evidence, rank, world_size):
    """One rank's share, with padding rows that would change the fit if they counted."""
    index, weight = shard_indices(len(evidence.index), rank, world_size)
    columns = {}
    for field in fields(Evidence):
        value = getattr(evidence, field.name)
        if field.name in NOT_BY_SAMPLE or value is None:
            continue
        columns[field.name] = value[index].clone()
        if value.is_floating_point():
            columns[field.name][weight == 0] = 50.0
    columns["prediction"][weight == 0] = 0
    return replace(evidence, **(columns | {"index": index, "weight": weight}))


def auroc(score, bad):
    """Of the probability that a clean sample scores higher than a bad one."""
    difference = score[~bad].double().unsqueeze(1) - score[bad].double()
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def happened(true, label):
    """(C, C), what samples of each class were called."""
    counts = torch.zeros(C, C).index_put_((true, label), torch.tensor(1.0), accumulate=True)
    return counts / counts.sum(dim=1, keepdim=True)


def flagged(verdict):
    everyone = torch.ones_like(verdict.clean_probability)
    return verdict.suspects(everyone, no_reduce, 0.85) & (verdict.warning == "")


# Label evidence


@pytest.mark.parametrize("recipe", ["label", "auto"])
@pytest.mark.parametrize("memorizes", [False, True], ids=["", "memorized"])
@pytest.mark.parametrize("noise", NOISE)
def test_wrong_labels_are_found(noise, memorizes, recipe):
    true, evidence = scene(NOISE[noise], memorizes=memorizes)
    wrong = evidence.label != true
    verdict = RECIPES[recipe].function(evidence, no_reduce)
    assert verdict.warning == ""
    assert verdict.clean_probability.dtype == torch.float32
    assert torch.equal(verdict.label_probability, verdict.clean_probability)
    assert auroc(verdict.clean_probability, wrong) > 0.96
    assert (flagged(verdict) == wrong).float().mean() > 0.9
    assert (1 - verdict.clean_probability).mean().item() == pytest.approx(wrong.float().mean().item(), abs=0.05)
    torch.testing.assert_close(verdict.noise_matrix, happened(true, evidence.label), atol=0.1, rtol=0)
    assert verdict.noise_matrix.dtype == torch.float32
    assert (verdict.suggested_label == true)[wrong].float().mean() > 0.85
    assert (verdict.suggested_label != evidence.label).all()
    assert verdict.noise.status == "found"
    low, high = verdict.noise.interval
    assert low <= wrong.float().mean() <= high


def test_asymmetric_noise_is_found_where_the_margins_are_not_enough():
    true, evidence = scene(ASYMMETRIC)
    wrong = evidence.label != true
    found = auroc(label_recipe(evidence, no_reduce).clean_probability, wrong)
    for margin in (evidence.margin, evidence.aum, -evidence.loss, evidence.label_confidence):
        assert auroc(margin, wrong) < found - 0.05


@pytest.mark.parametrize("recipe", ["label", "auto"])
@pytest.mark.parametrize("memorizes", [False, True], ids=["", "memorized"])
@pytest.mark.parametrize("apart", [1.0, 2.0, 3.0], ids=["weak", "fair", "good"])
@pytest.mark.parametrize("seed", [0, 1])
def test_hardly_anything_is_flagged_without_noise(apart, memorizes, recipe, seed):
    true, evidence = scene(apart=apart, memorizes=memorizes, seed=seed)
    accuracy = (evidence.attribution[:, 0] @ evidence.basis.T).argmax(dim=1).eq(true).float().mean()
    assert (accuracy < 0.7) == (apart == 1.0)
    verdict = RECIPES[recipe].function(evidence, no_reduce)
    assert flagged(verdict).float().mean() <= 0.03
    assert verdict.noise.status == "none"
    assert verdict.warning == ""
    assert torch.equal(verdict.noise_matrix, torch.eye(C))


def test_where_nothing_is_found_the_order_stays():
    true, evidence = scene(apart=1.0)
    verdict = label_recipe(evidence, no_reduce)
    assert verdict.clean_probability.unique().numel() > N / 2
    disagrees = evidence.prediction != true
    assert auroc(verdict.clean_probability, disagrees) > 0.8


def test_blocks_that_repeat_the_given_labels_do_no_harm():
    true, evidence = scene(SYMMETRIC, memorizes=True)
    last = evidence.attribution[:, 1:] @ evidence.basis.T
    assert (last.argmax(dim=2) == evidence.label.unsqueeze(1)).float().mean() > 0.99
    wrong = evidence.label != true
    assert auroc(label_recipe(evidence, no_reduce).clean_probability, wrong) > 0.95
    # The last pass alone says nothing of the wrong ones: the baselines that read it are at chance.
    for judge in (loss_recipe, argmax_recipe):
        assert auroc(judge(evidence, no_reduce).clean_probability, wrong) < 0.6


@pytest.mark.parametrize("noise", NOISE)
def test_what_was_half_memorized_is_left_out(noise):
    # From the second quarter on, more and more of the wrong labels are repeated, the right ones anyway.
    true, evidence = scene(NOISE[noise], n=4 * N)
    wrong = evidence.label != true
    early = evidence.attribution[:, 1] @ evidence.basis.T
    fitted = torch.rand(4 * N, generator=torch.Generator().manual_seed(4))
    repeats = 8 * torch.eye(C)[evidence.label] + normal(4 * N, C, seed=1)
    blocks = [torch.where((fitted < share).unsqueeze(1), repeats, early) for share in (0, 0.2, 0.5, 0.7, 0.7)]
    found = label_recipe(make_evidence(blocks, evidence.label), no_reduce)
    assert auroc(found.clean_probability, wrong) > 0.94
    assert (flagged(found) == wrong).float().mean() > 0.88


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_early_quarter_that_was_hardly_learned_does_not_make_clean_labels_suspect(seed):
    # Two classes that overlap: the best of several windows would find something in every such set.
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(1000) % 2
    x = torch.eye(2)[label] + torch.randn(1000, 2, generator=generator)
    log_p = (0.97 * x.softmax(dim=1) + 0.015).log()
    quarters = ((0.1, 0.6), (0.3, 0.5), (0.5, 0.4), (0.9, 0.3), (1.0, 0.3))
    blocks = [s * log_p + e * torch.randn(1000, 2, generator=generator) for s, e in quarters]
    assert flagged(label_recipe(make_evidence(blocks, label), no_reduce)).float().mean() <= 0.03


@pytest.mark.parametrize("seed", range(3))
def test_few_wrong_labels_are_found_by_a_network_that_has_learned_all_others(seed):
    # It predicts .95 of the given labels from the second quarter on, as if it had memorized them; before, too little.
    true, _ = scene(n=2 * N)
    generator = torch.Generator().manual_seed(seed)
    label = torch.where(torch.rand(2 * N, generator=generator) < 0.05, (true + 1) % C, true)
    blocks = [s * torch.eye(C)[true] + torch.randn(2 * N, C, generator=generator) for s in (0.5, 5.0, 6.0, 6.0, 6.0)]
    evidence = make_evidence(blocks, label)
    verdict = label_recipe(evidence, no_reduce)
    assert auroc(verdict.clean_probability, label != true) > 0.99
    assert (flagged(verdict) == (label != true)).float().mean() > 0.98
    # And nothing where none is wrong.
    assert not flagged(label_recipe(make_evidence(blocks, true), no_reduce)).any()


def hard_and_easy(rate, seed, n=2000):
    """Two classes of samples that a network is anything between unsure and certain of, and rightly so.

    Gaussian classes overlap by far, so that the average sample is as uncertain as a quarter.
    """
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % 2
    sure = 3 * torch.empty(n).exponential_(generator=generator)
    leans = torch.where(torch.rand(n, generator=generator) < sure.sigmoid(), true, 1 - true)
    label = torch.where(torch.rand(n, generator=generator) < rate, 1 - true, true)
    logits = sure.unsqueeze(1) * torch.eye(2)[leans]
    blocks = [s * logits + e * torch.randn(n, 2, generator=generator) for s, e in ((0.6, 0.4), (0.8, 0.3), (1.0, 0.3))]
    return true, make_evidence(blocks, label)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_wrong_labels_show_through_large_uncertainty(rate, seed):
    true, evidence = hard_and_easy(rate, seed)
    wrong, verdict = evidence.label != true, label_recipe(evidence, no_reduce)
    assert auroc(verdict.clean_probability, wrong) > 0.9
    assert wrong[flagged(verdict)].double().mean() > 0.7
    assert (1 - verdict.clean_probability).mean() == pytest.approx(rate, abs=0.04)
    assert verdict.noise.status == "found"


def test_ranks_find_the_same():
    _, evidence = hard_and_easy(0.2, 0)
    whole = label_recipe(evidence, no_reduce)
    shares = [share_of(evidence, rank, 3) for rank in range(3)]
    for share, verdict in zip(
        shares, run_ranks(lambda rank, reduce: label_recipe(shares[rank], reduce), 3), strict=True
    ):
        assert verdict.noise.rate == pytest.approx(whole.noise.rate, abs=1e-4)
        counts = share.weight > 0
        torch.testing.assert_close(verdict.clean_probability[counts], whole.clean_probability[share.index[counts]])


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_is_confident_and_wrong_as_often_as_it_says_makes_nothing_suspect(seed):
    # Labels drawn from what it says, of which not even the most confident are certain: no label is wrong.
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.eye(C)[torch.arange(2000) % C] + 0.8 * torch.randn(2000, C, generator=generator)
    label = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    blocks = [s * logits + 0.2 * torch.randn(2000, C, generator=generator) for s in (0.6, 0.9, 1.0)]
    evidence = make_evidence(blocks, label)
    assert not flagged(label_recipe(evidence, no_reduce)).any()


@pytest.mark.parametrize("seed", range(5))
def test_uncertainty_alone_makes_nothing_suspect(seed):
    _, evidence = hard_and_easy(0.0, seed)
    verdict = label_recipe(evidence, no_reduce)
    assert not flagged(verdict).any()


def test_the_first_block_stays_even_if_it_repeats_the_labels():
    true, evidence = scene(SYMMETRIC)
    blocks = [memorized(evidence.label, seed) for seed in (3, 4, 5)]
    verdict = label_recipe(make_evidence(blocks, evidence.label), no_reduce)
    assert verdict.clean_probability.isfinite().all()
    assert flagged(verdict).float().mean() < 0.03
    assert (evidence.label != true).float().mean() > 0.3  # which nobody could know


def test_ranks_decide_together_what_is_memorized():
    # The even rows, which are those of the first rank, repeat their labels in all but the first block, the odd do not.
    _, evidence = scene(SYMMETRIC)
    _, repeats = scene(SYMMETRIC, memorizes=True)
    even = (torch.arange(N) % 2 == 0).reshape(-1, 1, 1)
    evidence = replace(evidence, attribution=repeats.attribution.where(even, evidence.attribution))
    whole = label_recipe(evidence, no_reduce)
    shards = run_ranks(lambda rank, reduce: label_recipe(share_of(evidence, rank, 2), reduce), 2)
    index, _ = shard_indices(N, 0, 2)
    assert (index % 2 == 0).all()
    torch.testing.assert_close(shards[0].clean_probability, whole.clean_probability[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [1.0, 2.0])
def test_the_mean_probability_is_the_rate(apart):
    _, evidence = scene(SYMMETRIC, apart=apart)
    verdict = label_recipe(evidence, no_reduce)
    assert (1 - verdict.clean_probability).mean().item() == pytest.approx(verdict.noise.rate, abs=0.01)


@pytest.mark.parametrize("blocks", [1, 2])
def test_few_epochs_leave_fewer_blocks(blocks):
    true, evidence = scene(SYMMETRIC)
    verdict = label_recipe(replace(evidence, attribution=evidence.attribution[:, -blocks:]), no_reduce)
    assert auroc(verdict.clean_probability, evidence.label != true) > 0.95


def test_label_is_blind_to_what_the_last_pass_says_in_other_columns():
    _, evidence = scene(SYMMETRIC)
    junk = {name: normal(N, seed=5) for name in ("margin", "aum", "label_confidence", "uncertainty", "loss")}
    found = label_recipe(replace(evidence, **junk, prediction=evidence.prediction * 0), no_reduce)
    assert torch.equal(found.clean_probability, label_recipe(evidence, no_reduce).clean_probability)


def test_a_class_that_is_never_given():
    true, evidence = scene(SYMMETRIC)
    keep = (true != 2) & (evidence.label != 2)
    columns = {
        field.name: getattr(evidence, field.name)[keep]
        for field in fields(Evidence)
        if field.name != "basis" and getattr(evidence, field.name) is not None
    }
    verdict = label_recipe(replace(evidence, **columns), no_reduce)
    wrong = (evidence.label != true)[keep]
    assert verdict.noise_matrix.isfinite().all()
    assert auroc(verdict.clean_probability, wrong) > 0.96
    assert (flagged(verdict) == wrong).float().mean() > 0.9


def test_two_classes():
    true = torch.arange(N) % 2
    label = torch.where(torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.3, 1 - true, true)
    blocks = [2 * torch.eye(2)[true] + 0.5 * normal(N, 2, seed=seed) for seed in range(3)]
    verdict = label_recipe(make_evidence(blocks, label), no_reduce)
    assert (flagged(verdict) == (label != true)).float().mean() > 0.95
    assert torch.equal(verdict.suggested_label, 1 - label)


# Input evidence


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("unsure", [1.0, -1.0])
def test_corrupted_inputs_are_found(columns, unsure):
    _, evidence = scene()
    # Whichever group it is, large or small: the one of which the model is less sure.
    evidence = with_response(evidence, gap=12.0, unsure=unsure, columns=columns)
    corrupted = CORRUPTED if unsure > 0 else ~CORRUPTED
    verdict = input_recipe(evidence, no_reduce)
    assert torch.equal(flagged(verdict), corrupted)
    assert verdict.clean_probability.dtype == torch.float32
    assert torch.equal(verdict.input_probability, verdict.clean_probability)
    assert verdict.label_probability is None
    assert torch.equal(verdict.suggested_label, evidence.label)
    assert verdict.notes[0].startswith("inputs: two groups, the smaller with 14.3%")
    assert verdict.notes[0].endswith(" standard deviations: corrupted inputs")


@pytest.mark.parametrize(
    "changes",
    [{"gap": 2.5}, {"gap": 0.0}, {"unsure": 0.0}],
    ids=["groups overlap", "one group", "equally sure"],
)
def test_inputs_that_do_not_stand_out_are_intact(changes):
    _, evidence = scene()
    verdict = input_recipe(with_response(evidence, **({"gap": 12.0} | changes)), no_reduce)
    assert (verdict.clean_probability == 1).all()
    assert (verdict.input_probability == 1).all()
    assert verdict.notes[0].endswith(": no sign of corrupted inputs")


@pytest.mark.parametrize(
    ("right", "right_on_corrupted", "more_loss"),
    [(0.3, 0.05, 0.0), (0.2, 0.2, 1.0), (0.9, 0.6, 0.0), (0.7, 0.7, 1.0), (0.3, 0.3, 0.0)],
    ids=["wrong more often", "larger loss", "wrong, but learned", "loss, but learned", "as good on both"],
)
def test_a_network_that_has_hardly_learned_may_be_sure_of_noise_and_wrong(right, right_on_corrupted, more_loss):
    _, evidence = scene()
    # Surer of the corrupted ones, so that it is the intact ones that look corrupted.
    shares = torch.where(CORRUPTED, right_on_corrupted, right)
    is_right = torch.rand(N, generator=torch.Generator().manual_seed(4)) < shares
    changes = {
        "prediction": evidence.label.where(is_right, (evidence.label + 1) % C),
        "loss": 1.5 + normal(N, seed=6).abs() + more_loss * CORRUPTED,
    }
    verdict = input_recipe(with_response(replace(evidence, **changes), gap=12.0, unsure=-1.0), no_reduce)
    if right < 0.5 and (right_on_corrupted < right or more_loss):
        assert (verdict.clean_probability == 1).all()
        assert verdict.notes[0].endswith(
            ": but it predicts worse on the other group, so it is unclear which one is corrupted"
        )
    else:  # one that has learned may have memorized the noise before the rest
        assert torch.equal(flagged(verdict), ~CORRUPTED)


@pytest.mark.parametrize(
    ("easy", "unsure"), [((3,), -1.0), ((3,), 1.0), ((0, 1), 1.0)], ids=["one is easy", "one is hard", "two are hard"]
)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5])
def test_classes_that_look_different_are_no_corrupted_inputs(easy, unsure, rate):
    true, evidence = scene(CLEAN * (1 - rate) + rate / C)
    evidence = with_response(evidence, torch.isin(true, torch.tensor(easy)), gap=12.0, unsure=unsure)
    verdict = input_recipe(evidence, no_reduce)
    assert (verdict.clean_probability == 1).all()
    assert verdict.notes[0].endswith(": no sign of corrupted inputs: the two groups coincide with classes")


@pytest.mark.parametrize("classes", [2, C, N // 4])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_corrupted_inputs_of_all_classes_are_found_however_many_there_are(classes, share):
    generator = torch.Generator().manual_seed(5)
    corrupted = torch.rand(N, generator=generator) < share
    label = torch.randint(classes, (N,), generator=generator)
    evidence = make_evidence([4 * torch.eye(classes)[label] + normal(N, classes, seed=2)] * 2, label)
    verdict = input_recipe(with_response(evidence, corrupted, gap=12.0), no_reduce)
    assert torch.equal(flagged(verdict), corrupted)


@pytest.mark.parametrize("unsure", [-1.0, 1.0], ids=["sure of them, as they name the class", "less sure"])
def test_corrupted_inputs_of_one_class_alone_cannot_be_told_from_it(unsure):
    _, evidence = scene()
    half = (torch.arange(N) % C == 1) & (torch.arange(N) % (2 * C) < C)
    verdict = input_recipe(with_response(evidence, half, gap=12.0, unsure=unsure), no_reduce)
    assert (verdict.clean_probability == 1).all()
    assert verdict.notes[0].endswith(": no sign of corrupted inputs: the two groups coincide with classes")


def test_corrupted_inputs_that_are_more_frequent_in_some_classes_are_found():
    _, evidence = scene()
    rate = torch.where(torch.arange(N) % C < C // 2, 0.4, 0.2)
    corrupted = torch.rand(N, generator=torch.Generator().manual_seed(3)) < rate
    assert torch.equal(flagged(input_recipe(with_response(evidence, corrupted, gap=12.0), no_reduce)), corrupted)


def test_a_response_that_is_always_the_same():
    _, evidence = scene()
    verdict = input_recipe(replace(evidence, input_statistics=torch.full((N, 2), 3.0)), no_reduce)
    assert (verdict.clean_probability == 1).all()


def test_without_an_early_layer_all_inputs_are_intact():
    _, evidence = scene()
    verdict = input_recipe(evidence, no_reduce)
    assert (verdict.clean_probability == 1).all()
    assert verdict.input_probability is None
    assert verdict.notes == ("inputs: the model has no early layer to analyze",)


# Both


@pytest.mark.parametrize("noise", NOISE)
def test_auto_tells_the_two_kinds_apart(noise):
    true, evidence = scene(NOISE[noise])
    evidence = with_response(evidence, gap=12.0)
    wrong = evidence.label != true
    verdict = auto_recipe(evidence, no_reduce)
    torch.testing.assert_close(verdict.clean_probability, verdict.label_probability * verdict.input_probability)
    assert torch.equal(verdict.input_probability < 0.5, CORRUPTED)
    assert ((verdict.label_probability < 0.5) == wrong)[~CORRUPTED].float().mean() > 0.9
    assert (flagged(verdict) == (wrong | CORRUPTED)).float().mean() > 0.9
    assert [note.split(":")[0] for note in verdict.notes] == ["inputs"]
    matrix = happened(true[~CORRUPTED], evidence.label[~CORRUPTED])
    torch.testing.assert_close(verdict.noise_matrix, matrix, atol=0.1, rtol=0)


def test_labels_are_judged_by_what_was_learned_from_intact_inputs():
    # The corrupted inputs, a third of all, tell nothing: their logits are junk, which would spoil the classes.
    corrupted = torch.arange(N) % 3 == 0
    true, evidence = scene(SYMMETRIC, n=N)
    junk = evidence.attribution.clone()
    junk[corrupted] = 100 * normal(N, *junk.shape[1:], seed=8)[corrupted]
    spoiled = replace(with_response(evidence, corrupted, gap=12.0), attribution=junk)
    kept = ~corrupted
    alone = label_recipe(replace(evidence, weight=kept.float()), no_reduce)
    verdict = auto_recipe(spoiled, no_reduce)
    assert torch.equal(verdict.input_probability < 0.5, corrupted)
    torch.testing.assert_close(verdict.label_probability[kept], alone.label_probability[kept])
    assert auroc(verdict.label_probability[kept], (evidence.label != true)[kept]) > 0.96


def test_auto_acts_on_one_kind_where_the_other_shows_nothing():
    _, evidence = scene(SYMMETRIC)
    labels_only = auto_recipe(with_response(evidence, gap=0.0), no_reduce)
    assert (labels_only.input_probability == 1).all()
    assert torch.equal(labels_only.clean_probability, label_recipe(evidence, no_reduce).clean_probability)

    _, clean = scene()
    inputs_only = auto_recipe(with_response(clean, gap=12.0), no_reduce)
    assert inputs_only.label_probability.min() > 0.9
    assert torch.equal(flagged(inputs_only), CORRUPTED)
    nothing = auto_recipe(with_response(clean, gap=12.0, unsure=0.0), no_reduce)
    assert not flagged(nothing).any()


# The paper's, and baselines


def with_rows(evidence, sign):
    rows = 2 * sign.unsqueeze(1) * torch.tensor([1.0, -1.0, 0.5, 0.0]) + normal(len(sign), 4, seed=3)
    return replace(evidence, neuron_attribution=rows)


@pytest.fixture
def two_clusters():
    true, evidence = scene(SYMMETRIC, apart=5.0)
    wrong = evidence.label != true
    return wrong, with_rows(evidence, torch.where(wrong, -1.0, 1.0))


def test_rlap_calls_the_cluster_of_lower_loss_clean_wherever_it_lies(two_clusters):
    wrong, evidence = two_clusters
    for rows in (evidence.neuron_attribution, -evidence.neuron_attribution):
        for loss, suspect in ((evidence.loss, wrong), (9 - evidence.loss, ~wrong)):
            verdict = rlap_recipe(replace(evidence, neuron_attribution=rows, loss=loss), no_reduce)
            assert (flagged(verdict) == suspect).float().mean() > 0.97
            assert torch.equal(verdict.suggested_label, evidence.prediction)
            assert verdict.clean_probability.dtype == torch.float32


def test_rlap_is_blind_to_the_margin(two_clusters):
    _, evidence = two_clusters
    other = replace(evidence, margin=normal(N, seed=9), aum=normal(N, seed=8), label_confidence=torch.zeros(N))
    assert torch.equal(
        rlap_recipe(other, no_reduce).clean_probability, rlap_recipe(evidence, no_reduce).clean_probability
    )


@pytest.mark.parametrize("loss", [torch.full((N,), 0.7), normal(N, seed=7).abs()], ids=["constant", "unrelated"])
def test_clusters_of_equal_loss_cannot_be_told_apart(loss, two_clusters):
    _, evidence = two_clusters
    verdict = rlap_recipe(replace(evidence, loss=loss), no_reduce)
    assert "do not differ in the model's loss on them" in verdict.warning
    assert (verdict.clean_probability == 1).all()
    assert torch.equal(verdict.suggested_label, evidence.label)


def test_rlap_without_rows_says_what_it_needs():
    _, evidence = scene()
    with pytest.raises(ValueError, match=r"'rlap' needs Evidence.neuron_attribution, per-neuron attributions \(n, D\)"):
        rlap_recipe(evidence, no_reduce)


def test_rlap_of_fewer_samples_than_neurons_says_what_to_do():
    _, evidence = scene(n=48)
    with pytest.raises(ValueError, match=r"256 neurons and needs more samples .* but got 48: .*layer=.*recipe='auto'"):
        rlap_recipe(replace(evidence, neuron_attribution=normal(48, 256, seed=0)), no_reduce)


@pytest.mark.parametrize(("judge", "column", "sign"), [(loss_recipe, "loss", -1), (aum_recipe, "aum", 1)])
def test_baselines_are_mixtures_on_their_score(judge, column, sign):
    # The wrong ones are the wider component, which alone reaches the far end on both sides.
    true, evidence = scene(SYMMETRIC)
    wrong = evidence.label != true
    score = torch.where(wrong, -2 + 2 * normal(N, seed=1), 2 + 0.3 * normal(N, seed=2))
    verdict = judge(replace(evidence, **{column: sign * score}), no_reduce)
    assert verdict.warning == ""
    assert (flagged(verdict) == wrong).float().mean() > 0.95
    assert (verdict.clean_probability[score.argsort()].diff() >= 0).all()
    assert score.max() > 3
    assert verdict.clean_probability[score.argmax()] > 0.9
    assert torch.equal(verdict.label_probability, verdict.clean_probability)
    assert verdict.noise_matrix is None


@pytest.mark.parametrize("judge", [loss_recipe, aum_recipe])
def test_baselines_suggest_the_strongest_other(judge):
    true, evidence = scene(SYMMETRIC, apart=5.0)
    wrong = evidence.label != true
    suggested = judge(evidence, no_reduce).suggested_label
    assert (suggested == true)[wrong].float().mean() > 0.97
    assert (suggested != evidence.label).all()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
@pytest.mark.parametrize(("judge", "column", "sign"), [(loss_recipe, "loss", -1), (aum_recipe, "aum", 1)])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_lone_sample_far_from_all_others_does_not_make_them_clean_unsaid(judge, column, sign, size, side):
    true, evidence = scene(SYMMETRIC)
    score = torch.where(evidence.label != true, -2 + normal(N, seed=1), 2 + 0.3 * normal(N, seed=2))
    score[7] = side * size
    verdict = judge(replace(evidence, **{column: sign * score}), no_reduce)
    wrong = evidence.label != true
    assert "one of them is a single sample" in verdict.warning or (flagged(verdict) == wrong).float().mean() > 0.9


@pytest.mark.parametrize(("judge", "column"), [(loss_recipe, "loss"), (aum_recipe, "aum")])
def test_a_constant_score_cannot_be_told_apart(judge, column):
    _, evidence = scene()
    verdict = judge(replace(evidence, **{column: torch.full((N,), 2.5)}), no_reduce)
    assert "do not differ in the score" in verdict.warning
    assert (verdict.clean_probability == 1).all()
    assert torch.equal(verdict.suggested_label, evidence.label)


def test_argmax_flags_what_the_model_calls_otherwise():
    true, evidence = scene(SYMMETRIC)
    verdict = argmax_recipe(evidence, no_reduce)
    assert torch.equal(flagged(verdict), evidence.prediction != evidence.label)
    assert torch.equal(verdict.suggested_label, evidence.prediction)
    torch.testing.assert_close(verdict.clean_probability, evidence.margin.sigmoid())
    assert (flagged(verdict) == (evidence.label != true)).float().mean() > 0.9


# Ranks


def every_kind():
    # Not as much noise as in ASYMMETRIC: there another version's draws may take a class for the next one.
    true, evidence = scene(0.7 * torch.eye(C) + 0.3 * torch.eye(C).roll(1, dims=1), apart=2.0, n=N)
    evidence = with_rows(evidence, torch.where(evidence.label != true, -1.0, 1.0))
    return with_response(evidence, gap=12.0)


def users(evidence, reduce):
    """Clean is what has more than the mean support."""
    total = reduce(torch.stack([(evidence.label_confidence * evidence.weight).sum(), evidence.weight.sum()]))
    return (10 * (evidence.label_confidence - total[0] / total[1])).sigmoid()


@pytest.mark.parametrize("recipe", [*RECIPES, users], ids=[*RECIPES, "a user's"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_give_the_verdict_of_the_whole(recipe, world_size):
    judge, evidence = get_recipe(recipe).function, every_kind()
    assert N % world_size  # some rows are padding
    whole = judge(evidence, no_reduce)
    assert 0.02 < flagged(whole).float().mean() < 0.9
    shards = run_ranks(lambda rank, reduce: judge(share_of(evidence, rank, world_size), reduce), world_size)
    for rank, verdict in enumerate(shards):
        index, weight = shard_indices(N, rank, world_size)
        counts = weight > 0
        for name in ("clean_probability", "label_probability", "input_probability"):
            found, expected = getattr(verdict, name), getattr(whole, name)
            assert (found is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(found[counts], expected[index[counts]], rtol=1e-4, atol=1e-5)
        assert torch.equal(verdict.suggested_label[counts], whole.suggested_label[index[counts]])
        assert (verdict.warning, verdict.notes) == (whole.warning, whole.notes)
        if whole.noise_matrix is not None:
            torch.testing.assert_close(verdict.noise_matrix, whole.noise_matrix)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_without_weight_do_not_count(recipe):
    judge, evidence = RECIPES[recipe].function, every_kind()
    whole = judge(evidence, no_reduce)
    extra = torch.cat([torch.arange(N), torch.arange(40)])
    columns = {}
    for field in fields(Evidence):
        if field.name not in NOT_BY_SAMPLE and getattr(evidence, field.name) is not None:
            columns[field.name] = getattr(evidence, field.name)[extra].clone()
            if columns[field.name].is_floating_point():
                columns[field.name][N:] = -70.0
    columns["weight"][N:] = 0
    found = judge(replace(evidence, **columns), no_reduce)
    torch.testing.assert_close(found.clean_probability[:N], whole.clean_probability, rtol=1e-4, atol=1e-5)
    assert found.notes == whole.notes


def test_all_ranks_are_undecided_together():
    def judge(rank, reduce):
        return aum_recipe(share_of(evidence, rank, 2), reduce).warning

    evidence = replace(scene()[1], aum=torch.zeros(N))
    first, second = run_ranks(judge, 2)
    assert first == second != ""


# By name


def test_what_each_recipe_asks_for():
    asks = {
        name: (r.needs_neuron_attribution, r.needs_input_statistics, r.uses_history, r.soft_targets)
        for name, r in RECIPES.items()
    }
    assert asks == {
        "auto": (False, True, True, True),
        "label": (False, False, True, True),
        "input": (False, True, True, True),
        "rlap": (True, False, False, False),
        "loss": (False, False, False, True),
        "aum": (False, False, True, True),
        "argmax": (False, False, False, True),
    }
    for name, recipe in RECIPES.items():
        assert get_recipe(name) is recipe
        assert recipe.name == name
        assert get_recipe(recipe) is recipe


def test_an_unknown_recipe_is_refused_with_the_near_name():
    names = "'auto', 'label', 'input', 'rlap', 'loss', 'aum', 'argmax', or the dotted path of a function"
    with pytest.raises(ValueError, match=rf"one of {names}, but got 'labels'. Did you mean 'label'\?"):
        get_recipe("labels")
    for name in ("xyz", ".xyz", "..xyz", "x..y", "x.", "./x.py"):
        with pytest.raises(ValueError, match=rf"Expected recipe to be one of .* but got '{re.escape(name)}'\.$"):
            get_recipe(name)
    with pytest.raises(TypeError, match=r"to be a name, a dotted path or a function, but got a int\."):
        get_recipe(3)


def support_of(evidence):
    return evidence.label_confidence


def certain(evidence, *, scale=0.25):
    return scale * torch.ones_like(evidence.label_confidence).double()


def own_verdict(evidence):
    return RecipeResult(evidence.label_confidence.double(), evidence.prediction, notes=("mine",))


class Stateful:
    """A recipe with settings."""

    def __init__(self, power):
        self.power = power

    def __call__(self, evidence):
        return evidence.label_confidence**self.power


not_a_function = 3


def test_a_function_of_the_evidence_is_a_recipe():
    true, evidence = scene(SYMMETRIC, apart=5.0)
    recipe = get_recipe(support_of)
    assert (recipe.name, recipe.needs_neuron_attribution, recipe.needs_input_statistics, recipe.uses_history) == (
        "support_of",
        False,
        True,
        True,
    )
    verdict = recipe.function(evidence, no_reduce)
    assert torch.equal(verdict.clean_probability, evidence.label_confidence)
    wrong = evidence.label != true
    assert (verdict.suggested_label == true)[wrong].float().mean() > 0.97


def test_a_function_of_two_parameters_can_sum_over_ranks():
    _, evidence = scene(SYMMETRIC)
    calls = []

    def counted(total):
        calls.append(total)
        return total

    get_recipe(users).function(evidence, counted)
    assert len(calls) == 2  # its own, and whether all ranks returned probabilities


@pytest.mark.parametrize(
    ("function", "name"),
    [(Stateful(2), "Stateful"), (functools.partial(users), "partial"), (certain, "certain")],
    ids=["object", "partial", "keyword"],
)
def test_other_callables(function, name):
    _, evidence = scene()
    recipe = get_recipe(function)
    assert recipe.name == name
    verdict = recipe.function(evidence, no_reduce)
    assert verdict.clean_probability.dtype == torch.float32
    assert verdict.clean_probability.shape == (N,)


def test_a_function_may_return_a_verdict():
    _, evidence = scene()
    verdict = get_recipe(own_verdict).function(evidence, no_reduce)
    assert torch.equal(verdict.suggested_label, evidence.prediction)
    assert torch.equal(verdict.clean_probability, evidence.label_confidence)
    assert verdict.notes == ("mine",)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(N, 1), rf"'f' to return p\(clean\) of shape \({N},\), but got \({N}, 1\)"),
        (torch.zeros(N - 1), rf"of shape \({N},\), but got \({N - 1},\)"),
        (None, "but got NoneType"),
        ([0.5] * N, "but got list"),
        (torch.full((N,), 1.5), r"'f' to return probabilities in \[0, 1\], but they span 1.5 to 1.5"),
        (torch.linspace(-0.25, 1, N), r"in \[0, 1\], but they span -0.25 to 1\."),
        (torch.full((N,), torch.nan), r"in \[0, 1\], but they span nan to nan"),
        (RecipeResult(torch.full((N,), 2.0), torch.zeros(N)), "they span 2 to 2"),
    ],
)
def test_a_wrong_answer_is_refused(answer, message):
    def f(evidence):
        return answer

    with pytest.raises(ValueError, match=message):
        get_recipe(f).function(scene()[1], no_reduce)


def test_a_wrong_answer_on_one_rank_is_refused_on_all():
    evidence = scene()[1]
    evidence.label_confidence[7] = torch.nan  # of rank 0

    def judge(rank, reduce):
        with pytest.raises(ValueError, match="'support_of' to return ") as error:
            get_recipe(support_of).function(share_of(evidence, rank, 7), reduce)
        return str(error.value)

    assert N % 7 == 0  # none pads
    here, *there = run_ranks(judge, 7)
    assert "probabilities in [0, 1], but they span nan to nan" in here
    assert all("but it failed on another rank" in message for message in there)


def test_a_recipe_that_fails_on_one_rank_leaves_no_other_waiting():
    evidence = scene()[1]

    def fails_on_0(part):
        if 0 in part.index:
            raise KeyError("mine")
        return part.label_confidence

    def judge(rank, reduce):
        with pytest.raises((KeyError, ValueError)) as error:
            get_recipe(fails_on_0).function(share_of(evidence, rank, 7), reduce)
        return str(error.value)

    here, *there = run_ranks(judge, 7)
    assert here == "'mine'"
    assert all("but it failed on another rank" in message for message in there)


def test_a_dotted_path_is_a_recipe():
    _, evidence = scene()
    recipe = get_recipe(f"{HERE}.support_of")
    assert recipe.name == f"{HERE}.support_of"
    assert torch.equal(recipe.function(evidence, no_reduce).clean_probability, evidence.label_confidence)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{HERE}.nothing_here", r"can be imported, but '.*nothing_here' cannot: .* has no attribute 'nothing_here'"),
        ("no_such_package.judge", "'no_such_package.judge' cannot: No module named 'no_such_package'"),
        (f"{HERE}.not_a_function", r"Expected recipe '.*not_a_function' to be a function, but it is a int\."),
    ],
)
def test_a_wrong_path_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(path)


@pytest.fixture
def offered(monkeypatch):
    """Another package's recipes."""
    mine = Recipe("mine", argmax_recipe, needs_neuron_attribution=True)
    points = [
        SimpleNamespace(name="support", load=lambda: support_of),
        SimpleNamespace(name="with-rows", load=lambda: mine),
        SimpleNamespace(name="auto", load=lambda: pytest.fail("ours come first")),
    ]

    def entry_points(*, group):
        assert group == "lightning_unlearn.recipes"
        return points

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.usefixtures("offered")
def test_other_packages_offer_recipes():
    _, evidence = scene()
    recipe = get_recipe("support")
    assert recipe.name == "support"
    assert torch.equal(recipe.function(evidence, no_reduce).clean_probability, evidence.label_confidence)
    rows = get_recipe("with-rows")
    assert (rows.name, rows.needs_neuron_attribution, rows.function) == ("with-rows", True, argmax_recipe)
    assert get_recipe("auto") is RECIPES["auto"]
    with pytest.raises(ValueError, match=r"'argmax', 'support', 'with-rows', .* Did you mean 'support'\?"):
        get_recipe("supports")


A_RECIPE = Recipe(
    "support", lambda evidence, reduce: RecipeResult(evidence.label_confidence, evidence.label), uses_history=False
)


def test_a_dotted_path_may_name_a_recipe_with_its_settings():
    recipe = get_recipe(f"{__name__}.A_RECIPE")
    assert not recipe.uses_history
    assert recipe.function is A_RECIPE.function


def test_a_second_parameter_with_a_default_is_a_setting():
    def scaled(evidence, scale=0.5):
        return evidence.label_confidence * scale

    evidence = scene()[-1]
    torch.testing.assert_close(
        get_recipe(scaled).function(evidence, no_reduce).clean_probability, evidence.label_confidence / 2
    )


def test_nothing_is_suspect_where_a_class_is_called_by_another_name_more_often_than_by_its_own():
    swapped = CLEAN.clone()
    swapped[0] = 0.3 * CLEAN[0] + 0.7 * CLEAN[1]
    verdict = label_recipe(scene(swapped)[-1], no_reduce)
    assert "the noise model is not identifiable" in verdict.warning
    assert not flagged(verdict).any()


EARLY = PrequentialRate(0.0, 0.01, 0.02, 0.0, 0.6, True, torch.zeros(C).double(), is_confirmed=True, is_blind=True)


@pytest.mark.parametrize(
    ("out_of_sample", "said"),
    [
        (None, None),
        (OutOfSample(EARLY, accuracy=0.7), None),
        (OutOfSample(EARLY), None),
        (OutOfSample(), "no early epoch of training steps was observed"),
        (OutOfSample(replace(EARLY, is_settled=False)), "no early epoch of training steps was observed"),
        (OutOfSample(replace(EARLY, skill=0.95), accuracy=0.7), "it had already learned them"),
    ],
    ids=["nobody looked", "fine", "no validation", "none", "not settled", "learned before"],
)
def test_it_is_said_what_keeps_an_early_epoch_from_telling_the_rate(out_of_sample, said):
    _, evidence = scene(SYMMETRIC)
    verdict = label_recipe(replace(evidence, out_of_sample=out_of_sample), no_reduce)
    notes = [note for note in verdict.notes if "there may be more wrong labels than estimated" in note]
    assert [said in note for note in notes] == ([] if said is None else [True])
    if said is not None:
        assert verdict.noise.interval[1] == 1
