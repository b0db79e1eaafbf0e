"""State of a model that a forward pass may change: saved, and restored."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_unlearn.utilities.sharding import local_part

# Tensors that are not buffers, and containers, are kept up to this many elements and items.
_MOST_ELEMENTS = 2**24
_MOST_ITEMS = 10_000
# Of a model with more weights than this, only those are kept that are known to be written to: 512 MiB in 32 bits.
_MOST_WEIGHTS = 2**27

# What every module has: hooks, parameters, which a strategy that shards them puts in and out itself, and the rest.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_Restore = Callable[[], object]


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore what forward passes inside change: weights, buffers, submodules and attribute of every submodule.

    Weights are changed by a switch to eval mode (LoRA that is merged in it), by ``Embedding(max_norm=)``, and by a
    ``forward`` that bounds or normalizes them. Of a model with more than 2**27 of them those are kept that are within a
    module with a ``train()`` or ``eval()`` of its own, or belong to one with a ``max_norm``.

    Attributes made inside are removed. Of tensors, lists, dicts, sets, deques, random generators and modules (such as
    torchmetrics) among the attributes, or one level down in a container among them or in one that a forward hook closes
    over, the contents are put back as well.

    Not kept: objects of other classes, global variables, files, whatever lies deeper, containers of more than 10,000
    items, tensors of more than 2**24 elements that are not buffers; and lazy modules, which the first pass initializes.
    """
    snapshot = _Snapshot()
    snapshot.take(model)
    for weight in _weights_written(model):
        snapshot.take_weight(weight)
    try:
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    """Takes states, each once, and puts them back."""

    def __init__(self) -> None:
        self._restores: list[_Restore] = []
        # Held, so that no other object gets the id.
        self._known: dict[int, Any] = {}

    @torch.no_grad()
    def restore(self) -> None:
        for restore in self._restores:
            restore()

    def take(self, value: Any, depth: int = 1) -> None:
        """Take the contents of a value, and of the items of a container down to a depth."""
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._take_module(module)
        elif isinstance(value, Tensor):
            if value.numel() <= _MOST_ELEMENTS and not isinstance(value, nn.Parameter):
                self._take_tensor(value)
        elif isinstance(value, (list, deque, set, dict)):
            self._take_container(value, depth)
        elif (restore := _state_of_generator(value)) is not None:
            self._restores.append(restore)

    def take_weight(self, weight: nn.Parameter) -> None:
        """Take the values of a parameter."""
        self._take_tensor(weight)

    def _take_module(self, module: nn.Module) -> None:
        if isinstance(module, (LazyModuleMixin, torch.jit.ScriptModule)) or self._is_known(module):
            return
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        self._restores.append(lambda: _reset(vars(module), own, leave=_OF_EVERY_MODULE))
        for names in (module._buffers, module._modules):
            self._take_names(names)
        persistent = set(module._non_persistent_buffers_set)
        self._restores.append(lambda: _refill(module._non_persistent_buffers_set, persistent))
        for buffer in module._buffers.values():
            if buffer is not None:
                self._take_tensor(buffer)
        for value in own.values():
            self.take(value)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # What a hook of this package collects is the purpose of the pass.
            if not str(getattr(hook, "__module__", "")).startswith("lightning_unlearn."):
                self._take_collected(hook)

    def _take_names(self, of: dict[str, Any]) -> None:
        before = dict(of)
        self._restores.append(lambda: _reset(of, before))

    def _take_collected(self, hook: Any) -> None:
        """Take the containers that a user's hook closes over; the variables themselves are the user's."""
        for cell in getattr(hook, "__closure__", None) or ():
            with suppress(ValueError):  # an empty one
                if isinstance(cell.cell_contents, (list, deque, set, dict)):
                    self._take_container(cell.cell_contents, 1)

    def _take_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.is_meta or tensor.is_nested or self._is_known(tensor):
            return
        local = local_part(tensor)
        before = local.detach().clone()

        def restore() -> None:
            # Not where nothing has changed: autograd would count the write.
            now = local_part(tensor).detach()
            if now.shape != before.shape or not _is_same(now, before):
                with torch.inference_mode(tensor.is_inference()):
                    now.resize_(before.shape).copy_(before)

        self._restores.append(restore)

    def _take_container(self, value: Any, depth: int) -> None:
        if depth < 0 or len(value) > _MOST_ITEMS or self._is_known(value):
            return
        items = list(value.values() if isinstance(value, dict) else value)
        # An LSTM's list of its weights is not a state.
        if any(isinstance(item, nn.Parameter) for item in items):
            return
        before = dict(value) if isinstance(value, dict) else list(value)
        self._restores.append(lambda: _refill(value, before))
        for item in items:
            self.take(item, depth - 1)

    def _is_known(self, value: Any) -> bool:
        if id(value) in self._known:
            return True
        self._known[id(value)] = value
        return False


def _weights_written(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that a switch to eval mode or a forward pass may write to."""
    every: list[Any] = list(model.parameters())
    # What is lazy has no size yet.
    weights = [weight for weight in every if not is_lazy(weight)]
    if sum(local_part(weight).numel() for weight in weights) <= _MOST_WEIGHTS:
        yield from weights
        return
    for module in model.modules():
        kind = type(module)
        if kind.train is not nn.Module.train or kind.eval is not nn.Module.eval:
            yield from module.parameters()
        elif getattr(module, "max_norm", None) is not None:
            yield from module.parameters(recurse=False)


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or one.is_quantized:
        return False
    return torch.equal(one, other) or (
        one.dtype.is_floating_point and torch.equal(one.nan_to_num(nan=0.125), other.nan_to_num(nan=0.125))
    )


def _reset(now: dict[str, Any], before: Mapping[str, Any], leave: frozenset[str] = frozenset()) -> None:
    for name in [name for name in now if name not in before and name not in leave]:
        del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _refill(value: Any, before: Any) -> None:
    """Give a container its items again, where it has others."""
    now, was = _flat(value), _flat(before)
    if len(now) == len(was) and all(one is other for one, other in zip(now, was, strict=True)):
        return
    value.clear()
    value.extend(before) if isinstance(value, (list, deque)) else value.update(before)


def _flat(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _state_of_generator(value: Any) -> _Restore | None:
    """Return what puts a random generator back to where it is now; None for anything else."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        position = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", position)
    return None
