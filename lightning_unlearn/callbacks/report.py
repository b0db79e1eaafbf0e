"""When to write down what a fit has come to, for people to look at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks.base import FitCallback, PartitionConsumer
from lightning_unlearn.data.dataset_state import unopened
from lightning_unlearn.data.naming import files_in
from lightning_unlearn.report import RunRecord, SampleView, shown_samples, write_report
from lightning_unlearn.report.gallery import Cards, known_duplicates
from lightning_unlearn.report.tokens import find_tokenizer
from lightning_unlearn.results.duplicates import Duplicate
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied
from lightning_unlearn.trainer.callback_order import callbacks_of
from lightning_unlearn.trainer.fit_loop import is_fast_dev_run
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.protocols import MaskSource, PartitionSource, find_partition_source
from lightning_unlearn.trainer.scoring_loader import train_loader
from lightning_unlearn.utilities.checks import check_names, check_path, check_whole

REPORT = "report.html"
_LOSS = "training loss"


class UnlearnReport(FitCallback):
    """Writes a run directory with ``report.html`` when the fit ends.

    The report is a single offline file: what was found and done and whether it helped, the noise estimate, confused
    classes, the probabilities of being clean, the most suspect samples (to filter, sort and review), training curves,
    neurons and run times. ``lightning-unlearn report DIR`` recreates it from the run directory.

    It needs an AttributionPartitionCallback among the Trainer's callbacks, in any order. An error while writing becomes
    a warning and does not end the fit.

    Args:
        dir: the run directory; by default ``unlearn`` in the logger's folder, or in the Trainer's ``default_root_dir``.
        class_names: names by label; by default the ``classes`` of the dataset, as in an ImageFolder.
        samples: how many of the most suspect samples the report shows; up to a quarter are samples with a person's
            decision (``review``); if none is suspect, the 24 least certain. They are read from the dataset (that of
            ``attribution_dataloader()`` if there is one) and stored in the file.
        render: function from a dataset item to what the report shows: text, a table (a dict of names and values), a PIL
            image, or the bytes of a PNG; for a video, a frame. By default images, audio (with ``sample_rate``), texts
            and tables are shown directly, and token ids are decoded if the module, its data or the collate function has
            a ``tokenizer``.
        mean: mean of each image channel in the normalization of the dataset's transforms, which is undone for display.
        std: standard deviation of each channel, likewise. Without both, images with values beyond [0, 1] are rescaled.
        channels: whether an image's channels come ``"first"`` or ``"last"``; inferred from its shape by default.
        sample_rate: samples per second of audio (T,) or (1, T).

    Raises:
        ValueError: for invalid arguments, here; for too many or too few ``class_names``, before the
            first training step.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.

    Example:
        >>> UnlearnReport(class_names=["cat", "dog"]).samples
        200
    """

    shows_samples = True

    def __init__(  # noqa: PLR0913  (each is an option of its own)
        self,
        dir: str | os.PathLike[str] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        samples: int = 200,
        render: Callable[[Any], Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: Literal["first", "last"] | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.dir = None if dir is None else check_path("dir", dir, "a folder")
        self.class_names = (
            None if class_names is None else check_names("class_names", class_names, "names", each_once=False)
        )
        self.samples = check_whole("samples", samples)
        self.view = SampleView(render, mean, std, channels, sample_rate)
        self._reset()

    def _reset(self) -> None:
        self._folder = Path()
        self._curves: dict[str, list[list[float]]] = {}
        self._known: dict[str, Any] = {}
        self._losses: list[Any] = [0.0, 0]
        self._started = self._validation_started = time.perf_counter()
        self._seconds = {"fit": 0.0, "validation": 0.0}
        # Of samples that are known by a key, those that came again after the partition.
        self._by_key: dict[Any, Any] = {}

    @property
    def path(self) -> Path:
        """Where the report is or will be, from ``setup`` on."""
        return self._folder / REPORT

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.join_fit(trainer, pl_module, find_partition_source(trainer, type(self).__name__))
        if trainer.current_epoch == 0:
            self._reset()
        # On every rank, as the logger's folder is agreed upon.
        logged = trainer.log_dir
        default = Path(logged or trainer.default_root_dir) / "unlearn"
        self._folder = default if self.dir is None else Path(self.dir).expanduser()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_names()
        # Here, and not when the epoch before has ended, when not all of its metrics were known.
        self._note_metrics(trainer, trainer.current_epoch - 1)
        self._want_samples()

    def _want_samples(self) -> None:
        """Keep the samples of the gallery as they come again, where no data set can be asked for them."""
        keyed, partition = self.fit.keyed, _found(self.fit.source, "partition", None)
        if keyed is not None and partition is not None and not keyed.wanted:
            provenance = _found(self.fit.source, "provenance", {})
            keyed.wanted = {partition.keys[at] for at in shown_samples(partition, provenance, self.samples)}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it by the number of batches that make a step.
            self._losses[0] = self._losses[0] + loss.detach().float() * trainer.accumulate_grad_batches
            self._losses[1] += 1

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._seconds["validation"] += time.perf_counter() - self._validation_started

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_metrics(trainer, trainer.current_epoch - 1)
        if (keyed := self.fit.keyed) is not None:
            others = self.fit.exchange([keyed.kept] + [None] * (self.fit.world_size - 1))
            self._by_key = {key: item for kept in others for key, item in (kept or {}).items()}
        self._seconds["fit"] += time.perf_counter() - self._started

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        # Of a fit that had no step left it may not be there yet, and every rank takes part.
        conclude = getattr(self.fit.source, "conclude", None)
        if conclude is not None:
            conclude(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        # The model is trained, and a picture less is no reason to lose it.
        try:
            record = self._record(trainer, pl_module)
            write_report(record, record.save(self._folder) / REPORT)
        except Exception as error:
            rank_zero_warn(f"Could not write the report: {type(error).__name__}: {error}")
        else:
            rank_zero_info(f"Report: {self.path}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.let_go()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A fit that goes on from the end of an epoch does not see it; the state has been taken already.
        if trainer.is_last_batch:
            self._note_metrics(trainer, trainer.current_epoch)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far, as numbers."""
        return {"curves": copied(self._curves)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curves = {name: [list(point) for point in points] for name, points in state_dict["curves"].items()}

    def _check_names(self) -> None:
        task_format = self.fit.task_format
        if self.class_names is None or not task_format.num_outputs:
            return
        classes = task_format.num_outputs if task_format.task == "multilabel" else task_format.num_classes
        if len(self.class_names) != classes:
            raise ValueError(
                f"Expected class_names to name each of {classes} classes, but got {len(self.class_names)} names."
            )

    def _note_metrics(self, trainer: Trainer, epoch: int) -> None:
        """Take the metrics of an epoch that has ended; one that was not logged in it is the very tensor it was."""
        metrics = dict(trainer.callback_metrics)
        fresh = {name: value for name, value in metrics.items() if self._known.get(name) is not value}
        self._known = metrics
        total, batches = self._losses
        self._losses = [0.0, 0]
        if epoch < 0:
            return
        if batches:
            fresh[_LOSS] = total / batches
        for name, value in fresh.items():
            number = float(value)
            points = self._curves.setdefault(name, [])
            if torch.tensor(number).isfinite() and (not points or points[-1][0] < epoch):
                points.append([epoch, number])

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> RunRecord:
        source: Any = self.fit.source
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, PartitionConsumer)]
        masks = [mask for callback in ours for mask in _found(callback, "masks", ())]
        summary = _found(source, "summary", None)
        partition: Partition = source.partition
        first = next((epoch for callback in ours if (epoch := getattr(callback, "first_epoch", None))), None)
        rounds = [vars(drawn) | {} for drawn in getattr(source, "rounds", ())]
        provenance = _found(source, "provenance", {})
        shown = shown_samples(partition, provenance, self.samples)
        trained = (pl_module, getattr(trainer, "datamodule", None))
        gallery, fault = self._gallery(partition, shown, trained)
        if fault:
            rank_zero_warn(f"Some samples cannot be shown in the report: {fault}")
        return RunRecord(
            partition=partition,
            masks=tuple(masks),
            gallery=gallery,
            inputs=self.fit.memory.inputs,
            summary={} if summary is None else {**vars(summary), "done": list(summary.done)},
            rounds=rounds,
            suspect_precision=float(getattr(source, "suspect_precision", 0.85)),
            class_names=self.class_names or list(partition.class_names),
            provenance=provenance,
            fit=_facts(trainer, pl_module, by_key=self.fit.keyed is not None)
            | ({"dry run": "yes"} if source.dry_run else {}),
            seconds=self._seconds | _phases([source, *ours]),
            curves=_without_double(self._curves),
            swaps=[] if first is None else sorted({first, *(r["epoch"] for r in rounds if r["epoch"] > first)}),
        )

    def _gallery(
        self, partition: Partition, shown: Sequence[int], trained: Sequence[Any]
    ) -> tuple[dict[int, dict[str, Any]], str]:
        """See :meth:`gallery`; with keys, collect the samples that come again."""
        if self.fit.keyed is None:
            loader = self.fit.scoring_loader
            with unopened(loader):
                tokenizer = find_tokenizer(*trained, loader.dataset, loader.collate_fn)
                duplicates = known_duplicates(self.fit.memory.inputs, partition, shown)
                return self.gallery(loader.dataset, shown, tokenizer, duplicates)
        keys = {index: partition.keys[index] for index in shown}
        found, fault = self.gallery(
            {index: self._by_key[key] for index, key in keys.items() if key in self._by_key},
            [index for index, key in keys.items() if key in self._by_key],
            find_tokenizer(*trained),
        )
        absent = {"kind": "text", "text": "No batch contained it after the partition."}
        return {index: found.get(index, absent) | {"file": str(key)} for index, key in keys.items()}, fault

    def gallery(
        self,
        dataset: Any,
        indices: Sequence[int],
        tokenizer: Any = None,
        duplicates: Mapping[int, Sequence[Duplicate]] | None = None,
    ) -> tuple[dict[int, dict[str, Any]], str]:
        """Return what is shown of some samples; and why not of all, of the first of which that is so.

        Args:
            dataset: the training set.
            indices: of these samples.
            tokenizer: that decodes token ids; None without one.
            duplicates: others with the same input as some of these, by index.
        """
        with isolate_rng():
            files = files_in(dataset) if len(indices) else []
            shown = Cards(self.view, dataset, files, self.samples, tokenizer)
            return shown.of(indices, duplicates or {})


def _found(callback: Any, name: str, otherwise: Any) -> Any:
    """Return what a callback publishes, or something else where it has nothing yet."""
    try:
        return getattr(callback, name, otherwise)
    except RuntimeError:
        return otherwise


def _facts(trainer: Trainer, pl_module: LightningModule, *, by_key: bool) -> dict[str, Any]:
    of_loader = trainer.train_dataloader if by_key else train_loader(trainer).dataset
    data = getattr(trainer, "datamodule", None) or getattr(of_loader, "dataset", of_loader)
    return {
        "model": type(pl_module).__name__,
        "data": type(data).__name__,
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
    }


def _phases(callbacks: Sequence[Any]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for callback in callbacks:
        if not hasattr(callback, "seconds"):
            continue
        name = "swap to the clean subset"
        if isinstance(callback, PartitionSource):
            name = "evidence passes, partition"
        elif isinstance(callback, MaskSource):
            name = "pruning"
        phases[name] = phases.get(name, 0.0) + float(callback.seconds)
    return phases


def _without_double(curves: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Return the loss of the steps in place of what the module logs of it, which may be the last batch's alone."""
    doubles = [name for name in curves if name.startswith("train") and "loss" in name and name != _LOSS]
    return {name: points for name, points in curves.items() if _LOSS not in curves or name not in doubles}
