"""Runs ``partition``: judges, writes what was found, and says it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_unlearn.callbacks import AttributionPartitionCallback
from lightning_unlearn.cli._config import CommandParser, find_users_classes, named_classes, without
from lightning_unlearn.cli._errors import printable
from lightning_unlearn.cli._examples import examples
from lightning_unlearn.cli._partition import PartitionCLI
from lightning_unlearn.cli._results import PARTITION, partition_state, summary_of
from lightning_unlearn.cli._samples import check_samples, loader_of
from lightning_unlearn.data.naming import class_names_in, files_in
from lightning_unlearn.recipes.latent_noise import MEMORIZED
from lightning_unlearn.report import RunRecord, shown_samples, write_report
from lightning_unlearn.results.finding import finding_of
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.utilities.files import write_json

HELP = """\
Finds wrong training labels. Trains as the configuration says until the partition can be computed, then stops. Nothing
is pruned, dropped or re-labeled. The folder --out then holds partition.npz, suspects.csv, report.html, provenance.json
and config.yaml; with --judge_validation also validation_partition.npz and validation_suspects.csv.

With a checkpoint (--ckpt_path) from before --at_epoch, training continues from it. A later checkpoint is judged by the
evidence that it holds or, without any, by one pass over the data, in which memorized labels look right. If it holds a
partition, that is shown. An AttributionPartitionCallback or UnlearnReport in the configuration keeps its settings;
SensitivityPruneCallback and CleanSubsetFinetuneCallback are left out. A YAML of your own script with
LightningCLI(Net, Data) works unchanged: name the classes with --model and --data."""
_EXAMPLES = examples(
    "lightning-unlearn partition --config run.yaml",
    "lightning-unlearn partition --config config.yaml --model team.Net --data team.Data",
    "lightning-unlearn partition --config run.yaml --at_epoch 20 --recipe label --out found",
    "lightning-unlearn partition --config run.yaml --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt",
    "lightning-unlearn partition --model team.Net --data team.Data --trainer.max_epochs 10",
)


# Of this command alone, or of what has been judged.
_OWN = ("--at_epoch", "--recipe", "--suspect_precision", "--out", "--top", "--samples", "--ckpt_path")


def run_partition(arguments: Sequence[str]) -> None:
    """Train, judge, and say what was found."""
    find_users_classes()
    if any(argument.endswith(".npz") for argument in arguments[:1]):
        raise ValueError(f"To see a saved partition: lightning-unlearn show {arguments[0]}")
    given, classes = named_classes(arguments)
    cli = PartitionCLI(
        **classes,
        args=given,
        run=False,
        save_config_callback=None,
        parser_class=CommandParser,
        parser_kwargs={
            "prog": "lightning-unlearn partition",
            "usage": "lightning-unlearn partition --config FILE [--model CLASS --data CLASS] [OPTION]...",
            "description": HELP,
            "epilog": _EXAMPLES,
        },
    )
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
        raise ValueError("fast_dev_run trains too little to compute a partition. Leave it out.")
    if cli.found is not None:
        _say_found(cli, arguments)
        return
    options = {name: cli.config[name] for name in cli.fit_arguments}
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **options)
    _say_drawn(cli, arguments)


@rank_zero_only
def _say_drawn(cli: PartitionCLI, arguments: Sequence[str]) -> None:
    callback = cli.partition
    if not callback.has_result:
        raise ValueError("Training ended before one epoch was complete, so there is no partition.")
    callback.save_provenance(cli.out / "provenance.json")
    # What follows for a fit, the callback has said right above.
    lines: list[str] = []
    if cli.complete and callback.provenance["fits"][0]["from_epoch"] >= callback.partition.epoch:
        lines += one_pass_caution(callback.partition)
    loader: Any = cli.trainer.train_dataloader
    if callback.judge_validation:
        lines += _write_validation(cli, callback)
    _say(cli, callback.partition, loader.dataset, lines, arguments)


def _write_validation(cli: PartitionCLI, callback: AttributionPartitionCallback) -> list[str]:
    """Write what was found of the validation set, and return what there is to say of it."""
    try:
        partition = callback.validation_partition
    except RuntimeError as error:
        return [str(error)]
    loaders: Any = cli.trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    return _write_found(cli, partition, loader.dataset)


def _write_found(cli: PartitionCLI, partition: Partition, dataset: Any) -> list[str]:
    names = _write(cli, partition, dataset, "validation_")
    return [f"Validation set, {len(partition):,} samples: {finding_of(partition, names)} (validation_suspects.csv)."]


def one_pass_caution(partition: Partition) -> list[str]:
    """Return what one pass over the data by a trained network can tell, and what it cannot.

    Args:
        partition: computed from that alone.
    """
    if partition.recipe == "input":
        return []
    evidence = partition.label_evidence
    if not partition.is_multilabel:
        evidence = evidence[partition.label >= 0]
    agrees = float((evidence > 0.5).float().mean())
    said = (
        "Computed from a single pass: the checkpoint contains no evidence of earlier epochs. The network"
        f" predicts the given label of {agrees:.0%} of the training samples"
    )
    if agrees > MEMORIZED:
        return [
            (
                f"{said}: it has memorized wrong labels, which look correct by now, and no recipe can detect them"
                " from one pass. Corrupted inputs can still be detected (--recipe input). To find wrong labels,"
                " leave out --ckpt_path, or pass an earlier checkpoint."
            )
        ]
    return [
        (
            f"{said}; wrong labels can be detected among the others, with less certainty than over a whole fit"
            " (leave out --ckpt_path)."
        )
    ]


@rank_zero_only
def _say_found(cli: PartitionCLI, arguments: Sequence[str]) -> None:
    partition = cli.held
    loader = loader_of(cli)
    check_samples(partition, loader, f"the partition of {cli.config['ckpt_path']}", verify=cli.partition.data.verify)
    state = partition_state(cli.checkpoint, cli.config["ckpt_path"]) or {}
    provenance = state["provenance"] or {}
    gallery, _ = cli.report.gallery(loader.dataset, shown_samples(partition, provenance, cli.report.samples))
    names = _names(cli, partition, loader.dataset)
    record = RunRecord(partition, gallery=gallery, class_names=names, rounds=state["rounds"], provenance=provenance)
    write_report(record, record.save(cli.out) / "report.html")
    write_json(cli.out / "provenance.json", provenance)
    said = [f"This partition was in {cli.config['ckpt_path']}; nothing was trained."]
    if cli.held_validation is not None:
        said += _write_found(cli, cli.held_validation, None)
    _say(cli, partition, loader.dataset, said, arguments)


def _names(cli: PartitionCLI, partition: Partition, dataset: Any) -> list[str]:
    """Return the class names: those given, or the data set's own if there is one for each class."""
    names = cli.report.class_names or list(partition.class_names) or class_names_in(dataset)
    if cli.report.class_names is None and names:
        try:
            partition.names_of(names)
        except ValueError:
            return []
    return names


def _write(cli: PartitionCLI, partition: Partition, dataset: Any, prefix: str = "") -> list[str]:
    """Write a partition and its table, and return the names of the classes."""
    names, files = _names(cli, partition, dataset), files_in(dataset)
    partition.remember_files(files if len(files) == len(partition) else ())
    partition.save(cli.out / f"{prefix}{PARTITION}")
    table, review = cli.out / f"{prefix}suspects.csv", partition.worth_review()
    partition.to_csv(table, review=review, class_names=names or None)
    return names


def _say(cli: PartitionCLI, partition: Partition, dataset: Any, lines: Sequence[str], arguments: Sequence[str]) -> None:
    names = _write(cli, partition, dataset)
    cli.parser.save(cli.config, cli.out / "config.yaml", overwrite=True)
    print()
    print(printable(summary_of(partition, cli.config["top"], names)))
    if lines:
        print("", *lines, sep="\n")
    print(f"\nFiles: {', '.join(sorted(path.name for path in cli.out.iterdir() if path.is_file()))} in {cli.out}")
    print("\n".join(["Next:", *next_steps(cli, partition, arguments)]))


def next_steps(cli: PartitionCLI, partition: Partition, arguments: Sequence[str]) -> list[str]:
    """Return the commands that follow.

    Args:
        cli: that has run.
        partition: what was found.
        arguments: that it was called with.
    """
    look = f"  lightning-unlearn report {_quoted(cli.out)} --open"
    if not len(partition.suspect_indices()) and not partition.worth_review():
        return [look]
    table = cli.out / "suspects.csv"
    correct = f"  # Where you know better, fill the column decision of {table} (keep, drop, relabel). Then train by it"
    fit = f"  lightning-unlearn fit {' '.join(map(_quoted, without(arguments, *_OWN, flags=['--judge_validation'])))}"
    if cli.has_callback:
        in_yaml = f"with review: {table} in init_args of the AttributionPartitionCallback"
        return [look, f"{correct},", f"  # {in_yaml}:", fit]
    name, epochs = "--trainer.callbacks", partition.epoch + max(1, partition.epoch // 2)
    # As many as the configuration has, where that leaves some to fine-tune in.
    has_enough = (cli.config["trainer"]["max_epochs"] or 0) >= epochs
    longer = "" if has_enough else f" --trainer.max_epochs {epochs}"
    return [
        look,
        f"{correct}:",
        f"{fit}{longer} \\",
        f"    {name}+=lightning_unlearn.AttributionPartitionCallback {name}.at_epoch {partition.epoch} \\",
        f"    {name}.review {_quoted(table)} {name}+=lightning_unlearn.CleanSubsetFinetuneCallback",
    ]


def _quoted(word: Any) -> str:
    return shlex.quote(str(word))
