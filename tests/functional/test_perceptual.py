import pytest
import torch
from torch.nn.functional import interpolate

from lightning_unlearn.functional.perceptual import BYTES, perceptual_hash
from lightning_unlearn.results.duplicates import InputHashes

# Smooth ones, as photographs are.
PICTURES = interpolate(torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (40, 40), mode="bilinear")
NOTHING = torch.zeros(30, BYTES, dtype=torch.int8)


def found(*parts):
    """Which of the first pictures are near which of the others, as pairs."""
    perceptual = torch.cat([perceptual_hash(part, 30) for part in parts])
    inputs = InputHashes(torch.arange(len(perceptual)), perceptual)
    pairs = inputs.duplicates(range(30), torch.zeros(len(perceptual), dtype=torch.int64), most=9)
    return {(index, one.index) for index, others in pairs.items() for one in others}


SAME = {(index, index + 30) for index in range(30)}


@pytest.mark.parametrize(
    "other",
    [
        PICTURES,
        PICTURES + 0.05 * torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(1)),
        0.6 * PICTURES + 0.3,
        (PICTURES - 0.45) / 0.25,
        (255 * PICTURES).round().to(torch.uint8),
        PICTURES.half(),
        PICTURES.movedim(1, 3),
        interpolate(PICTURES, (97, 61), mode="bilinear"),
        interpolate(PICTURES, (201, 200), mode="bilinear"),
        list(interpolate(PICTURES, (50, 50), mode="bilinear")),
        {"pixel_values": PICTURES, "ids": torch.arange(30)},
        (torch.arange(30), PICTURES),
    ],
    ids=[
        *(
            "same",
            "noise",
            "brightness",
            "normalized",
            "bytes",
            "half",
            "last",
            "size",
            "large",
            "list",
            "dict",
            "tuple",
        )
    ],
)
def test_what_is_nearly_the_same_picture_is_found_and_no_other(other):
    assert found(PICTURES, other) == SAME


def test_other_pictures_are_not_near():
    assert found(PICTURES, PICTURES.flip(0)) == {(index, 59 - index) for index in range(30)}
    assert found(PICTURES, PICTURES.flip(3)) == set()


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(30, 16),
        torch.rand(30, 3, 7, 40),
        torch.rand(30, 12, 64, 64),
        torch.rand(30, 40, 40),
        torch.randint(0, 9, (30, 20)),
        [f"text {at}" for at in range(30)],
        {"input_ids": torch.randint(0, 9, (30, 20))},
        torch.full((30, 3, 16, 16), 0.3),
        torch.full((30, 3, 16, 16), torch.nan),
        None,
    ],
    ids=["rows", "small", "channels", "sequence", "tokens", "texts", "dict", "one shade", "nan", "none"],
)
def test_what_is_no_picture_has_none(x):
    assert perceptual_hash(x, 30).equal(NOTHING)
