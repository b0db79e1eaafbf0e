"""Small models and learnable data with planted wrong labels, for every test of the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.evidence import Evidence

CLASSES = 4
FEATURES = 16
NOISE = 0.25
MakeOptimizer = Callable[[L.LightningModule], Any]


class Blobs(Dataset[tuple[Tensor, Tensor]]):
    """Four Gaussian blobs, a known share of whose labels is wrong.

    Args:
        size: N.
        noise: share of wrong labels.
        image: samples of shape (2, 8, 8) instead of (16,).
        augment: ``"torch"`` or ``"numpy"``, noise from that global random state.
    """

    def __init__(
        self, size: int = 203, noise: float = NOISE, *, image: bool = False, augment: str = "", seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 8, 8) if image else (FEATURES,)
        # The centers are those of every seed: the test set is another draw from the same blobs.
        center = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(99)) * 2
        self.clean = torch.randint(0, CLASSES, (size,), generator=generator)
        self.x = center[self.clean] + torch.randn(size, *shape, generator=generator)
        self.wrong = torch.zeros(size, dtype=torch.bool)
        self.wrong[torch.randperm(size, generator=generator)[: int(noise * size)]] = True
        shift = torch.randint(1, CLASSES, (size,), generator=generator)
        self.y = torch.where(self.wrong, (self.clean + shift) % CLASSES, self.clean)
        self.augment = augment
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        x = self.x[index]
        if self.augment == "torch":
            x = x + 0.1 * torch.randn(x.shape)
        elif self.augment == "numpy":
            x = x + torch.from_numpy(np.random.normal(0, 0.1, x.shape)).float()  # noqa: NPY002 (the global one is meant)
        return x, self.y[index]


class BlobsData(L.LightningDataModule):
    """A DataModule over :class:`Blobs`.

    Args:
        train: the training set.
        by_epoch: shuffle as a function of the epoch, so that a resumed run compares with an uninterrupted one.
        loader: further arguments of the train loader.
    """

    def __init__(self, train: Blobs, *, by_epoch: bool = False, batch_size: int = 16, **loader: Any) -> None:
        super().__init__()
        self.train = train
        self.by_epoch = by_epoch
        self.batch_size = batch_size
        self.loader = {"shuffle": True, **loader}
        self.train_loaders_made = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.train_loaders_made += 1
        if self.by_epoch:
            sampler = DistributedSampler(self.train, num_replicas=1, rank=0, seed=1)
            return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)
        return DataLoader(self.train, batch_size=self.batch_size, **self.loader)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Blobs(32, 0, image=self.train.x.ndim == 4, seed=7), batch_size=16)


class QuickData(BlobsData):
    """In half as many steps, where how well the network learns is not the question."""

    def __init__(self, train: Blobs, *, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(train, batch_size=batch_size, **kwargs)


class Residual(nn.Module):
    """What feeds the head is a sum, so that no layer's rows are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 20)
        self.block = nn.Linear(20, 20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return self.head(h + self.block(h).relu())


class Swapped(nn.Module):
    """The attributes are in another order than the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(20, CLASSES)
        self.body = nn.Linear(FEATURES, 20)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def mlp(dropout: float = 0.0) -> nn.Sequential:
    """16 -> 32 -> 20 -> 4, with batch norms."""
    return nn.Sequential(
        nn.Linear(FEATURES, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(32, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Linear(20, CLASSES),
    )


def convnet(dropout: float = 0.0) -> nn.Sequential:
    """conv - norm - relu - pool - linear - relu - linear."""
    return nn.Sequential(
        nn.Conv2d(2, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(48, 20),
        nn.ReLU(inplace=True),
        nn.Linear(20, CLASSES),
    )


def sgd(module: L.LightningModule) -> torch.optim.Optimizer:
    """With momentum and weight decay, which both can revive what is pruned."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def adamw(module: L.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


class Toy(L.LightningModule):
    """A classifier that remembers what it was given.

    Args:
        net: the network; by default an MLP, initialized by a fixed seed.
        optimizer: makes what ``configure_optimizers`` returns.
        manual: optimize by hand.
    """

    def __init__(
        self, net: Callable[[], nn.Module] = mlp, optimizer: MakeOptimizer = sgd, *, manual: bool = False
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = net()
        self.make_optimizer = optimizer
        self.automatic_optimization = not manual
        self.steps = 0
        self.steps_by_epoch: dict[int, int] = {}
        self.validations_by_epoch: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor | None:
        self.steps += 1
        self.steps_by_epoch[self.current_epoch] = self.steps_by_epoch.get(self.current_epoch, 0) + 1
        x, y = batch
        loss = cross_entropy(self(x), y)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y))

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations_by_epoch[self.current_epoch] = self.validations_by_epoch.get(self.current_epoch, 0) + 1

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.make_optimizer(self)


class Plain(L.LightningModule):
    """The same network in a module of a team that has not heard of this package, without a ``forward``."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class IndexRecorder(L.Callback):
    """The dataset indices of every training batch, by epoch.

    Each sample of a :class:`Blobs` without augmentation is recognized by its content.
    """

    def __init__(self, data: Blobs) -> None:
        # Not the dict itself, in whose keys averages of the weights would be looked for.
        self.index_of = {row.numpy().tobytes(): index for index, row in enumerate(data.x)}.__getitem__
        self.by_epoch: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        indices = self.by_epoch.setdefault(trainer.current_epoch, [])
        indices.extend(self.index_of(row.numpy().tobytes()) for row in batch[0].cpu())


def make_trainer(callbacks: Sequence[Any] = (), **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on one CPU process."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 4,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def fit(module: Toy, data: Any, callbacks: Sequence[Any] = (), *, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    """Seeds, makes a Trainer and fits."""
    L.seed_everything(0, verbose=False)
    trainer = make_trainer(callbacks, **kwargs)
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def partition_callback(
    *args: Any,
    kind: type[AttributionPartitionCallback] = AttributionPartitionCallback,
    recipe: Any = "auto",
    min_change: float | None = None,
    evidence_from: Any = None,
    attribution_method: str | None = None,
    input_layer: str | None = None,
    min_class_fraction: float | None = None,
    **kwargs: Any,
) -> AttributionPartitionCallback:
    """The callback, with settings of its recipe beside its own."""
    recipe = get_recipe(
        recipe,
        evidence_from=evidence_from,
        attribution_method=attribution_method,
        input_layer=input_layer,
        min_class_fraction=min_class_fraction,
    )
    made = kind(*args, recipe=recipe, **kwargs)
    if min_change is not None:
        made.min_change = min_change
    return made


def finetune_callback(
    *args: Any,
    kind: type[CleanSubsetFinetuneCallback] = CleanSubsetFinetuneCallback,
    relabel_threshold: float | None = None,
    **kwargs: Any,
) -> CleanSubsetFinetuneCallback:
    """The callback, with what is an attribute of it beside its settings."""
    made = kind(*args, **kwargs)
    if relabel_threshold is not None:
        made.relabel_threshold = relabel_threshold
    return made


def trio(
    at_epoch: int = 2, *, prune: dict[str, Any] | None = None, finetune: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[AttributionPartitionCallback, SensitivityPruneCallback, CleanSubsetFinetuneCallback]:
    """The three callbacks."""
    return (
        partition_callback(at_epoch=at_epoch, **kwargs),
        SensitivityPruneCallback(**(prune or {})),
        finetune_callback(**(finetune or {})),
    )


def quick_trio(at_epoch: int = 2, **kwargs: Any) -> Any:
    """The three callbacks, where how wrong labels are found is not the question: by a recipe that takes no time."""
    return trio(at_epoch, **{"recipe": by_margin, **kwargs})


def by_margin(evidence: Evidence) -> Tensor:
    """A recipe of a user's own."""
    return evidence.aum.sigmoid()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, buffers included."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal, bit for bit if the tolerance is 0."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def auroc(score: Tensor, positive: Tensor) -> float:
    """The chance that a positive scores higher than a negative, by counting the pairs."""
    wins = score[positive].unsqueeze(1) - score[~positive].unsqueeze(0)
    return ((wins > 0).double() + 0.5 * (wins == 0).double()).mean().item()
