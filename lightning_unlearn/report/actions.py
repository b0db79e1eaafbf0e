"""What was done with which samples and neurons, read from the provenance of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_unlearn.results.labels import DECISIONS, positive_labels
from lightning_unlearn.results.partition import Partition

DONE = ("dropped", "re-labeled", "drawn by p(clean)", "kept")
"""What a fit does with a sample, in words; where it has done nothing, one of ``DECISIONS`` is proposed."""

# Of more indices, the page holds the first; run.json holds all.
_MOST = 20_000
_MOST_GROUPS = 400
# So many are shown where none is suspect.
_LEAST_SURE = 24


@dataclass(frozen=True)
class SampleOutcome:
    """What became of a sample.

    Args:
        word: one of :data:`DONE`, or of ``DECISIONS`` for what is proposed.
        new: the labels that it is trained on with where it is re-labeled.
        by_person: whether a person has decided it.
    """

    word: str
    new: tuple[int, ...] = ()
    by_person: bool = False


@dataclass(frozen=True)
class IndexList:
    """Dataset indices under a title.

    Args:
        title: what they have in common, as the labels before and after.
        count: how many there are.
        text: the indices, ascending; of very many, the first.
        left_out: how many of them the text lacks.
    """

    title: tuple[str, ...]
    count: int
    text: str
    left_out: int


class SampleOutcomes:
    """What was done in a run.

    Args:
        partition: that the run has come to.
        provenance: as AttributionPartitionCallback publishes it; may be empty.

    Raises:
        ValueError: for a provenance that cannot be read.
    """

    def __init__(self, partition: Partition, provenance: Mapping[str, Any]) -> None:
        self._partition = partition
        try:
            self._read(provenance)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "Expected provenance written by AttributionPartitionCallback, but it cannot be read"
                f" ({type(error).__name__}: {error}); run the fit again."
            ) from error
        self._persons = {index for indices in self.reviewed.values() for index in indices}
        self._proposed = [] if self.has_acted else partition.decisions()

    def _read(self, provenance: Mapping[str, Any]) -> None:
        # Each callback says what it has done itself, and only of one kind.
        told: dict[str, Any] = {}
        for one in (provenance.get("done") or {}).values():
            told |= one
        self.from_epoch: int | None = told.get("from_epoch")
        self.weighs = bool(told.get("weighed"))
        self.dropped: list[int] = list(map(int, told.get("dropped") or ()))
        self.pruned: dict[str, list[int]] = {
            layer: list(map(int, found)) for layer, found in (told.get("pruned") or {}).items()
        }
        self._gone = set(self.dropped)
        self._moved = {int(one["index"]): one for one in told.get("relabeled") or ()}
        review = provenance.get("review") or {}
        self.reviewed = {name: list(map(int, review.get(name) or ())) for name in DECISIONS}
        self.review_path = str(review.get("path", ""))

    @property
    def has_acted(self) -> bool:
        """Whether other samples, or labels, were trained on than the data set has."""
        return self.from_epoch is not None

    @property
    def relabeled(self) -> int:
        """How many samples were trained on under another label."""
        return len(self._moved)

    def of(self, index: int) -> SampleOutcome:
        """Return what became of a sample, or what is proposed."""
        by_person = index in self._persons
        if not self.has_acted:
            word = self._proposed[index]
            new = _labels(self._partition.suggested_label[index].tolist()) if word == "relabel" else ()
            return SampleOutcome(word, new, by_person)
        if index in self._gone:
            return SampleOutcome("dropped", by_person=by_person)
        if index in self._moved:
            return SampleOutcome("re-labeled", self._after(self._moved[index]), by_person)
        weighed = self.weighs and not bool(self._partition.is_clean[index])
        return SampleOutcome("drawn by p(clean)" if weighed else "kept", by_person=by_person)

    def listed_drops(self) -> IndexList:
        """Return the samples that were not trained on."""
        return _listed((), self.dropped, _MOST)

    def listed_moves(self, called: Any) -> tuple[list[IndexList], int]:
        """Return the samples that were re-labeled, by labels before and after, the most frequent first.

        Args:
            called: from a label to its name.

        Returns:
            the groups, and how many samples are in none of them.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, one in self._moved.items():
            labels = (_labels(one["given"]), self._after(one))
            pair = tuple(", ".join(map(called, each)) or "none" for each in labels)
            groups.setdefault(pair, []).append(index)
        order = sorted(groups.items(), key=lambda group: -len(group[1]))
        found, room = [], _MOST
        for pair, indices in order[:_MOST_GROUPS]:
            found.append(_listed(pair, indices, room))
            room -= len(indices) - found[-1].left_out
        return found, sum(len(indices) for _, indices in order[_MOST_GROUPS:])

    def listed_neurons(self) -> list[IndexList]:
        """Return the neurons that were pruned, by layer."""
        return [_listed((layer,), neurons, _MOST) for layer, neurons in self.pruned.items()]

    def _after(self, one: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the labels that a re-labeled sample is trained on with; of several, -1 is one that stays."""
        new = one["new"]
        if isinstance(new, Sequence):
            new = [given if value < 0 else value for value, given in zip(new, one["given"], strict=True)]
        return _labels(new)


def _labels(label: Any) -> tuple[int, ...]:
    return tuple(positive_labels(torch.tensor([label]))[0]) if isinstance(label, Sequence) else (int(label),)


def _listed(title: tuple[str, ...], indices: Iterable[int], room: int) -> IndexList:
    ordered = sorted(int(index) for index in indices)
    shown = ordered[: max(0, room)]
    return IndexList(title, len(ordered), ", ".join(map(str, shown)), len(ordered) - len(shown))


def shown_samples(partition: Partition, provenance: Mapping[str, Any], most: int) -> list[int]:
    """Return the dataset indices of the samples that a gallery shows.

    The most suspect first of which nobody has decided yet; what is worth a look after them, and what a person has
    decided already, takes a quarter of the places each, or those that are left. Where nobody has decided any, and none
    is suspect, a few of the least sure.

    Args:
        partition: of the training set.
        provenance: as AttributionPartitionCallback publishes it; may be empty.
        most: how many there may be.
    """
    suspects = partition.suspect_indices().tolist()
    reviewed = {index for indices in SampleOutcomes(partition, provenance).reviewed.values() for index in indices}
    fresh = [index for index in suspects if index not in reviewed]
    kept = sorted(reviewed.difference(suspects))
    decided = [index for index in suspects if index in reviewed] + kept
    others = partition.review_ranking().tolist()
    worth = [index for index in others[: partition.worth_review()] if index not in reviewed]
    if not fresh and not decided:
        # No doubt at all has no order.
        unsure = others[: min(most, max(_LEAST_SURE, len(worth)))]
        return [index for index in unsure if partition.clean_probability[index] < 1]
    of_persons = min(len(decided), max(most // 4, most - len(fresh)))
    left = most - of_persons
    of_review = min(len(worth), max(left // 4, left - len(fresh)))
    return fresh[: left - of_review] + worth[:of_review] + decided[:of_persons]
