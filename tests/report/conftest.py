"""One browser for all tests that click."""

import sys

import pytest

from tests.report.browser import CHROMIUM, MISSING, Browser, NoBrowserError


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip(MISSING)
    if sys.platform == "win32":
        pytest.skip("the pipe to the browser is POSIX's")
    try:
        browser = Browser(tmp_path_factory.mktemp("profile"))
    except NoBrowserError as error:
        pytest.skip(str(error))
    yield browser
    browser.close()
