"""Layouts that a batch may have, and in which order they are tried."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_unlearn.data.batch import call_forward, how_to_split, shown_path
from lightning_unlearn.data.layout import Layout, label_fields, layouts_of

B = 4
X, Y, Z = torch.zeros(B, 3), torch.arange(B), torch.arange(B) + 10
NAMES = ["a", "b", "c", "d"]
Row = namedtuple("Row", ["image", "target", "path"])


@dataclasses.dataclass
class Record:
    x: Any
    cls: Any


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, text, offsets):
        return text, offsets


class Whole(nn.Module):
    def forward(self, batch):
        return batch


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Y), [(1,), (0,)]),
        ((X, Y, NAMES), [(1,), (0,)]),
        ((X, Y, {"id": Z}), [(1,), (0,)]),
        ((X, {"boxes": X, "labels": Y}), [(1, "labels")]),
        ((Y, torch.zeros(9), Z), [(2,), (0,)]),
        ({"x": X, "y": Z, "label": Y}, [("label",), ("y",)]),
        ({"x": X, "meta": {"label": Y}}, [("meta", "label")]),
        ({"x": X, "cls": Y}, []),
        (Row(X, Y, NAMES), [("target",)]),
        (Record(X, Y), []),
        (X, []),
        ((X, NAMES), []),
    ],
)
def test_where_labels_may_lie_the_usual_place_first(batch, expected):
    found = list(dict.fromkeys(label_fields(batch, B)))
    assert found[: len(expected)] == expected
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("batch", "module", "expected"),
    [
        ((X, Y), One(), [X]),
        ((X, Y, NAMES), One(), [X]),
        ({"image": X, "path": NAMES, "label": Y}, One(), [X]),
        ({"ids": X, "label": Y}, Whole(), ["batch"]),
        ({"inputs": {"text": X, "offsets": Z}, "label": Y}, Two(), [X, Z]),
        (Row(X, Y, NAMES), One(), [X]),
    ],
)
def test_the_first_way_that_fits_forward(batch, module, expected):
    found = []
    for layout in layouts_of(batch, B, module):
        x, label = layout.split(batch)
        assert label is Y
        try:
            found = call_forward(module, x)
        except TypeError:
            continue
        if isinstance(found, (torch.Tensor, tuple)) or module.__class__ is Whole:
            break
    if expected == ["batch"]:
        assert found is batch
        return
    parts = found if isinstance(found, tuple) else (found,)
    assert all(one is other for one, other in zip(parts, expected, strict=True))


def test_labels_first_leave_the_rest_to_forward():
    batch = (Y, torch.zeros(9), Z)
    layouts = [layout for layout in layouts_of(batch, B, Two()) if layout.label == (0,)]
    assert layouts[0] == Layout((0,), "fields", (1, 2))


def test_a_packed_sequence_is_one_argument():
    packed = pack_sequence([torch.zeros(2, 3)] * B)
    assert call_forward(One(), packed) is packed
    assert next(layouts_of((packed, Y), B, One())).split((packed, Y)) == (packed, Y)


def test_a_named_tuple_is_unpacked_where_forward_takes_its_fields():
    pair = namedtuple("Pair", ["text", "offsets"])(X, Z)
    assert call_forward(Two(), pair) == (X, Z)


def test_a_batch_without_the_fields_does_not_fit():
    layout = Layout(("meta", "label"), "names")
    assert layout.fits({"x": X, "meta": {"label": Y}})
    assert not layout.fits({"x": X, "label": Y})
    assert not layout.fits((X, Y))


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ({"img": X, "cls": Y}, r"lambda batch: (batch['img'], batch['cls'])"),
        (Record(X, Y), "lambda batch: (batch.x, batch.cls)"),
        ((X, Y, NAMES), "lambda batch: (batch[0], batch[1])"),
        ((NAMES, 3), "..."),
        (7, "..."),
    ],
)
def test_the_line_to_write_has_the_fields_of_the_batch(batch, line):
    assert how_to_split(batch).startswith(f"pass data=DataFormat(batch_to_xy={line}) to Attribution")


def test_a_field_is_shown_as_one_would_write_it():
    assert shown_path(("meta", 0, "label")) == "batch['meta'][0]['label']"
