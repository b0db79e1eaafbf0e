"""The state of partitioning, which checkpoints store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor

from lightning_unlearn.partitioning.validation_set import ValidationJudge
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied, provenance, write_provenance
from lightning_unlearn.results.review import Review
from lightning_unlearn.results.status import PartitionStatus
from lightning_unlearn.results.summary import PartitionRound, RepairSummary

# Of what a checkpoint lacks: it is made again in the fit that goes on from it, or belongs to its end.
_TRANSIENT = {"kept": False}
_TELLING = (PartitionStatus.OK, PartitionStatus.ALL_CLEAN, PartitionStatus.REVIEW_ONLY)


class AtFirst(NamedTuple):
    """Measurements of the network at the first partition that is acted on.

    Args:
        memorized: share of the suspect labels that it predicts; None if there are none.
        accuracy: validation accuracy; None if unknown.
        accuracy_gap: accuracy on the training labels minus validation accuracy; None if unknown.
        best_accuracy: best validation accuracy of the fit so far; None if unknown.
    """

    memorized: float | None
    accuracy: float | None
    accuracy_gap: float | None
    best_accuracy: float | None = None


@dataclass(eq=False)
class PartitionState:
    """State of partitioning: the results so far, and the data that they belong to.

    Args:
        task: inferred task; empty before the first batch.
        fingerprint: fingerprint of the training set; empty before the first batch.
        partition: the partition that is acted on, or the first one until there is one.
        rounds: every computed partition.
        is_stable: whether the partition has converged and is not recomputed.
        memorized: see :class:`AtFirst`.
        accuracy_before: see :class:`AtFirst`.
        accuracy_gap: see :class:`AtFirst`.
        best_accuracy_before: see :class:`AtFirst`.
        review: a person's decisions, checked against the data.
        fits: settings and versions of the fit and of each resumed part of it.
        validation: the partition of the validation set.
        accuracy_after: validation accuracy at the end of the fit.
        summary: summary at the end of the fit.
        sample_weight: (N,) float32, weights for the neuron ranking.
        is_late: whether the partition is computed after training has ended.
        probabilities: (N, C) float32, see :func:`~lightning_unlearn.partitioning.probabilities.average_probabilities`;
            None if they are not kept.
    """

    task: str = ""
    fingerprint: str = ""
    partition: Partition | None = None
    rounds: list[PartitionRound] = field(default_factory=list)
    is_stable: bool = False
    memorized: float | None = None
    accuracy_before: float | None = None
    accuracy_gap: float | None = None
    best_accuracy_before: float | None = None
    review: Review | None = None
    fits: list[dict[str, Any]] = field(default_factory=list)
    validation: ValidationJudge = field(default_factory=ValidationJudge)
    accuracy_after: float | None = field(default=None, metadata=_TRANSIENT)
    summary: RepairSummary | None = field(default=None, metadata=_TRANSIENT)
    sample_weight: Tensor | None = field(default=None, metadata=_TRANSIENT)
    is_late: bool = field(default=False, metadata=_TRANSIENT)
    probabilities: Tensor | None = field(default=None, metadata=_TRANSIENT)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        return {name: _plain(getattr(self, name)) for name in _KEPT}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PartitionState:
        """Make it from what :meth:`state_dict` returned; the validation set may be absent, as in older checkpoints."""
        found = {name: copied(state[name]) for name in _KEPT if name in state}
        return cls(**{name: _MADE[name](value) if name in _MADE else value for name, value in found.items()})

    @property
    def at_first(self) -> AtFirst:
        """What was known when the partition that others act upon first was computed."""
        return AtFirst(self.memorized, self.accuracy_before, self.accuracy_gap, self.best_accuracy_before)

    def publish(self, new: Partition, found: AtFirst, min_change: float) -> tuple[float, bool]:
        """Publish a partition.

        Args:
            new: the new partition.
            found: measurements at the first partition that is acted on.
            min_change: it has converged once less than this share of the samples changes group.

        Returns:
            the share of the samples that changed group, and whether the partition replaces the previous one. A
            partition that cannot be acted on does not replace one that was.
        """
        before, is_first = self.partition, self.is_first(new)
        changed = 1.0 if before is None else (before.is_clean != new.is_clean).float().mean().item()
        self.rounds.append(PartitionRound(new.epoch, len(new.suspect_indices()), new.noise_rate, changed))
        # What could not be told may be told later.
        self.is_stable = not is_first and changed < min_change and new.status in _TELLING
        self.memorized, self.accuracy_before, self.accuracy_gap, self.best_accuracy_before = found
        is_taken = is_first or new.is_actionable
        if is_taken:
            self.partition = new
        return changed, is_taken

    def is_first(self, new: Partition) -> bool:
        """Return whether this is the first partition that is acted on, or the first of all until there is one."""
        return self.partition is None or (new.is_actionable and not self.partition.is_actionable)


_KEPT = [one.name for one in fields(PartitionState) if one.metadata.get("kept", True)]
_MADE: dict[str, Callable[[Any], Any]] = {
    "partition": lambda state: None if state is None else Partition.from_state_dict(state),
    "rounds": lambda rounds: [PartitionRound(**one) for one in rounds],
    "review": lambda state: None if state is None else Review(**state),
    "validation": ValidationJudge.from_state_dict,
}


def _plain(value: Any) -> Any:
    if isinstance(value, PartitionRound):
        return dict(vars(value))
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return copied(value.state_dict() if hasattr(value, "state_dict") else value)


class PublishedPartition:
    """What users ask of a callback that computes a partition, during the fit and after it."""

    judge_validation: bool
    # What a checkpoint says of where its partition comes from; those that act upon the partition in a fit.
    _recorded: dict[str, Any] | None = None

    @property
    def state(self) -> PartitionState:
        """What has been found so far."""
        raise NotImplementedError

    @property
    def _partners(self) -> Sequence[Any]:
        raise NotImplementedError

    def _when_computed(self) -> str:
        raise NotImplementedError

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities averaged over training, (N, C) float32 by dataset index; ``pred_probs`` for cleanlab.

        The softmax of the logits of the training steps, averaged over the epochs before the partition; for a sample
        that was not drawn in a part of them, that of the following pass. Available in the fit that computed the
        partition; checkpoints do not store them.

        Raises:
            RuntimeError: without ``keep_probabilities=True``, and before there are any.
        """
        if self.state.probabilities is None:
            raise RuntimeError(
                "No probabilities: set keep_probabilities=True, and read them in the fit that computes the"
                f" partition, {self._when_computed()}."
            )
        return self.state.probabilities

    @property
    def partition(self) -> Partition:
        """The partition of the training set.

        Raises:
            RuntimeError: before it is computed, saying when it will be.
        """
        if self.state.partition is None:
            raise RuntimeError(f"No partition yet: it is computed {self._when_computed()}.")
        return self.state.partition

    @property
    def validation_partition(self) -> Partition:
        """The partition of the validation set, by the index in the validation loader's data set.

        Samples that the loader's sampler leaves out are not judged and have the label -1. ``limit_val_batches`` has no
        effect.

        Raises:
            RuntimeError: without ``judge_validation``, before the partition of the training set is computed, and if
                the validation data could not be read then.
        """
        return self.state.validation.found(self.judge_validation)

    @property
    def rounds(self) -> tuple[PartitionRound, ...]:
        """Every computation of the partition so far, the first one first."""
        return tuple(self.state.rounds)

    @property
    def memorized(self) -> float | None:
        """Of the labels suspected to be wrong, how many the network predicted when that was found; None without any."""
        return self.state.memorized

    @property
    def accuracy_gap(self) -> float | None:
        """Share of the training labels that the network predicted then, less that of the validation labels.

        None without enough validation samples.
        """
        return self.state.accuracy_gap

    @property
    def sample_weight(self) -> Tensor | None:
        """(N,) float32, of this rank's samples, 1/k for each of k copies; None where each counts."""
        return self.state.sample_weight

    @property
    def summary(self) -> RepairSummary:
        """What was found, done and gained.

        Raises:
            RuntimeError: before the fit has ended.
        """
        if self.state.summary is None:
            raise RuntimeError("No summary yet: it is created at the end of a fit that has computed a partition.")
        return self.state.summary

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the result comes from, in primitives; checkpoints hold it too.

        ``fits`` (versions, seed, settings of the callbacks, for each fit or resumed part of one), ``data``,
        ``partition`` and ``validation`` (with the indices of all suspects), ``review`` (what a person has decided),
        ``done`` (for each callback: the indices that were dropped, those that were re-labeled with both labels, the
        pruned neurons of each layer) and ``accuracy``.

        Raises:
            RuntimeError: before the partition is computed.
        """
        if self._recorded is not None:
            return dict(copied(self._recorded))
        state = self.state
        return provenance(
            self.partition,
            fits=state.fits,
            rounds=state.rounds,
            review=state.review,
            done={type(partner).__name__: partner.provenance_entry(self.partition) for partner in self._partners},
            accuracy={
                "best_before": state.best_accuracy_before,
                "before": state.accuracy_before,
                "after": state.accuracy_after,
            },
            validation=state.validation.record(),
        )

    def save_provenance(self, path: str | PathLike[str]) -> None:
        """Write :attr:`provenance` as JSON.

        Args:
            path: file to write. Folders are created, and an existing file is replaced atomically.

        Raises:
            RuntimeError: before the partition is computed.
        """
        write_provenance(self.provenance, path)
