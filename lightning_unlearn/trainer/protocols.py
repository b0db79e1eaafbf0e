"""How the callbacks know each other without importing each other."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.compat import MisconfigurationException


@runtime_checkable
class PartitionSource(Protocol):
    """A callback that publishes a partition. How the callbacks know each other without importing each other."""

    at_epoch: Any
    """When the partition is computed: a number of epochs, a share of them, or ``"auto"``."""
    task_format: Any
    """How batches, outputs and labels are read: a :class:`~lightning_unlearn.data.task_format.TaskFormat`."""

    @property
    def sample_weight(self) -> Tensor | None:
        """(N,) float32, of this rank's samples, 1/k for each of k copies; None where each counts."""

    @property
    def memorized(self) -> float | None:
        """Share of the labels suspected to be wrong that the network predicts; None where none is."""

    @property
    def accuracy_gap(self) -> float | None:
        """Share of the training labels that the network predicts, less that of the validation labels; None without."""

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be changed: who would act says what it would do instead."""

    @property
    def uses_soft_targets(self) -> bool:
        """Whether neurons are regressed on the probability of being clean, or (as in the paper) on the two clusters."""

    def get_partition(self, trainer: Any, pl_module: Any) -> Partition | None:
        """Return the partition, computed now if it is due, or None if it is not due yet."""


def keyed_of(source: PartitionSource | None) -> Any:
    """Read the keys of training batches, a ``KeyedBatches``; None where samples have a dataset index."""
    return getattr(source, "keyed", None)


@runtime_checkable
class MaskSource(Protocol):
    """A callback that publishes a mask of pruned neurons."""

    def get_mask(self, trainer: Any, pl_module: Any) -> NeuronMask | None:
        """Return the mask, made now if it is due, or None if it is not due yet or nothing was pruned."""

    def target_layer(self) -> str:
        """Return the dotted path of the layer that is or will be pruned, of several the first; known from the start."""

    def zero_pruned(self) -> None:
        """Set pruned neurons to zero again; for callers that have just changed weights."""


_MISSING_PARTNER = """{who} needs an AttributionPartitionCallback in the Trainer's callbacks, in any place, but found
{found}. Add it in Python:
    from lightning_unlearn import AttributionPartitionCallback
    trainer = Trainer(callbacks=[AttributionPartitionCallback(), {who}(...)])
or in YAML:
    trainer:
      callbacks:
        - class_path: lightning_unlearn.AttributionPartitionCallback
        - class_path: lightning_unlearn.{who}"""


def find_partition_source(trainer: Trainer, who: str) -> PartitionSource:
    """Return the one callback of the Trainer that publishes a partition.

    Raises:
        MisconfigurationException: if there is none or more than one; the message shows the lines to add.
    """
    sources = [callback for callback in callbacks_of(trainer) if isinstance(callback, PartitionSource)]
    if len(sources) != 1:
        raise MisconfigurationException(_MISSING_PARTNER.format(who=who, found=len(sources) or "none"))
    return sources[0]
