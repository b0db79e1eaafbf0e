import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from lightning_unlearn import DataFormat
from lightning_unlearn.data.batch import LABEL_NAMES, call_forward, split_batch
from lightning_unlearn.data.task_format import IGNORED, TaskFormat, extract_logits

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
Named = namedtuple("Named", ["label", "image"])
Unnamed = namedtuple("Unnamed", ["first", "second"])


@dataclasses.dataclass
class Record:
    x: Tensor
    target: Tensor


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Unnamed(X, Y)], ids=["tuple", "list", "named tuple of other names"])
def test_a_pair_is_split(batch):
    assert split_batch(batch) == (X, Y)


def test_several_inputs_come_before_the_labels():
    (first, second), label = split_batch((X, X + 1, Y))
    assert first is X
    assert second.equal(X + 1)
    assert label is Y


@pytest.mark.parametrize("name", LABEL_NAMES)
@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_labels_with_a_usual_name_are_found(kind, name):
    x, label = split_batch(kind({name: Y, "image": X, "path": ["a", "b"]}))
    assert label is Y
    assert x == {"image": X, "path": ["a", "b"]}


@pytest.mark.parametrize(("batch", "key"), [(Named(Y, X), "image"), (Record(X, Y), "x")])
def test_labels_of_named_tuples_and_dataclasses(batch, key):
    x, label = split_batch(batch)
    assert label is Y
    assert x == {key: X}


def test_of_several_usual_names_the_first_counts_and_the_rest_is_input():
    assert split_batch({"y": X, "labels": Y}) == ({"y": X}, Y)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": X, "cls": Y}, "labels under one of the names .*, but it has 'x', 'cls'"),
        ({"x": X, "label": [0, 1]}, "but it has 'x', 'label'"),
        ({}, "but it has none"),
        ((X,), "but got a tuple of 1"),
        ([X, [0, 1]], "but got a list of 2"),
        (X, "but got a Tensor of 2"),
        (7, "but got a int"),
    ],
)
def test_another_batch_is_refused(batch, found):
    with pytest.raises(TypeError, match=f"{found}; pass data=DataFormat.batch_to_xy"):
        split_batch(batch)


# How forward is called


class One(nn.Module):
    def forward(self, image):
        return image


class Two(nn.Module):
    def forward(self, ids, mask=None):
        return ids, mask


class Whole(nn.Module):
    def forward(self, batch):
        return batch["a"], batch["b"]


class Any(nn.Module):
    def forward(self, **inputs):
        return inputs


class Rows(nn.Module):
    def forward(self, *inputs):
        return inputs


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (One(), X, X),
        (One(), (X,), X),
        (One(), {"image": X}, X),
        (One(), {"image": X, "path": ["a"]}, X),
        (One(), {"pixels": X}, X),
        (Two(), (X,), (X, None)),
        (Two(), (X, Y), (X, Y)),
        (Two(), {"mask": Y, "ids": X, "length": 3}, (X, Y)),
        (Two(), {"ids": X}, (X, None)),
        (Whole(), {"a": X, "b": Y}, (X, Y)),
        (Any(), {"a": X, "b": Y}, {"a": X, "b": Y}),
        (Rows(), (X, Y, X), (X, Y, X)),
        (torch.compile(Two(), backend="eager"), {"ids": X, "mask": Y}, (X, Y)),
    ],
)
def test_forward_gets_what_it_names(module, x, expected):
    with torch.compiler.set_stance("force_eager"):
        found = call_forward(module, x)
    if isinstance(expected, dict):
        assert found == expected
        return
    parts = found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,)
    assert all(one is other for one, other in zip(*parts, strict=True))


class Needs(nn.Module):
    def forward(self, ids, mask):
        return ids


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (One(), (X, X), "as forward takes, 1, but besides the last, the labels, it has 2"),
        (Two(), (X, X, X), "as forward takes, 1 to 2, but .* it has 3"),
        (Needs(), (X,), "as forward takes, 2, but .* it has 1"),
        (Needs(), {"ids": X}, "with 'ids', 'mask', which forward takes, but besides the labels it has 'ids'; pass"),
    ],
)
def test_other_inputs_than_forward_takes_are_refused(module, x, message):
    with pytest.raises(TypeError, match=message):
        call_forward(module, x)


@pytest.mark.parametrize(
    "output", [X, {"logits": X, "loss": 1}, SimpleNamespace(logits=X), (X, "features"), [X]], ids=type
)
def test_logits_are_found_in_what_forward_returns(output):
    assert extract_logits(output) is X


# Tasks


def settled(outputs=3, label=None, **kwargs):
    task_format = TaskFormat(DataFormat(**kwargs))
    task_format.infer_task(torch.zeros(4, outputs), torch.zeros(4, dtype=torch.int64) if label is None else label)
    return task_format


ONE_HOT = one_hot(torch.tensor([0, 2, 1, 2]), 3)
SEVERAL = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("outputs", "label", "task"),
    [
        (3, torch.tensor([0, 2, 1, 2]), "multiclass"),
        (2, torch.tensor([0, 1, 1, 0]), "multiclass"),
        (3, torch.tensor([[0], [2], [1], [2]]), "multiclass"),
        (3, ONE_HOT, "multiclass"),
        (3, ONE_HOT.float(), "multiclass"),
        (3, 0.9 * ONE_HOT, "multiclass"),
        (3, SEVERAL, "multilabel"),
        (3, SEVERAL.float(), "multilabel"),
        (3, SEVERAL.bool(), "multilabel"),
        (3, SEVERAL.masked_fill(SEVERAL == 0, -100), "multilabel"),
        (1, torch.tensor([0.0, 1.0, 1.0, 0.0]), "binary"),
    ],
)
def test_the_first_batch_settles_the_task(outputs, label, task):
    task_format = settled(outputs, label)
    assert task_format.task == task
    assert task_format.num_classes == (outputs if task == "multiclass" else 2)
    assert task_format.rows_per_sample == (3 if task == "multilabel" else 1)


def test_a_task_is_settled_once_and_until_it_is_forgotten():
    task_format = settled(3)
    task_format.infer_task(torch.zeros(4, 1), torch.zeros(4))
    assert task_format.task == "multiclass"
    task_format.forget()
    with pytest.raises(RuntimeError, match="not known yet"):
        _ = task_format.task
    task_format.infer_task(torch.zeros(4, 1), torch.zeros(4))
    assert task_format.task == "binary"


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        (
            "binary",
            2,
            "one logit per sample with task='binary', but it returned 2; pass .*task='multiclass'",
        ),
        ("multiclass", 1, "a logit for each class, .* but it returned 1; pass data=DataFormat\\(task='binary'\\)"),
    ],
)
def test_a_task_that_does_not_fit_the_outputs_is_refused(task, outputs, message):
    with pytest.raises(ValueError, match=message):
        settled(outputs, task=task)


@pytest.mark.parametrize(("name", "value"), [("task", "regression"), ("soft_labels", "keep")])
def test_unknown_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Expected {name} to be .*'.*', but got '{value}'"):
        DataFormat(**{name: value})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_class_indices(dtype, shape):
    label = settled(2).labels(torch.tensor([0, 1, 1, 0], dtype=dtype).reshape(shape), 4)
    assert label.dtype == torch.int64
    assert label.tolist() == [0, 1, 1, 0]


def test_labels_of_several_batches_are_read_at_once_or_each_in_its_own_form(monkeypatch):
    task_format, calls = settled(), []
    classes = task_format.classes
    monkeypatch.setattr(task_format, "classes", lambda label, size: calls.append(size) or classes(label, size))
    alike = [(torch.tensor([1, 0]), 2), (torch.tensor([2, 9, -100]), 3)]
    assert task_format.classes_of_batches(alike).tolist() == [1, 0, 2, -2, -1]
    assert calls == [5]
    other = (torch.tensor([[1], [2]], dtype=torch.int32), 2)
    assert task_format.classes_of_batches([*alike, other]).tolist() == [1, 0, 2, -2, -1, 1, 2]
    assert calls == [5, 2, 3, 2]
    with pytest.raises(ValueError, match=r"^Expected a dense tensor of labels, but got list"):
        task_format.classes_of_batches([*alike, ([1, 2], 2)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16, torch.bool])
def test_one_hot_rows_are_classes(dtype):
    assert settled(label=ONE_HOT).labels(ONE_HOT.to(dtype), 4).tolist() == [0, 2, 1, 2]


def test_soft_labels_are_refused_or_become_the_likeliest_class():
    soft = 0.7 * ONE_HOT + 0.1
    with pytest.raises(
        ValueError,
        match=r"a single 1 in each row, but found \[0.8, 0.1, 0.1\] in .*; pass data=.*\(soft_labels=",
    ):
        settled(label=soft).labels(soft, 4)
    assert settled(label=soft, soft_labels="argmax").labels(soft, 4).tolist() == [0, 2, 1, 2]
    probabilities = torch.tensor([0.2, 0.9, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"labels 0 or 1 of a binary task, but found 0\.2"):
        settled(1).labels(probabilities, 4)
    assert settled(1, soft_labels="argmax").labels(probabilities, 4).tolist() == [0, 1, 1, 0]


def test_a_later_row_that_is_not_one_hot_is_refused():
    with pytest.raises(ValueError, match=r"found \[1, 1, 0\] in .* index 8; .* or task='multilabel' if there may be"):
        settled(label=ONE_HOT).labels(SEVERAL, 4, 8)


@pytest.mark.parametrize("soft", ["error", "argmax"])
@pytest.mark.parametrize("row", [[torch.nan, 0, 0], [0, 0, 0], [-1, 2, 0], [torch.inf, 0, 0]])
def test_rows_that_are_no_probabilities_are_refused(soft, row):
    with pytest.raises(ValueError, match="a single 1 in each row"):
        settled(label=ONE_HOT, soft_labels=soft).labels(torch.tensor([row] * 2, dtype=torch.float32), 2)


@pytest.mark.parametrize(
    ("task_format", "label", "message"),
    [
        (settled(), torch.zeros(4), r"integer labels of shape \(4,\), .* but got torch.float32 of shape \(4,\)"),
        (settled(), torch.zeros(2, dtype=torch.int64), r"but got torch.int64 of shape \(2,\)"),
        (settled(), torch.zeros(4, 2, dtype=torch.int64), r"but got torch.int64 of shape \(4, 2\)"),
        (settled(), torch.zeros(4, dtype=torch.complex64), r"but got torch.complex64 of shape \(4,\)"),
        (settled(), [0, 1, 2, 0], "a dense tensor of labels, but got list"),
        (settled(label=SEVERAL.to_sparse()), SEVERAL.to_sparse(), r"but got torch.sparse_coo and torch.int64 of shape"),
        (settled(), torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged), "but got a nested tensor"),
        (settled(1), torch.zeros(4, 2), r"labels of shape \(4,\), 0 or 1 for each logit, but got torch.float32 of"),
        (settled(label=SEVERAL), torch.zeros(4), r"labels of shape \(4, 3\), 0 or 1 for each logit, but got"),
    ],
)
def test_labels_of_another_form_are_refused(task_format, label, message):
    with pytest.raises(ValueError, match=f"{message}.*pass data=DataFormat.batch_to_xy="):
        task_format.labels(label, 4)


@pytest.mark.parametrize(("label", "found"), [([0, 5, 1], "5"), ([0, -1, 9], "-1"), ([3, 0, 0], "3")])
def test_labels_out_of_range_are_refused_with_the_dataset_index(label, found):
    message = (
        rf"labels in \[0, 3\), as the model has 3 outputs, but found {found} in the .* dataset index 640; pass data"
    )
    with pytest.raises(ValueError, match=message):
        settled().labels(torch.tensor(label), 3, 640)


def test_labels_that_start_at_one_are_to_be_numbered_from_zero():
    with pytest.raises(ValueError, match=r"or number the classes from 0 \(batch_to_xy\)\.$"):
        settled().labels(torch.tensor([1, 2, 3]), 3)


def test_the_label_to_ignore():
    assert settled().labels(torch.tensor([0, -100, 2, 1]), 4).tolist() == [0, IGNORED, 2, 1]
    assert settled(ignore_index=2).labels(torch.tensor([0, 2, 2, 1]), 4).tolist() == [0, IGNORED, IGNORED, 1]
    assert settled(1, ignore_index=-1).labels(torch.tensor([0.0, -1, 1, 1]), 4).tolist() == [0, IGNORED, 1, 1]
    task_format = settled(label=SEVERAL, ignore_index=-1)
    assert task_format.labels(torch.tensor([[1, -1, 0]]), 1).tolist() == [1, IGNORED, 0]
    with pytest.raises(ValueError, match="found -100"):
        settled(ignore_index=None).labels(torch.tensor([0, -100]), 2)


def test_nan_may_be_the_label_to_ignore():
    label = torch.tensor([[1, torch.nan, 0]])
    assert settled(label=SEVERAL, ignore_index=torch.nan).labels(label, 1).tolist() == [1, IGNORED, 0]
    assert settled(label=label, ignore_index=torch.nan, task="multilabel").task == "multilabel"
    assert settled(ignore_index=torch.nan).labels(torch.tensor([0, 2]), 2).tolist() == [0, 2]


def test_a_byte_of_156_is_not_the_label_to_ignore():
    label = torch.tensor([0, 156, 2, 1], dtype=torch.uint8)
    assert settled(200).labels(label, 4).tolist() == [0, 156, 2, 1]
    assert settled(200, ignore_index=156).labels(label, 4).tolist() == [0, IGNORED, 2, 1]


def test_the_rows_of_one_logit_have_the_loss_of_one_logit():
    logit, label = torch.randn(50, requires_grad=True), torch.randint(0, 2, (50,))
    task_format = settled(1)
    alone = binary_cross_entropy_with_logits(logit, label.float(), reduction="sum")
    rows = task_format.logits(logit)
    torch.testing.assert_close(cross_entropy(rows, label, reduction="sum"), alone)
    (gradient,) = torch.autograd.grad(alone, logit)
    (of_rows,) = torch.autograd.grad(cross_entropy(rows, label, reduction="sum"), rows)
    torch.testing.assert_close(task_format.gradients(gradient), of_rows)


def test_the_rows_of_several_labels_are_its_labels_sample_by_sample():
    task_format = settled(label=SEVERAL)
    output, label = torch.randn(4, 3), SEVERAL
    rows = task_format.logits(output)
    assert (rows[:, 1] - rows[:, 0]).reshape(4, 3).allclose(output)
    assert task_format.labels(label, 4).equal(label.flatten())
    torch.testing.assert_close(
        cross_entropy(rows, task_format.labels(label, 4)), binary_cross_entropy_with_logits(output, label.float())
    )
    assert task_format.row_indices(torch.tensor([5, 0])).tolist() == [15, 16, 17, 0, 1, 2]
    assert task_format.repeat_per_row(torch.tensor([7.0, 8.0])).tolist() == [7, 7, 7, 8, 8, 8]


@pytest.mark.parametrize(
    ("task_format", "label", "new", "expected"),
    [
        (settled(), torch.tensor([0, 1]), [-1, 2], torch.tensor([0, 2])),
        (settled(), torch.tensor([[0], [1]]), [-1, 2], torch.tensor([[0], [2]])),
        (settled(label=ONE_HOT), ONE_HOT[:2].float(), [-1, 0], torch.tensor([[1.0, 0, 0], [1, 0, 0]])),
        (settled(1), torch.tensor([0.0, 1.0]), [1, -1], torch.tensor([1.0, 1.0])),
        (settled(label=SEVERAL), SEVERAL[:2].float(), [0, -1, 1, -1, 1, -1], torch.tensor([[0.0, 1, 1], [0, 1, 0]])),
    ],
    ids=["indices", "a column", "one-hot", "one logit", "several labels"],
)
def test_replaced_labels_have_the_form_of_the_given_ones(task_format, label, new, expected):
    before = label.clone()
    replaced = task_format.replaced(label, torch.tensor(new))
    assert replaced.dtype == label.dtype
    assert replaced.equal(expected)
    assert label.equal(before)
    wanted = torch.tensor(new)
    assert task_format.labels(replaced, 2)[wanted >= 0].equal(wanted[wanted >= 0])


def test_what_forward_returns_must_be_logits():
    class Returns(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output

    assert TaskFormat().output(Returns(torch.zeros(4)), X).shape == (4, 1)
    assert TaskFormat(DataFormat(logits_from=lambda out: out["scores"])).output(Returns({"scores": X}), X) is X
    for output, found in (({"scores": X}, "dict"), (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"), (Y, r"torch.int64 \(2,\)")):
        with pytest.raises(TypeError, match=f"forward of Returns to return logits .*{found}; pass .*logits_from="):
            TaskFormat().output(Returns(output), X)
