"""The layers of a model: their names, and which dimension of what they return counts neurons."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.functional.attribution import neuron_magnitude


@dataclass(frozen=True)
class LayerPoint:
    """Where in a model activations are read.

    Args:
        name: dotted path of the layer in the LightningModule.
        at: the layer's ``"input"`` or its ``"output"``.
        samples: the dimension there that counts samples, 1 for a time-first layer.
    """

    name: str
    at: Literal["input", "output"] = "output"
    samples: int = 0

    def __str__(self) -> str:
        return f"{self.at} of '{self.name}'"


# Convolutions and their norms have the neuron (channel) in dimension 1, everything else in the last one.
CONV = nn.modules.conv._ConvNd
BATCH_NORM = nn.modules.batchnorm._NormBase
_CHANNEL_FIRST = (CONV, BATCH_NORM, nn.GroupNorm)
NORM = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm)


# What torch.compile, and torch's wrapper for activation checkpointing, put into dotted paths.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Return a dotted path as the model's author writes it, without what wrappers put in.

    Example:
        >>> plain_name("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules by :func:`plain_name`; of a wrapper and what it wraps, what it wraps."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    modules.pop("", None)
    return modules


def resolve_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module at a dotted path, with or without what wrappers put into it.

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
    """Return the number of neurons of a Linear or convolution.

    Raises:
        ValueError: for any other module, whose outputs are not rows of one parameter.
    """
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, CONV):
        return module.out_channels
    raise ValueError(f"Expected a Linear or a convolution, but got a {type(module).__name__}.")


def neuron_dimension(module: nn.Module, ndim: int) -> int:
    """Return the dimension of a layer's input or output, of ``ndim`` dimensions, that counts neurons."""
    if isinstance(module, _CHANNEL_FIRST):
        return 1
    return ndim - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) or ndim < 4 else 1


def samples_first(value: Tensor, point: LayerPoint) -> Tensor:
    """Return what a layer takes or returns, with the dimension that counts samples in front."""
    return value.movedim(point.samples, 0)


# A row is the same sample's if no more than this share of the activation differs (in half precision, or where sums are
# in another order), if it is at least so much nearer to it than to the sample that was in that place, or if it differs
# no more than a second pass does, where forward draws at random.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_NEARER = 0.7
_AS_RANDOM = 1.5


def sample_dimension(
    whole: Tensor, part: Tensor | None, reverse: Tensor | None, samples: int, fewer: int, again: Tensor | None = None
) -> int | None:
    """Return which dimension of an activation counts the samples of its batch, in their order.

    Args:
        whole: of B samples.
        part: of so many fewer (of one: of the same twice); None where that is not known.
        reverse: of the B samples in reverse order; None where that is not known.
        samples: B.
        fewer: how many the part is of.
        again: like the first, of a second pass.

    Returns:
        None if there is no such dimension.

    Example:
        >>> steps = torch.randn(3, 3, 5)  # time first
        >>> sample_dimension(steps, steps[:, :2], steps.flip(1), 3, 2)
        1
    """
    for dimension, size in enumerate(whole.shape):
        follows = part is None or (part.ndim == whole.ndim and part.shape[dimension] == fewer)
        if size == samples and follows and _is_reversed(whole, reverse, dimension, again):
            return dimension
    return None


def _is_reversed(whole: Tensor, reverse: Tensor | None, dimension: int, again: Tensor | None) -> bool:
    if reverse is None or not whole.is_floating_point():
        return True
    if reverse.shape != whole.shape:
        return False
    second = whole if again is None or again.shape != whole.shape else again
    one, other, second = (value.float().nan_to_num(0, 0, 0) for value in (whole, reverse, second))
    moved, stayed = (other - one.flip(dimension)).norm(), (other - one).norm()
    allowed = (_SAME.get(whole.dtype, 2e-2) * one.norm()).maximum(_AS_RANDOM * (second - one).norm())
    return bool(moved <= allowed) or bool(moved < _NEARER * stayed)


def response(model: nn.Module, point: LayerPoint, activation: Tensor) -> Tensor:
    """Return how strongly a layer responds: norms, over its neurons, of spatial means and standard deviations.

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
    """Return one number per neuron: the mean over positions (pixels, tokens).

    Args:
        activation: (B, ..., D, ...).
        dimension: the one that counts neurons.

    Returns:
        (B, D)
    """
    return activation.movedim(dimension, 1).reshape(len(activation), activation.shape[dimension], -1).mean(dim=2)


def per_neuron_magnitude(module: nn.Module, attribution: Tensor) -> Tensor:
    """Return (B, D), the magnitude of an attribution that is shaped like the input or output of a layer."""
    return neuron_magnitude(attribution.movedim(neuron_dimension(module, attribution.ndim), 1))
