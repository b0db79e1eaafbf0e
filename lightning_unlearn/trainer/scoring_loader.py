"""Loader of evaluation passes: the fit's own, or one without augmentation that the user provides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_unlearn.data.loaders import check_loader
from lightning_unlearn.trainer.compat import MisconfigurationException

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

OFFER = "attribution_dataloader"
"""Name of the method of a DataModule, or LightningModule, that returns such a loader."""


def train_loader(trainer: Trainer) -> DataLoader[Any]:
    """Return the loader that the fit draws from, if its samples have an index."""
    return check_loader(trainer.train_dataloader)


def offers_scoring_loader(trainer: Trainer) -> bool:
    """Return whether the user provides a loader for evaluation passes."""
    return _offer(trainer) is not None


def scoring_loader(fit: RunningFit) -> DataLoader[Any]:
    """Return the loader whose dataset, transforms and collate function evaluation passes use.

    Raises:
        MisconfigurationException: if the user's loader and the train loader differ in the number of samples.
        TypeError: if its samples have no dataset index.
    """
    offer, memory = _offer(fit.trainer), fit.memory
    if offer is None:
        return train_loader(fit.trainer)
    if memory.scoring_loader is None:
        loader = check_loader(offer())
        expected, found = (len(x.dataset) for x in (train_loader(fit.trainer), loader))  # type: ignore[arg-type]
        if expected != found:
            raise MisconfigurationException(
                f"Expected {OFFER}() to return a loader of the {expected} samples of the training set, in the same"
                f" order, but its data set has {found}."
            )
        memory.scoring_loader = loader
    return memory.scoring_loader


def _offer(trainer: Trainer) -> Any:
    # A Trainer has its DataModule without declaring it.
    for holder in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if callable(offer := getattr(holder, OFFER, None)):
            return offer
    return None
