"""Finds the training samples that are wrong, prunes the neurons that carry them, and fine-tunes on the rest."""

from lightning_unlearn.callbacks import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    SensitivityPruneCallback,
)
from lightning_unlearn.shrinking import shrink
from lightning_unlearn.types import NeuronMask, Partition

__version__ = "0.1.0"

__all__ = [
    "AttributionPartitionCallback",
    "CleanSubsetFinetuneCallback",
    "NeuronMask",
    "Partition",
    "SensitivityPruneCallback",
    "__version__",
    "shrink",
]
