import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_quiet_thread(monkeypatch, tmp_path):
    """Toys are too small for threads to help, and Lightning's files belong in a temporary folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
