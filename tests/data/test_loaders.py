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
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from lightning_unlearn.data.index_tracking import TrackedBatchSampler, delivered_indices, track_indices, untrack_indices
from lightning_unlearn.data.loaders import check_iterates_in_order, check_loader, iterate_indices, shard_indices

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

    with pytest.raises(
        TypeError, match=r"Stream is an IterableDataset, whose samples have no index; use a dataset with __getitem__"
    ):
        check_loader(DataLoader(Stream()))


def test_a_dataset_without_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return index

    loader = DataLoader(Endless(), sampler=SequentialSampler(range(20)))
    with pytest.raises(TypeError, match="a dataset with a length, but Endless has no __len__; add one"):
        check_loader(loader)


def test_a_length_that_cannot_be_asked_for_is_none():
    class Unknown(Doubling):
        def __len__(self):
            raise NotImplementedError("shards are not counted")

    with pytest.raises(TypeError, match=r"Unknown has no __len__; add one .* \(shards are not counted\)"):
        check_loader(DataLoader(Unknown(), sampler=range(20)))


@pytest.mark.parametrize(
    ("loaders", "instead"),
    [
        ({"a": DataLoader(numbers())}, r"alone, and draw from the others in training_step .* or join .* ConcatDataset"),
        (iter(DataLoader(numbers())), "alone, not wrapped; what the wrapper does can be done in collate_fn or"),
    ],
)
def test_what_is_not_one_loader_is_told_what_to_do(loaders, instead):
    with pytest.raises(TypeError, match=instead):
        check_loader(loaders)


class Ahead(DataLoader):
    """Draws one batch ahead, as those do that copy to the device in the meantime."""

    def __iter__(self):
        batches = super().__iter__()
        ahead = next(batches, None)
        while ahead is not None:
            now, ahead = ahead, next(batches, None)
            yield now


class Pairwise(DataLoader):
    """Two batches in one."""

    def __iter__(self):
        batches = super().__iter__()
        for one, other in zip(batches, batches, strict=False):
            yield tuple(torch.cat(parts) for parts in zip(one, other, strict=True))


class Twice(DataLoader):
    """Each batch once more in the end."""

    def __iter__(self):
        batches = list(super().__iter__())
        return iter(batches + batches)


class OneForEver(DataLoader):
    """One iterator for all epochs, as timm and YOLO have."""

    class Repeats:
        def __init__(self, sampler):
            self.sampler = sampler

        def __iter__(self):
            while True:
                yield from self.sampler

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", self.Repeats(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


class Elsewhere(DataLoader):
    """Does not ask its batch sampler."""

    def __iter__(self):
        return iter([torch.utils.data.default_collate([self.dataset[i] for i in range(4)])] * 3)


def test_a_loader_that_draws_ahead_is_let_through():
    loader = Ahead(numbers(), batch_size=4, shuffle=True)
    check_iterates_in_order(loader)
    assert [x.tolist() for _, (x, _) in iterate_indices(loader, torch.arange(6))] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("kind", [Pairwise, Twice, OneForEver, Elsewhere])
def test_a_loader_that_does_not_deliver_what_is_drawn_is_refused(kind):
    loader = kind(numbers(), batch_size=4)
    with pytest.raises(TypeError, match=rf"one for one, but {kind.__name__} has its own __iter__ that does not"):
        check_iterates_in_order(loader)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least 10 training samples to partition, but the dataset has 9"):
        check_loader(DataLoader(numbers(9)))
    check_loader(DataLoader(numbers(10)))


def test_a_loader_that_does_not_batch_is_refused():
    with pytest.raises(ValueError, match="batches samples, but it has batch_size=None; set a batch_size"):
        check_loader(DataLoader(numbers(), batch_size=None))


# shard_indices


@given(total=st.integers(1, 200), world_size=st.integers(1, 17))
def test_every_index_counts_on_exactly_one_rank(total, world_size):
    shares = [shard_indices(total, rank, world_size) for rank in range(world_size)]
    counted = torch.cat([index[weight == 1] for index, weight in shares])
    assert counted.sort().values.tolist() == list(range(total))
    for index, weight in shares:
        assert index.shape == weight.shape == (-(-total // world_size),)
        assert (index.dtype, weight.dtype) == (torch.int64, torch.float32)
        assert ((weight == 0) | (weight == 1)).all()
        assert ((index >= 0) & (index < total)).all()


# iterate_indices


def batches_of(loader, index, **kwargs):
    return [(indices.tolist(), batch) for indices, batch in iterate_indices(loader, index, **kwargs)]


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
    assert [batch.any().item() for _, batch in iterate_indices(loader, index)] == [True]
    assert [batch.any().item() for _, batch in iterate_indices(loader, index, probing=True)] == [False]


def test_the_collate_function_of_the_user_is_used():
    loader = DataLoader(numbers(), batch_size=3, collate_fn=collate_to_dict)
    ((_, first), (_, second)) = iterate_indices(loader, torch.tensor([9, 8, 7, 6]))
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
            next(iterate_indices(loader, torch.arange(N), probing=True))
        assert loader.__dict__ == attributes
        assert torch.equal(generator.get_state(), state)
        return [x.tolist() for x, _ in loader]

    assert second_epoch(passes=True) == second_epoch(passes=False)


def test_a_pass_draws_from_the_global_generator_as_any_loader_does():
    """Whoever must not disturb it isolates it, as the callbacks do; then the pass repeats."""
    loader = DataLoader(Noisy(), batch_size=8, generator=torch.Generator().manual_seed(1))

    def passed():
        with torch.random.fork_rng(devices=[]):
            return torch.cat([x for _, (x, _) in iterate_indices(loader, torch.arange(N))])

    before = torch.get_rng_state()
    first, second = passed(), passed()
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_batch_delivered_is_known_though_workers_are_ahead():
    for workers in (0, 2):
        loader = DataLoader(Doubling(), batch_size=4, shuffle=True, num_workers=workers)
        track_indices(loader)
        for _ in range(2):
            iterator = iter(loader)
            assert delivered_indices(iterator) is None
            seen = [(delivered_indices(iterator), x) for x, _ in iterator]
            assert len(seen) == 6
            assert all(index.equal(x) for index, x in seen)


def test_batches_that_wait_are_left_out():
    loader = DataLoader(numbers(), batch_size=4)
    track_indices(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert delivered_indices(iterator, waiting=1).tolist() == [0, 1, 2, 3]
    assert delivered_indices(iterator).tolist() == [4, 5, 6, 7]
    assert delivered_indices(iterator).tolist() == [4, 5, 6, 7]
    assert delivered_indices(iterator, waiting=1) is None


def test_iterations_do_not_mix():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    track_indices(loader)
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
    track_indices(loader)
    track_indices(loader)
    batches = loader.batch_sampler
    assert type(batches) is TrackedBatchSampler
    assert isinstance(batches, Bucket)
    assert batches.release() is mine
    assert len(loader) == len(batches) == 5
    assert (batches.batch_size, batches.drop_last, batches.sampler) == (4, True, mine.sampler)
    batches.set_epoch(3)
    batches.sampler = sampler = SequentialSampler(range(N))
    assert mine.epoch == 3
    assert mine.sampler is sampler
    assert not hasattr(batches, "nothing")
    for made in (copy.deepcopy(batches), pickle.loads(pickle.dumps(TrackedBatchSampler([[1], [2]])))):
        assert type(made) is TrackedBatchSampler
        assert list(made)


def test_who_changes_a_shallow_copy_of_remembered_batches_does_not_change_what_is_drawn():
    loader = DataLoader(numbers(), batch_size=4, shuffle=True)
    mine, shuffling = loader.batch_sampler, loader.sampler
    track_indices(loader)
    trial = copy.copy(loader.batch_sampler)
    trial.sampler = [7, 8]
    assert type(trial) is BatchSampler
    assert list(trial) == [[7, 8]]
    assert mine.sampler is loader.batch_sampler.sampler is shuffling
    assert sorted(i for batch in loader.batch_sampler for i in batch) == list(range(N))


def test_what_is_forgotten_is_not_kept():
    loader = DataLoader(numbers(), batch_size=4, num_workers=1, persistent_workers=True)
    mine = loader.batch_sampler
    started = iter(loader)
    track_indices(loader)
    assert delivered_indices(started) is None  # it began before
    iterator = iter(loader)
    next(iterator)
    assert delivered_indices(iterator).tolist() == [0, 1, 2, 3]
    untrack_indices(loader)
    untrack_indices(loader)
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
    iteration = iter(TrackedBatchSampler([batch]))
    assert next(iteration) is batch
    drawn = iteration.drawn(0)
    assert index is None if drawn is None else drawn.tolist() == index and drawn.dtype == torch.int64


def test_a_list_that_is_filled_again_is_remembered_as_it_was():
    def batches():
        batch = []
        for start in (0, 2):
            batch[:] = [start, start + 1]
            yield batch

    iteration = iter(TrackedBatchSampler(batches()))
    next(iteration), next(iteration)
    assert [iteration.drawn(0).tolist(), iteration.drawn(1).tolist()] == [[0, 1], [2, 3]]


def test_the_iterator_of_something_else_knows_no_indices():
    assert delivered_indices(iter([1, 2])) is None
    assert delivered_indices(iter(DataLoader(numbers(), batch_size=4))) is None


# Resumed within an epoch, as torchdata's StatefulDataLoader does it.


class Resumable:
    """The iterator of a batch sampler that says how far it has come."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class ResumableBatches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return Resumable(self.batches)


class Iterator:
    """What is looked at of torchdata's iterator, which is a batch ahead."""

    def __init__(self, iteration, yielded=0):
        self._sampler_iter, self._num_yielded, self._sampler_iter_yielded = iteration, yielded, yielded

    def __next__(self):
        while self._sampler_iter_yielded < self._num_yielded + 2:
            next(self._sampler_iter)
            self._sampler_iter_yielded += 1
        self._num_yielded += 1
        return delivered_indices(self).tolist()


BATCHES = [[5, 3], [1, 0], [2, 4], [9, 7], [6, 8]]


def test_what_keeps_its_state_is_resumed_and_known():
    batches = TrackedBatchSampler(ResumableBatches(BATCHES))
    one = Iterator(iter(batches))
    assert [next(one), next(one)] == BATCHES[:2]
    state = one._sampler_iter.state_dict()
    # The user's own state, which loads without us too.
    assert state == {"at": 3}
    again = Iterator(iter(batches), yielded=2)
    again._sampler_iter.load_state_dict({"at": 2})
    assert [next(again), next(again)] == BATCHES[2:4]


def test_what_keeps_none_is_wound_forward_and_known():
    batches = TrackedBatchSampler(BATCHES)
    assert not hasattr(iter(batches), "state_dict")
    again = Iterator(itertools.islice(batches, 2, None), yielded=2)
    assert [next(again), next(again)] == BATCHES[2:4]
    assert delivered_indices(Iterator(itertools.islice(BATCHES, 2, None), yielded=2)) is None
