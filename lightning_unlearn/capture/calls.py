"""Single calls of modules in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Forward = Callable[[Any], Tensor]
"""From the model's input, as the batch holds it, to logits (B, C)."""


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module in a forward pass.

    Args:
        name: dotted path of the module, see :func:`plain_name`.
        module: the module.
        inputs: its positional arguments.
        output: what it returned.
        versions: of each input, how often it had been changed in place when the module was entered.
        output_version: the same of the output when the module was left.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    versions: tuple[int, ...]
    output_version: int

    @property
    def is_changed(self) -> bool:
        """Whether the output has been changed in place since the module returned it."""
        return version_of(self.output) != self.output_version


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, perhaps in another shape."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.numel() == other.numel() and one.dtype == other.dtype


def version_of(value: Any) -> int:
    """How often a tensor has been changed in place; tensors of inference mode do not count it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
