"""The report's charts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from lightning_unlearn.report.svg import SvgAxes, SvgCanvas, shortened, ticks, width_of
from lightning_unlearn.results.labels import cut_of
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition

_BINS = 50
# Neurons that are drawn: those most active for noise, and those most active for clean samples.
_LOWEST, _HIGHEST = 80, 40
_SIGMAS = 1.96
# Samples that the chart of expected precision goes to at least, and points of a line in it.
_SHORTEST, _POINTS = 50, 200
_Curves = Mapping[str, Sequence[Sequence[float]]]


def histogram(partition: Partition) -> Markup:
    """Return how many samples have which probability of being clean, on a logarithmic scale, with the cut."""
    bins = (partition.clean_probability * _BINS).long().clamp(max=_BINS - 1)
    sides = [bins[side].bincount(minlength=_BINS).tolist() for side in (partition.is_clean, ~partition.is_clean)]
    # One sample is to be seen too.
    least, most = -0.3, max(1.0, math.log10(max(*sides[0], *sides[1], 1)) + 0.1)
    plot = SvgAxes((640, 250), (0, 1), (least, most), "histogram of the probability of being clean")
    for power in range(math.floor(most) + 1):
        plot.row(power, f"{10**power:,}")
    wide = plot.width / _BINS - 1
    for at, (clean, suspect) in enumerate(zip(*sides, strict=True)):
        hint = f"p(clean) {at / _BINS:.2f} to {(at + 1) / _BINS:.2f}: {clean:,} clean, {suspect:,} suspect"
        # Of a bar that has both, the larger one is behind.
        for count, kind in sorted([(clean, "clean"), (suspect, "suspect")], reverse=True):
            if count:
                y = plot.y(math.log10(count))
                box: dict[str, Any] = {"x": plot.x(at / _BINS) + 0.5, "y": y, "width": wide, "height": plot.bottom - y}
                plot.canvas.add("rect", "", hint, class_=kind, **box)
    plot.canvas.line(plot.left, plot.bottom, plot.left + plot.width, plot.bottom)
    for tick in ticks(0.0, 1.0):
        plot.canvas.text(plot.x(tick), plot.bottom + 15, f"{tick:g}", "middle")
    cut = cut_of(partition)
    if cut is not None:
        plot.mark(cut, f"cut at {cut:.2g}")
    plot.under("probability of being clean")
    return plot.canvas.markup()


def precision_chart(partition: Partition) -> Markup | None:
    """Return what share of a list is expected to be wrong, by its length; None where that is not known."""
    curve = partition.precision_curve()
    if curve is None or not len(curve):
        return None
    suspects, worth = len(partition) - int(partition.is_clean.sum()), partition.worth_review()
    most = min(len(curve), max(_SHORTEST, math.ceil(1.5 * (suspects + worth))))
    plot = SvgAxes((640, 250), (0, most), (0, 1.02), "expected precision by the length of the list")
    for tick in ticks(0.0, 1.0):
        plot.row(tick, f"{tick:.0%}")
    for tick in ticks(0.0, float(most)):
        if tick == int(tick):
            plot.canvas.text(plot.x(tick), plot.bottom + 15, f"{int(tick):,}", "middle")
    _precision_line(plot, curve[:suspects], 0, "suspect")
    _precision_line(plot, curve[:most], max(suspects - 1, 0), "clean")
    if suspects:
        plot.mark(suspects, f"{suspects:,} suspect{'s' if suspects > 1 else ''}")
    if worth:
        at = plot.x(suspects + worth)
        plot.canvas.line(at, plot.top, at, plot.bottom, "cut")
        plot.canvas.text(at + 5, plot.bottom - 8, f"{worth:,} more worth a look", "strong")
    plot.under("samples looked at, the most suspect first")
    return plot.canvas.markup()


def _precision_line(plot: SvgAxes, curve: Tensor, first: int, kind: str) -> None:
    """Draw the expected precision from a position of the list to its end."""
    if len(curve) - first < 2:
        return
    depths = torch.linspace(first, len(curve) - 1, min(_POINTS, len(curve) - first)).long().tolist()
    points = " ".join(f"{plot.x(at + 1):.1f},{plot.y(float(curve[at])):.1f}" for at in depths)
    plot.canvas.add("polyline", points=points, class_=f"line {kind}")


def heat_map(
    matrix: Tensor,
    names: Sequence[str],
    words: tuple[str, str, str],
    share: Tensor,
    labels: Sequence[int] = (),
) -> Markup:
    """Return a square matrix as colors, on one scale for all of them: the share of a row's class, from 0 to 1.

    Args:
        matrix: (K, K), counts (int64) or shares (float), at least 0.
        names: of the rows, which are those of the columns.
        words: for a row, a column, and an entry, as in "given", "suggested", "samples".
        share: (K, K) in [0, 1], what is drawn of each entry.
        labels: of the rows, which a script finds the cells by; none for a picture alone.
    """
    size = len(names)
    cell = max(12, min(34, 620 // max(1, size)))
    rows, columns = ([shortened(name, most) for name in names] for most in (16, 13))
    corner = f"{words[1]} \u2192", f"{words[0]} \u2193"
    left = 14 + 7.5 * max(map(width_of, [*rows, *corner]))
    # The names of the columns stand askew, and the last one beside the picture.
    askew = 5.5 * max(map(width_of, columns), default=0)
    top = max(40.0, 22 + askew)
    canvas = SvgCanvas(left + cell * size + max(12.0, askew), top + cell * size + 12, f"{words[0]} by {words[1]}")
    for at, row in enumerate(names):
        canvas.text(left - 6, top + cell * at + cell / 2 + 4, rows[at], "end")
        for to, column in enumerate(names):
            text = _entry(matrix[at, to])
            part = 0.0 if at == to else float(share[at, to])
            box: dict[str, Any] = {"x": left + cell * to, "y": top + cell * at, "width": cell - 1, "height": cell - 1}
            hint = f"{words[0]} {row}, {words[1]} {column}: {text or 0} {words[2]}"
            canvas.add("rect", class_="cell", **box)
            found = {"data_pair": f"{labels[at]}>{labels[to]}"} if labels and at != to else {}
            canvas.add(
                "rect", "", hint, class_="same" if at == to else "heat", fill_opacity=_opacity(part), **box, **found
            )
            if cell >= 24:
                class_ = "middle small on-heat" if part > 0.7 else "middle small"
                canvas.text(box["x"] + cell / 2, box["y"] + cell / 2 + 4, text, class_)
    for to, column in enumerate(columns):
        x = left + cell * to + cell / 2
        canvas.text(x, top - 8, column, "start", transform=f"rotate(-45 {x:g} {top - 8:g})")
    for word, up in zip(corner, (26, 8), strict=True):
        canvas.text(left - 6, top - up, word, "end muted")
    return canvas.markup()


def _entry(value: Tensor) -> str:
    """Return a number in a cell; empty for one that is as good as nothing."""
    number = float(value)
    if value.is_floating_point():
        return f"{number:.2f}".removeprefix("0") if number >= 0.005 else ""
    if number >= 10_000:
        return f"{number / 1000:.0f}k"
    return f"{number:.0f}" if number else ""


def _opacity(share: float) -> float:
    # What is there at all is to be seen.
    return 0.0 if share <= 0 else 0.08 + 0.92 * share


def metric_kind(name: str) -> str:
    """Return the kind by which metrics share a chart: the last word of the name.

    Example:
        >>> metric_kind("train_loss_epoch"), metric_kind("val/acc")
        ('loss', 'acc')
    """
    words = [word for word in re.split(r"[_/. -]", name) if word and word not in ("epoch", "step")]
    return words[-1].lower() if words else name


def curve_charts(curves: _Curves, swaps: Sequence[int], control: _Curves | None = None) -> list[tuple[str, Markup]]:
    """Return a chart for each kind of metric, with the epochs at whose start the data were swapped.

    Args:
        curves: of each metric, pairs of an epoch, counted from 0, and the value at its end.
        swaps: epochs, counted from 0.
        control: those of a fit to compare with, drawn dashed.
    """
    kinds: dict[str, list[str]] = {}
    for name, points in curves.items():
        if len(points) > 1:
            kinds.setdefault(metric_kind(name), []).append(name)
    return [(kind, _curves(names[:6], curves, swaps, control or {})) for kind, names in list(kinds.items())[:8]]


def _curves(names: Sequence[str], curves: _Curves, swaps: Sequence[int], control: _Curves) -> Markup:
    lines = [(name, curves[name], f"line c{at}") for at, name in enumerate(names)]
    lines += [(f"{n}, control", control[n], f"line dashed c{at}") for at, n in enumerate(names) if control.get(n)]
    last = 1 + max(float(epoch) for _, line, _ in lines for epoch, _ in line)
    low, high = _range([float(value) for _, line, _ in lines for _, value in line])
    plot = SvgAxes((520, 260), (0, last), (low, high), f"{', '.join(names)} by epoch", below=8 + 18 * len(lines))
    for tick in ticks(low, high, 4):
        plot.row(tick, f"{tick:g}")
    for tick in ticks(0, last, 6):
        if tick == int(tick):
            plot.canvas.text(plot.x(tick), plot.bottom + 15, f"{tick:g}", "middle")
    plot.under("epochs complete")
    for at, swap in enumerate(swaps):
        plot.mark(swap, "" if at else "clean subset from here")
    for at, (name, line, class_) in enumerate(lines):
        path = [(plot.x(float(epoch) + 1), plot.y(float(value))) for epoch, value in line]
        plot.canvas.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in path), class_=class_)
        y = plot.bottom + 52 + 18 * at
        plot.canvas.line(plot.left, y - 4, plot.left + 26, y - 4, class_)
        plot.canvas.text(plot.left + 34, y, f"{shortened(name, 34)}: {float(line[-1][1]):.4g} in the end")
    return plot.canvas.markup()


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return what an axis spans: from 0 where that is not far."""
    low, high = min(values), max(values)
    margin = max((high - low) * 0.05, 1e-9 * max(abs(high), 1.0))
    return (0.0 if 0 <= low < 0.5 * high else low - margin), high + margin


def has_coefficient(mask: NeuronMask) -> Tensor:
    """Return (D,) bool, False for a neuron that is constant, of which there is nothing to say."""
    return mask.sensitivity.isfinite() & ((mask.sensitivity != 0) | ~mask.keep)


def sensitivities(mask: NeuronMask) -> Markup:
    """Return the coefficients of the neurons that have one, with their errors, in order, the pruned ones marked."""
    finite = has_coefficient(mask).nonzero().flatten()
    order = finite[mask.sensitivity[finite].argsort(stable=True)]
    left_out = max(0, len(order) - _LOWEST - _HIGHEST)
    if left_out:
        order = torch.cat([order[:_LOWEST], order[-_HIGHEST:]])
    value, half = mask.sensitivity[order].double(), torch.zeros(len(order), dtype=torch.float64)
    if mask.standard_error is not None:
        half = _SIGMAS * mask.standard_error[order].double().nan_to_num(0, 0, 0)
    ends = [0.0, *(value - half).tolist(), *(value + half).tolist()]
    plot = SvgAxes(
        (640, 260), (0, max(1, len(order))), (min(ends), max(ends)), f"sensitivity of the neurons of {mask.layer}"
    )
    for tick in ticks(min(ends), max(ends)):
        plot.row(tick, f"{tick:g}", "axis" if tick == 0 else "grid")
    rows = zip(order.tolist(), value.tolist(), half.tolist(), mask.keep[order].tolist(), strict=True)
    radius = min(4.0, max(1.6, plot.width / max(1, len(order)) / 3))
    for at, (neuron, middle, error, kept) in enumerate(rows):
        x, kind = plot.x(at + 0.5), "neuron" if kept else "neuron pruned"
        plot.canvas.line(x, plot.y(middle + error), x, plot.y(middle - error), f"{kind} bar")
        hint = f"neuron {neuron}: {middle:.4g} \u00b1 {error:.2g}{'' if kept else ', pruned'}"
        plot.canvas.add("circle", "", hint, cx=x, cy=plot.y(middle), r=radius, class_=kind)
    if left_out:
        plot.mark(_LOWEST, f"{left_out:,} neurons between are not drawn")
    plot.under("neurons, the most active for noise first")
    return plot.canvas.markup()


def bars(rows: Sequence[tuple[str, float]], total: float) -> Markup:
    """Return seconds of each phase as bars, with their share of the total."""
    canvas = SvgCanvas(640, 26 * len(rows) + 6, "seconds of each phase")
    largest = max([seconds for _, seconds in rows] or [0.0]) or 1.0
    for at, (name, seconds) in enumerate(rows):
        y, wide = 26 * at + 4, max(1.0, 300 * seconds / largest)
        canvas.text(190, y + 14, shortened(name, 26), "end")
        canvas.add("rect", x=198, y=y, width=wide, height=18, class_="c0 bar-fill", rx=2)
        share = f" ({seconds / total:.1%})" if total > 0 else ""
        canvas.text(204 + wide, y + 14, f"{duration(seconds)}{share}")
    return canvas.markup()


def duration(seconds: float) -> str:
    """Return how long something took, in the units that one would say it in.

    Example:
        >>> duration(0.512), duration(90.0), duration(600), duration(7320)
        ('0.51 s', '90.0 s', '10 min', '2 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"
