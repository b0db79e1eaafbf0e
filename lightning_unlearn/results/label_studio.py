"""What people have decided in Label Studio, read back from an export of its tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_unlearn.utilities.checks import shown

# Names in the labeling interface: of what is looked at, of the class, of what else may become of a sample.
SAMPLE, LABEL, DECISION = "sample", "label", "decision"
DROP, NO_LABEL = "drop", "none of them"
_CHOICE = re.compile(r"(\d+)(: .*)?", re.DOTALL)
_GIVEN = re.compile(r"(-1|\d+( \d+)*)?")


def labels_in(cell: Any) -> list[int]:
    """Return the classes that a cell names; -1 is none."""
    return [int(one) for one in str(cell).split() if int(one) >= 0]


def read_label_studio(source: Path, text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the tasks of an export, as JSON or JSON-MIN, by their place in it, with the cells of a table of decisions.

    Args:
        source: for messages.
        text: of the file.

    Raises:
        ValueError: with the place, for what is no annotation of tasks that :func:`to_label_studio` has written.
    """
    try:
        tasks = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"Expected {source} to be an export of Label Studio as JSON, but it cannot be read ({error}); export it"
            " again, as JSON or JSON-MIN."
        ) from error
    if not isinstance(tasks, list):
        raise ValueError(
            f"Expected {source} to be a list of tasks, as Label Studio exports it, but got {shown(tasks)}."
        )
    decided: dict[str, tuple[int, Mapping[str, str]]] = {}
    for place, task in enumerate(tasks, start=1):
        where = f"{source}, task {place}"
        cells = _cells(where, task)
        # As JSON-MIN, each annotation of a task is listed by itself.
        before, known = decided.setdefault(cells["index"], (place, cells))
        if known != cells and known["decision"] and cells["decision"]:
            raise ValueError(
                f"{where}: expected one decision about sample {cells['index']}, but task {before} has another; agree on"
                " one in Label Studio (delete one, or mark one as ground truth) and export it again."
            )
        if cells["decision"]:
            decided[cells["index"]] = (place, cells)
    yield from decided.values()


def _cells(where: str, task: Any) -> dict[str, str]:
    data = task.get("data", task) if isinstance(task, dict) else None
    is_ours = isinstance(data, dict) and {"index", "given_label", "dataset"} <= data.keys()
    if data is None or not is_ours or _GIVEN.fullmatch(str(data["given_label"])) is None:
        raise ValueError(f"{where}: expected a task that to_label_studio has written, but got {shown(task)}.")
    found = _result(where, task) if "data" in task else {name: _chosen(task.get(name)) for name in (LABEL, DECISION)}
    cells = {"index": str(data["index"]), "given_label": str(data["given_label"]), "dataset": str(data["dataset"])}
    if "key" in data:
        cells["key"] = str(data["key"])
    return cells | _decision(where, cells["given_label"], found.get(LABEL, []), found.get(DECISION, []))


def _result(where: str, task: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a person has chosen, by the name of the choices; nothing where the task was skipped."""
    written = [one for one in task.get("annotations") or [] if isinstance(one, dict) and not one.get("was_cancelled")]
    true = [one for one in written if one.get("ground_truth")]
    results = []
    for annotation in true or written:
        found = {}
        for part in annotation.get("result") or []:
            if isinstance(part, dict) and part.get("type") == "choices":
                found[str(part.get("from_name"))] = _chosen(part.get("value"))
        if found not in results:
            results.append(found)
    if len(results) > 1:
        raise ValueError(
            f"{where}: expected one decision, but annotators disagree ({len(results)} different ones); agree"
            " on one in Label Studio (delete the others, or mark one as ground truth) and export it again."
        )
    return results[0] if results else {}


def _chosen(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value.get("choices")
    chosen = [value] if isinstance(value, str) else value
    return [str(one) for one in chosen] if isinstance(chosen, list) else []


def _decision(where: str, given: str, label: Sequence[str], decision: Sequence[str]) -> dict[str, str]:
    if DROP in decision:
        return {"decision": "drop"}
    if not label:
        return {"decision": ""}
    chosen = [] if list(label) == [NO_LABEL] else label
    found = [_CHOICE.fullmatch(one) for one in chosen]
    if None in found:
        raise ValueError(
            f"{where}: expected {LABEL} to be a choice of labeling.xml, which begins with the number of the class, but"
            f" it is {', '.join(map(repr, label))}."
        )
    new = sorted(int(one[1]) for one in found if one is not None)
    if new == sorted(labels_in(given)):
        return {"decision": "keep"}
    return {"decision": "relabel", "suggested_label": " ".join(map(str, new))}
