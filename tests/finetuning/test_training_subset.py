"""What is trained on after a partition, against loops that do the same one sample at a time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.finetuning.training_subset import TrainingSubset, make_training_subset
from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.partition import Partition

QUICK = settings(max_examples=60, deadline=None)
INPUT = {REASONS.index("input"), REASONS.index("both")}
tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)


@st.composite
def partitions(draw):
    """Partitions of any kind, forced-kept samples and probabilities on the threshold among them."""
    number = draw(st.integers(2, 25))

    def column(values):
        return torch.tensor(draw(st.lists(values, min_size=number, max_size=number)))

    probability, forced = column(tenths), column(st.booleans())
    is_clean = (probability >= 0.5) | forced
    return Partition(
        clean_probability=probability,
        is_clean=is_clean,
        suggested_label=column(st.integers(0, 3)),
        suggested_probability=column(tenths),
        noise_rate=0.5,
        label=column(st.integers(0, 3)),
        label_evidence=torch.ones(number),
        input_evidence=torch.ones(number),
        reason=torch.where(is_clean, 0, column(st.integers(1, 3))).to(torch.uint8),
        noise_matrix=torch.zeros(0, 0),
        recipe="auto",
        layer="nowhere",
        epoch=1,
    )


@QUICK
@given(partitions())
def test_dropping_leaves_the_clean_ones(partition):
    draw = make_training_subset(partition, "drop", 0.7)
    assert draw.index.tolist() == [i for i in range(len(partition)) if partition.is_clean[i]]
    assert draw.probability is None
    assert draw.new_label is None
    assert draw.relabeled.tolist() == []


@QUICK
@given(partitions())
def test_weighing_takes_each_with_its_probability_and_the_kept_ones_with_a_half_at_least(partition):
    draw = make_training_subset(partition, "reweight", 0.7)
    expected = {}
    for i in range(len(partition)):
        p = partition.clean_probability[i].item()
        weight = max(p, 0.5) if partition.is_clean[i] else p
        if weight > 0:
            expected[i] = weight
    assert dict(zip(draw.index.tolist(), draw.probability.tolist(), strict=True)) == expected
    assert draw.new_label is None


@QUICK
@given(partitions(), st.integers(1, 10).map(lambda tenth: tenth / 10))
def test_a_wrong_label_is_replaced_where_the_suggested_one_is_probable_enough_and_the_input_intact(partition, least):
    draw = make_training_subset(partition, "relabel", least)
    index, new = [], [-1] * len(partition)
    for i in range(len(partition)):
        if partition.is_clean[i]:
            index.append(i)
        elif (
            REASONS[partition.reason[i]] == "label"
            and partition.suggested_probability[i] >= least
            and partition.suggested_label[i] != partition.label[i]
        ):
            index.append(i)
            new[i] = partition.suggested_label[i].item()
    assert draw.index.tolist() == index
    assert draw.new_label.tolist() == new
    assert draw.relabeled.tolist() == [i for i in range(len(partition)) if new[i] >= 0]
    assert draw.probability is None
    assert not any(partition.reason[i].item() in INPUT or partition.is_clean[i] for i in draw.relabeled)


@QUICK
@given(partitions(), st.sampled_from(["drop", "reweight", "relabel"]))
def test_a_draw_comes_back_from_its_state(partition, on_noisy):
    draw = make_training_subset(partition, on_noisy, 0.5)
    again = TrainingSubset(**draw.state_dict())
    for name, value in draw.state_dict().items():
        other = getattr(again, name)
        assert (value is None) == (other is None)
        assert value is None or value.equal(other)


def test_a_doubtful_sample_is_left_out_but_where_samples_are_weighed():
    common = {
        "suggested_probability": torch.full((3,), 0.9),
        "noise_rate": 0.5,
        "recipe": "label",
        "layer": "",
        "epoch": 1,
    }
    ones = torch.ones(3)
    partition = Partition(
        clean_probability=torch.tensor([0.95, 0.6, 0.1]),
        is_clean=torch.tensor([True, True, False]),
        suggested_label=torch.tensor([0, 0, 1]),
        label=torch.zeros(3, dtype=torch.int64),
        label_evidence=ones,
        input_evidence=ones,
        reason=torch.tensor([0, 0, 1], dtype=torch.uint8),
        noise_matrix=torch.zeros(0, 0),
        doubtful=torch.tensor([False, True, False]),
        **common,
    )
    drawn = {
        name: make_training_subset(partition, name, 0.7).index.tolist() for name in ("drop", "reweight", "relabel")
    }
    assert drawn == {"drop": [0], "reweight": [0, 1, 2], "relabel": [0, 2]}
    assert partition.decisions() == ["keep", "drop", "relabel"]
