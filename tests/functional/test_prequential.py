from dataclasses import replace

import pytest
import torch

from lightning_unlearn.functional import prequential
from lightning_unlearn.functional.prequential import class_shift, following, prequential_rate
from tests.ranks import run_ranks


def epoch(n, rate, *, seed=0, classes=5, growth=(1.0, 1.0), prior=None):
    """Logits of one epoch's steps, that grow from one part of it to the next, labels and positions."""
    generator = torch.Generator().manual_seed(seed)
    score = 3 * torch.randn(n, classes, generator=generator).double()
    if prior is not None:
        score = score + prior
    truth = torch.multinomial(score.softmax(1), 1, generator=generator).squeeze(1)
    blind = torch.rand(n, generator=generator) < rate
    label = torch.where(blind, torch.randint(0, classes, (n,), generator=generator), truth)
    position = torch.arange(n) / n
    said = score if prior is None else score - prior
    return said * torch.linspace(*growth, n).unsqueeze(1), label, position


@pytest.mark.parametrize("growth", [(1.0, 1.0), (0.6, 1.0), (3.0, 3.0)])
def test_finds_the_rate_whatever_temperature_the_epoch_had(growth):
    found = prequential_rate(*epoch(6000, 0.1, growth=growth), torch.ones(6000))
    assert found.is_settled
    assert found.low <= 0.08 <= found.high
    assert found.z_score > 5


def test_clean_labels_show_nothing():
    found = prequential_rate(*epoch(6000, 0.0, growth=(0.7, 1.0)), torch.ones(6000))
    assert found.z_score < 3
    assert found.low == 0
    assert found.high < 0.01


def test_an_epoch_that_still_learns_fast_is_not_believed():
    found = prequential_rate(*epoch(3000, 0.1, growth=(0.02, 1.0)), torch.ones(3000))
    assert not found.is_settled
    assert (found.low, found.high, found.z_score) == (0.0, 1.0, 0.0)


def test_a_network_that_knows_nothing_is_not_believed():
    logits, label, position = epoch(3000, 0.1)
    found = prequential_rate(torch.randn_like(logits), label, position, torch.ones(3000))
    assert found.skill < 0.1
    assert not found.is_settled


def test_class_weights_are_taken_out_and_chance_is_not():
    prior = torch.tensor([3.0, 0.0, 0.0, -1.0, -2.0])
    weighted = prequential_rate(*epoch(8000, 0.05, prior=prior), torch.ones(8000))
    torch.testing.assert_close(weighted.bias, (prior - prior.mean()).double(), atol=0.3, rtol=0)
    assert weighted.middle == pytest.approx(0.04, abs=0.01)
    assert not prequential_rate(*epoch(8000, 0.05), torch.ones(8000)).bias.any()


def test_a_bias_is_in_logits_whatever_their_scale():
    prior = torch.tensor([3.0, 0.0, 0.0, -1.0, -2.0])
    logits, label, position = epoch(8000, 0.05, prior=prior)
    found = prequential_rate(logits / 3, label, position, torch.ones(8000))
    torch.testing.assert_close(3 * found.bias, (prior - prior.mean()).double(), atol=0.3, rtol=0)


def test_class_weights_shift_what_is_expected():
    given = torch.tensor([900.0, 60.0, 40.0, 0.0])
    assert not class_shift(given, torch.tensor([880.0, 70.0, 50.0, 0.0])).any()
    shift = class_shift(given, torch.tensor([330.0, 330.0, 330.0, 10.0]))
    assert shift[0] > 0 > shift[1] > shift[2]
    assert shift[3] == 0


def test_what_a_sampler_did_is_known():
    favored = -class_shift(torch.tensor([100, 200, 200, 300, 500]), torch.full((5,), 260))
    assert favored.sum() == pytest.approx(0, abs=1e-9)
    logits, label, position = epoch(8000, 0.05)
    found = prequential_rate(logits + favored, label, position, torch.ones(8000), favored=favored)
    alone = prequential_rate(logits, label, position, torch.ones(8000))
    assert found.middle == pytest.approx(alone.middle, abs=1e-6)
    assert not found.bias.any()
    assert not class_shift(torch.tensor([100, 120]), torch.tensor([110, 100])).any()  # by chance


@pytest.mark.parametrize(("scale", "counts"), [(1.0, 1), (0.2, 0)], ids=["probabilities", "hard samples only"])
def test_confusion_counts_where_outputs_are_probabilities(scale, counts, monkeypatch):
    logits, label, position = epoch(8000, 0.05)
    data = (scale * logits, label, position, torch.ones(8000))
    found = prequential_rate(*data)
    assert (found.confused, found.is_blind) == (0, True)
    less = (found.high - found.middle) / 2
    monkeypatch.setattr(prequential, "confusion_rate", lambda *_, **__: (less, 0.05))
    assert prequential_rate(*data).is_blind
    monkeypatch.setattr(prequential, "confusion_rate", lambda *_, **__: (0.02, 0.05))
    found = prequential_rate(*data)
    assert (found.confused, found.most_confused, found.is_blind) == (0.02 * counts, 0.05, False)


def test_no_upper_end_where_it_is_not_asked_whether_classes_are_confused():
    two = prequential_rate(*epoch(8000, 0.05, classes=2), torch.ones(8000))
    assert two.z_score > 3
    assert not two.is_blind
    assert not prequential_rate(*epoch(8000, 0.0), torch.ones(8000)).is_blind


EARLY = prequential_rate(*epoch(6000, 0.1), torch.ones(6000))


@pytest.mark.parametrize(
    ("low", "middle", "high", "z", "expected"),
    [
        (0.05, 0.07, 0.09, 8.0, (0.05, 0.08, 0.1, 8.0, True)),  # a little is memorized
        (0.0, 0.02, 0.03, 4.0, (0.0, 0.03, 0.1, 4.0, True)),  # most had not been learned
        (0.0, 0.0, 0.01, 0.0, (0.0, 0.0, 0.1, 0.0, True)),
        (0.07, 0.09, 0.1, 12.0, (0.07, 0.09, 0.1, 12.0, False)),  # it still rises
    ],
)
def test_an_epoch_says_as_much_as_the_next_confirms(low, middle, high, z, expected):
    known = replace(EARLY, low=0.06, middle=0.08, high=0.1, z_score=9.0)
    found = following(known, replace(EARLY, low=low, middle=middle, high=high, z_score=z))
    assert (found.low, pytest.approx(found.middle), found.high, found.z_score, found.is_confirmed) == expected


def test_the_first_sign_is_of_the_epoch_that_tells():
    known = replace(EARLY, low=0.0, middle=0.04, high=0.15, z_score=0.8)
    found = replace(EARLY, low=0.0, middle=0.036, high=0.08, z_score=4.2)
    assert following(known, found) is found
    assert following(replace(known, z_score=3.5), found).is_confirmed
    assert following(known, replace(found, z_score=2.0)).is_confirmed


def test_an_epoch_that_is_not_believed_confirms_nothing():
    unsettled = replace(EARLY, is_settled=False)
    assert following(None, EARLY) is EARLY
    assert following(EARLY, unsettled) is EARLY
    assert following(unsettled, EARLY) is EARLY


def test_samples_that_were_not_drawn_do_not_count():
    logits, label, position = epoch(3000, 0.1)
    missing = torch.arange(3000) % 3 == 0
    with_holes = logits.masked_fill(missing.unsqueeze(1), torch.nan)
    found = prequential_rate(with_holes, label, position, (~missing).double())
    alone = prequential_rate(logits[~missing], label[~missing], position[~missing], torch.ones(2000))
    assert found.middle == pytest.approx(alone.middle, abs=1e-5)


def test_of_many_numbers_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr(prequential, "MAX_NUMBERS", 10_000)
    found = prequential_rate(*epoch(6000, 0.1), torch.ones(6000))
    assert found.low <= 0.08 <= found.high


def test_ranks_find_what_one_finds():
    logits, label, position = epoch(1501, 0.1)
    one = prequential_rate(logits, label, position, torch.ones(1501))

    def on_rank(rank, reduce):
        part = slice(rank, None, 2)
        ones = torch.ones(len(label[part]))
        return prequential_rate(logits[part], label[part], position[part], ones, reduce=reduce)

    for found in run_ranks(on_rank, 2):
        assert found.middle == pytest.approx(one.middle, abs=1e-5)
        assert found.high == pytest.approx(one.high, abs=1e-4)
        assert found.is_settled == one.is_settled


def test_an_epoch_that_only_confirms_is_not_asked_how_classes_are_confused(monkeypatch):
    asked = []

    def confused(*data, **options):
        asked.append(data)
        return 0.0, 0.0

    monkeypatch.setattr(prequential, "confusion_rate", confused)
    data = (*epoch(8000, 0.1), torch.ones(8000))
    first = prequential_rate(*data)
    assert len(asked) == 1
    second = prequential_rate(*data, known=first)
    assert len(asked) == 1
    assert following(first, second).is_confirmed
    higher = prequential_rate(*data, known=replace(first, middle=first.middle / 2, z_score=first.z_score / 2))
    assert len(asked) == 2
    assert higher.middle == pytest.approx(first.middle)
