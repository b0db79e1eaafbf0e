"""The samples of a configuration, outside of a fit: for a partition that there is already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_unlearn.cli._config import CommandParser, find_users_classes, named_classes
from lightning_unlearn.cli._partition import PartitionCLI
from lightning_unlearn.data.fingerprint import check_fingerprint, fingerprint
from lightning_unlearn.report import RunRecord, shown_samples
from lightning_unlearn.report.gallery import known_duplicates
from lightning_unlearn.report.tokens import find_tokenizer
from lightning_unlearn.results.partition import Partition


class _SampleCLI(PartitionCLI):
    """The same without a fit: for its data, and how the report shows samples."""

    command = "report"

    @override
    def before_instantiate_classes(self) -> None:
        self.out, self.complete, self.found = Path(self.config["out"]), 0, None


def read_samples(arguments: Sequence[str], record: RunRecord, samples: int) -> dict[int, dict[str, Any]]:
    """Return what a report shows of samples, read from the data of a configuration.

    Args:
        arguments: ``--config FILE``, and ``--model`` and ``--data`` where the YAML does not name their classes.
        record: of a run with these data.
        samples: how many.

    Returns:
        cards by index, as :meth:`UnlearnReport.gallery` makes them.

    Raises:
        ValueError: for data that the partition is not of, and where no sample can be shown.
    """
    find_users_classes()
    given, classes = named_classes(arguments)
    kwargs = {"prog": "lightning-unlearn report"}
    cli = _SampleCLI(
        **classes,
        args=[*given, "--ckpt_path", "null", "--samples", str(samples)],
        run=False,
        save_config_callback=None,
        parser_class=CommandParser,
        parser_kwargs=kwargs,
    )
    loader = loader_of(cli)
    check_samples(record.partition, loader, "the run directory's partition", verify=cli.partition.data.verify)
    tokenizer = find_tokenizer(cli.model, cli.datamodule, loader.dataset, loader.collate_fn)
    shown = shown_samples(record.partition, record.provenance, samples)
    duplicates = known_duplicates(record.inputs, record.partition, shown)
    gallery, fault = cli.report.gallery(loader.dataset, shown, tokenizer, duplicates)
    if fault:
        rank_zero_info(f"Some samples cannot be shown: {fault}")
    return gallery


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
