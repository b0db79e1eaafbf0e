import pytest
import torch

from lightning_unlearn.results import duplicates
from lightning_unlearn.results.duplicates import Duplicate, InputHashes


def hashes(size=400, seed=0):
    """Some of the inputs are the same, and some pictures nearly the same, as a loop finds too; and labels."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, size // 3, (size,), generator=generator)
    picture = torch.randn(size // 3, 64, generator=generator)[source]
    near = torch.rand(size, generator=generator) < 0.5
    noise = 0.09 * torch.randn(size, 64, generator=generator)
    picture = picture + noise * near.unsqueeze(1)
    identity = torch.where(near, torch.arange(size) + size, source)
    picture = picture / picture.square().mean(dim=1, keepdim=True).sqrt()
    # Every fifth is no picture.
    picture = picture * (source % 5 > 0).unsqueeze(1)
    label = torch.randint(0, 3, (size,), generator=generator)
    return InputHashes(identity, (16 * picture).round().to(torch.int8)), label


def naive(inputs, label, index, most):
    rows = []
    for other in range(len(inputs)):
        one, two = inputs.perceptual[index].float() / 16, inputs.perceptual[other].float() / 16
        is_exact = bool(inputs.identity[index] == inputs.identity[other])
        is_near = bool(one.any()) and bool(two.any()) and float((one - two).square().mean().sqrt()) < 0.15
        if other != index and (is_exact or is_near):
            rows.append((bool(label[other].eq(label[index]).all()), not is_exact, other))
    return [Duplicate(other, not is_near) for _, is_near, other in sorted(rows)][:most]


@pytest.mark.parametrize("labels", [1, 3])
def test_they_are_those_of_a_loop_those_under_another_label_first(labels, monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    monkeypatch.setattr(duplicates, "_COLUMNS", 64)
    inputs, label = hashes()
    if labels > 1:
        label = label.unsqueeze(1).eq(torch.arange(labels)).long()
    asked = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:60].tolist()
    found = inputs.duplicates(asked, label, most=3)
    wanted = {index: naive(inputs, label, index, 3) for index in asked}
    assert found == {index: others for index, others in wanted.items() if others}
    assert {one.is_exact for others in found.values() for one in others} == {True, False}


def test_nobody_asked_nothing_found():
    inputs, label = hashes()
    assert inputs.duplicates([], label, most=3) == {}


def test_a_file_holds_them(tmp_path):
    inputs, _ = hashes()
    inputs.save(tmp_path / "inputs.npz")
    again = InputHashes.load(tmp_path / "inputs.npz")
    assert again.identity.equal(inputs.identity)
    assert again.perceptual.equal(inputs.perceptual)


@pytest.mark.parametrize(
    ("identity", "perceptual"),
    [
        (torch.zeros(3), torch.zeros(3, 64, dtype=torch.int8)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 64)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int8)),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int8)),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 64, dtype=torch.int8)),
    ],
)
def test_what_are_no_hashes_is_refused(identity, perceptual):
    with pytest.raises(ValueError, match="Expected"):
        InputHashes(identity, perceptual)
