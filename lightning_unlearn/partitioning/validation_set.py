"""A partition of the validation set, whose wrong labels count in the validation accuracy.

No training step has seen a validation sample, so its label is not memorized. The only evidence is one pass at the time
of the training partition, which also replaces the early epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.fingerprint import varies
from lightning_unlearn.data.task_format import IGNORED
from lightning_unlearn.evidence.early_epochs import EarlyEpochs
from lightning_unlearn.evidence.eval_pass import ScoringPass
from lightning_unlearn.evidence.rank_share import Ranks, RankShare, shared_out
from lightning_unlearn.partitioning.apply_recipe import apply_recipe
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.partitioning.validation_samples import check_not_trained_on, find_samples
from lightning_unlearn.recipes import Recipe
from lightning_unlearn.recipes.evidence import Evidence, OutOfSample
from lightning_unlearn.results.finding import finding_of
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.utilities.distributed import gather_by_index

Make = Callable[[Sequence[ShardResult], Tensor, str], Partition]
"""From what was judged, the labels and the fingerprint to a partition."""


class ValidationJudge:
    """Judges the validation samples of a fit together with the training samples.

    Attributes:
        partition: the last partition; None before the first.
        fault: why there is none, if a pass has failed.
    """

    def __init__(self) -> None:
        self.partition: Partition | None = None
        self.fault = ""

    def found(self, asked: bool) -> Partition:
        """Return the partition.

        Args:
            asked: whether one is to be drawn.

        Raises:
            RuntimeError: without one, saying when there will be.
        """
        if self.partition is not None:
            return self.partition
        if self.fault:
            raise RuntimeError(f"No partition of the validation set: {self.fault}.")
        if asked:
            raise RuntimeError("No partition of the validation set yet: it is computed with that of the training set.")
        raise RuntimeError(
            "No partition of the validation set: set judge_validation=True to compute it with that of the training set."
        )

    def begin(self, fit: FitContext, trained_on: str) -> None:
        """Refuse validation data that cannot be judged, before the first step. Every rank must call it.

        Args:
            fit: the fit that starts.
            trained_on: fingerprint of the training set.

        Raises:
            MisconfigurationException: for several validation loaders, or none.
            TypeError: for samples that cannot be identified by index, or batches in another format than in training.
            ValueError: for samples that are trained on, labels out of range, or ranks with different data.
        """
        samples = find_samples(fit)
        check_not_trained_on(fit, samples, trained_on)
        if varies(samples.fingerprint):
            rank_zero_info("The validation set uses random augmentation, so its samples are judged as augmented.")

    def compute(self, training: ScoringPass, recipe: Recipe, make: Make) -> None:
        """Run a pass over the validation set and judge it. Every rank must call it.

        If the validation data fail at this point, a warning is logged and there is no partition; the fit continues.

        Args:
            training: the pass over the training set, whose settings are used.
            recipe: the recipe.
            make: builds the partition.
        """
        fit = training.fit
        try:
            samples = find_samples(fit)
            share = shared_out(len(samples), fit.world_size)
            one = replace(
                training,
                trajectory=training.trajectory.of_others(share * fit.task_format.rows_per_sample),
                total=len(samples),
                loader=samples.loader,
                absent=set(samples.left_out),
                title="Validation",
            )
            seen = one.run()
        except Exception as error:  # of whatever kind, from the user's data
            if fit.is_sharded:
                # Others may wait in the forward pass in which this rank has failed.
                raise
            self.fault = f"{type(error).__name__}: {error}".rstrip(".")
            return
        if _is_one_sided(fit, seen, len(samples)):
            self.fault = "all of its samples have the same label, or none"
            return
        self._judge(one, seen, RankShare.by_index(len(samples), Ranks.of(fit)), recipe, make, samples.fingerprint)

    def _judge(
        self, one: ScoringPass, seen: dict[str, Tensor], of_rank: RankShare, recipe: Recipe, make: Make, found: str
    ) -> None:
        uses_out_of_sample = recipe.needs_out_of_sample and one.fit.task_format.rows_per_sample == 1
        out_of_sample = _unseen(one, of_rank) if uses_out_of_sample else None

        def with_unseen(evidence: Evidence) -> Evidence:
            return replace(evidence, out_of_sample=out_of_sample)

        judged, label = apply_recipe(one.fit, seen, one.trajectory, of_rank, recipe, with_unseen)
        self.partition = make(judged, label, found)

    @property
    def said(self) -> str:
        """The result in one sentence; empty if nothing was judged."""
        return "" if self.partition is None else _said(self.partition)

    def report(self, fit: FitContext) -> None:
        """Log the result, or why there is none."""
        if self.fault:
            rank_zero_warn(f"The validation set was not judged: {self.fault}.")
        if self.partition is not None:
            rank_zero_info(self.said)
            found = {"unlearn/val_suspects": float(len(self.partition.suspect_indices()))}
            if self.partition.noise_rate is not None:
                found["unlearn/val_noise_rate"] = self.partition.noise_rate
            fit.log(found)

    def record(self) -> dict[str, Any] | None:
        """Return the result for the provenance; None if there is none."""
        if self.partition is None:
            return None
        return {
            "samples": _number(self.partition),
            "fingerprint": self.partition.fingerprint,
            "noise_rate": self.partition.noise_rate,
            "suspects": self.partition.suspect_indices().sort().values,
            "status": self.partition.status.value,
            "warning": self.partition.warning,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives."""
        partition = None if self.partition is None else copied(self.partition.state_dict())
        return {"partition": partition, "fault": self.fault}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any] | None) -> ValidationJudge:
        """Return the object that :meth:`state_dict` described; an empty one without a state."""
        judge = cls()
        if state is not None:
            held = state["partition"]
            judge.partition = None if held is None else Partition.from_state_dict(copied(held))
            judge.fault = state["fault"]
        return judge


def check_validates(fit: FitContext) -> None:
    """Refuse a fit without validation.

    Raises:
        MisconfigurationException: saying what to do.
    """
    if not fit.validates:
        raise MisconfigurationException(
            "judge_validation=True needs a fit with validation, but this one has none. Add a validation"
            " loader and a validation_step (and no limit_val_batches=0), or leave judge_validation out."
        )


def _unseen(one: ScoringPass, of_rank: RankShare) -> OutOfSample:
    """Return the out-of-sample evidence of the pass, which has seen none of these labels."""
    fit, early, share = one.fit, EarlyEpochs(), (of_rank.local, of_rank.weight)
    positions = torch.ones(len(one.trajectory), dtype=torch.uint8)
    early.look(one.trajectory, positions, 1, share, fit.device, fit.reduce)
    return OutOfSample(early.rate, early.drawn)


def _is_one_sided(fit: FitContext, share: dict[str, Tensor], total: int) -> bool:
    """Return whether no label has two different values."""
    index, weight = fit.shard(total)
    rows = share["label"].reshape(len(index), -1)
    label = gather_by_index(index, weight, rows, total, fit.reduce)
    return all(len(torch.unique(one[one != IGNORED])) < 2 for one in label.unbind(dim=1))


def _number(partition: Partition) -> int:
    """Return the number of judged samples."""
    judged = partition.label >= 0
    return int((judged.any(dim=1) if partition.is_multilabel else judged).sum())


def _said(partition: Partition) -> str:
    said = finding_of(partition)
    if partition.warning:
        said = f"{said}: {partition.warning}"
    if len(partition.suspect_indices()):
        said += "; nothing was changed. Validation accuracy counts these labels as correct"
    return f"Validation set, {_number(partition):,} samples: {said}."
