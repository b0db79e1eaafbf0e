"""The training set of a configuration, outside of a fit: for a partition that there is already."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_unlearn.data.fingerprint import check_fingerprint, fingerprint
from lightning_unlearn.results.partition import Partition


def loader_of(cli: LightningCLI) -> DataLoader[Any]:
    """Return a loader of the training set of a model and DataModule that were made."""
    holder: Any = cli.model if cli.datamodule is None else cli.datamodule
    holder.prepare_data()
    holder.setup("fit")
    make = getattr(holder, "attribution_dataloader", holder.train_dataloader)
    loader: DataLoader[Any] = make()
    return loader


def check_samples(partition: Partition, loader: DataLoader[Any], what: str, *, verify: bool) -> None:
    """Refuse data that a partition is not of.

    Args:
        partition: that there is.
        loader: of the data.
        what: the partition is called.
        verify: whether to compare their content too.

    Raises:
        ValueError: for another number of samples, or other ones.
    """
    found = len(loader.dataset)  # type: ignore[arg-type]  # what we take has a length
    if found != len(partition):
        raise ValueError(f"Expected the {len(partition):,} training samples of {what}, but the data have {found:,}.")
    if partition.fingerprint and verify:
        check_fingerprint(partition.fingerprint, fingerprint(loader))
