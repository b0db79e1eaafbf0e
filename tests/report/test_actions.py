"""What was done with which samples."""

from dataclasses import replace

import pytest
import torch

from lightning_unlearn.report.actions import SampleOutcome, SampleOutcomes, shown_samples
from tests.callbacks.published import make_partition
from tests.report.runs import SUSPECTS, hostile_record, provenance_of


def actions(provenance=None):
    return SampleOutcomes(hostile_record().partition, provenance_of() if provenance is None else provenance)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, SampleOutcome("re-labeled", (1,), by_person=True)),
        (1, SampleOutcome("dropped", by_person=True)),
        (2, SampleOutcome("dropped")),
        (4, SampleOutcome("re-labeled", (1,))),
        (50, SampleOutcome("kept", by_person=True)),
        (51, SampleOutcome("kept")),
    ],
)
def test_what_became_of_a_sample(index, expected):
    assert actions().of(index) == expected


def test_a_suspect_that_is_drawn_by_its_probability_is_not_said_to_be_kept():
    weighed = actions(provenance_of(dropped=[], relabeled=[], weighed=True))
    assert [weighed.of(index).word for index in (0, 50)] == ["drawn by p(clean)", "kept"]


@pytest.mark.parametrize(
    "provenance", [{}, provenance_of(from_epoch=None, dropped=[], relabeled=[])], ids=["none", "dry"]
)
def test_where_nothing_was_done_it_says_what_suspects_csv_would(provenance):
    found = actions(provenance)
    assert not found.has_acted
    decisions = hostile_record().partition.decisions()
    assert [found.of(index).word for index in range(100)] == decisions
    assert found.of(2) == SampleOutcome("relabel", (3,))


def test_of_several_labels_those_that_stay_are_trained_on_too():
    label = torch.tensor([[1, 0, 1]]).repeat(100, 1)
    partition = replace(
        hostile_record().partition, label=label, suggested_label=label, label_probability=torch.full((100, 3), 0.5)
    )
    moved = [{"index": 7, "given": [1, 0, 1], "new": [-1, 1, 0]}]
    found = SampleOutcomes(partition, provenance_of(relabeled=moved, dropped=[]))
    assert found.of(7) == SampleOutcome("re-labeled", (0, 1))
    assert found.listed_moves(str)[0][0].title == ("0, 2", "0, 1")


@pytest.mark.parametrize(
    "provenance",
    [
        {"done": [1]},
        {"done": {"a": 3}},
        {"review": "x"},
        provenance_of(relabeled=[{"index": "x"}]),
        provenance_of(dropped=["x"]),
    ],
)
def test_what_cannot_be_read_is_refused(provenance):
    with pytest.raises(ValueError, match="Expected provenance written by AttributionPartitionCallback, but"):
        actions(provenance)


def test_lists_are_whole_and_grouped_by_what_was_changed_into_what():
    found = actions()
    (group,), rest = found.listed_moves("abcd".__getitem__)
    assert (group.title, group.count, group.left_out, rest) == (("a", "b"), 10, 0, 0)
    assert group.text == "0, 4, 8, 12, 16, 20, 24, 28, 32, 36"
    drops = found.listed_drops()
    assert drops.text.split(", ") == [str(index) for index in range(SUSPECTS) if index % 4]
    assert [layer.text for layer in found.listed_neurons()] == ["0, 1"]


def test_of_very_many_the_first_are_listed_and_the_rest_is_counted():
    moved = [{"index": index, "given": index % 3, "new": 3 + index % 500} for index in range(90_000)]
    found = actions(provenance_of(dropped=range(100_000), relabeled=moved))
    drops = found.listed_drops()
    assert (drops.count, drops.left_out) == (100_000, 80_000)
    groups, rest = found.listed_moves(str)
    assert sum(group.count for group in groups) + rest == 90_000
    assert sum(group.count - group.left_out for group in groups) == 20_000


def test_what_nobody_has_decided_yet_is_shown_first():
    partition = hostile_record().partition
    assert shown_samples(partition, {}, 12) == list(range(12))
    # A quarter of the places, of which three samples need all.
    assert shown_samples(partition, provenance_of(), 12) == [*range(2, 11), 0, 1, 50]
    assert shown_samples(partition, provenance_of(), 4) == [2, 3, 4, 0]
    # Where there is room, all.
    assert shown_samples(partition, provenance_of(), 90) == [*range(2, SUSPECTS), 0, 1, 50]
    assert shown_samples(partition, provenance_of(), 0) == []


def test_what_is_worth_a_look_has_its_places():
    clean = torch.cat([torch.linspace(0.01, 0.1, 20), torch.full((10,), 0.499), torch.full((70,), 0.999)])
    found = make_partition(clean, torch.arange(100) % 4)
    found = replace(found, is_clean=torch.arange(100) >= 20, noise_rate_interval=(0.1, 0.4))
    assert found.worth_review() == 10
    assert shown_samples(found, {}, 8) == [*range(6), 20, 21]
    assert shown_samples(found, {}, 25) == [*range(19), *range(20, 26)]
    assert shown_samples(found, {}, 99) == list(range(30))
    assert shown_samples(found, {"review": {"keep": [20, 50]}}, 8) == [*range(5), 21, 20, 50]


def test_where_none_is_suspect_the_least_sure_are_shown():
    partition = make_partition(torch.tensor([0.9, 1.0, 0.6, 0.7]), torch.arange(4))
    assert shown_samples(partition, {}, 3) == [2, 3, 0]
    assert shown_samples(partition, {}, 9) == [2, 3, 0]
    assert shown_samples(partition, {"review": {"keep": [1]}}, 3) == [1]
