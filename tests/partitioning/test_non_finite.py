"""Samples whose evidence is NaN or infinite, in front of every recipe."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from lightning_unlearn.partitioning.non_finite import apply_to_finite_rows, finite_rows
from lightning_unlearn.recipes import RECIPES, Recipe, RecipeResult, get_recipe
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.trainer.divergence import check_rows_left_out, first_not_finite
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.recipes.test_recipes import N, every_kind, flagged, share_of, users

BAD = torch.tensor([3, 10, 500, 501])
VALUES = (torch.nan, torch.inf, -torch.inf)
COLUMNS = (
    "attribution",
    "margin",
    "aum",
    "label_confidence",
    "uncertainty",
    "loss",
    "input_statistics",
    "neuron_attribution",
)


def spoiled(evidence, index=BAD, value=torch.nan, columns=COLUMNS):
    changes = {name: getattr(evidence, name).clone() for name in columns}
    for column in changes.values():
        column[index] = value
    return replace(evidence, **changes)


def without(evidence, index):
    keep = torch.ones(len(evidence.index), dtype=torch.bool)
    keep[index] = False
    return keep, replace(
        evidence,
        **{
            field.name: getattr(evidence, field.name)[keep]
            for field in fields(Evidence)
            if field.name != "basis" and getattr(evidence, field.name) is not None
        },
    )


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("recipe", [*RECIPES, users], ids=[*RECIPES, "a user's"])
def test_the_others_are_judged_as_if_the_broken_ones_were_not_there(recipe, value):
    recipe, evidence = get_recipe(recipe), every_kind()
    found = apply_to_finite_rows(recipe, spoiled(evidence, value=value), no_reduce)
    keep, others = without(evidence, BAD)
    expected = recipe.function(others, no_reduce)
    torch.testing.assert_close(found.clean_probability[keep], expected.clean_probability, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.suggested_label[keep], expected.suggested_label)
    if expected.noise_matrix is not None:
        torch.testing.assert_close(found.noise_matrix, expected.noise_matrix)
    assert found.notes == (
        *expected.notes,
        f"4 of {N:,} samples have NaN or infinite logits or attributions: they cannot be scored, and count as not"
        " clean because of their input",
    )


@pytest.mark.parametrize("recipe", [*RECIPES, users], ids=[*RECIPES, "a user's"])
def test_what_cannot_be_judged_is_not_clean_for_its_input(recipe):
    evidence = every_kind()
    found = apply_to_finite_rows(get_recipe(recipe), spoiled(evidence), no_reduce)
    assert found.unusable.nonzero().flatten().tolist() == BAD.tolist()
    assert (found.clean_probability[BAD] == 0).all()
    assert (found.input_probability[BAD] == 0).all()
    assert found.label_probability is None or (found.label_probability[BAD] == 1).all()
    assert torch.equal(found.suggested_label[BAD], evidence.label[BAD])
    assert (found.suggested_probability[BAD] == 0).all()
    for name in ("clean_probability", "suggested_probability", "label_probability", "input_probability"):
        value = getattr(found, name)
        assert value is None or ((value >= 0) & (value <= 1)).all()


@pytest.mark.parametrize("column", COLUMNS)
def test_one_number_is_enough(column):
    evidence = spoiled(every_kind(), columns=[column])
    assert (~finite_rows(evidence)).nonzero().flatten().tolist() == BAD.tolist()
    assert flagged(apply_to_finite_rows(RECIPES["label"], evidence, no_reduce))[BAD].all()


def test_where_all_is_finite_the_verdict_is_the_recipes_own():
    evidence, own = every_kind(), RecipeResult(torch.ones(N), torch.zeros(N, dtype=torch.int64))
    assert apply_to_finite_rows(Recipe("own", lambda evidence, reduce: own), evidence, no_reduce) is own


def test_a_broken_row_that_only_pads_does_not_count():
    evidence = every_kind()
    weight = torch.ones(N)
    weight[BAD] = 0
    found = apply_to_finite_rows(RECIPES["aum"], spoiled(replace(evidence, weight=weight)), no_reduce)
    assert found.unusable is None


@pytest.mark.parametrize("recipe", [*RECIPES, users], ids=[*RECIPES, "a user's"])
def test_broken_samples_of_one_rank_count_on_all(recipe):
    recipe, evidence = get_recipe(recipe), spoiled(every_kind(), torch.tensor([2, 4, 8]))  # all of rank 0
    whole = apply_to_finite_rows(recipe, evidence, no_reduce)
    shards = run_ranks(lambda rank, reduce: apply_to_finite_rows(recipe, share_of(evidence, rank, 2), reduce), 2)
    for rank, found in enumerate(shards):
        own = share_of(evidence, rank, 2)
        counts = own.weight > 0
        index = own.index[counts]
        torch.testing.assert_close(
            found.clean_probability[counts], whole.clean_probability[index], rtol=1e-4, atol=1e-5
        )
        assert torch.equal(found.unusable[counts], whole.unusable[index])
        assert found.notes == whole.notes


def test_a_rank_that_has_no_sample_to_judge():
    evidence = every_kind()
    index = torch.arange(0, N, 3)  # all of rank 0, a third of all
    shards = run_ranks(
        lambda rank, reduce: apply_to_finite_rows(RECIPES["auto"], share_of(spoiled(evidence, index), rank, 3), reduce),
        3,
    )
    assert shards[0].unusable.all()
    assert not shards[1].unusable.any()
    assert 0.02 < flagged(shards[1]).float().mean() < 0.9


@pytest.mark.parametrize("world_size", [1, 2])
def test_most_of_the_samples_are_an_error_on_every_rank(world_size):
    evidence = spoiled(every_kind(), torch.arange(0, N - 1, 2))  # half, less one
    assert apply_to_finite_rows(RECIPES["aum"], evidence, no_reduce).unusable.sum() == N // 2
    evidence = spoiled(every_kind(), torch.arange(0, N, 2))

    def work(rank, reduce):
        with pytest.raises(
            ValueError, match=f"but those of 501 of {N:,} training samples are NaN or infinite"
        ) as error:
            apply_to_finite_rows(RECIPES["aum"], share_of(evidence, rank, world_size), reduce, fault)
        return str(error.value)

    fault = ""
    for message in run_ranks(work, world_size):
        assert "though the model's weights are finite. Check the inputs for NaN, forward for overflow" in message
    fault = "net.0.weight"
    for message in run_ranks(work, world_size):
        assert "and so is the model's net.0.weight: training has diverged. Lower the learning rate" in message


@pytest.mark.parametrize("value", VALUES)
def test_the_first_weight_or_buffer_that_is_not_finite(value):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert first_not_finite(model) == ""
    model[1].running_var[2] = value
    assert first_not_finite(model) == "1.running_var"
    with torch.no_grad():
        model[0].bias[1] = value
    assert first_not_finite(model) == "0.bias"


def test_rows_of_an_epoch_that_are_left_out():
    model = nn.Linear(2, 2)
    assert check_rows_left_out(model, 0, 10, 3, no_reduce) == ""
    said = check_rows_left_out(model, 2, 10, 3, no_reduce)
    assert said.startswith("The logits or attributions of 2 of 10 training samples were NaN or infinite in epoch 3")
    assert check_rows_left_out(model, 10, 10, 3, no_reduce).startswith("The logits or attributions of 10 of 10")


def test_most_rows_and_weights_that_are_not_finite_are_an_error_on_every_rank():
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.bias, torch.nan)
    assert "2 of 10" in check_rows_left_out(broken, 2, 10, 3, no_reduce)

    def work(rank, reduce):
        with pytest.raises(
            ValueError, match="those of 6 of 10 training samples are NaN or infinite, and so is"
        ) as error:
            check_rows_left_out(broken if rank == 0 else nn.Linear(2, 2), 6, 10, 3, reduce)
        return str(error.value)

    here, there = run_ranks(work, 2)
    assert "the model's bias: training has diverged" in here
    assert "the model's weights on another rank: training has diverged" in there
