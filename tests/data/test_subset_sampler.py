"""Draws from a subset, against loops that do the same one sample at a time; and the loaders for it."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn.data.index_tracking import delivered_indices, track_indices, untrack_indices
from lightning_unlearn.data.sampling_scheme import evenly, scheme_of
from lightning_unlearn.data.subset_sampler import (
    CleanSubsetSampler,
    SamplerSwap,
    batch_sampler_error,
    check_sampler,
)
from tests.data.test_loaders import Bucketed, Doubling, N, OddsThenEvens, RequiredArgumentLoader, numbers

QUICK = settings(max_examples=60, deadline=None)


def ranks_of(world_size, epoch=0, *, indices, probability=None, shuffle=True, **kwargs):
    """What each rank draws in an epoch."""
    made = []
    for rank in range(world_size):
        scheme = evenly(indices, shuffle=shuffle).restricted_to(indices, probability)
        sampler = CleanSubsetSampler(scheme, num_replicas=world_size, rank=rank, **{"seed": 3, **kwargs})
        sampler.set_epoch(epoch)
        made.append(list(sampler))
        assert len(sampler) == len(made[-1])
    return made


@st.composite
def weighed(draw):
    number = draw(st.integers(12, 60))
    index = torch.arange(number) * 3 + 1
    weight = torch.tensor(draw(st.lists(st.integers(1, 10), min_size=number, max_size=number))).float() / 10
    return index, weight, int(weight.double().sum() + 1e-6)


@QUICK
@given(weighed(), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_ranks_share_one_draw_whatever_their_number(drawn, world_size, epoch, shuffle):
    index, weight, number = drawn
    (alone,) = ranks_of(1, epoch, indices=index, probability=weight, shuffle=shuffle)
    ranks = ranks_of(world_size, epoch, indices=index, probability=weight, shuffle=shuffle)
    together = [i for rank in ranks for i in rank]
    assert len(set(alone)) == len(alone) == number
    assert set(together) == set(alone) <= set(index.tolist())
    assert {len(rank) for rank in ranks} == {-(-number // world_size)}
    # What is drawn twice only makes the shares equal.
    assert len(together) - number == -number % world_size
    assert shuffle or alone == sorted(alone)


@QUICK
@given(weighed(), st.integers(1, 4), st.integers(1, 80), st.booleans())
def test_no_more_than_asked_for_are_drawn_of_all_ranks_together(drawn, world_size, at_most, weigh):
    index, weight, number = drawn
    probability, number = (weight, number) if weigh else (None, len(index))
    ranks = ranks_of(world_size, indices=index, probability=probability, at_most=at_most)
    together = [i for rank in ranks for i in rank]
    assert len(together) == min(at_most // world_size, -(-number // world_size)) * world_size
    assert len(together) <= max(at_most, -(-number // world_size) * world_size)
    everything = ranks_of(world_size, indices=index, probability=probability)
    assert all(rank == whole[: len(rank)] for rank, whole in zip(ranks, everything, strict=True))


@QUICK
@given(weighed(), st.integers(1, 4), st.integers(2, 7))
def test_no_rank_has_a_last_batch_of_one(drawn, world_size, size):
    index, weight, _ = drawn
    for rank in ranks_of(world_size, indices=index, probability=weight, leave_no_single=size):
        assert len(rank) <= size or len(rank) % size != 1


def test_the_draw_is_a_function_of_seed_and_epoch():
    index, weight = torch.arange(40), torch.full((40,), 0.5)

    def drawn(seed, epoch):
        return ranks_of(2, epoch, indices=index, probability=weight, seed=seed)

    state = torch.random.get_rng_state()
    assert drawn(1, 0) == drawn(1, 0)
    assert (
        len({str(sorted(drawn(seed, epoch)[0] + drawn(seed, epoch)[1])) for seed, epoch in [(1, 0), (1, 1), (9, 0)]})
        == 3
    )
    assert torch.random.get_rng_state().equal(state)


def test_over_the_epochs_each_index_is_drawn_as_often_as_it_is_probable():
    weight = torch.tensor([1.0] * 4 + [0.5] * 10 + [0.1] * 10)  # sums to 10
    counts = torch.zeros(24, dtype=torch.int64)
    scheme = evenly(torch.arange(24)).restricted_to(torch.arange(24), weight)
    sampler = CleanSubsetSampler(scheme, num_replicas=1, rank=0, seed=0)
    epochs = 800
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts[list(sampler)] += 1
    assert counts[:4].tolist() == [epochs] * 4
    for count, p in zip(counts[4:].tolist(), weight[4:].tolist(), strict=True):
        low, high = binom.ppf([1e-6, 1 - 1e-6], epochs, p)
        assert low <= count <= high


# CleanSubsetSampler


def drawn(indices, epoch=0, world_size=1, *, shuffle=True, seed=0):
    out = []
    for rank in range(world_size):
        scheme = evenly(torch.tensor(indices), shuffle=shuffle)
        sampler = CleanSubsetSampler(scheme, num_replicas=world_size, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        out.append(list(sampler))
        assert len(out[-1]) == len(sampler)
    return out


SUBSET = [3, 5, 8, 13, 21, 34, 55]


def test_each_epoch_covers_the_subset_in_another_order():
    (first,), (again,), (second,), (other_seed,) = (
        drawn(SUBSET),
        drawn(SUBSET),
        drawn(SUBSET, epoch=1),
        drawn(SUBSET, seed=10),
    )
    assert sorted(first) == sorted(second) == sorted(other_seed) == SUBSET
    assert first == again
    assert len({tuple(order) for order in (first, second, other_seed)}) == 3


def test_without_shuffling_the_order_is_that_of_the_indices():
    assert drawn(SUBSET, shuffle=False) == drawn(SUBSET, shuffle=False, epoch=3) == [SUBSET]


@pytest.mark.parametrize("world_size", [2, 3, 7, 11])
def test_ranks_share_the_subset_up_to_padding(world_size):
    ranks = drawn(SUBSET, world_size=world_size)
    assert len({len(rank) for rank in ranks}) == 1
    together = list(itertools.chain.from_iterable(ranks))
    assert set(together) == set(SUBSET)
    assert len(together) == -(-len(SUBSET) // world_size) * world_size  # no more repeats than equal lengths need


def test_one_sample_on_many_ranks():
    assert drawn([42], world_size=3) == [[42]] * 3


# check_sampler


class MyDistributed(DistributedSampler):
    def __iter__(self):
        return iter([0])


class MyRandom(RandomSampler):
    def __iter__(self):
        return iter([0])


class MyWeighted(WeightedRandomSampler):
    def __len__(self):
        return 7


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (DataLoader(numbers(), sampler=MyRandom(numbers())), "MyRandom"),
        (DataLoader(numbers(), sampler=MyWeighted(torch.ones(N), N)), "MyWeighted"),
        (DataLoader(numbers(), sampler=MyDistributed(numbers(), 2, 0)), "MyDistributed"),
        (DataLoader(numbers(), batch_sampler=OddsThenEvens()), "OddsThenEvens without .sampler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samplers_with_a_meaning_of_their_own_are_refused(loader, found):
    sampler, _ = SamplerSwap().samplers_of(loader)
    with pytest.raises(TypeError, match=rf"one of torch's samplers .*, but it draws with {found}, which.* weights are"):
        check_sampler(loader, sampler)


def test_a_narrowed_sampler_draws_as_it_does():
    sampler = clean_sampler()
    assert check_sampler(DataLoader(numbers()), sampler) is sampler.scheme


# batch_sampler_error


class Reversed(BatchSampler):
    """Its own order, of what it is given."""

    def __iter__(self):
        return (tuple(torch.tensor(index) for index in batch) for batch in reversed(list(super().__iter__())))


class Longer(Reversed):
    def __len__(self):
        return 99


class Remembers(BatchSampler):
    """Has read its sampler when it was made."""

    def __init__(self, sampler, batch_size, drop_last):
        super().__init__(sampler, batch_size, drop_last)
        self.batches = list(super().__iter__())

    def __iter__(self):
        return iter(self.batches)


class Forever(BatchSampler):
    def __iter__(self):
        return itertools.repeat([N - 1])


class Pairs(BatchSampler):
    def __iter__(self):
        return ([(index, 0) for index in batch] for batch in super().__iter__())


class Fixed(BatchSampler):
    """Its sampler cannot be set."""

    sampler = property(lambda self: range(N), lambda self, value: self.refuse(value))

    def __init__(self):
        self.batch_size, self.drop_last = 4, False

    def refuse(self, value):
        if len(value) != N:
            raise AttributeError("read-only")


class Endless:
    batch_size, drop_last, sampler = 4, False, range(N)

    def __iter__(self):
        return itertools.repeat([0])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [BatchSampler, Reversed, Bucketed])
def test_batch_samplers_that_draw_what_they_are_given_are_let_through(kind, drop_last):
    mine = kind(RandomSampler(numbers()), 4, drop_last)
    before = dict(vars(mine))
    assert batch_sampler_error(DataLoader(numbers(), batch_sampler=mine)) == ""
    assert vars(mine) == before


@pytest.mark.parametrize(
    ("batches", "fault"),
    [
        (
            Longer(range(N), 4, False),
            "whose length is the number of its batches, but Longer makes 2 batches of 5 .* length 99",
        ),
        (Remembers(RandomSampler(numbers()), 4, False), "but Remembers draws other samples too"),
        (Forever(range(N), 4, False), "but Forever draws other samples too"),
        (Pairs(range(N), 4, False), r"Pairs fails when that is replaced \(int\(\) argument"),
        (Fixed(), r"Fixed fails when that is replaced \(read-only\)"),
        (Endless(), r"to have a length, .batch_size and .drop_last, as torch's BatchSampler has, but Endless has not"),
        (OddsThenEvens(), "but OddsThenEvens has not"),
        ([[0, 1], [2, 3]], "but list has not"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_batch_samplers_that_cannot_be_narrowed_are_named(batches, fault):
    loader = DataLoader(numbers(), batch_sampler=batches)
    assert re.search(fault, batch_sampler_error(loader))
    assert loader.batch_sampler is batches


# SamplerSwap


def clean_sampler(indices=(1, 4, 9)):
    return CleanSubsetSampler(evenly(torch.tensor(indices)), num_replicas=1, rank=0, seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_narrow_and_restore(num_workers):
    loader = RequiredArgumentLoader(
        "train", Doubling(), batch_size=2, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    list(loader)
    before, user_sampler = dict(loader.__dict__), loader.sampler
    narrowed, sampler = SamplerSwap(), clean_sampler()

    assert narrowed.narrow(loader, sampler) is loader
    assert len(loader) == 2
    assert loader.sampler is sampler
    assert narrowed.samplers_of(loader) == (user_sampler, user_sampler)
    assert sorted(torch.cat([x for x, _ in loader]).tolist()) == [1, 4, 9]

    narrowed.restore()
    assert loader.__dict__ == before
    assert loader.batch_sampler.sampler is user_sampler
    assert sorted(torch.cat([x for x, _ in loader]).tolist()) == list(range(N))


def test_narrowing_twice_restores_the_users_sampler():
    loader, other = (DataLoader(numbers(), batch_size=4, shuffle=True) for _ in range(2))
    mine, others = loader.sampler, other.sampler
    narrowed = SamplerSwap()
    narrowed.narrow(loader, clean_sampler())
    narrowed.narrow(other, clean_sampler())
    narrowed.narrow(loader, clean_sampler([2]))
    assert [x.tolist() for x, _ in loader] == [[2]]

    narrowed.restore()
    narrowed.restore()
    assert loader.sampler is loader.batch_sampler.sampler is mine
    assert other.sampler is other.batch_sampler.sampler is others


def test_restored_loader_draws_as_if_it_had_never_been_narrowed():
    def orders(narrow):
        loader = DataLoader(numbers(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))
        first = [x.tolist() for x, _ in loader]
        if narrow:
            narrowed = SamplerSwap()
            narrowed.narrow(loader, clean_sampler())
            narrowed.restore()
        return first + [x.tolist() for x, _ in loader]

    assert orders(narrow=True) == orders(narrow=False)
    assert np.concatenate(orders(narrow=True)).size == 2 * N


@pytest.mark.parametrize(("count", "size", "drawn"), [(9, 4, 8), (8, 4, 8), (10, 4, 10), (9, 1, 9), (1, 4, 1)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_no_batch_of_one_is_left_where_that_is_asked_for(count, size, drawn, replicas):
    indices = torch.arange(100, 100 + count * replicas)
    samplers = [
        CleanSubsetSampler(evenly(indices), num_replicas=replicas, rank=rank, seed=0, leave_no_single=size)
        for rank in range(replicas)
    ]
    seen = [list(sampler) for sampler in samplers]
    assert [len(order) for order in seen] == [len(sampler) for sampler in samplers] == [drawn] * replicas
    assert set(itertools.chain.from_iterable(seen)) <= set(indices.tolist())


def test_narrowing_reaches_the_users_batch_sampler_and_is_restored_in_any_order():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    batches, sampler = loader.batch_sampler, loader.sampler
    track_indices(loader)
    narrowed = SamplerSwap()
    narrowed.narrow(loader, clean_sampler([2]))
    iterator = iter(loader)
    assert next(iterator)[0].tolist() == delivered_indices(iterator).tolist() == [2]
    untrack_indices(loader)
    assert loader.batch_sampler is batches
    narrowed.restore()
    assert batches.sampler is loader.sampler is sampler


@pytest.mark.parametrize(
    ("number", "replicas", "size", "single"), [(1, 2, 8, True), (2, 2, 8, True), (3, 2, 8, False), (1, 1, 1, False)]
)
def test_a_batch_of_one_that_cannot_be_left_out_is_known(number, replicas, size, single):
    indices = torch.arange(number)
    for rank in range(replicas):
        sampler = CleanSubsetSampler(
            evenly(indices), num_replicas=replicas, rank=rank, seed=0, leave_no_single=size if size > 1 else None
        )
        assert sampler.is_single == single
    assert not CleanSubsetSampler(evenly(indices), num_replicas=replicas, rank=0, seed=0).is_single


@pytest.mark.parametrize("number", range(1, 11))
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_distributed_sampler_is_narrowed_to_what_it_would_draw_of_fewer(number, drop_last):
    index = torch.arange(20, 20 + number)
    for rank in range(3):
        settings = {"num_replicas": 3, "rank": rank, "seed": 7, "drop_last": drop_last}
        scheme = scheme_of(DistributedSampler(range(40), **settings)).restricted_to(index)
        ours = CleanSubsetSampler(scheme, num_replicas=3, rank=rank, seed=0)
        theirs = DistributedSampler(range(number), **settings)
        for epoch in (0, 3):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            drawn = [20 + position for position in theirs] if number >= 3 or not drop_last else []
            assert list(ours) == drawn
            assert len(ours) == len(drawn)
