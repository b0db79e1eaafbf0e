"""A partition as tasks of Label Studio, and what people have decided there read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from xml.sax.saxutils import quoteattr

from lightning_unlearn.results.table import columns_of
from lightning_unlearn.utilities.checks import check_choice, shown
from lightning_unlearn.utilities.files import replacing, target_folder

if TYPE_CHECKING:
    from lightning_unlearn.results.partition import Partition

Kind = Literal["image", "audio", "text", "video"]
"""What the samples are."""

# Names in the labelling interface: of what is looked at, of the class, of what else may become of a sample.
_SAMPLE, _LABEL, _DECISION = "sample", "label", "decision"
_DROP, _NO_LABEL = "drop", "none of them"
_CHOICE = re.compile(r"(\d+)(: .*)?", re.DOTALL)
_GIVEN = re.compile(r"(-1|\d+( \d+)*)?")
_WHY = {"label": "wrong for its label", "input": "wrong for its input", "both": "wrong for its label and input"}


def to_label_studio(
    partition: Partition,
    folder: str | PathLike[str],
    data: Sequence[str] | None = None,
    *,
    kind: Kind = "image",
    suspects_only: bool = True,
    review: int = 0,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Writes ``tasks.json``, to import into a project of Label Studio, and ``labeling.xml``, its labelling interface.

    A task is a sample, the most suspect first, with the suggested class as its prediction, whose score is how probable
    that is. ``p_clean``, ``rank``, ``reason`` and ``given_class`` are columns of the Data Manager, to sort and filter
    by. A person submits the class that is right, or ``drop``, or skips the task. The project's export, as JSON or
    JSON-MIN, is what ``AttributionPartitionCallback(review="export.json")`` takes: the given class is a ``keep``,
    another one a ``relabel``, and what is not annotated decides nothing.

    Args:
        partition: of the training set.
        folder: to write to; it is made.
        data: N addresses that the browser can open (``https://...``, ``/data/local-files/?d=...``), by dataset index,
            or the texts themselves; by default the partition's own files.
        kind: what the samples are.
        suspects_only: leave out the samples that are clean.
        review: so many of them are tasks all the same, the first of ``partition.review_ranking()``.
        class_names: the name of every class, by label; by default the partition's own.

    Returns:
        the path of ``tasks.json``.

    Raises:
        ValueError: without data, for another number of them, or if there is not one name per class.
    """
    kind = check_choice("kind", kind, get_args(Kind))
    if data is None and not partition.files:
        raise ValueError(
            f"Expected data, an address or a text for each of {len(partition)} samples, since the data set of the fit"
            " lists no files; give data=[...]."
        )
    names = partition.known_names(class_names)
    shows = list(partition.files if data is None else data)
    columns = columns_of(partition, suspects_only=suspects_only, review=review, names=names, columns={_SAMPLE: shows})
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    target = target_folder(folder)
    model = f"lightning-unlearn {rows[0]['dataset']}".strip() if rows else ""
    choices = [_choice(label, names) for label in range(_classes(partition))]
    tasks = [_task(row, choices, model, _probability(partition, row["index"])) for row in rows]
    for file, text in (
        ("labeling.xml", _interface(kind, choices, several=partition.is_multilabel)),
        ("tasks.json", json.dumps(tasks, indent=1, allow_nan=False) + "\n"),
    ):
        with replacing(target / file) as written:
            written.write(text.encode())
    return target / "tasks.json"


def _classes(partition: Partition) -> int:
    if partition.is_multilabel:
        return int(partition.label.shape[1])
    seen = [int(label.max()) + 1 for label in (partition.label, partition.suggested_label) if len(label)]
    return max([len(partition.noise_matrix), len(partition.class_names), *seen])


def _choice(label: int, names: dict[int, str] | None) -> str:
    """With its number, as names may be alike."""
    return str(label) if names is None else f"{label}: {names[label]}"


def _probability(partition: Partition, index: int) -> float:
    return round(float(partition.suggested_probability[index]), 6)


def _task(row: Mapping[str, Any], choices: Sequence[str], model: str, score: float) -> dict[str, Any]:
    given, suggested = ([choices[one] for one in _labels(row[f"{title}_label"])] for title in ("given", "suggested"))
    p_clean = None if row["clean_probability"] == "" else float(row["clean_probability"])
    said = [f"given {', '.join(given) or 'no label'}", _WHY.get(row["reason"], "")]
    said.insert(1, "" if p_clean is None else f"probability of being right {p_clean:.3f}")
    found = {
        "id": "suggested",
        "from_name": _LABEL,
        "to_name": _SAMPLE,
        "type": "choices",
        "value": {"choices": suggested or [_NO_LABEL]},
    }
    return {
        "data": {
            _SAMPLE: row[_SAMPLE],
            "said": "; ".join(filter(None, said)),
            "index": row["index"],
            **({"key": row["key"]} if "key" in row else {}),
            "given_label": str(row["given_label"]),
            "given_class": ", ".join(given),
            "p_clean": p_clean,
            **{name: row[name] for name in ("reason", "rank", "list", "dataset")},
        },
        "predictions": [{"model_version": model, "score": score, "result": [found]}],
    }


def _labels(cell: Any) -> list[int]:
    """The classes that a cell names; -1 is none."""
    return [int(one) for one in str(cell).split() if int(one) >= 0]


def _interface(kind: str, choices: Sequence[str], *, several: bool) -> str:
    label = [*choices, _NO_LABEL] if several else choices
    options = "\n".join(f"    <Choice value={quoteattr(one)}/>" for one in label)
    return f"""<View>
  <Header value="$said"/>
  <{kind.capitalize()} name="{_SAMPLE}" value="${_SAMPLE}"/>
  <Choices name="{_LABEL}" toName="{_SAMPLE}" choice="{"multiple" if several else "single"}" showInLine="true">
{options}
  </Choices>
  <Choices name="{_DECISION}" toName="{_SAMPLE}" choice="single">
    <Choice value="{_DROP}"/>
  </Choices>
</View>
"""


def read_label_studio(source: Path, text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """The tasks of an export, as JSON or JSON-MIN, by their place in it, with the cells of a table of decisions.

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
    found = _result(where, task) if "data" in task else {name: _chosen(task.get(name)) for name in (_LABEL, _DECISION)}
    cells = {"index": str(data["index"]), "given_label": str(data["given_label"]), "dataset": str(data["dataset"])}
    if "key" in data:
        cells["key"] = str(data["key"])
    return cells | _decision(where, cells["given_label"], found.get(_LABEL, []), found.get(_DECISION, []))


def _result(where: str, task: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a person has chosen, by the name of the choices; nothing where the task was skipped."""
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
            f"{where}: expected one decision, but people have made {len(results)} that differ; agree on one in Label"
            " Studio (delete the others, or mark one as ground truth) and export it again."
        )
    return results[0] if results else {}


def _chosen(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value.get("choices")
    chosen = [value] if isinstance(value, str) else value
    return [str(one) for one in chosen] if isinstance(chosen, list) else []


def _decision(where: str, given: str, label: Sequence[str], decision: Sequence[str]) -> dict[str, str]:
    if _DROP in decision:
        return {"decision": "drop"}
    if not label:
        return {"decision": ""}
    chosen = [] if list(label) == [_NO_LABEL] else label
    found = [_CHOICE.fullmatch(one) for one in chosen]
    if None in found:
        raise ValueError(
            f"{where}: expected {_LABEL} to be a choice of labeling.xml, which begins with the number of the class, but"
            f" it is {', '.join(map(repr, label))}."
        )
    new = sorted(int(one[1]) for one in found if one is not None)
    if new == sorted(_labels(given)):
        return {"decision": "keep"}
    return {"decision": "relabel", "suggested_label": " ".join(map(str, new))}
