"""Gradient x activation from one forward pass that is recorded from the layer on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution.hooks import single_tensor
from lightning_unlearn.attribution.layers import LayerPoint, per_neuron_magnitude, samples_first
from lightning_unlearn.attribution.oom import is_out_of_memory
from lightning_unlearn.attribution.trace import Forward, version_of
from lightning_unlearn.functional.attribution import logit_difference, runner_up_class
from lightning_unlearn.utilities.sharding import whole

# Gradients of so many elements (64 MB in float32) are held at a time; with more classes they are taken in turns.
_GRADIENT_ELEMENTS = 2**24


class FastPath:
    """Gradient x activation from one forward pass that is recorded from the layer on.

    Args:
        module: the layer.
        point: where to attribute.
        forward: from a batch's input to logits.
    """

    def __init__(self, module: nn.Module, point: LayerPoint, forward: Forward) -> None:
        self._module = module
        self._point = point
        self._forward = forward
        self._batched = True

    def attribute(self, x: Any, label: Tensor, rows: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the margin's attribution, the logits, and, if asked for, the largest attribution over the classes."""
        with _recorded_from(self._module, self._point) as recording:
            out = self._forward(x)
            activation = recording.activation(self._point)
            with torch.enable_grad():
                logits = out.float()
                margin = logit_difference(logits, label, runner_up_class(logits, label)).sum()
            # In eval mode samples do not influence each other: the sum's gradient holds each sample's own.
            (gradient,) = torch.autograd.grad(margin, activation, retain_graph=rows)
            largest = self._largest_gradient(logits, activation, recording.is_head(out)) if rows else None
        activation = activation.detach()
        found, class_max = samples_first(gradient * activation, self._point), None
        if largest is not None:
            attribution = samples_first(largest * activation.float(), self._point)
            class_max = per_neuron_magnitude(self._module, attribution)
        return found, logits.detach(), class_max

    def _largest_gradient(self, logits: Tensor, activation: Tensor, is_head: bool) -> Tensor:
        """Return the largest gradient over the classes, like the activation; float32."""
        if is_head and isinstance(self._module, nn.Linear):
            # The gradient of every sample's logits is the weight.
            return whole(self._module.weight).float().amax(dim=0).expand(activation.shape)
        with torch.enable_grad():
            summed = logits.sum(dim=0)
        largest = torch.tensor(-torch.inf, device=summed.device)
        for one_hot in torch.split(torch.eye(len(summed), device=summed.device), self._classes_at_once(activation)):
            found = self._class_gradients(summed, activation, one_hot).amax(dim=0)
            largest = torch.maximum(largest, found.float())
        return largest

    def _classes_at_once(self, activation: Tensor) -> int:
        return max(1, _GRADIENT_ELEMENTS // activation.numel()) if self._batched else 1

    def _class_gradients(self, summed: Tensor, activation: Tensor, one_hot: Tensor) -> Tensor:
        """Return (c, B, ...), for each row of ``one_hot`` (c, C), in one batched product if all operations allow it."""
        if self._batched:
            try:
                with warnings.catch_warnings():
                    # vmap's notice that an operation has no batching rule and is looped over: slower, not wrong.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return torch.autograd.grad(summed, activation, one_hot, retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._batched = False  # a user's own operation that vmap cannot batch
        gradients = [torch.autograd.grad(summed, activation, row, retain_graph=True)[0] for row in one_hot]
        return torch.stack(gradients)


class _Recording:
    """What the hooks of :func:`_recorded_from` saw.

    Attributes:
        leaves: the layer's activation, for each call of it.
        linear_output: of a Linear whose input is attributed, before other hooks see it; and its version.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self.linear_output: tuple[Tensor, int] | None = None

    def activation(self, point: LayerPoint) -> Tensor:
        """Return the one activation."""
        if len(self.leaves) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(self.leaves)}."
            )
        return self.leaves[0]

    def is_head(self, logits: Tensor) -> bool:
        """Return whether the Linear's output, as it was, is the logits."""
        if self.linear_output is None:
            return False
        output, version = self.linear_output
        return output is logits and version == version_of(logits)


@contextmanager
def _recorded_from(module: nn.Module, point: LayerPoint) -> Iterator[_Recording]:
    """Record nothing up to the layer, and everything from it on, in the forward passes inside the context.

    The layer's activation becomes a leaf of the graph, so that the gradient with respect to it is all that is computed:
    not that of the layers before, nor that of any weight.
    """
    recording = _Recording()

    def start(value: Any) -> Any:
        tensor = single_tensor(value, point)
        # What was made in inference mode can take no part in a graph.
        leaf = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
        recording.leaves.append(leaf)
        # The pass runs inside no_grad, which puts back what it found, also after an exception.
        torch.set_grad_enabled(True)
        # A copy: a function in place may follow, which a leaf forbids, and which would change the activation.
        copy = leaf.clone()
        return (copy,) if isinstance(value, tuple) else copy

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        recording.linear_output = output, version_of(output)

    if point.at == "input":
        handles = [module.register_forward_pre_hook(lambda _, inputs: start(inputs))]
        if type(module) is nn.Linear:
            handles.append(module.register_forward_hook(keep, prepend=True))
    else:
        handles = [module.register_forward_hook(lambda _, __, output: start(output))]
    try:
        with torch.no_grad():
            yield recording
    finally:
        for handle in handles:
            handle.remove()
