"""The callbacks: when, never how. The only room that knows Lightning, beside the command line and the demo."""

from lightning_unlearn.callbacks.finetune import CleanSubsetFinetuneCallback
from lightning_unlearn.callbacks.partition import AttributionPartitionCallback
from lightning_unlearn.callbacks.prune import SensitivityPruneCallback

__all__ = ["AttributionPartitionCallback", "CleanSubsetFinetuneCallback", "SensitivityPruneCallback"]
