"""Finds the training samples that are wrong, prunes the neurons that carry them, and fine-tunes on the rest."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_unlearn.data.data_format import DataFormat
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.shrinking import shrink

if TYPE_CHECKING:
    from lightning_unlearn.callbacks import (
        AttributionPartitionCallback,
        CleanSubsetFinetuneCallback,
        SensitivityPruneCallback,
        UnlearnReport,
        narrow,
    )

__version__ = "0.1.0"

__all__ = [
    "AttributionPartitionCallback",
    "CleanSubsetFinetuneCallback",
    "DataFormat",
    "NeuronMask",
    "Partition",
    "SensitivityPruneCallback",
    "UnlearnReport",
    "__version__",
    "narrow",
    "shrink",
]


def __getattr__(name: str) -> Any:
    """Import the callbacks and the subpackages when they are asked for: reading a partition imports no Lightning.

    Every time anew, so that pytorch_lightning, imported in the meantime, finds that they are callbacks of its own too.
    """
    if name in __all__:
        callbacks = import_module("lightning_unlearn.callbacks")
        callbacks.register_pytorch_lightning()
        return getattr(callbacks, name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
