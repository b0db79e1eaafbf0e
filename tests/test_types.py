import csv
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lightning_unlearn.types import Evidence, LayerPoint, MaskSource, NeuronMask, Partition, PartitionSource


def make_partition(**changes):
    fields = {
        "clean_probability": torch.tensor([0.9, 0.2, 0.1, 0.8, 0.2]),
        "is_clean": torch.tensor([True, False, False, True, False]),
        "suggested_label": torch.tensor([3, 1, 2, 0, 5]),
        "noise_rate": 0.56,
        "label": torch.tensor([3, 7, 4, 0, 6]),
        "label_evidence": torch.tensor([4.0, -2.0, -1.0, 3.0, -5.0]),
        "recipe": "label",
        "layer": "input of 'fc'",
        "epoch": 5,
    }
    return Partition(**(fields | changes))


def make_evidence(n=4, **changes):
    floats = {name: torch.zeros(n) for name in ("weight", "support", "loss")}
    integers = {name: torch.zeros(n, dtype=torch.int64) for name in ("label", "prediction", "rival")}
    return Evidence(**({"index": torch.arange(n)} | floats | integers | changes))


def test_layer_point_reads_as_words():
    assert str(LayerPoint("net.fc")) == "output of 'net.fc'"
    assert str(LayerPoint("net.fc", "input")) == "input of 'net.fc'"


def test_indices_of_the_two_sides():
    partition = make_partition()
    assert len(partition) == 5
    assert partition.clean_indices().tolist() == [0, 3]
    # 2 has the lowest probability; of 1 and 4, equal in it, 4 has the weaker evidence.
    assert partition.suspect_indices().tolist() == [2, 4, 1]


def test_equal_suspects_come_in_index_order():
    partition = make_partition(label_evidence=torch.zeros(5))
    assert partition.suspect_indices().tolist() == [2, 1, 4]


@pytest.mark.parametrize(
    ("changes", "actionable"),
    [
        ({}, True),
        ({"warning": "it does not separate"}, False),
        ({"is_clean": torch.ones(5, dtype=torch.bool)}, False),
        ({"is_clean": torch.zeros(5, dtype=torch.bool)}, False),
    ],
    ids=["two sides", "warning", "all clean", "none clean"],
)
def test_actionable_only_without_warning_and_with_two_sides(changes, actionable):
    assert make_partition(**changes).is_actionable is actionable


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        make_partition().noise_rate = 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean_probability": torch.zeros(5, 1)}, r"clean_probability must have shape \(N,\), but has \(5, 1\)"),
        (
            {"clean_probability": torch.zeros(5).double()},
            r"clean_probability must be torch.float32 of shape \(5,\), but is torch.float64 of shape \(5,\)",
        ),
        ({"is_clean": torch.zeros(4, dtype=torch.bool)}, r"is_clean must be .*bool of shape \(5,\).* shape \(4,\)"),
        ({"suggested_label": torch.zeros(5)}, "suggested_label must be torch.int64 .* but is torch.float32"),
        ({"label": torch.zeros(5, dtype=torch.int32)}, "label must be torch.int64 .* but is torch.int32"),
        ({"label_evidence": torch.zeros(6)}, r"label_evidence must be .* shape \(5,\).* of shape \(6,\)"),
        ({"clean_probability": torch.tensor([0, 0.5, 1.25, 0, 0])}, r"in \[0, 1\], but .* spans \[0, 1.25\]"),
        ({"clean_probability": torch.tensor([-0.5, 0.5, 1, 0, 0])}, r"in \[0, 1\], but .* spans \[-0.5, 1\]"),
        ({"clean_probability": torch.tensor([torch.nan, 0.5, 1, 0, 0])}, r"in \[0, 1\], but .* spans \[nan"),
        ({"noise_rate": 1.5}, "noise_rate is 1.5"),
        ({"noise_rate": float("nan")}, "noise_rate is nan"),
    ],
)
def test_partition_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_partition(**changes)


def test_save_and_load(tmp_path):
    partition = make_partition(warning="why not")
    partition.save(tmp_path / "partition.pt")
    loaded = Partition.load(tmp_path / "partition.pt")
    for name, value in partition.state_dict().items():
        got = loaded.state_dict()[name]
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


def test_state_of_another_version_is_refused():
    state = make_partition().state_dict()
    with pytest.raises(ValueError, match="Expected a partition of format version 1, but got version 99"):
        Partition.from_state_dict(state | {"version": 99})
    del state["version"]
    with pytest.raises(ValueError, match="format version 1, but got version None"):
        Partition.from_state_dict(state)


def test_from_state_dict_leaves_the_state_as_it_is():
    state = make_partition().state_dict()
    Partition.from_state_dict(state)
    assert state["version"] == 1


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_of_the_suspects(tmp_path):
    make_partition().to_csv(tmp_path / "suspects.csv")
    assert read_csv(tmp_path / "suspects.csv") == [
        ["index", "given_label", "suggested_label", "clean_probability", "label_evidence", "is_clean"],
        ["2", "4", "2", "0.100000", "-1", "0"],
        ["4", "6", "5", "0.200000", "-5", "0"],
        ["1", "7", "1", "0.200000", "-2", "0"],
    ]


def test_csv_of_all_puts_the_clean_samples_last(tmp_path):
    make_partition().to_csv(tmp_path / "all.csv", suspects_only=False)
    assert [row[0] for row in read_csv(tmp_path / "all.csv")[1:]] == ["2", "4", "1", "3", "0"]
    assert [row[-1] for row in read_csv(tmp_path / "all.csv")[1:]] == ["0", "0", "0", "1", "1"]


def test_evidence_rows_must_match_the_index():
    assert make_evidence(rows=torch.zeros(4, 9)).rows.shape == (4, 9)
    with pytest.raises(ValueError, match=r"Evidence.support must have one row per sample \(4\), but has shape \(3,\)"):
        make_evidence(support=torch.zeros(3))
    with pytest.raises(ValueError, match=r"Evidence.rows must have one row per sample \(4\), but has shape \(5, 9\)"):
        make_evidence(rows=torch.zeros(5, 9))
    with pytest.raises(ValueError, match=r"Evidence.loss .* but has shape \(\)"):
        replace(make_evidence(), loss=torch.tensor(0.0))


def test_mask_lists_the_pruned_neurons():
    mask = NeuronMask("fc", torch.tensor([True, False, True, False]), torch.tensor([0.0, 2.0, 0.1, -3.0]))
    assert mask.pruned_indices().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("keep", "sensitivity", "found"),
    [
        (torch.ones(3), torch.zeros(3), r"torch.float32 \(3,\) and \(3,\)"),
        (torch.ones(3, dtype=torch.bool), torch.zeros(4), r"torch.bool \(3,\) and \(4,\)"),
        (torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1), r"torch.bool \(3, 1\) and \(3, 1\)"),
    ],
)
def test_mask_refuses_what_does_not_fit(keep, sensitivity, found):
    with pytest.raises(ValueError, match=rf"keep must be bool of shape \(D,\).* but they are {found}"):
        NeuronMask("fc", keep, sensitivity)


def test_sources_are_recognised_by_what_they_publish():
    class Publishes:
        at_epoch = 3
        regresses_on_probability = True

        def pull_partition(self, trainer, pl_module): ...

        def split_batch(self, batch): ...

    class Masks:
        def pull_mask(self, trainer, pl_module): ...

        def target_layer(self): ...

    assert isinstance(Publishes(), PartitionSource)
    assert not isinstance(Masks(), PartitionSource)
    assert isinstance(Masks(), MaskSource)
    assert not isinstance(Publishes(), MaskSource)
