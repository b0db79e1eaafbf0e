import csv
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.results.class_summary import ClassSummary
from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review_csv import read_review
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.trainer.protocols import MaskSource, PartitionSource


def make_partition(**changes):
    fields = {
        "clean_probability": torch.tensor([0.9, 0.2, 0.1, 0.8, 0.2]),
        "is_clean": torch.tensor([True, False, False, True, False]),
        "suggested_label": torch.tensor([3, 1, 2, 0, 5]),
        "suggested_probability": torch.tensor([0.9, 0.7, 0.5, 0.8, 0.6]),
        "noise_rate": 0.56,
        "label": torch.tensor([3, 7, 4, 0, 6]),
        "label_evidence": torch.tensor([0.9, 0.4, 0.45, 0.8, 0.25]),
        "input_evidence": torch.tensor([1.0, 0.75, 0.125, 1.0, 1.0]),
        "reason": torch.tensor([0, 1, 3, 0, 1], dtype=torch.uint8),
        "noise_matrix": torch.eye(8),
        "recipe": "label",
        "layer": "input of 'fc'",
        "epoch": 5,
    }
    return Partition(**(fields | changes))


def make_evidence(n=4, **changes):
    floats = {name: torch.zeros(n) for name in ("weight", "margin", "aum", "label_confidence", "uncertainty", "loss")}
    integers = {name: torch.zeros(n, dtype=torch.int64) for name in ("label", "prediction")}
    attribution = {"attribution": torch.zeros(n, 3, 2), "basis": torch.zeros(3, 2)}
    return Evidence(**({"index": torch.arange(n)} | floats | integers | attribution | changes))


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


def test_a_status_outlives_files_and_checkpoints(tmp_path):
    made = make_partition(status="review_only", warning="the evidence is too weak", noise_rate=None)
    assert made.status is PartitionStatus.REVIEW_ONLY
    assert f"{made.status}" == "review_only"
    made.save(tmp_path / "partition.npz")
    held = torch.load(_saved(made.state_dict(), tmp_path / "state.pt"), weights_only=True)
    for again in (Partition.load(tmp_path / "partition.npz"), Partition.from_state_dict(held)):
        assert (again.status, again.noise_rate, again.warning) == (made.status, None, "the evidence is too weak")
        assert not again.is_actionable


def _saved(state, path):
    torch.save(state, path)
    return path


def test_another_status_is_refused():
    with pytest.raises(ValueError, match=r"status must be one of 'ok', 'all_clean', .*, but is 'fine'"):
        make_partition(status="fine")
    with pytest.raises(ValueError, match="its status is a str"):
        Partition.from_state_dict(make_partition().state_dict() | {"status": "fine"})


def test_a_warning_alone_says_that_nothing_can_be_told():
    assert make_partition(warning="it does not separate").status is PartitionStatus.INCONCLUSIVE
    assert make_partition().status is PartitionStatus.OK


def test_without_a_rate_no_number_is_claimed(tmp_path):
    known = make_partition(noise_rate_interval=(0.1, 1.0))
    assert known.expected_precision == pytest.approx(2.5 / 3)
    assert known.class_summary()[0].noise_rate is not None
    found = replace(known, noise_rate=None, status="all_clean", warning="no list can be made")
    assert (found.expected_precision, found.precision_curve(), found.worth_review()) == (None, None, 0)
    assert {row.noise_rate for row in found.class_summary()} == {None}
    found.to_csv(tmp_path / "all.csv", suspects_only=False)
    rows = list(csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8-sig")))
    assert {(row["clean_probability"], row["expected_precision"]) for row in rows} == {("", "")}
    assert [int(row["index"]) for row in rows] == found.ranking().tolist()
    assert "noise_rate" not in repr(found)


def test_a_table_with_decisions_is_not_written_over(tmp_path):
    table, partition = tmp_path / "suspects.csv", make_partition()
    partition.to_csv(table)
    partition.to_csv(table, review=1)
    filled = table.read_text().replace("drop,,", "drop,keep,", 1)
    table.write_text(filled)
    with pytest.raises(ValueError, match=r"suspects\.csv contains 1 decision, .* another path, .*overwrite=True"):
        partition.to_csv(table)
    assert table.read_text() == filled
    partition.to_csv(table, overwrite=True)
    assert table.read_text() != filled


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
        ({"suggested_probability": torch.ones(4)}, r"suggested_probability must be .* shape \(5,\).* of shape \(4,\)"),
        ({"label": torch.zeros(5, dtype=torch.int32)}, "label must be torch.int64 .* but is torch.int32"),
        ({"label_evidence": torch.zeros(6)}, r"label_evidence must be .* shape \(5,\).* of shape \(6,\)"),
        ({"input_evidence": torch.ones(4)}, r"input_evidence must be .* shape \(5,\).* of shape \(4,\)"),
        ({"input_evidence": torch.ones(5).half()}, "input_evidence must be torch.float32 .* but is torch.float16"),
        ({"reason": torch.zeros(5, dtype=torch.int64)}, "reason must be torch.uint8 .* but is torch.int64"),
        ({"reason": torch.zeros(5, 1, dtype=torch.uint8)}, r"reason must be .* of shape \(5,\).* \(5, 1\)"),
        ({"reason": torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8)}, "numbers below 4, but holds 4"),
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


def test_a_partition_of_an_empty_set_is_kept_too(tmp_path):
    partition = make_partition(
        **{name: value[:0] for name, value in vars(make_partition()).items() if isinstance(value, torch.Tensor)}
    )
    partition.save(tmp_path / "partition.pt")
    assert len(Partition.load(tmp_path / "partition.pt")) == 0
    assert partition.class_summary() == []
    assert partition.reasons() == []


def test_state_of_another_version_is_refused():
    state = make_partition().state_dict()
    with pytest.raises(ValueError, match="Expected a partition of format version 7, but got version 1"):
        Partition.from_state_dict(state | {"version": 1})
    with pytest.raises(ValueError, match="Expected a partition of format version 7, but got version 99"):
        Partition.from_state_dict(state | {"version": 99})
    del state["version"]
    with pytest.raises(ValueError, match="format version 7, but got version None"):
        Partition.from_state_dict(state)


def test_from_state_dict_leaves_the_state_as_it_is():
    state = make_partition().state_dict()
    Partition.from_state_dict(state)
    assert state["version"] == 7


def read_csv(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def test_csv_of_the_suspects(tmp_path):
    make_partition().to_csv(tmp_path / "suspects.csv")
    columns = "index given_label suggested_label clean_probability label_evidence input_evidence reason is_clean"
    assert read_csv(tmp_path / "suspects.csv") == [
        [*columns.split(), "rank", "list", "expected_precision", "proposed", "decision", "dataset"],
        ["2", "4", "2", "0.100000", "0.45", "0.125", "both", "0", "1", "suspect", "", "drop", "", ""],
        ["4", "6", "5", "0.200000", "0.25", "1", "label", "0", "2", "suspect", "", "drop", "", ""],
        ["1", "7", "1", "0.200000", "0.4", "0.75", "label", "0", "3", "suspect", "", "relabel", "", ""],
    ]


def test_csv_of_both_lists(tmp_path):
    clean = torch.tensor([0.9, 0.2, 0.1, 0.45, 0.52])
    is_clean = torch.tensor([True, False, False, True, True])
    partition = make_partition(clean_probability=clean, is_clean=is_clean, noise_rate_interval=(0.4, 0.7))
    found = []
    for review, suspects_only in ((0, True), (2, True), (99, True), (0, False)):
        partition.to_csv(tmp_path / "lists.csv", review=review, suspects_only=suspects_only)
        titles, *rows = read_csv(tmp_path / "lists.csv")
        found.append([[row[titles.index(name)] for name in ("index", "list", "expected_precision")] for row in rows])
    everything = [
        ["2", "suspect", "0.9000"],
        ["1", "suspect", "0.8500"],
        ["3", "review", "0.7500"],
        ["4", "review", "0.6825"],
        ["0", "clean", "0.5660"],
    ]
    assert found == [everything[:2], everything[:4], everything, everything]
    with pytest.raises(ValueError, match="Expected review to be"):
        partition.to_csv(tmp_path / "lists.csv", review=-1)


def test_csv_says_in_every_row_of_which_data_set_it_is(tmp_path):
    make_partition(fingerprint="5:0011223344556677").to_csv(tmp_path / "suspects.csv")
    assert [row[-1] for row in read_csv(tmp_path / "suspects.csv")] == ["dataset", *["n5-0044"] * 3]


def test_what_is_done_by_default():
    partition = make_partition()
    assert partition.decisions() == ["keep", "relabel", "drop", "keep", "drop"]
    # 4 is suggested to be 5 with probability 0.6, and 2 has a corrupted input.
    assert partition.decisions(0.6) == ["keep", "relabel", "drop", "keep", "relabel"]
    # As the callback of the fit was told.
    assert make_partition(relabel_threshold=0.6).decisions() == partition.decisions(0.6)
    with pytest.raises(ValueError, match=r"threshold to be a number in \(0, 1\], but got 'x'"):
        partition.decisions("x")
    same = make_partition(suggested_label=partition.label)
    assert same.decisions() == ["keep", "drop", "drop", "keep", "drop"]


def test_csv_of_all_puts_the_clean_samples_last(tmp_path):
    make_partition().to_csv(tmp_path / "all.csv", suspects_only=False)
    assert [row[0] for row in read_csv(tmp_path / "all.csv")[1:]] == ["2", "4", "1", "3", "0"]
    assert [row[7] for row in read_csv(tmp_path / "all.csv")[1:]] == ["0", "0", "0", "1", "1"]
    assert [row[-3] for row in read_csv(tmp_path / "all.csv")[1:]] == ["drop", "drop", "relabel", "keep", "keep"]
    assert {row[-2] for row in read_csv(tmp_path / "all.csv")[1:]} == {""}


def test_csv_takes_columns_of_the_users_beside_the_index(tmp_path):
    files = np.array(["a.png", "b.png", "c.png", "d.png", "=e.png"])
    make_partition().to_csv(tmp_path / "suspects.csv", columns={"file": files, "size": range(5)})
    rows = read_csv(tmp_path / "suspects.csv")
    assert [row[:4] for row in rows] == [
        ["index", "file", "size", "given_label"],
        ["2", "c.png", "2", "4"],
        ["4", "'=e.png", "4", "6"],
        ["1", "b.png", "1", "7"],
    ]
    text = (tmp_path / "suspects.csv").read_text()
    assert read_review(tmp_path / "suspects.csv").rows == ()
    (tmp_path / "suspects.csv").write_text(text.replace("drop,,", "drop,drop,"))
    assert len(read_review(tmp_path / "suspects.csv").rows) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a"]}, "Expected column 'file' to have a value for each of 5 samples, but got 1"),
        ({"Decision": "abcde"}, "Expected column titles that are not in the table, but got 'Decision'; use another"),
    ],
)
def test_csv_refuses_columns_that_do_not_fit(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_partition().to_csv(tmp_path / "suspects.csv", columns=columns)
    assert not (tmp_path / "suspects.csv").exists()


def test_reasons_in_words():
    assert REASONS == ("none", "label", "input", "both")
    assert make_partition().reasons() == ["none", "label", "both", "none", "label"]


def random_partition(n=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(n, generator=generator)
    # Class 3 is never given, but suggested.
    label = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (n,), generator=generator)]
    reason = torch.randint(1, 4, (n,), generator=generator, dtype=torch.uint8)
    is_clean = probability > 0.1 + 0.15 * label  # so that the last class has most suspects
    return make_partition(
        clean_probability=probability,
        is_clean=is_clean,
        # For half of them their own.
        suggested_label=torch.where(
            torch.rand(n, generator=generator) < 0.5, label, torch.randint(0, classes, (n,), generator=generator)
        ),
        suggested_probability=probability,
        label=label,
        label_evidence=probability,
        input_evidence=probability,
        reason=reason * ~is_clean,
    )


def naive_summary(partition):
    rows = []
    for c in range(5):
        members = [i for i in range(len(partition)) if partition.label[i] == c]
        if not members:
            continue
        suspects = [i for i in members if not partition.is_clean[i]]
        moved = [partition.suggested_label[i].item() for i in suspects if partition.reasons()[i] in ("label", "both")]
        moved = [k for k in moved if k != c]
        counts = [moved.count(k) for k in range(5)]
        most = max(counts)
        rows.append(
            ClassSummary(
                label=c,
                samples=len(members),
                suspects=len(suspects),
                noise_rate=pytest.approx(
                    sum(1 - partition.clean_probability[i].item() for i in members) / len(members)
                ),
                confused_with=counts.index(most) if most else None,
                confused_samples=most,
            )
        )
    return sorted(rows, key=lambda row: -row.suspects / row.samples)


def test_class_summary_of_very_many_classes():
    # A square of all classes would be 80 GB.
    label, suggested = torch.tensor([99_999, 7, 7, 7, 7]), torch.tensor([0, 5, 4, 5, 7])
    found = make_partition(
        label=label, suggested_label=suggested, is_clean=torch.zeros(5, dtype=torch.bool), reason=torch.ones(5).byte()
    ).class_summary()
    assert [(row.label, row.samples, row.confused_with, row.confused_samples) for row in found] == [
        (7, 4, 5, 2),
        (99_999, 1, 0, 1),
    ]


def test_class_summary_takes_the_first_of_equal_names():
    one = torch.ones(5, dtype=torch.int64)
    partition = make_partition(
        label=one, suggested_label=torch.tensor([3, 2, 3, 2, 1]), is_clean=one == 0, reason=one.byte()
    )
    assert (partition.class_summary()[0].confused_with, partition.class_summary()[0].confused_samples) == (2, 2)
    assert make_partition(is_clean=one > 0, reason=torch.zeros(5).byte()).class_summary()[0].confused_with is None


@pytest.mark.parametrize("seed", range(3))
def test_class_summary_matches_a_loop(seed):
    partition = random_partition(seed=seed)
    found = partition.class_summary()
    assert [row.label for row in found] == [4, 2, 1, 0]
    assert found == naive_summary(partition)
    assert sum(row.samples for row in found) == len(partition)


def test_a_class_of_corrupted_inputs_is_confused_with_none():
    reason = torch.tensor([0, 2, 2, 0, 2], dtype=torch.uint8)
    partition = make_partition(label=torch.tensor([0, 1, 1, 1, 1]), reason=reason)
    (first, second) = partition.class_summary()
    assert (first.label, first.samples, first.suspects) == (1, 4, 3)
    assert (first.confused_with, first.confused_samples) == (None, 0)
    assert first.noise_rate == pytest.approx((0.8 + 0.9 + 0.2 + 0.8) / 4)
    assert (second.label, second.suspects, second.confused_with) == (0, 0, None)


def test_evidence_counts_the_classes_of_its_basis():
    assert make_evidence().num_classes == 3
    # The one field without a row per sample.
    assert make_evidence(basis=torch.zeros(7, 2)).num_classes == 7


def test_evidence_rows_must_match_the_index():
    assert make_evidence(neuron_attribution=torch.zeros(4, 9)).neuron_attribution.shape == (4, 9)
    with pytest.raises(
        ValueError, match=r"Evidence.label_confidence must have one row per sample \(4\), but has shape \(3,\)"
    ):
        make_evidence(label_confidence=torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"Evidence.neuron_attribution must have one row per sample \(4\), but has shape \(5, 9\)"
    ):
        make_evidence(neuron_attribution=torch.zeros(5, 9))
    with pytest.raises(ValueError, match=r"Evidence.attribution must .* \(4\), but has shape \(3, 3, 2\)"):
        make_evidence(attribution=torch.zeros(3, 3, 2))
    with pytest.raises(ValueError, match=r"Evidence.input_statistics must .* \(4\), but has shape \(2, 4\)"):
        make_evidence(input_statistics=torch.zeros(2, 4))
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


def test_mask_refuses_errors_of_another_layer():
    with pytest.raises(ValueError, match=r"standard_error must have shape \(3,\), but has \(4,\)"):
        NeuronMask("fc", torch.ones(3, dtype=torch.bool), torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["sensitivity", "standard_error"])
def test_mask_refuses_numbers_that_no_file_holds(name, dtype):
    given = {"sensitivity": torch.zeros(3), name: torch.zeros(3).to(dtype)}
    with pytest.raises(ValueError, match=rf"{name} must be .* that a file can hold, but is {dtype}; use \.float\(\)"):
        NeuronMask("fc", torch.ones(3, dtype=torch.bool), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 3}, "layer must be a str, but is 3"),
        ({"keep": [True, False, True]}, "keep must be a dense tensor, but is list"),
        ({"sensitivity": torch.zeros(3, device="meta")}, "sensitivity must be a dense tensor, but is .* on meta"),
        ({"sensitivity": torch.zeros(3).to_sparse()}, "sensitivity must be a dense tensor, but is torch.sparse_coo"),
        ({"sensitivity": torch.zeros(3, dtype=torch.int64)}, "sensitivity must be of a floating type, but is"),
        ({"standard_error": torch.zeros(3).bool()}, "standard_error must be of a floating type, but is torch.bool"),
    ],
)
def test_mask_refuses_what_it_cannot_save(given, message):
    known = {"layer": "fc", "keep": torch.ones(3, dtype=torch.bool), "sensitivity": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        NeuronMask(**{**known, **given})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_a_mask_takes_is_loaded_as_it_was(dtype, tmp_path):
    score = torch.tensor([1.0, float("nan"), float("-inf")], dtype=dtype, requires_grad=True) * 2
    mask = NeuronMask(np.str_("net.fc"), torch.tensor([True, False, True]), score, score.float().exp())
    mask.save(tmp_path / "mask.npz")
    loaded = NeuronMask.load(tmp_path / "mask.npz")
    assert (type(loaded.layer), loaded.layer) == (str, "net.fc")
    assert loaded.keep.equal(mask.keep)
    torch.testing.assert_close(loaded.sensitivity, mask.sensitivity, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loaded.standard_error, mask.standard_error, rtol=0, atol=0, equal_nan=True)
    assert not mask.sensitivity.requires_grad


def test_a_partition_takes_numbers_of_numpy_and_holds_those_of_python(tmp_path):
    partition = replace(make_partition(), noise_rate=np.float32(0.5), epoch=np.int64(3), recipe=np.str_("aum"))
    assert [type(value) for value in (partition.noise_rate, partition.epoch, partition.recipe)] == [float, int, str]
    partition.save(tmp_path / "partition.npz")
    assert Partition.load(tmp_path / "partition.npz").state_dict().keys() == partition.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 2.5}, "epoch must be a int, but is 2.5"),
        ({"noise_rate": "half"}, "noise_rate must be a float, but is 'half'"),
        ({"noise_rate": True}, "noise_rate must be a float, but is True"),
        ({"recipe": None}, "recipe must be a str, but is None"),
        ({"noise_rate": float("nan")}, "Probabilities must lie in"),
    ],
)
def test_a_partition_refuses_what_it_cannot_save(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_partition(), **changes)


def test_sources_are_recognized_by_what_they_publish():
    class Publishes:
        at_epoch = 3
        uses_soft_targets = True
        dry_run = False
        task_format = None
        sample_weight = None
        memorized = None
        accuracy_gap = None

        def get_partition(self, trainer, pl_module): ...

    class Masks:
        def get_mask(self, trainer, pl_module): ...

        def target_layer(self): ...

        def zero_pruned(self): ...

    assert isinstance(Publishes(), PartitionSource)
    assert not isinstance(Masks(), PartitionSource)
    assert isinstance(Masks(), MaskSource)
    assert not isinstance(Publishes(), MaskSource)


@st.composite
def partitions(draw):
    """With an estimate; suspects are the surest, but for some that are kept for their class."""
    total = draw(st.integers(1, 40))
    clean = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=total, max_size=total)))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    label, sure = torch.zeros(total, dtype=torch.int64), torch.ones(total)
    return make_partition(
        clean_probability=clean,
        is_clean=(clean > draw(st.sampled_from([-1.0, 0.3, 0.7, 1.0]))) | kept,
        suggested_label=label,
        suggested_probability=sure,
        label=label,
        label_evidence=torch.rand(total, generator=torch.Generator().manual_seed(total)),
        input_evidence=sure,
        reason=label.to(torch.uint8),
        noise_rate_interval=(0.0, 1.0),
    )


@given(partitions())
@settings(deadline=None)
def test_two_lists_are_the_data_set_in_the_order_of_doubt(partition):
    suspects, others, ranking = partition.suspect_indices(), partition.review_ranking(), partition.ranking()
    assert ranking.tolist() == [*suspects.tolist(), *others.tolist()]
    assert ranking.sort().values.equal(torch.arange(len(partition)))
    for one, is_clean in ((suspects, False), (others, True)):
        assert (partition.is_clean[one] == is_clean).all()
        assert (partition.clean_probability[one].diff() >= 0).all()
    if not len(suspects):
        assert partition.expected_precision is None
    else:
        assert partition.expected_precision == partition.expected_precision_at(len(suspects))
    wrong = 1 - partition.clean_probability.double()
    for depth in range(1, len(partition) + 1):
        assert partition.expected_precision_at(depth) == pytest.approx(wrong[ranking[:depth]].mean().item())
    worth = partition.worth_review()
    assert all(wrong[others[:k]].mean() >= 0.5 for k in range(1, worth + 1))
    assert worth == len(others) or wrong[others[: worth + 1]].mean() < 0.5


@pytest.mark.parametrize("depth", [0, 6, 1.5, "x"])
def test_a_depth_is_a_number_of_samples(depth):
    with pytest.raises(ValueError, match="Expected depth to be"):
        make_partition().expected_precision_at(depth)


def test_without_an_estimate_nothing_is_expected():
    partition = make_partition()
    assert partition.expected_precision_at(2) is None
    assert partition.expected_precision is None
    assert partition.worth_review() == 0
