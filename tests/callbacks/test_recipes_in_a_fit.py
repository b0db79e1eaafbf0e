"""Recipes, methods and what they find, from the Trainer's end."""

import dataclasses
import functools
import math

import pytest
import torch

from lightning_unlearn import AttributionPartitionCallback
from lightning_unlearn.attribution import ATTRIBUTION_METHODS
from lightning_unlearn.recipes import RECIPES, Recipe, RecipeResult
from tests.toys import (
    Blobs,
    BlobsData,
    Toy,
    adamw,
    assert_same_weights,
    auroc,
    by_margin,
    convnet,
    fit,
    partition_callback,
    trio,
    weights,
)


def partition_of(data, net=convnet, at_epoch=3, **kwargs):
    callback = partition_callback(at_epoch=at_epoch, **kwargs)
    fit(Toy(net, adamw), BlobsData(data), [callback], max_epochs=at_epoch + 1, limit_val_batches=0)
    return callback.partition


@pytest.mark.parametrize("recipe", ["auto", "label"])
def test_wrong_labels_are_found_with_their_reason(recipe):
    data = Blobs(400, 0.4, image=True)
    partition = partition_of(data, recipe=recipe)
    assert partition.recipe == recipe
    assert (partition.is_clean == ~data.wrong).float().mean() > 0.97
    assert set(partition.reasons()) == {"none", "label"}
    assert ((partition.reason == 1) == ~partition.is_clean).all()
    assert (partition.input_evidence == 1).all()
    suspects = partition.suspect_indices()
    assert (partition.suggested_label[suspects] == data.clean[suspects]).float().mean() > 0.95
    assert partition.noise_rate == pytest.approx(0.4, abs=0.05)
    # Wrong labels are drawn from the three other classes alike.
    assert partition.noise_matrix.shape == (4, 4)
    torch.testing.assert_close(partition.noise_matrix.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(partition.noise_matrix.diagonal(), torch.full((4,), 0.6), rtol=0, atol=0.12)


def corrupted(share=0.5, noise=0.0, keeps=1.0):
    """Images, a share of which is drowned in noise.

    Args:
        share: of corrupted images.
        noise: share of wrong labels.
        keeps: what the corrupted images keep of themselves.
    """
    data = Blobs(600, noise, image=True)
    bad = torch.rand(600, generator=torch.Generator().manual_seed(5)) < share
    strong = 4.5 * torch.randn(data.x.shape, generator=torch.Generator().manual_seed(6))
    data.x[bad] = keeps * data.x[bad] + strong[bad]
    return data, bad


@pytest.mark.parametrize("recipe", ["auto", "input"])
@pytest.mark.parametrize("input_layer", [None, "net.0"])
def test_corrupted_inputs_are_found_with_their_reason(recipe, input_layer):
    data, bad = corrupted()
    partition = partition_of(data, at_epoch=5, recipe=recipe, input_layer=input_layer)
    assert (partition.is_clean == ~bad).float().mean() > 0.97
    assert set(partition.reasons()) == {"none", "input"}
    assert auroc(partition.input_evidence, ~bad) > 0.99
    assert partition.suggested_label.equal(data.y) or recipe == "auto"


def test_the_label_recipe_does_not_look_at_the_input():
    data, _ = corrupted()
    partition = partition_of(data, at_epoch=5, recipe="label")
    assert (partition.input_evidence == 1).all()
    assert "input" not in partition.reasons()


def test_both_kinds_are_told_apart():
    data, bad = corrupted(0.3, noise=0.3, keeps=0.5)
    partition = partition_of(data, at_epoch=5)
    assert (partition.is_clean == ~(bad | data.wrong)).float().mean() > 0.97
    reason = torch.tensor([{"none": 0, "label": 1, "input": 2, "both": 3}[word] for word in partition.reasons()])
    only_label, only_input = data.wrong & ~bad, bad & ~data.wrong
    assert (reason[only_label] == 1).float().mean() > 0.95
    # What is hardly to be seen may be thought to have a wrong label as well.
    assert (reason[only_input] >= 2).float().mean() > 0.95
    assert (reason[only_input] == 2).float().mean() > 0.5


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_on_clean_data_nothing_is_flagged_and_training_is_left_as_it_was(evidence):
    final = []
    for ours in ([], trio(3, finetune={"lr": 0.01}, evidence_from=evidence)):
        module = Toy(convnet)
        fit_it = [module, BlobsData(Blobs(400, 0, image=True)), ours]
        if ours:
            with pytest.warns(UserWarning, match="continues on all data: no suspects were found in this fit"):
                fit(*fit_it, max_epochs=5)
        else:
            fit(*fit_it, max_epochs=5)
        final.append(weights(module))
    partition, prune, finetune = ours
    assert not finetune.is_active
    assert not prune.has_result
    assert partition.partition.is_clean.all()
    assert set(partition.partition.reasons()) == {"none"}
    assert not partition.partition.is_actionable
    assert_same_weights(*final)


def test_a_recipe_may_be_a_function_or_its_dotted_path():
    data, found = Blobs(), []
    for recipe in (by_margin, "tests.toys.by_margin"):
        callback = AttributionPartitionCallback(at_epoch=2, recipe=recipe)
        fit(Toy(), BlobsData(data), [callback], max_epochs=3)
        found.append(callback.partition)
    one, other = found
    assert (one.recipe, other.recipe) == ("by_margin", "tests.toys.by_margin")
    assert one.clean_probability.equal(other.clean_probability)
    assert auroc(one.clean_probability, ~data.wrong) > 0.9


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_partition(recipe):
    data = Blobs(image=True)
    partition = partition_of(data, recipe=recipe)
    assert partition.recipe == recipe
    assert partition.label.equal(data.y)
    if recipe not in ("rlap", "input"):
        assert auroc(partition.clean_probability, ~data.wrong) > 0.9


@pytest.mark.parametrize("method", ATTRIBUTION_METHODS)
@pytest.mark.parametrize("layer", [None, "net.0"])
def test_every_method_runs(method, layer):
    data = Blobs(101, image=True)
    partition = partition_of(data, layer=layer, attribution_method=method, recipe="aum", evidence_from="eval_passes")
    assert len(partition) == 101
    assert partition.label_evidence.isfinite().all()
    # Internal influence does not multiply by the activation, so its sum is not the logits' difference.
    if method != "internal_influence":
        assert auroc(partition.clean_probability, ~data.wrong) > 0.9


def test_the_method_is_that_which_is_asked_for():
    supports = [
        partition_of(
            Blobs(101, image=True), layer="net.0", attribution_method=method, recipe="aum", evidence_from="eval_passes"
        )
        for method in ATTRIBUTION_METHODS
    ]
    for i, one in enumerate(supports):
        assert not any(one.label_evidence.allclose(other.label_evidence) for other in supports[:i])


def condemns_class_2(evidence):
    """A little less the likelier ones."""
    return torch.where(evidence.label == 2, 0.4 * evidence.margin.sigmoid(), torch.ones_like(evidence.margin))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_least_share_of_each_class_is_kept_the_likeliest(share):
    data = Blobs(image=True)
    partition = partition_of(data, recipe=condemns_class_2, min_class_fraction=share)
    of_2 = (data.y == 2).nonzero().flatten()
    assert partition.is_clean[data.y != 2].all()
    assert partition.is_clean[of_2].sum() == math.ceil(share * len(of_2))
    kept, others = (partition.clean_probability[of_2][which] for which in _split(partition.is_clean[of_2]))
    assert kept.min() >= others.max()
    assert kept.max() < 0.5
    assert partition.is_actionable
    # What is kept in any case is treated as clean.
    assert (partition.reason[partition.is_clean] == 0).all()
    assert partition.suggested_label[partition.is_clean].equal(data.y[partition.is_clean])


def _split(of):
    return of, ~of


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda e: e.margin[:-1].sigmoid(), r"recipe '<lambda>' to return p\(clean\) of shape \(203,\), but got"),
        (lambda e: 2 * torch.ones_like(e.margin), r"recipe '<lambda>' to return probabilities in \[0, 1\], but they"),
        (lambda e: e.margin * torch.nan, r"recipe '<lambda>' to return probabilities in \[0, 1\]"),
        (lambda e: None, r"of shape \(203,\), but got NoneType"),
        (lambda e: e.label_confidence.numpy(), r"of shape \(203,\), but got ndarray"),
        (lambda e: torch.empty_like(e.label_confidence, device="meta"), "but it is on the device meta"),
        (lambda e: e.label_confidence.to(torch.complex64), "real numbers, but it is torch.complex64"),
        (
            lambda e: RecipeResult(e.label_confidence, e.label + 4),
            r"to return class labels in \[0, 3\], but they span 4 to 7",
        ),
        (
            lambda e: RecipeResult(e.label_confidence, e.label, e.margin * torch.nan),
            "as suggested_probability, but they span nan",
        ),
        (
            lambda e: e.no_such_field,
            "synthetic evidence before training starts, but it raised AttributeError: .*no_such",
        ),
    ],
    ids=["shape", "range", "nan", "nothing", "numpy", "meta", "complex", "label", "suggestion", "fails"],
)
def test_a_recipe_that_cannot_judge_is_refused_before_the_first_step(answer, match):
    module = Toy()
    with pytest.raises(ValueError, match=match):
        fit(module, BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=2, recipe=answer)], max_epochs=3)
    assert module.steps == 0


def test_a_recipe_is_tried_on_the_samples_there_are_and_asked_once():
    data, asked = Blobs(300, image=True), []
    right = (~data.wrong).float()

    def knows(evidence):
        asked.append(evidence.index)
        return right.to(evidence.weight)

    assert partition_of(data, at_epoch=1, recipe=knows).is_clean.equal(~data.wrong)
    tried, real = asked
    assert tried.equal(real)


def with_options(evidence, **options):
    return (evidence.margin / options.get("scale", 4)).sigmoid()


class Callable:
    def __call__(self, evidence, *rest, scale=4, **options):
        assert not rest
        return with_options(evidence, scale=scale)

    def method(self, evidence, reduce, *, scale=4):
        assert reduce(evidence.weight.sum()) > 0
        return with_options(evidence, scale=scale).double().requires_grad_()


@pytest.mark.parametrize(
    "recipe",
    [
        with_options,
        Callable(),
        Callable().method,
        functools.partial(with_options, scale=4),
        lambda evidence, scale=4: with_options(evidence, scale=scale),
        Recipe("mine", lambda evidence, reduce: RecipeResult(with_options(evidence), evidence.prediction)),
    ],
    ids=["kwargs", "object", "method", "partial", "lambda", "recipe"],
)
def test_whatever_can_be_called_with_evidence_is_a_recipe(recipe):
    expected = partition_of(Blobs(101, image=True), recipe=lambda evidence: (evidence.margin / 4).sigmoid())
    assert partition_of(Blobs(101, image=True), recipe=recipe).clean_probability.equal(expected.clean_probability)


@pytest.mark.parametrize("task", ["multiclass", "input", "rows"])
def test_the_trial_shows_what_the_recipe_will_see(task):
    seen = []

    def judge(evidence, reduce):
        seen.append(evidence)
        return RecipeResult(with_options(evidence), evidence.prediction)

    recipe = Recipe("mine", judge, needs_neuron_attribution=task == "rows", needs_input_statistics=task == "input")
    torch.manual_seed(3)
    partition_of(Blobs(300, image=True), recipe=recipe)
    made_up, real = seen
    for field in dataclasses.fields(made_up):
        one, other = getattr(made_up, field.name), getattr(real, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert (one.dtype, one.ndim, len(one)) == (other.dtype, other.ndim, len(other)), field.name
