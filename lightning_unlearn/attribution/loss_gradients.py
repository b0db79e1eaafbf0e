"""Gradients of the loss at layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_unlearn.attribution.checkpointing import activation_checkpointing_off, not_recorded
from lightning_unlearn.attribution.hooks import single_tensor
from lightning_unlearn.attribution.layers import LayerPoint, resolve_layer, samples_first
from lightning_unlearn.attribution.trace import Forward


def loss_gradients(
    model: nn.Module, points: Sequence[LayerPoint], forward: Forward, x: Any, label: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return activations of some layers, and the gradient there of each sample's cross-entropy of its given label.

    Call in eval mode, since samples of a batch must not influence each other. No ``.grad`` is touched.

    Args:
        model: holds the layers.
        points: which; each is called once in a forward pass.
        forward: from a batch's input to logits.
        x: the model's input for B samples.
        label: (B,) int64, -1 for one that does not count.

    Returns:
        for each layer its activation and the gradient, both shaped like what the layer took or returned, with the
        samples first.

    Raises:
        ValueError: for a layer with several tensors, or one that is not called exactly once, or whose effect on the
            logits is not recorded.
    """
    seen: list[list[Tensor]] = [[] for _ in points]

    def mark(at: int, value: Any) -> Any:
        tensor = single_tensor(value, points[at])
        if not tensor.requires_grad:
            # Of what lies before, nothing is recorded: its parameters are frozen.
            tensor = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
        seen[at].append(tensor)
        # A copy, since a function in place may follow.
        copy = tensor.clone()
        return (copy,) if isinstance(value, tuple) else copy

    with ExitStack() as stack:
        for at, point in enumerate(points):
            module = resolve_layer(model, point.name)
            if point.at == "input":
                handle = module.register_forward_pre_hook(lambda _, inputs, at=at: mark(at, inputs))
            else:
                handle = module.register_forward_hook(lambda _, __, output, at=at: mark(at, output))
            stack.callback(handle.remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(activation_checkpointing_off())
        loss = cross_entropy(forward(x).float(), label, reduction="sum", ignore_index=-1)
    for point, calls in zip(points, seen, strict=True):
        if len(calls) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(calls)}."
            )
    if not loss.requires_grad:
        raise ValueError("Expected a forward that can be differentiated, but it switches recording off.")
    activations = [calls[0] for calls in seen]
    gradients = torch.autograd.grad(loss, activations, allow_unused=True)
    return [_reached(point, a.detach(), g) for point, a, g in zip(points, activations, gradients, strict=True)]


def _reached(point: LayerPoint, activation: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    if gradient is None:
        raise ValueError(not_recorded(point))
    return samples_first(activation, point), samples_first(gradient, point)
