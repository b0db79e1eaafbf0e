"""Two gloo processes on the CPU. One launch serves all the tests, since starting processes takes longest."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_unlearn.data.fingerprint import fingerprint
from lightning_unlearn.data.sampling_scheme import scheme_of
from lightning_unlearn.data.subset_sampler import CleanSubsetSampler
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.report import RunRecord
from tests.callbacks.ddp_script import AT, run, weights_of
from tests.evidence.test_step_reader import Coded
from tests.evidence.test_training_steps import assert_is_what_the_steps_showed, last_logits, small
from tests.ranks import run_script
from tests.toys import Blobs

pytestmark = pytest.mark.ddp
SCENARIOS = ("still", "still-rlap", "layers", "full", "auto", "when", "weighted", "weighted-each")


def launch(folder, *scenarios):
    return run_script(Path(__file__).with_name("ddp_script.py"), folder, "2", *scenarios)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which the ranks saved what they have, and how the process ended; the last scenario is to fail."""
    folder = tmp_path_factory.mktemp("ddp")
    # A checkpoint of one process, for two to go on from.
    run(folder, 1, "resumed")
    run(folder, 1, "early")
    return folder, launch(folder, *SCENARIOS, "evidence", "early", "resumed", "fails")


@pytest.fixture(scope="module")
def ranks(launched):
    """What each rank of two saved, by scenario."""
    folder, done = launched
    assert len(list(folder.glob("*.pt"))) == 2 * len(SCENARIOS) + 2, done.stderr[-4000:]
    return {
        name: [torch.load(folder / f"{name}-2-{rank}.pt", weights_only=True) for rank in range(2)] for name in SCENARIOS
    }


def assert_equal(one, other, name):
    if isinstance(one, torch.Tensor):
        assert one.equal(other), name
    elif isinstance(one, dict):
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for mine, yours in zip(one, other, strict=True):
            assert_equal(mine, yours, name)
    else:
        assert one == other, name


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("what", ["partition", "mask", "sensitivity", "target", "when"])
def test_both_ranks_have_the_same(ranks, scenario, what):
    assert_equal(ranks[scenario][0][what], ranks[scenario][1][what], what)


def test_the_ranks_draw_the_partition_together_where_early_stopping_would_end_training(ranks):
    one, other = ranks["when"]
    assert one["partition"]["epoch"] == 3
    assert "EarlyStopping was about to end training" in one["when"]
    clean = set(one["partition"]["is_clean"].nonzero().flatten().tolist())
    for epoch, trained in ((2, set(range(101))), (3, clean), (4, clean)):
        assert set(one["read"][epoch]) | set(other["read"][epoch]) == trained
    # The samples of both ranks' validation, of which each saw a half, or all.
    assert "'samples': 32.0" in one["when"]


def test_one_rank_writes_the_report_of_all(ranks, launched):
    folder, _ = launched
    record = RunRecord.load(folder / "report-2")
    assert_equal(record.partition.state_dict(), ranks["full"][0]["partition"], "partition")
    assert len(record.gallery) == 5
    assert record.provenance["fits"][-1]["ranks"] == 2
    assert (folder / "report-2" / "report.html").is_file()


def test_the_ranks_evidence_is_what_the_training_steps_of_all_ranks_showed(ranks, launched):
    folder, _ = launched
    found = [torch.load(folder / f"evidence-{rank}.pt", weights_only=True) for rank in range(2)]
    data = Coded()
    noted = [
        tuple(torch.cat(parts) for parts in zip(*epochs, strict=True))
        for epochs in zip(*(rank["noted"] for rank in found), strict=True)
    ]
    logits, bias = last_logits(small, found[0]["before"], data)
    shares = [
        assert_is_what_the_steps_showed(Evidence(**rank["evidence"]), noted, logits, bias, data) for rank in found
    ]
    assert shares[0] | shares[1] == set(range(101))
    assert not shares[0] & shares[1]
    # Each rank saw about one half of the rows, so nobody could have computed this alone.
    assert max(len(rank["noted"][0][0]) for rank in found) == 51
    assert_equal(found[0]["partition"], found[1]["partition"], "partition")


@pytest.mark.parametrize("scenario", ["layers", "full", "auto"])
def test_both_ranks_train_the_same_parameters(ranks, scenario):
    one, other = (rank["weights"] for rank in ranks[scenario])
    names = [name for name in one if "running" not in name]  # batch statistics are each rank's own
    assert names
    assert_equal({name: one[name] for name in names}, {name: other[name] for name in names}, "weights")


@pytest.mark.parametrize("scenario", ["layers", "full", "still"])
def test_the_ranks_share_the_clean_subset(ranks, scenario):
    one, other = ranks[scenario]
    clean = set(one["partition"]["is_clean"].nonzero().flatten().tolist())
    assert 10 < len(clean) < 101
    for epoch in range(AT):
        assert set(one["read"][epoch]) | set(other["read"][epoch]) == set(range(101))
    for epoch in range(AT, AT + 2):
        first, second = one["read"][epoch], other["read"][epoch]
        assert set(first) | set(second) == clean
        assert len(first) == len(second) == (len(clean) + 1) // 2
        # One sample is drawn twice where an odd number is to be shared evenly.
        assert len(set(first) & set(second)) <= len(clean) % 2
    assert one["read"][AT] != one["read"][AT + 1]


@pytest.mark.parametrize(("scenario", "ranks_draw"), [("weighted", 1), ("weighted-each", 2)])
def test_the_ranks_share_a_weighted_draw_of_what_is_clean(ranks, scenario, ranks_draw):
    """150 draws of all the data: of both ranks together, or (without Lightning's splitting) of each."""
    weight = weights_of(Blobs(101)).double()
    clean = ranks[scenario][0]["partition"]["is_clean"]
    number = round(150 * ranks_draw * (weight[clean].sum() / weight.sum()).item())
    scheme = scheme_of(WeightedRandomSampler(weight, 150), ranks=ranks_draw).restricted_to(clean.nonzero().flatten())
    assert scheme.number == number
    for epoch in range(AT, AT + 2):
        for rank in range(2):
            assert len(ranks[scenario][rank]["read"][0]) == 75 * ranks_draw
            sampler = CleanSubsetSampler(scheme, num_replicas=2, rank=rank, seed=0)
            sampler.set_epoch(epoch)
            assert ranks[scenario][rank]["read"][epoch] == list(sampler)
            assert len(sampler) == -(-number // 2)


def test_on_other_devices_than_those_of_its_checkpoint_a_fit_leaves_nothing_out(launched):
    """From one process to two, and back: with a schedule of steps, for which batches are planned."""
    folder, done = launched
    ranks = [torch.load(folder / f"resumed-2-{rank}.rank", weights_only=True) for rank in range(2)]
    clean = ranks[0]["clean"].tolist()
    assert sorted(ranks[0]["read"]) == [4, 5], done.stderr[-4000:]
    for epoch in (4, 5):
        assert {index for rank in ranks for index in rank["read"][epoch]} == set(clean)
        assert [len(rank["read"][epoch]) for rank in ranks] == [(len(clean) + 1) // 2] * 2
    run(folder, 1, "resumed")
    alone = torch.load(folder / "resumed-1-0.rank", weights_only=True)
    assert {epoch: sorted(read) for epoch, read in alone["read"].items()} == {6: clean, 7: clean}


def test_evidence_is_shared_out_anew_on_another_number_of_ranks(launched):
    """Before the partition, from one process to two, and back."""
    folder, done = launched
    alone = torch.load(folder / "early-1-0.rank", weights_only=True)
    both = [torch.load(folder / f"early-2-{rank}.rank", weights_only=True) for rank in range(2)]
    assert alone["rows"] == 101
    assert [rank["rows"] for rank in both] == [51, 51], done.stderr[-4000:]
    assert_equal(both[0]["partition"], both[1]["partition"], "partition")
    state = torch.load(folder / "early-2-epoch=2.ckpt", weights_only=True)["callbacks"]["AttributionPartitionCallback"]
    assert state["epochs_seen"] == [1, 2, 3]
    assert state["trajectory"]["label"].equal(Blobs(101).y)
    # A sample that pads the share of a rank was drawn twice.
    assert state["trajectory"]["scores"][:, 0].sum() == 2 * 101 + 102
    run(folder, 1, "early")
    again = torch.load(folder / "early-1-0.rank", weights_only=True)
    assert again["rows"] == 101
    for found in (both[0], again):
        for name in ("clean_probability", "label_evidence"):
            torch.testing.assert_close(found["partition"][name], alone["partition"][name], rtol=1e-4, atol=1e-4)
        assert found["partition"]["is_clean"].equal(alone["partition"]["is_clean"])


def test_after_the_last_checkpoint_both_ranks_make_the_summary_on_resume(launched):
    folder, done = launched
    for rank in range(2):
        found = torch.load(folder / f"resumed-2-{rank}.rank", weights_only=True)
        assert found["again"] == found["summary"], done.stderr[-4000:]
        assert found["again"]["accuracy_after"] is not None


def test_layers_before_the_pruned_one_are_frozen(ranks):
    for rank in ranks["layers"]:
        assert rank["target"] == "net.4"
        before, after = rank["before"], rank["weights"]
        same = {name for name in before if before[name].equal(after[name])}
        assert same == {name for name in before if name.startswith(("net.0.", "net.1."))}


def test_pruned_neurons_are_zero(ranks):
    for rank in ranks["full"]:
        gone = ~rank["mask"]
        assert gone.sum() == 3
        assert (rank["weights"]["net.4.weight"][gone] == 0).all()
        assert (rank["weights"]["net.7.weight"][:, gone] == 0).all()


@pytest.mark.parametrize("scenario", ["still", "still-rlap"])
def test_two_processes_find_what_one_finds(ranks, scenario, tmp_path):
    run(tmp_path, 1, scenario)
    alone, both = torch.load(tmp_path / f"{scenario}-1-0.pt", weights_only=True), ranks[scenario][0]
    # A sample that was drawn twice to make the ranks' shares equal counts once more in the average over training.
    drawn = [i for rank in ranks[scenario] for epoch in range(AT) for i in rank["read"][epoch]]
    once = torch.tensor(drawn).bincount() == AT
    assert 101 - AT <= once.sum() < 101
    for name, rows in (("clean_probability", slice(None)), ("label_evidence", once)):
        one, other = both["partition"][name][rows], alone["partition"][name][rows]
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name in ("is_clean", "suggested_label", "label"):
        assert both["partition"][name].equal(alone["partition"][name]), name
    assert both["partition"]["warning"] == alone["partition"]["warning"]
    assert both["partition"]["fingerprint"] == alone["partition"]["fingerprint"] == fingerprint(DataLoader(Blobs(101)))
    assert_equal(both["mask"], alone["mask"], "mask")
    if alone["mask"] is not None:
        torch.testing.assert_close(both["sensitivity"], alone["sensitivity"], rtol=1e-4, atol=1e-5)
    assert (scenario == "still") == (alone["mask"] is not None)
    if scenario == "still":
        assert both["left_out"] == pytest.approx(alone["left_out"], rel=1e-3, abs=1e-6)


def test_an_error_on_one_rank_ends_both(launched):
    _, done = launched
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "The pass over the training set failed on another rank" in done.stderr
