from threading import Event

import pytest
import torch

from lightning_unlearn.data.loaders import shard_indices
from lightning_unlearn.utilities.distributed import gather_by_index, run_on_rank_zero, sum_over_ranks
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks


class InPlaceStrategy:
    """Reduces as collectives do, in place; here every rank holds the same."""

    root_device = torch.device("cpu")

    def __init__(self, world_size):
        self.world_size = world_size
        self.asked = []

    def reduce(self, tensor, *, reduce_op):
        self.asked.append((reduce_op, tensor.requires_grad))
        return tensor.mul_(self.world_size)


def test_sum_over_ranks_asks_the_strategy_for_a_sum():
    strategy = InPlaceStrategy(3)
    assert sum_over_ranks(strategy)(torch.tensor([1.0, 2.0])).tolist() == [3.0, 6.0]
    assert strategy.asked == [("sum", False)]


def test_sum_over_ranks_leaves_its_input_as_it_is():
    part = torch.tensor([1.0, 2.0], requires_grad=True)
    total = sum_over_ranks(InPlaceStrategy(3))(part)
    assert part.tolist() == [1.0, 2.0]
    assert not total.requires_grad


def test_sum_over_ranks_reduces_on_the_strategys_device_and_comes_back():
    class OnMeta(InPlaceStrategy):
        root_device = torch.device("meta")

        def reduce(self, tensor, *, reduce_op):
            assert tensor.device == self.root_device
            return torch.full(tensor.shape, 7.0)

    assert sum_over_ranks(OnMeta(2))(torch.zeros(2)).tolist() == [7.0, 7.0]


def test_rows_of_all_ranks_come_in_dataset_order():
    total, values = 7, torch.arange(7.0) * 10

    def place(rank, reduce):
        index, weight = shard_indices(total, rank, 3)
        return gather_by_index(index, weight, values[index], total, reduce)

    for placed in run_ranks(place, 3):
        assert placed.tolist() == values.tolist()


def test_padding_rows_are_left_out_whatever_they_hold():
    index, weight = torch.tensor([1, 3, 3]), torch.tensor([1.0, 1.0, 0.0])
    placed = gather_by_index(index, weight, torch.tensor([5.0, 6.0, torch.nan]), 4, no_reduce)
    assert placed.tolist() == [0.0, 5.0, 0.0, 6.0]


def test_the_order_within_a_rank_does_not_matter():
    index = torch.tensor([2, 0, 1])
    assert gather_by_index(index, torch.ones(3), index * 10, 3, no_reduce).tolist() == [0, 10, 20]


def test_dtype_and_further_dimensions_are_kept():
    index, weight = torch.tensor([1, 0]), torch.ones(2)
    placed = gather_by_index(index, weight, torch.tensor([[1, 2], [3, 4]]), 3, no_reduce)
    assert placed.dtype == torch.int64
    assert placed.tolist() == [[3, 4], [1, 2], [0, 0]]


class Broadcasts:
    """One of several ranks, which are threads: all wait for rank 0."""

    def __init__(self, rank, sent, arrived):
        self.is_global_zero, self.sent, self.arrived = rank == 0, sent, arrived

    def broadcast(self, obj, src=0):
        if self.is_global_zero:
            self.sent.append(obj)
            self.arrived.set()
        assert self.arrived.wait(10)
        return self.sent[0]


def test_what_rank_0_makes_is_there_on_every_rank():
    sent, arrived = [], Event()
    made = run_ranks(lambda rank, _: run_on_rank_zero(Broadcasts(rank, sent, arrived), lambda: f"by {rank}"), 3)
    assert made == ["by 0"] * 3


def test_what_rank_0_raises_is_raised_on_every_rank():
    sent, arrived = [], Event()

    def fails():
        raise ValueError("line 3")

    def work(rank, _):
        with pytest.raises(ValueError, match="line 3"):
            run_on_rank_zero(Broadcasts(rank, sent, arrived), fails)
        return True

    assert run_ranks(work, 2) == [True, True]
