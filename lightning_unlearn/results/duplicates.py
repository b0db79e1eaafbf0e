"""Which samples have the same input as others, or, of pictures, nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from lightning_unlearn.results.storage import load_record, save_record

INPUTS_VERSION = 1
# Root mean square of the differences of two perceptual hashes, in standard deviations. 16 pairs of 20,000 pictures of
# CIFAR-10 are closer, the same picture each, and 3 of 1,797 digits of 8 x 8 pixels, all ones; JPEG of quality 50 moves
# nine pictures of ten by less than .08.
_NEAR = 0.15
_STEPS = 16
# Pairs are compared in blocks of so many, 64 MB of numbers.
_ROWS, _COLUMNS = 256, 65_536


@dataclass(frozen=True)
class Duplicate:
    """Another sample with the same input.

    Args:
        index: of it in the data set.
        is_exact: whether it is the same; else it is nearly the same picture.
    """

    index: int
    is_exact: bool


@dataclass(frozen=True, eq=False)
class InputHashes:
    """Hashes of every sample's input, as the network gets it.

    Args:
        identity: (N,) int64, equal for equal inputs.
        perceptual: (N, 64) int8, of pictures nearly equal where they are; zeros where there is no picture.
    """

    identity: Tensor
    perceptual: Tensor

    def __post_init__(self) -> None:
        total = len(self.identity) if self.identity.ndim == 1 else -1
        if self.identity.dtype != torch.int64 or self.perceptual.dtype != torch.int8 or total < 0:
            raise ValueError("Expected hashes of inputs, (N,) int64 and (N, 64) int8, but got others.")
        if self.perceptual.ndim != 2 or len(self.perceptual) != total:
            raise ValueError(f"Expected perceptual to have {total} rows, but it has shape {self.perceptual.shape}.")

    def __len__(self) -> int:
        return len(self.identity)

    def save(self, path: str | PathLike[str]) -> None:
        """Write an npz archive of arrays that :meth:`load` reads."""
        save_record(self, INPUTS_VERSION, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> InputHashes:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for any other file.
        """
        return load_record(cls, INPUTS_VERSION, path)

    def duplicates(self, indices: Sequence[int], label: Tensor, most: int) -> dict[int, list[Duplicate]]:
        """Return the samples whose input is that of another, with these others.

        Args:
            indices: of the samples that are asked for, n of them; the time is that of n N comparisons.
            label: (N,) int64 the given labels, or (N, L).
            most: how many others of a sample.

        Returns:
            by index, of those only that have any: those under another label first, of these the same inputs before
            nearly the same ones.
        """
        given = label.reshape(len(label), -1)
        ordered, place = self.identity.sort(stable=True)
        of_asked = self.identity[list(indices)]
        first, last = torch.searchsorted(ordered, of_asked), torch.searchsorted(ordered, of_asked, right=True)
        found: dict[int, list[Duplicate]] = {}
        for at, (index, alike) in enumerate(zip(indices, self._near(indices), strict=True)):
            near = alike[self.identity[alike] != of_asked[at]]
            exact = place[first[at] : last[at]]
            other = torch.cat([exact, near])
            rank = torch.cat([torch.zeros(len(exact)), torch.ones(len(near))])
            # Of those under the same label, which come after the others.
            rank += 2 * (given[other] == given[index]).all(dim=1)
            chosen = [one for one in rank.argsort(stable=True)[: most + 1].tolist() if int(other[one]) != index]
            if chosen:
                found[index] = [Duplicate(int(other[one]), one < len(exact)) for one in chosen[:most]]
        return found

    def _near(self, indices: Sequence[int]) -> list[Tensor]:
        """Return, for each sample, those whose perceptual hash is near its own; itself may be among them."""
        asked = self.perceptual[list(indices)].float()
        found: list[list[Tensor]] = [[] for _ in indices]
        # All hashes of pictures have about the same length, so that few pairs are looked at again.
        limit = _NEAR**2 * _STEPS**2 * self.perceptual.shape[1]
        least = 0.97 * _STEPS**2 * self.perceptual.shape[1]
        for first in range(0, len(self) if bool(asked.any()) else 0, _COLUMNS):
            columns = self.perceptual[first : first + _COLUMNS].float()
            for row in range(0, len(asked), _ROWS):
                product = asked[row : row + _ROWS] @ columns.T
                for at in (product.amax(dim=1) >= least).nonzero().flatten().tolist():
                    close = (product[at] >= least).nonzero().flatten()
                    distance = (columns[close] - asked[row + at]).square().sum(dim=1)
                    found[row + at].append(close[distance <= limit] + first)
        return [torch.cat([torch.zeros(0, dtype=torch.int64), *parts]) for parts in found]
