import base64
import io
import wave
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_unlearn.report.media import png
from lightning_unlearn.report.samples import SampleView, content_of, file_card

BUDGET = 60_000
Named = namedtuple("Named", "x label")


@dataclass
class Record:
    text: str
    target: int


def read(card):
    """The pixels of a card's picture."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(base64.b64decode(card["src"].partition(",")[2]))))


def picture(value, **options):
    return read(SampleView(**options).card((value, 3), BUDGET))


@pytest.mark.parametrize(
    ("sample", "content"),
    [
        (("x", 3), "x"),
        (["x", 3], "x"),
        (("a", "b", 3), ("a", "b")),
        ({"text": "x", "label": 3}, "x"),
        ({"a": 1, "b": 2, "labels": 3}, {"a": 1, "b": 2}),
        (Named("x", 3), "x"),
        (Record("x", 3), "x"),
        ("x", "x"),
    ],
    ids=str,
)
def test_a_sample_is_shown_without_its_label(sample, content):
    assert content_of(sample) == content


RAMP = torch.arange(48.0).reshape(3, 4, 4) / 47


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (RAMP, RAMP.permute(1, 2, 0)),
        (RAMP.permute(1, 2, 0), RAMP.permute(1, 2, 0)),
        (RAMP.numpy(), RAMP.permute(1, 2, 0)),
        (RAMP[:1], RAMP[0]),
        (RAMP[0], RAMP[0]),
        (RAMP[:1].permute(1, 2, 0), RAMP[0]),
        ((RAMP * 255).round().to(torch.uint8), RAMP.permute(1, 2, 0)),
        ((RAMP * 255).round().int(), RAMP.permute(1, 2, 0)),
        (RAMP * 10 - 5, RAMP.permute(1, 2, 0)),
        (RAMP.half(), RAMP.permute(1, 2, 0)),
        (torch.cat([RAMP, torch.ones(1, 4, 4)]), RAMP.permute(1, 2, 0)),
    ],
    ids=["CHW", "HWC", "numpy", "1HW", "HW", "HW1", "bytes", "ints", "stretched", "half", "alpha"],
)
def test_pictures_of_every_shape_and_range(value, expected):
    assert np.abs(picture(value).astype(float) - expected.numpy() * 255).max() <= 1


def test_what_normalization_has_done_is_undone():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
    normalized = (RAMP - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert np.abs(picture(normalized, mean=mean, std=std) - RAMP.permute(1, 2, 0).numpy() * 255).max() <= 1


def test_where_the_shape_leaves_it_open_the_channels_can_be_named():
    square = torch.rand(3, 5, 3)
    assert picture(square).shape == (5, 3, 3)
    assert picture(square, channels="first").shape == (5, 3, 3)
    assert picture(square, channels="last").shape == (3, 5, 3)


def test_a_large_picture_becomes_small_and_one_that_is_not_finite_is_shown():
    assert picture(torch.rand(3, 400, 200)).shape == (96, 48, 3)
    assert picture(torch.full((3, 8, 8), float("nan"))).max() == 0


def test_a_pil_image_is_a_picture():
    image = pytest.importorskip("PIL.Image")
    assert picture(image.new("RGB", (6, 5), (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]
    assert picture(image.new("1", (6, 5), 1)).max() == 255


@pytest.mark.parametrize("shape", [(4000,), (1, 4000), (2, 4000), (4000, 1)], ids=str)
def test_a_sound_has_a_player_and_a_spectrogram(shape):
    card = SampleView(sample_rate=8000).card((torch.ones(shape) * 0.5, 3), BUDGET)
    assert card["kind"] == "audio"
    assert card["note"] == "0.50 s"
    assert card["picture"].startswith("data:image/png")
    with wave.open(io.BytesIO(base64.b64decode(card["src"].partition(",")[2]))) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 4000)


def test_a_long_sound_is_cut_and_says_so():
    card = SampleView(sample_rate=8000).card((torch.randn(8000 * 60), 3), BUDGET)
    assert card["note"] == "60.00 s, of which the player has 1.4 s"
    assert sum(map(len, card.values())) < 1.01 * BUDGET


def test_a_sound_as_hugging_face_decodes_it_and_one_among_other_things():
    sound = {"array": np.zeros(800), "sampling_rate": 8000}
    assert SampleView().card({"audio": sound, "label": 1}, BUDGET)["note"] == "0.10 s"
    card = SampleView(sample_rate=8000).card((torch.zeros(1, 800), 8000, "backward", "id", 3), BUDGET)
    assert card["note"] == "0.10 s"


def test_a_spectrogram_is_a_picture_also_where_sounds_are_expected():
    assert SampleView(sample_rate=8000).card((torch.rand(1, 40, 63), 3), BUDGET)["kind"] == "image"


def test_texts():
    view = SampleView()
    assert view.card(("a < b", 3), BUDGET) == {"kind": "text", "text": "a < b"}
    assert view.card({"one": "a", "two": "b", "label": 0}, BUDGET)["text"] == "one: a\ntwo: b"
    assert view.card(("x" * 1600, 3), BUDGET)["text"] == f"{'x' * 1500}... (100 more characters)"


def test_tables():
    rows = SampleView().card((torch.tensor([1.0, 2.5]), 3), BUDGET)["rows"]
    assert rows == [["0", "1"], ["1", "2.5"]]
    rows = SampleView().card({"age": 3, "town": "here", "pixels": torch.ones(20, 2), "label": 1}, BUDGET)["rows"]
    assert rows == [["age", "3"], ["town", "here"], ["pixels", "20 x 2 numbers, mean 1, from 1 to 1"]]
    assert SampleView().card((torch.zeros(100), 3), BUDGET)["rows"][-1] == ["...", "60 more"]
    assert SampleView().card(([5, 6], 3), BUDGET)["rows"] == [["0", "5"], ["1", "6"]]
    assert SampleView().card((torch.zeros(2, 8, 8), 3), BUDGET)["rows"][0][0] == "array"
    assert SampleView().card((7, 3), BUDGET)["rows"] == [["value", "7"]]


def test_whatever_else_is_shown_by_its_name():
    assert "object at" in SampleView().card((object(), 3), BUDGET)["text"]


@pytest.mark.parametrize(
    ("shown", "kind"), [("a text", "text"), (png(np.zeros((3, 3), np.uint8)), "image"), ("PIL", "image")], ids=str
)
def test_a_function_of_the_users_may_show_the_sample(shown, kind):
    if shown == "PIL":
        shown = pytest.importorskip("PIL.Image").new("RGB", (500, 10))
    given = []
    card = SampleView(render=lambda sample: (given.append(sample), shown)[1]).card(("x", 3), BUDGET)
    assert card["kind"] == kind
    assert given == [("x", 3)]


def test_a_function_of_the_users_may_give_names_to_the_numbers_of_a_row():
    columns = ["radius", "texture"]
    view = SampleView(render=lambda sample: dict(zip(columns, sample[0].tolist(), strict=True)))
    assert view.card((torch.tensor([0.5, 2.0]), 1), BUDGET) == {
        "kind": "table",
        "rows": [["radius", "0.5"], ["texture", "2"]],
    }


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (3, "Expected render to return text, a dict, a PIL image or the bytes of a PNG, but got int"),
        (b"GIF89a", "Expected render to return the bytes of a PNG or JPEG file"),
        (b"\x89PNG" + bytes(BUDGET), "Expected render to return images of at most 45,000 bytes, but got 60,004"),
    ],
)
def test_a_function_that_shows_nothing_is_told_so(shown, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SampleView(render=lambda _: shown).card("x", BUDGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"render": 3}, "Expected render to be a function from a dataset item .*, but got 3"),
        ({"channels": "middle"}, "Expected channels to be 'first' or 'last', but got 'middle'"),
        ({"mean": [0.5]}, "Expected mean and std together, but got mean=\\[0.5\\] and std=None"),
        ({"sample_rate": 0}, "Expected sample_rate to be at least 1, but got 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SampleView(**options)


def test_a_card_has_the_name_of_a_file_and_of_its_folder():
    assert file_card("pets/dog/2.png") == {"file": "dog/2.png"}
    assert file_card("") == {}
