"""Training dynamics: running sums of the outputs for every sample during training.

At the head's input, gradient x activation of a class's logit, summed over the neurons, equals that logit minus the
head's bias. The logits of the training steps are therefore the class attributions of every sample, once per epoch, at
no extra cost. Only sums are kept: of the attributions (in coordinates of the class differences, for each quarter of the
epochs before the partition), of the margin, of the confidence of the given label, and of the uncertainty.

**Classes.** In a model with more than 129 outputs, only the classes that occur as labels in the first epoch get
coordinates, if there are at most 129 of them. Otherwise soft margins are kept
(:mod:`~lightning_unlearn.functional.soft_margin`): the lead of the label's logit over those of the other classes that
occur, at nine temperatures. The evidence of the first epoch is discarded if fewer than half of the outputs occur.

**Ranks.** A rank holds the sums of its own samples only, including rows received from other ranks
(:mod:`~lightning_unlearn.evidence.by_index`, :mod:`~lightning_unlearn.evidence.by_key`).

**Memory.** With C outputs, or classes that occur, and ``r = C - 1`` (``r = 9`` for more than 129): 20 r + 56 bytes per
sample on the CPU (236 for 10 classes, 2,616 for 129, 236 for more), of which checkpoints store 16 r + 40.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.coordinates import MAX_COORDINATES, class_coordinates
from lightning_unlearn.functional.evidence import entropy, label_confidence
from lightning_unlearn.functional.soft_margin import NUM_SCALES, rivals_of, soft_margins
from lightning_unlearn.utilities.reduce import Reduce

PHASES = 4
"""Number of parts into which the epochs before the partition are divided."""


class TrainingDynamics:
    """Running sums of the evidence of a rank's samples, from training steps and passes.

    Args:
        total: N, number of rows.
        num_classes: C.
        keeps_coordinates: keep random coordinates in addition to soft margins for more than 129 classes, for recipes
            that use the attributions.

    Attributes:
        basis: (C, r), see :func:`~lightning_unlearn.functional.coordinates.class_coordinates`; 0 in the rows of classes
            without coordinates; (C, 0) if soft margins are kept instead.
        label: (N,) int64, the given labels seen so far, -1 for others.
        rows_left_out: number of rows with NaN or infinity that this rank observed since the last merge.
    """

    def __init__(self, total: int, num_classes: int, *, keeps_coordinates: bool = False) -> None:
        self.num_classes = num_classes
        # Those that occur, of more outputs than have coordinates; none where that is not known yet.
        self._classes = torch.zeros(0, dtype=torch.int64)
        # Columns: how often the sample was seen, margin, support of the given label, uncertainty.
        self._scores = torch.zeros(total, 4)
        self.label = torch.full((total,), -1)
        is_exact = num_classes - 1 <= MAX_COORDINATES
        basis = class_coordinates(num_classes) if is_exact or keeps_coordinates else torch.zeros(num_classes, 0)
        self._lay_out(basis, 0 if is_exact else NUM_SCALES)
        # (C,) how often each class was expected since the last merge, where soft margins are kept.
        self._expected = torch.zeros(num_classes if self.has_margins else 0, dtype=torch.float64)
        self.rows_left_out = 0
        self._epochs_each = 1
        self._rests = False
        # Whether any rank has merged something into each phase; and anything at all.
        self._held = torch.zeros(PHASES + 1, dtype=torch.bool)

    def _lay_out(self, basis: Tensor, num_margins: int) -> None:
        self.basis, self._num_margins = basis, num_margins
        # Columns: the coordinates, the soft margins, then how often the sample was seen.
        self._phases = torch.zeros(PHASES, len(self), self._width + 1)
        self._fresh = torch.zeros(len(self), self.row_width)

    @property
    def _width(self) -> int:
        """Coordinates and soft margins."""
        return self.basis.shape[1] + self._num_margins

    @property
    def row_width(self) -> int:
        """W, the number of columns that :meth:`described` returns."""
        return self._width + 4

    @property
    def merged_bytes(self) -> int:
        """Size in bytes of the merged sums, which checkpoints store."""
        return self._phases.nbytes + self._scores.nbytes + self.label.nbytes

    @property
    def classes(self) -> Tensor:
        """(K,) int64, the classes that are compared, in ascending order."""
        if len(self._classes):
            return self._classes
        return torch.arange(self.num_classes)

    @property
    def has_margins(self) -> bool:
        """Whether soft margins are kept: more classes occur than have coordinates, or this is not known yet."""
        return self._num_margins > 0

    @property
    def num_rivals(self) -> int:
        """Number of classes that the soft margins compare."""
        return len(self._classes) or self.num_classes

    @property
    def knows_classes(self) -> bool:
        """Whether the occurring classes were determined, for more outputs than have coordinates."""
        return len(self._classes) > 0

    @property
    def is_empty(self) -> bool:
        """Whether no rank has merged anything."""
        return not bool(self._held[-1])

    def _take_classes(self, classes: Tensor) -> None:
        """Compare only these classes from now on, in coordinates if there are few enough."""
        self._classes = classes
        if len(classes) <= MAX_COORDINATES + 1:
            basis = torch.zeros(self.num_classes, len(classes) - 1)
            basis[classes] = class_coordinates(len(classes))
            self._lay_out(basis, 0)
            self._held[:-1] = False

    def _find_classes(self, reduce: Reduce) -> bool:
        """Determine which classes occur, if soft margins are kept. Every rank must call it.

        Returns:
            whether to discard what was observed since the last merge, except for its scores.
        """
        if not self.has_margins:
            return False
        counts = reduce(torch.bincount(self.label[self.label >= 0], minlength=self.num_classes).double())
        classes = counts.nonzero().flatten()
        if len(classes) <= 1:
            return False
        is_narrower = bool(2 * len(classes) < self.num_rivals)
        if len(classes) <= MAX_COORDINATES + 1:
            self._scores += self._fresh[:, self._width :]
        self._take_classes(classes)
        return is_narrower

    def grow(self, total: int) -> None:
        """Append rows for new samples.

        Args:
            total: number of samples now.
        """

        def grown(rows: Tensor, dim: int, value: float = 0) -> Tensor:
            more = rows.new_full((*rows.shape[:dim], total - rows.shape[dim], *rows.shape[dim + 1 :]), value)
            return torch.cat([rows, more], dim=dim)

        if total > len(self):
            self._scores, self.label = grown(self._scores, 0), grown(self.label, 0, -1)
            self._fresh, self._phases = grown(self._fresh, 0), grown(self._phases, 1)

    def __len__(self) -> int:
        return self._scores.shape[0]

    def of_others(self, total: int) -> TrainingDynamics:
        """Return an empty object for ``total`` other samples, with coordinates of the same classes."""
        other = TrainingDynamics(total, self.num_classes)
        if len(self._classes):
            other._take_classes(self._classes)
        return other

    def coordinates(self, logits: Tensor) -> Tensor:
        """Return logits in the coordinates ``basis``, (B, r) float32.

        Args:
            logits: (B, C).
        """
        # Autocast, which passes of a fit in mixed precision run under, would multiply in half precision.
        with torch.autocast(logits.device.type, enabled=False):
            return logits.float() @ self.basis.to(logits.device)

    def _margins(self, logits: Tensor, label: Tensor, expected: Tensor | None = None) -> Tensor:
        """Return (B, K) soft margins of (B, C) logits against the classes that occur; (B, 0) if none are kept."""
        if not self.has_margins:
            return logits.new_zeros(len(logits), 0)
        return soft_margins(logits, label, rivals=self._classes if len(self._classes) else None, expected=expected)

    def of_last_pass(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return the evidence of rows of the last pass: coordinates as ``last``, and soft margins if they are kept.

        Args:
            logits: (B, C).
            label: (B,) int64.
        """
        found = {"last": self.coordinates(logits)}
        if self.has_margins:
            found["soft_margins"] = self._margins(logits, label)
            found["runner_up"], found["runner_up_probability"] = rivals_of(logits, label, self._classes)
        return found

    def observe(self, index: Tensor, logits: Tensor, label: Tensor, margin: Tensor | None = None) -> None:
        """Add rows of a pass, except those with NaN or infinity, which would spoil the sums.

        Args:
            index: (B,) int64, row of each sample; repetitions are allowed.
            logits: (B, C).
            label: (B,) int64.
            margin: (B,), attribution of the given label's margin; by default the margin of the logits.
        """
        self.label[index.cpu()] = label.cpu()
        self.add(*self.described(index, logits, label, margin))

    def add(self, index: Tensor, rows: Tensor) -> None:
        """Add rows that :meth:`described` returned.

        Args:
            index: (B,) int64.
            rows: (B, W).
        """
        self._make_room_for_fresh()
        self._fresh.index_add_(0, index, rows)

    def _make_room_for_fresh(self) -> None:
        if len(self._fresh) < len(self):
            self._fresh = torch.zeros(len(self), self.row_width)

    def rest(self) -> None:
        """From now on, free the buffer of new observations after each merge until it is needed."""
        self._rests = True
        self._fresh = torch.zeros(0, self.row_width)

    def described(
        self, index: Tensor, logits: Tensor, label: Tensor, margin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the columns that are summed for some rows; see :meth:`observe`.

        Returns:
            the indices of the finite rows, and their columns (B, W), both on the CPU.
        """
        logits = logits.detach().float()
        margin = label_margin(logits, label) if margin is None else margin
        scores = torch.stack([torch.ones_like(margin), margin, label_confidence(margin), entropy(logits)], dim=1)
        expected = logits.new_zeros(self.num_classes) if self.has_margins else None
        rows = torch.cat([self.coordinates(logits), self._margins(logits, label, expected), scores], dim=1)
        index, rows = index.cpu(), rows.cpu()
        if expected is not None and (known := expected.cpu()).isfinite().all():
            self._expected += known
        if not rows.sum().isfinite():  # one check for all rows, which nearly always passes
            finite = rows.isfinite().all(dim=1)
            self.rows_left_out += int((~finite).sum())
            index, rows = index[finite], rows[finite]
        return index, rows

    def fresh(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the evidence of some samples since the last merge.

        Args:
            index: (n,) int64.

        Returns:
            the mean coordinates (n, r) of each sample, or its mean soft margins (n, K) if these are kept, NaN for
            samples that were not seen; and the number of times each sample was seen, (n,).
        """
        self._make_room_for_fresh()
        first = self.basis.shape[1] if self.has_margins else 0
        found = self._fresh[index, first : self._width + 1]
        count = found[:, -1]
        return found[:, :-1] / count.where(count > 0, torch.nan).unsqueeze(1), count

    def expected(self, reduce: Reduce) -> Tensor:
        """Return (C,) float64, the sum of predicted probabilities since the last merge, if soft margins are kept.

        Every rank must call it.
        """
        return reduce(self._expected)

    def merge(self, phase: int | None, reduce: Reduce) -> None:
        """Add the evidence since the last merge to one phase. Every rank must call it.

        Args:
            phase: from 0 to ``PHASES - 1``; None for evidence that only counts in the scores.
            reduce: sums over the ranks.
        """
        self._make_room_for_fresh()
        if phase is not None and self._find_classes(reduce):
            # It compares other classes than from now on.
            phase = None
        if phase is not None:
            self._phases[phase] += self._fresh[:, : self._width + 1]
        self._scores += self._fresh[:, self._width :]
        # All ranks must agree, since recipes sum over the ranks for each phase.
        if bool(reduce(self._fresh[:, -4].any().double().reshape(1)) > 0):
            self._held[[-1] if phase is None else [phase, -1]] = True
        self.drop()

    def make_room(self, phase: int, width: int) -> int:
        """Return the phase of an epoch's evidence, so that no later phase holds earlier epochs.

        Args:
            phase: requested phase.
            width: number of epochs per phase; if it has grown, pairs of phases are merged. 0 if phases are never
                merged.
        """
        while 0 < self._epochs_each < width:
            pairs = self._phases.reshape(PHASES // 2, 2, *self._phases.shape[1:]).sum(dim=1)
            self._phases[: PHASES // 2], self._phases[PHASES // 2 :] = pairs, 0
            self._held[: PHASES // 2] = self._held[:-1].reshape(-1, 2).any(dim=1)
            self._held[PHASES // 2 : -1] = False
            self._epochs_each *= 2
        held = [at for at in range(PHASES) if self._held[at]]
        return max([phase, *held])

    def margins(self) -> tuple[Tensor, Tensor]:
        """Return the mean margin (N,) of the merged evidence, and the number of times each sample was seen (N,)."""
        count = self._scores[:, 0]
        return self._scores[:, 1] / count.clamp(min=1), count.clone()

    def agreement(self) -> Tensor:
        """Return (2,) float64: numbers of samples predicted as labeled and of samples seen since the last merge.

        The margin is positive if the predicted class is the given label.
        """
        self._make_room_for_fresh()
        margin, count = self._fresh[:, -3], self._fresh[:, -4]
        return torch.stack([(margin[count > 0] > 0).sum(), (count > 0).sum()]).double()

    def drop(self) -> None:
        """Discard the evidence since the last merge, for example of an interrupted pass."""
        if self._rests:
            self.rest()
        self._fresh.zero_()
        self._expected.zero_()
        self.rows_left_out = 0

    def forget(self) -> None:
        """Discard everything."""
        self.drop()
        self._phases.zero_()
        self._scores.zero_()
        self._held.zero_()
        self.label.fill_(-1)
        self._epochs_each = 1

    def phases(self, index: Tensor) -> list[Tensor]:
        """Return the mean class attributions of some samples in each phase with evidence.

        Args:
            index: (n,) int64.

        Returns:
            up to ``PHASES`` tensors (n, r), with NaN in the rows of samples that were not seen in this phase.
        """
        return [rows[:, : self.basis.shape[1]] for rows in self._means(index)]

    def soft_margins(self, index: Tensor) -> list[Tensor]:
        """Return their mean soft margins likewise, (n, K) each; (n, 0) if none are kept."""
        return [rows[:, self.basis.shape[1] :] for rows in self._means(index)]

    def _means(self, index: Tensor) -> list[Tensor]:
        seen = []
        for at in self._held[:-1].nonzero().flatten().tolist():
            rows = self._phases[at, index]
            count = rows[:, -1:]
            seen.append(rows[:, :-1] / count.where(count > 0, torch.nan))
        return seen

    def scores(self, index: Tensor) -> dict[str, Tensor]:
        """Return the mean ``margin``, ``label_confidence`` and ``uncertainty`` of some samples, each (n,)."""
        count, *sums = self._scores[index].unbind(dim=1)
        names = ("margin", "label_confidence", "uncertainty")
        return {name: total / count.clamp(min=1) for name, total in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return the merged sums and the labels."""
        return {
            "num_classes": self.num_classes,
            "classes": self._classes.clone(),
            "phases": self._phases.clone(),
            "scores": self._scores.clone(),
            "label": self.label.clone(),
            "epochs_each": self._epochs_each,
            "held": self._held.clone(),
        }

    def part(self, rows: Tensor) -> TrainingDynamics:
        """Return the merged sums and labels of some rows, as a new object.

        Args:
            rows: (n,) int64; -1 for a row without evidence.
        """
        state, known = self.state_dict(), rows >= 0
        held = rows.clamp(min=0)
        return TrainingDynamics.from_state_dict(
            {
                **state,
                "phases": state["phases"][:, held] * known.unsqueeze(1),
                "scores": state["scores"][held] * known.unsqueeze(1),
                "label": state["label"][held].where(known, -1),
            }
        )

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrainingDynamics:
        """Return the object that :meth:`state_dict` described."""
        width, classes = state["phases"].shape[2] - 1, state.get("classes", torch.zeros(0, dtype=torch.int64))
        trajectory = cls(
            len(state["scores"]),
            state["num_classes"],
            keeps_coordinates=width == MAX_COORDINATES + NUM_SCALES,
        )
        # Absent in checkpoints from before the occurring classes were determined.
        if len(classes):
            trajectory._take_classes(classes)
        if width != trajectory._width:
            raise ValueError(
                f"Expected a checkpoint whose evidence separates {trajectory.num_classes} classes, but it was"
                " written by a version of lightning_unlearn that kept a random projection of it. Resume with that"
                " version, or start the fit again."
            )
        for name, tensor in (
            ("phases", trajectory._phases),
            ("scores", trajectory._scores),
            ("label", trajectory.label),
        ):
            tensor.copy_(state[name])
        trajectory._epochs_each = state.get("epochs_each", 1)
        # Absent in checkpoints that hold the sums of all samples.
        seen = [(state["phases"][:, :, -1] > 0).any(dim=1), (state["scores"][:, 0] > 0).any().reshape(1)]
        trajectory._held.copy_(state["held"] if "held" in state else torch.cat(seen))
        return trajectory
