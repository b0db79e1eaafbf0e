"""The tables of the benchmark of the repair, and what was asked for against what came out."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.plans import (
    ARMS,
    BASE,
    CEILING,
    CLEANLAB,
    CONTINUE,
    CONTINUE_LONG,
    FFT,
    FRESH,
    MEMORIZED,
    RELABEL,
    RETRAIN,
)

PUBLISHED = ("music", "hate", "phon-15")
# A gap between base and ceiling that is smaller is no gap to be closed.
_LEAST_GAP = 0.01
_QUALITY = ("memorized", "auroc", "flagged", "precision", "recall", "noise_rate", "true_rate", "suggested_right")


def gap_closed(arm: float, base: float, ceiling: float) -> float | None:
    """The share of the way from the base's accuracy to the ceiling's; None where they are within a point.

    Example:
        >>> gap_closed(0.8, base=0.7, ceiling=0.9)
        0.5
    """
    return None if ceiling - base < _LEAST_GAP else round((arm - base) / (ceiling - base), 6)


def control_of(arm: str) -> str:
    """The arm that trains on with all the data for as many steps.

    Example:
        >>> control_of("rounds + relabel"), control_of("weigh")
        ('continue, steps of relabel', 'continue')
    """
    return CONTINUE_LONG if RELABEL in arm else CONTINUE


class Results:
    """The numbers of all arms that are finished.

    Args:
        rows: what :meth:`benchmarks.arms.Unit.result` returned.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = {(row["case"], row["regime"], row["arm"], row["seed"]): row for row in rows}

    def cases(self, regime: str) -> list[str]:
        """In the order in which they were given."""
        return list(dict.fromkeys(case for case, of, _, _ in self._rows if of == regime))

    def arms(self, regime: str) -> list[str]:
        """Those that have finished anywhere."""
        found = {arm for _, of, arm, _ in self._rows if of == regime}
        return [arm for arm in ARMS if arm in found]

    def of(self, case: str, regime: str, arm: str) -> dict[int, dict[str, Any]]:
        """The rows of an arm, by seed."""
        return {key[3]: row for key, row in self._rows.items() if key[:3] == (case, regime, arm)}

    def values(self, case: str, regime: str, arm: str, column: str) -> list[float]:
        """A column of an arm, or of its partition; what there is none of is left out."""
        rows = [row | row.get("partition", {}) for row in self.of(case, regime, arm).values()]
        return [row[column] for row in rows if row.get(column) is not None]

    def over(
        self, case: str, regime: str, arms: Sequence[str], column: str, what: Callable[..., float | None]
    ) -> float | None:
        """A function of the means of some arms over the seeds that all of them have; None without such a seed."""
        rows = [self.of(case, regime, arm) for arm in arms]
        seeds = set.intersection(*(set(by_seed) for by_seed in rows))
        if not seeds:
            return None
        return what(*(statistics.mean(by_seed[seed][column] for seed in seeds) for by_seed in rows))

    def lead(self, case: str, regime: str, arm: str, other: str) -> float | None:
        """By how many points an arm is ahead of another."""
        return self.over(case, regime, (arm, other), "accuracy", lambda a, b: 100 * (a - b))

    def gain(self, case: str, regime: str, arm: str) -> float | None:
        """By how many points an arm is ahead of training on with all the data for as many steps."""
        return self.lead(case, regime, arm, control_of(arm))

    def closed(self, case: str, regime: str, arm: str) -> float | None:
        """The share of the gap from the base to the truly clean set, retrained."""
        return self.over(case, regime, (arm, BASE, CEILING), "accuracy", gap_closed)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, with an empty one after it.

    Example:
        >>> markdown(["a", "b"], [["1", "2"]])
        ['| a | b |', '| --- | --- |', '| 1 | 2 |', '']
    """
    return [
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, of one value itself, of none nothing.

    Example:
        >>> spread([1.0, 2.0]), spread([1.0]), spread([])
        ('1.5 ± 0.7', '1.0', '')
    """
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _by_arm(results: Results, regime: str, cell: Callable[[str, str], str]) -> list[str]:
    arms = results.arms(regime)
    return markdown(["case", *arms], [[case, *(cell(case, arm) for arm in arms)] for case in results.cases(regime)])


def _of_regime(results: Results, regime: str) -> list[str]:
    def accuracy(case: str, arm: str) -> str:
        return spread([100 * value for value in results.values(case, regime, arm, "accuracy")])

    def closed(case: str, arm: str) -> str:
        return _number(results.closed(case, regime, arm), 2)

    def time(case: str, arm: str) -> str:
        return _number(results.over(case, regime, (arm, RETRAIN), "process_seconds", operator.truediv), 2)

    def plain(column: str) -> Callable[[str, str], str]:
        return lambda case, arm: spread(results.values(case, regime, arm, column), 0)

    lines = [f"## {regime}", ""]
    for title, cell in (
        ("Test accuracy in per cent, mean ± standard deviation over the seeds", accuracy),
        (f"Share of the gap from base to '{CEILING}' that is closed", closed),
        ("Processor time, relative to retraining", time),
        ("Seconds on the clock", plain("seconds")),
        ("Optimizer steps", plain("steps")),
        ("Pruned neurons", plain("pruned")),
    ):
        lines += [f"### {title}", "", *_by_arm(results, regime, cell)]
    return [*lines, *_quality(results, regime)]


def _quality(results: Results, regime: str) -> list[str]:
    of = [(BASE, _QUALITY[0]), *((FFT, column) for column in _QUALITY[1:])]
    rows = []
    for case in results.cases(regime):
        acted = results.values(case, regime, FFT, "acted")
        cells = [spread(results.values(case, regime, *column), 3) for column in of]
        rows.append([case, *cells, f"{sum(acted)} of {len(acted)}"])
    return ["### The partition that F-FT acts upon", "", *markdown(["case", *_QUALITY, "acted upon"], rows)]


@dataclass(frozen=True)
class Verdict:
    """Whether a target was reached in a case.

    Args:
        target: in words.
        case: where.
        value: what came out.
        bound: what was asked for.
        at_most: whether the value must not be above it; else not below.
        note: more about the value.
    """

    target: str
    case: str
    value: float
    bound: float
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether it came out as was asked for."""
        # 0.7 - 0.65 is 0.04999999999999993.
        return (self.bound - self.value if self.at_most else self.value - self.bound) >= -1e-9

    def row(self) -> list[str]:
        """Of the table."""
        said = f"{self.value:.2f}{f' ({self.note})' if self.note else ''}"
        asked = f"{'<=' if self.at_most else '>='} {self.bound:g}"
        return [self.target, self.case, asked, said, "reached" if self.reached else "**missed**"]


def _is_clean(case: str) -> bool:
    return "-clean" in case


def _noisy(results: Results, regime: str) -> list[str]:
    return [case for case in results.cases(regime) if not _is_clean(case)]


# A target in words, the case, the value (None where numbers are missing), the bound, and the rest of a Verdict.
_Judged = Iterator[tuple[str, str, float | None, float, bool, str]]


def _of_memorized(results: Results) -> _Judged:
    for case in _noisy(results, MEMORIZED):
        lead = results.lead(case, MEMORIZED, FFT, RETRAIN)
        yield f"memorized: points of {FFT} against {RETRAIN}, in full", case, lead, -0.2, False, ""
        steps = results.over(case, MEMORIZED, (FFT, RETRAIN), "steps", operator.truediv)
        yield f"memorized: steps of {FFT} relative to {RETRAIN}", case, steps, 0.4, True, ""
        share = 0.9 if case.startswith("spoken") else 0.8
        closed = results.closed(case, MEMORIZED, FFT)
        yield f"memorized: share of the gap closed by {FFT}", case, closed, share, False, ""
        gain = results.gain(case, MEMORIZED, FFT)
        yield f"memorized: points of {FFT} against {CONTINUE}", case, gain, -0.3, False, ""


def _of_fresh(results: Results) -> _Judged:
    for case in _noisy(results, FRESH):
        lead = results.gain(case, FRESH, FFT)
        yield f"fresh: points of {FFT} against {CONTINUE}", case, lead, -0.3, False, ""


def _of_published(results: Results, regime: str) -> _Judged:
    for case in results.cases(regime):
        if case in PUBLISHED:
            lead = results.lead(case, regime, FFT, CLEANLAB)
            yield f"{regime}: points of {FFT} against {CLEANLAB}", case, lead, 0.0, False, ""


def _of_clean(results: Results, regime: str) -> _Judged:
    for case in filter(_is_clean, results.cases(regime)):
        yield (
            f"{regime}, clean: points of {FFT} against {CONTINUE}",
            case,
            results.gain(case, regime, FFT),
            -0.3,
            False,
            "",
        )


def _of_pruning(results: Results, regime: str) -> _Judged:
    for case in _noisy(results, regime):
        lead = results.lead(case, regime, "prune ours", "prune random")
        yield f"{regime}: points of pruning ours against random", case, lead, 0.0, False, ""


def verdicts(results: Results) -> list[Verdict]:
    """Every target in every case that has the numbers for it."""
    judged = [*_of_memorized(results), *_of_fresh(results)]
    for regime in (FRESH, MEMORIZED):
        judged += [*_of_clean(results, regime), *_of_published(results, regime), *_of_pruning(results, regime)]
    return [Verdict(target, case, value, *rest) for target, case, value, *rest in judged if value is not None]


def tables(results: Results) -> str:
    """All tables in Markdown."""
    lines: list[str] = []
    for regime in (FRESH, MEMORIZED):
        if results.cases(regime):
            lines += _of_regime(results, regime)
    lines += ["## What was asked for, and what came out", ""]
    lines += markdown(["target", "case", "asked", "came out", ""], [verdict.row() for verdict in verdicts(results)])
    return "\n".join(lines)
