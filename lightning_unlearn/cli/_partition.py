"""``partition``: which training samples are wrong, of a model and data as the user has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_unlearn.callbacks import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.cli._config import ConfigCLI, add_fit_arguments
from lightning_unlearn.cli._results import held_partition, partition_state, read_checkpoint
from lightning_unlearn.evidence.when import LATEST
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.registry import changed_settings
from lightning_unlearn.results.review_csv import check_undecided
from lightning_unlearn.utilities.checks import check_number, check_whole
from lightning_unlearn.utilities.files import target_folder


class PartitionCLI(ConfigCLI):
    """Model, data and Trainer of a configuration, with the callbacks that answer the question."""

    command = "partition"

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        group = parser.add_argument_group("What to score, and where to write the results")
        group.add_argument(
            "--at_epoch",
            metavar="EPOCHS",
            type=int | float | Literal["auto"] | None,
            help=(
                "Number of epochs, share of trainer.max_epochs (0.5), or auto: once the evidence has peaked; by"
                " default that of the AttributionPartitionCallback in the configuration, else auto"
            ),
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
            help="Score the samples of the validation loader too, as their labels count in the validation accuracy",
        )
        group.add_argument("--out", metavar="DIR", type=str, default="partition", help="Folder for the results")
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
                    f"{path} already contains a partition ({name} {held}), but no evidence to compute another one."
                    f" Leave out --{name} {self.config[name]} to see it, or pass a checkpoint from before the"
                    " partition, or none."
                )
        if (share := self.config["suspect_precision"]) is not None:
            raise ValueError(
                f"{path} already contains a partition with its suspects. Leave out --suspect_precision {share} to"
                " see it, or pass a checkpoint from before the partition, or none."
            )
        if self.config["judge_validation"] and self.held_validation is None:
            raise ValueError(
                f"{path} already contains a partition, but none of the validation set. Leave out"
                " --judge_validation to see it, or pass a checkpoint from before the partition, or none."
            )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init["trainer"].get("callbacks") or []
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        acting = [one for one in given if isinstance(one, (SensitivityPruneCallback, CleanSubsetFinetuneCallback))]
        if acting and self.command == "partition":
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


def _complete_epochs(checkpoint: dict[str, Any], path: str) -> int:
    try:
        return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"Expected a checkpoint that training can resume from, but {path} contains weights only"
            " (save_weights_only=True). Pass another one, or train without --ckpt_path."
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
