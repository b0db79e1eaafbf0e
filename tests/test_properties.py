"""What must hold of every recipe, whatever the evidence: drawn by hypothesis, the same draws every time."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_unlearn.partitioning.build import _enforce_min_class_fraction
from lightning_unlearn.partitioning.non_finite import apply_to_finite_rows
from lightning_unlearn.recipes import RECIPES, get_recipe
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.recipes.latent_noise import latent_windows, transition_noise
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.recipes.test_recipes import make_evidence, users
from tests.test_numerics import evidence_of, network
from tests.toys import CLASSES, FEATURES, Blobs, BlobsData, Toy, adamw, fit, partition_callback

bounded = settings(max_examples=12, deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize("recipe", [*RECIPES, users], ids=[*RECIPES, "a user's"])
# Probabilities of mixtures and latent classes whose sums are rounded otherwise.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@st.composite
def evidences(draw, most=150):
    """A network that knows more or less of classes with more or less noise; its input layer may tell two kinds."""
    classes = draw(st.integers(2, 6))
    n = draw(st.integers(6 * classes, most))
    noise, apart = draw(st.floats(0, 0.5)), draw(st.floats(0.5, 6))
    blocks, seed = draw(st.integers(1, 5)), draw(st.integers(0, 10**6))
    _, label, logits = network(n, classes, noise=noise, apart=apart, seed=seed)
    more = network(n, classes, noise=noise, apart=apart, seed=seed + 1)[2]
    evidence = evidence_of((logits + more)[:blocks], label)
    if draw(st.booleans()):
        corrupted = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.2
        evidence.input_statistics[corrupted] += 5
        evidence = replace(evidence, uncertainty=evidence.uncertainty + corrupted)
    return evidence


def rows_of(evidence, index):
    """The evidence of some samples, some of them perhaps twice."""
    return replace(
        evidence,
        **{
            field.name: getattr(evidence, field.name)[index].clone()
            for field in fields(Evidence)
            if field.name != "basis" and getattr(evidence, field.name) is not None
        },
    )


def assert_same(found, expected, index=slice(None)):
    """The verdict of some of the samples is that of the others at ``index``."""
    for name in ("clean_probability", "label_probability", "input_probability", "suggested_probability"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other[index], **CLOSE)
    assert found.warning == expected.warning
    if expected.noise_matrix is not None:
        torch.testing.assert_close(found.noise_matrix, expected.noise_matrix, **CLOSE)


def suggests_the_same(found, expected, index=slice(None)):
    return (found.suggested_label == expected.suggested_label[index]).float().mean() > 0.98


@EVERY
@bounded
@given(evidence=evidences())
def test_probabilities_lie_in_0_and_1(recipe, evidence):
    verdict = get_recipe(recipe).function(evidence, no_reduce)
    for name in ("clean_probability", "label_probability", "input_probability", "suggested_probability"):
        value = getattr(verdict, name)
        assert value is None or ((value >= 0) & (value <= 1)).all(), name
    if verdict.suggested_probability is not None:
        assert (verdict.clean_probability + verdict.suggested_probability <= 1 + 1e-5).all()


@EVERY
@bounded
@given(evidence=evidences(), seed=st.integers(0, 99))
def test_the_order_of_the_samples_does_not_matter(recipe, evidence, seed):
    order = torch.randperm(len(evidence.index), generator=torch.Generator().manual_seed(seed))
    judge = get_recipe(recipe).function
    found, expected = judge(rows_of(evidence, order), no_reduce), judge(evidence, no_reduce)
    assert_same(found, expected, order)
    assert suggests_the_same(found, expected, order)


@EVERY
@bounded
@given(evidence=evidences(), twice=st.integers(0, 11))
def test_a_sample_that_comes_twice_has_one_score(recipe, evidence, twice):
    n = len(evidence.index)
    verdict = get_recipe(recipe).function(rows_of(evidence, torch.tensor([*range(n), twice])), no_reduce)
    for name in ("clean_probability", "suggested_label"):
        value = getattr(verdict, name)
        # Products of matrices of other shapes round otherwise.
        torch.testing.assert_close(value[n], value[twice], rtol=1e-5, atol=1e-6)


@EVERY
@settings(bounded, max_examples=6)
@given(evidence=evidences(most=90), world_size=st.integers(2, 4), seed=st.integers(0, 99))
def test_any_way_to_divide_the_samples_among_ranks_gives_one_verdict(recipe, evidence, world_size, seed):
    n = len(evidence.index)
    owner = torch.randint(0, world_size, (n,), generator=torch.Generator().manual_seed(seed))
    judge = get_recipe(recipe).function
    expected = judge(evidence, no_reduce)
    shares = [(owner == rank).nonzero().flatten() for rank in range(world_size)]

    def work(rank, reduce):
        padded = rows_of(evidence, torch.cat([shares[rank], torch.zeros(1, dtype=torch.int64)]))
        padded.weight[-1] = 0
        return judge(padded, reduce)

    for share, found in zip(shares, run_ranks(work, world_size), strict=True):
        cut = {
            name: value[:-1]
            for name in ("clean_probability", "label_probability", "input_probability", "suggested_probability")
            if (value := getattr(found, name)) is not None
        }
        own = replace(found, suggested_label=found.suggested_label[:-1], **cut)
        assert_same(own, expected, share)
        assert len(share) == 0 or suggests_the_same(own, expected, share)


@EVERY
@settings(bounded, max_examples=6)
@given(evidence=evidences(), seed=st.integers(0, 99), share=st.floats(0.01, 0.45))
def test_any_broken_samples_leave_the_others_as_they_were(recipe, evidence, seed, share):
    n = len(evidence.index)
    broken = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: math.ceil(share * n)]
    kept = torch.ones(n, dtype=torch.bool)
    kept[broken] = False
    spoiled = rows_of(evidence, torch.arange(n))
    spoiled.attribution[broken, -1] = torch.nan
    spoiled.loss[broken] = torch.inf
    found = apply_to_finite_rows(get_recipe(recipe), spoiled, no_reduce)
    expected = get_recipe(recipe).function(rows_of(evidence, kept.nonzero().flatten()), no_reduce)
    torch.testing.assert_close(found.clean_probability[kept], expected.clean_probability, **CLOSE)
    assert (found.clean_probability[broken] == 0).all()


# What is done to logits


def of_logits(blocks, label, like):
    """Evidence of these logits, and for the rest as it was."""
    return make_evidence(
        blocks, label, input_statistics=like.input_statistics, neuron_attribution=like.neuron_attribution
    )


@st.composite
def networks(draw):
    """Given labels and logits of a network that has learned its classes, most of which are called by their names."""
    classes = draw(st.integers(2, 6))
    _, label, logits = network(
        draw(st.integers(20 * classes, 150)),
        classes,
        noise=draw(st.floats(0.1, 0.4)),
        apart=draw(st.floats(2, 5)),
        seed=draw(st.integers(0, 10**6)),
    )
    return label, logits


@pytest.mark.parametrize("recipe", RECIPES)
@bounded
@given(drawn=networks(), seed=st.integers(0, 99))
def test_a_constant_on_all_logits_of_a_row_changes_nothing(recipe, drawn, seed):
    label, logits = drawn
    plain = evidence_of(logits, label)
    constant = torch.randint(-64, 65, (len(label), 1), generator=torch.Generator().manual_seed(seed)).float()
    moved = of_logits([block + constant for block in logits], label, plain)
    judge = RECIPES[recipe].function
    found, expected = judge(moved, no_reduce), judge(plain, no_reduce)
    # Logits of 64 are rounded to 4e-6.
    torch.testing.assert_close(found.clean_probability, expected.clean_probability, rtol=1e-2, atol=2e-3)
    assert suggests_the_same(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
@bounded
@given(drawn=networks(), seed=st.integers(0, 99))
def test_other_names_for_the_classes_are_other_names_for_what_is_found(recipe, drawn, seed):
    # Not with more than 129 classes, of whose coordinates a random part is kept.
    label, logits = drawn
    new_name = torch.randperm(logits[0].shape[1], generator=torch.Generator().manual_seed(seed))
    plain = evidence_of(logits, label)
    renamed = of_logits([block[:, new_name.argsort()] for block in logits], new_name[label], plain)
    judge = RECIPES[recipe].function
    found, expected = judge(renamed, no_reduce), judge(plain, no_reduce)
    torch.testing.assert_close(found.clean_probability, expected.clean_probability, rtol=1e-2, atol=2e-3)
    assert (found.suggested_label == new_name[expected.suggested_label]).float().mean() > 0.98
    if expected.noise_matrix is not None:
        matrix = found.noise_matrix[new_name][:, new_name]
        torch.testing.assert_close(matrix, expected.noise_matrix, rtol=1e-2, atol=2e-3)


SCALES = st.sampled_from([1e-3, 0.25, 0.5, 3.0, 100.0])


@bounded
@given(drawn=networks(), scale=SCALES)
def test_the_scale_of_logits_does_not_matter_to_what_compares_margins(drawn, scale):
    # aum standardizes its score, so the probabilities stay; argmax asks only for the sign, so the sides and ranks stay.
    label, logits = drawn
    plain = evidence_of(logits, label)
    scaled = of_logits([scale * block for block in logits], label, plain)
    found, expected = (RECIPES["aum"].function(evidence, no_reduce) for evidence in (scaled, plain))
    torch.testing.assert_close(found.clean_probability, expected.clean_probability, **CLOSE)
    found, expected = (
        RECIPES["argmax"].function(evidence, no_reduce).clean_probability for evidence in (scaled, plain)
    )
    assert torch.equal(found < 0.5, expected < 0.5)
    assert (found[expected.argsort()].diff() >= 0).all()


@bounded
@given(drawn=networks(), scale=SCALES)
def test_the_scale_of_attributions_does_not_matter_to_the_papers_clusters(drawn, scale):
    label, logits = drawn
    plain = evidence_of(logits, label)
    scaled = replace(
        plain, neuron_attribution=scale * plain.neuron_attribution, input_statistics=scale * plain.input_statistics
    )
    for recipe in ("rlap", "input"):
        assert_same(*(RECIPES[recipe].function(evidence, no_reduce) for evidence in (scaled, plain)))


@bounded
@given(drawn=networks(), scale=st.sampled_from([0.5, 2.0]))
def test_the_scale_of_logits_does_not_matter_to_the_shape_of_latent_classes(drawn, scale):
    # To "label" and "loss" as a whole it does, and should: there logits are log-odds, and those of a network that is
    # twice as sure say more of each sample. The Gaussians behind "label" are as wide as what they are fitted on.
    label, logits = drawn
    classes, found = logits[0].shape[1], []
    for factor in (1.0, scale):
        phases, weight = factor * torch.stack(list(logits[:-1]), dim=1), torch.ones(len(label))
        (longest, *_) = latent_windows(phases, factor * logits[-1], label, weight, no_reduce) or (None,)
        assume(longest is not None)  # of few samples there is none
        found.append(transition_noise([longest], torch.zeros(classes), label, weight, no_reduce))
    plain, scaled = found
    # From another first guess, which is sharpened logits, to much the same classes.
    assert abs(plain.rate - scaled.rate) < 0.15


# What is kept


@bounded
@given(
    n=st.integers(1, 60),
    classes=st.integers(1, 8),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
)
def test_of_each_class_the_likeliest_are_kept_and_none_that_is_unusable(n, classes, share, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    probability, usable = torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.8
    if ties:
        probability = (4 * probability).round() / 4
    label = torch.randint(0, classes, (n,), generator=generator)
    is_clean = (probability >= 0.7) & usable
    kept = _enforce_min_class_fraction(is_clean, probability, label, share, usable)
    assert (kept | ~is_clean).all()
    assert not (kept & ~usable).any()
    for c in range(classes):
        members = (label == c) & usable
        least = math.ceil(share * int(members.sum()))
        assert int(kept[members].sum()) == max(least, int(is_clean[members].sum()))
        if kept[members].any() and not kept[members].all():
            assert probability[members & kept].min() >= probability[members & ~kept].max()


# In a fit


def test_the_order_of_the_data_set_does_not_matter_to_the_partition():
    def net():
        return torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES)
        )  # no batch norm, whose running averages hang on the batches

    data, trained = Blobs(), Toy(net, adamw)
    fit(trained, BlobsData(data), max_epochs=2, limit_val_batches=0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    permuted = Blobs()
    permuted.x, permuted.y, permuted.wrong = data.x[order], data.y[order], data.wrong[order]
    found = []
    for each in (data, permuted):
        module = Toy(net, lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
        module.load_state_dict(trained.state_dict())
        callback = partition_callback(at_epoch=2, evidence_from="eval_passes")
        fit(module, BlobsData(each), [callback], max_epochs=3, limit_val_batches=0)
        found.append(callback.partition)
    one, other = found
    assert torch.equal(other.label, one.label[order])
    for name in ("clean_probability", "suggested_probability", "label_evidence", "input_evidence"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name)[order], **CLOSE)
    for name in ("is_clean", "suggested_label", "reason"):
        assert torch.equal(getattr(other, name), getattr(one, name)[order])
    assert 0 < len(one.suspect_indices()) < len(data)
    torch.testing.assert_close(other.noise_matrix, one.noise_matrix, **CLOSE)
    assert other.noise_rate == pytest.approx(one.noise_rate, abs=1e-4)
