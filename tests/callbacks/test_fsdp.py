"""Two gloo processes on the CPU that shard the weights (FSDP2). One launch serves all the tests."""

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_unlearn.attribution import ATTRIBUTION_METHODS
from tests.callbacks import forked
from tests.callbacks.fsdp_script import (
    AT,
    CRITERIA,
    REFUSED,
    SCENARIOS,
    SIZE,
    attributed_by,
    fit_one,
    make_module,
    pruned_by,
    run,
)
from tests.callbacks.published import FLAG
from tests.callbacks.test_ddp import assert_equal

pytestmark = [
    pytest.mark.ddp,
    # Its passes ask streams, which the CPU has none of, for events.
    pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 runs FSDP2 on GPUs only"),
]
RESUMED = (
    *("rounds-0", f"rounds-{AT}", f"rounds-{AT + 2}", "full"),
    *("shrink-0", f"shrink-{AT}", "start-0", f"start-{AT}", f"lr-{AT}"),
)
RUNNING = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which the ranks saved what they have, and how the processes ended; the last fit is to fail."""
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, forked.launch(run, folder)


@pytest.fixture(scope="module")
def ranks(launched):
    """What each rank of two saved."""
    folder, done = launched
    assert len(list(folder.glob("*.pt"))) == 2, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(one, other):
    """Of two fits that differ in the order in which sums are made."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_ranks_have_the_same(ranks, scenario):
    one, other = ({**rank["fsdp"][scenario], "read": None} for rank in ranks)
    for found in (one, other):
        found["weights"] = {n: w for n, w in found["weights"].items() if not n.endswith(RUNNING)}
        found["before"] = {n: w for n, w in found["before"].items() if not n.endswith(RUNNING)}
    assert_equal(one, other, scenario)


@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - {"norms"}))
def test_shards_find_and_make_what_one_process_does(ranks, scenario):
    alone, both = fit_one("single", scenario), ranks[0]["fsdp"][scenario]
    torch.testing.assert_close(
        both["partition"]["clean_probability"], alone["partition"]["clean_probability"], rtol=1e-4, atol=1e-4
    )
    for name in ("is_clean", "label", "suggested_label"):
        assert both["partition"][name].equal(alone["partition"][name]), name
    for name in ("rounds", "masks", "said"):
        assert_equal(both[name], alone[name], name)
    for mine, yours in zip(both["sensitivity"], alone["sensitivity"], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-2, atol=1e-3)
    assert both["summary"]["accuracy_after"] == alone["summary"]["accuracy_after"]
    if scenario == "reweight":  # of an odd number of draws one is repeated, so that two ranks have as many
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(both["weights"][name], weight, rtol=0, atol=1e-2)
    else:
        assert_close(both["weights"], alone["weights"])


def test_ddp_with_the_same_global_batches_finds_what_one_process_does(ranks):
    alone, both, sharded = fit_one("single", "full"), ranks[0]["ddp"], ranks[0]["fsdp"]["full"]
    torch.testing.assert_close(
        both["partition"]["clean_probability"], alone["partition"]["clean_probability"], rtol=1e-5, atol=1e-5
    )
    assert both["partition"]["is_clean"].equal(alone["partition"]["is_clean"])
    assert_equal(both["masks"], alone["masks"], "masks")
    assert_close(both["weights"], alone["weights"])
    # Shards are another place for the same numbers.
    assert_equal({**both, "read": 0}, {**sharded, "read": 0}, "full")


def test_what_there_is_to_find_is_found(ranks):
    for scenario in set(SCENARIOS) - {"rows", "report", "norms"}:
        found = ranks[0]["fsdp"][scenario]
        assert (~found["partition"]["is_clean"]).sum() == 26, scenario
        assert found["summary"]["accuracy_after"] is not None
        assert len(found["draw"]["index"]) >= 78
    assert [epoch for epoch, _ in ranks[0]["fsdp"]["rounds"]["rounds"]] == [AT, AT + 2]
    assert 0 < (~ranks[0]["fsdp"]["rows"]["partition"]["is_clean"]).sum() < SIZE
    assert ranks[0]["fsdp"]["report"]["said"].startswith("would prune 0 of 20 neurons of 'net.2' (2 of 2 proposed")


def test_pruned_neurons_are_zero_on_every_shard(ranks):
    for scenario in ("full", "rounds", "reweight", "layers"):
        found = ranks[0]["fsdp"][scenario]
        gone = ~found["masks"][0]
        assert gone.sum() >= 1
        for name, dimension in (("net.2.weight", 0), ("net.2.bias", 0), ("net.4.weight", 1)):
            weight = found["weights"][name].movedim(dimension, 0)
            assert (weight[gone] == 0).all(), (scenario, name)
            assert (weight[~gone] != 0).any(dim=-1).all()


def test_the_ranks_share_the_clean_subset(ranks):
    one, other = (rank["fsdp"]["full"] for rank in ranks)
    clean = set(one["partition"]["is_clean"].nonzero().flatten().tolist())
    for epoch in range(AT + 2):
        first, second = one["read"][epoch], other["read"][epoch]
        assert set(first) | set(second) == (set(range(SIZE)) if epoch < AT else clean)
        assert not set(first) & set(second)


@pytest.mark.parametrize(("scenario", "frozen"), [("layers", ("net.0.",)), ("norms", ("net.0.", "net.1."))])
def test_layers_before_the_pruned_one_are_frozen(ranks, scenario, frozen):
    for rank in ranks:
        before, after = rank["fsdp"][scenario]["before"], rank["fsdp"][scenario]["weights"]
        same = {name for name in before if before[name].equal(after[name])}
        assert same == {name for name in before if name.startswith(frozen)}


def test_without_a_partner_the_weights_are_bit_for_bit_those_of_a_fit_without_us(ranks):
    for method in ATTRIBUTION_METHODS:
        assert_equal(ranks[0]["methods"][method]["weights"], ranks[0]["untouched"], method)


@pytest.mark.parametrize("method", ATTRIBUTION_METHODS)
def test_every_method_attributes_through_shards(ranks, method):
    alone = attributed_by("single", method)["probability"]
    for rank in ranks:
        torch.testing.assert_close(rank["methods"][method]["probability"], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_ranks_neurons_of_shards(ranks, name):
    alone = pruned_by("single", criterion=name)
    assert 0 < (~alone["keep"]).sum() <= 4
    for rank in ranks:
        both = rank["criteria"][name]
        assert both["keep"].equal(alone["keep"])
        torch.testing.assert_close(both["score"], alone["score"], rtol=1e-3, atol=1e-5)
        assert (both["weight"][~both["keep"]] == 0).all()
    if name in ("sensitivity", "mean_abs_ratio"):
        assert not alone["keep"][FLAG]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_fit_ends_as_one_that_was_not_interrupted(ranks, name):
    for rank in ranks:
        never, resumed = (dict(found) for found in (rank["fsdp"][name.partition("-")[0]], rank["resumed"][name]))
        for found in (never, resumed):
            del found["before"], found["read"]
        assert_equal(resumed, never, name)


@pytest.mark.parametrize("kind", ["full", "rounds"])
def test_a_checkpoint_loads_strictly_into_the_plain_module(ranks, launched, kind, tmp_path):
    path = launched[0] / kind / f"epoch={AT + 1}.ckpt"
    if kind == "rounds":
        # In shards: what torch makes one file of.
        state = torch.load(path / "meta.pt", weights_only=True)["callbacks"]
        dcp_to_torch_save(path, tmp_path / "one.pt")
        path = tmp_path / "one.pt"
        weights = torch.load(path, weights_only=True)["state_dict"]
    else:
        checkpoint = torch.load(path, weights_only=True)
        state, weights = checkpoint["callbacks"], checkpoint["state_dict"]
    module = make_module("full")
    module.load_state_dict(weights, strict=True)
    gone = ~state["SensitivityPruneCallback"]["masks"][0]["keep"]
    assert gone.sum() >= 1
    assert (module.net[2].weight[gone] == 0).all()
    assert (module.net[2].weight[~gone] != 0).any()


REASONS = {
    "averages": "does not know the averaged weights of StochasticWeightAveraging under ModelParallelStrategy; leave it",
    "tensor_parallel": "use ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_weights_is_refused_by_name(ranks, name):
    for rank in ranks:
        default = f"SensitivityPruneCallback({name}=...) does not work under ModelParallelStrategy"
        assert REASONS.get(name, default) in rank["refused"][name]


def test_a_validation_batch_that_one_rank_cannot_split_leaves_no_score_and_nobody_waiting(ranks):
    one, other = (rank["unscored"] for rank in ranks)
    assert one[0] is None
    assert one == other
    assert one[1][2] == 53


def test_an_error_on_one_rank_ends_both(launched):
    _, done = launched
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert "was killed" not in done.stderr
