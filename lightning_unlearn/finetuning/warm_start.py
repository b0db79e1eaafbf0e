"""Where fine-tuning starts: from the trained weights, from those that the fit began with, or in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_unlearn.attribution import BATCH_NORM, named_layers, plain_name
from lightning_unlearn.finetuning.shrink_weights import KEPT, shrink
from lightning_unlearn.trainer.progress import rank_zero_warn
from lightning_unlearn.utilities.sharding import joined, local_part, part_of

WarmStart = Literal["auto", "shrink", "keep", "start"]

MEMORIZED = 0.5
"""Share of the suspect labels that a network which has memorized them predicts, at least."""

GAP = 0.1
"""By how much more of the training labels than of the validation labels it predicts, at least."""

_SHARES = {"shrink": KEPT, "start": 0.0}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Memory:
    """What a network shows of having memorized wrong labels.

    Args:
        suspects: share of the suspect labels that it predicts; None where none is suspect.
        gap: share of the training labels that it predicts, less that of the validation labels; None without enough of
            these.
    """

    suspects: float | None = None
    gap: float | None = None

    @property
    def is_memorized(self) -> bool:
        """Whether it has. Labels of validation that are cleaner than those of training make the gap smaller."""
        if self.suspects is None:
            return False
        return self.has_suspects or (self.gap is not None and self.gap >= GAP)

    @property
    def has_suspects(self) -> bool:
        """Whether it has memorized the suspect labels, and not only begun to memorize what there is."""
        return self.suspects is not None and self.suspects >= MEMORIZED

    def __str__(self) -> str:
        """Return words that follow "the network"."""
        said = f"predicts {self.suspects or 0:.0%} of the suspect labels"
        if self.gap is None:
            return said
        points = f"{100 * abs(self.gap):.0f} points {'more' if self.gap >= 0 else 'less'}"
        return f"{said}, and {points} of the training labels than of the validation labels"


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from.

    Args:
        how: ``"keep"``, ``"shrink"`` or ``"start"``.
        said: in words that follow "fine-tuning".
        because: why, in a clause; empty where it was asked for.
    """

    how: str
    said: str = "continues from the current weights"
    because: str = ""

    @property
    def moves(self) -> bool:
        """Whether weights are changed."""
        return self.how != "keep"


def choose_start(asked: WarmStart, memory: Memory, obstacle: str = "") -> Start:
    """Return what fine-tuning starts from.

    Args:
        asked: ``warm_start``.
        memory: what the network shows.
        obstacle: why the weights cannot be moved, in a clause; empty if they can.

    Example:
        >>> choose_start("auto", Memory(0.93)).how, choose_start("auto", Memory(0.1)).how
        ('shrink', 'keep')
        >>> choose_start("auto", Memory(0.1, gap=0.3)).how, choose_start("start", Memory()).how
        ('shrink', 'start')
    """
    if asked == "auto":
        if memory.suspects is None:
            return Start("keep", because="no label is suspect")
        if not memory.is_memorized:
            return Start("keep", because=f"the network {memory}, so it has not memorized them")
        because = f"the network {memory}, so it has {'memorized them' if memory.has_suspects else 'begun to memorize'}"
        if obstacle:
            return Start("keep", because=f"{because}, but the weights are kept: {obstacle}")
        return replace(_SHRUNK, because=because)
    if asked == "start":
        return Start("start", "starts from the initial weights of the fit")
    return _SHRUNK if asked == "shrink" else Start("keep")


_SHRUNK = Start(
    "shrink",
    f"starts from weights moved back towards the initial ones ({KEPT:.0%} of the change is kept)",
)


MOST_GATHERED = 4 * 2**30
"""Bytes of sharded weights that are gathered for a checkpoint."""


class StartWeights:
    """The weights that a fit began with, on the CPU, and the running statistics of norms.

    Parameters are known by their names, tied ones by the first. One that is unfrozen later is taken up when it is, as
    it has not changed until then. Of a sharded one each rank keeps its part.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] | None = None

    @property
    def is_known(self) -> bool:
        """Whether they have been remembered."""
        return self._kept is not None

    def remember(self, model: nn.Module) -> None:
        """Copy what is trained and not known yet. Call before the first step, and when something may be unfrozen."""
        kept = {} if self._kept is None else self._kept
        trained = ((name, p) for name, p in _parameters(model) if p.requires_grad)
        statistics = () if self._kept is not None else _norm_statistics(model)
        for name, tensor in (*trained, *statistics):
            if name not in kept:
                kept[name] = _on_cpu(local_part(tensor))
            elif kept[name].shape == tensor.shape != local_part(tensor).shape:
                # Of a checkpoint, which has the whole.
                kept[name] = part_of(kept[name], tensor).clone()
        self._kept = kept

    def forget(self) -> None:
        """Keep nothing from now on."""
        self._kept = None

    def state_dict(self, model: nn.Module | None = None) -> dict[str, Tensor] | None:
        """Return the tensors by name; None where nothing is known, or where it would be more than 4 GiB of shards.

        Args:
            model: whose weights are sharded, which are then gathered: every rank must call it. None for one that holds
                all of them.
        """
        if self._kept is None or model is None:
            return self._kept
        like = {name: tensor for name, tensor in _parameters(model) if name in self._kept}
        size = sum(tensor.numel() * self._kept[name].element_size() for name, tensor in like.items())
        if size > MOST_GATHERED:
            rank_zero_warn(
                f"The checkpoint does not hold the initial weights of the fit, which are {size / 2**30:.1f} GiB, more"
                f" than {MOST_GATHERED / 2**30:.0f}. A fit that resumes from it before the partition keeps its weights"
                " (warm_start='keep')."
            )
            return None
        found = dict(self._kept)
        for name, tensor in like.items():
            found[name] = joined(
                part_of(found[name], tensor) if found[name].shape == tensor.shape else found[name], tensor
            )
        return found

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what a checkpoint has."""
        self._kept = None if state is None else dict(state)

    @torch.no_grad()
    def move(
        self, model: nn.Module, how: str, copies: Sequence[Mapping[str, Tensor]], frozen: Collection[str]
    ) -> tuple[dict[str, bool], Callable[[], None]]:
        """Move the trained weights that have changed, and their averages, towards those of the start.

        Running statistics of norms become those of the start: they are of other weights, and training estimates them
        anew on what it draws from then on. An average of weights, moved, is the average of weights that were moved.

        Args:
            model: that is trained.
            how: ``"shrink"`` or ``"start"``.
            copies: averages of weights, each by name.
            frozen: names of parameters and norms that stay as they are.

        Returns:
            for each trained parameter whether this rank has moved it, and a function that undoes all of it. After an
            exception all is as it was.
        """
        weights = [(name, p) for name, p in _parameters(model) if p.requires_grad and name not in frozen]
        statistics = [(n, t) for n, t in _norm_statistics(model) if n.rpartition(".")[0] not in frozen]
        own = dict(weights)
        averaged = {id(copy[name]): (name, copy[name]) for copy in copies for name in copy if name in own}
        for parameter in own.values():
            averaged.pop(id(parameter), None)
        before: list[tuple[Tensor, Tensor]] = []

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)

        moving = [*weights, *averaged.values()]
        todo = [*((*one, _SHARES[how]) for one in moving), *((*one, 0.0) for one in statistics)]
        moved: set[int] = set()
        try:
            for name, tensor, kept in todo:
                if (start := self._start_of(name, tensor)) is None:
                    continue
                here = local_part(tensor.detach())
                before.append((here, _on_cpu(here)))
                here.copy_(shrink(here, start, kept))
                moved.add(id(tensor))
        except BaseException:
            undo()
            raise
        return {name: id(weight) in moved for name, weight in weights}, undo

    def _start_of(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return what a tensor was when the fit began, beside it; None where that is not known, or is the same."""
        start, here = (self._kept or {}).get(name), local_part(tensor.detach())
        if start is None:
            return None
        if start.shape == tensor.shape:
            start = part_of(start, tensor)
        if start.shape != here.shape:
            return None
        start = start.to(here.device)
        return None if torch.equal(start, here.to(start.dtype)) else start


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    parameter: Any
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_floating_point():
            yield plain_name(name), parameter


def _norm_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in named_layers(model).items():
        if isinstance(module, BATCH_NORM):
            held: dict[str, Any] = dict(module.named_buffers(recurse=False))
            yield from ((f"{name}.{kind}", held[kind]) for kind in _STATISTICS if not _is_absent(held.get(kind)))


def _is_absent(tensor: Any) -> bool:
    return tensor is None or is_lazy(tensor)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
