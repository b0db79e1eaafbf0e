"""The tables of the benchmark of pruning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Accuracies by data and regime, and what the smaller networks cost, as Markdown."""
    cases = list(dict.fromkeys((row["kind"], row["regime"]) for row in rows))
    by: dict[str, dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by[row["arm"]][row["kind"], row["regime"]].append(row)
    names = [f"{kind}, {regime}" for kind, regime in cases]
    return f"{_base(by, cases, names)}\n{_accuracies(by, cases, names)}\n{_costs(by, cases)}"


def _base(by: Any, cases: Any, names: Sequence[str]) -> str:
    lines = [_line(["", *names]), _line(["---"] * (1 + len(cases)))]
    for said, name in (("test accuracy before anything is done", "accuracy"), ("wrong labels predicted", "memorized")):
        lines.append(_line([said, *(_mean([100 * row[name] for row in by["base"][case]]) for case in cases)]))
    return "\n".join(lines) + "\n"


def _accuracies(by: Any, cases: Any, names: Sequence[str]) -> str:
    """Test accuracy, and the mean difference from no pruning of the same seeds."""
    lines = [_line(["then fine-tuned", *names]), _line(["---"] * (1 + len(cases)))]
    seeds = {case: len(by["no pruning"][case]) for case in cases}
    reference = {case: {row["seed"]: row["accuracy"] for row in by["no pruning"][case]} for case in cases}
    for arm in [arm for arm in by if arm != "base"]:
        cells = []
        for case in cases:
            found = by[arm][case]
            known = [row for row in found if row["seed"] in reference[case]]
            gains = [100 * (row["accuracy"] - reference[case][row["seed"]]) for row in known]
            cell = _mean([100 * row["accuracy"] for row in found])
            # Of fewer seeds than there are, which is said.
            fewer = f"; {len(found)} of {seeds[case]} seeds" if len(found) < seeds[case] else ""
            cells.append(f"{cell} ({np.mean(gains):+.1f}{fewer})" if gains and arm != "no pruning" else cell)
        lines.append(_line([arm, *cells]))
    return "\n".join(lines) + "\n"


def _costs(by: Any, cases: Any) -> str:
    """Of arms that prune a share of every layer: what is left of the network when it is cut."""
    lines = [_line(["cut", "data, regime", "parameters", "MACs", "ms / 64 samples"]), _line(["---"] * 5)]
    for arm in by:
        for case in cases:
            costs = [row["costs"] for row in by[arm][case] if row.get("costs")]
            if not costs or "random" not in arm:  # all criteria cut as many
                continue
            cells = [
                " -> ".join(f"{np.mean([cost[size][part] for cost in costs]):{form}}" for size in ("full", "small"))
                for part, form in ((0, ",.0f"), (1, ",.0f"), (2, ".2f"))
            ]
            lines.append(_line([arm.removeprefix("random "), ", ".join(case), *cells]))
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
