"""From what a run directory holds to one HTML file, which needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lightning_unlearn.report.actions import DONE, SampleOutcome, SampleOutcomes
from lightning_unlearn.report.charts import (
    bars,
    curve_charts,
    has_coefficient,
    heat_map,
    histogram,
    precision_chart,
    sensitivities,
)
from lightning_unlearn.report.decisions import labels_of, review_data
from lightning_unlearn.report.record import RunRecord
from lightning_unlearn.results.class_summary import confusion_counts
from lightning_unlearn.results.finding import finding_of
from lightning_unlearn.results.labels import DECISIONS, REASONS, label_issue_mask
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.summary import verdict_of
from lightning_unlearn.utilities.files import replacing

# Classes in a heat map; of more, those with the most suspects.
_CLASSES = 30
# Rows of the table that stands in for the gallery where no script runs.
_WITHOUT_SCRIPT = 50
# What the lists are called on the page.
_LISTED = {"suspect": "suspects", "review": "worth a look", "clean": "clean"}
_SOURCE = re.compile(r"data:(image/(png|jpeg)|audio/wav);base64,[A-Za-z0-9+/=]*")


def write_report(record: RunRecord, file: str | PathLike[str], control: RunRecord | None = None) -> Path:
    """Write the report to a file, and return its path; see :func:`render_report`."""
    with replacing(file) as target:
        # A name may hold what is no character, as that of a file does that was not written in UTF-8.
        target.write(render_report(record, control).encode(errors="replace"))
    return Path(file).expanduser()


def render_report(record: RunRecord, control: RunRecord | None = None) -> str:
    """Return one self-contained HTML page.

    Whatever comes from the data is escaped, and the page's policy lets no script run but its own and nothing be loaded
    from anywhere.

    Args:
        record: of the run.
        control: of a fit to compare it with, whose curves are drawn dashed.
    """
    script = _template("review.js") + _template("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    partition = record.partition
    names = _Names(record)
    outcomes = SampleOutcomes(partition, record.provenance)
    samples = list(_samples(record, outcomes))
    suspects = len(partition.suspect_indices())
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            record=record,
            partition=partition,
            suspects=suspects,
            reasons=_reason_counts(partition),
            names=names,
            classes=partition.class_summary(),
            confusion=_confusion(partition, names),
            noise_matrix=_noise_matrix(partition, names),
            histogram=histogram(partition),
            precision=precision_chart(partition),
            finding=finding_of(partition, names.known) if partition.noise_rate_interval and suspects else "",
            worth=partition.worth_review(),
            curves=curve_charts(record.curves, record.swaps, None if control is None else control.curves),
            control={} if control is None else control.fit,
            neurons=[_neurons(mask) for mask in record.masks],
            accuracy=_accuracy(record),
            timing=_timing(record.seconds),
            actions=outcomes,
            dropped=outcomes.listed_drops(),
            relabeled=outcomes.listed_moves(names),
            pruned=outcomes.listed_neurons(),
            fits=record.provenance.get("fits", []),
            gallery=_json(
                {
                    "names": names.known,
                    "proposes": not outcomes.has_acted,
                    "several": partition.is_multilabel,
                    "reasons": REASONS,
                    "lists": [(word, _LISTED[word]) for word in ("suspect", "review", "clean")],
                    "actions": DONE if outcomes.has_acted else DECISIONS,
                    "samples": samples,
                    "review": review_data(partition, names.known, record.gallery, outcomes.reviewed),
                }
            ),
            plain=samples[:_WITHOUT_SCRIPT],
            sounds=any(sample["card"].get("kind") == "audio" for sample in samples),
            shown=sum(sample["list"] == "suspect" for sample in samples),
            reviewed=sum(sample["list"] == "review" for sample in samples),
            compared=record.inputs is not None,
            doubled=sum(bool(sample["duplicates"]) for sample in samples),
            disputed=sum(any(not one["same"] for one in sample["duplicates"]) for sample in samples),
            spared=sum(sample["list"] == "clean" for sample in samples),
            style=Markup(_template("report.css")),
            script=Markup(script),
            script_digest=digest,
        )
    )
    return page


class _Names:
    """What classes are called."""

    def __init__(self, record: RunRecord) -> None:
        self.known = [str(name) for name in record.class_names]

    def __call__(self, label: int) -> str:
        return self.known[label] if 0 <= label < len(self.known) else str(label)


@cache
def _template(name: str) -> str:
    return files("lightning_unlearn.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = _value
    return environment


def _value(value: Any) -> str:
    """Return a setting, as one writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return "" if value is None else str(value)


def _json(content: Any) -> Markup:
    """Return JSON that is safe in a script element, whatever texts it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _reason_counts(partition: Partition) -> list[tuple[str, int]]:
    counts = partition.reason.long().bincount(minlength=len(REASONS)).tolist()
    return [(word, count) for word, count in list(zip(REASONS, counts, strict=True))[1:] if count]


def _confusion(partition: Partition, names: _Names) -> tuple[Markup, int] | None:
    """Count, among label suspects, given against suggested class; also return the classes left out."""
    if partition.is_multilabel:
        return None
    wrong = label_issue_mask(partition)
    given, suggested = partition.label[wrong], partition.suggested_label[wrong]
    if len(given) == 0:
        return None
    # Whatever the number of classes, only those that occur are counted.
    size = int(torch.cat([given, suggested]).max()) + 1
    weight = given.bincount(minlength=size) + suggested.bincount(minlength=size)
    present = int((weight > 0).sum())
    labels = weight.argsort(descending=True, stable=True)[: min(present, _CLASSES)].sort().values
    counts = confusion_counts(given, suggested, labels)
    called = [names(label) for label in labels.tolist()]
    # Of all samples of the class, so that a class with a few errors is not as strong as one that is half wrong.
    share = counts / partition.label[partition.label >= 0].bincount(minlength=size)[labels].clamp(min=1).unsqueeze(1)
    words = ("given", "suggested", "samples")
    return heat_map(counts, called, words, share, labels.tolist()), present - len(labels)


def _noise_matrix(partition: Partition, names: _Names) -> Markup | None:
    matrix = partition.noise_matrix
    if partition.is_multilabel or not 2 <= len(matrix) <= _CLASSES:
        return None
    called = [names(label) for label in range(len(matrix))]
    return heat_map(matrix, called, ("true class", "given class", "estimated share"), matrix)


def _neurons(mask: NeuronMask) -> tuple[NeuronMask, int, int, Markup]:
    """Return a mask, how many neurons it prunes, how many are constant, and its chart."""
    return mask, len(mask.pruned_indices()), int((~has_coefficient(mask)).sum()), sensitivities(mask)


def _accuracy(record: RunRecord) -> tuple[str, str, str] | None:
    """Return the accuracies before and after, what they are, and the classes of the tile; None where not known."""
    names = ("accuracy_before", "accuracy_after", "best_accuracy_before")
    before, after, best = (record.summary.get(name) for name in names)
    if not isinstance(before, (int, float)) or not isinstance(after, (int, float)):
        return None
    best = best if isinstance(best, (int, float)) and best > before else None
    words = "validation accuracy, before and after"
    words += "" if best is None else f"; {best:.3f} at best before"
    # Where nothing was changed, nothing was gained by it.
    acted = record.summary.get("done") and not record.fit.get("dry run")
    samples = record.summary.get("validation_samples")
    verdict = verdict_of(before, after, best, samples if isinstance(samples, int) else None) if acted else ""
    looks = "pair loss" if verdict == "a loss" else "pair"
    return f"{before:.3f} \u2192 {after:.3f}", f"{words}: {verdict}" if verdict else words, looks


def _timing(seconds: dict[str, float]) -> Markup | None:
    total = float(seconds.get("fit", 0))
    phases = {name: float(value) for name, value in seconds.items() if name != "fit"}
    if total <= 0:
        return None
    rest = max(0.0, total - sum(phases.values()))
    rows = [("training, and all else", rest), *phases.items(), ("fit", total)]
    return bars(rows, total)


def _samples(record: RunRecord, outcomes: SampleOutcomes) -> Iterator[dict[str, Any]]:
    """Yield the samples of the gallery: the most suspect first, what is worth a look, then what a person has kept."""
    partition = record.partition
    listed = partition.listed()
    ranked = [index for index in partition.ranking().tolist() if index in record.gallery]
    # What a person has kept has no doubt, and so no order.
    kept = sorted(index for index in ranked if listed[index] == "clean")
    for index in [*(index for index in ranked if listed[index] != "clean"), *kept]:
        yield {
            "index": index,
            "given": labels_of(partition.label[index]),
            "suggested": labels_of(partition.suggested_label[index]),
            "sure": round(float(partition.suggested_probability[index]), 4),
            "p": round(float(partition.clean_probability[index]), 6),
            "told": partition.noise_rate is not None,
            "support": round(float(partition.label_evidence[index]), 4),
            "reason": REASONS[int(partition.reason[index])],
            "list": listed[index],
            **_outcome(outcomes.of(index)),
            "card": _safe(record.gallery[index]),
            "duplicates": list(_duplicates(record, index)),
        }


def _duplicates(record: RunRecord, index: int) -> Iterator[dict[str, Any]]:
    """Yield other samples with the same input, and whether their label is the same."""
    partition = record.partition
    for one in record.gallery[index].get("duplicates", []):
        given = labels_of(partition.label[one["index"]])
        yield {**_safe(one), "given": given, "same": given == labels_of(partition.label[index])}


def _outcome(outcome: SampleOutcome) -> dict[str, Any]:
    return {"action": outcome.word, "new": list(outcome.new), "person": outcome.by_person}


def _safe(card: dict[str, Any]) -> dict[str, Any]:
    """Return the card without an address that is not the content itself, as a run directory of others may hold."""
    return {
        name: value
        for name, value in card.items()
        if name != "duplicates"
        and (name not in ("src", "picture") or (isinstance(value, str) and _SOURCE.fullmatch(value)))
    }
