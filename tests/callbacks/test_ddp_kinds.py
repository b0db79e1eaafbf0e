"""Kinds of DDP, and of the data that two ranks get, on two gloo processes. One launch serves all the tests."""

import pytest
import torch

from lightning_unlearn import Partition
from tests.callbacks import forked
from tests.callbacks.ddp_kinds_script import (
    AT,
    DROPPED,
    FEW,
    SCENARIOS,
    SIZE,
    SPAWNING,
    averaging,
    elsewhere,
    plain,
    run,
)
from tests.callbacks.test_ddp import assert_equal
from tests.toys import Blobs, Toy

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks saved what they have."""
    folder = tmp_path_factory.mktemp("kinds")
    for strategy in SPAWNING:
        done = forked.call(elsewhere, folder, strategy)
        assert done.returncode == 0, done.stderr[-4000:]
    done = forked.launch(run, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank of two saved."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*SCENARIOS, "resumed", "reviewed"])
def test_both_ranks_find_and_make_the_same(ranks, name):
    one, other = ({**rank[name], "read": None} for rank in ranks)
    assert_equal(one, other, name)
    assert one["requires_grad"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_wrong_labels_are_found_and_pruned_neurons_are_zero(ranks, name):
    if name == "averages" and not averaging():
        pytest.skip("Lightning has averages from 2.6 on.")
    found = ranks[0][name]
    assert (~found["partition"]["is_clean"]).sum() == 25
    gone = ~found["mask"]
    assert gone.sum() == 2
    assert (found["weights"]["net.2.weight"][gone] == 0).all()
    assert (found["weights"]["net.4.weight"][:, gone] == 0).all()
    assert (found["weights"]["net.2.weight"][~gone] != 0).any(dim=1).all()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ranks_share_the_clean_subset(ranks, name):
    one, other = (rank[name]["read"] for rank in ranks)
    clean = set(ranks[0][name]["partition"]["is_clean"].nonzero().flatten().tolist())
    for epoch in range(AT):
        # Where nobody splits the data, each rank has all of it.
        assert len(one[epoch]) == len(other[epoch]) == (SIZE if name == "unsplit" else SIZE // 2 + 1)
        assert set(one[epoch]) | set(other[epoch]) == set(range(SIZE))
    for epoch in range(AT, len(one)):
        both = set(one[epoch]) | set(other[epoch])
        # Another round may call another sample clean.
        assert len(both ^ clean) <= (name == "rounds")
        assert len(one[epoch]) == len(other[epoch]) == (len(both) + 1) // 2
        assert len(set(one[epoch]) & set(other[epoch])) == len(both) % 2


@pytest.mark.parametrize("name", ["static layers", "unused"])
def test_layers_are_frozen_under_every_kind_of_ddp(ranks, name):
    found = ranks[0][name]
    same = {key for key, value in found["before"].items() if value.equal(found["weights"][key])}
    assert same == {key for key in found["before"] if key.startswith(("net.0.", "spare."))}
    found = ranks[0]["static"]
    assert not any(value.equal(found["weights"][key]) for key, value in found["before"].items())


def test_a_fit_that_is_resumed_between_rounds_ends_as_one_that_was_not_interrupted(ranks):
    for rank in ranks:
        never, resumed = ({**rank[name], "read": None, "before": None} for name in ("rounds", "resumed"))
        assert never["rounds"] == [AT, AT + 2]
        assert_equal(resumed, never, "rounds")


def test_decisions_of_a_table_that_only_rank_0_has_hold_on_both_ranks(ranks):
    for rank in ranks:
        found = rank["reviewed"]["partition"]
        assert (found["clean_probability"][DROPPED] == 0).all()
        assert (~found["is_clean"]).sum() == 25 + len(DROPPED)
        assert not set(DROPPED) & set(rank["reviewed"]["read"][AT])


@pytest.mark.parametrize(("name", "clean"), [("one", 1), ("three", 3)])
def test_fewer_clean_samples_than_a_batch_for_each_rank(ranks, name, clean):
    one, other = (rank["few"][name] for rank in ranks)
    assert one["is_active"]
    for epoch in (1, 2):
        assert set(one["read"][epoch]) | set(other["read"][epoch]) == set(range(clean))
        assert len(one["read"][epoch]) == len(other["read"][epoch]) == (clean + 1) // 2


@pytest.mark.parametrize("name", ["one with norms", "no full batch"])
def test_what_leaves_a_rank_nothing_to_train_on_leaves_training_as_it_is(ranks, name):
    one, other = (rank["few"][name] for rank in ranks)
    assert not one["is_active"]
    for epoch in range(3):
        assert len(one["read"][epoch]) == len(other["read"][epoch]) == (SIZE // 2 + 1) // 8 * 8 + 4 * ("norms" in name)


@pytest.mark.parametrize("name", FEW)
def test_with_few_clean_samples_both_ranks_train_the_same_weights(ranks, name):
    one, other = (rank["few"][name]["weights"] for rank in ranks)
    assert_equal(one, other, name)
    assert all(bool(value.isfinite().all()) for value in one.values())


@pytest.mark.parametrize("strategy", SPAWNING)
def test_what_a_fit_in_other_processes_finds_is_in_its_checkpoint(folder, strategy):
    assert torch.load(folder / f"{strategy}.pt", weights_only=True) == {"is here": False}
    checkpoint = torch.load(folder / strategy / "last.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["AttributionPartitionCallback"]
    # The callbacks that were pickled for it read the training steps.
    assert state["reader"]["reason"] == ""
    partition = Partition.from_state_dict(state["partition"])
    assert len(partition.suspect_indices()) == 25
    gone = ~checkpoint["callbacks"]["SensitivityPruneCallback"]["masks"][0]["keep"]
    assert gone.sum() == 2
    module = Toy(plain)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    assert (module.net[2].weight[gone] == 0).all()


def test_validation_samples_are_judged_once_each_on_both_ranks(ranks):
    data, found = Blobs(45, 0.2, seed=7), ranks[0]["validated"]
    for name in ("argmax", "auto"):
        assert_equal(ranks[1]["validated"][name]["partition"], found[name]["partition"], name)
        assert found[name]["partition"]["label"].equal(data.y)
    module = Toy(plain)
    module.load_state_dict(found["argmax"]["before"])
    with torch.no_grad():
        # What is attributed is a logit less the head's bias.
        said = (module.eval()(data.x) - module.net[-1].bias).argmax(dim=1)
    assert found["argmax"]["partition"]["is_clean"].equal(said == data.y)


def test_ranks_with_other_validation_data_are_refused_before_the_first_step(ranks):
    for rank in ranks:
        found = rank["validated"]["one more"]
        assert "same validation data in the same order, but 1 of 2 ranks have a different number of" in found["said"]
        assert found["steps"] == 0


OTHERS = {
    "in_another_order": "different labels at the same indices than rank 0",
    "one_more": "a different number of samples than rank 0",
    "other_items": "different items at the same indices than rank 0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_with_different_data_are_refused_before_the_first_step(ranks, name):
    for rank in ranks:
        said = rank["refused"][name]
        assert f"in the same order, but 1 of 2 ranks have {OTHERS[name]}" in said["said"]
        assert said["steps"] == 0


def test_a_single_other_label_is_found_when_the_partition_is_drawn(ranks):
    for rank in ranks:
        assert (
            "Expected every rank to have the same labels at the same indices, but 1 differ"
            in (rank["refused"]["one_label"]["said"])
        )
