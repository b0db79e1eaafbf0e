import base64
import io
import wave

import numpy as np
import pytest

from lightning_unlearn.report.media import data_uri, png, shrunk, spectrogram, wav


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_a_png_is_read_as_it_was_written(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with image.open(io.BytesIO(png(pixels))) as read:
        assert np.array_equal(np.asarray(read), pixels)


def test_a_wav_is_read_as_it_was_written_and_cut_off_where_it_is_too_loud():
    with wave.open(io.BytesIO(wav(np.array([0.0, 0.5, -1.0, 2.0]), 8000))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
        assert np.frombuffer(file.readframes(9), "<i2").tolist() == [0, 16383, -32767, 32767]


def test_an_address_holds_its_content():
    kind, _, content = data_uri("audio/wav", b"\x00abc").partition(";base64,")
    assert (kind, base64.b64decode(content)) == ("data:audio/wav", b"\x00abc")


def test_a_smaller_picture_has_the_means_of_what_it_stands_for():
    pixels = np.array([[0, 10, 100, 110], [20, 30, 120, 130]], dtype=np.uint8)
    assert shrunk(pixels, 2).tolist() == [[15, 115]]
    assert shrunk(pixels, 4) is pixels
    assert shrunk(np.zeros((300, 100, 3), np.uint8), 60).shape == (60, 20, 3)


@pytest.mark.parametrize("frequency", [500, 3000])
def test_a_tone_is_bright_at_its_frequency(frequency):
    tone = np.sin(2 * np.pi * frequency * np.arange(8000) / 8000)
    picture = spectrogram(tone, 8000).astype(int).sum(axis=2)
    brightest = len(picture) - 1 - picture.mean(axis=1).argmax()
    assert brightest * 8000 / 256 == pytest.approx(frequency, abs=8000 / 256)


@pytest.mark.parametrize(("length", "rate"), [(0, 8000), (10, 8000), (16000 * 60, 16000), (500, 44100)])
def test_a_sound_of_any_length_has_a_spectrogram_of_bounded_size(length, rate):
    height, width, _ = spectrogram(np.zeros(length), rate).shape
    assert 1 <= height <= 129
    assert 1 <= width <= 301
