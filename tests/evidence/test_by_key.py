"""Ranks are threads here, which hand over to each other what the processes of a fit do."""

import pytest
import torch

from lightning_unlearn.data.sample_key import owners_of
from lightning_unlearn.evidence.by_key import EpochOfKeys, KeyedEvidence, last_seen
from lightning_unlearn.evidence.key_checks import check_epoch, fault_of_first_batch
from lightning_unlearn.evidence.rank_share import Ranks
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from tests.ranks import exchanges, run_ranks

CLASSES = 5


def drawn(total, epochs, seed=0):
    """For each epoch an order, and of each sample its logits in it; and the labels."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(total, generator=generator) for _ in range(epochs)]
    logits = torch.randn(epochs, total, CLASSES, generator=generator)
    return order, logits, torch.randint(0, CLASSES, (total,), generator=generator)


def gathered(keys, data, rank, ranks, epochs=None, found=None):
    """What a rank has gathered that saw every R-th sample of each epoch."""
    order, logits, label = data
    by_key, trajectory = found or (KeyedEvidence(), TrainingDynamics(0, CLASSES))
    reports = []
    for epoch in epochs or range(len(order)):
        mine = order[epoch][ranks.rank :: ranks.number]
        for place, part in enumerate(mine.split(7)):
            slots = by_key.slots([keys[at] for at in part.tolist()])
            by_key.place(slots, float(place))
            by_key.note(trajectory, slots, logits[epoch, part], label[part])
        reports.append(by_key.hand_over(trajectory, 1, ranks))
        trajectory.merge(epoch % 4, ranks.reduce)
    return by_key, trajectory, reports


def by_index(data):
    """The same of one process, by index."""
    order, logits, label = data
    trajectory = TrainingDynamics(len(label), CLASSES)
    for epoch, index in enumerate(order):
        trajectory.observe(index, logits[epoch, index], label[index])
        trajectory.merge(epoch % 4, lambda part: part)
    return trajectory


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["text", "integer"])
def test_each_sample_is_at_one_rank_with_all_that_any_has_seen_of_it(world_size, kind):
    keys = [f"image-{at:03d}" if kind == "text" else 10 * at for at in range(61)]
    data, whole, exchange = drawn(61, 3), None, exchanges(world_size)

    def work(rank, reduce):
        ranks = Ranks(rank, world_size, reduce, exchange[rank])
        by_key, trajectory, reports = gathered(keys, data, rank, ranks)
        share, of_all = by_key.share(trajectory, 1, ranks)
        return share, of_all, last_seen(trajectory, share.local, share.index), trajectory, reports, len(by_key)

    found = run_ranks(work, world_size)
    whole = by_index(data)
    lengths = {len(share.index) for share, *_ in found}
    assert len(lengths) == 1, "as many on every rank, as recipes sum over their parts"
    assert sum(own for *_, own in found) == 61
    seen = torch.zeros(61)
    for share, of_all, last, trajectory, reports, _ in found:
        assert of_all == tuple(sorted(keys))
        assert share.total == 61
        assert reports[0] == EpochOfKeys(61, 61, 0, 0, 0)
        assert reports[1] == EpochOfKeys(61, 61, 61, 61, 0)
        counts = share.weight > 0
        index, local = share.index[counts], share.local[counts]
        seen[index] += 1
        for mine, theirs in zip(trajectory.phases(local), whole.phases(index), strict=True):
            torch.testing.assert_close(mine, theirs)
        for name, value in trajectory.scores(local).items():
            torch.testing.assert_close(value, whole.scores(index)[name])
        assert last["label"][counts].equal(data[2][index])
        # The last epoch's, in which each was drawn.
        torch.testing.assert_close(last["prediction"][counts], data[1][2, index].argmax(dim=1))
    assert seen.eq(1).all()


def test_a_rank_that_owns_nothing_takes_part():
    # The key of whose owner there is one only.
    keys = [key for key in map(str, range(200)) if owners_of([key], 2)[0] == 0][:20]
    data, exchange = drawn(20, 2), exchanges(2)

    def work(rank, reduce):
        ranks = Ranks(rank, 2, reduce, exchange[rank])
        by_key, trajectory, _ = gathered(keys, data, rank, ranks)
        share, of_all = by_key.share(trajectory, 1, ranks)
        return share, len(of_all), last_seen(trajectory, share.local, share.index)

    one, other = run_ranks(work, 2)
    assert one[0].weight.tolist() == [1] * 20
    assert other[0].weight.tolist() == [0] * 20
    assert one[1] == other[1] == 20
    assert other[2]["label"].eq(-1).all()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_a_fit_goes_on_with_another_number_of_ranks(before, after):
    keys, data = [f"k{at}" for at in range(50)], drawn(50, 4)
    exchange = exchanges(before)

    def first(rank, reduce):
        ranks = Ranks(rank, before, reduce, exchange[rank])
        by_key, trajectory, _ = gathered(keys, data, rank, ranks, epochs=[0, 1])
        return by_key.state_dict(trajectory, ranks)

    states = run_ranks(first, before)
    assert states[0]["whole"]
    assert sum(len(part["keys"]) for part in states[0]["parts"]) == 50, "rank 0 has those of all"
    exchange = exchanges(after)

    def second(rank, reduce):
        ranks = Ranks(rank, after, reduce, exchange[rank])
        by_key = KeyedEvidence()
        trajectory = by_key.load_state_dict(states[0], ranks)
        by_key, trajectory, reports = gathered(keys, data, rank, ranks, epochs=[2, 3], found=(by_key, trajectory))
        return by_key.share(trajectory, 1, ranks)[0], trajectory, reports

    whole = by_index(data)
    place = torch.tensor([int(key[1:]) for key in sorted(keys)])
    for share, trajectory, reports in run_ranks(second, after):
        assert reports[0].again == 50
        counts = share.weight > 0
        index, local = place[share.index[counts]], share.local[counts]
        for mine, theirs in zip(trajectory.phases(local), whole.phases(index), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_part_of_one_rank_says_so():
    by_key, trajectory, _ = gathered(["a", "b", "c"], drawn(3, 1), 0, Ranks())
    assert not by_key.state_dict(trajectory, None)["whole"]
    assert by_key.state_dict(trajectory, Ranks())["whole"]


def test_keys_whose_evidence_would_take_too_much_to_gather_are_left_out_of_a_checkpoint(monkeypatch):
    monkeypatch.setattr("lightning_unlearn.evidence.rank_share.MOST_GATHERED", 1000)
    keys, data, exchange = [f"k{at}" for at in range(50)], drawn(50, 1), exchanges(2)

    def work(rank, reduce):
        ranks = Ranks(rank, 2, reduce, exchange[rank])
        by_key, trajectory, _ = gathered(keys, data, rank, ranks)
        return by_key.state_dict(trajectory, ranks)

    with pytest.warns(UserWarning, match="does not contain the evidence"):
        states = run_ranks(work, 2)
    assert [(state["whole"], state["parts"]) for state in states] == [(False, [])] * 2


def test_rows_of_a_key_add_up_within_an_epoch():
    by_key, trajectory = KeyedEvidence(), TrainingDynamics(0, CLASSES)
    logits, label = torch.randn(4, CLASSES), torch.tensor([1, 1, 2, 1])
    by_key.note(trajectory, by_key.slots(["a", "a", "b", "a"]), logits, label)
    report = by_key.hand_over(trajectory, 1, Ranks())
    trajectory.merge(0, lambda part: part)
    assert report == EpochOfKeys(rows=4, distinct=2, again=0, before=0, relabeled=0)
    expected = trajectory.coordinates(logits[[0, 1, 3]]).mean(dim=0)
    torch.testing.assert_close(trajectory.phases(torch.tensor([0]))[0][0], expected)


@pytest.mark.parametrize("when", ["in an epoch", "in the next"])
def test_a_key_of_two_labels_is_counted_and_named(when):
    by_key, trajectory = KeyedEvidence(), TrainingDynamics(0, CLASSES)
    rows = [(["a", "b"], [1, 2]), (["c", "b"], [0, 3])]
    for keys, label in rows:
        index = by_key.slots(keys)
        by_key.note(trajectory, index, torch.randn(2, CLASSES), torch.tensor(label))
        if when == "in the next":
            report = by_key.hand_over(trajectory, 1, Ranks())
    if when == "in an epoch":
        assert by_key.labels()[1:] == (1, "'b' has the labels 2 and 3")
        report = by_key.hand_over(trajectory, 1, Ranks())
    assert (report.relabeled, report.example) == (1, "'b' has the labels 2 and 3")
    with pytest.raises(
        ValueError, match=r"but 1 row has a different label .* \('b' has the labels 2 and 3\); give each sample"
    ):
        check_epoch(report, 1)


@pytest.mark.parametrize(
    ("report", "number", "said"),
    [
        (
            EpochOfKeys(100, 9, 0, 0, 0),
            1,
            "Expected the keys of at least 10 samples per epoch, but the 100 rows of this epoch have 9",
        ),
        (
            EpochOfKeys(100, 100, 0, 100, 0),
            2,
            "none of the 100 keys of this epoch is among the 100 keys of earlier epochs",
        ),
        (EpochOfKeys(100, 100, 0, 300, 0), 4, "none of the 100 keys"),
    ],
)
def test_keys_of_no_use_are_refused(report, number, said):
    with pytest.raises(ValueError, match=said):
        check_epoch(report, number)


@pytest.mark.parametrize(
    ("report", "number", "said"),
    [
        (EpochOfKeys(100, 60, 0, 0, 0), 1, "The 100 rows of the first epoch have 60 distinct keys"),
        (EpochOfKeys(100, 100, 30, 100, 0), 2, "Only 30 of the 100 samples of this epoch were in the previous one"),
    ],
)
def test_doubtful_keys_are_warned_of(report, number, said):
    with pytest.warns(UserWarning, match=said):
        check_epoch(report, number)


@pytest.mark.parametrize(
    ("report", "number"), [(EpochOfKeys(100, 97, 0, 0, 0), 1), (EpochOfKeys(100, 100, 60, 100, 0), 2)]
)
@pytest.mark.filterwarnings("error")
def test_good_keys_are_not_warned_of(report, number):
    check_epoch(report, number)


@pytest.mark.parametrize(
    ("keys", "label", "said"),
    [
        (["a", "b"], torch.tensor([0]), "one key per sample, but sample_key gave 2 keys for a batch of 1"),
        (["a", "b", "a"], torch.tensor([0, 0, 1]), "'a' has the labels 0 and 1"),
        (["a", "a"], torch.tensor([[0, 1], [1, 1]]), "'a' has the labels 0, 1 and 1, 1"),
        (["a", "b", "a"], torch.tensor([0, 1, 0]), ""),
    ],
)
def test_the_first_batch_shows_keys_that_are_not_of_samples(keys, label, said):
    assert said in fault_of_first_batch(keys, label)
    assert bool(said) == bool(fault_of_first_batch(keys, label))
