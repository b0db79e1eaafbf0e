import logging

import pytest

# Doctests are sought in every file, by importing it; after this one Lightning's log lines would go to another logger.
collect_ignore = ["pytorch_lightning_script.py"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """Lightning says nothing, and its files belong in a temporary folder."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    yield
    logger.setLevel(level)
