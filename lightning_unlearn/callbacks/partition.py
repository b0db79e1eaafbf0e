"""When to gather evidence and when to draw the partition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_unlearn.callbacks._base import UnlearnCallback, logits_of, probe, train_loader, training_set
from lightning_unlearn.callbacks._lightning import compute_device, is_fast_dev_run, log_values, undisturbed
from lightning_unlearn.capture import Attributor, check_reached, resolve_layer
from lightning_unlearn.data import rank_share, split_batch
from lightning_unlearn.distributed import place_by_index, sum_over_ranks
from lightning_unlearn.functional.attribution import strongest_other
from lightning_unlearn.functional.evidence import label_support, update_majority
from lightning_unlearn.recipes import Verdict, get_recipe
from lightning_unlearn.types import Evidence, LayerPoint, Partition

# What is remembered of every sample between passes.
_GATHERED = ("label", "support_sum", "candidate", "votes")


class AttributionPartitionCallback(UnlearnCallback):
    """Attributes every training sample and gives it a probability of being clean (RLAP, steps 2 and 3).

    After every ``evidence_every_n_epochs`` epochs, and when ``at_epoch`` epochs on all the data are complete, it passes
    over the training set in index order, in eval mode, sharded over the ranks, with the DataModule's transforms and
    transfer hooks, and takes Captum's gradient x activation at a layer. The pass changes nothing: the weights after the
    fit are bit for bit those of a fit without it, until another callback acts on the partition.

    Where the training set has random augmentation, the scores are those of augmented samples.

    Args:
        layer: dotted path of the layer whose output is attributed; by default the input of the last Linear with an
            output per class that ``forward`` calls.
        at_epoch: number of complete epochs after which the partition is drawn; epoch ``at_epoch`` (counted from 0) is
            the first that can be trained on the clean subset.
        recipe: ``"label"``: a mixture on the support of the given label (from its margin attribution), averaged over
            the evidence passes, which finds wrong labels; ``"rlap"``: the paper's, blind to the given label.
        evidence_every_n_epochs: how often evidence is gathered before ``at_epoch``. A pass costs about as much as a
            validation pass over the training set. What has been memorised no longer shows, so recipes that average gain
            from early passes.
        threshold: samples with a probability below it are not clean.
        batch_to_xy: from a batch on the device to ``(x, y)``: the input of ``forward`` (a tensor, or a tuple or dict
            of its arguments) and the labels, (B,) int64. By default the batch itself must be ``(x, y)``.

    Raises:
        ValueError: for arguments out of range, here; for an unknown layer when the fit is set up; for a layer that is
            not reached, or labels out of range, when training starts.
        TypeError: for a dataset without index or length, or a batch that is not ``(x, y)``, when training starts.
        MisconfigurationException: if ``at_epoch`` is not before the Trainer's ``max_epochs``, or for a strategy that is
            not supported, when the fit is set up.

    Example:
        >>> AttributionPartitionCallback(at_epoch=20).partition
        Traceback (most recent call last):
        RuntimeError: There is no partition yet: it is drawn when 20 epochs are complete.
    """

    def __init__(
        self,
        layer: str | None = None,
        *,
        at_epoch: int,
        recipe: str = "label",
        evidence_every_n_epochs: int = 1,
        threshold: float = 0.5,
        batch_to_xy: Callable[[Any], tuple[Any, Tensor]] | None = None,
    ) -> None:
        if at_epoch < 1:
            raise ValueError(
                f"Expected at_epoch to be at least 1, the number of epochs trained on all the data, but got {at_epoch}."
            )
        if evidence_every_n_epochs < 1:
            raise ValueError(
                f"Expected evidence_every_n_epochs to be at least 1, but got {evidence_every_n_epochs}; for a single"
                " pass set it to at_epoch."
            )
        if not 0 < threshold < 1:
            raise ValueError(f"Expected threshold to lie in (0, 1), but got {threshold}.")
        self.layer = layer
        self.at_epoch = at_epoch
        self.recipe = get_recipe(recipe)
        self.evidence_every_n_epochs = evidence_every_n_epochs
        self.threshold = threshold
        self.split_batch = batch_to_xy or split_batch
        self.reset()

    @override
    def reset(self) -> None:
        self._point: LayerPoint | None = None
        self._num_classes = 0
        # By dataset index and over the passes so far, the same on every rank; None before the first pass.
        self._gathered: dict[str, Tensor] | None = None
        self._epochs_seen: list[int] = []
        self._partition: Partition | None = None

    @property
    def partition(self) -> Partition:
        """The partition of the training set.

        Raises:
            RuntimeError: before it is drawn, saying when it will be.
        """
        if self._partition is None:
            raise RuntimeError(f"There is no partition yet: it is drawn when {self.at_epoch} epochs are complete.")
        return self._partition

    @property
    def regresses_on_probability(self) -> bool:
        """Whether neurons are regressed on the probability, not (as the paper does) on the two clusters."""
        return self.recipe.soft

    def gathers_evidence(self, epoch: int) -> bool:
        """Whether a pass is due when ``epoch`` epochs are complete."""
        if self._partition is not None or epoch in self._epochs_seen or epoch < 1:
            return False
        return epoch >= self.at_epoch or (self.recipe.averages and epoch % self.evidence_every_n_epochs == 0)

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        max_epochs = trainer.max_epochs
        if max_epochs is not None and 0 <= max_epochs <= self.at_epoch and not is_fast_dev_run(trainer):
            raise MisconfigurationException(
                "Expected at_epoch to be less than the Trainer's max_epochs, so that epochs are left after the"
                f" partition, but got at_epoch={self.at_epoch} and max_epochs={max_epochs}."
            )
        if self.layer is not None:
            resolve_layer(pl_module, self.layer)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trace, first = probe(trainer, pl_module, self)
        self._num_classes = trace.output.shape[1]
        if self.layer is None:
            self._point = LayerPoint(trace.last_linear(self._num_classes), "input")
        else:
            self._point = LayerPoint(self.layer, "output")
        check_reached(trace, self._point)
        _warn_of_probabilities(trace.output)
        known = self._partition.label if self._partition is not None else (self._gathered or {}).get("label")
        if known is not None:
            _check_same_size(len(known), len(train_loader(trainer).dataset))  # type: ignore[arg-type]  # has a length
            _check_same_labels(known[first.index], first.label.cpu())

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pull_partition(trainer, pl_module)

    def pull_partition(self, trainer: Trainer, pl_module: LightningModule) -> Partition | None:
        """The partition, drawn now if it is due, or None if it is not due yet."""
        epoch = trainer.current_epoch
        if self.gathers_evidence(epoch):
            started = time.perf_counter()
            if self._point is None:
                self.begin(trainer, pl_module)
            evidence = self._gather(trainer, pl_module)
            self._epochs_seen.append(epoch)
            if epoch >= self.at_epoch:
                verdict = self.recipe.judge(evidence, sum_over_ranks(trainer.strategy))
                self._publish(trainer, evidence, verdict)
                self._report(pl_module, time.perf_counter() - started)
        return self._partition

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._partition is None and not is_fast_dev_run(trainer):
            rank_zero_warn(
                f"Training ended after {trainer.current_epoch} epochs, before the partition at at_epoch="
                f"{self.at_epoch}: nothing was partitioned, pruned or fine-tuned."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives: 28 bytes per sample while evidence is gathered, 25 once the partition is drawn."""
        return {
            "epochs_seen": list(self._epochs_seen),
            "gathered": None if self._gathered is None else dict(self._gathered),
            "partition": None if self._partition is None else self._partition.state_dict(),
        }

    @property
    @override
    def has_acted(self) -> bool:
        return self._partition is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._epochs_seen = list(state["epochs_seen"])
        self._gathered = state["gathered"]
        partition = state["partition"]
        self._partition = None if partition is None else Partition.from_state_dict(partition)

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> Evidence:
        """Passes over the training set and adds what it shows to what earlier passes showed."""
        if self._point is None:
            raise RuntimeError("The layer to attribute at is not resolved; this is an error in lightning_unlearn.")
        attributor = Attributor(pl_module, self._point, lambda x: logits_of(pl_module, x))
        columns: dict[str, list[Tensor]] = {}
        rows: list[Tensor] = []
        with undisturbed(trainer, pl_module):
            for batch in training_set(trainer, pl_module, self, self._num_classes):
                seen = attributor.margin(batch.x, batch.label)
                found = {
                    "label": batch.label,
                    "support_sum": label_support(seen.total()),
                    "loss": cross_entropy(seen.logits, batch.label, reduction="none"),
                    "prediction": seen.logits.argmax(dim=1),
                    "candidate": strongest_other(seen.logits, batch.label),
                }
                for name, value in found.items():
                    columns.setdefault(name, []).append(value.cpu())
                if self.recipe.needs_rows:
                    rows.append(attributor.class_max(batch.x, batch.label, self._num_classes).cpu())
        return self._merge(trainer, {name: torch.cat(parts) for name, parts in columns.items()}, rows)

    def _merge(self, trainer: Trainer, share: dict[str, Tensor], rows: list[Tensor]) -> Evidence:
        total = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]  # checked in begin
        index, weight = rank_share(total, trainer.global_rank, trainer.world_size)
        reduce = sum_over_ranks(trainer.strategy)
        latest = {name: place_by_index(index, weight, value, total, reduce) for name, value in share.items()}
        latest["votes"] = torch.ones_like(latest["label"])
        if (before := self._gathered) is not None:
            _check_same_data(before["label"], latest["label"])
            latest["support_sum"] = before["support_sum"] + latest["support_sum"]
            latest["candidate"], latest["votes"] = update_majority(
                before["candidate"], before["votes"], latest["candidate"]
            )
        if latest["label"].min() == latest["label"].max():
            raise ValueError(
                f"Expected training labels of at least two classes, but all {total} samples have label"
                f" {int(latest['label'][0])}; there is nothing to tell apart."
            )
        self._gathered = {name: latest[name] for name in _GATHERED}
        device = compute_device(trainer)
        return Evidence(
            index=index,
            weight=weight.to(device),
            label=latest["label"][index].to(device),
            support=(latest["support_sum"][index] / (len(self._epochs_seen) + 1)).to(device),
            loss=latest["loss"][index].to(device),
            prediction=latest["prediction"][index].to(device),
            rival=latest["candidate"][index].to(device),
            rows=torch.cat(rows).to(device) if rows else None,
        )

    def _publish(self, trainer: Trainer, evidence: Evidence, verdict: Verdict) -> None:
        gathered = self._gathered
        if gathered is None:
            raise RuntimeError("No evidence has been gathered; this is an error in lightning_unlearn.")
        total, reduce = len(gathered["label"]), sum_over_ranks(trainer.strategy)
        weight = evidence.weight.cpu()
        probability, suggestion = (
            place_by_index(evidence.index, weight, value.cpu(), total, reduce)
            for value in (verdict.clean_probability, verdict.suggested_label)
        )
        is_clean = probability >= self.threshold
        self._partition = Partition(
            clean_probability=probability.float().clamp(0, 1),
            is_clean=is_clean,
            suggested_label=torch.where(is_clean, gathered["label"], suggestion),
            noise_rate=1 - probability.double().mean().item(),
            label=gathered["label"],
            label_evidence=gathered["support_sum"] / (len(self._epochs_seen)),
            recipe=self.recipe.name,
            layer=str(self._point),
            epoch=trainer.current_epoch,
            warning=verdict.warning or _one_sided(is_clean, gathered["label"]),
        )
        self._gathered = None

    def _report(self, pl_module: LightningModule, seconds: float) -> None:
        partition = self.partition
        suspects = len(partition.suspect_indices())
        rank_zero_info(
            f"Partition after {partition.epoch} epochs ({partition.recipe}, {partition.layer}, {len(self._epochs_seen)}"
            f" evidence passes, the last {seconds:.1f} s): {suspects:,} of {len(partition):,} samples are suspect,"
            f" estimated noise rate {partition.noise_rate:.1%}."
        )
        if partition.warning:
            rank_zero_warn(f"The partition is not acted upon, training goes on with all the data: {partition.warning}.")
        log_values(
            pl_module,
            {"unlearn/noise_rate": partition.noise_rate, "unlearn/kept_share": 1 - suspects / len(partition)},
        )


def _check_same_size(before: int, now: int) -> None:
    if before != now:
        raise ValueError(
            f"Expected the {before} training samples of the evidence gathered so far, but the dataset now has {now};"
            " start again without the checkpoint, or give the data it was made with."
        )


def _check_same_data(before: Tensor, now: Tensor) -> None:
    _check_same_size(len(before), len(now))
    _check_same_labels(before, now)


def _check_same_labels(before: Tensor, now: Tensor) -> None:
    changed = int((before != now).sum())
    if changed:
        raise ValueError(
            f"Expected every dataset index to keep its label, but {changed} of {len(now)} changed since the last"
            " evidence pass; labels must be fixed per index, also where a fit is resumed."
        )


def _one_sided(is_clean: Tensor, label: Tensor) -> str:
    """Why a partition leaves too little to train on, or nothing out; else empty."""
    kept, total = int(is_clean.sum()), len(is_clean)
    if kept in (0, total):
        return f"it calls {'none' if kept == 0 else 'all'} of the {total} samples clean"
    before, after = label.bincount(), label[is_clean].bincount(minlength=int(label.max()) + 1)
    lost = ((before > 0) & (after == 0)).nonzero().flatten().tolist()
    return f"it keeps no sample of {'class' if len(lost) == 1 else 'the classes'} {str(lost)[1:-1]}" if lost else ""


def _warn_of_probabilities(logits: Tensor) -> None:
    if (logits >= 0).all() and ((logits.float().sum(dim=1) - 1).abs() < 1e-2).all():
        rank_zero_warn(
            "forward seems to return probabilities, whose differences say little where the model is sure; return logits"
            " (or log-probabilities) for a better partition."
        )
