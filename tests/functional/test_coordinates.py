import pytest
import torch

from lightning_unlearn.functional.coordinates import MAX_COORDINATES, class_coordinates


def helmert(classes):
    """Column j, by its definition: 1 in the first j rows, -j in the next, over its norm."""
    basis = torch.zeros(classes, classes - 1).double()
    for j in range(1, classes):
        basis[:j, j - 1] = 1 / (j * (j + 1)) ** 0.5
        basis[j, j - 1] = -j / (j * (j + 1)) ** 0.5
    return basis


@pytest.mark.parametrize("classes", [2, 3, 10, 65, 66, 200])
def test_coordinates_are_helmerts_or_a_random_part_of_them(classes):
    expected = helmert(classes)
    if classes - 1 > MAX_COORDINATES:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(classes - 1, MAX_COORDINATES, generator=generator).double()
        expected = expected @ torch.linalg.qr(draw)[0]
    torch.testing.assert_close(class_coordinates(classes), expected.float(), atol=1e-6, rtol=1e-6)


def test_coordinates_of_very_many_classes_are_made_without_a_square_matrix():
    basis = class_coordinates(30_000)  # 7 GB else
    torch.testing.assert_close(basis.T @ basis, torch.eye(MAX_COORDINATES), atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.sum(dim=0), torch.zeros(MAX_COORDINATES), atol=1e-3, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 65, 66, 200])
def test_coordinates_are_orthonormal_and_blind_to_a_constant(classes):
    basis = class_coordinates(classes)
    assert basis.dtype == torch.float32
    assert basis.shape == (classes, min(classes - 1, MAX_COORDINATES))
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.sum(dim=0), torch.zeros(basis.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 65])
def test_coordinates_of_few_classes_lose_nothing(classes):
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    basis = class_coordinates(classes)
    expected = logits - logits.mean(dim=1, keepdim=True)
    torch.testing.assert_close(logits @ basis @ basis.T, expected, atol=1e-5, rtol=1e-5)


def test_coordinates_of_many_classes_keep_distances_roughly():
    classes = 200
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(1))
    centered = logits - logits.mean(dim=1, keepdim=True)
    before, after = torch.pdist(centered), torch.pdist(logits @ class_coordinates(classes))
    ratio = after / before
    assert ratio.std() / ratio.mean() < 0.1
    # An orthonormal map keeps r of C - 1 dimensions.
    assert ratio.mean().item() == pytest.approx((MAX_COORDINATES / (classes - 1)) ** 0.5, rel=0.05)


def test_coordinates_are_always_the_same():
    torch.manual_seed(0)
    first = class_coordinates(100)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(class_coordinates(100), first)
    assert torch.equal(torch.get_rng_state(), state)
