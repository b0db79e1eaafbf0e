"""A fixture for folders whose tests fit: each conftest.py imports it."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Lightning says nothing, and its files belong in a temporary folder."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    yield
    logger.setLevel(level)
