"""Pictures and sounds as files in memory, to be put into a page: PNG and WAV, by the standard library and NumPy."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

Array = npt.NDArray[Any]

_WINDOW = 256
# A dark-to-light ramp through violet and orange, whose brightness rises evenly.
_RAMP = np.array([[6, 4, 30], [80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]], dtype=np.float64)
# Of a spectrogram, what lies so far below the loudest is black.
_DECIBELS = 80.0


def data_uri(kind: str, content: bytes) -> str:
    """Return the content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png(pixels: Array) -> bytes:
    """Return a PNG file.

    Args:
        pixels: (H, W) gray, or (H, W, 3) red, green and blue, uint8.

    Example:
        >>> png(np.zeros((2, 3), dtype=np.uint8))[1:4]
        b'PNG'
    """
    height, width = pixels.shape[:2]
    color = 2 if pixels.ndim == 3 else 0
    # Each row begins with the number of its filter, 0 for none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def wav(sound: Array, rate: int) -> bytes:
    """Return a WAV file of 16 bits.

    Args:
        sound: (T,) in [-1, 1]; louder is cut off.
        rate: samples per second.
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def shrunk(pixels: Array, side: int) -> Array:
    """Return the picture with no side longer than so many pixels, each the mean of those it stands for.

    Args:
        pixels: (H, W) or (H, W, 3) uint8.
        side: at least 1.
    """
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    scale = side / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    planes = torch.from_numpy(pixels.reshape(height, width, -1).copy()).permute(2, 0, 1).float()
    small = interpolate(planes.unsqueeze(0), size=size, mode="area")[0].permute(1, 2, 0)
    return small.round().to(torch.uint8).numpy().reshape(*size, *pixels.shape[2:])


def spectrogram(sound: Array, rate: int) -> Array:
    """Return how loud each frequency is over time, low ones at the bottom.

    Args:
        sound: (T,) float.
        rate: samples per second.

    Returns:
        (H, W, 3) uint8, no wider than 300.
    """
    padded = np.pad(sound, (0, max(0, _WINDOW - len(sound))))
    hop = max(_WINDOW // 4, (len(padded) - _WINDOW) // 300 + 1)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=1)) ** 2
    # Of speech and music, hardly anything is above 8 kHz.
    highest = min(power.shape[1], int(8000 / (rate / _WINDOW)) + 1)
    level = 10 * np.log10(power[:, :highest].T[::-1] + 1e-10)
    shade = np.clip((level - level.max() + _DECIBELS) / _DECIBELS, 0, 1)
    at = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(shade, at, channel) for channel in _RAMP.T], axis=2).astype(np.uint8)
