import pytest
import torch

from lightning_unlearn.attribution import (
    Attributor,
    OOMBatchSplitter,
    is_out_of_memory,
    no_batch_splitting,
    slice_batch,
)
from lightning_unlearn.attribution.layers import LayerPoint
from tests.attribution.nets import CAPTUM, IMAGES, LABEL, ConvNet, Plain, hooks_of, make, short_of_memory


@pytest.mark.parametrize(
    ("structure", "back"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: (x, None, 1.5), lambda x: x[0]),
        (lambda x: {"images": [x], "scale": torch.tensor(1.0)}, lambda x: x["images"][0]),
    ],
    ids=["tensor", "tuple", "dict"],
)
@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_that_does_not_fit_is_taken_in_parts(most, structure, back):
    model, point = make(ConvNet), LayerPoint("hidden")
    expected = Attributor(model, point, model, watch=[LayerPoint("conv")]).attribute(IMAGES, LABEL, rows=True)
    forward, sizes = short_of_memory(lambda x: model(back(x)), most)
    attributor = Attributor(model, point, forward, watch=[LayerPoint("conv")])
    found = attributor.attribute(structure(IMAGES), LABEL, rows=True)
    for name in ("per_neuron", "logits", "class_max"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.watched, expected.watched)
    assert attributor._is_fast
    sizes.clear()
    attributor.margin(structure(IMAGES), LABEL)
    assert max(sizes) <= most  # the size is remembered
    assert sum(sizes) == 7
    assert hooks_of(model) == 0


def test_where_ranks_must_take_as_many_passes_no_batch_is_taken_in_parts():
    model, point = make(ConvNet), LayerPoint("hidden")
    forward, _ = short_of_memory(model, 3)
    with no_batch_splitting(), pytest.raises(RuntimeError, match="out of memory"):
        Attributor(model, point, forward, "integrated_gradients").margin(IMAGES, LABEL)
    Attributor(model, point, forward).margin(IMAGES, LABEL)  # outside, it is


@pytest.mark.parametrize("method", CAPTUM)
def test_other_methods_are_taken_in_parts_too(method):
    model = make(Plain)
    forward, sizes = short_of_memory(model, 12)
    found = Attributor(model, LayerPoint("hidden"), forward, method).margin(IMAGES, LABEL)
    expected = Attributor(model, LayerPoint("hidden"), model, method).margin(IMAGES, LABEL)
    torch.testing.assert_close(found.per_neuron, expected.per_neuron, rtol=1e-5, atol=1e-5)
    assert max(sizes) > 12


def test_one_row_that_does_not_fit_is_an_error():
    model = make(ConvNet)
    forward, sizes = short_of_memory(model, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        Attributor(model, LayerPoint("hidden"), forward).margin(IMAGES, LABEL)
    assert min(sizes) == 1
    assert hooks_of(model) == 0


def test_a_batch_that_cannot_be_split_keeps_its_error_and_says_so():
    tries = []

    def fails(x, label):
        tries.append(len(label))
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\n.*Expected tensors with 7 rows.*but got a set"):
        OOMBatchSplitter()(fails, {1, 2}, LABEL)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\n.*but got a tensor of shape \(3, 7\)"):
        OOMBatchSplitter()(fails, torch.zeros(3, 7), LABEL)
    assert tries == [7, 7]


def test_another_error_is_not_tried_again():
    forward, sizes = short_of_memory(make(ConvNet), 4, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Attributor(make(ConvNet), LayerPoint("hidden"), forward, fast=False).margin(IMAGES, LABEL)
    assert sizes == [7]


def test_parts_that_are_done_are_not_done_again():
    done = []

    def first_rows_are_small(x, label):
        if len(x) > (4 if x[0] == 0 else 1):
            raise MemoryError
        done.extend(x.tolist())
        return len(x)

    in_parts = OOMBatchSplitter()
    assert in_parts(first_rows_are_small, torch.arange(8), torch.zeros(8)) == [4, 1, 1, 1, 1]
    assert done == list(range(8))
    assert in_parts.rows == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_memory_that_the_cpu_does_not_have_is_noticed():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_take_rows_keeps_the_structure():
    from collections import namedtuple

    pair = namedtuple("pair", "left right")(IMAGES, [LABEL, "name", None])
    found = slice_batch(pair, slice(2, 5), 7)
    assert type(found) is type(pair)
    assert torch.equal(found.left, IMAGES[2:5])
    assert torch.equal(found.right[0], LABEL[2:5])
    assert found.right[1:] == ["name", None]


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([2, 3, 4])], ids=["slice", "index"])
def test_take_rows_of_sparse_and_nested_tensors(rows):
    x = torch.arange(21.0).reshape(7, 3)
    assert slice_batch(x.to_sparse(), rows, 7).to_dense().equal(x[2:5])
    nested = torch.nested.nested_tensor([x[row, : 1 + row % 3] for row in range(7)])
    assert [part.tolist() for part in slice_batch(nested, rows, 7).unbind()] == [[6, 7, 8], [9], [12, 13]]


def test_take_rows_of_a_list_of_samples():
    assert slice_batch((list("abcdefg"), IMAGES), slice(2, 5), 7)[0] == ["c", "d", "e"]
    assert slice_batch(list(range(7)), slice(0, 2), 7) == [0, 1]
    with pytest.raises(ValueError, match="but got a list of as many, perhaps one for each sample"):
        slice_batch([torch.zeros(7)] * 7, slice(0, 2), 7)
    with pytest.raises(ValueError, match=r"Expected tensors with 7 rows, .* but got a tensor of shape \(3, 7\)"):
        slice_batch([torch.zeros(3, 7)], slice(0, 2), 7)
