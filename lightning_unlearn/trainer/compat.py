"""Lightning comes in two packages with the same code: ``lightning.pytorch``, and ``pytorch_lightning``.

A class of the one is no class of the other. This package imports the first; a user may give a Trainer of the second.
So a Trainer's objects are known by the name of their class, and what we hand out is of both packages as soon as the
user has imported the second, before or after this one. It is never imported on our account: that takes time, and
Lightning's log lines would go to its logger.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import exceptions
from typing_extensions import Self

_PREFIXES = ("lightning.pytorch.", "pytorch_lightning.")


class DualPackageCallback(Callback):
    """A callback for a Trainer, and a LightningCLI, of either package."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Join the packages, at the latest moment before somebody may ask what the callback is."""
        register_pytorch_lightning()
        return super().__new__(cls)

    def let_go(self) -> None:
        """Drop the LightningModule's methods that Lightning lends each callback, which would keep the Trainer alive.

        Who holds a callback for its results does not want the Trainer, weights and data with it. Lightning lends them
        again in the next run.
        """
        for name in ("log", "log_dict"):
            self.__dict__.pop(name, None)


class MisconfigurationException(exceptions.MisconfigurationException):
    """A clash with the Trainer. Who catches the exception of this name of either package catches it."""


def register_pytorch_lightning() -> None:
    """Make what we hand out a kind of ``pytorch_lightning``'s as well, where that has been imported."""
    other = sys.modules.get("pytorch_lightning")
    # While it is being imported, it has no Trainer yet.
    if not hasattr(other, "Trainer"):
        return
    theirs = importlib.import_module("pytorch_lightning.utilities.exceptions")
    _add_base(DualPackageCallback, other.Callback)  # type: ignore[union-attr]
    _add_base(MisconfigurationException, theirs.MisconfigurationException)


def _add_base(kind: type[Any], base: type[Any]) -> None:
    if not issubclass(kind, base):
        kind.__bases__ = (*kind.__bases__, base)


def is_lightning_instance(value: Any, *names: str) -> bool:
    """Return whether this is an instance of a class of Lightning, of either package.

    Args:
        value: any object.
        names: of the classes.
    """
    return any(kind.__name__ in names and kind.__module__.startswith(_PREFIXES) for kind in type(value).__mro__)


def has_own(pl_module: LightningModule, method: str) -> bool:
    """Return whether the module has a method of its own, not only Lightning's or torch's, which do nothing or raise."""
    if method in vars(pl_module):
        return True
    owner = next((kind for kind in type(pl_module).__mro__ if method in vars(kind)), None)
    return owner is not None and not owner.__module__.startswith((*_PREFIXES, "torch.nn.modules.module"))


def has_forward(pl_module: LightningModule) -> bool:
    """Return whether the module has a ``forward`` of its own: Lightning's, and torch's, only raise."""
    return has_own(pl_module, "forward")


def may_make_layers(pl_module: LightningModule) -> bool:
    """Return whether layers may be made, or replaced, between the callbacks' setup and the start of training."""
    return any(has_own(pl_module, method) for method in ("setup", "configure_model", "configure_sharded_model"))
