"""State of a fit that is shared between hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from lightning_unlearn.results.duplicates import InputHashes


@dataclass(eq=False)
class FitMemory:
    """State that hooks of a fit share, dropped when the fit ends.

    Args:
        has_begun: whether all callbacks have been set up.
        callbacks: in the order in which the user gave them, where ours have moved.
        scoring_loader: that the user has made for the passes, as a user's method may read a data set.
        established: loaders whose rows have been seen to be the samples drawn.
        score: the last one on validation data, of which weights it is, and why there is none.
        said: what has been said once.
        lines: of the progress bar that are open.
        inputs: hashes of the training set's inputs, where a callback is to show samples
            (:class:`~lightning_unlearn.results.duplicates.InputHashes`).
        gave_up: ids of loggers that could not take a picture, which are offered no other.
    """

    has_begun: bool = False
    callbacks: list[Any] | None = None
    scoring_loader: DataLoader[Any] | None = None
    established: WeakSet[DataLoader[Any]] = field(default_factory=WeakSet)
    score: tuple[tuple[Any, ...] | None, Any, str] = (None, None, "")
    said: set[str] = field(default_factory=set)
    lines: list[Any] = field(default_factory=list)
    inputs: InputHashes | None = None
    gave_up: set[int] = field(default_factory=set)
