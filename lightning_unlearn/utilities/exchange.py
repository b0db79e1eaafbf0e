"""What one rank has for each of the others, handed over in one collective, so that no rank holds what all have."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

Exchange = Callable[[Sequence[Any]], list[Any]]
"""From what this rank has for each rank to what each rank has for this one. Every rank must call it."""


def keep(parts: Sequence[Any]) -> list[Any]:
    """Return the exchange of one process."""
    return list(parts)


def exchange_over_ranks(device: torch.device, ranks: int) -> Exchange:
    """Return the exchange of a running fit.

    Objects are pickled, as Lightning's own broadcast does, and cross as bytes: nothing that a file or a user's data
    says is unpickled, only what another rank of the fit has made.

    Args:
        device: where the strategy's collectives expect tensors.
        ranks: how many processes.
    """
    if ranks == 1:
        return keep

    def exchange(parts: Sequence[Any]) -> list[Any]:
        written = [torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8) for part in parts]
        mine = torch.tensor([len(one) for one in written], device=device)
        theirs = torch.empty_like(mine)
        distributed.all_to_all_single(theirs, mine)
        sizes = theirs.tolist()
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        distributed.all_to_all_single(received, torch.cat(written).to(device), sizes, mine.tolist())
        return [pickle.loads(_bytes(one)) for one in torch.split(received.cpu(), sizes)]

    return exchange


def _bytes(one: Tensor) -> bytes:
    return one.numpy().tobytes()
