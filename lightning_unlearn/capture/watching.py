"""A forward hook that others may copy, pickle, trace, export and script a model with."""

# Without postponed annotations: torch.jit.script reads those of a hook.
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Who looks at which module; a copy of a module is none of these.
_watched: WeakKeyDictionary[nn.Module, list[Callable[[Any], None]]] = WeakKeyDictionary()
_handles: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def lightning_unlearn_reads_the_output(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """The hook: a function with the types of a layer's, which ``torch.jit.script`` compiles to nothing."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _show(self, output)


def watch_output(module: nn.Module, look: Callable[[Any], None]) -> Callable[[], None]:
    """Has a function look at what a module returns in each eager call.

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
