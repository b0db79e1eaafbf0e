"""Drawings as inline SVG, colored by the page's style sheet, so that they follow light, dark and print."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from itertools import islice
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

# Pixels that a letter of a drawing is wide, at most.
_LETTER = 8.5

# Of a name, more are not looked at: marks on a letter take no room, and there may be millions.
_MOST_LETTERS = 500

LEFT, BOTTOM = 56, 34
"""Pixels that the axes of a chart take."""


class SvgCanvas:
    """An SVG of a given size, of which every text is escaped.

    Args:
        width: in pixels.
        height: likewise.
        label: what it shows, for screen readers.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height = width, height
        view = f"0 0 {width:g} {height:g}"
        self._root = ElementTree.Element("svg", {"viewBox": view, "role": "img", "aria-label": label})
        # On a narrow screen it shrinks, on a wide one it does not grow beyond its size.
        self._root.set("width", f"{width:g}")

    def add(self, tag: str, text: str = "", hint: str = "", **attributes: Any) -> None:
        """Add an element of class ``class_``; ``_`` in a name means ``-``, ``hint`` is shown under the pointer."""
        named = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
        element = ElementTree.SubElement(self._root, tag, named)
        element.text = text
        if hint:
            ElementTree.SubElement(element, "title").text = hint

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str = "axis") -> None:
        """Add a line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def text(self, x: float, y: float, text: str, class_: str = "", **attributes: Any) -> None:
        """Add a text."""
        self.add("text", text, x=x, y=y, class_=class_, **attributes)

    def markup(self) -> Markup:
        """Return the markup for a page."""
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))


def _number(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def width_of(text: str) -> int:
    """Return the width of a text in letters, roughly: wide signs count twice, combining marks not at all.

    Example:
        >>> width_of("cat"), width_of("\u72fc"), width_of("e\u0301")
        (3, 2, 1)
    """
    wide = [2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text if not unicodedata.combining(sign)]
    return sum(wide)


def shortened(text: str, most: int) -> str:
    """Return the text, no wider than so many letters: its beginning and its end, by which long names differ.

    Example:
        >>> shortened("class number 17", 12), shortened("cat", 12)
        ('class n\u2026r 17', 'cat')
    """
    # A letter at a time and no further than what is shown: a name may be of any length.
    if _fitting(text, most) == len(text):
        return text
    head, tail = _fitting(text, most - 1 - most // 3), _fitting(reversed(text), most // 3)
    return f"{text[:head]}\u2026{text[len(text) - tail :]}"


def _fitting(letters: Iterable[str], most: int) -> int:
    """Return how many letters fit into ``most``, combining marks that follow the last of them included."""
    count, width = 0, 0
    for letter in islice(letters, _MOST_LETTERS):
        width += width_of(letter)
        if width > most:
            break
        count += 1
    return count


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from ``low`` to ``high``.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(at * step, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


class SvgAxes:
    """A drawing with two axes, in whose values one draws.

    Args:
        size: of the drawing, in pixels; below the plot there may be more.
        x: the least and the largest value from left to right.
        y: likewise from bottom to top.
        label: what it shows.
        below: pixels below the plot.
    """

    def __init__(
        self, size: tuple[float, float], x: tuple[float, float], y: tuple[float, float], label: str, below: float = 0
    ) -> None:
        self.canvas = SvgCanvas(size[0], size[1] + below, label)
        self.left, self.top = float(LEFT), 24.0
        self.width, self.height = size[0] - LEFT - 14, size[1] - BOTTOM - self.top
        self._x, self._y = x, y

    @property
    def bottom(self) -> float:
        """Pixels from the top to the lower axis."""
        return self.top + self.height

    def x(self, value: float) -> float:
        """Return pixels from the left."""
        low, high = self._x
        return self.left + self.width * (value - low) / max(high - low, 1e-12)

    def y(self, value: float) -> float:
        """Return pixels from the top."""
        low, high = self._y
        return self.bottom - self.height * (value - low) / max(high - low, 1e-12)

    def row(self, value: float, text: str, class_: str = "grid") -> None:
        """Add a line from left to right with its text."""
        self.canvas.line(self.left, self.y(value), self.left + self.width, self.y(value), class_)
        self.canvas.text(self.left - 6, self.y(value) + 4, text, "end")

    def mark(self, value: float, text: str = "") -> None:
        """Add a dashed line from top to bottom, with a text above it, on the side on which there is room."""
        x = self.x(value)
        self.canvas.line(x, self.top - 8, x, self.bottom, "cut")
        # Where neither side has room for all of it, the wider one.
        is_right = x > self.canvas.width / 2 and x + _LETTER * width_of(text) > self.canvas.width
        self.canvas.text(x + (-5 if is_right else 5), self.top - 10, text, "strong end" if is_right else "strong")

    def under(self, text: str) -> None:
        """Add the title of the lower axis."""
        self.canvas.text(self.left + self.width / 2, self.bottom + 31, text, "middle muted")
