"""Streams in two gloo processes on the CPU; one launch serves all the tests."""

import pytest
import torch

from lightning_unlearn.data.sample_key import owners_of
from tests.callbacks import forked
from tests.callbacks.streams_script import N, run
from tests.streams import index_of
from tests.toys import Blobs, assert_same_weights

pytestmark = pytest.mark.ddp
TORCH_2_6 = torch.__version__.startswith("2.6.")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    run(folder, 1, "full")
    more = () if TORCH_2_6 else ("plain-sharded",)
    done = forked.launch(run, folder, 2, "full", "from-1", "lopsided", "plain", *more, "mistaken")
    run(folder, 1, "from-2")
    return folder, done


def ranks_of(launched, scenario):
    folder, done = launched
    files = [folder / f"{scenario}-2-{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr[-4000:]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("scenario", ["full", "from-1", "lopsided"])
def test_ranks_have_the_same_partition_of_all_samples(launched, scenario):
    one, other = ranks_of(launched, scenario)
    data = Blobs(N, 0.2)
    assert one["keys"] == other["keys"]
    assert len(one["keys"]) == N
    for name in ("p_clean", "is_clean", "label"):
        assert one[name].equal(other[name]), name
    assert one["label"].equal(data.y[index_of(one["keys"])])
    assert data.wrong[index_of(one["keys"])][~one["is_clean"]].float().mean() > 0.9
    assert_same_weights(
        {name: value for name, value in one["weights"].items() if "running" not in name},
        {name: value for name, value in other["weights"].items() if "running" not in name},
    )


@pytest.mark.skipif(TORCH_2_6, reason="torch 2.6 runs FSDP2 on GPUs only")
def test_where_weights_are_sharded_it_is_as_under_ddp(launched):
    sharded = ranks_of(launched, "plain-sharded")
    for rank, plain in enumerate(ranks_of(launched, "plain")):
        for name in ("keys", "owned", "trained", "steps"):
            assert sharded[rank][name] == plain[name], name
        assert sharded[rank]["is_clean"].equal(plain["is_clean"])
        torch.testing.assert_close(sharded[rank]["p_clean"], plain["p_clean"], rtol=1e-4, atol=1e-4)
        # Moved back towards the start, and trained on.
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(sharded[rank]["weights"][name], weight, rtol=1e-3, atol=1e-4)


def test_the_evidence_of_a_sample_lies_on_one_rank(launched):
    one, other = ranks_of(launched, "full")
    assert not set(one["owned"]) & set(other["owned"])
    assert len(one["owned"]) + len(other["owned"]) == N
    for rank, part in enumerate((one, other)):
        assert owners_of(part["owned"], 2).eq(rank).all()


def test_each_rank_narrows_its_own_batches_and_takes_as_many_steps(launched):
    one, other = ranks_of(launched, "full")
    clean = {key for key, is_clean in zip(one["keys"], one["is_clean"].tolist(), strict=True) if is_clean}
    for part in (one, other):
        assert set(part["trained"][4]) <= clean
        assert len(set(part["steps"].values())) == 1
    assert set(one["trained"][2]) | set(other["trained"][2]) == set(one["keys"])


def test_a_rank_whose_batch_is_empty_takes_the_step_with_the_others(launched):
    one, other = ranks_of(launched, "lopsided")
    assert one["steps"] == other["steps"]
    wrong = set(Blobs(N, 0.2).wrong.nonzero().flatten().tolist())
    # Two rows of each, for batch norm, which teach nothing.
    kept = [at for at in index_of(other["trained"][4]).tolist() if at in wrong]
    assert len(kept) == 2 * 3
    assert not set(index_of(one["trained"][4]).tolist()) & wrong


def test_a_fit_goes_on_on_another_number_of_ranks(launched):
    folder, _ = launched
    for scenario, name in (("from-2", "from-2-1-0.pt"), ("from-1", "from-1-2-0.pt")):
        found = torch.load(folder / name, weights_only=True)
        assert len(found["keys"]) == N, scenario
        assert found["trained"].keys() == {2, 3, 4}, "the first two epochs are those of the checkpoint"


def test_a_label_that_differs_between_ranks_ends_all_of_them(launched):
    _, done = launched
    assert done.returncode != 0
    assert "Expected each key to identify one sample with a fixed label" in done.stderr
    assert "('blob-00" in done.stderr
