"""The keys of the training batches of a fit, read as the loader delivers them; and what is made of these batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning_unlearn.data.sample_key import KeyReader
from lightning_unlearn.trainer.batch_rows import item_at
from lightning_unlearn.trainer.running_fit import RunningFit
from lightning_unlearn.trainer.train_data import BatchHook

Change = Callable[[Any, list[Any]], Any]
"""From a batch and its keys to the batch to train on."""


class KeyedBatches:
    """Reads the keys of every training batch of a fit, from :meth:`attach` to :meth:`detach`.

    Attributes:
        reader: finds them.
        keys: of the batch in hand; None before it is delivered, and where it is none.
        first: a copy of the first batch, as it was delivered; None before it.
        batch: that batch as ``training_step`` gets it, while the step goes on.
        wanted: keys of samples that somebody wants to show.
        kept: these samples by key, as far as they have come since.
        change: makes another batch of it before the transfer hooks; None for no change.
    """

    def __init__(self, reader: KeyReader) -> None:
        self.reader = reader
        self._hook = BatchHook()
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing of the fit.
        return {**self.__dict__, "keys": None, "batch": None, "first": None, "change": None, "kept": {}}

    def attach(self, fit: RunningFit) -> None:
        """Read training batches from now on. Call in ``setup`` of a fit."""
        self._hook.attach(fit, self._take)

    def detach(self) -> None:
        """Leave the batches alone. May be called at any time, and again."""
        self._hook.detach()
        self.keys: list[Any] | None = None
        self.batch: Any = None
        self.first: Any = None
        self.wanted: set[Any] = set()
        self.kept: dict[Any, Any] = {}
        self.change: Change | None = None

    def _take(self, batch: Any) -> Any:
        self.keys = None
        if batch is None:
            return batch
        keys = self.reader.read(batch)
        if self.first is None:
            # A copy, which transfer hooks have not changed in place.
            self.first = copy.deepcopy(batch)
        self._keep(batch, keys)
        if self.change is not None:
            batch = self.change(batch, keys)
            # Rows may be gone.
            keys = self.reader.read(batch)
        self.keys = keys
        return batch

    def _keep(self, batch: Any, keys: list[Any]) -> None:
        """Keep the samples that are wanted, before rows are taken out."""
        for row, key in enumerate(keys) if len(self.kept) < len(self.wanted) else ():
            if key in self.wanted and key not in self.kept:
                self.kept[key] = item_at(batch, row, len(keys), self.reader.container(batch))

    def start_batch(self, batch: Any) -> None:
        """Take the batch of a step, as it is given there. Call in ``on_train_batch_start``.

        Raises:
            TypeError: for a step whose batch has not come this way.
        """
        self.batch = batch
        if self.keys is None:
            raise TypeError(
                "Expected the training loop to draw the batches, so that their keys can be read, but it did not deliver"
                " this step's (training_step takes dataloader_iter, or the batch is None); let training_step take"
                " (batch, batch_idx)."
            )

    def end_batch(self) -> None:
        """Drop the batch. Call in ``on_train_batch_end``."""
        self.keys = self.batch = None
