"""When to compute the partition: after a number or fraction of epochs, or as soon as the evidence has peaked.

Evidence ranks wrong labels best after the ranking has stopped changing much from epoch to epoch, and before the network
begins to memorize. Neither criterion needs a pass of its own. The first uses the evidence; the second compares the
accuracy of training steps with that of the fit's own validation (``benchmarks/results/at-epoch-cpu.md``).
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
"""Number of epochs before which ``"auto"`` does not act, since the network has learned too little."""

LATEST = 2 / 3
"""Fraction of the Trainer's epochs, steps or time after which ``"auto"`` acts, to leave time for fine-tuning."""

SETTLED = 0.997
"""Rank correlation with the evidence of the previous epoch from which on the ranking has settled."""

MEMORIZED = 0.06
"""Largest gap between training and validation accuracy without memorization, in addition to two standard errors."""

PATIENCE = 3
"""Number of validations without improvement of a monitored metric, if validation accuracy cannot be read."""

# Least number of validation samples for a useful accuracy.
_FEWEST = 200
_ERRORS = 2.0
# Largest number of samples whose ranking is compared with several ranks; a single process compares all.
_COMPARED = 65_536
_ROUNDING = 1e-9


def check_at_epoch(value: Any) -> AtEpoch:
    """Return ``at_epoch`` as a number of epochs, a fraction of ``max_epochs``, or ``"auto"``.

    Raises:
        ValueError: for anything else.

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
    """Measurements of one epoch, the same on every rank; NaN if unknown.

    Args:
        agreement: accuracy of the training steps on the given labels.
        similarity: rank correlation of the evidence before and after this epoch.
        accuracy: validation accuracy on the given labels.
        samples: number of validation samples.
        metric: metric that a callback monitors, with its sign such that larger is better.
    """

    agreement: float = math.nan
    similarity: float = math.nan
    accuracy: float = math.nan
    samples: float = 0.0
    metric: float = math.nan


class PartitionTime:
    """Decide after how many epochs the partition is computed.

    Args:
        asked: ``at_epoch`` as set by the user, see :func:`check_at_epoch`.

    Attributes:
        epoch: number of complete epochs after which it is computed; None while undecided.
        why: reason for the decision; empty if the user set the epoch.
        is_stopped: whether EarlyStopping ended training at the end of the last epoch.
        may_be_last: whether the partition may be computed when training ends.
    """

    def __init__(self, asked: Any) -> None:
        self.asked = check_at_epoch(asked)
        self.reset()

    def reset(self) -> None:
        """Discard everything from an earlier fit."""
        self.epoch = self.asked if isinstance(self.asked, int) else None
        self.why = ""
        self.is_stopped = False
        self._looked_at = 0
        self.may_be_last = False
        self.forget()

    def forget(self) -> None:
        """Discard the measurements, which are no longer valid."""
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
        """Whether the epoch is still undecided."""
        return self.asked == "auto" and self.epoch is None

    @property
    def best_accuracy(self) -> float | None:
        """Best validation accuracy so far; None if none could be read."""
        return max((one.accuracy for one in self._notes.values() if one.samples), default=None)

    def plan(self, limits: TrainingLimits, *, may_be_last: bool) -> None:
        """Check ``at_epoch`` against the Trainer's limits when the fit is set up.

        Args:
            limits: the Trainer's limits.
            may_be_last: whether training may end with the partition because nothing follows it. ``"auto"`` may then
                wait until the end of training, since evidence improves as long as the network learns.

        Raises:
            MisconfigurationException: for a fraction without ``max_epochs``, or if no epoch is left after it.
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
        """Return whether the partition is due after ``epoch`` complete epochs."""
        return self.epoch is not None and epoch >= self.epoch

    def phase(self, epoch: int) -> tuple[int, int]:
        """Return the part of training that the ``epoch``-th epoch belongs to, and the epochs per part (0: any number).

        While the epoch is undecided, parts have 1 epoch, then 2, 4, ...: when all parts are full, pairs are merged.
        """
        if self.asked != "auto":
            return (epoch - 1) * PHASES // max(self.epoch or epoch, epoch), 0
        width = 1
        while epoch > PHASES * width:
            width *= 2
        return (epoch - 1) // width, width

    def note(self, epoch: int, **shown: float) -> None:
        """Record measurements of the ``epoch``-th epoch, named as in :class:`EpochNote`."""
        self._notes[epoch] = replace(self._notes.get(epoch, EpochNote()), **shown)

    @contextmanager
    def noting(self, epoch: int, trajectory: TrainingDynamics, ranks: Ranks, *, of_steps: bool) -> Iterator[None]:
        """Record measurements of an epoch, whose evidence is merged in the context. Every rank must enter it.

        Args:
            epoch: counted from 1.
            trajectory: the evidence that is merged.
            ranks: the ranks of the fit.
            of_steps: whether the evidence comes from training steps, not from an evaluation pass.
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
        """Decide whether the partition is due, at the start of each epoch. Every rank must call it.

        Args:
            limits: the Trainer's limits and progress.
            is_settled: whether the noise rate of an early epoch is known, or not needed.
            is_stopped: whether EarlyStopping has ended training, as seen by this rank.
            reduce: sums over the ranks.
        """
        epoch = limits.epoch
        if epoch < 1 or epoch == self._looked_at:
            return
        self._looked_at, why = epoch, ""
        if self.is_open and epoch >= EARLIEST:
            why = (self._peaked(epoch) if is_settled else "") or self._late(limits, epoch)
        # Decide jointly: ranks may have recorded different measurements if one stopped reading before the others.
        stopped, is_time = (reduce(torch.tensor([is_stopped, bool(why)]).double()) > 0).tolist()
        self.is_stopped = stopped
        if self.is_due(epoch):
            return
        if stopped:
            self.decide_now(epoch, "EarlyStopping was about to end training")
        elif is_time:
            self.decide_now(epoch, why or "another rank meets one of the criteria")

    def decide_now(self, epoch: int, why: str) -> None:
        """Set ``epoch``, regardless of the user's setting."""
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
        """Return the reason why the evidence has peaked; empty if there is none."""
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
        """Return the state as plain numbers and strings."""
        return {
            "asked": self.asked,
            "epoch": self.epoch,
            "why": self.why,
            "notes": {str(epoch): _known(noted) for epoch, noted in self._notes.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Load measurements and decision; None if the checkpoint is from an older version."""
        if state is None:
            return
        self._notes = {int(epoch): EpochNote(**noted) for epoch, noted in state["notes"].items()}
        if state["epoch"] is not None and self.asked == state["asked"] == "auto":
            self.decide_now(state["epoch"], state["why"])


def _known(noted: EpochNote) -> dict[str, float]:
    """Return the known measurements. NaN is left out, since it would make equal checkpoints compare as different."""
    return {name: value for name, value in asdict(noted).items() if not math.isnan(value)}


def _of_all_ranks(before: Tensor, after: Tensor, count: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Gather both margins of the samples seen before from all ranks. Every rank must call it.

    With several ranks and many samples, only every second, third, ... sample is used, which gives the rank correlation
    to within some hundred thousandths.
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
    """Return Spearman's rank correlation of two scores (n,) of the same samples; NaN for fewer than two samples.

    Example:
        >>> similarity(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 9.0]))
        1.0
    """
    if len(before) < 2:
        return math.nan
    ranks = torch.stack([scores.argsort(stable=True).argsort(stable=True).double() for scores in (before, after)])
    centered = ranks - ranks.mean(dim=1, keepdim=True)
    return float((centered[0] @ centered[1]) / (centered[0] @ centered[0]))
