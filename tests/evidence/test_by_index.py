"""Ranks are threads here, which hand over to each other what the processes of a fit do."""

from dataclasses import replace

import pytest
import torch

from lightning_unlearn.evidence import by_index as by_index_module
from lightning_unlearn.evidence.by_index import IndexedEvidence
from lightning_unlearn.evidence.rank_share import Ranks, RankShare
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.evidence.when import PartitionTime
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import exchanges, run_ranks

CLASSES = 5


def drawn(total, epochs, *, classes=CLASSES, labels=1, seed=0):
    """For each epoch an order of the samples, and of each row its logits in it; and the labels."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(total, generator=generator) for _ in range(epochs)]
    logits = torch.randn(epochs, total * labels, classes, generator=generator)
    return order, logits, torch.randint(0, classes, (total * labels,), generator=generator)


def rows_of(samples, labels):
    return (samples.unsqueeze(1) * labels + torch.arange(labels)).flatten()


def gathered(data, ranks, *, labels=1, epochs=None, state=None, probe=None, places=False):
    """What a rank has gathered that saw every R-th sample of each epoch's order."""
    order, logits, label = data
    total, found = len(label) // labels, []
    of_index = IndexedEvidence()
    of_index.start(ranks, total, labels)
    trajectory = TrainingDynamics(of_index.rows, logits.shape[2])
    if state is not None:
        trajectory = TrainingDynamics.from_state_dict(state).part(of_index.own_rows())
    if probe is not None:
        of_index.probe(*probe)
    if ranks.number > 1:
        trajectory.rest()
    if places:
        of_index.positions = torch.zeros(of_index.rows // labels, dtype=torch.uint8)
    for epoch in epochs or range(len(order)):
        mine = order[epoch][ranks.rank :: ranks.number]
        for at, part in enumerate(mine.split(7)):
            rows = rows_of(part, labels)
            of_index.place(part, at / 20)
            of_index.note(trajectory, rows, logits[epoch, rows], label[rows])
        found.append(of_index.hand_over(trajectory))
        trajectory.merge(epoch % 4, ranks.reduce)
    return of_index, trajectory, found


def on_ranks(world_size, work):
    exchange = exchanges(world_size)
    return run_ranks(lambda rank, reduce: work(Ranks(rank, world_size, reduce, exchange[rank])), world_size)


def assert_holds(trajectory, rows, whole, index):
    for mine, theirs in zip(trajectory.phases(rows), whole.phases(index), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    for mine, theirs in zip(trajectory.soft_margins(rows), whole.soft_margins(index), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True, atol=1e-4, rtol=1e-5)
    for name, value in trajectory.scores(rows).items():
        torch.testing.assert_close(value, whole.scores(index)[name], atol=1e-4, rtol=1e-5)
    assert trajectory.label[rows].equal(whole.label[index])


@pytest.mark.parametrize(
    ("world_size", "total", "labels", "classes"),
    [(64, 133, 1, CLASSES), (2, 128, 1, CLASSES), (5, 40, 3, 2), (2, 150, 1, 140), (5, 300, 1, 400)],
    ids=["some pad", "none pads", "several labels", "many classes", "outputs without samples"],
)
def test_each_sample_is_at_its_rank_with_all_that_any_has_seen_of_it(world_size, total, labels, classes, monkeypatch):
    monkeypatch.setattr(by_index_module, "_AT_A_TIME", 20)  # several exchanges
    data = drawn(total, 3, classes=classes, labels=labels)
    if classes > 129:
        data = (*data[:2], torch.arange(total) % (classes // 2 - 1))
    _, whole, _ = gathered(data, Ranks(), labels=labels)
    seen = torch.zeros(total)

    def work(ranks):
        of_index, trajectory, found = gathered(data, ranks, labels=labels)
        return of_index, trajectory, found, RankShare.by_index(total, ranks)

    for of_index, trajectory, found, share in on_ranks(world_size, work):
        assert len(trajectory) == -(-total // world_size) * labels, "as many on every rank, as recipes sum over them"
        assert [len(one) for one in found] == [0, 0, 0]
        counts = share.weight > 0
        seen[share.index[counts]] += 1
        local, index = rows_of(share.local[counts], labels), rows_of(share.index[counts], labels)
        assert of_index.own_rows()[local].equal(index)
        assert (of_index.own_rows() >= 0).sum() == len(local)
        assert_holds(trajectory, local, whole, index)
        assert trajectory.basis.equal(whole.basis)
        assert trajectory.num_rivals == whole.num_rivals
    assert seen.eq(1).all()


def test_a_rank_that_has_seen_nothing_takes_part():
    data = drawn(31, 2)
    _, whole, _ = gathered(data, Ranks())

    def work(ranks):
        order, logits, label = data
        return gathered((order if ranks.rank else [one[:0] for one in order], logits, label), ranks)

    # One rank of two draws all of its half; of the other half nothing is known.
    for rank, (_, trajectory, _) in enumerate(on_ranks(2, work)):
        held = torch.stack([data[0][epoch][1::2] for epoch in range(2)])
        for index in set(held[0].tolist()) & set(held[1].tolist()):
            if index % 2 == rank:
                assert_holds(trajectory, torch.tensor([index // 2]), whole, torch.tensor([index]))
        assert len(trajectory.phases(torch.arange(1))) == 2


def test_a_sample_that_two_ranks_have_drawn_counts_twice():
    logits, label = torch.randn(2, CLASSES), torch.tensor([1, 1])

    def work(ranks):
        of_index = IndexedEvidence()
        of_index.start(ranks, 4, 1)
        of_index.positions = torch.zeros(2, dtype=torch.uint8)
        trajectory = TrainingDynamics(of_index.rows, CLASSES)
        of_index.place(torch.tensor([3]), 0.2 * (1 + ranks.rank))
        of_index.note(trajectory, torch.tensor([3]), logits[[ranks.rank]], label[[ranks.rank]])
        of_index.hand_over(trajectory)
        trajectory.merge(0, ranks.reduce)
        return trajectory, of_index.positions

    (none, _), (held, positions) = on_ranks(2, work)
    assert none.phases(torch.arange(2))[0].isnan().all()
    torch.testing.assert_close(held.phases(torch.tensor([1]))[0][0], held.coordinates(logits).mean(dim=0))
    assert positions.tolist() == [0, 1 + int(0.4 * 255)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_owners_know_when_their_samples_were_drawn(world_size):
    data = drawn(50, 1)
    expected = torch.zeros(50, dtype=torch.uint8)
    for rank in range(world_size):
        for at, part in enumerate(data[0][0][rank::world_size].split(7)):
            expected[part] = 1 + int(at / 20 * 255)
    found = on_ranks(world_size, lambda ranks: gathered(data, ranks, places=True)[0].positions)
    for rank, positions in enumerate(found):
        own = expected[rank::world_size]
        assert positions[: len(own)].equal(own)
        assert not positions[len(own) :].any()


def test_rows_that_are_not_finite_are_left_out_and_keep_their_label():
    order, logits, label = drawn(40, 1)
    broken = logits.clone()
    broken[0, ::6, 1] = torch.nan
    _, whole, _ = gathered((order, broken, label), Ranks())

    def work(ranks):
        of_index, trajectory, _ = gathered((order, broken, label), ranks)
        return of_index, trajectory

    for of_index, trajectory in on_ranks(2, work):
        rows = torch.arange(len(trajectory))
        assert_holds(trajectory, rows, whole, of_index.own_rows())
        assert trajectory.label.equal(label[of_index.own_rows()])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sample_that_comes_with_another_label_is_named_on_every_rank(world_size):
    order, logits, label = drawn(30, 2)

    def work(ranks):
        other = label.clone()
        if ranks.rank == 1:
            other[4:12] = (other[4:12] + 1) % CLASSES
        return gathered((order, logits, other), ranks)[2]

    found = on_ranks(world_size, work)
    for one in found:
        assert [sorted(rows.tolist()) for rows in one] == [sorted(rows.tolist()) for rows in found[0]]
    named = set(torch.cat(found[0]).tolist())
    # Named where one of them is drawn by rank 1 in one epoch, and by another in the other.
    drawn_by = torch.stack([torch.empty(30, dtype=torch.int64).scatter_(0, one, torch.arange(30)) for one in order])
    expected = {at for at in range(4, 12) if (drawn_by[:, at] % world_size == 1).sum() == 1}
    assert named == expected
    assert named, "else it tests nothing"


def test_labels_that_were_known_before_are_compared_from_the_first_step_on():
    data = drawn(30, 1)
    index = torch.tensor([3, 8, 20, 3])
    right = data[2][index]
    wrong = right.clone()
    wrong[1] = (wrong[1] + 1) % CLASSES
    for label, expected in ((right, []), (wrong, [8])):
        for found in on_ranks(2, lambda ranks, label=label: gathered(data, ranks, probe=(index, label))[2]):
            assert found[0].tolist() == expected


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 5), (5, 16)])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_fit_goes_on_with_another_number_of_ranks(before, after, labels):
    data = drawn(33, 4, classes=2 if labels > 1 else CLASSES, labels=labels)
    _, whole, _ = gathered(data, Ranks(), labels=labels)

    def first(ranks):
        of_index, trajectory, _ = gathered(data, ranks, labels=labels, epochs=[0, 1])
        return of_index.state_dict(trajectory)

    state, *others = on_ranks(before, first)
    assert "is_part" not in state
    assert all(other["is_part"] for other in others)
    assert len(state["label"]) == 33 * labels

    def second(ranks):
        of_index, trajectory, found = gathered(data, ranks, labels=labels, epochs=[2, 3], state=state)
        return of_index, trajectory, found, of_index.known_labels(trajectory)

    for of_index, trajectory, found, known in on_ranks(after, second):
        assert not any(len(one) for one in found)
        own = of_index.own_rows()
        assert_holds(trajectory, (own >= 0).nonzero().flatten(), whole, own[own >= 0])
        assert known.equal(data[2])


def test_without_the_other_ranks_the_state_is_a_part_that_says_so():
    def work(ranks):
        of_index, trajectory, _ = gathered(drawn(30, 1), ranks)
        of_index.ranks = None
        return of_index.state_dict(trajectory)

    assert all(state["is_part"] for state in on_ranks(2, work))
    assert "is_part" not in work(Ranks())


@pytest.mark.parametrize("world_size", [1, 2])
def test_evidence_that_would_take_too_much_to_gather_is_left_out_of_a_checkpoint(world_size, monkeypatch):
    monkeypatch.setattr("lightning_unlearn.evidence.rank_share.MOST_GATHERED", 30 * (16 * 4 + 40) - 1)

    def work(ranks):
        of_index, trajectory, _ = gathered(drawn(30, 1), ranks)
        return of_index.state_dict(trajectory)

    if world_size == 1:
        assert len(work(Ranks())["label"]) == 30
        return
    with pytest.warns(
        UserWarning, match="does not contain the evidence, which takes .* A fit that resumes from it before"
    ):
        assert on_ranks(world_size, work) == [{"is_part": True}] * 2
    monkeypatch.setattr("lightning_unlearn.evidence.rank_share.MOST_GATHERED", 30 * (16 * 4 + 40))
    assert len(on_ranks(world_size, work)[0]["label"]) == 30


def held(of_index, trajectory):
    kept = [one for name, one in vars(trajectory).items() if isinstance(one, torch.Tensor) and name != "basis"]
    noted = {id(part): part for one in of_index._noted for part in one}.values()
    return sum(one.nbytes for one in [*kept, *noted])


def test_a_rank_holds_no_more_than_its_share_while_an_epoch_runs():
    order, logits, label = drawn(12_800, 2, classes=10)

    def work(ranks):
        of_index = IndexedEvidence()
        of_index.start(ranks, 12_800, 1)
        trajectory, most = TrainingDynamics(of_index.rows, 10), []
        if ranks.number > 1:
            trajectory.rest()
        for epoch in range(2):
            mine = order[epoch][ranks.rank :: ranks.number]
            of_index.note(trajectory, mine, logits[epoch, mine], label[mine])
            most.append(held(of_index, trajectory))
            of_index.hand_over(trajectory)
            trajectory.merge(epoch, ranks.reduce)
        return max(most)

    (one,) = on_ranks(1, work)
    assert one / 12_800 == pytest.approx(236, abs=0.1)
    for most in on_ranks(64, work):
        assert 0.9 * one / 64 < most < 1.1 * one / 64


@pytest.mark.parametrize(("total", "compared"), [(400, 65_536), (4000, 640)])
def test_ranks_find_the_order_as_settled_as_one_process_does(total, compared, monkeypatch):
    monkeypatch.setattr("lightning_unlearn.evidence.when._COMPARED", compared)
    order, logits, label = drawn(total, 2)
    # The second epoch is much like the first.
    logits[1] = logits[0] + 0.1 * logits[1]

    def work(ranks):
        of_index = IndexedEvidence()
        of_index.start(ranks, total, 1)
        trajectory, when = TrainingDynamics(of_index.rows, CLASSES), PartitionTime("auto")
        for epoch in range(2):
            mine = order[epoch][ranks.rank :: ranks.number]
            of_index.note(trajectory, mine, logits[epoch, mine], label[mine])
            of_index.hand_over(trajectory)
            with when.noting(epoch + 1, trajectory, ranks, of_steps=True):
                trajectory.merge(epoch, ranks.reduce)
        return when.state_dict()["notes"]["2"]

    (one,) = on_ranks(1, work)
    ranks = on_ranks(3, work)
    assert all(notes == ranks[0] for notes in ranks)
    assert one["similarity"] > 0.9
    assert ranks[0]["agreement"] == one["agreement"]
    close = 1e-9 if compared > total else 0.01
    assert ranks[0]["similarity"] == pytest.approx(one["similarity"], abs=close)


def test_the_exchange_takes_no_reduce_for_one_process():
    def fails(_):
        raise AssertionError("one process exchanges nothing")

    ranks = replace(Ranks(), exchange=fails)
    of_index, trajectory, _ = gathered(drawn(20, 1), ranks)
    assert of_index.known_labels(trajectory) is trajectory.label
    assert ranks.reduce is no_reduce
