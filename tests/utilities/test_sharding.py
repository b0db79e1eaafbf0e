from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial

from lightning_unlearn.utilities import sharding
from lightning_unlearn.utilities.sharding import joined, local_part, local_positions, part_of, reshard, whole

# What needs processes is tested in tests/callbacks/test_fsdp.py.


def held(monkeypatch, shape, placements, sizes, ranks):
    """A tensor that is laid out over a mesh of processes, as the one with these coordinates sees it."""
    mesh = SimpleNamespace(size=lambda dimension: sizes[dimension], get_local_rank=lambda dimension: ranks[dimension])
    layout = SimpleNamespace(placements=placements, device_mesh=mesh)
    monkeypatch.setattr(sharding, "_as_dtensor", lambda _: layout)
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("rows", [1, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dimension", [0, -2])
def test_every_place_is_found_on_the_one_rank_that_holds_it(monkeypatch, rows, size, dimension):
    positions, found = torch.tensor([0, rows // 2, rows - 1]).unique(), []
    for rank in range(size):
        whole_tensor = held(monkeypatch, (rows, 3), [Shard(0)], [size], [rank])
        chunks = whole_tensor.chunk(size)
        part = chunks[rank] if rank < len(chunks) else whole_tensor[:0]
        found.append(part[local_positions(whole_tensor, dimension, positions)])
    assert torch.cat(found).tolist() == whole_tensor[positions].tolist()


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("dimension", [0, 1])
def test_the_parts_of_a_value_are_those_of_the_weight(monkeypatch, rows, dimension):
    parts = []
    for rank in range(3):
        like = held(monkeypatch, (rows, 4), [Replicate(), Shard(dimension)], [2, 3], [1, rank])
        parts.append(part_of(10 * like, like))
    assert torch.cat(parts, dim=dimension).equal(10 * like)


def test_along_another_dimension_every_place_is_here(monkeypatch):
    tensor = held(monkeypatch, (4, 3), [Shard(0)], [2], [1])
    assert local_positions(tensor, 1, torch.tensor([0, 2])).tolist() == [0, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_copies_of_shards_are_like_shards(monkeypatch, rank):
    tensor = held(monkeypatch, (5, 3), [Replicate(), Shard(0)], [3, 2], [2, rank])
    assert local_positions(tensor, 0, torch.tensor([0, 4])).tolist() == [[0], [1]][rank]


def test_another_layout_is_refused(monkeypatch):
    tensor = held(monkeypatch, (4, 3), [Partial()], [2], [1])
    with pytest.raises(ValueError, match=r"copied or sharded in even chunks .* use fully_shard"):
        local_positions(tensor, 0, torch.tensor([0]))


def test_a_plain_tensor_is_all_here():
    tensor, positions = torch.arange(6.0, requires_grad=True), torch.tensor([1, 5])
    assert local_positions(tensor, 0, positions) is positions
    assert local_part(tensor) is tensor
    assert part_of(tensor, tensor) is tensor
    assert joined(tensor, tensor).equal(tensor)
    assert whole(tensor).equal(tensor.detach())
    assert not whole(tensor).requires_grad
    assert not reshard(nn.Linear(2, 2))
