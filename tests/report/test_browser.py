"""The page in a real browser."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lightning_unlearn.report import write_report
from tests.report.runs import BREAKING, NAMES, hostile_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")


class Cards(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cards, self.body, self.tags = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "body":
            self.body = attributes
        if attributes.get("class") == "card":
            self.cards.append({**attributes, "text": ""})

    def handle_data(self, data):
        if self.cards:
            self.cards[-1]["text"] += data


def load(file, state, folder):
    """The page as it stands once its script has run, and what the console says."""
    result = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
            # Chromium's own, which a process of root's cannot have.
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
            f"--user-data-dir={folder}",
            f"{file.as_uri()}#{state}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Cards(result.stdout), re.findall(r"CONSOLE.*", result.stderr)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    record = hostile_record()
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
    sound = {"kind": "audio", "src": "data:audio/wav;base64,AAAA", "picture": f"data:image/png;base64,{pixel}"}
    gallery = {**record.gallery, 3: {"kind": "image", "src": f"data:image/png;base64,{pixel}"}, 7: sound}
    return write_report(hostile_record(gallery=gallery), folder / "report.html"), folder


def test_the_gallery_filters_sorts_and_pages_and_the_console_is_silent(report):
    file, folder = report
    page, console = load(file, "class=3&reason=label&sort=-p&size=6&page=1", folder / "profile")
    assert console == []
    assert (page.body["data-ready"], page.body["data-found"], page.body["data-pages"]) == ("yes", "10", "2")
    assert {card["data-given"] for card in page.cards} == {"3"}
    assert [int(card["data-index"]) for card in page.cards] == [39, 35, 31, 27, 23, 19]
    assert "given bird" in page.cards[0]["text"]
    # Names and texts of the data are shown, and none has become an element.
    assert NAMES[0] in page.cards[0]["text"]
    assert any(BREAKING in card["text"] for card in page.cards)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags


def test_it_opens_at_the_most_suspect_and_survives_nonsense(report):
    file, folder = report
    page, console = load(file, "class=99x&sort=toString&size=-3&page=1e9", folder / "profile")
    assert console == []
    assert page.body["data-found"] == "0"
    page, console = load(file, "", folder / "profile")
    assert console == []
    assert [int(card["data-index"]) for card in page.cards] == list(range(24))
    assert (page.tags.count("img"), page.tags.count("audio")) == (2, 1)
