"""Texts that a data set holds as token ids, in words again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np


def find_tokenizer(*holders: Any) -> Any:
    """Return the tokenizer that a model, its data or its loader has; None without one.

    It is an attribute ``tokenizer``, also of a collate function, or an argument of one, with a method ``decode``.

    Args:
        holders: of which the first that has one counts.
    """
    for holder in holders:
        bound = [*holder.args, *holder.keywords.values(), holder.func] if isinstance(holder, partial) else []
        owner = getattr(holder, "__self__", None)
        for one in (holder, owner, *bound):
            found = getattr(one, "tokenizer", None)
            named = one if "Tokenizer" in type(one).__name__ else None
            for tokenizer in (found, named):
                if callable(getattr(tokenizer, "decode", None)):
                    return tokenizer
    return None


def token_ids(content: Any, *, is_text: bool) -> list[int] | None:
    """Return the token ids of a sample without those that only pad; None for what are none.

    Args:
        content: of a sample, a dict with ``input_ids`` as tokenizers return it, or the ids alone.
        is_text: whether integers in a row are known to be token ids.
    """
    mask: Any = None
    if isinstance(content, Mapping):
        if "input_ids" not in content:
            return None
        content, mask = content["input_ids"], content.get("attention_mask")
    elif not is_text:
        return None
    if isinstance(content, str):
        return None
    ids = np.asarray(content)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        return None
    if mask is not None and np.asarray(mask).size == ids.size:
        ids = ids[np.asarray(mask).reshape(-1).astype(bool)]
    return [int(one) for one in ids]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of token ids, without start and end markers where the tokenizer can leave them out."""
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    except TypeError:
        return str(tokenizer.decode(ids))
