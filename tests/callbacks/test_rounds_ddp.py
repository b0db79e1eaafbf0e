"""Rounds, new labels and weights on two gloo processes. One launch serves all the tests."""

import pytest
import torch

from lightning_unlearn.data.sampling_scheme import evenly
from lightning_unlearn.data.subset_sampler import CleanSubsetSampler
from tests.callbacks import forked
from tests.callbacks.rounds_script import AT, EPOCHS, SIZE, run_all
from tests.callbacks.test_ddp import assert_equal
from tests.toys import Blobs

pytestmark = pytest.mark.ddp
SCENARIOS = ("relabel", "reweight", "report", "workers")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of two saved, by scenario."""
    folder = tmp_path_factory.mktemp("rounds")
    done = forked.launch(run_all, folder, SCENARIOS)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)] for name in SCENARIOS
    }


@pytest.mark.parametrize("scenario", ["relabel", "reweight", "report"])
def test_both_ranks_have_the_same_partition_rounds_summary_draw_and_weights(ranks, scenario):
    one, other = ranks[scenario]
    for name in ("partition", "rounds", "summary", "draws", "weights"):
        assert_equal(one[name], other[name], name)
    # Each has the evidence of its half, of which one sample pads the second.
    assert [len(rank["state"]) for rank in (one, other)] == [(SIZE + 1) // 2] * 2
    assert one["state"][:, 0].all()
    assert other["state"][:-1, 0].all()
    assert not other["state"][-1].any()
    assert [drawn["epoch"] for drawn in one["rounds"]] == [AT, AT + 2]
    assert one["summary"]["memorized"] is not None
    assert (one["summary"]["accuracy_after"] is None) == (scenario == "report")


def epochs_of(ranks, scenario, epoch):
    """Indices and labels of both ranks in an epoch."""
    return [[tuple(row) for row in rank["noted"][epoch]] for rank in ranks[scenario]]


@pytest.mark.parametrize(("scenario", "epochs"), [("relabel", range(AT, EPOCHS)), ("workers", (1, 2))])
def test_labels_are_replaced_by_index_on_both_ranks(ranks, scenario, epochs):
    data, replaced = Blobs(SIZE), 0
    for epoch in epochs:
        draw = ranks[scenario][0]["draws"][epoch]
        wanted = torch.where(draw["new_label"] >= 0, draw["new_label"], data.y).tolist()
        one, other = epochs_of(ranks, scenario, epoch)
        assert all(wanted[index] == label for index, label in one + other), epoch
        assert {index for index, _ in one + other} == set(draw["index"].tolist())
        # One sample is drawn twice where an odd number is to be shared evenly.
        shared = {index for index, _ in one} & {index for index, _ in other}
        assert len(one) == len(other) == (len(draw["index"]) + 1) // 2
        assert len(shared) <= len(draw["index"]) % 2
        for rank in (one, other):
            replaced += sum(data.y[index] != label for index, label in rank)
    assert replaced > 10


def test_before_that_they_are_the_given_ones(ranks):
    y = Blobs(SIZE).y.tolist()
    for scenario, epochs in (("relabel", range(AT)), ("workers", range(1)), ("report", range(EPOCHS))):
        for epoch in epochs:
            one, other = epochs_of(ranks, scenario, epoch)
            assert {index for index, _ in one + other} == set(range(SIZE)), (scenario, epoch)
            assert all(y[index] == label for index, label in one + other)


def test_the_ranks_share_the_weighed_draw_of_the_epoch(ranks):
    drawn = []
    for epoch in range(AT, EPOCHS):
        draw = ranks["reweight"][0]["draws"][epoch]
        shares = [[index for index, _ in share] for share in epochs_of(ranks, "reweight", epoch)]
        for rank, share in enumerate(shares):
            scheme = evenly(torch.arange(SIZE)).restricted_to(draw["index"], draw["probability"])
            sampler = CleanSubsetSampler(scheme, num_replicas=2, rank=rank, seed=0)
            sampler.set_epoch(epoch)
            assert share == list(sampler)
        number = int(draw["probability"].double().sum() + 1e-6)
        assert len(shares[0]) == len(shares[1]) == (number + 1) // 2
        assert len(set(shares[0]) | set(shares[1])) == number
        assert len(set(shares[0]) & set(shares[1])) == number % 2
        drawn.append(set(shares[0]) | set(shares[1]))
    assert drawn[0] != drawn[1]


def test_a_later_round_is_another_draw(ranks):
    for scenario in ("relabel", "reweight"):
        draws = ranks[scenario][0]["draws"]
        assert sorted(draws) == list(range(AT, EPOCHS))
        assert_equal(draws[AT], draws[AT + 1], "draw")
        assert_equal(draws[AT + 2], draws[EPOCHS - 1], "draw")
    assert not draws[AT]["probability"].equal(draws[AT + 2]["probability"])
