import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_unlearn.data import (
    CleanSubsetSampler,
    NarrowedLoaders,
    RememberedBatches,
    check_labels,
    check_loader,
    delivered_indices,
    forget_batches,
    indexed_batches,
    rank_share,
    remember_batches,
    shuffles,
    split_batch,
)

N = 23


def numbers(n=N):
    """Sample i is the pair (i, 10 i)."""
    return TensorDataset(torch.arange(n), 10 * torch.arange(n))


class Doubling(Dataset):
    """Not a TensorDataset, so that worker processes really call it."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor(index), torch.tensor(10 * index)


class Noisy(Doubling):
    """Augments with the global generator."""

    def __getitem__(self, index):
        return torch.rand(()), torch.tensor(index)


class RequiredArgumentLoader(DataLoader):
    """A subclass that cannot be made from a dataset alone."""

    def __init__(self, purpose, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.purpose = purpose


class Bucketed(BatchSampler):
    """A batch sampler of the user's own, with a sampler but another order."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


class OddsThenEvens:
    """A batch sampler without ``.sampler`` and ``.batch_size``."""

    def __iter__(self):
        yield list(range(1, N, 2))
        yield list(range(0, N, 2))

    def __len__(self):
        return 2


def collate_to_dict(samples):
    return {"x": torch.stack([x for x, _ in samples]), "ids": [int(x) for x, _ in samples]}


# check_loader


def test_a_loader_over_a_dataset_is_let_through():
    loader = DataLoader(numbers(), batch_size=4)
    assert check_loader(loader) is loader


@pytest.mark.parametrize("loaders", [[DataLoader(numbers())], {"a": DataLoader(numbers())}, None])
def test_other_than_one_loader_is_refused(loaders):
    with pytest.raises(
        TypeError, match=f"one torch.utils.data.DataLoader .* but got {type(loaders).__name__}; give the loader with"
    ):
        check_loader(loaders)


def test_an_iterable_dataset_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(100))

    with pytest.raises(TypeError, match=r"Stream is an IterableDataset, whose samples have no index .* give a dataset"):
        check_loader(DataLoader(Stream()))


def test_a_dataset_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return index

    loader = DataLoader(Endless(), sampler=SequentialSampler(range(20)))
    with pytest.raises(TypeError, match="a dataset with a length, but Endless has no __len__; add one"):
        check_loader(loader)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 10 training samples to partition, but the dataset has 9"):
        check_loader(DataLoader(numbers(9)))
    check_loader(DataLoader(numbers(10)))


def test_a_loader_that_does_not_batch_is_refused():
    with pytest.raises(ValueError, match="batches samples, but it has batch_size=None; set a batch_size"):
        check_loader(DataLoader(numbers(), batch_size=None))


# rank_share


@given(total=st.integers(1, 200), world_size=st.integers(1, 17))
def test_every_index_counts_on_exactly_one_rank(total, world_size):
    shares = [rank_share(total, rank, world_size) for rank in range(world_size)]
    counted = torch.cat([index[weight == 1] for index, weight in shares])
    assert counted.sort().values.tolist() == list(range(total))
    for index, weight in shares:
        assert index.shape == weight.shape == (-(-total // world_size),)
        assert (index.dtype, weight.dtype) == (torch.int64, torch.float32)
        assert ((weight == 0) | (weight == 1)).all()
        assert ((index >= 0) & (index < total)).all()


# indexed_batches


def batches_of(loader, index, **kwargs):
    return [(indices.tolist(), batch) for indices, batch in indexed_batches(loader, index, **kwargs)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("probing", [False, True])
def test_batches_come_in_the_order_of_the_index(num_workers, probing):
    loader = DataLoader(
        Doubling(),
        batch_size=4,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    index = torch.tensor([5, 0, 22, 7, 7, 3])
    found = batches_of(loader, index, probing=probing)
    assert [indices for indices, _ in found] == [[5, 0, 22, 7], [7, 3]]
    for indices, (x, y) in found:
        assert x.tolist() == indices
        assert y.tolist() == [10 * i for i in indices]


def test_probing_starts_no_worker():
    class Where(Doubling):
        def __getitem__(self, index):
            return torch.tensor(torch.utils.data.get_worker_info() is not None)

    loader = DataLoader(Where(), batch_size=8, num_workers=1, prefetch_factor=4, timeout=30)
    index = torch.arange(8)
    assert [batch.any().item() for _, batch in indexed_batches(loader, index)] == [True]
    assert [batch.any().item() for _, batch in indexed_batches(loader, index, probing=True)] == [False]


def test_the_collate_function_of_the_user_is_used():
    loader = DataLoader(numbers(), batch_size=3, collate_fn=collate_to_dict)
    ((_, first), (_, second)) = indexed_batches(loader, torch.tensor([9, 8, 7, 6]))
    assert first["ids"] == [9, 8, 7]
    assert second["x"].tolist() == [6]


def test_a_subclass_with_a_required_argument_is_copied():
    loader = RequiredArgumentLoader("train", numbers(), batch_size=10, shuffle=True)
    assert [i for i, _ in batches_of(loader, torch.arange(N))] == [list(c.tolist()) for c in torch.arange(N).split(10)]


@pytest.mark.parametrize(
    ("batch_sampler", "size"),
    [(Bucketed(RandomSampler(numbers()), 6, drop_last=True), 6), (OddsThenEvens(), N // 2)],
    ids=["with batch_size", "without"],
)
def test_a_batch_sampler_of_the_users_own_does_not_change_the_order(batch_sampler, size):
    loader = DataLoader(numbers(), batch_sampler=batch_sampler)
    found = batches_of(loader, torch.arange(N))
    assert max(len(indices) for indices, _ in found) == size
    assert list(itertools.chain.from_iterable(x.tolist() for _, (x, _) in found)) == list(range(N))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_of_the_user_is_left_as_it_is(num_workers):
    def second_epoch(passes):
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(
            Doubling(),
            batch_size=4,
            shuffle=True,
            generator=generator,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        list(loader)  # with workers, an iterator that persists, as in a running fit
        attributes, state = dict(loader.__dict__), generator.get_state()
        if passes:
            batches_of(loader, torch.arange(N))
            next(indexed_batches(loader, torch.arange(N), probing=True))
        assert loader.__dict__ == attributes
        assert torch.equal(generator.get_state(), state)
        return [x.tolist() for x, _ in loader]

    assert second_epoch(passes=True) == second_epoch(passes=False)


def test_a_pass_draws_from_the_global_generator_as_any_loader_does():
    """Whoever must not disturb it isolates it, as the callbacks do; then the pass repeats."""
    loader = DataLoader(Noisy(), batch_size=8, generator=torch.Generator().manual_seed(1))

    def passed():
        with torch.random.fork_rng(devices=[]):
            return torch.cat([x for _, (x, _) in indexed_batches(loader, torch.arange(N))])

    before = torch.get_rng_state()
    first, second = passed(), passed()
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


# split_batch and check_labels


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_is_split(kind):
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    assert split_batch(kind([x, y])) == (x, y)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": 0, "y": 1}, "dict of 2"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "tuple of 3"),
        ([torch.zeros(2), [0, 1]], "list of 2"),
        (torch.zeros(2, 3), "Tensor of 2"),
        (7, "int"),
    ],
)
def test_another_batch_is_refused(batch, found):
    with pytest.raises(
        TypeError, match=rf"batch \(x, y\) with a tensor of labels y, but got a {found}; pass batch_to_xy"
    ):
        split_batch(batch)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_labels_become_int64(dtype):
    label = check_labels(torch.tensor([0, 1, 1], dtype=dtype), num_rows=3, num_classes=2)
    assert label.dtype == torch.int64
    assert label.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (torch.zeros(3), r"torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), r"torch.int64 of shape \(3, 1\)"),
        (torch.zeros(2, dtype=torch.int64), r"torch.int64 of shape \(2,\)"),
        (torch.zeros(3, dtype=torch.complex64), r"torch.complex64 of shape \(3,\)"),
    ],
)
def test_labels_of_another_kind_are_refused(label, found):
    with pytest.raises(ValueError, match=rf"integer labels of shape \(3,\).* but got {found}; pass batch_to_xy"):
        check_labels(label, num_rows=3, num_classes=2)


@pytest.mark.parametrize(("label", "found"), [([0, 5, 1], "5"), ([0, -1, 9], "-1"), ([3, 0, 0], "3")])
def test_labels_out_of_range_are_refused_with_the_dataset_index(label, found):
    message = rf"labels in \[0, 3\), as the model has 3 outputs, but found {found} in the batch .* dataset index 640"
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(label), num_rows=3, num_classes=3, first_index=640)


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


def test_the_last_batch_delivered_is_known_though_workers_are_ahead():
    for workers in (0, 2):
        loader = DataLoader(Doubling(), batch_size=4, shuffle=True, num_workers=workers)
        remember_batches(loader)
        for _ in range(2):
            iterator = iter(loader)
            assert delivered_indices(iterator) is None
            seen = [(delivered_indices(iterator), x) for x, _ in iterator]
            assert len(seen) == 6
            assert all(index.equal(x) for index, x in seen)


def test_batches_that_wait_are_left_out():
    loader = DataLoader(numbers(), batch_size=4)
    remember_batches(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert delivered_indices(iterator, waiting=1).tolist() == [0, 1, 2, 3]
    assert delivered_indices(iterator).tolist() == [4, 5, 6, 7]
    assert delivered_indices(iterator).tolist() == [4, 5, 6, 7]
    assert delivered_indices(iterator, waiting=1) is None


def test_iterations_do_not_mix():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    remember_batches(loader)
    one, other = iter(loader), iter(loader)
    for _ in range(5):
        first, second = next(one)[0], next(other)[0]
        next(iter(loader.batch_sampler))
        assert delivered_indices(one).equal(first)
        assert delivered_indices(other).equal(second)


def test_remembered_batches_are_the_users_in_all_else():
    class Bucket(BatchSampler):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

    mine = Bucket(RandomSampler(range(N)), 4, drop_last=True)
    loader = DataLoader(numbers(), batch_sampler=mine)
    remember_batches(loader)
    remember_batches(loader)
    batches = loader.batch_sampler
    assert type(batches) is RememberedBatches
    assert isinstance(batches, Bucket)
    assert batches.release() is mine
    assert len(loader) == len(batches) == 5
    assert (batches.batch_size, batches.drop_last, batches.sampler) == (4, True, mine.sampler)
    batches.set_epoch(3)
    batches.sampler = sampler = SequentialSampler(range(N))
    assert mine.epoch == 3
    assert mine.sampler is sampler
    assert not hasattr(batches, "nothing")
    for made in (copy.deepcopy(batches), pickle.loads(pickle.dumps(RememberedBatches([[1], [2]])))):
        assert type(made) is RememberedBatches
        assert list(made)


def test_who_changes_a_shallow_copy_of_remembered_batches_does_not_change_what_is_drawn():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    mine, shuffling = loader.batch_sampler, loader.sampler
    remember_batches(loader)
    trial = copy.copy(loader.batch_sampler)
    trial.sampler = [7, 8]
    assert type(trial) is BatchSampler
    assert list(trial) == [[7, 8]]
    assert mine.sampler is loader.batch_sampler.sampler is shuffling
    assert sorted(i for batch in loader.batch_sampler for i in batch) == list(range(N))


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


def test_what_is_forgotten_is_not_kept():
    loader = DataLoader(numbers(), batch_size=4, num_workers=1, persistent_workers=True)
    mine = loader.batch_sampler
    started = iter(loader)
    remember_batches(loader)
    assert delivered_indices(started) is None  # it began before
    iterator = iter(loader)
    next(iterator)
    assert delivered_indices(iterator).tolist() == [0, 1, 2, 3]
    forget_batches(loader)
    forget_batches(loader)
    assert loader.batch_sampler is mine
    next(iterator)
    assert delivered_indices(iterator) is None
    assert [x.tolist() for x, _ in loader] == [list(range(i, min(i + 4, N))) for i in range(0, N, 4)]
    assert iter(loader)._index_sampler is mine


@pytest.mark.parametrize(
    ("batch", "index"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        ([np.int64(1), np.int64(2)], [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        ([torch.tensor(1), torch.tensor(2)], [1, 2]),
        (range(1, 3), [1, 2]),
        ([(1, 0), (2, 0)], None),
        (["a", "b"], None),
        ([1.0, 2.0], None),
        ([True, False], None),
        (7, None),
    ],
)
def test_a_batch_is_known_if_it_is_a_row_of_integers(batch, index):
    iteration = iter(RememberedBatches([batch]))
    assert next(iteration) is batch
    drawn = iteration.drawn(0)
    assert index is None if drawn is None else drawn.tolist() == index and drawn.dtype == torch.int64


def test_a_list_that_is_filled_again_is_remembered_as_it_was():
    def batches():
        batch = []
        for start in (0, 2):
            batch[:] = [start, start + 1]
            yield batch

    iteration = iter(RememberedBatches(batches()))
    next(iteration), next(iteration)
    assert [iteration.drawn(0).tolist(), iteration.drawn(1).tolist()] == [[0, 1], [2, 3]]


def test_the_iterator_of_something_else_knows_no_indices():
    assert delivered_indices(iter([1, 2])) is None
    assert delivered_indices(iter(DataLoader(numbers(), batch_size=4))) is None
