"""The fit by soft margins against the one by all logits."""

import math

import pytest
import torch

from lightning_unlearn.functional.margin_noise import (
    AveragedCurve,
    average_of,
    fit_margin_noise,
    fit_with_and_without,
    predicted,
    prequential_margin_rate,
    wrong_probability,
)
from lightning_unlearn.functional.prequential import prequential_rate
from lightning_unlearn.functional.soft_margin import interpolation, soft_margins
from lightning_unlearn.functional.symmetric_noise import fit_symmetric_noise
from lightning_unlearn.functional.symmetric_noise import fit_with_and_without as by_logits
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

CLASSES = 66


def scene(rate=0.05, n=4000, classes=CLASSES, scale=1.7, seed=0):
    """Scores whose labels are drawn from their softmax at a scale, and some blindly."""
    generator = torch.Generator().manual_seed(seed)
    score = 3 * torch.randn(n, classes, generator=generator)
    label = torch.multinomial((scale * score).softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(n, generator=generator) < rate
    return score, torch.where(blind, torch.randint(classes, (n,), generator=generator), label)


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("scale", [0.5, 1.7, 4.0])
def test_it_finds_what_all_logits_find(rate, scale):
    score, label = scene(rate, scale=scale)
    ones = torch.ones(len(label))
    expected, expected_z = by_logits(score, label, ones)
    margins = soft_margins(score, label)
    found, z = fit_with_and_without(margins, ones, CLASSES)
    assert found.rate == pytest.approx(expected.rate, abs=0.003)
    assert z == pytest.approx(expected_z, abs=0.5, rel=0.03)
    assert found.scale.item() == pytest.approx(expected.scale.item(), rel=0.03)
    assert found.std_error == pytest.approx(expected.std_error, abs=5e-4)
    wrong = wrong_probability(found, margins)
    torch.testing.assert_close(wrong, expected.wrong_probability(score, label), atol=0.06, rtol=0)


def test_groups_have_scales_of_their_own():
    score, label = scene(0.05, n=6000)
    group = torch.arange(6000) % 3
    smaller = score / torch.tensor([1.0, 2.0, 4.0])[group].unsqueeze(1)
    arguments = {"group": group, "num_groups": 3, "unclear": True}
    found = fit_margin_noise(soft_margins(smaller, label), torch.ones(6000), CLASSES, **arguments)
    expected = fit_symmetric_noise(smaller, label, torch.ones(6000), **arguments)
    torch.testing.assert_close(found.scale, expected.scale, rtol=0.05, atol=0)
    assert found.rate == pytest.approx(expected.rate, abs=0.004)


def test_scores_that_are_small_and_clean_are_not_called_blind():
    # From a scale of 1 the first step led to one of 7,000, where all that was not certain counted as blind.
    for divided in (6, 12, 24, 200):
        score, label = scene(0.0, n=2000, classes=200)
        found, z = fit_with_and_without(soft_margins(score / divided, label), torch.ones(2000), 200)
        assert found.rate < 0.003
        assert z < 3
        if divided < 24:  # larger scales count as 32
            assert found.scale.item() == pytest.approx(1.7 * divided, rel=0.1)


def test_rows_without_weight_do_not_count():
    score, label = scene()
    margins = soft_margins(score, label)
    weight = (torch.arange(len(label)) % 4 > 0).float()
    expected, _ = fit_with_and_without(margins[weight > 0], torch.ones(int(weight.sum())), CLASSES)
    margins[weight == 0] = -70.0
    found, _ = fit_with_and_without(margins, weight, CLASSES)
    assert found.rate == pytest.approx(expected.rate, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_together_what_one_finds(world_size):
    score, label = scene()
    margins = soft_margins(score, label)
    expected, z = fit_with_and_without(margins, torch.ones(len(label)), CLASSES)

    def fit(rank, reduce):
        rows = margins[rank::world_size]
        return fit_with_and_without(rows, torch.ones(len(rows)), CLASSES, reduce=reduce)

    for found, found_z in run_ranks(fit, world_size):
        assert found.rate == pytest.approx(expected.rate, rel=1e-4)
        assert found_z == pytest.approx(z, rel=1e-4)


def test_the_margins_of_a_mean_are_read_off_those_of_its_parts():
    score, label = scene()
    # The same at two sizes, of which the mean is half as large again as the smaller.
    parts = [soft_margins(size * score, label) for size in (0.5, 1.0)]
    curve = average_of(parts, torch.ones(len(label)), CLASSES, reduce=no_reduce)
    assert (curve.scale[0] / curve.scale[1]).item() == pytest.approx(2, rel=0.05)
    of_mean = soft_margins(0.75 * score, label).double()
    for scale in (0.4, 1.0, 2.1):
        found = torch.cat(parts, dim=1).double() @ curve(math.log(scale))[0]
        torch.testing.assert_close(found, of_mean @ interpolation(math.log(scale))[0], atol=0.12, rtol=0)
    value, slope = curve(0.3)
    upper, lower = curve(0.3 + 1e-5)[0], curve(0.3 - 1e-5)[0]
    assert value.shape == (18,)
    torch.testing.assert_close(slope, (upper - lower) / 2e-5, atol=1e-6, rtol=1e-5)


def test_one_part_is_as_it_is():
    curve = AveragedCurve(torch.tensor([3.0], dtype=torch.float64))
    for found, expected in zip(curve(0.7), interpolation(0.7), strict=True):
        torch.testing.assert_close(found, expected)


def test_predicted_is_whether_the_label_is_the_strongest_class():
    score, label = scene()
    right = score.argmax(1) == label
    assert (predicted(soft_margins(score, label), CLASSES) == right).double().mean() > 0.99


def early(rate=0.05, first_factor=1.0, seed=0):
    score, label = scene(rate, n=6000, seed=seed)
    position = torch.arange(6000) / 6000
    # The network learns: its scores grow in the first fifth.
    size = torch.where(position < 0.2, first_factor, 1.0).unsqueeze(1)
    return size * score, label, position


def rate_of(score, label, position, *, is_first=True, expected=None, reduce=no_reduce):
    drawn = reduce(torch.bincount(label, minlength=CLASSES).double())
    said = drawn if expected is None else expected
    margins, ones = soft_margins(score, label), torch.ones(len(label))
    return prequential_margin_rate(
        margins, position, ones, CLASSES, drawn=drawn, expected=said, is_first=is_first, reduce=reduce
    )


def test_an_early_epoch_tells_what_its_logits_tell():
    score, label, position = early()
    expected = prequential_rate(score, label, position, torch.ones(6000))
    found = rate_of(score, label, position)
    assert found.is_settled
    assert expected.is_settled
    assert found.low <= 0.05 <= found.high
    for name, tolerance in (("low", 0.006), ("middle", 0.006), ("high", 0.006), ("skill", 0.01)):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=tolerance)
    assert found.z_score == pytest.approx(expected.z_score, rel=0.1)
    assert not found.bias.any()


def test_a_later_epoch_gives_a_lower_bound():
    found = rate_of(*early(), is_first=False)
    assert found.is_settled
    assert found.high == 1


def test_a_network_that_learns_fast_or_knows_little_tells_nothing():
    fast = rate_of(*early(first_factor=0.1))
    assert not fast.is_settled
    score, label, position = early()
    noise = torch.randn(score.shape, generator=torch.Generator().manual_seed(1))
    weak = rate_of(0.2 * score + 3 * noise, label, position)
    assert weak.skill < 0.3
    assert not weak.is_settled


def test_an_early_epoch_of_ranks_is_that_of_one():
    score, label, position = early()
    one = rate_of(score, label, position)
    for found in run_ranks(
        lambda rank, reduce: rate_of(
            score[rank::2], label[rank::2], position[rank::2], expected=torch.bincount(label), reduce=reduce
        ),
        2,
    ):
        assert found.middle == pytest.approx(one.middle, rel=1e-3)
        assert found.skill == pytest.approx(one.skill)
