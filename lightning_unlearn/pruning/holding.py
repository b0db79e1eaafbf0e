"""Keeps what belongs to pruned neurons at zero in a fit in which others write to the weights too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unlearn.attribution import plain_name
from lightning_unlearn.pruning.masking import PrunedEntries, PrunedParameters, are_revived, snapshot
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.weight_averages import weight_copies


class HeldEntries:
    """What is kept at zero; nothing at first. False while nothing is held."""

    def __init__(self) -> None:
        self._pruning: PrunedParameters | None = None
        self._entries: list[PrunedEntries] = []

    def __bool__(self) -> bool:
        return self._pruning is not None

    def hold(self, fit: FitContext, entries: list[PrunedEntries]) -> None:
        """Zero entries, in averages of the weights too, and keep these at zero in place of those before.

        Where that fails the parameters are as they were.
        """
        restore = snapshot(entries)
        try:
            PrunedParameters(entries).zero_parameters()
            silence_copies(fit, entries)
        except BaseException:
            restore()
            raise
        self.take(entries)

    def take(self, entries: list[PrunedEntries]) -> None:
        """Keep entries at zero that are so already, in place of those before."""
        self.release()
        self._pruning, self._entries = PrunedParameters(entries), entries

    def confirm(self, fit: FitContext, entries: list[PrunedEntries]) -> bool:
        """Check that all entries are zero in the module's current parameters.

        Args:
            fit: the running fit.
            entries: the held entries, in the current parameters.

        Returns:
            False if an entry was not zero; it has been zeroed again.
        """
        here, before = ([entry.parameter for entry in of] for of in (entries, self._entries))
        is_same = len(here) == len(before) and all(one is other for one, other in zip(here, before, strict=True))
        is_revived = are_revived(entries)
        if not is_same:
            # A parameter has taken another one's place.
            self.take(entries)
        self.zero_parameters()
        silence_copies(fit, entries)
        return not is_revived

    def zero_parameters(self) -> None:
        """Set the entries to zero. Does not wait for the device."""
        if self._pruning is not None:
            self._pruning.zero_parameters()

    def zero_all(self, fit: FitContext) -> None:
        """Set the entries to zero, in averages of the weights too."""
        self.zero_parameters()
        silence_copies(fit, self._entries)

    def watch(self, optimizer: Optimizer, beside: Iterable[Optimizer]) -> None:
        """Zero the entries of gradients now, and the parameters' after each step of the optimizer."""
        if self._pruning is not None:
            self._pruning.watch(optimizer, beside)
            self._pruning.zero_gradients()

    def release(self) -> None:
        """Stop holding entries at zero, without changing parameters."""
        if self._pruning is not None:
            self._pruning.release()
        self._pruning, self._entries = None, []


@torch.no_grad()
def silence_state(model: nn.Module, state: Mapping[str, Any], entries: Sequence[PrunedEntries]) -> None:
    """Zero entries of the parameters in a state dict that may hold copies of them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for entry in entries:
        name = names[id(entry.parameter)]
        # ModelPruning saves the product of its mask in the parameter's place.
        copy = state.get(name, state.get(name.removesuffix("_orig")))
        if isinstance(copy, Tensor) and copy.shape == entry.parameter.shape:
            entry.zero_(copy)


@torch.no_grad()
def silence_copies(fit: FitContext, entries: Sequence[PrunedEntries]) -> None:
    """Zero entries of the weights in their averages, which would bring them back."""
    copies = weight_copies(fit)
    named = fit.model.named_parameters(remove_duplicate=False)
    names = {id(parameter): plain_name(name) for name, parameter in named} if copies else {}
    for copy in copies:
        for entry in entries:
            if (tensor := copy.get(names[id(entry.parameter)])) is not None:
                entry.zero_(tensor)
