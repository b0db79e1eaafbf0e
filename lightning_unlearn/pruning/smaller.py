"""The smaller network that a fit leaves: written by rank 0, and refused on every rank where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from lightning_unlearn.pruning.masking import temporarily_zeroed
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.shrinking import save_shrunk
from lightning_unlearn.shrinking.cost import parameter_count
from lightning_unlearn.shrinking.cut import shrunk_copy
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.utilities.files import target_file


def refuse_unshrinkable(fit: FitContext, sites: Sequence[PruneSite], x: Any, path: str | PathLike[str]) -> None:
    """Refuse, before the first step, a path with which a fit would end in an error, and layers that cannot be cut.

    Of several layers, it warns of those that will stay as they are. Every rank must call it.

    Args:
        fit: whose model stays as it is.
        sites: the layers to prune.
        x: what ``forward`` takes.
        path: of the file.

    Raises:
        ValueError: for a module that cannot be copied or traced; for layers without which it would be as large; for a
            path that is a folder.
    """
    model = fit.model

    def attempt() -> None:
        target_file(path)
        # Every other neuron, so that groups of channels lose as many each, and layers that are added the same ones.
        entries = [e for site in sites for e in site.entries(model, torch.arange(0, site.width(model), 2))]
        with temporarily_zeroed(entries):
            cut = shrunk_copy(model, x)
        if not cut.is_smaller:
            layers = ", ".join(repr(site.target) for site in sites)
            raise ValueError(
                "Expected shrink_to where pruned neurons can be cut out of the network, but those of"
                f" {layers} cannot: where outputs of a layer are added to others (a residual sum), all of these would"
                " have to be silent; name layers whose outputs go only into the next one, as the first of each block,"
                " with layer=[...], or leave out shrink_to."
            )
        if cut.kept:
            rank_zero_warn(
                f"{path} will keep some of the pruned neurons. A trial before the first step found: {cut.note}"
            )

    fit.on_rank_zero(attempt)


def write_shrunk(fit: FitContext, x: Any, path: str | PathLike[str]) -> None:
    """Write the module without its silent neurons, and say what is left. Every rank must call it.

    Where nothing can be cut, nothing is written.

    Args:
        fit: whose model stays as it is.
        x: what its ``forward`` takes.
        path: of the file.
    """
    model = fit.model

    def write() -> tuple[int, int]:
        cut = shrunk_copy(model, x)
        if cut.kept:
            rank_zero_warn(cut.note)
        if cut.is_smaller:
            save_shrunk(cut.model, path)
        return parameter_count(model), parameter_count(cut.model)

    before, after = fit.on_rank_zero(write)
    if after == before:
        rank_zero_info(f"No neuron can be cut out of the network: {path} was not written.")
        return
    rank_zero_info(
        f"{path} holds the network without its pruned neurons: {after:,} of {before:,} parameters. load_shrunk"
        " reads it."
    )
