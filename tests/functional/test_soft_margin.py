"""Soft margins against their definition, and what is read between the scales at which they are kept."""

import math

import pytest
import torch

from lightning_unlearn.functional.soft_margin import SCALES, interpolation, rivals_of, soft_margins
from lightning_unlearn.utilities import chunks


def scene(n=40, classes=7, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    return spread * torch.randn(n, classes, generator=generator), torch.randint(classes, (n,), generator=generator)


def defined(row, label, scale, rivals):
    others = [row[k].double() for k in rivals if k != label]
    mean = sum((scale * other).exp() for other in others) / len(others)
    return row[label].double() - mean.log() / scale


@pytest.mark.parametrize("rivals", [None, [0, 2, 5, 6]], ids=["all", "some"])
def test_soft_margins_are_what_they_are_defined_to_be(rivals, monkeypatch):
    logits, label = scene()
    if rivals is not None:
        label = torch.tensor(rivals)[label % len(rivals)]
    expected = [
        [defined(row, y, scale, rivals or range(7)) for scale in SCALES] for row, y in zip(logits, label, strict=True)
    ]
    found = soft_margins(logits, label, rivals=None if rivals is None else torch.tensor(rivals))
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(chunks, "ROWS", 7)
    again = soft_margins(logits, label, rivals=None if rivals is None else torch.tensor(rivals))
    torch.testing.assert_close(again, found)


def test_a_label_that_is_no_rival_is_compared_with_all_that_are():
    logits, label = torch.tensor([[1.0, 5.0, 5.0, 2.0]]), torch.tensor([3])
    found = soft_margins(logits, label, rivals=torch.tensor([1, 2]))
    assert found[0, -1].item() == pytest.approx(2 - 5, abs=0.05)


def test_they_run_from_the_mean_of_the_others_to_the_largest():
    logits, label = scene(spread=0.3)
    others = logits.scatter(1, label.unsqueeze(1), torch.nan)
    given = logits.gather(1, label.unsqueeze(1)).squeeze(1)
    found = soft_margins(logits, label)
    torch.testing.assert_close(found[:, 0], given - others.nanmean(dim=1), atol=0.02, rtol=0)
    largest = others.nan_to_num(-torch.inf).amax(dim=1)
    torch.testing.assert_close(found[:, -1], given - largest, atol=math.log(6) / SCALES[-1], rtol=0)
    assert (found.diff(dim=1) <= 1e-5).all()


def test_the_classes_expected_are_the_sums_of_the_softmax():
    logits, label = scene()
    expected = torch.zeros(7)
    soft_margins(logits, label, expected=expected)
    torch.testing.assert_close(expected, logits.softmax(dim=1).sum(dim=0))


def test_the_rival_is_the_strongest_other_class_and_its_share_among_these():
    logits, label = scene()
    rival, share = rivals_of(logits, label)
    others = logits.scatter(1, label.unsqueeze(1), -torch.inf)
    torch.testing.assert_close(share, others.softmax(dim=1).amax(dim=1))
    assert rival.equal(others.argmax(dim=1))
    some, _ = rivals_of(logits, label, torch.tensor([1, 4]))
    assert set(some.tolist()) <= {1, 4}
    assert not some.eq(label).any()


def test_at_the_scales_that_are_kept_nothing_is_interpolated():
    for k, scale in enumerate(SCALES):
        value, _ = interpolation(math.log(scale))
        torch.testing.assert_close(value, torch.eye(len(SCALES), dtype=torch.float64)[k])


@pytest.mark.parametrize("scale", [0.05, 0.13, 0.9, 1.7, 5.3, 31.0, 40.0])
def test_the_slope_is_that_of_the_value(scale):
    at, step = math.log(scale), 1e-5
    _, slope = interpolation(at)
    upper, lower = interpolation(at + step)[0], interpolation(at - step)[0]
    torch.testing.assert_close(slope, (upper - lower) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("classes", [30, 200, 2000])
def test_between_the_scales_the_log_odds_are_nearly_exact(classes):
    logits, label = scene(300, classes, spread=2.0)
    margins = soft_margins(logits, label).double()
    for scale in (0.3, 0.7, 1.4, 2.8, 6.0):
        others = (scale * logits.double()).scatter(1, label.unsqueeze(1), -torch.inf)
        exact = scale * logits.double().gather(1, label.unsqueeze(1)).squeeze(1) - others.logsumexp(dim=1)
        found = scale * margins @ interpolation(math.log(scale))[0] - math.log(classes - 1)
        assert (found - exact).abs().mean() < 0.12
        assert (found - exact).std() < 0.1


def test_logits_that_overflowed_give_margins_that_are_not_finite():
    logits = torch.tensor([[1.0, torch.inf, 0.0], [torch.nan, 0.0, 1.0], [0.0, 1.0, 2.0]])
    assert soft_margins(logits, torch.tensor([0, 1, 2])).isfinite().all(dim=1).tolist() == [False, False, True]


def test_no_rows():
    assert soft_margins(torch.zeros(0, 5), torch.zeros(0).long()).shape == (0, len(SCALES))
    assert rivals_of(torch.zeros(0, 5), torch.zeros(0).long())[0].shape == (0,)
