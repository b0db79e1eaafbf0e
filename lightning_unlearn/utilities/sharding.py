"""Weights of which each rank holds a part (DTensors, as under FSDP2): the part that is here, and the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _as_dtensor(tensor: Tensor) -> Any:
    """Return the tensor if it is a DTensor, else None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every rank; every rank must ask where each holds a part."""
    sharded = _as_dtensor(tensor.detach())
    return tensor.detach() if sharded is None else sharded.full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory; a tensor that is not sharded is all here."""
    sharded = _as_dtensor(tensor)
    if sharded is None:
        return tensor
    part: Tensor = sharded.to_local()
    return part


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return what this rank holds of a value, where it holds a part of another tensor of that shape.

    Args:
        value: whole.
        like: sharded or not.

    Raises:
        ValueError: as :func:`local_positions`.
    """
    for dimension, number, rank in _cuts(like):
        chunks = value.chunk(number, dimension)
        value = chunks[rank] if rank < len(chunks) else value.narrow(dimension, 0, 0)
    return value


def joined(part: Tensor, like: Tensor) -> Tensor:
    """Return the whole of a value, on the CPU, from this rank's part. Every rank must call it.

    Args:
        part: as :func:`part_of`, on any device.
        like: sharded or not.
    """
    sharded = _as_dtensor(like.detach())
    if sharded is None:
        return part.cpu()
    from torch.distributed.tensor import DTensor

    found = DTensor.from_local(
        part.to(sharded.device), sharded.device_mesh, sharded.placements, shape=like.shape, stride=sharded.stride()
    )
    whole_value: Tensor = found.full_tensor()
    return whole_value.cpu()


def local_positions(tensor: Tensor, dimension: int, positions: Tensor) -> Tensor:
    """Return which places along a dimension, counted in this rank's part, hold the given places of the whole.

    Needs no communication.

    Args:
        tensor: sharded or not.
        dimension: in which places are counted.
        positions: (K,) int64, places in the whole.

    Returns:
        (k,) int64, with k <= K.

    Raises:
        ValueError: for a layout other than even chunks and copies, such as that of two kinds of sharding on top of each
            other.
    """
    if _as_dtensor(tensor) is None:
        return positions
    here = torch.arange(tensor.shape[dimension])
    for cut, number, rank in _cuts(tensor):
        if cut == dimension % tensor.ndim:
            chunks = here.chunk(number)
            here = chunks[rank] if rank < len(chunks) else here[:0]
    return torch.isin(here, positions.to(here.device)).nonzero().flatten()


def _cuts(tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield along which dimension a tensor is cut, into how many chunks, and which of them is here."""
    sharded = _as_dtensor(tensor)
    if sharded is None:
        return
    from torch.distributed.tensor import Shard

    for mesh_dimension, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            raise ValueError(
                f"Expected weights that are copied or sharded in even chunks over the ranks, but got {placement}; use"
                " fully_shard over the data-parallel mesh alone."
            )
        mesh = sharded.device_mesh
        yield placement.dim % tensor.ndim, mesh.size(mesh_dimension), mesh.get_local_rank(mesh_dimension)


def reshard(model: nn.Module) -> bool:
    """Let every rank hold no more than its part of the weights, which are then what an optimizer sees.

    After a pass that is not followed by a backward pass, FSDP2 leaves the outermost module's weights whole: copies, in
    which a change would be lost.

    Returns:
        whether weights are sharded by FSDP2 at all.
    """
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in found:
        module.reshard()
    return bool(found)
