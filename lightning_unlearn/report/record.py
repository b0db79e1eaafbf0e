"""What a run directory holds: results as arrays without a pickle, the rest as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from lightning_unlearn.results.duplicates import InputHashes
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.storage import fits
from lightning_unlearn.utilities.checks import reason_of, shown
from lightning_unlearn.utilities.files import target_folder, write_json

RUN_VERSION = 2
_INDEX = re.compile(r"[0-9]{1,18}")
_RUN, _GALLERY, _PARTITION, _INPUTS = "run.json", "gallery.json", "partition.npz", "inputs.npz"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A fit, as its report needs it. All but the results is JSON.

    Args:
        partition: the last one that was acted on, or the one that was not.
        masks: of pruned neurons, one for each layer.
        gallery: what is shown of a sample (see :class:`~lightning_unlearn.report.samples.SampleView`), by its index in
            the data set.
        inputs: hashes of the samples' inputs, by which near duplicates are found; None where they are not known.
        summary: fields of :class:`~lightning_unlearn.results.summary.RepairSummary`; empty if the fit did not come to
            its end.
        rounds: fields of :class:`~lightning_unlearn.results.summary.PartitionRound`, for every computation of the
            partition.
        suspect_precision: share of the suspects that was to be wrong at least.
        class_names: by label; empty where they are not known.
        fit: what was fitted, with what and when, in words.
        provenance: what was done to which samples and neurons, with versions, seeds and settings, as
            ``AttributionPartitionCallback.provenance`` has it.
        seconds: of the fit and of its phases.
        curves: of each metric, pairs of an epoch (counted from 0) and the value at its end.
        swaps: epochs, counted from 0, at whose start another set of samples was trained on.
    """

    partition: Partition
    masks: tuple[NeuronMask, ...] = ()
    gallery: dict[int, dict[str, Any]] = field(default_factory=dict)
    inputs: InputHashes | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    suspect_precision: float = 0.85
    class_names: list[str] = field(default_factory=list)
    fit: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    swaps: list[int] = field(default_factory=list)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the run directory, and return it; it is made, and an earlier run's files are replaced."""
        target = target_folder(folder)
        self.partition.save(target / _PARTITION)
        names = [f"mask-{at}.npz" for at, _ in enumerate(self.masks)]
        for name, mask in zip(names, self.masks, strict=True):
            mask.save(target / name)
        if self.inputs is not None:
            self.inputs.save(target / _INPUTS)
        else:
            (target / _INPUTS).unlink(missing_ok=True)
        about = {name: getattr(self, name) for name in _plain_fields()}
        write_json(target / _GALLERY, {"version": RUN_VERSION, "samples": {str(i): c for i, c in self.gallery.items()}})
        # Last, since it says that the others are there.
        write_json(target / _RUN, {"version": RUN_VERSION, "masks": names, **about})
        return target

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> RunRecord:
        """Read a run directory; one with ``partition.npz`` alone will do.

        Raises:
            ValueError: for a folder without a run, and for files that are not as they were written.
        """
        source = Path(folder).expanduser()
        if not source.is_dir():
            found = "is a file" if source.exists() else "does not exist"
            raise ValueError(f"Expected a folder that UnlearnReport has written, but {source} {found}.")
        if not (source / _PARTITION).is_file():
            raise ValueError(
                f"Expected {source} to be a folder that UnlearnReport has written, but there is no {_PARTITION} in it;"
                " add UnlearnReport() to the Trainer's callbacks, which writes one when the fit ends (by default"
                " 'unlearn' in the logger's folder)."
            )
        partition = Partition.load(source / _PARTITION)
        if not (source / _RUN).is_file():
            return cls(partition)
        about, gallery = _read(source / _RUN), _read(source / _GALLERY)
        masks = tuple(_mask(source / _RUN, name) for name in about.get("masks", []))
        values = {name: about[name] for name in _plain_fields() if name in about}
        samples = gallery.get("samples", {})
        if not fits(samples, dict[str, dict[str, Any]]) or not all(_INDEX.fullmatch(index) for index in samples):
            raise ValueError(
                f"{_wanted(source / _GALLERY)} its samples are not cards by the index of a sample; run the fit again."
            )
        inputs = InputHashes.load(source / _INPUTS) if (source / _INPUTS).is_file() else None
        return cls(partition, masks, {int(index): card for index, card in samples.items()}, inputs, **values)


def _plain_fields() -> list[str]:
    return [one.name for one in dataclasses.fields(RunRecord)][4:]


def _mask(run: Path, name: Any) -> NeuronMask:
    file = run.parent / Path(name).name if isinstance(name, str) else None
    if file is None or not file.is_file():
        raise ValueError(f"{_wanted(run)} there is no file of the mask {shown(name)}; run the fit again.")
    return NeuronMask.load(file)


def _wanted(path: Path) -> str:
    return f"Expected {path} to be a file that UnlearnReport has written, but"


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{_wanted(path)} it cannot be read ({reason_of(error)}); run the fit again.") from error
    if not isinstance(content, dict) or content.get("version") != RUN_VERSION:
        found = shown(content.get("version") if isinstance(content, dict) else None)
        raise ValueError(
            f"{_wanted(path)} it has format version {found} where this version of lightning_unlearn has {RUN_VERSION}."
        )
    hints = get_type_hints(RunRecord)
    hints["masks"] = list[Any]
    for name, value in content.items():
        if name in hints and not fits(value, hints[name]):
            word = type(value).__name__ if not isinstance(value, (list, dict)) else "list or table of other values"
            raise ValueError(f"{_wanted(path)} its {name} is a {word}; run the fit again.")
    return content
