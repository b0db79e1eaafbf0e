"""The layers of a model: their names, and which dimension of what they return counts neurons."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from lightning_unlearn.functional.attribution import neuron_magnitude
from lightning_unlearn.types import LayerPoint

# Convolutions and their norms have the neuron (channel) in dimension 1, everything else in the last one.
CONV = nn.modules.conv._ConvNd
_CHANNEL_FIRST = (CONV, nn.modules.batchnorm._NormBase, nn.GroupNorm)
NORM = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


# What torch.compile, and torch's wrapper for activation checkpointing, put into dotted paths.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A dotted path as the model's author writes it, without what wrappers put in.

    Example:
        >>> plain_name("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules by :func:`plain_name`; of a wrapper and what it wraps, what it wraps."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    modules.pop("", None)
    return modules


def resolve_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path, with or without what wrappers put into it.

    Raises:
        ValueError: if there is none; the message lists the nearest names.
    """
    modules = named_layers(model)
    if plain_name(name) in modules:
        return modules[plain_name(name)]
    near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or list(modules)[:10]
    raise ValueError(
        f"Expected layer to be the dotted path of a module of {type(model).__name__}, but got '{name}'."
        f" The nearest names are: {', '.join(near) or 'none, it has no submodules'}."
    )


def neuron_count(module: nn.Module) -> int:
    """Number of neurons of a Linear or convolution.

    Raises:
        ValueError: for any other module, whose outputs are not rows of one parameter.
    """
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, CONV):
        return module.out_channels
    raise ValueError(f"Expected a Linear or a convolution, but got a {type(module).__name__}.")


def neuron_dimension(module: nn.Module, ndim: int) -> int:
    """The dimension of a layer's input or output, of ``ndim`` dimensions, that counts neurons."""
    if isinstance(module, _CHANNEL_FIRST):
        return 1
    return ndim - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) or ndim < 4 else 1


def response(model: nn.Module, point: LayerPoint, activation: Tensor) -> Tensor:
    """How strongly a layer responds: the norms, over its neurons, of their means and of their spreads over positions.

    Noise on an input raises or lowers a rectified channel's mean, and its spread, alike in every place; these two
    numbers tell corrupted images apart at an early layer, where deeper ones, trained to ignore it, do not.

    Args:
        model: holds the layer.
        point: which.
        activation: (B, ...), what the layer took or returned.

    Returns:
        (B, 2) float32; (B, 1), the norm, of a layer without positions.
    """
    by_neuron = activation.float().movedim(neuron_dimension(resolve_layer(model, point.name), activation.ndim), 1)
    if by_neuron.ndim == 2:
        return by_neuron.square().sum(dim=1, keepdim=True).sqrt()
    # Not torch.std_mean, which takes some twenty times as long on a processor. From the first position on, so that what
    # is the same in every place has a spread of exactly 0.
    by_position = by_neuron.flatten(2)
    first = by_position[:, :, :1]
    offset = by_position - first
    mean = offset.mean(dim=2, keepdim=True)
    spread = (offset - mean).square().mean(dim=2).sqrt()
    return torch.stack([(first + mean).squeeze(2), spread], dim=1).square().sum(dim=2).sqrt()


def neuron_means(activation: Tensor, dimension: int) -> Tensor:
    """One number per neuron: the mean over positions (pixels, tokens).

    Args:
        activation: (B, ..., D, ...).
        dimension: the one that counts neurons.

    Returns:
        (B, D)
    """
    return activation.movedim(dimension, 1).reshape(len(activation), activation.shape[dimension], -1).mean(dim=2)


def per_neuron_magnitude(module: nn.Module, attribution: Tensor) -> Tensor:
    """(B, D), the magnitude of an attribution that is shaped like the input or output of a layer."""
    return neuron_magnitude(attribution.movedim(neuron_dimension(module, attribution.ndim), 1))
