"""Arguments as users give them: checked one by one, refused by name, and made plain.

Plain means int, float, bool, str and lists of them: what NumPy, PyTorch or YAML make of a number is a number too, but a
checkpoint that holds it does not load with ``weights_only=True``.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, TypeVar

_Path = TypeVar("_Path", bound="str | os.PathLike[str]")
_LONGEST, _LONGEST_REASON = 60, 300
# The largest int64, which is what tensors and counters hold.
_LARGEST = 2**63 - 1


def shown(value: Any) -> str:
    """Return a value in a message, shortened.

    Example:
        >>> shown("x" * 100)[-5:], shown([1, 2])
        ('...xx', '[1, 2]')
    """
    try:
        text = repr(value)
    except Exception:  # of the user's class, or an int of too many digits
        text = f"a {type(value).__name__}"
    if "\n" in text and len(text) > _LONGEST:
        return f"an object of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 5]}...{text[-3:-1]}"


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line and not too long; without a word, its kind.

    Example:
        >>> reason_of(KeyError("a")), reason_of(MemoryError())
        ("KeyError: 'a'", 'MemoryError')
    """
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"KeyError: {text}" if isinstance(error, KeyError) else text


def plain(value: Any) -> Any:
    """Return the number, bool or text of a NumPy scalar or an array without dimensions; anything else unchanged.

    Example:
        >>> import numpy
        >>> plain(numpy.float32(0.5)), plain([1])
        (0.5, [1])
    """
    if isinstance(value, str):
        # Of a subclass, as numpy.str_ or an Enum, the text alone.
        return str.__str__(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        try:
            return value.item()
        except Exception:  # a tensor without content
            return value
    return value


def _real(value: Any) -> float | int | None:
    """Return a number that is no bool, as int or float; None for anything else."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        return None
    if isinstance(found, numbers.Integral):
        return int(found)
    try:
        return float(found)
    except OverflowError:
        return math.inf


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    meaning: str = "",
) -> float:
    """Return a finite number within bounds.

    Args:
        name: of the argument.
        value: that was given.
        above: what it must be larger than.
        least: what it must not be smaller than.
        below: what it must be smaller than.
        most: what it must not be larger than.
        meaning: what it is, or what else it may be, for the message.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_number("lr", 1, above=0)
        1.0
        >>> check_number("threshold", "x", above=0, below=1)
        Traceback (most recent call last):
        ValueError: Expected threshold to be a number in (0, 1), but got 'x'.
    """
    number = _real(value)
    is_bounded = max(above, least) > -math.inf and min(below, most) < math.inf
    if is_bounded:
        low = f"({above:g}" if above > -math.inf else f"[{least:g}"
        high = f"{below:g})" if below < math.inf else f"{most:g}]"
        outside, other = f"lie in {low}, {high}", f"a number in {low}, {high}"
    elif above > -math.inf:
        outside, other = f"be greater than {above:g}", f"a finite number greater than {above:g}"
    else:
        outside = f"be at least {least:g}"
        other = "a finite number" + (f" of at least {least:g}" if least > -math.inf else "")
    if number is None or not (is_bounded or _is_finite(number)):
        raise ValueError(f"Expected {name} to be {other}{_also(meaning)}, but got {shown(value)}.")
    if not (above < number < below and least <= number <= most):
        raise ValueError(f"Expected {name} to {outside}{_also(meaning)}, but got {shown(plain(value))}.")
    return float(number)


def _is_finite(number: float | int) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float can hold
        return False


def _also(meaning: str) -> str:
    return f", {meaning}" if meaning else ""


def check_whole(name: str, value: Any, *, least: int = 0, most: int = _LARGEST, meaning: str = "") -> int:
    """Return a whole number within bounds; a float without a fraction counts as one.

    Args:
        name: of the argument.
        value: that was given.
        least: the smallest that it may be.
        most: the largest.
        meaning: what it is, or what else it may be, for the message.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_whole("at_epoch", 20.0)
        20
        >>> check_whole("at_epoch", True, least=1)
        Traceback (most recent call last):
        ValueError: Expected at_epoch to be a whole number of at least 1, but got True.
    """
    number = _real(value)
    if number is None or not _is_finite(number) or number != int(number):
        bound = f" of at least {least}" if least > -_LARGEST else ""
        raise ValueError(f"Expected {name} to be a whole number{bound}{_also(meaning)}, but got {shown(value)}.")
    if number < least:
        raise ValueError(f"Expected {name} to be at least {least}{_also(meaning)}, but got {shown(plain(value))}.")
    if number > most:
        raise ValueError(f"Expected {name} to be at most {most:,}{_also(meaning)}, but got {shown(plain(value))}.")
    return int(number)


def check_seed(name: str, value: Any) -> int:
    """Return a whole number that ``torch.Generator.manual_seed`` takes.

    Raises:
        ValueError: naming the argument.
    """
    return check_whole(name, value, least=-_LARGEST)


def check_flag(name: str, value: Any) -> bool:
    """Return True or False, and refuse anything else, texts and numbers included.

    Raises:
        ValueError: naming the argument.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ValueError(f"Expected {name} to be True or False, but got {shown(value)}.")
    return found


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> Any:
    """Return one of the allowed texts; the error names the most similar one.

    Args:
        name: of the argument.
        value: that was given.
        allowed: what it may be.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> check_choice("mode", "ful", ("full", "layers"))
        Traceback (most recent call last):
        ValueError: Expected mode to be 'full' or 'layers', but got 'ful'. Did you mean 'full'?
    """
    found = plain(value)
    if isinstance(found, str) and found in allowed:
        return found
    hint = did_you_mean(found, allowed, cutoff=0.4) if isinstance(found, str) else ""
    quoted = [repr(one) for one in allowed]
    words = f"{', '.join(quoted[:-1])} or {quoted[-1]}" if len(quoted) < 4 else f"one of {', '.join(quoted)}"
    raise ValueError(f"Expected {name} to be {words}, but got {shown(value)}.{hint}")


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Return a hint with the most similar known name, with a leading blank; empty if none is similar."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_text(name: str, value: Any, meaning: str) -> str:
    """Return a text that is not empty.

    Args:
        name: of the argument.
        value: that was given.
        meaning: what it says, for the message.

    Raises:
        ValueError: naming the argument.
    """
    found = plain(value)
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"Expected {name} to be {meaning}, but got {shown(value)}.")
    return found


def _items(value: Any) -> Sequence[Any] | None:
    """Return what a list, a tuple, or an array or tensor of one dimension holds; None for anything else."""
    found = value.tolist() if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") else value
    return found if isinstance(found, Sequence) and not isinstance(found, (str, bytes, bytearray)) else None


def check_names(name: str, value: Any, meaning: str, *, each_once: bool = True) -> list[str]:
    """Return a list of texts. A set or an iterator has no order that can be relied upon.

    Args:
        name: of the argument.
        value: a list or tuple of texts, or an array of them; a single text is refused.
        meaning: what they are, for the message.
        each_once: whether none may be there twice.

    Raises:
        ValueError: naming the argument.
    """
    found = _items(value)
    if found is None:
        got = f"the text {shown(value)}" if isinstance(value, str) else shown(value)
        raise ValueError(f"Expected {name} to be a list of {meaning}, but got {got}.")
    names = [plain(one) for one in found]
    if wrong := [one for one in names if not isinstance(one, str)]:
        raise ValueError(f"Expected {name} to be a list of {meaning}, but got {shown(wrong[0])} among them.")
    if each_once and len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise ValueError(f"Expected {name} to hold each of the {meaning} once, but got {shown(twice)} twice.")
    return names


def check_numbers(name: str, value: Any, **bounds: Any) -> list[float]:
    """Return a list of finite numbers, or one number, which is a list of one.

    Args:
        name: of the argument.
        value: that was given.
        bounds: as for :func:`check_number`, which holds for each.

    Raises:
        ValueError: naming the argument.
    """
    found = _items(value) if _real(value) is None else [value]
    if not found:
        raise ValueError(f"Expected {name} to be a list of numbers, but got {shown(value)}.")
    return [check_number(f"{name}[{at}]", one, **bounds) for at, one in enumerate(found)]


def check_path(name: str, value: _Path, meaning: str) -> _Path:
    """Return a path, as a text or of pathlib.

    Args:
        name: of the argument.
        value: that was given.
        meaning: of what it is the path, for the message.

    Raises:
        ValueError: naming the argument.
    """
    text = value if isinstance(value, str) else os.fspath(value) if isinstance(value, os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(f"Expected {name} to be the path of {meaning}, but got {shown(value)}.")
    return plain(value) if isinstance(value, str) else value
