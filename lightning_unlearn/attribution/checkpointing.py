"""What autograd records of a forward pass, and what to say where it does not record a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

from lightning_unlearn.attribution.layers import LayerPoint


@contextmanager
def naming_what_is_not_recorded(point: LayerPoint) -> Iterator[None]:
    """Say what to do where the logits do not depend, as far as is recorded, on the layer."""
    try:
        yield
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error) and "does not require grad" not in str(error):
            raise
        raise ValueError(not_recorded(point)) from error


def not_recorded(point: LayerPoint) -> str:
    """Return what to say of a layer that no gradient of the logits reaches."""
    return (
        f"Expected gradients of the logits to reach layer '{point.name}', but forward does not record how they depend"
        f" on its {point.at}: it is called inside torch.no_grad(), or something between is detached. Name a later layer"
        " with layer='...', or let forward record."
    )


@contextmanager
def activation_checkpointing_off() -> Iterator[None]:
    """Have ``torch.utils.checkpoint`` keep what a backward pass needs, in place of computing it a second time.

    The second time it would not meet the hooks that were there the first time, and give gradients at another point; and
    its reentrant variant cannot be differentiated from the middle. There is no public switch, so the private names that
    it goes by are replaced (torch 2.6 to 2.11 have the first two; in 2.15 the third does the work of the second; a test
    fails where gradients differ).
    """

    class Called:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return function(*args)

    def generator(function: Any, preserve: bool, context_fn: Any, *_: Any, **__: Any) -> Iterator[None]:
        with context_fn()[0]:
            yield

    def by_keyword(function: Any, args: Any, kwargs: Any, *, context_fn: Any, **_: Any) -> Iterator[None]:
        return generator(function, True, context_fn)

    names = {
        "CheckpointFunction": Called,
        "_checkpoint_without_reentrant_generator": generator,
        "_checkpoint_without_reentrant_generator_impl": by_keyword,
    }
    before = {name: vars(torch.utils.checkpoint)[name] for name in names if name in vars(torch.utils.checkpoint)}
    for name in before:
        setattr(torch.utils.checkpoint, name, names[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.utils.checkpoint, name, value)
