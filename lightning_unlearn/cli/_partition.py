"""``partition``: which training samples are wrong, of a model and data as the user has them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from typing_extensions import override

from lightning_unlearn.callbacks import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.cli._config import (
    CommandParser,
    ConfigCLI,
    add_fit_arguments,
    find_users_classes,
    named_classes,
    without,
)
from lightning_unlearn.cli._errors import printable
from lightning_unlearn.cli._examples import examples
from lightning_unlearn.cli._results import (
    PARTITION,
    held_partition,
    partition_state,
    read_checkpoint,
    summary_of,
)
from lightning_unlearn.cli._samples import check_samples, loader_of
from lightning_unlearn.data.naming import class_names_in, files_in
from lightning_unlearn.evidence.when import LATEST
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.latent_noise import MEMORIZED
from lightning_unlearn.recipes.registry import changed_settings
from lightning_unlearn.report import RunRecord, shown_samples, write_report
from lightning_unlearn.report.gallery import known_duplicates
from lightning_unlearn.report.tokens import find_tokenizer
from lightning_unlearn.results.finding import finding_of
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.review_csv import check_undecided
from lightning_unlearn.utilities.checks import check_number, check_whole
from lightning_unlearn.utilities.files import target_folder, write_json

HELP = """\
Which of my training samples are wrong? Trains as the configuration says, with model and data as you have them, until
the partition can be computed, and stops there. Nothing is pruned, dropped or re-labeled. The folder --out has then
partition.npz, suspects.csv, report.html, provenance.json and config.yaml; with --judge_validation also
validation_partition.npz and validation_suspects.csv.

A checkpoint (--ckpt_path) of an epoch before --at_epoch is trained on from there. One past it is judged as it is, with
the evidence that it holds; without any, from one pass over the data, in which memorized labels look right. Of one that
holds a partition, that is shown. An AttributionPartitionCallback or UnlearnReport in the configuration is taken with
its settings; SensitivityPruneCallback and CleanSubsetFinetuneCallback are left out. A YAML of your own script with
LightningCLI(Net, Data) runs as it is: name the classes with --model and --data."""
_EXAMPLES = examples(
    "lightning-unlearn partition --config run.yaml",
    "lightning-unlearn partition --config config.yaml --model team.Net --data team.Data",
    "lightning-unlearn partition --config run.yaml --at_epoch 20 --recipe label --out found",
    "lightning-unlearn partition --config run.yaml --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt",
    "lightning-unlearn partition --model team.Net --data team.Data --trainer.max_epochs 10",
)


# Of this command alone, or of what has been judged.
_OWN = ("--at_epoch", "--recipe", "--suspect_precision", "--out", "--top", "--samples", "--ckpt_path")


class PartitionCLI(ConfigCLI):
    """Model, data and Trainer of a configuration, with the callbacks that answer the question."""

    command = "partition"

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        group = parser.add_argument_group("What is judged, and where the answer goes")
        group.add_argument(
            "--at_epoch",
            metavar="EPOCHS",
            type=int | float | Literal["auto"] | None,
            help="After how many epochs, after which share of trainer.max_epochs (0.5), or auto: once the evidence has"
            " peaked; by default that of the AttributionPartitionCallback in the configuration, else auto",
        )
        group.add_argument(
            "--recipe",
            type=str | None,
            help="auto, label, input, rlap, loss, aum, argmax, or a dotted path; by default that of the configuration,"
            " else auto",
        )
        group.add_argument(
            "--suspect_precision",
            metavar="SHARE",
            type=float | None,
            help="Suspects are the longest list of which at least this share is expected to be wrong, in [0.5, 1); by"
            " default that of the configuration, else 0.85",
        )
        group.add_argument(
            "--judge_validation",
            action="store_true",
            help="Judge the samples of the validation loader too, as their labels count in the validation accuracy",
        )
        group.add_argument("--out", metavar="DIR", type=str, default="partition", help="Folder for what is found")
        group.add_argument(
            "--top", metavar="N", type=int, default=10, help="How many of the most suspect samples to print"
        )
        group.add_argument(
            "--samples",
            metavar="N",
            type=int | None,
            help="How many samples the report shows; by default as many as the UnlearnReport in the configuration, else"
            " 200",
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.fit_arguments = add_fit_arguments(parser)

    @override
    def before_instantiate_classes(self) -> None:
        # Before the data are read, and hours of training.
        self.out = target_folder(self.config["out"])
        for prefix in ("", "validation_"):
            check_undecided(self.out / f"{prefix}suspects.csv")
        if (recipe := self.config["recipe"]) is not None:
            get_recipe(recipe)
        if (share := self.config["suspect_precision"]) is not None:
            check_number("suspect_precision", share, least=0.5, below=1)
        path = self.config["ckpt_path"]
        self.checkpoint: dict[str, Any] = {} if path is None else read_checkpoint(path)
        state = partition_state(self.checkpoint, path or "") or {}
        self.found: Any = state.get("partition")
        self.complete = 0
        if path is not None and self.found is None:
            self.complete = _complete_epochs(self.checkpoint, path)
        if self.found is not None:
            self.held = held_partition(self.found, path)
            of_validation = (state.get("validation") or {}).get("partition")
            self.held_validation = None if of_validation is None else held_partition(of_validation, path)
            self._check_no_other_is_asked_for(path)

    def _check_no_other_is_asked_for(self, path: str) -> None:
        for name, held in (("at_epoch", self.held.epoch), ("recipe", self.held.recipe)):
            if self.config[name] not in (None, held):
                raise ValueError(
                    f"{path} holds a partition already ({name} {held}), and not what another could be computed from;"
                    f" leave out --{name} {self.config[name]} to see it, or give a checkpoint of an epoch before it, or"
                    " none."
                )
        if (share := self.config["suspect_precision"]) is not None:
            raise ValueError(
                f"{path} holds a partition already, whose suspects are chosen; leave out --suspect_precision {share} to"
                " see it, or give a checkpoint of an epoch before it, or none."
            )
        if self.config["judge_validation"] and self.held_validation is None:
            raise ValueError(
                f"{path} holds a partition already, but none of the validation set; leave out --judge_validation to see"
                " it, or give a checkpoint of an epoch before it, or none."
            )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init["trainer"].get("callbacks") or []
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        acting = [one for one in given if isinstance(one, (SensitivityPruneCallback, CleanSubsetFinetuneCallback))]
        if acting:
            names = ", ".join(type(one).__name__ for one in acting)
            rank_zero_info(f"Ignoring {names}; `lightning-unlearn fit` trains with them.")
        others = [one for one in given if one not in acting]
        self.partition = self._partition_callback(others)
        self.report = next((one for one in others if isinstance(one, UnlearnReport)), UnlearnReport())
        self.report.dir = self.out
        if (samples := self.config["samples"]) is not None:
            self.report.samples = check_whole("samples", samples)
        ours = (self.partition, self.report)
        theirs = [one for one in others if one not in ours]
        limits: dict[str, Any] = {"min_epochs": None, "min_steps": None}
        if self.complete and self._is_past(self.config["trainer"]["max_epochs"]):
            self.partition.at_epoch = self.complete
            # Nothing is trained, but a fit that has come to its end would not even start.
            limits |= {"max_epochs": self.complete + 1, "max_steps": -1, "max_time": None}
        callbacks = [*theirs, *ours, _StopWhenDrawn(self.partition)]
        return super().instantiate_trainer(callbacks=callbacks, **limits, **kwargs)

    def _partition_callback(self, callbacks: Sequence[Callback]) -> AttributionPartitionCallback:
        found = [one for one in callbacks if isinstance(one, AttributionPartitionCallback)]
        self.has_callback = bool(found)
        if len(found) > 1:
            raise ValueError(f"Expected one AttributionPartitionCallback in the configuration, but found {len(found)}.")
        at_epoch, recipe = self.config["at_epoch"], self.config["recipe"]
        (partition,) = found or [AttributionPartitionCallback()]
        if at_epoch is not None:
            partition.at_epoch = at_epoch
        if recipe is not None:
            # Beside another recipe, what the configuration changes of its own still counts.
            partition.recipe = get_recipe(recipe, **changed_settings(partition.recipe))
        if (share := self.config["suspect_precision"]) is not None:
            partition.suspect_precision = share
        if self.config["judge_validation"]:
            partition.judge_validation = True
        partition.dry_run, partition.every_n_epochs = True, None
        return partition

    def _is_past(self, max_epochs: int | None) -> bool:
        """Return whether the checkpoint is of an epoch after which the partition is computed at the latest."""
        at_epoch = self.partition.at_epoch
        if isinstance(at_epoch, int):
            return self.complete >= at_epoch
        share = LATEST if at_epoch == "auto" else float(at_epoch)
        return max_epochs is not None and self.complete >= share * max_epochs > 0


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


def _complete_epochs(checkpoint: dict[str, Any], path: str) -> int:
    try:
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"Expected a checkpoint that training can go on from, but {path} holds weights only (as with"
            " save_weights_only=True); give another, or train again without --ckpt_path."
        ) from None


class _StopWhenDrawn(Callback):
    """Ends the fit before a step is trained with the partition."""

    def __init__(self, partition: AttributionPartitionCallback) -> None:
        self._partition = partition

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = self._partition.has_result

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._partition.has_result:
            trainer.should_stop = True
            # The fit loop takes this for its end: the hooks of an epoch without a batch, which those of users do not
            # expect, are not called.
            raise StopIteration


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
        raise ValueError("Expected a training to judge, but the Trainer has fast_dev_run; leave it out.")
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
        raise ValueError("Training ended before an epoch was complete, so there is nothing to judge.")
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
        f"Judged from one pass: the checkpoint holds no evidence of earlier epochs. The network gives {agrees:.0%} of"
        " the training samples the label that they have"
    )
    if agrees > MEMORIZED:
        return [
            f"{said}: wrong labels that it has memorized look right by now, and no recipe can tell them from one pass;"
            " corrupted inputs still show (--recipe input). For labels, judge the training: leave out --ckpt_path, or"
            " give an earlier checkpoint."
        ]
    return [f"{said}; wrong labels show in the rest, less surely than over a whole training (leave out --ckpt_path)."]


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
