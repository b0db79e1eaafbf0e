"""Rows by content: what is told apart, and what proves nothing."""

import numpy as np
import pytest
import torch

from lightning_unlearn.data.row_order import ItemByItem, Rows, compare, row_hashes, sample_batches, shuffled
from tests.toys import Blobs


@pytest.mark.parametrize(("total", "size"), [(10, 1), (10, 4), (10, 64), (203, 16), (203, 500), (100_000, 256)])
def test_samples_are_spread_and_in_no_order(total, size):
    batches = sample_batches(total, size)
    index = torch.cat(batches).tolist()
    assert len(set(index)) == len(index) == min(total, max(16 // min(size, 16) * min(size, 16), min(size, 64)))
    assert all(0 <= i < total for i in index)
    assert max(len(batch) for batch in batches) <= size
    assert index != sorted(index)
    assert max(index) - min(index) > total / 2
    if total > 1000:
        assert not set(index) & set(torch.cat(sample_batches(total, size, 1)).tolist())


def test_the_other_order_is_no_reversal():
    for batch, other in zip(sample_batches(1000, 16), shuffled(sample_batches(1000, 16)), strict=True):
        assert sorted(batch.tolist()) == sorted(other.tolist())
        # Which a collate function that turns batches round would undo.
        assert other.tolist() not in (batch.tolist(), batch.flip(0).tolist(), batch.sort().values.tolist())


def rows(order, **columns):
    label = torch.tensor([[i % 2] for i in order])
    return Rows(torch.tensor(order), label, {name: list(map(make, order)) for name, make in columns.items()})


ORDER, OTHER = [4, 7, 1, 9], [9, 4, 7, 1]


def test_what_stays_with_its_index_tells():
    found = compare(rows(ORDER, x=str), rows(OTHER, x=str))
    assert (found.labels, found.moved, found.tells, found.kept) == (0, 0, True, {"x"})


def test_rows_that_are_all_alike_prove_nothing():
    one = [
        Rows(torch.tensor(order), torch.zeros(4, 1, dtype=torch.int64), {"x": ["a"] * 4}) for order in (ORDER, OTHER)
    ]
    found = compare(*one)
    assert (found.labels, found.moved, found.tells, found.kept) == (0, 0, False, set())


def test_a_permutation_is_seen_by_content_where_labels_are_equal():
    label = torch.zeros(4, 1, dtype=torch.int64)
    one = Rows(torch.tensor(ORDER), label, {"x": ["b", "a", "d", "c"]})
    other = Rows(torch.tensor(OTHER), label, {"x": ["a", "b", "c", "d"]})
    assert compare(one, other).moved > 0


def test_numbers_of_places_and_augmentation_prove_nothing():
    def of(order, salt):
        place = [str(place) for place in range(4)]
        return Rows(
            torch.tensor(order), torch.zeros(4, 1, dtype=torch.int64), {"p": place, "x": [f"{salt}{i}" for i in order]}
        )

    found = compare(of(ORDER, "one"), of(OTHER, "other"))
    assert (found.moved, found.tells, found.kept) == (0, False, set())


def test_labels_are_compared_by_index():
    one, other = rows(ORDER), rows(OTHER)
    assert compare(one, other).tells
    assert compare(one, Rows(other.index, other.label.flip(0), {})).labels > 0


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (torch.zeros(3, 2), {""}),
        ((torch.zeros(3, 2), torch.ones(3)), {".0", ".1"}),
        (
            {"ids": torch.zeros(3, 5), "more": {"text": ["a", "b", "c"]}, "scale": torch.tensor(2.0)},
            {".ids", ".more.text"},
        ),
        ([torch.zeros(2), torch.zeros(5), torch.zeros(4)], {""}),
        (np.zeros((3, 4)), {""}),
        (torch.zeros(3, 2, dtype=torch.bfloat16), {""}),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3), torch.zeros(1)]), {""}),
        ((torch.zeros(7), torch.tensor([3, 3, 1])), {".1"}),
        (torch.zeros(3, 2).to_sparse(), set()),
        (object(), set()),
    ],
    ids=["tensor", "pair", "dict", "of different length", "array", "bfloat16", "nested", "packed", "sparse", "foreign"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_parts_with_a_value_for_each_row(x, parts):
    found = row_hashes(x, 3)
    assert set(found) == parts
    assert all(len(hashes) == 3 for hashes in found.values())


@pytest.mark.parametrize("augment", ["torch", "numpy"])
def test_augmentation_is_the_same_whenever_an_item_is_asked_for(augment):
    data = Blobs(augment=augment)
    steady = ItemByItem(data)
    with torch.random.fork_rng():
        first = [steady[i][0] for i in (3, 5, 3)]
        assert first[0].equal(first[2])
        assert not first[0].equal(data[3][0])
    steady.augment = ""
    assert data.augment == ""
    assert steady.x is data.x
    assert len(steady) == len(data)
