import pytest
import torch

from lightning_unlearn.functional.identity import copies, row_identity

X = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
TEXTS = [f"sample {i}" for i in range(40)]
TWICE = torch.cat([torch.arange(40), torch.arange(40)])


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.bfloat16(),
        X.double(),
        (X * 100).to(torch.uint8),
        (X * 1000).int(),
        X.to(torch.complex64),
        (X > 0).repeat(1, 1, 3),
        [X, X[:, 0]],
        {"x": X, "text": TEXTS, "scale": 2.0, "mask": None, "factor": torch.tensor(3.0)},
        TEXTS,
    ],
    ids=["float", "half", "double", "bytes", "int", "complex", "bool", "two", "dict", "texts"],
)
def test_rows_are_known_wherever_they_lie(x):
    def rows(value, index):
        if isinstance(value, dict):
            return {name: rows(part, index) for name, part in value.items()}
        if isinstance(value, list):
            of_rows = isinstance(value[0], str)
            return [value[i] for i in index] if of_rows else [rows(part, index) for part in value]
        return value[index] if isinstance(value, torch.Tensor) and value.ndim else value

    whole = row_identity(x, 40)
    assert whole.dtype == torch.int64
    assert len(whole.unique()) == 40
    part = torch.tensor([7, 3, 31])
    assert row_identity(rows(x, part), 3).equal(whole[part])
    assert copies(row_identity(rows(x, TWICE), 80)).eq(2).all()


def test_padding_with_zeros_does_not_count_and_another_place_does():
    whole = row_identity(X, 40)
    padded = torch.cat([X, torch.zeros(40, 4, 5)], dim=1)
    assert row_identity(padded, 40).equal(whole)
    assert not row_identity(X.flip(1), 40).eq(whole).any()


def test_a_tensor_for_each_sample():
    pictures = [torch.ones(3, 4, 4), torch.ones(3, 5, 5), torch.ones(3, 4, 4), torch.zeros(3, 4, 4)]
    one, two, three, four = row_identity(pictures, 4).tolist()
    assert one == three
    assert len({one, two, four}) == 3


@pytest.mark.parametrize(
    "x",
    [
        (torch.zeros(9), torch.tensor([0, 3, 5])),
        object(),
        torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2), torch.ones(1)]),
        torch.eye(3).to_sparse(),
        None,
    ],
    ids=["offsets", "object", "packed", "sparse", "nothing"],
)
def test_what_cannot_be_told_apart_by_rows_is_not(x):
    assert row_identity(x, 3) is None
