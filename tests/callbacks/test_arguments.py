"""Every argument of every constructor, with whatever a user may give: taken and plain, or refused by name."""

import decimal
import enum
import fractions
import functools
import inspect
import io
import json
import pathlib
import re

import numpy as np
import pytest
import torch

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    DataFormat,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.pruning.criteria import Random, Sensitivity
from lightning_unlearn.recipes import Recipe, get_recipe


class Word(str, enum.Enum):
    FULL = "full"
    ACT = "act"
    AUTO = "auto"


class Unprintable:
    def __repr__(self):
        raise RuntimeError("on purpose")


def adam(parameters, lr=0.01):
    return torch.optim.Adam(parameters, lr)


VALUES = {
    "None": None,
    "True": True,
    "0": 0,
    "1": 1,
    "-1": -1,
    "0.5": 0.5,
    "1.0": 1.0,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "1e30": 1e30,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "int64": np.int64(3),
    "uint8": np.uint8(3),
    "float32": np.float32(0.25),
    "float64": np.float64(0.25),
    "float64 3.0": np.float64(3.0),
    "float64 nan": np.float64("nan"),
    "bool_": np.bool_(True),
    "str_": np.str_("auto"),
    "array of none": np.array(0.25),
    "array": np.array([0.25, 0.5]),
    "empty array": np.array([]),
    "scalar": torch.tensor(0.25),
    "scalar bool": torch.tensor(True),
    "tensor": torch.tensor([1, 2]),
    "meta": torch.empty((), device="meta"),
    "text": "x",
    "empty": "",
    "blank": " ",
    "1 in words": "1",
    "yes": "yes",
    "null": "a\0b",
    "bytes": b"x",
    "list": [],
    "names": ["a", "b"],
    "same": ["a", "a"],
    "numbers": [1, 2.5],
    "nested": [["a"]],
    "none in it": [None],
    "dict": {},
    "set": {"a", "b"},
    "generator": (name for name in ("a", "b")),
    "tuple": ("a",),
    "object": object(),
    "unprintable": Unprintable(),
    "lambda": lambda x: x,
    "nothing": lambda: None,
    "three": lambda a, b, c: None,
    "class": int,
    "partial": functools.partial(adam, lr=0.1),
    "path": pathlib.Path("somewhere"),
    "Fraction": fractions.Fraction(1, 4),
    "Decimal": decimal.Decimal("0.25"),
    "complex": 1 + 1j,
    "enum": Word.FULL,
    "other enum": Word.ACT,
    "third enum": Word.AUTO,
    "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1),
}
MAKERS = {
    AttributionPartitionCallback: {"at_epoch": 3},
    SensitivityPruneCallback: {},
    Sensitivity: {},
    Random: {},
    CleanSubsetFinetuneCallback: {},
    UnlearnReport: {},
    DataFormat: {},
    Recipe: {"name": "mine", "function": lambda evidence, reduce: None},
}
# Beside which alone an argument may be given.
WITH = {
    "layers": {"mode": "layers"},
    "lr_scheduler": {"lr": 0.1},
    "mean": {"std": [0.5]},
    "std": {"mean": [0.5]},
}
ARGUMENTS = [(kind, name) for kind in MAKERS for name in list(inspect.signature(kind.__init__).parameters)[1:]]


def plain(value):
    """Whether a checkpoint, and JSON, can hold it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    json.dumps(value, allow_nan=False)
    return True


def is_primitive(value):
    if isinstance(value, (list, tuple)):
        return all(map(is_primitive, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS, ids=lambda one: getattr(one, "__name__", one))
def test_it_is_taken_or_refused_by_name(kind, name):
    unclear = []
    for called, value in VALUES.items():
        given = MAKERS[kind] | WITH.get(name, {}) | {name: value}
        try:
            made = kind(**given)
        except (ValueError, TypeError) as error:
            if not re.search(rf"\b{name}\b", str(error)) or "\n" in str(error) or len(str(error)) > 400:
                unclear.append((called, type(error).__name__, str(error)))
        except Exception as error:
            unclear.append((called, type(error).__name__, str(error)))
        else:
            kept = vars(made).get(name)
            numbers = (bool, int, float, np.generic, np.ndarray, torch.Tensor, fractions.Fraction, decimal.Decimal)
            if name != "recipe" and isinstance(value, (*numbers, str, list, tuple)) and not is_primitive(kept):
                unclear.append((called, "kept", repr(kept)))
            if hasattr(made, "settings"):
                assert plain(made.settings())
                assert plain({n: v for n, v in made.state_dict().items() if is_primitive(v)})
    assert unclear == []


TAKEN = [
    (AttributionPartitionCallback, "at_epoch", np.int64(20), 20),
    (AttributionPartitionCallback, "at_epoch", 20.0, 20),
    (AttributionPartitionCallback, "suspect_precision", np.float64(0.75), 0.75),
    (AttributionPartitionCallback, "suspect_precision", torch.tensor(0.75), 0.75),
    (Recipe, "min_class_fraction", 0, 0.0),
    (DataFormat, "verify", np.bool_(False), False),
    (AttributionPartitionCallback, "dry_run", np.bool_(True), True),
    (SensitivityPruneCallback, "max_val_drop", np.float32(3), 3.0),
    (SensitivityPruneCallback, "criterion", np.str_("random"), "random"),
    (Sensitivity, "fdr_level", np.float64(0.5), 0.5),
    (Random, "seed", np.float32(3), 3),
    (SensitivityPruneCallback, "amount", fractions.Fraction(1, 4), 0.25),
    (SensitivityPruneCallback, "layer", ("a", np.str_("b")), ["a", "b"]),
    (SensitivityPruneCallback, "layer", np.str_("a"), "a"),
    (CleanSubsetFinetuneCallback, "lr", np.float32(0.25), 0.25),
    (CleanSubsetFinetuneCallback, "lr", 1, 1.0),
    (CleanSubsetFinetuneCallback, "layers", "net.3", ["net.3"]),
    (UnlearnReport, "samples", np.int64(7), 7),
    (UnlearnReport, "class_names", np.array(["a", "b"]), ["a", "b"]),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), TAKEN)
def test_it_is_made_plain(kind, name, value, expected):
    kept = getattr(kind(**MAKERS[kind] | WITH.get(name, {}) | {name: value}), name)
    assert kept == expected
    assert type(kept) is type(expected)


@pytest.mark.parametrize(
    ("value", "kept"), [(np.int64(255), 255), (-100, -100), (255.0, 255.0), (np.float32(2.5), 2.5), (None, None)]
)
def test_a_label_that_means_none_is_made_plain(value, kept):
    found = DataFormat(ignore_index=value).ignore_index
    assert (found, type(found)) == (kept, type(kept))
    assert np.isnan(DataFormat(ignore_index=np.float64("nan")).ignore_index)


REFUSED = [
    (AttributionPartitionCallback, "at_epoch", True, "a whole number of epochs of at least 1, .*, but got True"),
    (AttributionPartitionCallback, "at_epoch", 2.5, "a whole number of epochs of at least 1, .*, but got 2.5"),
    (AttributionPartitionCallback, "at_epoch", "2", "a whole number of epochs of at least 1, .*, but got '2'"),
    (AttributionPartitionCallback, "every_n_epochs", 0, "to be at least 1, or None for one partition, but got 0"),
    (AttributionPartitionCallback, "suspect_precision", "x", r"to be a number in \[0.5, 1\), but got 'x'"),
    (AttributionPartitionCallback, "suspect_precision", float("nan"), r"to lie in \[0.5, 1\), but got nan"),
    (Recipe, "min_class_fraction", np.float64("inf"), r"to lie in \[0, 1\), but got inf"),
    (DataFormat, "verify", "no", "to be True or False, but got 'no'"),
    (DataFormat, "verify", 1, "to be True or False, but got 1"),
    (AttributionPartitionCallback, "review", 3, "to be the path of a table of decisions, but got 3"),
    (AttributionPartitionCallback, "layer", ["a"], "to be the dotted path of a layer, or None, but got "),
    (DataFormat, "batch_to_xy", 3, r"to be a function from a batch to \(x, y\), but got 3"),
    (DataFormat, "batch_to_xy", lambda x, y: x, "but <lambda> cannot be called with 1 positional"),
    (AttributionPartitionCallback, "recipe", 3, "to be a name, a dotted path or a function, but got a int"),
    (AttributionPartitionCallback, "recipe", lambda: 0, "but '<lambda>' cannot be called with 1 positional argument"),
    (AttributionPartitionCallback, "recipe", lambda e, *, k: 0, "missing a required argument: 'k'"),
    (
        SensitivityPruneCallback,
        "max_val_drop",
        "yes",
        "a finite number of at least 0, or None for no guard, but got .yes.",
    ),
    (SensitivityPruneCallback, "layer", {"a", "b"}, "to be a list of dotted paths of layers, but got "),
    (SensitivityPruneCallback, "layer", ["a", "a"], "to hold each of the dotted paths of layers once, but got 'a' tw"),
    (Random, "seed", 0.5, "to be a whole number, but got 0.5"),
    (
        SensitivityPruneCallback,
        "max_val_drop",
        float("inf"),
        "to be a finite number of at least 0, or None for no guard, but got inf",
    ),
    (CleanSubsetFinetuneCallback, "lr", float("inf"), "to be a finite number greater than 0, but got inf"),
    (CleanSubsetFinetuneCallback, "lr", "1e-3", "to be a finite number greater than 0, but got '1e-3'"),
    (CleanSubsetFinetuneCallback, "optimizer", VALUES["optimizer"], "from parameters to an optimizer, as torch.*, but"),
    (UnlearnReport, "class_names", "cat", "to be a list of names, but got the text 'cat'"),
    (UnlearnReport, "class_names", {"cat"}, "to be a list of names, but got {'cat'}"),
    (UnlearnReport, "std", [0.0], r"\[0\] to be greater than 0, but got 0"),
    (UnlearnReport, "mean", [0.1, 0.2], "Expected mean and std with the same number of channels, but got 2 and 1"),
]


@pytest.mark.parametrize(("kind", "name", "value", "match"), REFUSED)
def test_it_is_refused_in_one_sentence(kind, name, value, match):
    with pytest.raises((ValueError, TypeError), match=match) as error:
        kind(**MAKERS[kind] | WITH.get(name, {}) | {name: value})
    assert name in str(error.value)


def test_a_name_of_a_recipe_may_be_of_any_kind_of_text():
    assert get_recipe(np.str_("label")).name == "label"
    assert get_recipe(Word.AUTO).name == "auto"
