"""What is trained on after a partition, against loops that do the same one sample at a time; and the loaders for it."""

import itertools

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
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn.data import (
    delivered_indices,
    forget_batches,
    remember_batches,
)
from lightning_unlearn.sampling import (
    CleanSubsetSampler,
    NarrowedLoaders,
    TrainingDraw,
    draw_with_probability,
    shuffles,
    training_draw,
)
from lightning_unlearn.types import REASONS, Partition
from tests.test_data import Doubling, N, OddsThenEvens, RequiredArgumentLoader, numbers

QUICK = settings(max_examples=60, deadline=None)
INPUT = {REASONS.index("input"), REASONS.index("both")}
tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@QUICK
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=40), st.integers(0, 1000))
def test_as_many_as_the_probabilities_sum_to_are_drawn_and_none_twice(probability, seed):
    weight = torch.tensor(probability)
    drawn = draw_with_probability(weight, seeded(seed))
    assert drawn.dtype == torch.int64
    assert len(drawn) == len(set(drawn.tolist())) == max(1, int(weight.double().sum() + 1e-6))
    assert set(drawn.tolist()) <= set(range(len(weight)))


@QUICK
@given(st.lists(tenths, min_size=2, max_size=30), st.integers(0, 1000))
def test_what_is_certain_is_always_drawn_and_what_is_impossible_never(probability, seed):
    weight = torch.tensor([*probability, 1.0, 0.0])
    # Made to sum to a whole number, so that nothing is scaled.
    weight = torch.cat([weight, (torch.ceil(weight.double().sum()) - weight.double().sum()).float()[None]])
    drawn = set(draw_with_probability(weight, seeded(seed)).tolist())
    assert set((weight == 1).nonzero().flatten().tolist()) <= drawn
    assert not set((weight == 0).nonzero().flatten().tolist()) & drawn


def test_ten_tenths_are_one():
    assert len(draw_with_probability(torch.full((10,), 0.1), seeded(0))) == 1
    assert len(draw_with_probability(torch.full((1000,), 0.75), seeded(0))) == 750
    assert len(draw_with_probability(torch.tensor([0.2, 0.3]), seeded(0))) == 1


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=5, max_size=20), st.integers(0, 1000))
def test_each_is_drawn_as_often_as_its_probability(probability, seed):
    weight = torch.tensor(probability).double() / 10
    expected = weight * max(1, int(weight.sum() + 1e-6)) / weight.sum()
    draws, generator = 1000, seeded(seed)
    counts = sum(torch.bincount(draw_with_probability(weight, generator), minlength=len(weight)) for _ in range(draws))
    for count, p in zip(counts.tolist(), expected.tolist(), strict=True):
        low, high = binom.ppf([1e-7, 1 - 1e-7], draws, p)
        assert low <= count <= high, p


def test_the_draw_takes_its_randomness_from_the_generator_alone():
    state = torch.random.get_rng_state()
    weight = torch.rand(50, generator=seeded(1))
    draws = [draw_with_probability(weight, seeded(seed)).tolist() for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.random.get_rng_state().equal(state)


@st.composite
def partitions(draw):
    """Partitions of any kind, forced-kept samples and probabilities on the threshold among them."""
    number = draw(st.integers(2, 25))

    def column(values):
        return torch.tensor(draw(st.lists(values, min_size=number, max_size=number)))

    probability, forced = column(tenths), column(st.booleans())
    is_clean = (probability >= 0.5) | forced
    return Partition(
        clean_probability=probability,
        is_clean=is_clean,
        suggested_label=column(st.integers(0, 3)),
        suggested_probability=column(tenths),
        noise_rate=0.5,
        label=column(st.integers(0, 3)),
        label_evidence=torch.ones(number),
        input_evidence=torch.ones(number),
        reason=torch.where(is_clean, 0, column(st.integers(1, 3))).to(torch.uint8),
        noise_matrix=torch.zeros(0, 0),
        recipe="auto",
        layer="nowhere",
        epoch=1,
    )


@QUICK
@given(partitions())
def test_dropping_leaves_the_clean_ones(partition):
    draw = training_draw(partition, "drop", 0.7)
    assert draw.index.tolist() == [i for i in range(len(partition)) if partition.is_clean[i]]
    assert draw.probability is None
    assert draw.new_label is None
    assert draw.relabelled.tolist() == []


@QUICK
@given(partitions())
def test_weighing_takes_each_with_its_probability_and_the_kept_ones_with_a_half_at_least(partition):
    draw = training_draw(partition, "weigh", 0.7)
    expected = {}
    for i in range(len(partition)):
        p = partition.clean_probability[i].item()
        weight = max(p, 0.5) if partition.is_clean[i] else p
        if weight > 0:
            expected[i] = weight
    assert dict(zip(draw.index.tolist(), draw.probability.tolist(), strict=True)) == expected
    assert draw.new_label is None


@QUICK
@given(partitions(), st.integers(1, 10).map(lambda tenth: tenth / 10))
def test_a_wrong_label_is_replaced_where_the_suggested_one_is_probable_enough_and_the_input_intact(partition, least):
    draw = training_draw(partition, "relabel", least)
    index, new = [], [-1] * len(partition)
    for i in range(len(partition)):
        if partition.is_clean[i]:
            index.append(i)
        elif (
            REASONS[partition.reason[i]] == "label"
            and partition.suggested_probability[i] >= least
            and partition.suggested_label[i] != partition.label[i]
        ):
            index.append(i)
            new[i] = partition.suggested_label[i].item()
    assert draw.index.tolist() == index
    assert draw.new_label.tolist() == new
    assert draw.relabelled.tolist() == [i for i in range(len(partition)) if new[i] >= 0]
    assert draw.probability is None
    assert not any(partition.reason[i].item() in INPUT or partition.is_clean[i] for i in draw.relabelled)


@QUICK
@given(partitions(), st.sampled_from(["drop", "weigh", "relabel"]))
def test_a_draw_comes_back_from_its_state(partition, on_noisy):
    draw = training_draw(partition, on_noisy, 0.5)
    again = TrainingDraw(**draw.state_dict())
    for name, value in draw.state_dict().items():
        other = getattr(again, name)
        assert (value is None) == (other is None)
        assert value is None or value.equal(other)


def ranks_of(world_size, epoch=0, **kwargs):
    """What each rank draws in an epoch."""
    made = []
    for rank in range(world_size):
        sampler = CleanSubsetSampler(num_replicas=world_size, rank=rank, **{"shuffle": True, "seed": 3, **kwargs})
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
    sampler = CleanSubsetSampler(torch.arange(24), num_replicas=1, rank=0, shuffle=True, seed=0, probability=weight)
    epochs = 800
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts[list(sampler)] += 1
    assert counts[:4].tolist() == [epochs] * 4
    for count, p in zip(counts[4:].tolist(), weight[4:].tolist(), strict=True):
        low, high = binom.ppf([1e-6, 1 - 1e-6], epochs, p)
        assert low <= count <= high


# CleanSubsetSampler


def drawn(indices, epoch=0, world_size=1, **kwargs):
    out = []
    for rank in range(world_size):
        options = {"shuffle": True, "seed": 0} | kwargs
        sampler = CleanSubsetSampler(torch.tensor(indices), num_replicas=world_size, rank=rank, **options)
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


# shuffles


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(numbers(), shuffle=True), True),
        (DataLoader(numbers(), shuffle=False), False),
        (DataLoader(numbers(), sampler=DistributedSampler(numbers(), 2, 0, shuffle=True)), True),
        (DataLoader(numbers(), sampler=DistributedSampler(numbers(), 2, 0, shuffle=False)), False),
        (
            DataLoader(
                numbers(), sampler=CleanSubsetSampler(torch.arange(5), num_replicas=1, rank=0, shuffle=False, seed=0)
            ),
            False,
        ),
        (DataLoader(numbers(), batch_sampler=BatchSampler(RandomSampler(numbers()), 4, drop_last=False)), True),
    ],
    ids=["random", "sequential", "distributed", "distributed in order", "narrowed", "batch sampler"],
)
def test_which_samplers_shuffle(loader, expected):
    assert shuffles(loader) is expected


class MyDistributed(DistributedSampler):
    def __iter__(self):
        return iter([0])


class MyRandom(RandomSampler):
    def __iter__(self):
        return iter([0])


class MySequential(SequentialSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (DataLoader(numbers(), sampler=WeightedRandomSampler(torch.ones(N), N)), "WeightedRandomSampler"),
        (DataLoader(numbers(), sampler=SubsetRandomSampler(range(5))), "SubsetRandomSampler"),
        (DataLoader(numbers(), sampler=RandomSampler(numbers(), replacement=True)), "RandomSampler"),
        (DataLoader(numbers(), sampler=RandomSampler(numbers(), num_samples=5)), "RandomSampler"),
        (DataLoader(numbers(), sampler=MyRandom(numbers())), "MyRandom"),
        (DataLoader(numbers(), sampler=MySequential(numbers())), "MySequential"),
        (DataLoader(numbers(), sampler=MyDistributed(numbers(), 2, 0)), "MyDistributed"),
        (DataLoader(numbers(), batch_sampler=OddsThenEvens()), "OddsThenEvens without .sampler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samplers_with_a_meaning_of_their_own_are_refused(loader, found):
    with pytest.raises(TypeError, match=rf"RandomSampler, SequentialSampler or Dist.*, but it draws with {found}\b.*"):
        shuffles(loader)


def test_the_refusal_says_how_a_random_sampler_differs():
    for sampler in (RandomSampler(numbers(), replacement=True), RandomSampler(numbers(), num_samples=5)):
        with pytest.raises(TypeError, match=r"RandomSampler with replacement or num_samples,"):
            shuffles(DataLoader(numbers(), sampler=sampler))


# NarrowedLoaders


def clean_sampler(indices=(1, 4, 9)):
    return CleanSubsetSampler(torch.tensor(indices), num_replicas=1, rank=0, shuffle=True, seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_narrow_and_restore(num_workers):
    loader = RequiredArgumentLoader(
        "train", Doubling(), batch_size=2, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    list(loader)
    before, user_sampler = dict(loader.__dict__), loader.sampler
    narrowed, sampler = NarrowedLoaders(), clean_sampler()

    assert narrowed.narrow(loader, sampler) is loader
    assert len(loader) == 2
    assert loader.sampler is sampler
    assert sorted(torch.cat([x for x, _ in loader]).tolist()) == [1, 4, 9]

    narrowed.restore()
    assert loader.__dict__ == before
    assert loader.batch_sampler.sampler is user_sampler
    assert sorted(torch.cat([x for x, _ in loader]).tolist()) == list(range(N))


def test_narrowing_twice_restores_the_users_sampler():
    loader, other = (DataLoader(numbers(), batch_size=4, shuffle=True) for _ in range(2))
    mine, others = loader.sampler, other.sampler
    narrowed = NarrowedLoaders()
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
            narrowed = NarrowedLoaders()
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
        CleanSubsetSampler(indices, num_replicas=replicas, rank=rank, shuffle=True, seed=0, leave_no_single=size)
        for rank in range(replicas)
    ]
    seen = [list(sampler) for sampler in samplers]
    assert [len(order) for order in seen] == [len(sampler) for sampler in samplers] == [drawn] * replicas
    assert set(itertools.chain.from_iterable(seen)) <= set(indices.tolist())


def test_narrowing_reaches_the_users_batch_sampler_and_is_restored_in_any_order():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    batches, sampler = loader.batch_sampler, loader.sampler
    remember_batches(loader)
    narrowed = NarrowedLoaders()
    narrowed.narrow(loader, clean_sampler([2]))
    iterator = iter(loader)
    assert next(iterator)[0].tolist() == delivered_indices(iterator).tolist() == [2]
    forget_batches(loader)
    assert loader.batch_sampler is batches
    narrowed.restore()
    assert batches.sampler is loader.sampler is sampler
