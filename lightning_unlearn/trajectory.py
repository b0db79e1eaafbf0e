"""What the model said of every sample in the course of training, in a few floats per sample.

At the head's input, gradient x activation of a class's logit, summed over the neurons, is that logit less the head's
bias. So the logits of the training steps, which cost nothing, are the class attributions of every sample, one pass an
epoch. What is kept of them are sums: of the attributions, in coordinates of the classes' differences, over each quarter
of the epochs before the partition (what is memorised shows late, what is hard shows early), of the margin, of the
support of the given label, and of the uncertainty.

**Classes.** Of a model with more than 129 outputs only the classes that labels name in the first epoch get coordinates,
if they are at most 129; that epoch's coordinates are not kept then. If they are more, the coordinates are random.

**Memory.** With ``r = min(C - 1, 128)``, C being the outputs, or those classes: 20 r + 56 bytes per sample, on the CPU
(236 for 10 classes, 2,616 for 129 and more), of which 16 r + 40 go into a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.coordinates import helmert, times_helmert
from lightning_unlearn.functional.evidence import label_support
from lightning_unlearn.functional.mixture import Reduce

MOST_COORDINATES = 128
PHASES = 4
"""Into how many parts the training before the partition is divided."""

_ROWS = 65_536


def class_coordinates(num_classes: int) -> Tensor:
    """An orthonormal basis of what logits mean: their differences, as adding a constant to all changes nothing.

    Args:
        num_classes: C.

    Returns:
        (C, r) float32 with ``r = min(C - 1, 128)``. For C <= 129 it keeps all differences (Helmert's basis); for more
        classes it is a random part of them, always the same, which keeps distances to within some ten per cent (Johnson
        and Lindenstrauss).

    Example:
        >>> basis = class_coordinates(3)
        >>> ((torch.tensor([2.0, 1.0, 0.0]) @ basis) @ basis.T).round(decimals=3).abs()
        tensor([1., 0., 1.])
    """
    if num_classes - 1 > MOST_COORDINATES:
        draw = torch.randn(num_classes - 1, MOST_COORDINATES, generator=torch.Generator().manual_seed(0)).double()
        return times_helmert(torch.linalg.qr(draw)[0]).float()
    return helmert(num_classes)


def _entropy(logits: Tensor) -> Tensor:
    """Of the softmax of (B, C), in nats, (B,).

    Not by way of torch's own softmax, which takes several times as long for few classes on a processor.
    """
    below = logits - logits.amax(dim=1, keepdim=True)
    odds = below.exp()
    total = odds.sum(dim=1)
    return total.log() - (odds * below).sum(dim=1) / total


class Trajectory:
    """Sums of what passes over the training set showed, by dataset index.

    Args:
        total: N.
        num_classes: C.

    Attributes:
        basis: (C, r), see :func:`class_coordinates`; 0 in the rows of classes without coordinates.
        label: (N,) int64, the given labels that this rank has seen, -1 for others.
        rows_left_out: of what this rank observed since the last merge, how many rows were NaN or infinite.
    """

    def __init__(self, total: int, num_classes: int) -> None:
        self.num_classes = num_classes
        # Those that have coordinates; none where all have.
        self._classes = torch.zeros(0, dtype=torch.int64)
        # Columns: how often the sample was seen, margin, support of the given label, uncertainty.
        self._scores = torch.zeros(total, 4)
        self._take_coordinates(class_coordinates(num_classes))
        self.label = torch.full((total,), -1)
        self.rows_left_out = 0
        self._epochs_each = 1

    def _take_coordinates(self, basis: Tensor) -> None:
        self.basis = basis
        # Columns: the coordinates, then how often the sample was seen.
        self._phases = torch.zeros(PHASES, len(self), basis.shape[1] + 1)
        self._fresh = torch.zeros(len(self), basis.shape[1] + 4)

    def _take_classes(self, classes: Tensor) -> None:
        """From now on only these classes have coordinates; what was kept of the others' is lost."""
        basis = torch.zeros(self.num_classes, len(classes) - 1)
        basis[classes] = class_coordinates(len(classes))
        self._classes = classes
        self._take_coordinates(basis)

    def _find_classes(self, reduce: Reduce) -> None:
        """Looks which classes occur, where there are more outputs than coordinates. Every rank must call it."""
        if len(self._classes) or self.num_classes - 1 <= MOST_COORDINATES:
            return
        counts = reduce(torch.bincount(self.label[self.label >= 0], minlength=self.num_classes).double())
        classes = counts.nonzero().flatten()
        if 1 < len(classes) <= MOST_COORDINATES + 1:
            coordinates, scores = self.basis.shape[1], self._scores
            # In parts, as of a merge.
            for first in range(0, len(self), _ROWS):
                rows = slice(first, first + _ROWS)
                scores[rows] += reduce(self._fresh[rows, coordinates:])
            self._take_classes(classes)

    def __len__(self) -> int:
        return self._scores.shape[0]

    def of_others(self, total: int) -> Trajectory:
        """An empty one of other samples, ``total`` of them, with coordinates of the same classes."""
        other = Trajectory(total, self.num_classes)
        if len(self._classes):
            other._take_classes(self._classes)
        return other

    def coordinates(self, logits: Tensor) -> Tensor:
        """Logits in the coordinates ``basis``, (B, r) float32.

        Args:
            logits: (B, C).
        """
        # Autocast, which passes of a fit in mixed precision run under, would multiply in half precision.
        with torch.autocast(logits.device.type, enabled=False):
            return logits.float() @ self.basis.to(logits.device)

    def observe(self, index: Tensor, logits: Tensor, label: Tensor, margin: Tensor | None = None) -> None:
        """Takes rows of a pass, but for those that are not finite: one such step would outlast all others in a sum.

        Args:
            index: (B,) int64, dataset indices; the same may come twice.
            logits: (B, C).
            label: (B,) int64.
            margin: (B,) attribution of the given label's margin; by default that of the logits.
        """
        logits = logits.detach().float()
        margin = label_margin(logits, label) if margin is None else margin
        scores = torch.stack([torch.ones_like(margin), margin, label_support(margin), _entropy(logits)], dim=1)
        rows = torch.cat([self.coordinates(logits), scores], dim=1)
        index, rows = index.cpu(), rows.cpu()
        self.label[index] = label.cpu()
        if not rows.sum().isfinite():  # of all at once, as it is nearly always
            finite = rows.isfinite().all(dim=1)
            self.rows_left_out += int((~finite).sum())
            index, rows = index[finite], rows[finite]
        self._fresh.index_add_(0, index, rows)

    def fresh(self, index: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """What was observed of some samples since the last merge, on any rank. Every rank must call it.

        Args:
            index: (n,) int64.
            reduce: sums over the ranks.

        Returns:
            the mean coordinates (n, r) of each sample, NaN for one that was not seen; and how often each was seen (n,).
        """
        coordinates = self.basis.shape[1]
        found = torch.zeros(len(index), coordinates + 1)
        for first in range(0, len(self), _ROWS):
            rows = reduce(self._fresh[first : first + _ROWS, : coordinates + 1])
            inside = (index >= first) & (index < first + _ROWS)
            found[inside] = rows[index[inside] - first]
        count = found[:, -1]
        return found[:, :-1] / count.where(count > 0, torch.nan).unsqueeze(1), count

    def merge(self, phase: int | None, reduce: Reduce) -> None:
        """Adds what was observed since the last merge, on any rank, to one phase. Every rank must call it.

        Args:
            phase: from 0 to ``PHASES - 1``; None for what belongs to none of them and only counts in the scores.
            reduce: sums over the ranks.
        """
        if phase is not None:
            self._find_classes(reduce)
        coordinates = self.basis.shape[1]
        for first in range(0, len(self), _ROWS):
            rows = slice(first, first + _ROWS)
            fresh = reduce(self._fresh[rows])
            if phase is not None:
                self._phases[phase, rows] += fresh[:, : coordinates + 1]
            self._scores[rows] += fresh[:, coordinates:]
        self._fresh.zero_()
        self.rows_left_out = 0

    def make_room(self, phase: int, width: int) -> int:
        """Where the evidence of an epoch belongs, so that no later phase holds earlier epochs.

        Args:
            phase: that it is to belong to.
            width: of how many epochs a phase is to be; where it has grown, pairs of phases are joined. 0 where phases
                are not joined.
        """
        while 0 < self._epochs_each < width:
            pairs = self._phases.reshape(PHASES // 2, 2, *self._phases.shape[1:]).sum(dim=1)
            self._phases[: PHASES // 2], self._phases[PHASES // 2 :] = pairs, 0
            self._epochs_each *= 2
        held = [at for at in range(PHASES) if bool((self._phases[at, :, -1] > 0).any())]
        return max([phase, *held])

    def margins(self) -> tuple[Tensor, Tensor]:
        """The mean margin (N,) of all that was merged, and how often each sample was seen (N,)."""
        count = self._scores[:, 0]
        return self._scores[:, 1] / count.clamp(min=1), count.clone()

    def agreement(self) -> Tensor:
        """(2,) float64: of how many samples this rank has observed, since the last merge, that the label leads; of all.

        The margin is positive where the strongest class is the given label.
        """
        margin, count = self._fresh[:, -3], self._fresh[:, -4]
        return torch.stack([(margin[count > 0] > 0).sum(), (count > 0).sum()]).double()

    def drop(self) -> None:
        """Forgets what was observed since the last merge, by a pass that did not reach its end."""
        self._fresh.zero_()
        self.rows_left_out = 0

    def forget(self) -> None:
        """Forgets everything."""
        for tensor in (self._phases, self._scores, self._fresh):
            tensor.zero_()
        self.label.fill_(-1)
        self.rows_left_out = 0
        self._epochs_each = 1

    def phases(self, index: Tensor) -> list[Tensor]:
        """The mean class attributions of some samples over each phase of training that holds anything.

        Args:
            index: (n,) int64.

        Returns:
            up to ``PHASES`` of (n, r), with NaN in the rows of samples that this phase has not seen.
        """
        seen = []
        for phase in self._phases:
            if bool((phase[:, -1] > 0).any()):
                count = phase[index, -1:]
                seen.append(phase[index, :-1] / count.where(count > 0, torch.nan))
        return seen

    def scores(self, index: Tensor) -> dict[str, Tensor]:
        """``margin``, ``support`` and ``uncertainty`` of some samples, each (n,), averaged over all that was merged."""
        count, *sums = self._scores[index].unbind(dim=1)
        names = ("margin", "support", "uncertainty")
        return {name: total / count.clamp(min=1) for name, total in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What was merged, the same on every rank, and the labels that this one has seen."""
        return {
            "num_classes": self.num_classes,
            "classes": self._classes.clone(),
            "phases": self._phases.clone(),
            "scores": self._scores.clone(),
            "label": self.label.clone(),
            "epochs_each": self._epochs_each,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trajectory:
        """The trajectory that :meth:`state_dict` described."""
        trajectory = cls(len(state["scores"]), state["num_classes"])
        # Absent in checkpoints of before it was looked which classes occur.
        if len(classes := state.get("classes", trajectory._classes)):
            trajectory._take_classes(classes)
        for name, tensor in (
            ("phases", trajectory._phases),
            ("scores", trajectory._scores),
            ("label", trajectory.label),
        ):
            tensor.copy_(state[name])
        trajectory._epochs_each = state.get("epochs_each", 1)
        return trajectory
