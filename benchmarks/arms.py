"""The ways to go on from a network that was trained on noise, and the ways to do without it.

A unit is a case in a regime with a seed. Its base is trained once, in a fit that gathers evidence; what fine-tunes goes
on from its checkpoint, and so does "continue", with the optimizer, the schedule and the number of steps that F-FT had.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader

from benchmarks.cases import Case, Noisy, make
from benchmarks.elr import regularize_early_learning
from benchmarks.measures import quality
from benchmarks.models import StopAfter, TrainOn, move_towards, train_with
from benchmarks.plans import (
    BASE,
    CE,
    CEILING,
    CLEAN,
    CLEANLAB,
    CONTROLS,
    DEFAULT,
    ELR,
    FFT,
    FRESH,
    REPAIRS,
    RETRAIN,
    RETRAIN_DEFAULT,
    RETRAIN_SHORT,
    SHRINK_ALL,
    SHRINK_TO,
    STEPS_OF,
    Plan,
    Repair,
    plan_of,
)
from benchmarks.runs import fast_precision, kept
from benchmarks.sources import Rows, as_it_is
from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    Partition,
    SensitivityPruneCallback,
)
from lightning_unlearn.demo.phases import make_trainer
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.evidence import Evidence


class Unit:
    """A case in a regime with a seed, and its folder.

    Args:
        case: which.
        regime: ``"fresh"`` or ``"memorized"``.
        seed: of data, noise, weights and order.
        folder: where checkpoint, partition and results are kept.
        data: folder with ``cifar10n.npz`` and ``fsdd.zip``.
        accelerator: of the Trainer.
        fast: only to see that everything runs: 500 samples and few epochs.
        plan: how the networks are trained; None for the one of the case and regime.
    """

    def __init__(  # noqa: PLR0913  (what its results depend on)
        self,
        case: Case,
        regime: str,
        seed: int,
        *,
        folder: Path,
        data: Path,
        accelerator: str,
        fast: bool,
        plan: Plan | None = None,
    ) -> None:
        self.case, self.regime, self.seed = case, regime, seed
        self.folder, self.source, self.accelerator, self.fast = folder, data, accelerator, fast
        self.plan = plan_of(case, regime, fast=fast) if plan is None else plan

    def settings(self) -> dict[str, Any]:
        """All that its results depend on."""
        return {"case": asdict(self.case), "plan": asdict(self.plan), "seed": self.seed, "fast": self.fast}

    def run(self, arm: str) -> dict[str, Any]:
        """What an arm comes to: test accuracy, seconds, steps and what else is worth knowing."""
        if arm == RETRAIN_DEFAULT:
            self.result(DEFAULT)
        elif arm not in (BASE, CLEANLAB, CE, ELR, DEFAULT, CLEAN):
            self.result(BASE)
        if arm in CONTROLS or arm in STEPS_OF:
            self.result(STEPS_OF.get(arm, FFT))
        L.seed_everything(self.seed, verbose=False)
        if arm in REPAIRS:
            return self._resume(arm)
        if arm in STEPS_OF:
            return self._continue(self.result(STEPS_OF[arm])["steps"])
        return {
            BASE: self._base,
            RETRAIN: self._retrain,
            RETRAIN_SHORT: lambda: self._like_fine_tuning(self._network(), self._kept),
            CEILING: lambda: self._like_fine_tuning(self._network(), (~self.bad).nonzero().squeeze(1)),
            SHRINK_ALL: lambda: self._like_fine_tuning(self._shrunk()),
            CLEANLAB: self._cleanlab,
            CE: self._cross_entropy,
            ELR: self._elr,
            DEFAULT: self._by_default,
            RETRAIN_DEFAULT: lambda: self._cross_entropy(self._kept_of("partition-default.pt")),
            CLEAN: lambda: self._cross_entropy((~self.bad).nonzero().squeeze(1)),
        }[arm]()

    def result(self, arm: str) -> dict[str, Any]:
        """What an arm came to, run now if it has not been."""
        name = {"case": self.case.name, "regime": self.regime, "seed": self.seed, "arm": arm}
        return kept(self.folder / f"{arm}.json", lambda: name | self.run(arm), self.accelerator)

    @cached_property
    def data(self) -> Noisy:
        """The data of the case."""
        data = make(self.case, self.seed, self.source)
        if not self.fast:
            return data
        # A stride, since the spoken digits come in order.
        few = slice(None, None, max(1, len(data.train) // 500))
        names = ("train", "given_label", "true_label", "wrong_label", "corrupted")
        return replace(data, **{name: getattr(data, name)[few] for name in names})

    @property
    def bad(self) -> Tensor:
        """(N,) bool, the truth: what is better not trained on."""
        return self.data.wrong_label | self.data.corrupted

    @property
    def checkpoint(self) -> Path:
        """Of the base, after its last epoch."""
        return self.folder / "base.ckpt"

    def _base(self) -> dict[str, Any]:
        plan, loader = self.plan, self._loader()
        model = self._base_network()
        keep = ModelCheckpoint(
            self.folder,
            filename="base",
            every_n_epochs=plan.base_epochs,
            save_top_k=-1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        partition, finetune = AttributionPartitionCallback(at_epoch=plan.base_epochs), CleanSubsetFinetuneCallback()
        # The fine-tuning does nothing yet, but the checkpoint has the weights that it may move back to.
        callbacks = [partition, finetune, StopAfter(plan.base_epochs), keep]
        # One epoch more than is run, since the partition wants to have one left after it.
        found = self._fit(model, loader, callbacks, plan.base_epochs + 1)
        return found | {"memorized": self._memorized(model), "samples": len(self.data.train)}

    def _resume(self, arm: str) -> dict[str, Any]:
        repair, plan = REPAIRS[arm], self.plan
        partition = self._partitioner(repair)
        decay = partial(CosineAnnealingLR, T_max=plan.repair_epochs)
        finetune = CleanSubsetFinetuneCallback(
            repair.mode,
            on_noisy=repair.on_noisy,
            warm_start=repair.warm_start,
            optimizer=plan.optimizer,
            lr_scheduler=decay,
        )
        prune = None if repair.prune is None else SensitivityPruneCallback(**repair.prune)
        callbacks = [TrainOn(plan.optimizer, decay), partition, *([] if prune is None else [prune]), finetune]
        last = plan.base_epochs + plan.repair_epochs
        found = self._fit(self._base_network(), self._loader(), callbacks, last, resume=True)
        if arm == FFT:
            partition.partition.save(self.folder / "partition.pt")
        pruned = 0 if prune is None or not prune.has_result else sum(len(m.pruned_indices()) for m in prune.masks)
        quality = self._quality(partition.partition)
        return found | {"acted": finetune.is_active, "pruned": pruned, "partition": quality}

    def _partitioner(self, repair: Repair) -> AttributionPartitionCallback:
        plan, bad = self.plan, self.bad

        def truth(evidence: Evidence) -> Tensor:
            return (~bad).float()[evidence.index.cpu()].to(evidence.label.device)

        options: dict[str, Any] = {"at_epoch": plan.base_epochs}
        if repair.rounds:
            options["every_n_epochs"] = max(1, plan.repair_epochs // 3)
        if repair.knows_truth:
            options["recipe"] = get_recipe(truth, min_class_fraction=0.0)
        return AttributionPartitionCallback(**options)

    def _continue(self, steps: int) -> dict[str, Any]:
        """All the data, with the optimizer and the steps of another arm: only the data differ."""
        model = self._network()
        model.load_state_dict(self._base_weights())
        return self._like_fine_tuning(model, steps=steps)

    def _like_fine_tuning(
        self, model: L.LightningModule, index: Tensor | None = None, steps: int | None = None
    ) -> dict[str, Any]:
        """With the optimizer and the schedule of F-FT, and as many steps unless it says otherwise."""
        steps = self.result(FFT)["steps"] if steps is None else steps
        loader = self._loader(index)
        epochs = -(-steps // len(loader))
        train_with(model, self.plan.optimizer, partial(CosineAnnealingLR, T_max=epochs), "epoch")
        return self._fit(model, loader, [], epochs, steps=steps)

    def _base_weights(self) -> dict[str, Tensor]:
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)["state_dict"]  # type: ignore[no-any-return]

    def _shrunk(self) -> L.LightningModule:
        """The base, most of the way back to the weights that its fit began with: the seed has just been set again."""
        model = self._network()
        move_towards(model, self._base_weights(), SHRINK_TO, (x for x, _ in self._loader()))
        return model

    @property
    def _kept(self) -> Tensor:
        return self._kept_of("partition.pt")

    def _kept_of(self, file: str) -> Tensor:
        return Partition.load(self.folder / file).clean_indices()

    def _cleanlab(self) -> dict[str, Any]:
        """What cleanlab leaves by probabilities of five networks that have not seen the sample, retrained in full."""
        from benchmarks.peers import FOLDS, cleanlab_on, predictions

        started = time.perf_counter(), time.process_time()
        fresh, total = plan_of(self.case, FRESH, fast=self.fast), len(self.data.train)
        fold = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)) % FOLDS
        rows: list[tuple[Tensor, Tensor]] = []
        for k in range(FOLDS):
            model, loader = self._network(), self._loader((fold != k).nonzero().squeeze(1))
            train_with(model, fresh.base_optimizer, None, "epoch")
            trainer = self._trainer(fresh.base_epochs, [], -1)
            trainer.fit(model, loader)
            rows.append(((fold == k).nonzero().squeeze(1), predictions(trainer, model, self.data.train[fold == k])))
        probability = torch.cat([said for _, said in rows]).softmax(dim=1)[torch.cat([i for i, _ in rows]).argsort()]
        left = ~cleanlab_on(self.data.given_label, probability)["flagged"]
        before = {"seconds": time.perf_counter() - started[0], "process_seconds": time.process_time() - started[1]}
        found = self._retrain(left.nonzero().squeeze(1))
        return found | {name: found[name] + taken for name, taken in before.items()}

    def _retrain(self, index: Tensor | None = None) -> dict[str, Any]:
        """The kept subset, from new weights, for as many epochs as the base had."""
        loader = self._loader(self._kept if index is None else index)
        epochs = self.plan.base_epochs
        return self._fit(self._one_cycle(loader, epochs), loader, [], epochs)

    @property
    def _alone_epochs(self) -> int:
        return self.plan.alone_epochs or self.plan.base_epochs

    def _cross_entropy(self, index: Tensor | None = None) -> dict[str, Any]:
        """All the data, or some of them, from new weights, with a learning rate that falls to zero."""
        loader = self._loader(index)
        return self._fit(self._one_cycle(loader, self._alone_epochs), loader, [], self._alone_epochs)

    def _by_default(self) -> dict[str, Any]:
        """The same fit with the callbacks that need no setting."""
        loader, partition, finetune = self._loader(), AttributionPartitionCallback(), CleanSubsetFinetuneCallback()
        callbacks = [partition, finetune]
        found = self._fit(self._one_cycle(loader, self._alone_epochs), loader, callbacks, self._alone_epochs)
        partition.partition.save(self.folder / "partition-default.pt")
        told = {"acted": finetune.is_active, "partition_epoch": partition.partition.epoch}
        return found | told | {"partition": self._quality(partition.partition)}

    def _elr(self) -> dict[str, Any]:
        """The same, regularized."""
        total = len(self.data.train)
        loader = self._loader(label=torch.stack([self.data.given_label, torch.arange(total)], dim=1))
        model = self._one_cycle(loader, self._alone_epochs)
        regularize_early_learning(model, total, int(self.data.given_label.max()) + 1)
        return self._fit(model, loader, [], self._alone_epochs)

    def _loader(self, index: Tensor | None = None, label: Tensor | None = None) -> DataLoader[Any]:
        index = torch.arange(len(self.data.train)) if index is None else index
        if len(index) % self.case.batch == 1:
            index = index[:-1]  # batch norm cannot be trained on one sample
        label = self.data.given_label if label is None else label
        rows = self._rows(self.data.train[index], label[index])
        return DataLoader(rows, self.case.batch, shuffle=True, collate_fn=as_it_is)

    def _rows(self, x: Tensor, y: Tensor) -> Rows:
        """Rows where the network is: a large GPU would wait for those of the CPU."""
        device = torch.device("cpu" if self.accelerator == "cpu" else "cuda")
        return Rows(x.to(device), y.to(device))

    def _network(self) -> L.LightningModule:
        model = self.case.network().to(memory_format=torch.channels_last)
        model.hparams["mirror"] = self.plan.mirror
        return model

    def _base_network(self) -> L.LightningModule:
        model, plan = self._network(), self.plan
        schedule = self._cycle(self._loader(), plan.base_lr, plan.base_epochs) if plan.base_decays else None
        train_with(model, plan.base_optimizer, schedule, "step")
        return model

    def _one_cycle(self, loader: DataLoader[Any], epochs: int) -> L.LightningModule:
        model = self._network()
        train_with(model, self.plan.optimizer, self._cycle(loader, self.plan.lr, epochs), "step")
        return model

    def _cycle(self, loader: DataLoader[Any], lr: float, epochs: int) -> Callable[[Any], Any]:
        return partial(OneCycleLR, max_lr=lr, total_steps=epochs * len(loader))

    def _trainer(self, epochs: int, callbacks: list[L.Callback], steps: int) -> L.Trainer:
        precision = fast_precision(self.plan.precision, self.accelerator)
        return make_trainer(epochs, callbacks, steps, accelerator=self.accelerator, precision=precision)

    def _fit(
        self,
        model: L.LightningModule,
        loader: DataLoader[Any],
        callbacks: list[L.Callback],
        epochs: int,
        *,
        steps: int = -1,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Trains and tests; of a fit that is resumed, seconds and steps are those after the base."""
        trainer = self._trainer(epochs, callbacks, steps)
        started = time.perf_counter(), time.process_time()
        # Only for who partitions: whoever does without needs none.
        held = self.data.validation if callbacks else None
        values = None if held is None else DataLoader(self._rows(*held), 500, collate_fn=as_it_is)
        trainer.fit(model, loader, values, ckpt_path=self.checkpoint if resume else None)
        seconds = {"seconds": time.perf_counter() - started[0], "process_seconds": time.process_time() - started[1]}
        taken = trainer.global_step - (self.result(BASE)["steps"] if resume else 0)
        tests = DataLoader(self._rows(self.data.test, self.data.test_label), 500, collate_fn=as_it_is)
        accuracy = self._trainer(1, [], -1).test(model, tests, verbose=False)[0]["test_acc"]
        return {"accuracy": accuracy, **seconds, "steps": taken}

    @torch.no_grad()
    def _memorized(self, model: L.LightningModule) -> float | None:
        """The share of the wrong labels that the network predicts."""
        wrong = self.data.wrong_label
        if not wrong.any():
            return None
        model.to(model.trainer.strategy.root_device).eval()  # a fit leaves it on the CPU
        answers = [model(part.to(model.device)).argmax(dim=1).cpu() for part in self.data.train[wrong].split(500)]
        return (torch.cat(answers) == self.data.given_label[wrong]).float().mean().item()

    def _quality(self, partition: Partition) -> dict[str, Any]:
        """How good the partition is, judged with the truth that it never saw."""
        of_wrong = ~partition.is_clean & self.data.wrong_label
        right = (partition.suggested_label == self.data.true_label)[of_wrong]
        suggested_right = right.float().mean().item() if len(right) else None
        return quality(partition, self.bad) | {"suggested_right": suggested_right}
