from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_unlearn import DataFormat
from lightning_unlearn.data.sample_key import KeyReader, owners_of


@dataclass
class Batch:
    x: torch.Tensor
    key: list[str]


Pair = namedtuple("Pair", "x key")
X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("sample_key", "batch", "container"),
    [
        ("__key__", {"__key__": ["a", "b", "c"], "x": X}, ()),
        ("key", Batch(X, ["a", "b", "c"]), ()),
        ("key", Pair(X, ("a", "b", "c")), ()),
        ("meta.json", {"meta.json": ["a", "b", "c"]}, ()),
        ("images.key", {"images": {"key": ["a", "b", "c"]}, "texts": X}, ("images",)),
        ("1.key", [X, {"key": ["a", "b", "c"]}], (1,)),
        ("key", {"key": np.array(["a", "b", "c"])}, ()),
        (lambda batch: batch[0], (["a", "b", "c"], X), ()),
    ],
)
def test_keys_are_read_where_they_are(sample_key, batch, container):
    reader = KeyReader(sample_key)
    assert reader.read(batch) == ["a", "b", "c"]
    assert reader.container(batch) == container


@pytest.mark.parametrize(
    "keys", [torch.tensor([3, 1, 2**62]), np.array([3, 1, 2**62]), [3, 1, 2**62], (np.int64(3), torch.tensor(1), 2**62)]
)
def test_integers_are_those_of_python(keys):
    found = KeyReader("id").read({"id": keys})
    assert found == [3, 1, 2**62]
    assert all(type(key) is int for key in found)


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        (["a", None], ValueError, "Expected a key for each sample, but in 'key' row 1 of a batch has None"),
        (["", "a"], ValueError, "row 0 of a batch has ''"),
        ([1, "a"], TypeError, "Expected keys of one kind, all integers or all texts, but 'key' has int and str"),
        ([1.5], TypeError, "row 0 has 1.5"),
        ([True], TypeError, "row 0 has True"),
        ([b"a"], TypeError, "row 0 has b'a'"),
        ([2**63], TypeError, "row 0 has 9223372036854775808"),
        (torch.tensor([0.5]), TypeError, r"in 'key', but it holds torch.float32 \(1,\)"),
        (torch.tensor([[1]]), TypeError, r"torch.int64 \(1, 1\)"),
        (torch.tensor([True]), TypeError, "torch.bool"),
        ("abc", TypeError, "but it holds str"),
        ({"a": 1}, TypeError, "but it holds dict of 1"),
    ],
)
def test_other_keys_are_refused(keys, error, said):
    with pytest.raises(error, match=said):
        KeyReader("key").read({"key": keys})


def test_keys_of_another_kind_in_a_later_batch_are_refused():
    reader = KeyReader("key")
    reader.read({"key": [1, 2]})
    with pytest.raises(TypeError, match="has int and str"):
        reader.read({"key": ["1", "2"]})


def test_a_name_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(TypeError, match=r"there is none: a dict of 'x': torch.float32 \(3, 2\), 'label': list of 3"):
        KeyReader("key").read({"x": X, "label": [0, 1, 2]})
    with pytest.raises(TypeError, match=r"there is none: a list of 0: torch\.float32"):
        KeyReader("key").read([X, X])


def test_a_function_that_raises_is_named():
    def names(batch):
        return batch["name"]

    with pytest.raises(TypeError, match=r"sample_key=.*names to return the keys .* raised KeyError: 'name'; the batch"):
        KeyReader(names).read({"x": X})


@pytest.mark.parametrize(
    ("value", "said"), [("", "sample_key"), ("a..b", "to name a field"), (3, "sample_key"), (lambda: 0, "sample_key")]
)
def test_what_is_neither_a_name_nor_a_function_is_refused_at_once(value, said):
    with pytest.raises(ValueError, match=said):
        DataFormat(sample_key=value)


def test_every_key_has_one_owner_and_owners_have_about_as_many():
    keys = [f"shard-{at % 7}/{at:09d}" for at in range(20_000)]
    modules_sharing_parameters = owners_of(keys, 8)
    counts = modules_sharing_parameters.bincount(minlength=8)
    assert counts.sum() == 20_000
    assert counts.min() > 2_300
    assert counts.max() < 2_700
    assert owners_of(keys[:5], 8).equal(modules_sharing_parameters[:5])
    assert owners_of(list(range(10_000)), 4).bincount().min() > 2_300
