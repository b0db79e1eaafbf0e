"""The callbacks: when, never how. The only room that knows Lightning, beside the command line and the demo."""

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import log as _log

from lightning_unlearn.callbacks.finetune import CleanSubsetFinetuneCallback
from lightning_unlearn.callbacks.narrow import narrow
from lightning_unlearn.callbacks.partition import AttributionPartitionCallback
from lightning_unlearn.callbacks.prune import SensitivityPruneCallback
from lightning_unlearn.callbacks.report import UnlearnReport
from lightning_unlearn.trainer.compat import register_pytorch_lightning

__all__ = [
    "AttributionPartitionCallback",
    "CleanSubsetFinetuneCallback",
    "SensitivityPruneCallback",
    "UnlearnReport",
    "narrow",
]

register_pytorch_lightning()
if _log.name.startswith("pytorch_lightning"):
    # Importing lightning.pytorch has sent the log lines of both packages to its own logger.
    rank_zero.log = _log
