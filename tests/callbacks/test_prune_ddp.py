"""Two gloo processes on the CPU prune what one does. One launch serves all the tests."""

import pytest
import torch

from tests.callbacks import forked
from tests.callbacks.prune_script import CASES, SIZE, run
from tests.callbacks.published import FLAG

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("prune")
    done = forked.launch(run, folder, 2)
    assert (folder / "2-1.pt").exists(), done.stderr[-4000:]
    run(folder, 1)
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_prune_the_same(found, case):
    _, one, other = (ranks[case] for ranks in found)
    assert one["said"] == other["said"]
    assert one["scores"] == other["scores"]
    for name, value in one["weights"].items():
        assert value.equal(other["weights"][name]), name
    for mine, yours in zip(one["state"]["masks"], other["state"]["masks"], strict=True):
        assert mine["keep"].equal(yours["keep"])
        assert mine["sensitivity"].equal(yours["sensitivity"])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_prune_what_one_does(found, case):
    alone, both, _ = (ranks[case] for ranks in found)
    (one,), (other,) = alone["state"]["masks"], both["state"]["masks"]
    assert one["keep"].equal(other["keep"])
    torch.testing.assert_close(one["sensitivity"], other["sensitivity"], rtol=1e-4, atol=1e-5)
    if one["standard_error"] is not None:
        torch.testing.assert_close(one["standard_error"], other["standard_error"], rtol=1e-4, atol=1e-6)
    assert alone["said"] == both["said"]
    assert not one["keep"].all()
    if case not in ("hessian", "magnitude"):  # the flag moves the loss least, and its weights are as large as any
        assert not one["keep"][FLAG]


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_scored_once(found, case):
    alone, both, _ = (ranks[case] for ranks in found)
    for one, other in zip(alone["scores"], both["scores"], strict=True):
        assert other == (None if one is None else pytest.approx(one, rel=1e-5))
    samples = [score and score[2] for score in both["scores"]]
    assert samples == [5, None if case == "no validation" else SIZE]


def test_the_guard_has_rolled_back(found):
    for case in ("guard", "no validation"):
        assert "1 of 2 proposed were rolled back" in found[1][case]["said"]
