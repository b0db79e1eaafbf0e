"""How often the fit's own validation gives the labels that its batches hold, read off the head at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import watch_output
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.utilities.reduce import Reduce

MIN_SAMPLES = 20
"""Samples of one class and none of another from which on that is not chance."""


class ValidationWatch:
    """Counts right predictions in a validation that runs anyway.

    It says nothing where a batch cannot be split into input and labels, or a step does not call the head once.

    Args:
        task_format: how batches, outputs and labels are read.
    """

    def __init__(self, task_format: TaskFormat) -> None:
        self._reading = task_format
        self._module: nn.Module | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at nothing.
        return vars(ValidationWatch(self._reading))

    def _forget(self) -> None:
        self._end_watch: Callable[[], None] | None = None
        self._outputs: list[Tensor] = []
        self._label: Any = None
        # How many are right, how many have a label, and the sums of class ids and of their squares.
        self._counts: Tensor | None = None
        self._is_whole = True
        self._has_run = False

    def start(self, module: nn.Module) -> None:
        """Watch the module whose output is the logits, from now on."""
        self._module = module

    @property
    def is_on(self) -> bool:
        """Whether it looks, the same on every rank."""
        return self._module is not None

    def begin(self) -> None:
        """Begin a validation; what an earlier one of the epoch showed is of older weights."""
        self._end()
        self._forget()
        self._has_run = True

    def start_batch(self, batch: Any) -> None:
        """Look at the head until :meth:`end_batch`."""
        self._end()
        if self._module is None or not (self._has_run and self._is_whole):
            return
        try:
            self._label = self._reading.split(batch)[1]
        except Exception:  # anything may be in a validation batch
            self._is_whole = False
            return
        self._outputs = []
        self._end_watch = watch_output(self._module, self._look)

    def _look(self, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs.append(output.detach())

    def end_batch(self) -> None:
        """Count what the step has shown."""
        if self._end_watch is None:
            return
        self._end()
        try:
            (output,) = self._outputs
            logits = self._reading.logits(output.float())
            label = self._reading.classes(self._label, len(output)).to(logits.device)
            has_label = label >= 0
            ids = torch.where(has_label, label, 0)
            right = logits.argmax(dim=1) == label
            counts = torch.stack([right.sum(), has_label.sum(), ids.sum(), ids.square().sum()])
        except Exception:
            self._is_whole = False
            return
        self._counts = counts if self._counts is None else self._counts + counts

    def _end(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
        self._end_watch = None

    def result(self, metric: float, reduce: Reduce) -> dict[str, float]:
        """Return what the last validation showed since the last call, by the names of an ``EpochNote``.

        Every rank must call it. Of samples that are all of one class it returns only ``only_class``: a network may
        predict that class everywhere, so neither accuracy nor metric says how well it has learned.

        Args:
            metric: that a callback monitors, to this rank.
            reduce: sums over the ranks.
        """
        self._end()
        counts = [0.0] * 4 if self._counts is None else self._counts.tolist()
        sums = torch.tensor([*counts, not self._is_whole, metric, 1.0], dtype=torch.float64)
        has_run = self._has_run
        self._forget()
        if not has_run:
            return {}
        right, samples, ids, squares, broken, metrics, ranks = reduce(sums).tolist()
        # By Cauchy and Schwarz, only of equal numbers.
        if not broken and samples >= MIN_SAMPLES and squares * samples == ids * ids:
            return {"only_class": ids / samples, "samples": samples}
        shown = {"metric": metrics / ranks}
        return shown if broken or not samples else {**shown, "accuracy": right / samples, "samples": samples}

    def detach(self) -> None:
        """Stop looking. May be called at any time, and again."""
        self._end()
        self._forget()
        self._module = None
