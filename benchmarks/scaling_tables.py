"""What :mod:`benchmarks.scaling` measured, as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_unlearn.utilities.files import replacing

Row = dict[str, Any]


def slope(rows: Sequence[Row], of: str, by: str) -> float:
    """The exponent k of ``seconds ~ size^k`` between the two largest sizes.

    Example:
        >>> slope([{"n": 10, "s": 1.0}, {"n": 100, "s": 100.0}], "s", "n")
        2.0
    """
    before, last = rows[-2:]
    return math.log(last[of] / before[of]) / math.log(last[by] / before[by])


_PARTS = ("observe", "merge", "judge", "assemble")


def tables(found: dict[str, Any]) -> str:
    """Markdown of all that was measured."""
    lines: list[str] = []
    if rows := found.get("samples"):
        lines += [
            f"### Samples, {rows[0]['classes']} classes: processor seconds, one thread",
            "",
            "| N | one epoch's rows taken | merged | judged (`auto`) | assembled | microseconds per sample, judging"
            " | state, bytes per sample | judging, bytes per sample more |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['samples']:,} | {row['observe']:.2f} | {row['merge']:.3f} | {row['judge']:.2f} |"
            f" {row['assemble']:.3f} | {1e6 * row['judge'] / row['samples']:.1f} | {row['state_bytes']:.0f} |"
            f" {row['judge_bytes']:.0f} |"
            for row in rows
        ]
        if len(rows) > 1:
            of = ", ".join(f"{part} {slope(rows, part, 'samples'):.2f}" for part in _PARTS)
            lines += ["", f"Exponents between the two largest: {of}."]
    if rows := found.get("classes"):
        lines += [
            "",
            f"### Classes, {rows[0]['samples']:,} samples: processor seconds, one thread",
            "",
            "| C | one epoch's rows taken | judged (`auto`) | state, bytes per sample"
            " | judging, bytes per sample more |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['classes']:,} | {row['observe']:.2f} | {row['judge']:.2f} | {row['state_bytes']:.0f} |"
            f" {row['judge_bytes']:.0f} |"
            for row in rows
        ]
    if rows := found.get("neurons"):
        lines += [
            "",
            f"### Neurons, {rows[0]['samples']:,} samples: processor seconds, one thread",
            "",
            "| D | sums of the regression | solved | mixture of `rlap` | its steps |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['neurons']:,} | {row['regression sums']:.2f} | {row['regression solved']:.2f} |"
            f" {row['mixture']:.2f} | {row['mixture steps']} |"
            for row in rows
        ]
    lines += of_fits(found)
    if rows := found.get("processes"):
        one, two = rows
        lines += [
            "",
            f"### Processes (gloo, one thread each), {one['samples']:,} samples, {one['classes']} classes",
            "",
            f"Judging: one {one['seconds']:.2f} s, two {two['seconds']:.2f} s on the clock, medians of"
            f" {len(one['all'])}: {one['seconds'] / two['seconds']:.2f} times as fast.",
        ]
    if rows := found.get("memory"):
        one = rows[0]
        lines += [
            "",
            f"### Memory of a rank (gloo), {one['samples']:,} samples, {one['classes']} classes",
            "",
            "Bytes of the largest rank times ranks per sample; in brackets against one.",
            "",
            "| processes | evidence, as an epoch ends | most resident while it is gathered | ... and judged"
            " | handing over, processor seconds |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['processes']} | {_per_sample(row, one, 'evidence')} | {_per_sample(row, one, 'gathering')} |"
            f" {_per_sample(row, one, 'judging')} | {row['hand over']:.2f} |"
            for row in rows
        ]
    if rows := found.get("simulated"):
        lines += [
            "",
            "### Simulated ranks against one",
            "",
            "| ranks | N | C | suspects | all ranks equal | largest difference of what was gathered | of p(clean)"
            " | changed sides | sums | MB summed per rank | evidence of the largest rank x ranks, bytes per sample"
            " | of one process | bytes handed over per sample and epoch |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['ranks']} | {row['samples']:,} | {row['classes']} | {row['suspects']:,} |"
            f" {'yes' if row['all ranks equal'] else 'NO'} | {row['largest difference of what was gathered']:.1e} |"
            f" {row['largest difference of p(clean)']:.1e} | {row['samples that changed sides']} |"
            f" {row['collectives']} |"
            f" {row['bytes summed per rank'] / 1e6:.1f} | {row['evidence, bytes per sample']:.0f} |"
            f" {row['evidence, of one process']:.0f} |"
            f" {row['bytes handed over per rank and epoch'] * row['ranks'] / row['samples']:.0f} |"
            for row in rows
        ]
    return "\n".join(lines)


def of_fits(found: dict[str, Any]) -> list[str]:
    """Markdown of the whole fits, and of the many rounds."""
    lines: list[str] = []
    if rows := found.get("fits"):
        lines += [
            "",
            "### Fits without the callbacks and with them: processor seconds, one thread",
            "",
            "| N | an epoch | with evidence from its steps | the fit | with the callbacks | of which the partition"
            " | most in memory, MB | with the callbacks | bytes per sample more | suspects |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {plain['samples']:,} | {_middle(plain['epochs']):.2f} | {_middle(with_them['epochs']):.2f} (x"
            f" {_middle(with_them['epochs']) / _middle(plain['epochs']):.3f}) | {plain['seconds']:.1f} |"
            f" {with_them['seconds']:.1f} | {with_them['partition']:.1f} | {plain['peak'] / 1e6:.0f} |"
            f" {with_them['peak'] / 1e6:.0f} | {(with_them['peak'] - plain['peak']) / plain['samples']:.0f} |"
            f" {with_them['suspects']:,} |"
            for plain, with_them in zip(rows[::2], rows[1::2], strict=True)
        ]
    if row := found.get("rounds"):
        held = row["resident"]
        lines += [
            "",
            f"### A partition after every epoch, {row['samples']:,} samples",
            "",
            f"{row['rounds']} partitions in {row['epochs']} epochs, {row['seconds']:.0f} s. Resident, MB:"
            f" {held[len(held) // 5] / 1e6:.1f} after a fifth of the epochs,"
            f" {held[len(held) // 2] / 1e6:.1f} after half, {held[-1] / 1e6:.1f} after all.",
        ]
    return lines


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _per_sample(row: Row, one: Row, name: str) -> str:
    each = [of[name] * of["processes"] / of["samples"] for of in (row, one)]
    return f"{each[0]:.0f} ({each[0] / each[1]:.2f})"


def figure(found: dict[str, Any], file: Path) -> None:
    """Three log-log pictures: by samples, classes and neurons."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 3.6), layout="constrained")
    axes = drawn.subplots(1, 3)
    plots = (
        ("samples", "samples N", _PARTS),
        ("classes", "classes C", ("observe", "judge")),
        ("neurons", "neurons D", ("regression sums", "regression solved", "mixture")),
    )
    for ax, (key, name, parts) in zip(axes, plots, strict=True):
        rows = found.get(key, [])
        for part in parts:
            ax.loglog([row[key] for row in rows], [max(row[part], 1e-4) for row in rows], marker="o", label=part)
        ax.set_xlabel(name)
        ax.grid(alpha=0.3, which="both")
        if rows:
            ax.legend()
    axes[0].set_ylabel("processor seconds")
    with replacing(file) as out:
        drawn.savefig(out, format=file.suffix.lstrip(".") or "png", dpi=110)
