"""Keep pruned neurons at exactly zero during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.utilities.sharding import local_part, local_positions


@dataclass(frozen=True, eq=False)
class PrunedEntries:
    """The entries of one parameter that belong to pruned neurons.

    Args:
        parameter: the parameter.
        dimension: of the parameter that counts neurons.
        neurons: (K,) int64, the pruned ones.
    """

    parameter: Tensor
    dimension: int
    neurons: Tensor
    _places: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def zero_(self, tensor: Tensor) -> None:
        """Set these entries of a tensor shaped, and sharded, like the parameter to zero."""
        local_part(tensor).index_fill_(self.dimension, self._places_in(tensor), 0)

    def is_revived(self) -> bool:
        """Return whether one of them is not zero; of a parameter that is sharded, in the part that is here."""
        here = local_part(self.parameter.detach())
        return bool((here.index_select(self.dimension, self._places_in(self.parameter)) != 0).any())

    def _places_in(self, tensor: Tensor) -> Tensor:
        # Kept where they are needed: a training step would wait for the device each time that they are moved there.
        of = tensor.device, getattr(tensor, "placements", None)
        if of not in self._places:
            self._places[of] = local_positions(tensor, self.dimension, self.neurons).to(tensor.device)
        return self._places[of]


def neuron_entries(layer: nn.Module, norm: nn.Module | None, neurons: Tensor) -> list[PrunedEntries]:
    """Return the entries to zero for some neurons: weight rows, bias, scale and shift of the following norm.

    Args:
        layer: a Linear or convolution.
        norm: the norm that directly follows the layer, if any; its shift must be zeroed too, or a pruned convolution
            channel would output a constant.
        neurons: (K,) int64.

    Raises:
        ValueError: for a weight or bias that is computed in an unsupported way; for a grouped transposed convolution,
            where a slice of the weight serves one neuron of each group; for a norm without scale and shift.
    """
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    if transposed and layer.groups != 1:
        raise ValueError(
            f"Expected a {type(layer).__name__} with groups=1, but it has groups={layer.groups}; name another layer to"
            " prune."
        )
    # A transposed convolution has its output channels second.
    places = [(layer, "weight", int(transposed)), (layer, "bias", 0)]
    if norm is not None:
        if getattr(norm, "weight", None) is None:
            raise ValueError(
                f"Expected the {type(norm).__name__} after the layer to have a scale and shift, but it has"
                " affine=False, so a zeroed neuron would still output a constant. Name another layer to prune."
            )
        # A layer norm over several dimensions has the features of a Linear last, the channels of a convolution first.
        dimension = -1 if isinstance(layer, nn.Linear) else 0
        places += [(norm, "weight", dimension), (norm, "bias", dimension)]
    found = [(_parameter_behind(module, name, dimension), dimension) for module, name, dimension in places]
    return [PrunedEntries(parameter, dimension, neurons) for parameter, dimension in found if parameter is not None]


def consumer_entries(head: nn.Linear, neurons: Tensor) -> list[PrunedEntries]:
    """Return what to zero so that a Linear does not listen to some of its inputs: the columns of its weight.

    Raises:
        ValueError: like :func:`neuron_entries`.
    """
    parameter = _parameter_behind(head, "weight", 1)
    return [] if parameter is None else [PrunedEntries(parameter, 1, neurons)]


def is_computed(module: nn.Module) -> bool:
    """Return whether a weight or bias is computed from other parameters: weight norm, ``torch.nn.utils.prune``."""
    held = _own_parameters(module)
    with as_in_eval(module):
        return any(name not in held and getattr(module, name, None) is not None for name in ("weight", "bias"))


@contextmanager
def as_in_eval(module: nn.Module) -> Iterator[None]:
    """Let computed weights be read without a trace inside the context: in training mode a spectral norm adapts."""
    parts = list(module.parametrizations.modules()) if parametrize.is_parametrized(module) else []  # type: ignore[union-attr]
    before = [(part, part.training) for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, training in before:
            part.training = training


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _parameter_behind(module: nn.Module, name: str, dimension: int) -> nn.Parameter | None:
    """Return the parameter to zero for a weight or bias (itself, or the one it is computed from), or None.

    Spectral norm divides it, ``torch.nn.utils.prune`` multiplies it by a mask. Under weight norm it is the length of
    each row where there is one for each neuron, since a row of length 0 has no direction; else the directions.
    """
    held = _own_parameters(module)
    if name in held:
        return held[name]
    with as_in_eval(module):
        value = getattr(module, name, None)
    if value is None:
        return None
    if parametrize.is_parametrized(module, name):
        at: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict
        candidates = [getattr(at, part, None) for part in ("original", "original0", "original1")]
    else:
        # The older functions of torch.nn.utils put a tensor that is no parameter in the weight's place.
        candidates = [held.get(f"{name}_{part}") for part in ("orig", "g", "v")]
    size = value.shape[dimension]
    for candidate in candidates:
        if not isinstance(candidate, nn.Parameter) or candidate.ndim != value.ndim:
            continue
        if candidate.shape == value.shape or candidate.numel() == candidate.shape[dimension] == size:
            return candidate
    raise ValueError(
        f"Expected the {name} of a {type(module).__name__} to be a parameter, or computed from one by"
        " weight norm, spectral norm, a parametrization of one tensor or torch.nn.utils.prune. Name"
        " another layer to prune."
    )


def snapshot(entries: Sequence[PrunedEntries]) -> Callable[[], None]:
    """Remember the parameters that entries belong to.

    Returns:
        a function that puts them back, bit for bit.
    """
    before = [(entry.parameter, entry.parameter.detach().clone()) for entry in entries]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in before:
            parameter.copy_(value)

    return restore


@contextmanager
def temporarily_zeroed(entries: Sequence[PrunedEntries]) -> Iterator[None]:
    """Set the entries to zero inside the context, and restore them afterwards."""
    restore = snapshot(entries)
    PrunedParameters(entries).zero_parameters()
    try:
        yield
    finally:
        restore()


@torch.no_grad()
def are_revived(entries: Sequence[PrunedEntries]) -> bool:
    """Return whether one of the entries, or of the part of them that is here, is not zero. Waits for the device."""
    return any(entry.is_revived() for entry in entries)


def modules_sharing_parameters(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the dotted paths of the other modules that hold one of a module's own parameters, which are tied."""
    own = _held_in(module)
    # A parametrization is a part of the module whose weight it computes.
    others = ((name, other) for name, other in model.named_modules() if ".parametrizations" not in f".{name}")
    return [name for name, other in others if other is not module and not own.isdisjoint(_held_in(other))]


def _held_in(module: nn.Module) -> set[nn.Parameter]:
    """Return a module's own parameters, and those that its weights are computed from."""
    parts = [module.parametrizations] if parametrize.is_parametrized(module) else []
    return {*module.parameters(recurse=False), *(p for part in parts for p in part.parameters())}  # type: ignore[union-attr]


class PrunedParameters:
    """Zeroes entries of parameters and keeps them at zero.

    Args:
        entries: what to zero.
    """

    def __init__(self, entries: Sequence[PrunedEntries]) -> None:
        self._entries = list(entries)
        self._handles: dict[Optimizer, RemovableHandle | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches no optimizer, and the parameters are not its own.
        return {"_entries": [], "_handles": {}}

    @torch.no_grad()
    def zero_parameters(self) -> None:
        """Set the entries to zero."""
        for entry in self._entries:
            entry.zero_(entry.parameter)

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Set the entries of the gradients to zero, so that they do not count in the norm that clips them."""
        for entry in self._entries:
            if entry.parameter.grad is not None:
                entry.zero_(entry.parameter.grad)

    def watch(self, optimizer: Optimizer, beside: Iterable[Optimizer] = ()) -> None:
        """Zero the entries in the optimizer's state now, and in the parameters after each of its steps.

        Momentum would otherwise revive them. Watching an optimizer twice is the same as once.

        Args:
            optimizer: which.
            beside: all optimizers of the fit. What another of them steps is left alone: it may be between its own
                forward and backward pass, which a change would break.
        """
        if optimizer in self._handles:
            return
        elsewhere = {p for other in beside if other is not optimizer for p in _stepped(other)} - _stepped(optimizer)
        own = PrunedParameters([entry for entry in self._entries if entry.parameter not in elsewhere])
        with torch.no_grad():
            for entry in own._entries:
                for value in optimizer.state.get(entry.parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == entry.parameter.shape:
                        entry.zero_(value)

        def after_step(*_: Any) -> None:
            own.zero_parameters()

        try:
            self._handles[optimizer] = optimizer.register_step_post_hook(after_step)
        except AttributeError:
            # A wrapper that has not called Optimizer.__init__. The entries are zeroed before the next step too.
            self._handles[optimizer] = None

    def release(self) -> None:
        """Stop watching, without changing parameters."""
        for handle in self._handles.values():
            if handle is not None:
                handle.remove()
        self._handles.clear()


def _stepped(optimizer: Optimizer) -> set[Any]:
    """Return the parameters that an optimizer steps."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
