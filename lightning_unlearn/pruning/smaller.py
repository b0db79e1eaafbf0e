"""The smaller network that a fit leaves: written by rank 0, and refused on every rank where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unlearn.pruning.masking import temporarily_zeroed
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.shrinking import save_shrunk
from lightning_unlearn.shrinking.cost import parameter_count
from lightning_unlearn.shrinking.cut import Cut, shrunk_copy
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.utilities.files import target_file


def refuse_unshrinkable(fit: FitContext, sites: Sequence[PruneSite], x: Any, path: str | PathLike[str]) -> None:
    """Refuse, before the first step, a path with which a fit would end in an error, and layers that cannot be cut.

    Of several layers, it warns of those that will stay as they are, and of those whose outputs are added to each other.
    Every rank must call it.

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
        cut = _trial(model, sites, x, alike=True)
        if not cut.is_smaller:
            layers = ", ".join(repr(site.target) for site in sites)
            raise ValueError(
                f"shrink_to has no effect: pruned neurons of {layers} cannot be cut out of the network. If outputs"
                " of several layers are added (a residual sum), a neuron must be pruned in all of them. Name"
                " layers whose outputs go only into the next layer, such as the first of each block, with"
                " layer=[...], or leave out shrink_to."
            )
        if cut.kept:
            rank_zero_warn(
                f"{path} will keep some of the pruned neurons. A trial before the first step found: {cut.note}"
            )
        apart = _trial(model, sites, x, alike=False).kept if len(sites) > 1 else ()
        if joined := [name for name in apart if name not in cut.kept]:
            rank_zero_warn(
                f"{path} will keep most of the pruned neurons of {', '.join(map(repr, joined))}: the outputs of"
                " these layers are added (a residual sum) or otherwise joined, so a neuron can be cut out only if"
                " it is pruned in all of them, but each layer's neurons are chosen separately. Name layers whose"
                " outputs go only into the next layer, such as the first of each block, with layer=[...]."
            )

    fit.on_rank_zero(attempt)


def _trial(model: nn.Module, sites: Sequence[PruneSite], x: Any, *, alike: bool) -> Cut[nn.Module]:
    """Return what can be cut where one neuron of each pair is silent: so groups of channels lose as many each.

    Args:
        model: stays as it is.
        sites: the layers.
        x: what ``forward`` takes.
        alike: whether the same neurons are silent in all layers, or others in each, by the bits of its place.
    """
    bits = max(1, (len(sites) - 1).bit_length())
    entries = []
    for at, site in enumerate(sites):
        pair = torch.arange((site.width(model) + 1) // 2)
        neurons = 2 * pair + (0 if alike else at >> pair % bits & 1)
        entries += site.entries(model, neurons[neurons < site.width(model)])
    with temporarily_zeroed(entries):
        return shrunk_copy(model, x)


def say_of_older_file(fit: FitContext, path: str | PathLike[str], *, writes: bool) -> None:
    """Say, before the first step, that the file is one of an earlier fit. Every rank must call it.

    Args:
        fit: that begins.
        path: of the file.
        writes: whether this fit may write it: no dry run does.
    """
    if not (written := _written(fit, path)):
        return
    if writes:
        rank_zero_info(f"{path} exists ({written}). It is replaced at the end of this fit if neurons can be cut.")
    else:
        rank_zero_warn(
            f"{path} exists ({written}) from an earlier fit: dry_run=True prunes no neuron, so it is not replaced."
        )


def say_not_written(fit: FitContext, path: str | PathLike[str], why: str) -> None:
    """Say why no file is written when a fit ends, and whether an older one is left. Every rank must call it.

    Args:
        fit: that has ended.
        path: of the file.
        why: it is not written.
    """
    if written := _written(fit, path):
        rank_zero_warn(f"{why}: {path} was not written. The existing file ({written}) is from an earlier fit.")
    else:
        rank_zero_info(f"{why}: {path} was not written.")


def _written(fit: FitContext, path: str | PathLike[str]) -> str:
    """Return when the file was written, in words; empty where there is none. Every rank must call it."""

    def look() -> str:
        target = Path(path).expanduser()
        if not target.is_file():
            return ""
        return f"written {datetime.fromtimestamp(target.stat().st_mtime).astimezone():%Y-%m-%d %H:%M}"

    return fit.on_rank_zero(look)


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
        say_not_written(fit, path, "No neuron can be cut out of the network")
        return
    rank_zero_info(
        f"{path} holds the network without its pruned neurons: {after:,} of {before:,} parameters. load_shrunk"
        " reads it."
    )
