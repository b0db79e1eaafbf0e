"""What a forward pass of ours may have changed of a model beside its weights, and its hooks of theirs: put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from lightning_unlearn.sharding import local_part

# Tensors that are no buffers, and containers, are kept up to this many elements and items.
_MOST_ELEMENTS = 2**24
_MOST_ITEMS = 10_000
# How deep containers are looked into; what is within an object, or within a container, is one less deep.
_DEPTH = 2

# What every module has: hooks, parameters, which a strategy that shards them puts in and out itself, and the rest.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Whose objects look after their own state.
_PACKAGES = {
    "torch",
    "torchmetrics",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "lightning_unlearn",
    "numpy",
}

_Restore = Callable[[], object]


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts back what forward passes inside change: buffers, attributes, and what hooks of the user's write to.

    Kept are, of every submodule: buffers, submodules and attributes, those that are made inside as well; the contents
    of tensors, lists, dicts, sets and deques among the attributes, of modules in these (as torchmetrics' states), and
    the states of random generators; and the same of objects of the user's own classes, and of what ``forward`` and the
    user's forward hooks refer to: variables that they close over, global ones that they name, the object that a bound
    method belongs to.

    Not kept is what lies deeper or elsewhere: objects in objects, tensors of more than 2**24 elements that are no
    buffers, containers of more than 10,000 items, files, iterators, data sets, other processes. Nor are modules that
    are lazy: they become what they are to be.
    """
    keeper = _Keeper()
    for module in model.modules():
        keeper.take_module(module)
    try:
        yield
    finally:
        keeper.restore()


class _Keeper:
    """Notes states, each once, and puts them back."""

    def __init__(self) -> None:
        self._restores: list[_Restore] = []
        # What has been noted; held, so that no other object gets its id.
        self._known: dict[int, Any] = {}

    def restore(self) -> None:
        with torch.no_grad():
            for restore in self._restores:
                restore()

    def take_module(self, module: nn.Module) -> None:
        if self._is_known(module) or isinstance(module, (LazyModuleMixin, torch.jit.ScriptModule)):
            return
        for names in (module._buffers, module._modules):
            self._take_names(names)
        persistent = set(module._non_persistent_buffers_set)
        self._restores.append(lambda: _refill(module._non_persistent_buffers_set, persistent))
        for buffer in module._buffers.values():
            if buffer is not None:
                self._take_tensor(buffer)
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        self._restores.append(lambda: _reset_attributes(vars(module), own, _OF_EVERY_MODULE))
        for value in own.values():
            self.take(value)
        for function in (type(module).forward, *module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            self.take_function(function)

    def take_function(self, function: Any) -> None:
        """What a function of the user's may write to; of a callable object, its attributes."""
        if isinstance(function, partial):
            for value in (*function.args, *function.keywords.values()):
                self.take(value)
            function = function.func
        if isinstance(function, MethodType):
            self._take_object(function.__self__)
            function = function.__func__
        if isinstance(function, FunctionType):
            self._take_variables_of(function)
        else:
            self._take_object(function)

    def _take_variables_of(self, function: FunctionType) -> None:
        if _is_of_a_package(function) or self._is_known(function):
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.take(value)
        for cell in function.__closure__ or ():
            self._take_cell(cell)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                self._take_variable(function.__globals__, name)

    def take(self, value: Any, depth: int = _DEPTH) -> None:
        """The contents of a value."""
        if isinstance(value, Tensor):
            if value.numel() <= _MOST_ELEMENTS and not isinstance(value, nn.Parameter):
                self._take_tensor(value)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                self.take_module(module)
        elif isinstance(value, (list, deque, set, dict)):
            self._take_container(value, depth)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            self.take_function(value)
        elif depth == _DEPTH:
            self._take_object(value)

    def _is_known(self, value: Any) -> bool:
        if id(value) in self._known:
            return True
        self._known[id(value)] = value
        return False

    def _take_names(self, of: dict[str, Any]) -> None:
        before = dict(of)
        self._restores.append(lambda: _reset_attributes(of, before))

    def _take_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.is_meta or tensor.is_nested or self._is_known(tensor):
            return
        local = local_part(tensor)
        before = local.detach().clone()

        def restore() -> None:
            # Not where nothing has changed: a write would count as one.
            now = local_part(tensor).detach()
            if now.shape != before.shape or not _is_same(now, before):
                with torch.inference_mode(tensor.is_inference()):
                    now.resize_(before.shape).copy_(before)

        self._restores.append(restore)

    def _take_container(self, value: Any, depth: int) -> None:
        if len(value) > _MOST_ITEMS or depth == 0 or self._is_known(value):
            return
        items = list(value.values() if isinstance(value, dict) else value)
        # An LSTM's list of its weights is not a state.
        if any(isinstance(item, nn.Parameter) for item in items):
            return
        before = dict(value) if isinstance(value, dict) else list(value)
        self._restores.append(lambda: _refill(value, before))
        for item in items:
            self.take(item, depth - 1)

    def _take_object(self, owner: Any) -> None:
        if (restore := _state_of_generator(owner)) is not None:
            self._restores.append(restore)
            return
        attributes = getattr(owner, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(owner, (nn.Module, ModuleType, Dataset)):
            return
        if _is_of_a_package(type(owner)) or self._is_known(owner):
            return
        self._take_names(attributes)
        for value in attributes.values():
            self.take(value, _DEPTH - 1)

    def _take_cell(self, cell: Any) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return

        def restore() -> None:
            if cell.cell_contents is not value:
                cell.cell_contents = value

        self._restores.append(restore)
        self.take(value)

    def _take_variable(self, variables: dict[str, Any], name: str) -> None:
        value = variables[name]

        def restore() -> None:
            if variables.get(name) is not value:
                variables[name] = value

        self._restores.append(restore)
        self.take(value)


def _is_of_a_package(named: Any) -> bool:
    """Whether a class or function is of what the user's code builds on, which looks after its own state."""
    return str(getattr(named, "__module__", None)).partition(".")[0] in _PACKAGES


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or one.is_quantized:
        return False
    return torch.equal(one, other) or (
        one.dtype.is_floating_point and torch.equal(one.nan_to_num(nan=0.125), other.nan_to_num(nan=0.125))
    )


def _reset_attributes(now: dict[str, Any], before: Mapping[str, Any], leave: frozenset[str] = frozenset()) -> None:
    for name in [name for name in now if name not in before and name not in leave]:
        del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _refill(value: Any, before: Any) -> None:
    """Gives a container its items again, where it has others."""
    now = list(value.items()) if isinstance(value, dict) else list(value)
    was = list(before.items()) if isinstance(before, dict) else list(before)
    if len(now) == len(was) and all(_is_item(one, other) for one, other in zip(now, was, strict=True)):
        return
    value.clear()
    value.extend(before) if isinstance(value, (list, deque)) else value.update(before)


def _is_item(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def _state_of_generator(value: Any) -> _Restore | None:
    """What puts a random generator back to where it is now; None for anything else."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, (np.random.RandomState, random.Random)):
        get, put = (
            (value.getstate, value.setstate) if isinstance(value, random.Random) else (value.get_state, value.set_state)
        )
        before: Any = get()
        return lambda: put(before)
    if isinstance(value, np.random.Generator):
        position = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", position)
    return None
