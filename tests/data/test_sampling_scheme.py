"""How a sampler draws, and drawing in the same way from fewer, against what torch's own samplers draw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn.data.sampling_scheme import SamplingScheme, evenly, scheme_of, systematic_sample

QUICK = settings(max_examples=60, deadline=None)
N = 12
tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(scheme, seed=0):
    return scheme.draw(seeded(seed)).tolist()


def counts(scheme, epochs):
    """How often each index was drawn, (N,), over many epochs."""
    found = [torch.bincount(scheme.draw(seeded(epoch)), minlength=N) for epoch in range(epochs)]
    return torch.stack(found)


# systematic_sample


@QUICK
@given(st.lists(st.floats(0.01, 3), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 1000))
def test_as_many_as_asked_for_are_drawn_and_each_as_often_as_its_weight_up_to_one(weights, number, seed):
    weight = torch.tensor(weights, dtype=torch.float64)
    found = systematic_sample(weight, number, seeded(seed))
    assert found.dtype == torch.int64
    assert len(found) == number
    expected = weight * number / weight.sum()
    assert ((torch.bincount(found, minlength=len(weight)) - expected).abs() < 1 + 1e-6).all()


@QUICK
@given(st.lists(tenths, min_size=2, max_size=30), st.integers(0, 1000))
def test_what_is_certain_is_always_drawn_and_what_is_impossible_never(probability, seed):
    weight = torch.tensor([*probability, 1.0, 0.0])
    # Made to sum to a whole number, so that nothing is scaled.
    weight = torch.cat([weight, (torch.ceil(weight.double().sum()) - weight.double().sum()).float()[None]])
    found = set(systematic_sample(weight, round(weight.double().sum().item()), seeded(seed)).tolist())
    assert set((weight == 1).nonzero().flatten().tolist()) <= found
    assert not set((weight == 0).nonzero().flatten().tolist()) & found


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=5, max_size=20), st.integers(0, 1000))
def test_each_is_drawn_as_often_as_its_probability(probability, seed):
    weight = torch.tensor(probability).double() / 10
    number = max(1, int(weight.sum() + 1e-6))
    expected = weight * number / weight.sum()
    draws, generator = 1000, seeded(seed)
    found = sum(
        torch.bincount(systematic_sample(weight, number, generator), minlength=len(weight)) for _ in range(draws)
    )
    for count, p in zip(found.tolist(), expected.tolist(), strict=True):
        low, high = binom.ppf([1e-7, 1 - 1e-7], draws, p)
        assert low <= count <= high, p


def test_the_draw_takes_its_randomness_from_the_generator_alone():
    state = torch.random.get_rng_state()
    weight = torch.rand(50, generator=seeded(1))
    draws = [systematic_sample(weight, 20, seeded(seed)).tolist() for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.random.get_rng_state().equal(state)


# scheme_of


def weights_of(*rest):
    return torch.tensor([0.0, 1.0, 1.0, 4.0, *rest], dtype=torch.float64)


class ByClass(WeightedRandomSampler):
    """As users write it: the weights are computed when it is made."""

    def __init__(self):
        super().__init__(weights_of(2.0), 30)


SAMPLERS = {
    "random": (RandomSampler(range(N)), True),
    "random with replacement": (RandomSampler(range(N), replacement=True), True),
    "random with replacement, fewer": (RandomSampler(range(N), replacement=True, num_samples=5), True),
    "random, fewer": (RandomSampler(range(N), num_samples=5), True),
    "random, more": (RandomSampler(range(N), num_samples=30), True),
    "in order": (SequentialSampler(range(N)), False),
    "a part in order": (SequentialSampler(range(4)), False),
    "subset": (SubsetRandomSampler([7, 3, 3, 9]), True),
    "weighted": (ByClass(), True),
    "weighted without replacement": (WeightedRandomSampler(weights_of(2.0, 0.1), 3, replacement=False), True),
    "distributed": (DistributedSampler(range(N), num_replicas=1, rank=0), True),
    "distributed in order": (DistributedSampler(range(N), num_replicas=1, rank=0, shuffle=False), False),
    "list": ([5, 3, 3, 8], False),
    "range": (range(3, 8), False),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_draws_as_the_sampler_does(name):
    sampler, shuffle = SAMPLERS[name]
    scheme = scheme_of(sampler)
    assert scheme.shuffle is shuffle
    assert scheme.number == len(sampler) == len(drawn(scheme))
    epochs = 300
    torch.manual_seed(0)
    theirs = torch.stack([torch.bincount(torch.tensor(list(sampler)), minlength=N) for _ in range(epochs)])
    ours = counts(scheme, epochs)
    # No index comes oftener than theirs may, nor more seldom; on average as often.
    assert (ours.amax(dim=0) <= theirs.amax(dim=0) + (3 if scheme.mode == "with replacement" else 0)).all()
    difference = (ours.double().mean(dim=0) - theirs.double().mean(dim=0)).abs()
    spread = (theirs.double().var(dim=0) + ours.double().var(dim=0)).div(epochs).sqrt()
    assert (difference <= 5 * spread + 1e-9).all()
    if not shuffle:
        assert drawn(scheme) == list(sampler)


@pytest.mark.parametrize("replacement", [True, False])
def test_where_each_rank_draws_its_own_all_together_draw_more(replacement):
    sampler = WeightedRandomSampler(torch.ones(N), 5, replacement=replacement)
    assert scheme_of(sampler, ranks=2).number == 10
    assert scheme_of(sampler, ranks=3).number == (15 if replacement else N)
    # These are split.
    assert scheme_of(RandomSampler(range(N)), ranks=2).number == N


class Own(RandomSampler):
    def __iter__(self):
        return iter([0])


@pytest.mark.parametrize(
    "sampler", [Own(range(N)), None, iter([1]), object(), ["a", "b"], [0, -1], SubsetRandomSampler([3, -2])]
)
def test_what_means_something_of_its_own_is_not_read(sampler):
    assert scheme_of(sampler) is None


# SamplingScheme.restricted_to


KEPT = torch.tensor([1, 3, 4, 7, 9])


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_what_is_kept_is_drawn_and_as_often_as_before(name):
    scheme = scheme_of(SAMPLERS[name][0])
    less = scheme.restricted_to(KEPT)
    before, after = counts(scheme, 600).double(), counts(less, 600).double()
    kept = torch.isin(torch.arange(N), KEPT)
    assert (after[:, ~kept] == 0).all()
    if scheme.mode == "without replacement":  # there, what is left takes the place of what is not
        assert less.number == round(scheme.number * 3 / 5)
        assert (after <= 1).all()
        return
    # As often as before, up to the number of draws being whole.
    exact = before.mean(dim=0)[kept]
    assert abs(less.number - exact.sum()) <= 1 + 0.05 * exact.sum()
    expected = exact * less.number / exact.sum()
    spread = (after.var(dim=0)[kept] + before.var(dim=0)[kept]).div(600).sqrt()
    assert ((after.mean(dim=0)[kept] - expected).abs() <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_are_multiplied_with_the_probability(replacement):
    scheme = scheme_of(WeightedRandomSampler([1.0, 2.0, 3.0, 0.0], 4, replacement=replacement))
    less = scheme.restricted_to(torch.tensor([0, 2, 3]), torch.tensor([0.5, 1.0, 1.0]))
    assert less.index.tolist() == [0, 2]
    assert less.weight.tolist() == [0.5, 3.0]
    # Of the weights, or of the three that can be drawn at all; the fourth draw was never there without replacement.
    assert less.number == (round(4 * 3.5 / 6) if replacement else min(2, round(3 * 1.5 / 3)))


def test_an_index_that_is_there_twice_stays_there_twice():
    less = evenly(torch.tensor([5, 2, 5, 8]), shuffle=False).restricted_to(torch.tensor([5, 8]))
    assert drawn(less) == [5, 5, 8]


@pytest.mark.parametrize(("number", "at_least", "expected"), [(30, 16, 16), (30, 4, 5), (10, 16, 10)])
def test_with_replacement_a_batch_is_filled_but_no_more_is_drawn_than_before(number, at_least, expected):
    scheme = scheme_of(RandomSampler(range(N), replacement=True, num_samples=number))
    assert scheme.restricted_to(torch.tensor([3, 4]), at_least=at_least).number == expected


@pytest.mark.parametrize("scheme", [evenly(torch.tensor([1, 2])), scheme_of(WeightedRandomSampler([0.0, 0, 0, 1], 3))])
def test_nothing_is_drawn_where_no_weight_is_left(scheme):
    less = scheme.restricted_to(torch.tensor([0]))
    assert less.number == len(less.index) == 0


@QUICK
@given(st.lists(tenths, min_size=2, max_size=30).filter(any))
def test_by_its_probability_each_is_drawn_and_none_twice(probability):
    weight = torch.tensor(probability)
    less = evenly(torch.arange(len(weight))).restricted_to(torch.arange(len(weight)), weight)
    found = drawn(less)
    assert len(found) == len(set(found)) == max(1, int(weight.double().sum() + 1e-6))
    assert {index for index, p in enumerate(probability) if p == 0}.isdisjoint(found)


def test_ten_tenths_are_one():
    def number(p, n):
        return evenly(torch.arange(n)).restricted_to(torch.arange(n), torch.full((n,), p)).number

    assert (number(0.1, 10), number(0.75, 1000), number(0.25, 2)) == (1, 750, 1)


def test_a_drawing_is_a_function_of_the_generator():
    scheme = SamplingScheme(torch.arange(N), torch.rand(N, generator=seeded(1)).double(), 20, "with replacement")
    assert drawn(scheme, 3) == drawn(scheme, 3) != drawn(scheme, 4)


def standing_for_torchdatas(name, base, **methods):
    """A sampler that iterates by itself, as torchdata's do to be resumed."""
    return type(name, (base,), {"__module__": "torchdata.stateful_dataloader.sampler", **methods})


def test_torchdatas_samplers_draw_as_torchs_of_the_same_name():
    methods = {"__iter__": lambda self: iter(range(N)), "__len__": lambda self: N}
    random = standing_for_torchdatas("RandomSampler", RandomSampler, **methods)(range(N))
    split = standing_for_torchdatas("StatefulDistributedSampler", DistributedSampler, __iter__=methods["__iter__"])
    assert scheme_of(random).index.tolist() == list(range(N))
    assert scheme_of(random).shuffle
    assert scheme_of(split(range(N), num_replicas=1, rank=0, seed=4)).seed == 4
    # Of the same name, but not torchdata's; and a class of the user's on top of it.
    assert scheme_of(type("RandomSampler", (RandomSampler,), methods)(range(N))) is None
    assert scheme_of(type("Own", (type(random),), {"__iter__": methods["__iter__"]})(range(N))) is None


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_distributed_samplers_own_settings_are_read(drop_last):
    scheme = scheme_of(DistributedSampler(range(N), num_replicas=5, rank=2, seed=7, drop_last=drop_last))
    few = scheme.restricted_to(torch.tensor([1, 4, 5]))
    for one in (scheme, few):
        assert (one.drop_last, one.seed) == (drop_last, 7)
