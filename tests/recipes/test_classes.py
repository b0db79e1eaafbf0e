"""Outputs that no label names, and random coordinates alone, make nothing suspect."""

import pytest
import torch

from lightning_unlearn.recipes import argmax_recipe, aum_recipe, auto_recipe, label_recipe
from lightning_unlearn.recipes.classes import is_exact, judged_classes, restricted, runner_up
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.recipes.test_recipes import SYMMETRIC, C, make_evidence, normal, scene, share_of

# Where the classes that occur lie among the outputs.
PLACES = torch.tensor([1, 2, 7, 20, 39])


def widened(evidence, outputs=40):
    """The evidence of the same network with further outputs, which no label names and of which it is sure of none."""
    blocks = []
    for block in evidence.attribution.unbind(dim=1):
        wide = normal(len(block), outputs, seed=len(blocks)) - 4
        wide[:, PLACES] = block @ evidence.basis.T
        blocks.append(wide)
    return make_evidence(blocks, PLACES[evidence.label])


@pytest.mark.parametrize("transition", [torch.eye(C), SYMMETRIC], ids=["clean", "noisy"])
def test_outputs_that_no_label_names_change_nothing(transition):
    _, evidence = scene(transition)
    wide = widened(evidence)
    expected, found = (label_recipe(one, no_reduce) for one in (evidence, wide))
    torch.testing.assert_close(found.clean_probability, expected.clean_probability, atol=2e-3, rtol=0)
    assert found.suggested_label.equal(PLACES[expected.suggested_label])
    assert found.noise_matrix.shape == (40, 40)
    torch.testing.assert_close(found.noise_matrix[PLACES][:, PLACES], expected.noise_matrix, atol=2e-3, rtol=0)
    assert found.noise_matrix[0, 0] == 1
    assert bool((found.clean_probability < 0.5).any()) == (transition is SYMMETRIC)


def test_restricted_evidence_holds_the_differences_of_the_classes_that_are_left():
    _, evidence = scene(SYMMETRIC)
    wide = widened(evidence)
    classes = judged_classes(wide, no_reduce)
    assert classes.equal(PLACES)
    few = restricted(wide, classes)
    found, expected = (x.attribution @ x.basis.T for x in (few, evidence))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert few.label.equal(evidence.label)
    assert (few.prediction < C).all()


def test_samples_of_a_class_without_coordinates_are_not_judged():
    _, evidence = scene(SYMMETRIC)
    wide = widened(evidence)
    wide.basis[39] = 0  # as where no label named it in the first epoch
    verdict = auto_recipe(wide, no_reduce)
    late = wide.label == 39
    assert verdict.clean_probability[late].eq(1).all()
    assert verdict.suggested_label[late].eq(39).all()
    assert not verdict.suggested_label[~late].eq(39).any()
    assert (verdict.clean_probability[~late] < 0.5).any()


def many_classes(classes=150, n=1500):
    """A network that is right of nearly all samples, of which a seventh is called another class."""
    true, label = torch.arange(n) % classes, torch.arange(n) % classes
    label[::7] = (label[::7] + 1) % classes
    logits = 6 * torch.eye(classes)[true] + normal(n, classes, seed=1)
    return make_evidence([logits, logits, logits], label)


def test_random_coordinates_make_nothing_suspect_and_samples_are_ranked_by_their_margin():
    evidence = many_classes()
    assert not is_exact(evidence.basis)
    verdict = label_recipe(evidence, no_reduce)
    assert (verdict.clean_probability > 0.9).all()
    in_order = verdict.clean_probability[evidence.aum.argsort()]
    assert (in_order.diff() >= 0).all()
    assert verdict.suggested_label.equal(evidence.label)
    assert "does not separate the classes: samples are ranked by their margin" in verdict.warning


def test_of_random_coordinates_no_class_is_suggested():
    evidence = many_classes()
    rival, share = runner_up(evidence)
    assert rival.equal(evidence.prediction)
    assert share.eq(0).all()
    assert aum_recipe(evidence, no_reduce).suggested_probability.eq(0).all()


def test_a_class_without_coordinates_is_nobodys_rival():
    _, evidence = scene(SYMMETRIC)
    evidence.attribution.neg_()
    evidence.basis[3] = 0
    assert not (runner_up(evidence)[0] == 3).any()
    assert argmax_recipe(evidence, no_reduce).suggested_probability.isfinite().all()


def test_ranks_judge_the_same_classes():
    wide = widened(scene(SYMMETRIC)[1])
    expected = label_recipe(wide, no_reduce)
    shares = [share_of(wide, rank, 2) for rank in range(2)]
    for share, found in zip(shares, run_ranks(lambda rank, reduce: label_recipe(shares[rank], reduce), 2), strict=True):
        counts = share.weight > 0
        torch.testing.assert_close(
            found.clean_probability[counts], expected.clean_probability[share.index[counts]], atol=1e-4, rtol=0
        )
