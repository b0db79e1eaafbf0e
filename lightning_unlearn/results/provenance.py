"""Where a result comes from: versions, seeds, settings, and what was done to which samples and neurons."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_unlearn.results.labels import DECISIONS
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review import Review
from lightning_unlearn.results.summary import PartitionRound
from lightning_unlearn.utilities.checks import plain
from lightning_unlearn.utilities.files import write_json

FORMAT = "lightning_unlearn.provenance"
VERSION = 1
_PACKAGES = ("torch", "lightning", "pytorch-lightning", "captum", "torchmetrics", "numpy")


def fit_record(from_epoch: int, ranks: int, batch_size: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a fit, or the rest of one that goes on from a checkpoint, is made with.

    Args:
        from_epoch: the first, counted from 0.
        ranks: how many processes.
        batch_size: of each; None where batches do not say.
        settings: of each callback of this package, by its name.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "from_epoch": from_epoch,
        "ranks": ranks,
        "batch_size": batch_size,
        "seed": None if seed is None else int(seed),
        "versions": versions(_PACKAGES),
        "settings": dict(settings),
    }


def provenance(
    partition: Partition,
    *,
    fits: Sequence[Mapping[str, Any]],
    rounds: Sequence[PartitionRound],
    review: Review | None,
    done: Mapping[str, Mapping[str, Any]],
    accuracy: Mapping[str, float | None],
    validation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all of it as primitives.

    Args:
        partition: the one that was acted on last.
        fits: a :func:`fit_record` of each.
        rounds: every computation of the partition.
        review: what a person has decided; None where nobody has.
        done: what each callback says of itself, by its name.
        accuracy: on the validation data, before and after.
        validation: what was found of the validation set; None where it was not judged.
    """
    return to_jsonable(  # type: ignore[no-any-return]  # a dict stays one
        {
            "format": FORMAT,
            "version": VERSION,
            "fits": fits,
            "data": {"samples": len(partition), "fingerprint": partition.fingerprint},
            "partition": {
                "recipe": partition.recipe,
                "layer": partition.layer,
                "epoch": partition.epoch,
                "noise_rate": partition.noise_rate,
                "noise_rate_interval": partition.noise_rate_interval,
                "expected_precision": partition.expected_precision,
                "worth_review": partition.worth_review(),
                "suspects": partition.suspect_indices().sort().values,
                "status": partition.status.value,
                "warning": partition.warning,
                "rounds": [vars(drawn) for drawn in rounds],
            },
            "validation": validation,
            "review": None if review is None else _review_entry(review, partition.label),
            "done": done,
            "accuracy": accuracy,
        }
    )


def write_provenance(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a record as JSON; folders are made, and what was there is replaced in one step."""
    write_json(path, record)


def settings_of(callback: Any, **known: Any) -> dict[str, Any]:
    """Return a callback's constructor arguments, as its attributes of the same names have them.

    Args:
        callback: of this package.
        known: those that it keeps elsewhere.
    """
    names = list(inspect.signature(type(callback).__init__).parameters)[1:]
    found = {name: known[name] if name in known else getattr(callback, name, None) for name in names}
    return {name: to_jsonable(value) for name, value in found.items()}


def to_jsonable(value: Any) -> Any:
    """Return a value as JSON, and a checkpoint that is loaded without pickled classes, can hold it.

    Functions and classes become their dotted path, other objects that of their class.

    Example:
        >>> to_jsonable({"a": (1, float("nan")), "b": math.prod})
        {'a': [1, 'nan'], 'b': 'math.prod'}
    """
    value = plain(value)
    if isinstance(value, float):
        # Of a subclass, as numpy.float64, the number alone.
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return value if isinstance(value, bool) else int(value)
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        # A tensor or an array.
        return to_jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(plain(key)): to_jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def copied(state: Any) -> Any:
    """Return a copy of tensors and primitives in dicts and lists, which a later change of either leaves alone.

    Example:
        >>> known = {"rounds": [[0, 1.0]]}
        >>> state = copied(known)
        >>> known["rounds"].append([1, 0.5])
        >>> state
        {'rounds': [[0, 1.0]]}
    """
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(part) for key, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(part) for part in state)
    return state


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, this package and the other packages installed, imported or not."""
    found = {"python": platform.python_version()}
    # Not by its metadata, which a checkout on the path has not.
    found["lightning-unlearn"] = importlib.import_module("lightning_unlearn").__version__
    found |= {name: version for name in packages if (version := _installed(name)) is not None}
    return found


@functools.cache  # several ms for each fit else: every package's folder is looked through
def _installed(package: str) -> str | None:
    found = next(iter(importlib.metadata.distributions(name=package)), None)
    return None if found is None else found.version


def _review_entry(review: Review, label: Tensor) -> dict[str, Any]:
    """Return which samples a person has decided of, without the decisions that do not count."""
    decided = review.apply_to(label)
    by_decision = {name: (decided.decision == code).nonzero().flatten() for code, name in enumerate(DECISIONS)}
    return {"path": review.path, **by_decision, "stale": decided.stale}
