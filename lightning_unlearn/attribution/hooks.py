"""Reads a layer's activation in passing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Without postponed annotations: torch.jit.script reads those of a hook.
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.attribution.layers import LayerPoint, resolve_layer, samples_first

# True in passes that are not the plain pass over the batch, which taps do not look at.
_unwatched: ContextVar[bool] = ContextVar("_unwatched", default=False)


@contextmanager
def record_activation(model: nn.Module, point: LayerPoint) -> Iterator[Callable[[], Tensor]]:
    """Read a layer's activation in every forward pass inside the context.

    Around :meth:`Attributor.margin` it sees one pass, however many the method makes; only where memory made it take the
    batch in parts, there are more, which ``Attributor(watch=...)`` joins.

    Yields:
        a function that hands over the activation of the last pass, as the layer had it but with the samples first, and
        forgets it.
    """
    module = resolve_layer(model, point.name)
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        # A copy, since an in-place function may follow the layer.
        if not _unwatched.get():
            seen.append((value[0] if isinstance(value, tuple) else value).detach().clone())

    def take() -> Tensor:
        if len(seen) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(seen)}."
            )
        return samples_first(seen.pop(), point)

    if point.at == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: keep(inputs))
    else:
        handle = module.register_forward_hook(lambda _, __, output: keep(output))
    try:
        yield take
    finally:
        handle.remove()


def several_tensors(point: LayerPoint) -> str:
    """Return what to say of a layer that takes or returns several tensors."""
    return f"Layer '{point.name}' has several tensors as its {point.at}; name a layer with one."


def single_tensor(value: Any, point: LayerPoint) -> Tensor:
    """Return the one tensor of a layer's positional arguments or output."""
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise ValueError(several_tensors(point))
    return values[0]


@contextmanager
def recording_paused() -> Iterator[None]:
    """Pause all recording inside the context."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


# Who looks at which module; a copy of a module is none of these.
_watched: WeakKeyDictionary[nn.Module, list[Callable[[Any], None]]] = WeakKeyDictionary()
_handles: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def lightning_unlearn_reads_the_output(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """Look at the output: a function with the types of a layer's, which ``torch.jit.script`` compiles to nothing."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _show(self, output)


def watch_output(module: nn.Module, look: Callable[[Any], None]) -> Callable[[], None]:
    """Have a function look at what a module returns in each eager call.

    Returns:
        a function that ends it.
    """
    looks = _watched.setdefault(module, [])
    looks.append(look)
    # One hook for all that look.
    if module not in _handles:
        _handles[module] = module.register_forward_hook(lightning_unlearn_reads_the_output)

    def end() -> None:
        if look in looks:
            looks.remove(look)
        if not looks and module in _handles:
            _handles.pop(module).remove()
            _watched.pop(module, None)

    return end


def _show(module: nn.Module, output: Any) -> None:
    # A graph that is compiled or traced must not change, nor break, on our account.
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if traced or torch.compiler.is_compiling() or isinstance(output, torch.fx.Proxy):
        return
    for look in list(_watched.get(module, ())):
        look(output)
