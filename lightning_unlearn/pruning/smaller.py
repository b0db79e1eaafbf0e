"""The smaller network that a fit leaves: written by rank 0, and refused on every rank where it cannot be."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_unlearn.shrinking import save_shrunk, shrink
from lightning_unlearn.shrinking.cost import parameter_count
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.utilities.distributed import run_on_rank_zero
from lightning_unlearn.utilities.files import target_file


def refuse_unshrinkable(trainer: Trainer, pl_module: LightningModule, x: Any, path: str | PathLike[str]) -> None:
    """Refuses, before the first step, a module or a path with which a fit would end in an error. Every rank must call.

    Raises:
        ValueError: for a module that cannot be copied or traced; for a path that is a folder.
    """

    def attempt() -> None:
        target_file(path)
        with warnings.catch_warnings():
            # Nothing is pruned yet.
            warnings.filterwarnings("ignore", message="shrink ")
            shrink(pl_module, x)

    run_on_rank_zero(trainer.strategy, attempt)


def write_shrunk(trainer: Trainer, pl_module: LightningModule, x: Any, path: str | PathLike[str]) -> None:
    """Writes the module without its silent neurons, and says what is left. Every rank must call it.

    Args:
        trainer: of the fit.
        pl_module: the user's; it stays as it is.
        x: what its ``forward`` takes.
        path: of the file.
    """

    def write() -> tuple[int, int]:
        small = shrink(pl_module, x)
        save_shrunk(small, path)
        return parameter_count(pl_module), parameter_count(small)

    before, after = run_on_rank_zero(trainer.strategy, write)
    rank_zero_info(
        f"{path} holds the network without its pruned neurons: {after:,} of {before:,} parameters. load_shrunk"
        " reads it."
    )
