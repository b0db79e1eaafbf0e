"""What a report shows of its samples, read from the data set, and of others with the same input beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_unlearn.report.samples import Card, SampleView, file_card
from lightning_unlearn.results.duplicates import Duplicate, InputHashes
from lightning_unlearn.results.partition import Partition

# What all samples of the gallery may take, so that the page stays below 20 MB whatever they are.
_BUDGET = 12_000_000
_MOST_PER_SAMPLE = 200_000
# Others with the same input, of one sample.
_MOST_DUPLICATES = 3


def known_duplicates(
    inputs: InputHashes | None, partition: Partition, shown: Sequence[int]
) -> dict[int, list[Duplicate]]:
    """Return the others with the same input as samples shown, by index; none where inputs are not known."""
    return {} if inputs is None else inputs.duplicates(shown, partition.label, _MOST_DUPLICATES)


@dataclass(frozen=True, eq=False)
class Cards:
    """Make the cards of samples of a data set.

    Args:
        view: how they are shown.
        dataset: by whose index they are read.
        files: paths of the samples' files, by index; empty where they are not known.
        samples: how many of them the gallery may hold, all of which take no more than a page may.
        tokenizer: that decodes token ids; None without one.
    """

    view: SampleView
    dataset: Any
    files: Sequence[str]
    samples: int
    tokenizer: Any = None

    def of(self, indices: Sequence[int], duplicates: Mapping[int, Sequence[Duplicate]]) -> tuple[dict[int, Card], str]:
        """Return the cards of samples by index, and why not of all, of the first of which that is so.

        Args:
            indices: of the samples.
            duplicates: others with the same input as some of these, by index.
        """
        cards = {index: self._card(index, _BUDGET // max(1, self.samples)) for index in indices}
        faults = [f"sample {index}: {card['text']}" for index, card in cards.items() if card["kind"] == "fault"]
        # The same is seen already, and what has a card of its own is read from there.
        near = {one.index for others in duplicates.values() for one in others if not one.is_exact} - cards.keys()
        beside = {index: self._card(index, _BUDGET // 2 // len(near)) for index in sorted(near)}
        for index, others in duplicates.items():
            cards[index]["duplicates"] = [self._duplicate(one, beside) for one in others]
        return cards, faults[0] if faults else ""

    def _card(self, index: int, budget: int) -> Card:
        budget = min(_MOST_PER_SAMPLE, budget)
        try:
            return self.view.card(self.dataset[index], budget, self.tokenizer) | self._file(index)
        except Exception as error:  # of the user's data set, or render
            return {"kind": "fault", "text": f"{type(error).__name__}: {error}"[:300]}

    def _duplicate(self, one: Duplicate, beside: Mapping[int, Card]) -> Card:
        """Return what stands beside a sample, with its picture if there is one."""
        picture = {"src": card["src"]} if (card := beside.get(one.index, {})).get("kind") == "image" else {}
        return {"index": one.index, "exact": one.is_exact, **picture, **self._file(one.index)}

    def _file(self, index: int) -> Card:
        return file_card(self.files[index] if self.files else "")
