"""What fine-tuning asks of the training data, whether samples are known by a dataset index or by a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_unlearn.finetuning.relabel import Relabeling
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext


class SubsetData:
    """Restricts training to a subset of the samples, from :meth:`follow` to :meth:`detach`.

    Attributes:
        seed: seed of the sampling.
        planned_batches: number of batches of the first epoch on a subset, for which a schedule may be planned.
        planned_size: number of samples per step then, over all ranks.
        relabeling: replaces labels in batches.
    """

    is_by_key = False

    def __init__(self) -> None:
        self.relabeling = Relabeling()
        self.reset()

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.seed = 0
        self.forget_plan()

    def forget_plan(self) -> None:
        """Forget the plan."""
        self.planned_batches = self.planned_size = 0

    def begin(self, fit: FitContext) -> None:
        """Refuse data that cannot be narrowed to a subset. Call before the first step.

        Raises:
            TypeError: for a loader that cannot be narrowed.
        """
        raise NotImplementedError

    def prepare_relabeling(self, fit: FitContext, head: str | None, *, is_new: bool) -> None:
        """Locate the labels to replace, and refuse batches in which they cannot be replaced.

        Args:
            fit: the fit that starts.
            head: dotted path of the module that returns the logits; None if there is none.
            is_new: whether no label was replaced yet.

        Raises:
            TypeError: if labels cannot be replaced.
        """
        raise NotImplementedError

    def plan(self, fit: FitContext) -> None:
        """Record the number and size of batches for which a schedule is planned."""
        raise NotImplementedError

    def at_once(self, fit: FitContext) -> int:
        """Return how many samples the ranks' batches hold together."""
        raise NotImplementedError

    def fault_of(self, fit: FitContext, subset: TrainingSubset, *, keeps_plan: bool) -> str:
        """Return why a subset cannot be trained on, in the words that follow "samples"; empty if it can."""
        raise NotImplementedError

    def follow(
        self,
        fit: FitContext,
        subset: TrainingSubset,
        partition: Callable[[], Partition],
        keeps_plan: Callable[[], bool],
    ) -> None:
        """Train on a subset from now on, with the labels that it gives.

        Args:
            fit: the running fit.
            subset: the subset.
            partition: returns the partition of the subset; called for each batch.
            keeps_plan: returns whether an epoch must not have more batches than planned, for a schedule; called for
                each loader.
        """
        raise NotImplementedError

    def detach(self, fit: FitContext) -> None:
        """Give the training data back."""
        raise NotImplementedError

    def batches_with(self, fit: FitContext, subset: TrainingSubset) -> int | float:
        """Return how many batches an epoch on a subset would have; infinite where that is not known."""
        return fit.batches_per_epoch

    def relabeling_fault(self, fit: FitContext, partition: Partition) -> str:
        """Return why batches cannot be re-labeled, once a partition shows it; empty if they can."""
        return ""

    def dataset(self, fit: FitContext) -> Any:
        """Return the dataset in use; None if there is none to compare."""
        return None

    def ask_again(self, fit: FitContext) -> None:
        """Reload the train loader in a fit that resumes from a checkpoint."""

    def before_backward(self, loss: Tensor) -> None:
        """Call in ``on_before_backward``."""

    def end_epoch(self, fit: FitContext) -> None:
        """Call in ``on_train_epoch_end``, on every rank, while a subset is trained on."""

    def state_dict(self) -> dict[str, int]:
        """Return the state as numbers."""
        return {"planned_batches": self.planned_batches, "planned_size": self.planned_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.planned_batches, self.planned_size = state["planned_batches"], state["planned_size"]
        self.seed = state["seed"]
