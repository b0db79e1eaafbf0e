"""When the partition is computed: after so many epochs, after a share of them, or as soon as the evidence has peaked.

Evidence ranks wrong labels best between two moments: when the ranking no longer changes much from one epoch to the
next, and when the network begins to memorize. Neither needs a pass over data of its own: the first is read off the
evidence, the second off how often training steps and the fit's own validation agree with the labels
(``benchmarks/results/at-epoch-cpu.md``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_unlearn.evidence.rank_share import Ranks
from lightning_unlearn.evidence.training_dynamics import PHASES, TrainingDynamics
from lightning_unlearn.results.finding import epochs_in_words
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.limits import TrainingLimits
from lightning_unlearn.utilities.checks import check_number, check_whole, plain, shown
from lightning_unlearn.utilities.reduce import Reduce

AtEpoch = int | float | Literal["auto"]

EARLIEST = 2
"""Epochs before which ``"auto"`` draws nothing: in the first, most of what a network says is not learned yet."""

LATEST = 2 / 3
"""Of the epochs, steps or time that the Trainer allows, after which ``"auto"`` waits no longer for what follows it."""

SETTLED = 0.997
"""Rank correlation of the evidence with that of an epoch before, from which on the ranking has settled."""

MEMORIZED = 0.06
"""How much more often training steps may agree with the labels than validation does, beside two standard errors."""

PATIENCE = 3
"""Validations in which a monitored metric may stand still, where validation accuracy cannot be read."""

# Validation samples: of fewer the accuracy says too little.
_FEWEST = 200
_ERRORS = 2.0
# Samples whose order is compared where several ranks own some; of one process's own all are.
_COMPARED = 65_536
_ROUNDING = 1e-9


def check_at_epoch(value: Any) -> AtEpoch:
    """Return a number of epochs, a share of them, or ``"auto"``.

    Raises:
        ValueError: naming the three.

    Example:
        >>> check_at_epoch(20.0), check_at_epoch(0.5), check_at_epoch("auto")
        (20, 0.5, 'auto')
    """
    found = plain(value)
    if isinstance(found, str) and found == "auto":
        return "auto"
    try:
        number = check_number("at_epoch", found, above=0)
        return number if number < 1 else check_whole("at_epoch", found)
    except ValueError:
        raise ValueError(
            "Expected at_epoch to be 'auto', a whole number of epochs of at least 1, or a share of max_epochs between 0"
            f" and 1, but got {shown(value)}."
        ) from None


@dataclass(frozen=True)
class EpochNote:
    """What one epoch showed, the same on every rank; NaN for what is not known.

    Args:
        agreement: share of the given labels that its training steps predicted.
        similarity: rank correlation of the evidence so far with that before this epoch.
        accuracy: on validation samples, their labels as given.
        samples: how many these are.
        metric: that a callback monitors, the larger the better.
    """

    agreement: float = math.nan
    similarity: float = math.nan
    accuracy: float = math.nan
    samples: float = 0.0
    metric: float = math.nan


class PartitionTime:
    """After how many epochs the partition is computed.

    Args:
        asked: see :func:`check_at_epoch`.

    Attributes:
        epoch: it is computed when so many are complete; None as long as that is open.
        why: it was found to be time, in words; empty where it was asked for.
        is_stopped: whether EarlyStopping has ended training where the last epoch ended.
        may_be_last: whether it may be computed when training ends.
    """

    def __init__(self, asked: Any) -> None:
        self.asked = check_at_epoch(asked)
        self.reset()

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.epoch = self.asked if isinstance(self.asked, int) else None
        self.why = ""
        self.is_stopped = False
        self._looked_at = 0
        self.may_be_last = False
        self.forget()

    def forget(self) -> None:
        """Forget what was noted, as it cannot be trusted."""
        self._notes: dict[int, EpochNote] = {}

    def __str__(self) -> str:
        if self.epoch is not None:
            return f"when {epochs_in_words(self.epoch)} {'is' if self.epoch == 1 else 'are'} complete"
        if self.asked == "auto":
            latest = "when training ends" if self.may_be_last else "after two thirds of the epochs"
            return f"once the evidence has peaked, {latest} at the latest"
        return f"when {self.asked:.0%} of the epochs are complete"

    @property
    def is_open(self) -> bool:
        """Whether it is still looked for."""
        return self.asked == "auto" and self.epoch is None

    @property
    def best_accuracy(self) -> float | None:
        """The best of the validations so far; None where none could be read."""
        return max((one.accuracy for one in self._notes.values() if one.samples), default=None)

    def plan(self, limits: TrainingLimits, *, may_be_last: bool) -> None:
        """Look at the Trainer's limits, when the fit is set up.

        Args:
            limits: of the fit.
            may_be_last: whether nothing is to follow the partition, so that training may end with it. ``"auto"`` waits
                for the end then, where the network still learns: what it shows of a sample gets better as long.

        Raises:
            MisconfigurationException: for a share of a number that is not known, or where no epoch is left.
        """
        max_epochs, self.may_be_last = limits.max_epochs, may_be_last
        if limits.is_trial or self.asked == "auto":
            return
        if isinstance(self.asked, float):
            if max_epochs is None or max_epochs < 1:
                raise MisconfigurationException(
                    f"at_epoch={self.asked} is a share of max_epochs, but the Trainer has max_epochs={max_epochs}. Set"
                    " max_epochs, or set at_epoch to 'auto' or a number of epochs."
                )
            self.epoch = max(1, math.floor(self.asked * max_epochs + _ROUNDING))
        if max_epochs is None or (max_epochs == self.epoch and may_be_last):
            return
        if 0 <= max_epochs <= (self.epoch or 0):
            raise MisconfigurationException(
                "Expected at_epoch to be less than the Trainer's max_epochs, so that epochs are left after the"
                f" partition, but got at_epoch={self.asked} and max_epochs={max_epochs}."
            )

    def is_due(self, epoch: int) -> bool:
        """Return whether it is time when ``epoch`` epochs are complete."""
        return self.epoch is not None and epoch >= self.epoch

    def phase(self, epoch: int) -> tuple[int, int]:
        """Return the part of training that the ``epoch``-th epoch belongs to, and the epochs per part (0: any number).

        Where the end is open, parts are of 1 epoch, then of 2, 4, ...: whenever all are full, pairs are joined.
        """
        if self.asked != "auto":
            return (epoch - 1) * PHASES // max(self.epoch or epoch, epoch), 0
        width = 1
        while epoch > PHASES * width:
            width *= 2
        return (epoch - 1) // width, width

    def note(self, epoch: int, **shown: float) -> None:
        """Take what the ``epoch``-th epoch showed, by the names of :class:`EpochNote`."""
        self._notes[epoch] = replace(self._notes.get(epoch, EpochNote()), **shown)

    @contextmanager
    def noting(self, epoch: int, trajectory: TrainingDynamics, ranks: Ranks, *, of_steps: bool) -> Iterator[None]:
        """Note what the evidence of an epoch shows, while it is merged inside. Every rank must enter.

        Args:
            epoch: counted from 1.
            trajectory: into which it is merged.
            ranks: of the fit.
            of_steps: whether it is of training steps, and not of a pass after them.
        """
        if not self.is_open:
            yield
            return
        right, total = ranks.reduce(trajectory.agreement()).tolist()
        before, count = trajectory.margins()
        yield
        after, _ = trajectory.margins()
        self.note(epoch, similarity=similarity(*_of_all_ranks(before, after, count, ranks)))
        if of_steps and total:
            self.note(epoch, agreement=right / total)

    def decide(self, limits: TrainingLimits, *, is_settled: bool, is_stopped: bool, reduce: Reduce) -> None:
        """Look whether it is time, once at the start of each epoch. Every rank must call it.

        Args:
            limits: of the fit, as far as it has come.
            is_settled: whether the noise rate has been read off an early epoch, or is not to be.
            is_stopped: whether, to this rank, EarlyStopping has ended training.
            reduce: sums over the ranks.
        """
        epoch = limits.epoch
        if epoch < 1 or epoch == self._looked_at:
            return
        self._looked_at, why = epoch, ""
        if self.is_open and epoch >= EARLIEST:
            why = (self._peaked(epoch) if is_settled else "") or self._late(limits, epoch)
        # Together, as ranks may have noted something else: one has given up reading before the others.
        stopped, is_time = (reduce(torch.tensor([is_stopped, bool(why)]).double()) > 0).tolist()
        self.is_stopped = stopped
        if self.is_due(epoch):
            return
        if stopped:
            self.decide_now(epoch, "EarlyStopping was about to end training")
        elif is_time:
            self.decide_now(epoch, why or "another rank meets one of the criteria")

    def decide_now(self, epoch: int, why: str) -> None:
        """Decide on ``epoch``, whatever was asked."""
        self.epoch, self.why = epoch, why

    def _late(self, limits: TrainingLimits, epoch: int) -> str:
        if self.may_be_last:
            return ""
        ends = [] if limits.max_epochs is None or limits.max_epochs < 1 else [float(limits.max_epochs)]
        if limits.max_steps > 0 and limits.step > 0:
            ends.append(limits.max_steps * epoch / limits.step)
        is_late = bool(ends) and epoch >= max(EARLIEST, math.floor(LATEST * min(ends) + _ROUNDING))
        is_late |= limits.share_of_time >= LATEST
        return "two thirds of training are complete" if is_late else ""

    def _peaked(self, epoch: int) -> str:
        """Return why the evidence has peaked, in words; empty if it has not, as far as is known."""
        notes = {at: one for at, one in sorted(self._notes.items()) if at <= epoch}
        noted = notes.get(epoch, EpochNote())
        measured = [one.accuracy for one in notes.values() if one.samples >= _FEWEST]
        if noted.samples >= _FEWEST:
            error = _ERRORS * math.sqrt(noted.accuracy * (1 - noted.accuracy) / noted.samples)
            if noted.agreement - noted.accuracy > MEMORIZED + error:
                return (
                    f"labels are being memorized: accuracy is {noted.agreement:.1%} in training steps,"
                    f" {noted.accuracy:.1%} in validation"
                )
            if max(measured) - noted.accuracy > error:
                return f"validation accuracy has fallen from {max(measured):.1%} to {noted.accuracy:.1%}"
        metrics = [one.metric for one in notes.values() if not math.isnan(one.metric)]
        if not measured and len(metrics) > PATIENCE and max(metrics[-PATIENCE:]) <= max(metrics[:-PATIENCE]):
            return f"the monitored metric has not improved in {PATIENCE} validations"
        similar = [one.similarity for one in notes.values() if not math.isnan(one.similarity)]
        return "the ranking of the samples hardly changes any more" if similar and similar[-1] >= SETTLED else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and texts."""
        return {
            "asked": self.asked,
            "epoch": self.epoch,
            "why": self.why,
            "notes": {str(epoch): _known(noted) for epoch, noted in self._notes.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over what was noted, and what was found; None is of an older version."""
        if state is None:
            return
        self._notes = {int(epoch): EpochNote(**noted) for epoch, noted in state["notes"].items()}
        if state["epoch"] is not None and self.asked == state["asked"] == "auto":
            self.decide_now(state["epoch"], state["why"])


def _known(noted: EpochNote) -> dict[str, float]:
    """Return what is known; NaN would not equal itself in checkpoints that are compared."""
    return {name: value for name, value in asdict(noted).items() if not math.isnan(value)}


def _of_all_ranks(before: Tensor, after: Tensor, count: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the two margins of the samples seen before, of all ranks. Every rank must call it.

    Where several ranks own so many that they would have to be sent around, of every second, third, ... of them, which
    tells the rank correlation to within some hundred thousandths.
    """
    if ranks.number > 1:
        each, most = ranks.most(len(count)), _COMPARED // ranks.number
        every = max(1, -(-each // max(most, 1)))
        rows = torch.stack([before, after, count])[:, ::every]
        sent = rows.new_zeros(3, -(-each // every), ranks.number)
        sent[:, : rows.shape[1], ranks.rank] = rows
        before, after, count = ranks.reduce(sent).flatten(1)
    return before[count > 0], after[count > 0]


def similarity(before: Tensor, after: Tensor) -> float:
    """Return the rank correlation (Spearman's) of two scores (n,) of the same samples; NaN of fewer than two.

    Example:
        >>> similarity(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 9.0]))
        1.0
    """
    if len(before) < 2:
        return math.nan
    ranks = torch.stack([scores.argsort(stable=True).argsort(stable=True).double() for scores in (before, after)])
    centered = ranks - ranks.mean(dim=1, keepdim=True)
    return float((centered[0] @ centered[1]) / (centered[0] @ centered[0]))
