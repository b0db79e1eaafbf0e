"""What a picture looks like from afar, in 64 bytes: nearly equal for pictures that are nearly equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

_SIDE = 8
BYTES = _SIDE * _SIDE
# Of a standard deviation; what is more than eight of them from the mean is cut off.
_STEPS = 16
_CHANNELS = (1, 3, 4)
# Pixels that are looked at, down and right.
_MOST = 64


def perceptual_hash(x: Any, total: int) -> Tensor:
    """Return 8 x 8 standardized gray pixels of each image of a batch.

    The hash does not depend on brightness, contrast, or details finer than an eighth of a side (noise, JPEG, size).

    Args:
        x: a tensor (B, C, H, W) or (B, H, W, C) of one, three or four channels, a list of B such tensors without the
            first dimension, or a container of these, of which the first is used.
        total: B.

    Returns:
        (B, 64) int8 on the CPU, in sixteenths of a standard deviation; zeros if there is no image, or for one of a
        single shade.

    Example:
        >>> x = torch.rand(1, 3, 32, 32)
        >>> a, b = perceptual_hash(torch.cat([x, 0.9 * x + 0.01 * torch.rand_like(x)]), 2).float() / 16
        >>> (a - b).square().mean().sqrt().item() < 0.15
        True
    """
    pictures = _pictures(x, total)
    if pictures is None:
        return torch.zeros(total, BYTES, dtype=torch.int8)
    small = torch.cat([_small(one) for one in pictures])
    small = small - small.mean(dim=1, keepdim=True)
    scale = small.square().mean(dim=1, keepdim=True).sqrt()
    # Rounding is not a picture.
    is_flat = (scale <= 1e-6 * small.abs().amax().clamp(min=1)) | ~scale.isfinite()
    values = torch.where(is_flat, 0.0, small / scale.clamp(min=1e-30)).nan_to_num(0.0)
    return (values * _STEPS).round().clamp(-127, 127).to(torch.int8)


def _small(pictures: Tensor) -> Tensor:
    """Return (B, 64) float32 on the CPU, of (B, C, H, W), or of channels last."""
    rows = pictures.detach()
    rows = rows if rows.shape[1] in _CHANNELS else rows.movedim(3, 1)
    # The mean of some of the pixels will do where there are many.
    down, right = (max(1, side // _MOST) for side in rows.shape[2:])
    with torch.autocast(rows.device.type, enabled=False):
        return adaptive_avg_pool2d(rows[:, :, ::down, ::right].float(), _SIDE).mean(dim=1).flatten(1).cpu()


def _pictures(x: Any, total: int) -> list[Tensor] | None:
    """Return the first images of an input, for the batch or per sample; None if there are none."""
    if isinstance(x, Tensor):
        return [x] if len(x.shape) == 4 and len(x) == total and _is_picture(x[0]) else None
    if isinstance(x, list) and len(x) == total and all(isinstance(one, Tensor) and _is_picture(one) for one in x):
        return [one.unsqueeze(0) for one in x]
    parts = x.values() if isinstance(x, dict) else x
    if not isinstance(x, (dict, list, tuple)):
        return None
    return next((found for part in parts if (found := _pictures(part, total)) is not None), None)


def _is_picture(one: Tensor) -> bool:
    if one.ndim != 3 or one.is_complex() or one.layout != torch.strided or one.is_quantized:
        return False
    height, width = one.shape[1:] if one.shape[0] in _CHANNELS else one.shape[:2]
    return (one.shape[0] in _CHANNELS or one.shape[2] in _CHANNELS) and min(height, width) >= _SIDE
