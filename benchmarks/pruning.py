"""What pruning is worth before fine-tuning: as cleaning (a), and as a choice of what to cut for a smaller network (b).

Each unit (data in a regime with a seed) trains a network on noisy labels once, in a folder ``runs/pruning/UNIT`` with a
file for every arm; each arm goes on from its checkpoint with a partition, its own way to prune, and the same
fine-tuning. Finished arms are kept. Nothing was chosen: all that was tried is told.

    python -m benchmarks.pruning                                       # seeds 1 to 3
    python -m benchmarks.pruning --tables-only --write benchmarks/results/pruning-cpu.md
    python -m benchmarks.pruning --fast --seeds 0                      # only to see that everything runs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.command import add_run_options, folder_of, run
from benchmarks.models import SmallClassifier, StopAfter, TrainOn
from benchmarks.projection import Project
from benchmarks.pruning_tables import tables
from benchmarks.runs import kept
from benchmarks.sources import DATA, Rows, as_it_is, digits, spoken_digits
from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    Partition,
    SensitivityPruneCallback,
    shrink,
)
from lightning_unlearn.functional.selection import in_order
from lightning_unlearn.noise import symmetric_labels
from lightning_unlearn.pruning.criteria import Criterion, NeuronStatistics, Random, Sensitivity
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.shrinking import measure

BASE, NONE, NONE_KEEP = "base", "no pruning", "no pruning, keep"


@dataclass(frozen=True)
class Kind:
    """A kind of data and its network.

    Args:
        layers: all that have neurons to prune.
        peak: epochs of the base until validation is about at its best.
        memorized: epochs until most wrong labels are predicted.
        repair: epochs on the subset.
        batch: samples per step.
        widths: of the hidden layers.
    """

    layers: tuple[str, ...]
    peak: int
    memorized: int
    repair: int
    batch: int
    widths: tuple[int, ...]


KINDS = {
    # Embeddings of CIFAR-10 by EfficientNet-Lite0, labels of people ("worse", 40 % wrong), and an MLP.
    "features": Kind(("body.0", "body.2"), 3, 20, 8, 128, (512, 256)),
    # Handwritten digits, 40 % of the labels replaced at random, and the demo's convolutional network.
    "digits": Kind(("body.0", "body.3", "body.8"), 8, 40, 20, 64, (32, 64, 128)),
    # Spectrograms of spoken digits, likewise.
    "spoken": Kind(("body.0.0", "body.1.0", "body.2.0", "body.5"), 8, 40, 12, 64, (16, 32, 64, 64)),
}
REGIMES = ("peak", "memorized")


class CleanTaylor(Criterion):
    """First-order Taylor importance for the clean samples, smallest first (Molchanov et al. 2017)."""

    needs_gradients = True

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Negative importance."""
        return -neurons.clean_gradient.total.abs()


@dataclass(frozen=True)
class Negligible(Sensitivity):
    """The neurons that tell least of p(clean), smallest coefficient first."""

    def order(self, found: Any, *, soft: bool) -> Tensor:
        """Live neurons."""
        return in_order(-found.coefficient.abs(), found.is_live)


HARMFUL = Sensitivity(fdr_level=None)
CRITERIA: dict[str, Criterion | str] = {
    "random": "random",
    "magnitude": "magnitude",
    "Taylor": CleanTaylor(),
    "sensitivity, harmful": HARMFUL,
    "sensitivity, negligible": Negligible(),
}
AMOUNTS = (0.3, 0.5)


@dataclass(frozen=True)
class Arm:
    """What is done between the partition and the fine-tuning.

    Args:
        prune: arguments of the pruning; None for none.
        everywhere: whether all layers are pruned; else the inputs of the head.
        project: whether weights are projected on the activations of sure samples.
        warm_start: of the fine-tuning.
        narrow: instead of all that, the share that a network has less of neurons from the start.
    """

    prune: dict[str, Any] | None = None
    everywhere: bool = False
    project: bool = False
    warm_start: str = "auto"
    narrow: float = 0.0


CLEANER: dict[str, Arm] = {
    NONE: Arm(),
    "pruning by default": Arm(prune={}),
    "pruning by default, all layers": Arm(prune={}, everywhere=True),
    "sensitivity .15, all layers": Arm(prune={"criterion": HARMFUL, "max_val_drop": None}, everywhere=True),
    "random .15, all layers": Arm(prune={"criterion": Random(1), "max_val_drop": None}, everywhere=True),
    "projection (SAP)": Arm(project=True),
    NONE_KEEP: Arm(warm_start="keep"),
    "projection (SAP), keep": Arm(project=True, warm_start="keep"),
    "sensitivity .15, all layers, keep": Arm(
        prune={"criterion": HARMFUL, "max_val_drop": None}, everywhere=True, warm_start="keep"
    ),
    "random .15, all layers, keep": Arm(
        prune={"criterion": Random(1), "max_val_drop": None}, everywhere=True, warm_start="keep"
    ),
}
SMALLER: dict[str, Arm] = {
    **{
        f"{name} {amount}": Arm(prune={"criterion": by, "max_val_drop": None, "amount": amount}, everywhere=True)
        for amount, (name, by) in product(AMOUNTS, CRITERIA.items())
    },
    **{f"narrow, retrained {amount}": Arm(narrow=amount) for amount in AMOUNTS},
}
ARMS = CLEANER | SMALLER


class Net(L.LightningModule):
    """A network that knows nothing of lightning_unlearn."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the given labels."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam, at a rate that stays."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def network(kind: str, narrow: float) -> Net:
    """A network, or one with fewer neurons in every hidden layer."""
    widths = [width - int(narrow * width) for width in KINDS[kind].widths]
    if kind == "features":
        layers = (nn.Linear(1280, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], 10))
        return Net(nn.Sequential(*layers))
    if kind == "digits":
        first, second, hidden = widths
        blocks = [layer for a, b in ((1, first), (first, second)) for layer in _block(a, b)]
        head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        return Net(nn.Sequential(*blocks, *head))
    small = SmallClassifier(1, tuple((width, True) for width in widths[:3]), hidden=widths[3], mirror=False)
    return Net(nn.Sequential(*small.blocks, nn.Flatten(), small.fc, nn.ReLU(), small.head))


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(frozen=True)
class Data:
    """Noisy data: x, given label and true label of the training part, x and given label to validate, and to test."""

    train: tuple[Tensor, Tensor]
    true_label: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(kind: str, seed: int, folder: Path) -> Data:
    """The data of a kind; which tenth validates, with labels as noisy, depends on the seed."""
    if kind == "features":
        file, labels = np.load(folder / "cifar_features.npz"), np.load(folder / "cifar10n.npz")
        x, test = (torch.from_numpy(file[part]).float() for part in ("train", "test"))
        given, true = (
            torch.from_numpy(labels[n][file["train_index"]]).long() for n in ("train_human_label", "train_label")
        )
        test_label = torch.from_numpy(labels["test_label"][file["test_index"]]).long()
    else:
        source = digits(seed) if kind == "digits" else spoken_digits(folder / "fsdd.zip")
        x, true, test, test_label = source.train, source.true_label, source.test, source.test_label
        given = symmetric_labels(true, 0.4, 10, seed=seed)
    center, scale = x.mean(), x.std()
    x, test = (x - center) / scale, (test - center) / scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    chosen, held = order[len(x) // 10 :], order[: len(x) // 10]
    return Data((x[chosen], given[chosen]), true[chosen], (x[held], given[held]), (test, test_label))


@dataclass
class PruningUnit:
    """Data of a kind in a regime with a seed, and its folder."""

    kind: str
    regime: str
    seed: int
    folder: Path
    source: Path
    fast: bool = False
    plan: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.plan = KINDS[self.kind]
        if self.fast:
            self.plan = replace(self.plan, peak=2, memorized=3, repair=2)

    @property
    def epochs(self) -> int:
        """Of the base."""
        return getattr(self.plan, self.regime)

    def settings(self) -> dict[str, Any]:
        """All that its results depend on."""
        return {"kind": self.kind, "regime": self.regime, "seed": self.seed, "plan": asdict(self.plan)}

    @cached_property
    def data(self) -> Data:
        """The data."""
        return load(self.kind, self.seed, self.source)

    def result(self, arm: str) -> dict[str, Any]:
        """What an arm came to, run now if it has not been."""
        name = {"kind": self.kind, "regime": self.regime, "seed": self.seed, "arm": arm}
        return kept(self.folder / f"{arm}.json", lambda: name | self._run(arm))

    def _run(self, arm: str) -> dict[str, Any]:
        if arm != BASE:
            self.result(BASE)
            _ = self._drawn  # before the seed is set, so that all arms draw alike
        L.seed_everything(self.seed, verbose=False)
        if arm == BASE:
            return self._base()
        return self._narrow(ARMS[arm].narrow) if ARMS[arm].narrow else self._repair(ARMS[arm])

    def _base(self) -> dict[str, Any]:
        save = ModelCheckpoint(
            self.folder, "base", every_n_epochs=self.epochs, save_top_k=-1, save_on_train_epoch_end=True,
            enable_version_counter=False,
        )  # fmt: skip
        callbacks = [*self._repairing(Arm())[1:], StopAfter(self.epochs), save]
        model = network(self.kind, 0)
        found = self._fit(model, callbacks, self.epochs + 1)
        (x, given), wrong = self.data.train, self.data.train[1] != self.data.true_label
        return found | {"memorized": _accuracy(model, x[wrong], given[wrong])}

    def _optimizer(self) -> Callable[[Any], torch.optim.Optimizer]:
        return partial(torch.optim.Adam, lr=3e-3)

    def _schedule(self) -> Callable[[Any], Any]:
        return partial(CosineAnnealingLR, T_max=self.plan.repair)

    @cached_property
    def _drawn(self) -> Partition:
        """The partition by the default recipe, drawn once and the same for all arms."""
        file = self.folder / "partition.pt"
        if not file.exists():
            partition = AttributionPartitionCallback(at_epoch=self.epochs)
            self._fit(network(self.kind, 0), [partition, StopAfter(self.epochs + 1)], self.epochs + 2, self._base_file)
            partition.partition.save(file)
        return Partition.load(file)

    def _told(self, evidence: Evidence) -> Tensor:
        drawn = self._drawn
        # By its own list of suspects, not by .5.
        p = drawn.clean_probability
        return p.where(drawn.is_clean == (p >= 0.5), 0.5 - 0.01 * (~drawn.is_clean).float())[evidence.index.cpu()]

    @property
    def _base_file(self) -> Path:
        return self.folder / "base.ckpt"

    def _repairing(self, arm: Arm) -> list[L.Callback]:
        recipe = self._told if self._base_file.exists() else "auto"
        partition = AttributionPartitionCallback(at_epoch=self.epochs, recipe=recipe)
        finetune = CleanSubsetFinetuneCallback(
            optimizer=self._optimizer(), lr_scheduler=self._schedule(), warm_start=arm.warm_start
        )
        between: list[L.Callback] = []
        if arm.prune is not None:
            layer = list(self.plan.layers) if arm.everywhere else None
            between = [SensitivityPruneCallback(layer, **arm.prune)]
        if arm.project:
            between = [Project(partition, *self.data.validation)]
        return [TrainOn(self._optimizer(), self._schedule()), partition, *between, finetune]

    def _repair(self, arm: Arm) -> dict[str, Any]:
        callbacks, model = self._repairing(arm), network(self.kind, 0)
        found = self._fit(model, callbacks, self.epochs + self.plan.repair, self._base_file)
        found["steps"] -= self.result(BASE)["steps"]
        partition = next(c for c in callbacks if isinstance(c, AttributionPartitionCallback)).partition
        found |= {"kept": len(partition.clean_indices()), "drawn": len(self._drawn.clean_indices()), "alpha": None}
        for callback in callbacks:
            if isinstance(callback, Project):
                found["alpha"] = callback.alpha
            if isinstance(callback, SensitivityPruneCallback):
                found["pruned"] = [len(mask.pruned_indices()) for mask in callback.masks] if callback.has_result else []
                # All criteria cut as many neurons, so one is measured.
                found |= self._smaller(model) if arm.prune.get("criterion") == "random" else {}
        return found

    def _smaller(self, model: Net) -> dict[str, Any]:
        """The network without its pruned neurons, what it costs beside the full one, and that it answers alike."""
        x, label = self.data.test
        small = shrink(model, x[:8])
        costs: dict[str, list[list[float]]] = {"full": [], "small": []}
        for _ in range(3):
            for name, net in (("full", model), ("small", small)):
                cost = measure(net, x[:64], repeats=11)
                costs[name].append([cost.parameters, cost.macs, cost.latency])
        medians = {
            name: torch.tensor(rows, dtype=torch.float64).median(dim=0).values.tolist() for name, rows in costs.items()
        }
        return {"small_accuracy": _accuracy(small, x, label), "costs": medians}

    def _narrow(self, share: float) -> dict[str, Any]:
        """A network of fewer neurons from new weights, on the kept samples for as many steps."""
        steps = self.result(NONE)["steps"]
        model, index = network(self.kind, share), self._drawn.clean_indices()
        epochs = -(-steps // len(self._loader(index)))
        plan = TrainOn(self._optimizer(), partial(CosineAnnealingLR, T_max=epochs))
        return self._fit(model, [plan], epochs, index=index)

    def _loader(self, index: Tensor | None = None) -> DataLoader[Any]:
        x, y = self.data.train
        rows = Rows(x, y) if index is None else Rows(x[index], y[index])
        return DataLoader(rows, self.plan.batch, shuffle=True, drop_last=True, collate_fn=as_it_is)

    def _fit(
        self,
        model: Net,
        callbacks: list[L.Callback],
        epochs: int,
        start: Path | None = None,
        index: Tensor | None = None,
    ) -> dict[str, Any]:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=callbacks, enable_checkpointing=saves, accelerator="cpu", devices=1, **quiet
        )
        validate = DataLoader(Rows(*self.data.validation), 500, collate_fn=as_it_is)
        trainer.fit(model, self._loader(index), validate, ckpt_path=start)
        return {"accuracy": _accuracy(model, *self.data.test), "steps": trainer.global_step}


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, label: Tensor) -> float:
    model.eval()
    answers = torch.cat([model(part).argmax(dim=1) for part in x.split(500)])
    return (answers == label).float().mean().item()


def main() -> None:
    """Runs what is asked for and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar_features.npz and fsdd.zip")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["digits", "features"])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--arms", nargs="+", choices=[BASE, *ARMS], default=[BASE, *ARMS], metavar="ARM")
    add_run_options(parser, seeds=[1, 2, 3])
    args = parser.parse_args()
    out = folder_of(args, "pruning")
    units = [
        PruningUnit(kind, regime, seed, out / f"{kind}-{regime}-{seed}", args.data, args.fast)
        for seed, kind, regime in product(args.seeds, args.kinds, args.regimes)
    ]
    packages = ("torch-pruning",)
    run(args, "benchmarks.pruning", units, args.arms, needed=(BASE, NONE), tables=tables, packages=packages)


if __name__ == "__main__":
    main()
