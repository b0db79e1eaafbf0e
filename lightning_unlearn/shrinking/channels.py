"""Which channels of a layer no other layer would miss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.pruning.masking import is_computed, neuron_entries
from lightning_unlearn.shrinking.equivalence import tried

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NO_NEURON = torch.zeros(0, dtype=torch.int64)
# torch-pruning's types of what leaves each channel to itself; a LayerNorm or an attention does not.
_BY_CHANNEL = (
    *("LINEAR", "CONV", "DEPTHWISE_CONV", "BN", "IN", "PRELU"),
    *("ELEMENTWISE", "RESHAPE", "CONCAT", "SPLIT", "SLICE", "UNBIND", "EXPAND"),
)


def may_be_cut(node: Any) -> bool:
    """Return whether something about a layer or what its channels reach is zero, and all of that is by channel.

    The group of a layer, which tells for certain, can take torch-pruning for ever: with a Swin Transformer it does.
    """
    met = list(_reached(node))
    hint = bool(silent_rows(node.module).any()) or any(map(_hints, met))
    return hint and all(x.type.name in _BY_CHANNEL for x in met)


def _reached(node: Any) -> Iterator[Any]:
    """Yield the nodes that a layer's channels come to, up to the layers that take them."""
    stack, seen = list(node.outputs), set()
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            yield node
            stack.extend([] if _mixes(node.module) else node.outputs)


def _hints(node: Any) -> bool:
    silent = _unheard(node.module) if _mixes(node.module) else _response(node.module)[0]
    return bool(torch.as_tensor(silent).any())


def treats_each_alone(item: Any, tied: set[Tensor]) -> bool:
    """Return whether a member of a group treats each channel for itself, and is made for being cut."""
    node, module = item.dep.target, item.dep.target.module
    if None in item.root_idxs or node.type.name not in _BY_CHANNEL:
        return False
    return _is_plain(module) and tied.isdisjoint(module.parameters(recurse=False))


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, LAYERS):
        return True
    if getattr(module, "groups", 1) > 1 and not _is_depthwise(module):
        return False
    return not is_computed(module) and tried(neuron_entries, module, None, _NO_NEURON) is not None


def _is_depthwise(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return bool(groups > 1 and not module.transposed and module.in_channels == module.out_channels == groups)


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and not _is_depthwise(module)


class Channels:
    """The channels of a layer, wherever they go.

    Masks are (D,) bool over the layer's channels.

    Args:
        graph: torch-pruning's graph of dependencies.
        group: what would be cut with all channels of the layer.
        count: D.
    """

    def __init__(self, graph: Any, group: Any, count: int) -> None:
        self._count = count
        # Of every node: positions of its own channels, and the layer's channels that they are.
        self._out: dict[Any, tuple[Tensor, Tensor]] = {}
        self._in: dict[Any, tuple[Tensor, Tensor]] = {}
        for item in group.items:
            places = self._out if graph.is_out_channel_pruning_fn(item.dep.handler) else self._in
            places[item.dep.target] = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        self._zero: dict[Any, Tensor] = {}

    def missed_by_none(self) -> Tensor:
        """Return the channels that arrive as zero at every layer that takes them, or that it does not listen to."""
        missed, taken = self._none(), self._none()
        for node, (own, channels) in self._in.items():
            heard = ~_unheard(node.module)[own]
            missed[channels[heard]] |= ~self._arrives_as_zero(node)[channels[heard]]
            taken[channels] = True
        return taken & ~missed

    def _none(self) -> Tensor:
        return torch.zeros(self._count, dtype=torch.bool)

    def _leaves_as_zero(self, node: Any) -> Tensor:
        if node not in self._zero:
            # A module that is called twice may come round to itself.
            self._zero[node] = self._none()
            mute, keeps_zero = _response(node.module)
            through = self._arrives_as_zero(node) & self._where(node, keeps_zero)
            self._zero[node] = self._where(node, mute) | through
        return self._zero[node]

    def _arrives_as_zero(self, node: Any) -> Tensor:
        inputs = [x for x in node.inputs if x in self._out and not _is_weight(x)]
        there = [self._where(x, True) for x in inputs]
        zero = [self._leaves_as_zero(x) for x in inputs]
        if not inputs:
            return self._none()
        if node.grad_fn.name().startswith("MulBackward"):
            # One factor is enough.
            return torch.stack(zero).any(0)
        return torch.stack(there).any(0) & torch.stack([z | ~t for z, t in zip(zero, there, strict=True)]).all(0)

    def _where(self, node: Any, mask: Tensor | bool) -> Tensor:
        """Return the channels of the layer that are in a node, all of its own channels for them in a mask."""
        own, channels = self._out[node]
        holds = mask[own] if isinstance(mask, Tensor) else torch.full(own.shape, mask)
        result = self._none()
        result[channels] = True
        result[channels[~holds]] = False
        return result


def _is_weight(node: Any) -> bool:
    """Return whether a node only turns the weight of a layer about, as Linear does."""
    module = node.module
    if isinstance(module, nn.Parameter) or next(module.parameters(), None) is not None:
        return False
    return all(map(_is_weight, node.inputs))


def _response(module: Any) -> tuple[Tensor | bool, Tensor | bool]:
    """Return which channels leave a module as zero whatever comes, and which do if they come as zero."""
    if isinstance(module, LAYERS):
        return silent_rows(module), _is_depthwise(module) and (module.bias is None or _is_zero(module.bias))
    if isinstance(module, nn.modules.batchnorm._NormBase):
        # A norm without scale multiplies by 1; without shift or running mean it adds or takes 0.
        scale = _is_zero(x) if (x := getattr(module, "weight", None)) is not None else False
        shift, mean = (
            _is_zero(x) if (x := getattr(module, name, None)) is not None else True for name in ("bias", "running_mean")
        )
        return scale & shift, shift & (scale | mean)
    return False, True


def silent_rows(module: nn.Module) -> Tensor:
    """Return (D,) bool, the neurons of a layer whose weights and bias are zero."""
    is_plain = isinstance(module, LAYERS) and not is_computed(module)
    entries = tried(neuron_entries, module, None, _NO_NEURON) if is_plain else None
    if not entries:
        return torch.zeros(0, dtype=torch.bool)
    return torch.stack([_is_zero(entry.parameter, entry.dimension) for entry in entries]).all(0)


def _unheard(module: Any) -> Tensor:
    """Return which inputs of a layer it does not listen to."""
    return _is_zero(module.weight, 0 if getattr(module, "transposed", False) else 1)


def _is_zero(parameter: Tensor, dimension: int = 0) -> Tensor:
    """Return which slices of a parameter are all zero, on the CPU."""
    slices = parameter.detach().movedim(dimension, 0)
    return (slices.reshape(len(slices), -1) == 0).all(1).cpu()
