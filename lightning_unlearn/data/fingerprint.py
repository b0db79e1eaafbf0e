"""Fingerprint of a dataset, to detect that a fit is resumed, or a partition used, with different data."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.dataset_state import unopened

SAMPLED = 16
_DIGITS = 8
# Hex digits per item in a short fingerprint: enough, since several items of different datasets differ.
_DIGITS_OF_MARK = 2
_MARK = re.compile(r"n(\d+)-((?:[0-9a-f]{2})*)")
# Items that vary rarely may be equal in two readings. They must not count as different data later.
MOST_CHANGED = 0.25


def sampled_indices(total: int) -> Tensor:
    """Return (n,) int64, up to 16 dataset indices, spread evenly from the first to the last.

    Example:
        >>> sampled_indices(31).tolist()
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    """
    count = min(total, SAMPLED)
    return torch.arange(count) * (total - 1) // max(count - 1, 1)


def fingerprint(loader: DataLoader[Any]) -> str:
    """Return the length of a loader's dataset, and a hash of each of 16 items as ``__getitem__`` returns them.

    Items are read twice, with different seeds of the global random states. If they differ, for example under random
    augmentation, the fingerprint is the length alone. If the loader has a ``worker_init_fn``, items are read in a
    worker. The caller must restore the global random states.

    Args:
        loader: loader of a map-style dataset with a length.

    Example:
        >>> fingerprint(DataLoader([(torch.rand(2), k) for k in range(10)])).split(":")[0]
        '10'
    """
    total = len(loader.dataset)  # type: ignore[arg-type]
    first, second = (_read(loader, sampled_indices(total), seed) for seed in (0, 1))
    return f"{total}:{''.join(first) if first == second else ''}"


def fingerprint_of_keys(keys: Sequence[Any]) -> str:
    """Return the fingerprint of samples identified by key: their number, and a hash of each of 16 keys.

    Args:
        keys: N keys in ascending order.
    """
    return f"{len(keys)}:{''.join(digest(keys[at]) for at in sampled_indices(len(keys)).tolist())}"


def varies(fingerprint: str) -> bool:
    """Return whether items differed from one reading to the next."""
    return fingerprint.endswith(":")


def share_changed(before: str, now: str) -> float:
    """Return the fraction of the sampled items whose content differs between two fingerprints, in [0, 1].

    It is 0 if unknown (random augmentation, no fingerprint) and 1 for different lengths.

    Example:
        >>> share_changed("20:0000000011111111", "20:0000000022222222"), share_changed("20:00000000", "20:")
        (0.5, 0.0)
    """
    if not before or not now:
        return 0.0
    return _share_changed(before.split(":"), now.split(":"), _DIGITS)


def check_fingerprint(before: str, now: str) -> None:
    """Check that the data are the same as before.

    Raises:
        ValueError: if the length, or more than a quarter of the sampled items, differ.
    """
    share = share_changed(before, now)
    if share > MOST_CHANGED:
        raise ValueError(
            f"Expected the training data that the checkpoint was made with, but {share:.0%} of {SAMPLED} sampled"
            " items have another content; use the same data, or train without ckpt_path. If only the"
            " preprocessing has changed, on purpose, pass data=DataFormat(verify=False)."
        )


def short_fingerprint(fingerprint: str) -> str:
    """Shorten a fingerprint to a word that spreadsheets do not convert to a number, time or formula.

    Example:
        >>> short_fingerprint("20:00aaaaaa11bbbbbb"), short_fingerprint("20:"), short_fingerprint("")
        ('n20-0011', 'n20-', '')
    """
    size, colon, content = fingerprint.partition(":")
    if not colon:
        return ""
    return f"n{size}-{''.join(piece[:_DIGITS_OF_MARK] for piece in _pieces(content))}"


def is_short_fingerprint(text: str) -> bool:
    """Return whether a string has the form that :func:`short_fingerprint` returns."""
    return text == "" or _MARK.fullmatch(text) is not None


def fraction_changed(mark: str, fingerprint: str) -> float:
    """Return the fraction of the sampled items that differ between a short and a full fingerprint, in [0, 1].

    See :func:`share_changed`; more than a quarter means a different dataset.

    Example:
        >>> (
        ...     fraction_changed("n20-0011", "20:00aaaaaa22bbbbbb"),
        ...     fraction_changed("n20-", "20:00aaaaaa"),
        ...     fraction_changed("n9-", "20:"),
        ... )
        (0.5, 0.0, 1.0)
    """
    now = short_fingerprint(fingerprint)
    if not mark or not now:
        return 0.0
    return _share_changed(mark.split("-"), now.split("-"), _DIGITS_OF_MARK)


def _share_changed(before: Sequence[str], now: Sequence[str], digits: int) -> float:
    (size, content), (other_size, other_content) = before, now
    if size != other_size:
        return 1.0
    pairs = list(zip(_pieces(content, digits), _pieces(other_content, digits), strict=False))
    return sum(one != other for one, other in pairs) / len(pairs) if pairs else 0.0


def _pieces(content: str, digits: int = _DIGITS) -> Iterator[str]:
    return (content[at : at + digits] for at in range(0, len(content), digits))


def _read(loader: DataLoader[Any], index: Tensor, seed: int) -> list[str]:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the global one, which augmentation may draw from)
    torch.manual_seed(seed)
    own: dict[str, Any] = {}
    if loader.worker_init_fn is not None and loader.num_workers > 0:
        own = {
            "num_workers": 1,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    # A new loader, since iterating a copy of the user's subclass may have side effects.
    items: Any = DataLoader(loader.dataset, batch_size=SAMPLED, sampler=index.tolist(), collate_fn=_digests, **own)
    with unopened(loader) if not own else nullcontext():
        return [digest for digests in items for digest in digests]


def _digests(items: Sequence[Any]) -> list[str]:
    """Collate items to their hashes; defined at module level so that workers can pickle it."""
    return [digest(item) for item in items]


def digest(item: Any) -> str:
    """Return a hash of an item's content: tensors, arrays, images, numbers, strings, and containers of these."""
    found = blake2b(digest_size=_DIGITS // 2)
    for part in _content(item):
        # With its length, so that different items do not concatenate to the same bytes.
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _content(item: Any) -> Iterator[bytes]:
    """Yield the bytes of an item: of tensors, arrays, images, numbers, strings and containers; else the class name."""
    if isinstance(item, Tensor):
        item = _as_array(item)
    elif isinstance(item, str) and "\n" not in item and PurePath(item).is_absolute():
        # The folder may differ between machines and jobs.
        item = PurePath(item).name
    parts = _parts_of(item)
    if parts is not None:
        yield str(len(parts)).encode()
        for part in parts:
            yield from _content(part)
    elif item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        yield repr(item).encode()
    elif callable(getattr(item, "tobytes", None)):
        # NumPy arrays and scalars, and PIL images.
        yield " ".join(str(getattr(item, name, "")) for name in ("dtype", "shape", "mode", "size")).encode()
        yield item.tobytes()
    else:
        yield type(item).__qualname__.encode()


def _parts_of(item: Any) -> list[Any] | None:
    """Return the parts of an item; None if it is not a container."""
    if isinstance(item, Mapping):
        return [part for pair in item.items() for part in pair]
    if isinstance(item, (list, tuple)):
        return list(item)
    if isinstance(item, np.ndarray) and item.dtype.hasobject:
        return list(item.flat)
    if is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, field.name) for field in fields(item)]
    return None


def _as_array(tensor: Tensor) -> Any:
    """Return a tensor as a NumPy array, bit for bit (bytes if NumPy lacks the dtype); the class for a sparse tensor."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type == "meta":
        return type(tensor)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.dtype == torch.bfloat16 or "float8" in str(plain.dtype):
        return (str(plain.dtype), list(plain.shape), plain.reshape(-1).view(torch.uint8).numpy())
    return plain.numpy()
