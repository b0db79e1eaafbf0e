"""The train loaders whose batches are matched with dataset indices while training steps are read."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_unlearn.data.index_tracking import track_indices, untrack_indices
from lightning_unlearn.data.loaders import check_loader
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.train_data import TrainLoaderWatch


class TrackedLoaders:
    """Tracks the dataset indices of the batches of the train loaders in use.

    Lightning may replace the loaders during a fit. The loaders that it replaces are restored.
    """

    def __init__(self) -> None:
        self._watch = TrainLoaderWatch()
        self._loaders: list[DataLoader[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy tracks nothing.
        return {**self.__dict__, "_loaders": []}

    def attach(self, fit: FitContext) -> None:
        """Follow the train loaders from when Lightning makes them. Call in ``setup``.

        Args:
            fit: the fit that is set up.
        """
        self._watch.attach(fit, self.follow)

    def follow(self, loaders: list[Any]) -> None:
        """Track the batches of these loaders, and restore the loaders that they replace.

        Does nothing if batches of these loaders cannot be matched with dataset indices (:func:`fault_of_loaders`).

        Args:
            loaders: the train loaders in use.
        """
        if fault_of_loaders(loaders):
            return
        for loader in self._loaders:
            if all(loader is not other for other in loaders):
                untrack_indices(loader)
        self._loaders = loaders
        for loader in loaders:
            track_indices(loader)

    def detach(self) -> None:
        """Restore all loaders and follow them no more. May be called repeatedly."""
        self._watch.detach()
        for loader in self._loaders:
            untrack_indices(loader)
        self._loaders = []


def fault_of_loaders(loaders: list[Any]) -> str:
    """Return why batches of these train loaders cannot be matched with dataset indices; empty if they can."""
    try:
        loader = check_loader(loaders[0] if len(loaders) == 1 else loaders)
    except (TypeError, ValueError) as error:
        return f"the train loader does not draw batches of dataset indices ({error})"
    # in_order is new in torch 2.6.
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        return "the train loader has in_order=False, so its workers deliver batches in any order"
    return ""
