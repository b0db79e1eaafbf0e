"""One pass over the training set: what it shows of every row of this rank's share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_unlearn.attribution import Attributor, MarginAttribution, response
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.data.task_format import IGNORED
from lightning_unlearn.evidence.frozen_features import FrozenFeatures
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.identity import mixed, row_identity
from lightning_unlearn.functional.perceptual import perceptual_hash
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.data_checks import check_same_labels, check_same_size, other_labels_on_ranks


def make_attributor(fit: FitContext, point: LayerPoint, method: str, watch: Sequence[LayerPoint] = ()) -> Attributor:
    """Return what attributes the user's model in passes, with as many passes on every rank where ranks meet."""
    agree = partial(fit.agree, of_all=True) if fit.is_sharded else bool
    return Attributor(fit.model, point, fit.logits, method, watch=watch, agree=agree)


@dataclass(frozen=True, eq=False)
class ScoringPass:
    """A pass in index order over this rank's share of the training set.

    Args:
        fit: that is running.
        attributor: of the user's model; watches ``early``, if that is given, and then that of ``features``.
        trajectory: of the rows that this rank owns, takes the logits and margins of each.
        is_last: whether the partition is computed after this pass, so that more is to be noted of every row.
        needs_neuron_attribution: whether the recipe looks at the attributions themselves, after the last pass.
        early: the layer whose response is noted in the last pass; None for none.
        features: take what training has not changed, which ``attributor`` watches last; None for none.
        absent: takes the indices of samples of this rank's share that the data set gives as None; those that it holds
            already count as such.
        loader: of other samples than those of the training set; None for these.
        title: of the line in the progress bar.
        total: N, of how many samples all ranks have the evidence; by default this rank has it of all.
    """

    fit: FitContext
    attributor: Attributor
    trajectory: TrainingDynamics
    is_last: bool
    needs_neuron_attribution: bool
    early: LayerPoint | None
    features: FrozenFeatures | None = None
    absent: set[int] = field(default_factory=set)
    loader: DataLoader[Any] | None = None
    title: str = "Evidence"
    total: int | None = None

    def run(self) -> dict[str, Tensor]:
        """Pass over the share. Every rank must call it.

        Returns:
            what the pass showed, one row for each row of the share; see
            :class:`~lightning_unlearn.data.task_format.TaskFormat`.

        Raises:
            ValueError: for another number of samples than before, or other labels.
        """
        columns: dict[str, list[Tensor]] = {}
        before = len(self.trajectory) // self.fit.task_format.rows_per_sample if self.total is None else self.total
        differ = 0
        with self.fit.isolated_eval():
            samples = self.fit.total if self.loader is None else len(self.loader.dataset)  # type: ignore[arg-type]
            check_same_size(before, samples)
            loader = self.loader or self.fit.scoring_loader
            for batch in self.fit.batches(loader, self.title, self.absent):
                differ += self._compare(batch)
                for name, value in self._observe(batch).items():
                    columns.setdefault(name, []).append(value.cpu())
        # Of several ranks, what another has seen in training of a sample that this one owns.
        if self.fit.world_size > 1 and (other := int(self.fit.reduce(torch.tensor([float(differ)])).item())):
            raise ValueError(other_labels_on_ranks(other))
        return {name: torch.cat(parts) for name, parts in columns.items()}

    def _own(self, batch: IndexedBatch) -> tuple[Tensor, Tensor]:
        """Return (U,) int64, the rows of a batch in the trajectory, and (U,) bool, False of one that only pads."""
        task_format = self.fit.task_format
        there = (task_format.repeat_per_row(batch.weight) > 0).cpu()
        # What pads a share is of another rank.
        return task_format.row_indices(batch.index // self.fit.world_size), there

    def _compare(self, batch: IndexedBatch) -> int:
        """Return how many rows have another label than the one seen before; one process ends there.

        Raises:
            ValueError: in a fit of one process.
        """
        rows, there = self._own(batch)
        before, now = self.trajectory.label[rows[there]], batch.label.cpu()[there]
        if self.fit.world_size == 1:
            check_same_labels(before, now)
        return int(((before >= 0) & (before != now)).sum())

    def _observe(self, batch: IndexedBatch) -> dict[str, Tensor]:
        """Hand the rows of a batch to the trajectory, and return what else is to be noted of them."""
        task_format, trajectory = self.fit.task_format, self.trajectory
        label = batch.label.clamp(min=0)
        seen = self._attribute(batch.x, label)
        rows, there = self._own(batch)
        margin, counts = seen.total(), there.to(batch.label.device) & (batch.label != IGNORED)
        trajectory.observe(rows[counts.cpu()], seen.logits[counts], label[counts], margin[counts])
        if not self.is_last:
            return {"label": batch.label}
        found = {"label": batch.label, **trajectory.of_last_pass(seen.logits, label)}
        found["identity"] = task_format.repeat_per_row(_identity(batch))
        if self.loader is None and self.fit.hashes_inputs:
            # Of each sample once, not of each of its labels, of which there may be thousands.
            found["perceptual"] = perceptual_hash(batch.x, len(batch.index))
        found |= _seen_in_the_last_pass(seen, label, margin)
        if self.early is not None:
            found["input_statistics"] = response(self.fit.model, self.early, seen.watched[0])
        if self.features is not None:
            self.features.take(seen.watched[-1])
        return found

    def _attribute(self, x: Any, label: Tensor) -> MarginAttribution:
        if self.fit.task_format.task == "multilabel":
            with torch.no_grad():
                return _of_several_labels(self.fit.logits(x), label)
        return self.attributor.attribute(x, label, rows=self.is_last and self.needs_neuron_attribution)


def _identity(batch: IndexedBatch) -> Tensor:
    """Return (B,) int64, equal for samples whose inputs are; where that cannot be told, different for all."""
    identity = row_identity(batch.x, len(batch.index))
    return mixed(batch.index + 1) if identity is None else identity


def _seen_in_the_last_pass(seen: MarginAttribution, label: Tensor, margin: Tensor) -> dict[str, Tensor]:
    rows = {} if seen.class_max is None else {"neuron_attribution": seen.class_max}
    return {
        "margin": margin,
        "loss": cross_entropy(seen.logits, label, reduction="none"),
        "prediction": seen.logits.argmax(dim=1),
        **rows,
    }


def _of_several_labels(logits: Tensor, label: Tensor) -> MarginAttribution:
    """Return each label's margin: at the head's input its logit is, less the bias, the sum of gradient x activation."""
    logits = logits.float()
    return MarginAttribution(label_margin(logits, label).unsqueeze(1), logits)
