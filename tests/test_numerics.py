"""Evidence at the edge of what there can be, in front of every recipe: a result, or nothing that is acted upon."""

import time
from dataclasses import replace

import pytest
import torch

from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.partitioning.non_finite import apply_to_finite_rows
from lightning_unlearn.recipes import RECIPES, label_recipe
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.recipes.test_recipes import auroc, flagged, make_evidence, normal, share_of

ASKS_LABELS = ("auto", "label", "loss", "aum", "argmax")
GATED = ("auto", "label", "input")


def network(n=1000, classes=5, *, noise=0.0, apart=3.0, seed=0):
    """True and given labels, and the logits of a good network: early, late and in the end."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % classes
    wrong = torch.rand(n, generator=generator) < noise
    shift = torch.randint(1, max(classes, 2), (n,), generator=generator)
    label = torch.where(wrong, (true + shift) % classes, true)
    return (
        true,
        label,
        [apart * torch.eye(classes)[true] + torch.randn(n, classes, generator=generator) for _ in range(3)],
    )


def evidence_of(logits, label):
    """With rows and the response of an early layer, which tell nothing."""
    evidence = make_evidence([block.float() for block in logits], label)
    response = torch.tensor([3.0, 1.0]) + 0.3 * normal(len(label), 2, seed=9)
    return replace(evidence, input_statistics=response, neuron_attribution=evidence.attribution[:, -1].abs())


def judged(recipe, evidence):
    """The verdict, having looked at what must hold of any."""
    verdict = apply_to_finite_rows(RECIPES[recipe], evidence, no_reduce)
    for name in ("clean_probability", "suggested_probability", "label_probability", "input_probability"):
        value = getattr(verdict, name)
        assert value is None or ((value >= 0) & (value <= 1)).all(), name
    assert ((verdict.suggested_label >= 0) & (verdict.suggested_label < evidence.num_classes)).all()
    if verdict.noise_matrix is not None:
        torch.testing.assert_close(verdict.noise_matrix.sum(dim=1), torch.ones(evidence.num_classes))
    if verdict.warning:
        assert verdict.clean_probability.min() >= 0.99
    return verdict


def few(n, classes):
    _, label, logits = network(n, classes)
    return logits, label


def one_of_a_class():
    _, label, logits = network(noise=0.2)
    gone = (label == 3) & (torch.arange(1000) != 8)
    return [block[~gone] for block in logits], label[~gone]


def constant(value, n=1000):
    return [value.expand(n, -1)] * 3, network(n)[1]


def shuffled(memorized=False):
    _, label, logits = network()
    label = label[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    return ([8 * torch.eye(5)[label] + block for block in logits] if memorized else logits), label


def without_spread(noise):
    true, label, _ = network(noise=noise)
    return [100 * torch.eye(5)[true]] * 3, label


def one_far_out(factor):
    _, label, logits = network(noise=0.3)
    logits[-1][3] *= factor
    return logits, label


EDGES = {
    "2 samples": lambda: few(2, 2),
    "3 samples": lambda: few(3, 2),
    "10 samples": lambda: few(10, 2),
    "10 samples of 10 classes": lambda: few(10, 10),
    "one sample of a class": one_of_a_class,
    "a class that no sample has": lambda: (network(classes=6)[2], network(classes=5)[1]),
    "all clean": lambda: (network()[2], network()[1]),
    "random labels": shuffled,
    "random labels, memorized": lambda: shuffled(memorized=True),
    "all zero": lambda: constant(torch.zeros(5)),
    "dead network": lambda: constant(torch.arange(5.0)),
    "dead network, sure": lambda: constant(100 * torch.arange(5.0)),
    "separable": lambda: without_spread(0),
    "separable, noisy": lambda: without_spread(0.3),
    "one logit of 1e6": lambda: one_far_out(1e6),
    "one logit of 1e30": lambda: one_far_out(1e30),
    **{f"logits of {x:g}": lambda x=x: ([x * b for b in network(noise=0.3)[2]], network(noise=0.3)[1])
       for x in (1e-30, 1e-6, 1e6, 1e30)},
    "probabilities": lambda: ([b.softmax(1) for b in network(noise=0.3)[2]], network(noise=0.3)[1]),
    "float16": lambda: ([b.half() for b in network(noise=0.3)[2]], network(noise=0.3)[1]),
    "bfloat16": lambda: ([b.bfloat16() for b in network(noise=0.3)[2]], network(noise=0.3)[1]),
    "two classes": lambda: (network(classes=2, noise=0.3)[2], network(classes=2, noise=0.3)[1]),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("edge", EDGES)
def test_a_verdict_of_probabilities_or_a_warning(edge, recipe):
    judged(recipe, evidence_of(*EDGES[edge]()))


NOTHING_TO_SEE = (
    "2 samples",
    "3 samples",
    "10 samples",
    "10 samples of 10 classes",
    "all clean",
    "random labels",
    "random labels, memorized",
    "all zero",
    "dead network",
    "dead network, sure",
    "separable",
    "logits of 1e-30",
    "logits of 1e-06",
)


@pytest.mark.parametrize("recipe", GATED)
@pytest.mark.parametrize("edge", NOTHING_TO_SEE)
def test_nothing_is_suspect_where_nothing_can_be_told(edge, recipe):
    assert not flagged(judged(recipe, evidence_of(*EDGES[edge]()))).any()


TOLD_APART = ("separable, noisy", "one logit of 1e6", "one logit of 1e30", "logits of 1e+06", "logits of 1e+30",
              "probabilities", "float16", "bfloat16", "two classes")  # fmt: skip


@pytest.mark.parametrize("recipe", ["auto", "label"])
@pytest.mark.parametrize("edge", TOLD_APART)
def test_wrong_labels_are_found_at_any_scale_and_precision(edge, recipe):
    logits, label = EDGES[edge]()
    wrong = label != torch.arange(len(label)) % logits[0].shape[1]
    verdict = judged(recipe, evidence_of(logits, label))
    assert auroc(verdict.clean_probability, wrong) > 0.95
    assert (flagged(verdict) == wrong).float().mean() > 0.93


def test_a_dead_network_that_prefers_a_class_is_no_sign_of_wrong_labels():
    # All four fifths that have another label were once suspect: of them the model was wrong, and sure of itself.
    for bias in (0.3, 1.0, 30.0):
        verdict = judged("label", evidence_of(*constant(bias * torch.arange(5.0))))
        assert not flagged(verdict).any()
    assert verdict.warning.startswith("the model separates fewer than two classes, or classes with fewer than half")


def test_corrupted_inputs_are_acted_upon_where_nothing_can_be_told_of_labels():
    evidence = evidence_of(*EDGES["dead network"]())
    assert judged("auto", evidence).warning == judged("label", evidence).warning != ""
    corrupted = torch.arange(1000) % 7 == 0  # of every class
    evidence.input_statistics[corrupted] += 9
    evidence = replace(evidence, uncertainty=evidence.uncertainty + 0.1 * corrupted)
    verdict = apply_to_finite_rows(RECIPES["auto"], evidence, no_reduce)
    assert verdict.warning == ""
    assert torch.equal(flagged(verdict), corrupted)


@pytest.mark.parametrize("recipe", ["loss", "aum", "argmax"])
def test_baselines_say_nothing_of_a_network_that_predicts_one_class(recipe):
    evidence = evidence_of(*EDGES["dead network"]())
    warned = "the model predicts the same class for all samples"
    assert judged(recipe, evidence).warning == warned
    shards = run_ranks(lambda rank, reduce: RECIPES[recipe].function(share_of(evidence, rank, 3), reduce).warning, 3)
    assert shards == [warned] * 3
    # One sample of another class is enough to be no longer so.
    evidence.prediction[5] = 1
    assert judged(recipe, evidence).warning == ""


@pytest.mark.parametrize(("classes", "known"), [(2, 1), (5, 2), (6, 2)])
def test_a_network_that_has_fallen_back_on_some_classes(classes, known):
    # A tenth of the samples has one of the other classes, none of which is ever predicted.
    n = 1000
    label = torch.where(
        torch.arange(n) % 10 == 0, known + torch.arange(n) // 10 % (classes - known), torch.arange(n) % known
    )
    seen = torch.where(label < known, label, 0)
    logits = [4 * torch.eye(classes)[seen] + 0.5 * normal(n, classes, seed=seed) for seed in range(3)]
    assert not flagged(judged("label", evidence_of(logits, label))).any()


def test_one_class_of_many_that_is_never_predicted_does_not_close_the_gate():
    true, label, logits = network(classes=10, noise=0.3)
    for block in logits:
        block[:, 7] = -9
    verdict = judged("label", evidence_of(logits, label))
    wrong, others = label != true, (true != 7) & (label != 7)
    assert (flagged(verdict) == wrong)[others].float().mean() > 0.9


def test_a_sample_alone_in_its_class_is_judged():
    logits, label = one_of_a_class()
    verdict = judged("label", evidence_of(logits, label))
    assert int((label == 3).sum()) == 1
    assert verdict.noise_matrix.isfinite().all()
    assert verdict.noise is not None


def test_ranks_without_samples():
    # More ranks than samples: some have only padding.
    evidence = evidence_of(*few(3, 2))
    for recipe in RECIPES.values():
        whole = apply_to_finite_rows(recipe, evidence, no_reduce)
        shards = run_ranks(
            lambda rank, reduce, r=recipe: apply_to_finite_rows(r, share_of(evidence, rank, 5), reduce), 5
        )
        found = torch.cat([verdict.clean_probability[:1] for verdict in shards[:3]])
        torch.testing.assert_close(found, whole.clean_probability, rtol=1e-4, atol=1e-5)
        assert {verdict.notes for verdict in shards} == {whole.notes}


def test_ten_thousand_classes():
    started = time.perf_counter()
    n, classes = 100, 10_000
    assert TrainingDynamics(n, classes, keeps_coordinates=True).basis.shape == (classes, 128)
    true = torch.arange(n) * 97
    label = true.clone()
    label[:20] += 1
    logits = [10 * torch.eye(classes)[true] + normal(n, classes, seed=seed) for seed in range(2)]
    evidence = evidence_of(logits, label)
    for recipe in ("label", "loss", "aum", "argmax"):
        verdict = judged(recipe, evidence)
        assert verdict.noise_matrix is None
        if recipe != "label":
            assert flagged(verdict).nonzero().flatten().tolist() == list(range(20))
    assert time.perf_counter() - started < 60  # a matrix of names alone would take minutes and 5 GB


def test_many_classes_have_no_matrix(monkeypatch):
    true, label, logits = network(600, 20, noise=0.3, apart=6.0)
    evidence = evidence_of(logits, label)
    expected = label_recipe(evidence, no_reduce)
    monkeypatch.setattr("lightning_unlearn.recipes.calibrated.MOST_NAMES", 19)
    found = label_recipe(evidence, no_reduce)
    assert found.noise_matrix is None
    assert expected.noise_matrix.shape == (20, 20)
    assert (flagged(found) == (label != true)).float().mean() > 0.98
    assert (flagged(found) == flagged(expected)).float().mean() > 0.98
