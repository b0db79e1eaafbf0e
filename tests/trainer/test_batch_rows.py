from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_unlearn.trainer.batch_rows import take_rows

Pair = namedtuple("Pair", "x y")
ROWS = torch.tensor([0, 2])
X, Y = torch.arange(6).reshape(3, 2), torch.tensor([7, 8, 9])


@dataclass
class Record:
    x: torch.Tensor
    key: list[str]


def test_rows_of_every_kind_of_batch_are_taken_and_the_batch_stays():
    batch = {
        "x": X,
        "key": ["a", "b", "c"],
        "array": np.arange(3),
        "boxes": [torch.zeros(1, 4), torch.ones(2, 4), torch.zeros(0, 4)],
        "inner": {"ids": X, "names": ("a", "b", "c")},
        "scale": 0.5,
        "nothing": None,
        "split": "train",
        "empty": {},
    }
    found = take_rows(batch, ROWS, 3)
    assert found["x"].tolist() == [[0, 1], [4, 5]]
    assert found["key"] == ["a", "c"]
    assert found["array"].tolist() == [0, 2]
    assert [len(boxes) for boxes in found["boxes"]] == [1, 0]
    assert found["inner"]["ids"].tolist() == [[0, 1], [4, 5]]
    assert found["inner"]["names"] == ("a", "c")
    assert (found["scale"], found["nothing"], found["split"], found["empty"]) == (0.5, None, "train", {})
    assert batch["x"] is X
    assert batch["key"] == ["a", "b", "c"]
    assert len(batch["inner"]["names"]) == 3


@pytest.mark.parametrize("kind", [tuple, list, lambda parts: Pair(*parts)])
def test_a_collection_keeps_its_kind(kind):
    batch = kind([X, Y])
    found = take_rows(batch, ROWS, 3)
    assert type(found) is type(batch)
    assert found[0].tolist() == [[0, 1], [4, 5]]
    assert found[1].tolist() == [7, 9]


def test_a_batch_of_as_many_fields_as_samples_is_taken_by_rows():
    x, y = torch.arange(4).reshape(2, 2), torch.tensor([5, 6])
    found = take_rows((x, y), torch.tensor([1]), 2)
    assert (found[0].tolist(), found[1].tolist()) == ([[2, 3]], [6])
    found = take_rows({"several": [x, x]}, torch.tensor([1]), 2)
    assert [one.tolist() for one in found["several"]] == [[[2, 3]], [[2, 3]]]


def test_dataclasses_and_other_mappings():
    record = take_rows(Record(X, ["a", "b", "c"]), ROWS, 3)
    assert (record.x.tolist(), record.key) == ([[0, 1], [4, 5]], ["a", "c"])
    mapping = take_rows(UserDict(x=X), ROWS, 3)
    assert isinstance(mapping, UserDict)
    assert mapping["x"].tolist() == [[0, 1], [4, 5]]


def test_sparse_rows():
    assert take_rows({"x": X.to_sparse()}, ROWS, 3)["x"].to_dense().tolist() == [[0, 1], [4, 5]]


def test_what_lies_elsewhere_in_the_batch_stays():
    other = {"x": X}
    found = take_rows({"noisy": {"x": X, "key": ["a", "b", "c"]}, "other": other}, ROWS, 3, ("noisy",))
    assert found["noisy"]["x"].tolist() == [[0, 1], [4, 5]]
    assert found["other"] is other
    assert len(take_rows([other, {"x": X}], ROWS, 3, (1,))[0]["x"]) == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(5), r"Expected 3 rows, but a tensor of a batch has shape \(5,\)"),
        (np.zeros((2, 3)), r"an array of a batch has shape \(2, 3\)"),
        ({1, 2}, "holds a set"),
        (pack_sequence([torch.zeros(2), torch.zeros(1)]), "holds a PackedSequence"),
    ],
)
def test_what_has_no_row_for_each_sample_is_refused(value, said):
    with pytest.raises(TypeError, match=said):
        take_rows({"x": value}, ROWS, 3)
