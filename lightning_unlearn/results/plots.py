"""Pictures of a partition and of a mask, in torchmetrics' style: each returns the figure and its axes.

Matplotlib is imported when something is drawn. Colors are told apart by the color-blind (Okabe and Ito; one hue from
pale to dark in the heat map) and follow a dark or a light style.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.results.class_summary import confusion_counts
from lightning_unlearn.results.labels import REASONS, cut_of, label_issue_mask
from lightning_unlearn.utilities.checks import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_unlearn.results.mask import NeuronMask
    from lightning_unlearn.results.partition import Partition

Kind = Literal["both", "histogram", "confusion"]

_KEPT, _SUSPECT, _NEUTRAL = "#0072B2", "#D55E00", "#8C8C8C"
_KEPT_ON_DARK = "#56B4E9"
# From the palest cell to the darkest on a light ground, and the other way round on a dark one.
_SHADES, _SHADES_ON_DARK = ("#C6DBEF", "#4292C6", "#08306B"), ("#24619C", "#5BA3D5", "#EAF4FC")
_BINS = 40
# So many classes have a number in each cell, so many a tick each; of more than the last the most confused are shown.
_NUMBERED, _TICKED, _MOST = 12, 30, 100
_NAME = 16
# So many pruned neurons are named by their index.
_NAMED_NEURONS = 8
# Of more, marks and bars are smaller.
_MANY_NEURONS = 150


def plot_partition(
    partition: Partition,
    ax: Axes | Sequence[Axes] | None = None,
    *,
    kind: Kind = "both",
    class_names: Sequence[str] | None = None,
) -> tuple[Figure, Any]:
    """Draw the histogram of p(clean) with the cut, and which labels are suggested for which given ones.

    Args:
        partition: to be drawn.
        ax: where to draw; two axes for both. By default in a new figure.
        kind: ``"both"``, ``"histogram"`` or ``"confusion"``.
        class_names: the name of every class, by label.

    Returns:
        the figure, and its axes; two of them for both.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
        ValueError: for another kind, too few or too many axes, or not one name per class.
    """
    kind = check_choice("kind", kind, ("both", "histogram", "confusion"))
    names = partition.known_names(class_names)
    if kind == "both":
        left, right = _axes(ax, 2)
        _draw_histogram(partition, left)
        _draw_confusion(partition, right, names)
        return _figure(left), (left, right)
    (only,) = _axes(ax, 1)
    if kind == "histogram":
        _draw_histogram(partition, only)
    else:
        _draw_confusion(partition, only, names)
    return _figure(only), only


def plot_mask(mask: NeuronMask, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the sensitivity of every neuron with its standard error, the lowest first; pruned neurons are marked.

    Args:
        mask: to be drawn.
        ax: where to draw; by default in a new figure.

    Returns:
        the figure and its axes.

    Raises:
        ImportError: without matplotlib, naming the extra to install.
    """
    (axes,) = _axes(ax, 1)
    score, keep = mask.sensitivity.double(), mask.keep
    order = score.argsort(stable=True)
    order = order[score[order].isfinite()]
    score = score[order]
    error = None if mask.standard_error is None else mask.standard_error.double()[order].nan_to_num(0, 0, 0)
    constant = torch.zeros(len(order), dtype=torch.bool) if error is None else (error == 0) & (score == 0) & keep[order]
    size = 1.0 if len(order) <= _MANY_NEURONS else 0.5
    for members, color, marker, title in (
        (constant, _NEUTRAL, ".", "constant"),
        (keep[order] & ~constant, _kept(axes), "o", "kept"),
        (~keep[order], _SUSPECT, "X", "pruned"),
    ):
        if title != "constant" or members.any():
            axes.errorbar(
                members.nonzero().flatten().numpy(),
                score[members].numpy(),
                yerr=None if error is None else error[members].numpy(),
                fmt=marker,
                color=color,
                markersize=size * (8 if marker == "X" else 4),
                elinewidth=size,
                linestyle="none",
                label=f"{title}: {int(members.sum()):,}{_named(order[members]) if marker == 'X' else ''}",
                zorder=3 if marker == "X" else 2,
            )
    axes.axhline(0, color=_NEUTRAL, linewidth=1, zorder=1)
    hidden = len(keep) - len(order)
    what = "score" if error is None else "standardized coefficient ± standard error"
    axes.xaxis.set_major_locator(_import("matplotlib.ticker").MaxNLocator(integer=True))
    axes.set_xlabel("neurons, the lowest first" + (f" ({hidden:,} not finite, left out)" if hidden else ""))
    axes.set_ylabel(what)
    axes.set_title(f"Neurons of '{_text(mask.layer, 60)}'" + ("" if error is None else ", below 0: active for noise"))
    axes.legend(frameon=False, loc="upper left")
    return _figure(axes), axes


def new_axes(count: int) -> list[Axes]:
    """Return axes of a figure that pyplot does not know, so that nothing shows it, keeps it or counts it."""
    figure = _import("matplotlib.figure").Figure(figsize=_size(count), layout="constrained")
    return list(figure.subplots(1, count, squeeze=False)[0])


def pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """Return (height, width, 3) uint8, the picture."""
    canvas = _import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            "Pictures are drawn with matplotlib, which is not installed: pip install matplotlib."
        ) from error


def _size(count: int) -> tuple[float, float]:
    return (12.0, 5.0) if count == 2 else (7.5, 5.0)


def _axes(ax: Axes | Sequence[Axes] | None, count: int) -> list[Axes]:
    base = _import("matplotlib.axes").Axes
    if ax is None:
        figure = _import("matplotlib.pyplot").figure(figsize=_size(count), layout="constrained")
        return list(figure.subplots(1, count, squeeze=False)[0])
    given = [ax] if isinstance(ax, base) else list(np.ravel(np.asarray(ax, dtype=object)))
    if len(given) != count or not all(isinstance(one, base) for one in given):
        raise ValueError(
            f"Expected ax to be {'one matplotlib Axes' if count == 1 else f'{count} matplotlib Axes'}, but got {ax!r}."
            + (" For one, choose kind='histogram' or kind='confusion'." if count == 2 else "")
        )
    return given


def _figure(axes: Axes) -> Figure:
    return cast("Figure", axes.figure)  # or a part of one, which has the same methods


def _classes(partition: Partition) -> int:
    if partition.is_multilabel:
        return partition.label.shape[1]
    seen = int(torch.cat([partition.label, partition.suggested_label]).max()) + 1 if len(partition) else 0
    return max(len(partition.noise_matrix), seen)


def _text(value: str, length: int = _NAME) -> str:
    """Return a user's text on one line, of which nothing is taken for mathematics."""
    line = " ".join(value.split())
    line = line if len(line) <= length else f"{line[: length - 1]}…"
    return line.replace("$", r"\$")


def _is_dark(axes: Axes) -> bool:
    return _luminance(axes.get_facecolor()) < 0.5


def _kept(axes: Axes) -> str:
    return _KEPT_ON_DARK if _is_dark(axes) else _KEPT


def _luminance(color: Any) -> float:
    red, green, blue = _import("matplotlib.colors").to_rgb(color)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _draw_histogram(partition: Partition, axes: Axes) -> None:
    judged = torch.ones(len(partition), dtype=torch.bool) if partition.is_multilabel else partition.label >= 0
    edges = np.linspace(0, 1, _BINS + 1).tolist()
    reasons = torch.bincount(partition.reason[judged & ~partition.is_clean].long(), minlength=len(REASONS)).tolist()
    why = ", ".join(f"{word} {count:,}" for word, count in zip(REASONS, reasons, strict=True) if count)
    for members, color, title, more in (
        (judged & ~partition.is_clean, _SUSPECT, "suspect", f" ({why})" if why else ""),
        (judged & partition.is_clean, _kept(axes), "clean", ""),
    ):
        axes.hist(
            partition.clean_probability[members].numpy(),
            bins=edges,
            color=color,
            alpha=0.85,
            label=f"{title}: {int(members.sum()):,}{more}",
        )
    cut = cut_of(partition)
    if cut is not None:
        axes.axvline(cut, color=axes.xaxis.label.get_color(), linestyle="--", linewidth=1.5, label=f"cut: {cut:.2g}")
    axes.set_ylim(0.7, max(axes.get_ylim()[1], 10) * 4)  # a bar of one sample is seen, and the legend is above the bars
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("order of doubt" if partition.noise_rate is None else "probability of being clean")
    axes.set_ylabel("samples (log scale)")
    left_out = int((~judged).sum())
    rate = partition.noise_rate
    said = "noise rate not known" if rate is None else f"estimated noise rate {rate:.1%}"
    title = f"{int(judged.sum()):,} samples, {said}"
    axes.set_title(title + (f" ({left_out:,} not judged)" if left_out else ""))
    axes.legend(loc="upper center", framealpha=1, edgecolor="none", facecolor=axes.get_facecolor())


def _draw_confusion(partition: Partition, axes: Axes, names: dict[int, str] | None) -> None:
    if partition.is_multilabel:
        _draw_labels(partition, axes, names)
        return
    counts, shown, total = _confusion(partition)
    members = partition.label[partition.label >= 0].bincount(minlength=total)[shown]
    share = counts.double() / members.clamp(min=1).unsqueeze(1)
    _draw_cells(axes, counts, share, diagonal=True)
    titles = [_text(names[c]) if names else str(c) for c in shown.tolist()]
    for axis in (axes.xaxis, axes.yaxis):
        _set_ticks(axis, titles)
    _turn_if_long(axes, titles)
    axes.set_xlabel("suggested label")
    axes.set_ylabel("given label")
    some = "" if len(shown) == total else f" ({len(shown)} of {total:,} classes)"
    axes.set_title(f"{int(counts.sum()):,} suggested another label{some}")


def _confusion(partition: Partition) -> tuple[Tensor, Tensor, int]:
    """Return (S, S) int64 counts of given against suggested label, the (S,) classes shown, and how many there are."""
    classes = _classes(partition)
    wrong = label_issue_mask(partition)
    given, suggested = partition.label[wrong], partition.suggested_label[wrong]
    shown = torch.arange(classes)
    if classes > _MOST:
        often = given.bincount(minlength=classes) + suggested.bincount(minlength=classes)
        shown = often.argsort(descending=True, stable=True)[:_MOST].sort().values
    return confusion_counts(given, suggested, shown), shown, classes


def _draw_labels(partition: Partition, axes: Axes, names: dict[int, str] | None) -> None:
    """Draw, for each label, how often it is given but not suggested, and how often it is missing."""
    given, suggested = partition.label == 1, partition.suggested_label == 1
    pairs = [(given & ~suggested, given), (suggested & ~given, ~given)]
    counts = torch.stack([wrong.sum(dim=0) for wrong, _ in pairs], dim=1)
    members = torch.stack([of.sum(dim=0) for _, of in pairs], dim=1)
    shown = torch.arange(len(counts))
    if len(counts) > _MOST:
        shown = counts.sum(dim=1).argsort(descending=True, stable=True)[:_MOST].sort().values
    share = counts.double() / members.clamp(min=1)
    _draw_cells(axes, counts[shown], share[shown], diagonal=False)
    _set_ticks(axes.yaxis, [_text(names[c]) if names else str(c) for c in shown.tolist()])
    axes.set_xticks([0, 1], ["given,\nbut probably wrong", "not given,\nbut probably right"])
    axes.set_ylabel("label")
    some = "" if len(shown) == len(counts) else f" ({len(shown)} of {len(counts):,} labels)"
    axes.set_title(f"{int(counts.sum()):,} single labels suggested otherwise{some}")


def _draw_cells(axes: Axes, counts: Tensor, share: Tensor, *, diagonal: bool) -> None:
    """Draw a heat map of shares, with the counts where there is room; nothing where there is none."""
    colors = _import("matplotlib.colors")
    if not counts.numel():
        axes.text(0.5, 0.5, "no classes", ha="center", va="center", transform=axes.transAxes)
        return
    shades = colors.LinearSegmentedColormap.from_list("shades", _SHADES_ON_DARK if _is_dark(axes) else _SHADES)
    cells = np.ma.masked_where(counts.numpy() == 0, share.numpy())
    most = max(float(share.max()), 1e-9)
    image = axes.imshow(cells, cmap=shades, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    if diagonal:
        own = np.ma.masked_equal(np.eye(len(counts)), 0)
        gray = colors.ListedColormap([_NEUTRAL])
        axes.imshow(own, cmap=gray, alpha=0.3, aspect="auto", interpolation="nearest")
    if len(counts) <= _NUMBERED:
        for (row, column), count in np.ndenumerate(counts.numpy()):
            if count:
                light = _luminance(shades(float(share[row, column]) / most)) > 0.45
                axes.text(column, row, f"{count:,}", ha="center", va="center", color="black" if light else "white")
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label("share of the samples given that label" if diagonal else "share of the samples that could be")
    bar.ax.yaxis.set_major_formatter(_import("matplotlib.ticker").PercentFormatter(1.0))


def _set_ticks(axis: Any, titles: list[str]) -> None:
    step = 1 if len(titles) <= _TICKED else -(-len(titles) // 10)
    axis.set_ticks(range(0, len(titles), step), titles[::step], fontsize=10 if len(titles) <= _NUMBERED else 7)


def _turn_if_long(axes: Axes, titles: list[str]) -> None:
    ticks = min(len(titles), _TICKED)
    if ticks * max(map(len, titles), default=0) > 50:
        axes.tick_params(axis="x", labelrotation=90)


def _named(neurons: Tensor) -> str:
    return f" ({', '.join(map(str, neurons.tolist()))})" if 0 < len(neurons) <= _NAMED_NEURONS else ""
