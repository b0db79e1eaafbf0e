"""A partition as tasks of Label Studio, with the suggestions as predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from lightning_unlearn.results.label_studio import DECISION, DROP, LABEL, NO_LABEL, SAMPLE, labels_in
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.table import columns_of
from lightning_unlearn.utilities.checks import check_choice
from lightning_unlearn.utilities.files import replacing, target_folder

_KINDS = ("image", "audio", "text", "video")
_WHY = {"label": "wrong for its label", "input": "wrong for its input", "both": "wrong for its label and input"}


def to_label_studio(
    partition: Partition,
    folder: str | PathLike[str],
    data: Sequence[str] | None = None,
    *,
    kind: Literal["image", "audio", "text", "video"] = "image",
    suspects_only: bool = True,
    review: int = 0,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write ``tasks.json``, to import into a Label Studio project, and ``labeling.xml``, its labeling interface.

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
        review: how many of the other samples are tasks too, the first of ``partition.review_ranking()``.
        class_names: the name of every class, by label; by default the partition's own.

    Returns:
        the path of ``tasks.json``.

    Raises:
        ValueError: without data, for another number of them, or if there is not one name per class.
    """
    kind = check_choice("kind", kind, _KINDS)
    if data is None and not partition.files:
        raise ValueError(
            f"Expected data, an address or a text for each of {len(partition)} samples, since the dataset of"
            " the fit lists no files; pass data=[...]."
        )
    names = partition.known_names(class_names)
    shows = list(partition.files if data is None else data)
    columns = columns_of(partition, suspects_only=suspects_only, review=review, names=names, columns={SAMPLE: shows})
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
    """Return the choice of a class, with its number, as names may be alike."""
    return str(label) if names is None else f"{label}: {names[label]}"


def _probability(partition: Partition, index: int) -> float:
    return round(float(partition.suggested_probability[index]), 6)


def _task(row: Mapping[str, Any], choices: Sequence[str], model: str, score: float) -> dict[str, Any]:
    given, suggested = ([choices[one] for one in labels_in(row[f"{title}_label"])] for title in ("given", "suggested"))
    p_clean = None if row["clean_probability"] == "" else float(row["clean_probability"])
    said = [f"given {', '.join(given) or 'no label'}", _WHY.get(row["reason"], "")]
    said.insert(1, "" if p_clean is None else f"probability of being right {p_clean:.3f}")
    found = {
        "id": "suggested",
        "from_name": LABEL,
        "to_name": SAMPLE,
        "type": "choices",
        "value": {"choices": suggested or [NO_LABEL]},
    }
    return {
        "data": {
            SAMPLE: row[SAMPLE],
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


def _interface(kind: str, choices: Sequence[str], *, several: bool) -> str:
    label = [*choices, NO_LABEL] if several else choices
    options = "\n".join(f"    <Choice value={quoteattr(one)}/>" for one in label)
    return f"""<View>
  <Header value="$said"/>
  <{kind.capitalize()} name="{SAMPLE}" value="${SAMPLE}"/>
  <Choices name="{LABEL}" toName="{SAMPLE}" choice="{"multiple" if several else "single"}" showInLine="true">
{options}
  </Choices>
  <Choices name="{DECISION}" toName="{SAMPLE}" choice="single">
    <Choice value="{DROP}"/>
  </Choices>
</View>
"""
