from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge

from lightning_unlearn.functional import leave_one_out
from lightning_unlearn.functional.leave_one_out import (
    leave_one_out_logits,
    leave_one_out_scores,
    left_out_rate,
    left_out_share,
    objection_to,
    skill_of,
)
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks


def draw(n=60, dimension=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (n,), generator=generator)
    features = torch.randn(n, dimension, generator=generator).double() + 1.5 * torch.eye(dimension)[label]
    return features, label


def test_is_what_refits_without_each_sample_say():
    features, label = draw()
    scores = leave_one_out_scores(features, label, torch.ones(60), 3, penalties=[0.1])
    centered = features - features.mean(0)
    alpha = 0.1 * torch.linalg.eigvalsh(centered.T @ centered).mean().item()
    target = torch.nn.functional.one_hot(label, 3).double()
    for i in (0, 17, 59):
        rest = torch.arange(60) != i
        # The penalty is on the slopes about the mean of all samples, which is close to that of the others.
        model = Ridge(alpha=alpha).fit(features[rest], target[rest])
        expected = torch.from_numpy(model.predict(features[i : i + 1])).squeeze(0)
        torch.testing.assert_close(scores[i], expected, atol=1e-6, rtol=0)


def test_a_label_does_not_speak_for_itself():
    features, label = draw()
    changed = label.clone()
    changed[7] = (label[7] + 1) % 3
    before, after = (
        leave_one_out_scores(features, y, torch.ones(60), 3, penalties=[0.01])[7] for y in (label, changed)
    )
    torch.testing.assert_close(before, after)


def test_rows_without_weight_do_not_count():
    features, label = draw()
    weight = (torch.arange(60) < 40).double()
    padded = leave_one_out_scores(features, label, weight, 3)
    torch.testing.assert_close(padded[:40], leave_one_out_scores(features[:40], label[:40], torch.ones(40), 3))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_finds(world_size):
    features, label = draw()
    one = leave_one_out_scores(features, label, torch.ones(60), 3)

    def on_rank(rank, reduce):
        part = slice(rank, None, world_size)
        return leave_one_out_scores(features[part], label[part], torch.ones(len(label[part])), 3, reduce=reduce)

    for rank, scores in enumerate(run_ranks(on_rank, world_size)):
        torch.testing.assert_close(scores, one[rank::world_size])


def rate_of(features, label, weight, classes, reduce=no_reduce):
    logits = leave_one_out_logits(features, label, weight, classes, reduce=reduce)
    return left_out_rate(logits, label, weight, reduce=reduce)


def noisy(n=1500, dimension=40, classes=4, rate=0.1, seed=0):
    """Classes that a linear head tells apart, some labels wrong."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % classes
    features = torch.randn(n, dimension, generator=generator) + 2.5 * torch.eye(classes, dimension)[truth]
    wrong = torch.rand(n, generator=generator) < rate
    moved = torch.randint(1, classes, (n,), generator=generator)
    return features, torch.where(wrong, (truth + moved) % classes, truth), wrong


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.1, 0.3])
def test_the_rate_is_within_its_interval(rate):
    features, label, wrong = noisy(rate=rate)
    found = rate_of(features, label, torch.ones(1500), 4)
    assert found.is_settled
    assert found.low <= wrong.float().mean() <= found.high
    assert (found.z_score > 5) == (rate > 0)


def test_features_that_know_nothing_tell_nothing():
    _, label, _ = noisy()
    features = torch.randn(1500, 40, generator=torch.Generator().manual_seed(1))
    assert not rate_of(features, label, torch.ones(1500), 4).is_settled


def test_the_unit_of_a_feature_does_not_matter():
    features, label, _ = noisy()
    unit = 10.0 ** torch.linspace(-3, 3, 40)
    one, other = (rate_of(x, label, torch.ones(1500), 4) for x in (features, features * unit + 100 * unit))
    assert other.middle == pytest.approx(one.middle, rel=0.02)


def test_a_copy_does_not_speak_for_its_label():
    features, label, _ = noisy()
    one = leave_one_out_scores(features, label, torch.ones(1500), 4)
    twice = leave_one_out_scores(features.repeat(2, 1), label.repeat(2), torch.full((3000,), 0.5), 4)
    torch.testing.assert_close(twice[:1500], one)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_of_many_features_the_leading_components_do(monkeypatch, world_size):
    # Ten directions that tell, among features that hardly vary otherwise.
    features, label, _ = noisy(dimension=10)
    mix = torch.randn(10, 120, generator=torch.Generator().manual_seed(2))
    many = features @ mix + 0.05 * torch.randn(1500, 120, generator=torch.Generator().manual_seed(3))
    whole = rate_of(many, label, torch.ones(1500), 4)
    monkeypatch.setattr(leave_one_out, "MAX_COMPONENTS", 16)

    def on_rank(rank, reduce):
        part = slice(rank, None, world_size)
        return rate_of(many[part], label[part], torch.ones(len(label[part])), 4, reduce=reduce)

    for found in run_ranks(on_rank, world_size):
        assert found.middle == pytest.approx(whole.middle, abs=0.005)
        assert found.skill == pytest.approx(whole.skill, abs=0.01)


def told(skill):
    return PrequentialRate(0.01, 0.02, 0.03, 6.0, skill, True, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("skill", "predicted", "validated", "early", "said"),
    [
        (0.70, 0.95, 0.68, 0.5, ""),  # a frozen backbone, a head that memorizes
        (0.70, 0.72, 0.50, 0.5, "seen the labels"),
        (0.70, 0.52, 0.50, 0.5, ""),  # a head that has hardly learned
        (0.70, 0.80, 0.80, 0.5, "less than the network, so"),
        (0.70, 0.99, None, 0.74, ""),
        (0.70, 0.99, None, 0.76, "less than the network, so"),
        (0.70, 0.99, None, None, "less than the network, so"),
        (0.70, 0.74, None, None, ""),
    ],
)
def test_when_leave_one_out_scores_are_trusted(skill, predicted, validated, early, said):
    objection = objection_to(told(skill), predicted, validated, early)
    assert said in objection
    assert bool(said) == bool(objection)


def test_circles_are_not_told_apart_by_a_ridge():
    generator = torch.Generator().manual_seed(0)
    angle, label = 6.28 * torch.rand(2000, generator=generator), torch.arange(2000) % 2
    rows = torch.stack([angle.cos(), angle.sin()], 1) * (1 + label).unsqueeze(1)
    found = rate_of(rows, label, torch.ones(2000), 2)
    assert not found.is_settled or objection_to(found, skill_of(0.99, 0.5), None, None)


@pytest.mark.parametrize(
    ("skill", "left_out_z", "early", "z", "share"),
    [
        (0.8, 40.0, 0.5, 8.0, 0.7),  # knows more, and shows more
        (0.8, 40.0, 0.5, 0.0, 0.7),  # the network has memorized all
        (0.6, 12.0, 0.5, 12.0, 0.7 * 0.5 * 0.5),
        (0.8, 5.0, 0.5, 10.0, 0.0),  # shows less
        (0.5, 40.0, 0.5, 8.0, 0.0),  # knows no more
        (0.8, 2.9, 0.5, 0.0, 0.0),  # shows nothing
    ],
)
def test_how_much_leave_one_out_counts_in_ranking(skill, left_out_z, early, z, share):
    one = replace(told(skill), z_score=left_out_z)
    assert left_out_share(one, told(early), z) == pytest.approx(share)
    assert left_out_share(one, None, z) == 0
    assert left_out_share(one, replace(told(early), is_settled=False), z) == 0
    assert left_out_share(None, told(early), z) == 0
