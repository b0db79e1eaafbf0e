"""Functions of users: what they are called, and whether they can be called as they will be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_unlearn.utilities.checks import plain, shown

_Function = TypeVar("_Function", bound=Callable[..., Any])


def check_function(name: str, value: _Function, meaning: str) -> _Function:
    """Return a function that can be called with one argument.

    Args:
        name: of the argument.
        value: that was given.
        meaning: from what to what it leads, for the message.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_function("logits_from", lambda: 0, "from what forward returns to logits")
        Traceback (most recent call last):
        ValueError: Expected logits_from to be a function from what forward returns to logits, but <lambda> ...
    """
    if not callable(value):
        raise ValueError(f"Expected {name} to be a function {meaning}, but got {shown(value)}.")
    if fault := fault_of_call(value, 1):
        raise ValueError(f"Expected {name} to be a function {meaning}, but {called(value)} {fault}.")
    return value


def called(function: Any) -> str:
    """Return what a function, or an object that can be called, goes by in messages."""
    return str(plain(getattr(function, "__name__", type(function).__name__)))


def fault_of_call(function: Any, count: int) -> str:
    """Return why a function does not take that many positional arguments; empty if it does, or that is unknown."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C say nothing
        return ""
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        return f"cannot be called with {count} positional argument{'s' if count > 1 else ''} ({error})"
    return ""
