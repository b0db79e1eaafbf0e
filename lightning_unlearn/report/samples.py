"""How a sample is shown: as a picture, a sound with its spectrogram, a text, or a table; what a page needs for that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lightning_unlearn.data.batch import LABEL_NAMES
from lightning_unlearn.report.media import Array, data_uri, png, shrunk, spectrogram, wav
from lightning_unlearn.report.tokens import decoded, token_ids
from lightning_unlearn.utilities.calls import check_function
from lightning_unlearn.utilities.checks import check_choice, check_numbers, check_whole, shown

Card = dict[str, Any]
"""What is shown of a sample, JSON: ``kind`` (image, audio, text, table, fault) and what belongs to it."""

# Of the longer side, in pixels; a page shows it no larger.
_THUMBNAIL = 96
_RENDERED = 240
_CHARACTERS = 1500
_ROWS = 40
_TOKENS = (
    "Token ids are shown as numbers. To show text, keep the tokenizer as self.tokenizer, or pass"
    " UnlearnReport(render=...)."
)
_PICTURE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class SampleView:
    """How samples of a data set are shown.

    Args:
        render: from an item of the data set to a text, a table (a dict of names and values), a PIL image, or the bytes
            of a PNG or JPEG file, in place of all that follows.
        mean: that was subtracted from each channel of a picture, or one for all.
        std: by which each was divided. Without both, a picture with values beyond [0, 1] goes from its least to its
            largest value.
        channels: whether those of a picture come ``"first"`` or ``"last"``; by default as its shape looks.
        sample_rate: of sounds, per second; without it, arrays of one dimension are rows of a table.
    """

    render: Callable[[Any], Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    channels: Literal["first", "last"] | None = None
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        if self.render is not None:
            check_function("render", self.render, "from a dataset item to what the report shows")
        plain: dict[str, Any] = {}
        if self.channels is not None:
            plain["channels"] = check_choice("channels", self.channels, ("first", "last"))
        if self.sample_rate is not None:
            plain["sample_rate"] = check_whole("sample_rate", self.sample_rate, least=1)
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"Expected mean and std together, but got mean={shown(self.mean)} and std={shown(self.std)}."
            )
        if self.mean is not None:
            mean, std = check_numbers("mean", self.mean), check_numbers("std", self.std, above=0)
            if len(mean) != len(std):
                raise ValueError(
                    f"Expected mean and std with the same number of channels, but got {len(mean)} and {len(std)}."
                )
            plain |= {"mean": mean, "std": std}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def card(self, sample: Any, budget: int, tokenizer: Any = None) -> Card:
        """Return what is shown of a sample.

        Args:
            sample: an item of the data set.
            budget: about how many bytes it may take.
            tokenizer: whose ``decode`` makes texts of token ids; None where there is none.

        Raises:
            Exception: whatever ``render`` raises.
        """
        if self.render is not None:
            return _rendered(self.render(sample), budget)
        content = content_of(sample)
        tokens = token_ids(content, is_text=tokenizer is not None)
        if tokens is None:
            return self._card(content, budget)
        if tokenizer is None:
            return self._card(content, budget) | {"note": _TOKENS}
        return _text(decoded(tokenizer, tokens), budget)

    def _card(self, content: Any, budget: int) -> Card:
        if isinstance(content, str):
            return _text(content, budget)
        if isinstance(content, Mapping) and {"array", "sampling_rate"} <= content.keys():
            # As Hugging Face's datasets decode a sound.
            return _audio(_sound(np.asarray(content["array"])), int(content["sampling_rate"]), budget)
        if isinstance(content, (Mapping, list, tuple)) and not _is_numbers(content):
            return self._several(content, budget)
        if isinstance(content, (bool, int, float)):
            return _table([("value", content)])
        array = _array(content)
        if array is None:
            return _text(str(content), budget)
        return self._of_array(array, budget)

    def _several(self, content: Any, budget: int) -> Card:
        """Return a sample of several parts: the first picture or sound, else its texts, else a table."""
        named = content if isinstance(content, Mapping) else {str(at): part for at, part in enumerate(content)}
        for part in named.values():
            card = self._card(part, budget) if not isinstance(part, (str, list, tuple)) else {"kind": "text"}
            if card["kind"] in ("image", "audio"):
                return card
        texts = {name: part for name, part in named.items() if isinstance(part, str)}
        if len(texts) == len(named) > 0:
            lines = [f"{name}: {text}" for name, text in texts.items()] if len(texts) > 1 else list(texts.values())
            return _text("\n".join(lines), budget)
        return _table([(str(name), part) for name, part in named.items()])

    def _of_array(self, array: Array, budget: int) -> Card:
        if self.sample_rate is not None and _is_sound(array):
            return _audio(_sound(array), self.sample_rate, budget)
        picture = _picture(array, self.channels)
        if picture is not None:
            return _image(self._bytes(picture), _THUMBNAIL, budget)
        if array.ndim == 1:
            return _table([(str(at), value) for at, value in enumerate(array[: _ROWS + 1].tolist())], len(array))
        return _table([("array", array)])

    def _bytes(self, picture: Array) -> Array:
        """Return a picture (H, W, C) of any numbers as uint8."""
        if picture.dtype == np.uint8:
            return picture
        values = np.nan_to_num(picture.astype(np.float64))
        if self.mean is not None and self.std is not None:
            values = values * np.asarray(self.std) + np.asarray(self.mean)
        else:
            low, high = values.min(), values.max()
            if np.issubdtype(picture.dtype, np.integer) and low >= 0 and 1 < high <= 255:
                low, high = 0, 255
            elif low >= 0 and high <= 1:
                low, high = 0, 1
            values = (values - low) / max(high - low, 1e-12)
        return np.asarray(np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def file_card(path: str) -> Card:
    """Return the name of a sample's file and of its folder, for its card; nothing without a path."""
    return {"file": "/".join(Path(path).parts[-2:])} if path else {}


def content_of(sample: Any) -> Any:
    """Return an item without its label: of names, those that do not say label; of a tuple, all but the last."""
    if dataclasses.is_dataclass(sample) and not isinstance(sample, type):
        sample = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    elif isinstance(sample, tuple) and hasattr(sample, "_asdict"):
        sample = sample._asdict()
    if isinstance(sample, Mapping):
        rest = {name: part for name, part in sample.items() if name not in LABEL_NAMES} or sample
        return next(iter(rest.values())) if len(rest) == 1 else rest
    if isinstance(sample, (tuple, list)) and len(sample) >= 2:
        return sample[0] if len(sample) == 2 else tuple(sample[:-1])
    return sample


def _rendered(shown: Any, budget: int) -> Card:
    if isinstance(shown, str):
        return _text(shown, budget)
    if isinstance(shown, Mapping):
        return _table([(str(name), value) for name, value in shown.items()])
    if isinstance(shown, (bytes, bytearray)):
        kind = next((kind for start, kind in _PICTURE_TYPES.items() if shown.startswith(start)), None)
        if kind is None:
            raise TypeError("Expected render to return the bytes of a PNG or JPEG file, but got other bytes.")
        if len(shown) > (most := budget * 3 // 4):
            raise ValueError(f"Expected render to return images of at most {most:,} bytes, but got {len(shown):,}.")
        return {"kind": "image", "src": data_uri(kind, bytes(shown)), "rendered": True}
    if hasattr(shown, "convert"):
        return _image(np.asarray(shown.convert("RGB")), _RENDERED, budget) | {"rendered": True}
    found = type(shown).__name__
    raise TypeError(f"Expected render to return text, a dict, a PIL image or the bytes of a PNG, but got {found}.")


def _image(pixels: Array, side: int, budget: int) -> Card:
    # A picture that cannot be compressed takes three bytes a pixel, and a third more as text.
    side = max(8, min(side, math.isqrt(budget // 4)))
    gray = pixels.ndim == 3 and pixels.shape[2] == 1
    return {"kind": "image", "src": data_uri("image/png", png(shrunk(pixels[:, :, 0] if gray else pixels, side)))}


def _audio(sound: Array, rate: int, budget: int) -> Card:
    # Half for the sound, half for its picture: two bytes a sample, and a third more as text.
    kept = max(rate // 10, budget * 3 // 16)
    drawn = spectrogram(sound, rate)
    picture = png(drawn)
    if len(picture) * 8 // 3 > budget:
        picture = png(shrunk(drawn, math.isqrt(budget // 8)))
    card = {
        "kind": "audio",
        "src": data_uri("audio/wav", wav(sound[:kept], rate)),
        "picture": data_uri("image/png", picture),
        "note": f"{len(sound) / rate:.2f} s",
    }
    if len(sound) > kept:
        card["note"] += f", of which the player has {kept / rate:.1f} s"
    return card


def _text(text: str, budget: int) -> Card:
    kept = min(_CHARACTERS, budget // 8)
    more = len(text) - kept
    return {"kind": "text", "text": text if more <= 0 else f"{text[:kept]}... ({more:,} more characters)"}


def _table(rows: Sequence[tuple[str, Any]], total: int | None = None) -> Card:
    shown = [[name, _cell(value)] for name, value in rows[:_ROWS]]
    more = (len(rows) if total is None else total) - len(shown)
    return {"kind": "table", "rows": shown + ([["...", f"{more:,} more"]] if more > 0 else [])}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    array = None if isinstance(value, (str, int, bool, type(None))) else _array(value)
    if array is None or array.dtype.kind not in "biuf":
        return str(value)[:300]
    if array.size <= 16:
        return ", ".join(f"{number:.4g}" for number in array.flatten().tolist())
    mean, low, high = (float(x) for x in (array.mean(), array.min(), array.max()))
    return f"{' x '.join(map(str, array.shape))} numbers, mean {mean:.3g}, from {low:.3g} to {high:.3g}"


def _is_numbers(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and all(isinstance(x, (bool, int, float)) for x in content)


def _array(content: Any) -> Array | None:
    if isinstance(content, Tensor):
        return np.asarray(content.detach().cpu().float() if content.is_floating_point() else content.detach().cpu())
    if hasattr(content, "convert") and hasattr(content, "size"):
        # A PIL image, whose palette or mode is no matter here.
        return np.asarray(content.convert("L" if getattr(content, "mode", "") in ("1", "L", "I;16") else "RGB"))
    array = np.asarray(content)
    return array if array.dtype.kind in "biuf" and array.ndim > 0 else None


def _is_sound(array: Array) -> bool:
    if array.dtype.kind not in "fi":
        return False
    return array.ndim == 1 or (array.ndim == 2 and min(array.shape) <= 2 and max(array.shape) > 64)


def _sound(array: Array) -> Array:
    """Return (T,) in [-1, 1], the mean of several channels."""
    if array.ndim == 2:
        array = array.mean(axis=int(array.shape[0] > array.shape[1]))
    values = np.nan_to_num(array.astype(np.float64))
    return np.asarray(values / max(1.0, np.abs(values).max(initial=0.0)))


def _picture(array: Array, channels: str | None) -> Array | None:
    """Return (H, W, C) with one or three channels, or None for what is no picture."""
    if array.ndim == 2 and min(array.shape) >= 4:
        return array[:, :, None]
    if array.ndim != 3:
        return None
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    is_first = first and (not last or array.shape[0] <= array.shape[2]) if channels is None else channels == "first"
    picture = array.transpose(1, 2, 0) if is_first else array
    return picture[:, :, :3] if picture.shape[2] in (1, 3, 4) else None
