"""A line in the Trainer's own progress bar for each pass over data, with rate and time left.

Lightning's bars draw on rank 0 alone. Bars of others, and a Trainer without one, show no line. What a pass that lasts
will still take is also said in the log, once, at the speed of the batches after the first one, in which workers start
and memory is claimed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.utilities import rank_zero
from lightning.pytorch.utilities.rank_zero import rank_zero_warn as rank_zero_warn
from tqdm import tqdm

from lightning_unlearn.trainer.compat import is_lightning_instance

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

_Item = TypeVar("_Item")

# A pass of this many seconds is long enough to say when it ends.
_LONG = 10.0
# How often Rich draws, at most.
_SECONDS = 0.1


def shown(fit: RunningFit, title: str, total: int | None, items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the items, with a progress line.

    The line goes with the last item, or where ``close_progress`` is called, as it is when a pass fails.

    Args:
        fit: that is running.
        title: of the line.
        total: how many items; None if it is not known.
        items: to yield.
    """
    line = _Line(fit, title, total)
    lines = fit.memory.lines
    lines.append(line)
    try:
        for item in items:
            yield item
            line.advance()
    finally:
        # Where the pass fails, this may be long after: what is raised holds on to the frames that it went through.
        line.close()
        if line in lines:
            lines.remove(line)


def close_progress(fit: RunningFit) -> None:
    """Take away what is left in the bar of a pass that has ended, in whatever way."""
    for line in list(fit.memory.lines):
        line.close()
    fit.memory.lines.clear()


class _Line:
    def __init__(self, fit: RunningFit, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._said = fit.memory.said
        self._done, self._first = 0, 0.0
        bar: Any = fit.trainer.progress_bar_callback
        draw = next((draw for kind, draw in _DRAW.items() if is_lightning_instance(bar, kind)), None)
        self._drawn = draw(bar, title, total) if draw is not None and bar.is_enabled else None

    def advance(self) -> None:
        """Count an item that is done."""
        self._done += 1
        if self._done == 1:
            self._first = time.monotonic()
        if self._drawn is not None:
            self._drawn[0](self._done)
        self._say_what_is_left()

    def _say_what_is_left(self) -> None:
        elapsed = time.monotonic() - self._first
        if self._total in (None, self._done) or elapsed < _LONG or self._title in self._said:
            return
        self._said.add(self._title)
        left = (self._total - self._done) * elapsed / (self._done - 1)
        rank_zero_info(
            f"{self._title}: {self._done:,} of {self._total:,} batches in {elapsed:.0f} s, about {left:,.0f} s left."
        )

    def close(self) -> None:
        """Take the line away; a second time does nothing."""
        if self._drawn is not None:
            self._drawn[1]()
            self._drawn = None


_Drawn = tuple[Callable[[int], None], Callable[[], None]]


def _draw_tqdm(bar: Any, title: str, total: int | None) -> _Drawn:
    # Below the one of the epoch, and with whatever looks a user has given it.
    line = bar.init_validation_tqdm()
    line.set_description(title, refresh=False)
    line.reset(total=total)

    def advance(done: int) -> None:
        if done % bar.refresh_rate == 0 or done == total:
            line.update(done - line.n)

    return advance, line.close


def _draw_rich(bar: Any, title: str, total: int | None) -> _Drawn | None:
    if bar.progress is None:
        # The bar has not begun, as when a fit resumes where a pass is due.
        return None
    task = bar.progress.add_task(title, total=float("inf") if total is None else total)
    drawn = 0.0

    def advance(done: int) -> None:
        nonlocal drawn
        bar.progress.update(task, completed=done)
        if time.monotonic() - drawn > _SECONDS or done == total:
            drawn = time.monotonic()
            bar.refresh()

    def close() -> None:
        # Not removed: Lightning finds its own tasks by their place among all.
        bar.progress.update(task, visible=False)
        bar.refresh()

    return advance, close


_DRAW: dict[str, Callable[[Any, str, int | None], _Drawn | None]] = {
    "TQDMProgressBar": _draw_tqdm,
    "RichProgressBar": _draw_rich,
}


def rank_zero_info(line: str) -> None:
    """Log as Lightning does, with TQDM's bars taken away while the line is written and drawn again below it."""
    with tqdm.external_write_mode():
        rank_zero.rank_zero_info(line)
