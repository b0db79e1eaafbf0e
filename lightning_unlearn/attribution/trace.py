"""Which modules a forward pass calls, in what order, and what feeds what."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution.layers import CONV, NORM, LayerPoint, named_layers, neuron_count

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
    """Return whether two tensors are the same memory, perhaps in another shape."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.numel() == other.numel() and one.dtype == other.dtype


def version_of(value: Any) -> int:
    """Return how often a tensor has been changed in place; tensors of inference mode do not count it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class ForwardTrace:
    """The order in which a model's modules are called, seen in one forward pass.

    Args:
        calls: in the order in which the modules were *entered*. Holds the tensors, so that identity tells what feeds
            what: keep a trace only for as long as it is asked.
        output: what the model returned.
    """

    def __init__(self, calls: list[ModuleCall], output: Any) -> None:
        self.calls = calls
        self.output = output

    def calls_of(self, name: str) -> list[ModuleCall]:
        """Return the calls of one module."""
        return [call for call in self.calls if call.name == name]

    def linear(self, name: str) -> nn.Linear:
        """Return the Linear of this name."""
        module = self.calls_of(name)[0].module
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Expected '{name}' to be a Linear, but it is a {type(module).__name__}.")
        return module

    def heads(self, num_classes: int) -> list[str]:
        """Return the dotted paths of the Linears with an output per class, in the order of the calls."""
        linears = [call for call in self.calls if isinstance(call.module, nn.Linear)]
        return [call.name for call in linears if call.module.out_features == num_classes]

    def last_linear(self, num_classes: int) -> str:
        """Return the dotted path of the head: the last Linear, of those behind the logits, with an output per class.

        Raises:
            ValueError: if ``forward`` calls none, or one that is only a part of the head, as with an adapter beside it.
        """
        head = self.head(num_classes)
        if head not in self.heads(num_classes):
            module = self.calls_of(head)[0].module
            raise ValueError(
                f"Expected the head to be a torch.nn.Linear, but '{head}', which makes the logits, is a"
                f" {type(module).__name__} around one; name the layer with layer='...'."
            )
        return head

    def head(self, num_classes: int) -> str:
        """Return the dotted path of what makes class logits of features.

        It is the last Linear with as many outputs as classes, of those that make the logits; or the module around it
        that takes the Linear's input and makes the logits with an adapter's help, as LoRA does.

        Raises:
            ValueError: if ``forward`` calls no such Linear.
        """
        names = self.heads(num_classes)
        if not names:
            raise ValueError(
                f"Expected a model that calls a torch.nn.Linear with {num_classes} outputs, one for each class, but"
                " forward calls none; name the layer with layer='...'."
            )
        made = [name for name in names if self.makes_logits(name)]
        around = [call.name for call in self.calls if self._is_around(call, names) and self.makes_logits(call.name)]
        return (made or around or names)[-1]

    def _is_around(self, call: ModuleCall, names: Sequence[str]) -> bool:
        """Return whether a module gives its own input to one of these that it holds."""
        inside = [name for name in names if name.startswith(f"{call.name}.")]
        taken = [inner.inputs[0] for name in inside for inner in self.calls_of(name) if inner.inputs]
        return bool(call.inputs) and any(value is call.inputs[0] for value in taken)

    def logits_module(self, num_classes: int) -> str | None:
        """Return the dotted path of the module whose output ``forward`` returns as logits; None if there is none.

        Args:
            num_classes: C.
        """
        made = [call for call in self.calls if self.makes_logits(call.name)]
        # Of those within each other only such as pass on what the outermost returns, not what it casts or adds to.
        names = [call.name for call in made if is_same(call.output, made[0].output)]
        heads = [name for name in self.heads(num_classes) if name in names]
        candidates = heads or names
        return candidates[-1] if candidates else None

    def first_blocks(self, batch: int) -> list[LayerPoint]:
        """Return where the first block of the model has seen the input.

        It is the input of the second convolution, which is what the first convolution, its norm, activation and pooling
        make of the input; without two convolutions at the start, the output of the first Linear or convolution.

        Args:
            batch: number of samples in this pass.

        Returns:
            the one, and the layer to take where it has no row for each sample; each is called just once.
        """
        layers = [call for call in self.calls if isinstance(call.module, (nn.Linear, CONV)) and call.inputs]
        found = [(LayerPoint(call.name, "output"), call.output) for call in layers[:1]]
        if all(isinstance(call.module, CONV) for call in layers[:2]):
            found = [(LayerPoint(call.name, "input"), call.inputs[0]) for call in layers[1:2]] + found
        return [
            point
            for point, value in found
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and batch in value.shape
            and len(self.calls_of(point.name)) == 1
        ]

    def makes_logits(self, name: str) -> bool:
        """Return whether a layer's output is what ``forward`` returns as logits: the same tensor, or a cast of it.

        Equal numbers do not suffice: what is added later may be zero now, as an adapter is when it is new.
        """
        calls = self.calls_of(name)
        # What is changed in place afterwards is another thing than what a hook on the layer sees.
        if len(calls) != 1 or version_of(calls[0].output) != calls[0].output_version:
            return False
        made = calls[0].output
        if not isinstance(made, Tensor) or made.shape not in (self.output.shape, self.output.squeeze(1).shape):
            return False
        if is_same(made, self.output):
            return True
        if made.dtype == self.output.dtype:
            return False
        made = made.reshape(self.output.shape)
        # A broken sample makes both NaN, which is equal to nothing.
        broken = made.isnan() & self.output.isnan()
        return bool(((made == self.output) | broken).all()) and not bool(broken.all())

    def producer_of(self, head: str) -> str | None:
        """Return the layer whose neurons are, one to one, the input features of ``head``.

        It is the nearest Linear or convolution before it if that has as many outputs as the head has inputs. Whether
        nothing but element-wise functions and pooling lies between is for the caller to check by its effect.
        """
        features = self.linear(head).in_features
        before = [call for call in self._before(head) if isinstance(call.module, (nn.Linear, CONV))]
        return before[-1].name if before and neuron_count(before[-1].module) == features else None

    def norm_after(self, name: str) -> str | None:
        """Return the norm that takes the output of this layer directly, if there is one.

        An addition in place between the two, as in a residual block, keeps the tensor but is not direct.
        """
        layer = self.calls_of(name)[0]
        for call in self.calls:
            if isinstance(call.module, NORM) and any(
                value is layer.output and version == layer.output_version
                for value, version in zip(call.inputs, call.versions, strict=True)
            ):
                return call.name
        return None

    def modules_before(self, name: str) -> list[str]:
        """Return modules that were entered before this one, without those that contain it."""
        return [call.name for call in self._before(name) if not name.startswith(f"{call.name}.")]

    def _before(self, name: str) -> list[ModuleCall]:
        first = next(i for i, call in enumerate(self.calls) if call.name == name)
        return self.calls[:first]


def trace_forward(model: nn.Module, forward: Forward, x: Any) -> ForwardTrace:
    """Run the model once and record which of its submodules are called, in what order, with what."""
    calls: list[ModuleCall | None] = []
    entered: dict[nn.Module, list[tuple[int, tuple[int, ...]]]] = {}
    handles = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.setdefault(module, []).append((len(calls), tuple(version_of(value) for value in inputs)))
        calls.append(None)

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            position, versions = entered[module].pop()
            calls[position] = ModuleCall(name, module, tuple(inputs), output, versions, version_of(output))

        return hook

    try:
        for name, module in named_layers(model).items():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave(name)))
        with torch.no_grad():
            output = forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return ForwardTrace([call for call in calls if call is not None], output)


def check_reached(trace: ForwardTrace, point: LayerPoint) -> None:
    """Refuse a layer that ``forward`` does not call exactly once, or whose input it hands over by keyword.

    Raises:
        ValueError: naming the layer and how often it was called.
    """
    name, at = point.name, point.at
    count = len(trace.calls_of(name))
    if count == 0:
        called = [call.name for call in trace.calls]
        near = difflib.get_close_matches(name, called, n=5, cutoff=0.3) or called[-5:]
        raise ValueError(
            f"Layer '{name}' exists but is never reached in forward, so it has no activations to read."
            f" Layers that are reached: {', '.join(near)}."
        )
    if at == "input" and not trace.calls_of(name)[0].inputs:
        raise ValueError(
            f"Layer '{name}' is called with keyword arguments, so its input cannot be read; name the layer before it,"
            " whose output is the same, with layer='...'."
        )
    if count > 1:
        raise ValueError(
            f"Layer '{name}' is called {count} times in one forward pass, so its activations do not belong to one"
            " place; name a layer that is called once."
        )
