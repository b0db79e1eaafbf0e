"""The mask of pruned neurons."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_unlearn.results.storage import load_record, save_record
from lightning_unlearn.results.validate import check_held, check_primitives, check_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
MASK_VERSION = 1


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Mask of the neurons of a layer that are kept.

    Args:
        layer: dotted path of the layer.
        keep: (D,) bool, False for a pruned neuron.
        sensitivity: (D,) float32, standardized coefficient of the neuron's activation in the regression on the
            probability of being clean (paper, step 4); negative for a neuron that is more active on noisy samples. The
            score of any other criterion.
        standard_error: (D,) float32, standard error of the sensitivity; None if the criterion has none.
    """

    layer: str
    keep: Tensor
    sensitivity: Tensor
    standard_error: Tensor | None = None

    def __post_init__(self) -> None:
        check_primitives(self, layer=str)
        check_held(self)
        if self.keep.dtype != torch.bool or self.keep.ndim != 1 or self.keep.shape != self.sensitivity.shape:
            raise ValueError(
                f"keep must be bool of shape (D,) and sensitivity of the same shape, but they are {self.keep.dtype}"
                f" {tuple(self.keep.shape)} and {tuple(self.sensitivity.shape)}."
            )
        check_scores("sensitivity", self.sensitivity, self.keep.shape)
        if self.standard_error is not None:
            check_scores("standard_error", self.standard_error, self.keep.shape)

    def pruned_indices(self) -> Tensor:
        """Return the indices of the pruned neurons, ascending, int64."""
        return (~self.keep).nonzero().flatten()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask to a file that :meth:`load` reads: an npz archive of arrays, without a pickle.

        Args:
            path: file to write; no suffix is added. Folders are created, and an existing file is replaced atomically.
        """
        save_record(self, MASK_VERSION, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> NeuronMask:
        """Read a mask that :meth:`save` wrote; no code is unpickled.

        Raises:
            ValueError: for any other file.
        """
        return load_record(cls, MASK_VERSION, path)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the sensitivity of every neuron with its standard error, in ascending order, and mark pruned neurons.

        Args:
            ax: where to draw; by default in a new figure.

        Returns:
            the matplotlib figure and its axes.

        Raises:
            ImportError: without matplotlib: ``pip install matplotlib``.
        """
        from lightning_unlearn.results.plots import plot_mask

        return plot_mask(self, ax)
