"""Lines of the log, which do not run on from the end of a progress bar."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero
from tqdm import tqdm


def rank_zero_info(line: str) -> None:
    """Lightning's, with the bars of TQDM taken away while the line is written, and drawn again below it."""
    with tqdm.external_write_mode():
        rank_zero.rank_zero_info(line)
