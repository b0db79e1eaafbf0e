"""What the model said of every sample in the course of training, in a few floats per sample.

At the head's input, gradient x activation of a class's logit, summed over the neurons, is that logit less the head's
bias. So the logits of the training steps, which cost nothing, are the class attributions of every sample, one pass an
epoch. What is kept of them are sums: of the attributions, in coordinates of the classes' differences, over each quarter
of the epochs before the partition (what is memorized shows late, what is hard shows early), of the margin, of the
support of the given label, and of the uncertainty.

**Classes.** Of a model with more than 129 outputs only the classes that labels name in the first epoch get coordinates,
if they are at most 129. If they are more, soft margins are kept instead
(:mod:`~lightning_unlearn.functional.soft_margin`): how far the label's logit leads those of the other classes that
occur, at nine temperatures. What the first epoch showed is not kept where fewer than half of the outputs occur.

**Ranks.** A rank holds the sums of its own samples alone, whatever has come from the others
(:mod:`~lightning_unlearn.evidence.by_index`, :mod:`~lightning_unlearn.evidence.by_key`).

**Memory.** With C outputs, or classes that occur, and ``r = C - 1``, or ``r = 9`` of more than 129: 20 r + 56 bytes per
sample, on the CPU (236 for 10 classes, 2,616 for 129, 236 for more), of which 16 r + 40 go into a checkpoint.
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
"""Into how many parts the training before the partition is divided."""


class TrainingDynamics:
    """Sums of what training steps and passes showed of a rank's samples, by their row.

    Args:
        total: N, the rows.
        num_classes: C.
        keeps_coordinates: whether more than 129 classes have random coordinates beside soft margins, for a recipe that
            looks at the attributions themselves.

    Attributes:
        basis: (C, r), see :func:`class_coordinates`; 0 in the rows of classes without coordinates; (C, 0) where soft
            margins are kept instead.
        label: (N,) int64, the given labels as far as they have been seen, -1 for others.
        rows_left_out: of what this rank observed since the last merge, how many rows were NaN or infinite.
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
        """W, the numbers that :meth:`described` makes of a row."""
        return self._width + 4

    @property
    def merged_bytes(self) -> int:
        """Return the bytes of what was merged, which a checkpoint keeps."""
        return self._phases.nbytes + self._scores.nbytes + self.label.nbytes

    @property
    def classes(self) -> Tensor:
        """(K,) int64, the classes that are compared, ascending."""
        if len(self._classes):
            return self._classes
        return torch.arange(self.num_classes)

    @property
    def has_margins(self) -> bool:
        """Whether soft margins are kept, as more classes occur than have coordinates, or that is not known yet."""
        return self._num_margins > 0

    @property
    def num_rivals(self) -> int:
        """How many classes the soft margins compare."""
        return len(self._classes) or self.num_classes

    @property
    def knows_classes(self) -> bool:
        """Whether it was looked which classes occur, of more outputs than have coordinates."""
        return len(self._classes) > 0

    @property
    def is_empty(self) -> bool:
        """Whether no rank has merged anything yet."""
        return not bool(self._held[-1])

    def _take_classes(self, classes: Tensor) -> None:
        """From now on these classes alone are compared; they have coordinates, if they are few enough."""
        self._classes = classes
        if len(classes) <= MAX_COORDINATES + 1:
            basis = torch.zeros(self.num_classes, len(classes) - 1)
            basis[classes] = class_coordinates(len(classes))
            self._lay_out(basis, 0)
            self._held[:-1] = False

    def _find_classes(self, reduce: Reduce) -> bool:
        """Look which classes occur, where soft margins are kept. Every rank must call it.

        Returns:
            whether what was observed since the last merge is not to be kept, but for its scores.
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
        """Make room for samples that were not known yet, behind the others.

        Args:
            total: how many there are now.
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
        """Return an empty one of other samples, ``total`` of them, with coordinates of the same classes."""
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
        """Return (B, K) soft margins of (B, C) logits against the classes that occur; (B, 0) where none are kept."""
        if not self.has_margins:
            return logits.new_zeros(len(logits), 0)
        return soft_margins(logits, label, rivals=self._classes if len(self._classes) else None, expected=expected)

    def of_last_pass(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return what to note of rows of the last pass: the coordinates as ``last``, and soft margins if kept.

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
        """Take rows of a pass, but for those that are not finite: one such step would outlast all others in a sum.

        Args:
            index: (B,) int64, the rows of the samples; the same may come twice.
            logits: (B, C).
            label: (B,) int64.
            margin: (B,) attribution of the given label's margin; by default that of the logits.
        """
        self.label[index.cpu()] = label.cpu()
        self.add(*self.described(index, logits, label, margin))

    def add(self, index: Tensor, rows: Tensor) -> None:
        """Add what :meth:`described` has made of rows.

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
        """Free, from now on after each merge, the memory of what is observed next, until that comes."""
        self._rests = True
        self._fresh = torch.zeros(0, self.row_width)

    def described(
        self, index: Tensor, logits: Tensor, label: Tensor, margin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what is kept of rows; see :meth:`observe`.

        Returns:
            the indices of those that are finite, and (B, W) of these, on the CPU, which sums are made of.
        """
        logits = logits.detach().float()
        margin = label_margin(logits, label) if margin is None else margin
        scores = torch.stack([torch.ones_like(margin), margin, label_confidence(margin), entropy(logits)], dim=1)
        expected = logits.new_zeros(self.num_classes) if self.has_margins else None
        rows = torch.cat([self.coordinates(logits), self._margins(logits, label, expected), scores], dim=1)
        index, rows = index.cpu(), rows.cpu()
        if expected is not None and (known := expected.cpu()).isfinite().all():
            self._expected += known
        if not rows.sum().isfinite():  # of all at once, as it is nearly always
            finite = rows.isfinite().all(dim=1)
            self.rows_left_out += int((~finite).sum())
            index, rows = index[finite], rows[finite]
        return index, rows

    def fresh(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was observed of some samples since the last merge.

        Args:
            index: (n,) int64.

        Returns:
            the mean coordinates (n, r) of each sample, or its mean soft margins (n, K) where these are kept, NaN for
            one that was not seen; and how often each was seen (n,).
        """
        self._make_room_for_fresh()
        first = self.basis.shape[1] if self.has_margins else 0
        found = self._fresh[index, first : self._width + 1]
        count = found[:, -1]
        return found[:, :-1] / count.where(count > 0, torch.nan).unsqueeze(1), count

    def expected(self, reduce: Reduce) -> Tensor:
        """Return (C,) float64, how often each class was expected since the last merge, where soft margins are kept.

        Every rank must call it.
        """
        return reduce(self._expected)

    def merge(self, phase: int | None, reduce: Reduce) -> None:
        """Add what was observed since the last merge to one phase. Every rank must call it.

        Args:
            phase: from 0 to ``PHASES - 1``; None for what belongs to none of them and only counts in the scores.
            reduce: sums over the ranks.
        """
        self._make_room_for_fresh()
        if phase is not None and self._find_classes(reduce):
            # Of other classes than are compared from now on.
            phase = None
        if phase is not None:
            self._phases[phase] += self._fresh[:, : self._width + 1]
        self._scores += self._fresh[:, self._width :]
        # Together, as recipes add up over the ranks what they make of each phase.
        if bool(reduce(self._fresh[:, -4].any().double().reshape(1)) > 0):
            self._held[[-1] if phase is None else [phase, -1]] = True
        self.drop()

    def make_room(self, phase: int, width: int) -> int:
        """Return where the evidence of an epoch belongs, so that no later phase holds earlier epochs.

        Args:
            phase: that it is to belong to.
            width: of how many epochs a phase is to be; where it has grown, pairs of phases are joined. 0 where phases
                are not joined.
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
        """Return the mean margin (N,) of all that was merged, and how often each sample was seen (N,)."""
        count = self._scores[:, 0]
        return self._scores[:, 1] / count.clamp(min=1), count.clone()

    def agreement(self) -> Tensor:
        """Return (2,) float64: of how many samples the label has led since the last merge; how many were observed.

        The margin is positive where the strongest class is the given label.
        """
        self._make_room_for_fresh()
        margin, count = self._fresh[:, -3], self._fresh[:, -4]
        return torch.stack([(margin[count > 0] > 0).sum(), (count > 0).sum()]).double()

    def drop(self) -> None:
        """Forget what was observed since the last merge, by a pass that did not reach its end."""
        if self._rests:
            self.rest()
        self._fresh.zero_()
        self._expected.zero_()
        self.rows_left_out = 0

    def forget(self) -> None:
        """Forget everything."""
        self.drop()
        self._phases.zero_()
        self._scores.zero_()
        self._held.zero_()
        self.label.fill_(-1)
        self._epochs_each = 1

    def phases(self, index: Tensor) -> list[Tensor]:
        """Return the mean class attributions of some samples over each phase of training that holds anything.

        Args:
            index: (n,) int64.

        Returns:
            up to ``PHASES`` of (n, r), with NaN in the rows of samples that this phase has not seen.
        """
        return [rows[:, : self.basis.shape[1]] for rows in self._means(index)]

    def soft_margins(self, index: Tensor) -> list[Tensor]:
        """Return their mean soft margins likewise, (n, K) each; (n, 0) where none are kept."""
        return [rows[:, self.basis.shape[1] :] for rows in self._means(index)]

    def _means(self, index: Tensor) -> list[Tensor]:
        seen = []
        for at in self._held[:-1].nonzero().flatten().tolist():
            rows = self._phases[at, index]
            count = rows[:, -1:]
            seen.append(rows[:, :-1] / count.where(count > 0, torch.nan))
        return seen

    def scores(self, index: Tensor) -> dict[str, Tensor]:
        """``margin``, ``support`` and ``uncertainty`` of some samples, each (n,), averaged over all that was merged."""
        count, *sums = self._scores[index].unbind(dim=1)
        names = ("margin", "label_confidence", "uncertainty")
        return {name: total / count.clamp(min=1) for name, total in zip(names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return what was merged, and the labels."""
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
        """Return what was merged of some rows, and their labels, in a trajectory of their own.

        Args:
            rows: (n,) int64; -1 for one of which nothing is known.
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
        """Return the trajectory that :meth:`state_dict` described."""
        width, classes = state["phases"].shape[2] - 1, state.get("classes", torch.zeros(0, dtype=torch.int64))
        trajectory = cls(
            len(state["scores"]),
            state["num_classes"],
            keeps_coordinates=width == MAX_COORDINATES + NUM_SCALES,
        )
        # Absent in checkpoints of before it was looked which classes occur.
        if len(classes):
            trajectory._take_classes(classes)
        if width != trajectory._width:
            raise ValueError(
                f"Expected a checkpoint with evidence that tells {trajectory.num_classes} classes apart, but it is of a"
                " version of lightning_unlearn that kept a random part of it; resume with that version, or start the"
                " fit again."
            )
        for name, tensor in (
            ("phases", trajectory._phases),
            ("scores", trajectory._scores),
            ("label", trajectory.label),
        ):
            tensor.copy_(state[name])
        trajectory._epochs_each = state.get("epochs_each", 1)
        # Absent in checkpoints that have the sums of all samples in any case.
        seen = [(state["phases"][:, :, -1] > 0).any(dim=1), (state["scores"][:, 0] > 0).any().reshape(1)]
        trajectory._held.copy_(state["held"] if "held" in state else torch.cat(seen))
        return trajectory
