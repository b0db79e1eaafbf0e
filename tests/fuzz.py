"""Random fits: a model, data, a loader, the callbacks' options and the Trainer's flags, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, RandomSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.attribution import ATTRIBUTION_METHODS
from lightning_unlearn.pruning.criteria import CRITERIA, Sensitivity
from lightning_unlearn.recipes import RECIPES
from tests.toys import by_margin, finetune_callback, partition_callback

# So many numbers of a sample are never augmented, and tell which it is.
KEY = 6


class Boom(Exception):
    """What a user's code may raise."""


class Bomb:
    """Raises when it has been asked so many times at one place; never where there is no such place."""

    def __init__(self, place: str = "", count: int = 0) -> None:
        self.place, self.left, self.has_gone_off = place, count, False

    def tick(self, place: str) -> None:
        if place != self.place:
            return
        self.left -= 1
        if self.left < 0:
            self.has_gone_off = True
            raise Boom(place)


class Pair(NamedTuple):
    inputs: Tensor
    target: Tensor


def form(kind: str, x: Any, y: Any) -> Any:
    """A sample, or a batch, of one of the kinds."""
    if kind == "dict":
        return {"inputs": x, "target": y}
    return Pair(x, y) if kind == "named tuple" else [x, y] if kind == "list" else (x, y)


def xy(batch: Any) -> tuple[Any, Tensor]:
    """Of a batch of any kind."""
    return (batch["inputs"], batch["target"]) if isinstance(batch, dict) else (batch[0], batch[1])


class Samples(Dataset[Any]):
    """Gaussian blobs with planted wrong labels; a class may be missing."""

    def __init__(self, case: Case, size: int, seed: int, bomb: Bomb | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        present = torch.tensor(case.present)
        center = 2 * torch.randn(case.classes, *case.shape, generator=torch.Generator().manual_seed(case.seed))
        clean = present[torch.randint(0, len(present), (size,), generator=generator)]
        self.x = center[clean] + torch.randn(size, *case.shape, generator=generator)
        wrong = torch.rand(size, generator=generator) < case.noise
        y = torch.where(wrong, present[torch.randint(0, len(present), (size,), generator=generator)], clean)
        self.label, self.given = y, y
        if case.kind == "one-hot":
            self.given = one_hot(y, case.classes).float()
        elif case.kind == "binary":
            self.given = y.float().unsqueeze(1)
        elif case.kind == "multi-label":
            self.label = one_hot(y, case.classes) | one_hot(clean, case.classes)
            self.given = self.label.float()
        elif case.kind == "ignored":
            self.given = torch.where(torch.rand(size, generator=generator) < 0.1, -100, y)
            self.label = torch.where(self.given < 0, -1, y)
        self.case, self.bomb = case, bomb or Bomb()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.bomb.tick("dataset")
        x, y = self.x[index], self.given[index]
        if self.case.augments:
            x = x.clone()
            x.view(-1)[KEY:] += 0.1 * torch.randn(x.numel() - KEY)
        return form(self.case.batch, x, int(y) if self.case.plain_int and y.ndim == 0 else y)


def keys(x: Tensor) -> list[bytes]:
    """What tells samples apart in every precision."""
    return [row.flatten()[:KEY].to(torch.bfloat16).float().numpy().tobytes() for row in x.detach().cpu()]


class Stack(nn.Module):
    """Features, a residual block that may add in place, a head; maybe with a layer that is never called."""

    def __init__(self, stem: nn.Module, width: int, classes: int, kind: str, bias: bool) -> None:
        super().__init__()
        self.stem = stem
        self.kind = kind
        if kind != "plain":
            self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.unused = nn.Linear(2, 3)
        self.head = nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.kind == "residual":
            h = h + self.block(h)
        elif self.kind == "residual in place":
            out = self.block(h)
            out += h
            h = out.relu_()
        return self.head(h)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    partial(nn.ReLU, inplace=True),
    nn.GELU,
    nn.Tanh,
    partial(nn.LeakyReLU, inplace=True),
    partial(nn.SiLU, inplace=True),
]


def norm_of(kind: str, size: int, *, image: bool) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(size) if image else nn.BatchNorm1d(size)]
    if kind == "other":
        return [nn.GroupNorm(1, size) if image else nn.LayerNorm(size)]
    return []


def draw_net(rng: random.Random, shape: tuple[int, ...], classes: int) -> tuple[Callable[[], nn.Module], str]:
    """What makes the network, and what it is."""
    act, drop = rng.choice(ACTIVATIONS), rng.choice([0.0, 0.0, 0.3])
    norm = rng.choice(["none", "none", "batch", "other"])
    width, hidden = rng.choice([8, 16, 24]), rng.choice([7, 12])
    kind = rng.choice(["plain", "plain", "residual", "residual in place"])
    depth, bias, pool = rng.choice([0, 1, 2, 2]), rng.random() < 0.8, rng.choice([1, 2])

    def convolutions() -> list[nn.Module]:
        layers = [nn.Conv2d(shape[0], hidden, 3, padding=1), *norm_of(norm, hidden, image=True), act()]
        if depth == 2:
            layers += [nn.Conv2d(hidden, width, 3), *norm_of(norm, width, image=True), act()]
        out = width if depth == 2 else hidden
        return [*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(out * pool**2, width), act()]

    def linears() -> list[nn.Module]:
        sizes = [shape[0], width] if depth == 1 else [shape[0], hidden, width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), *norm_of(norm, after, image=False), act(), nn.Dropout(drop)]
        return layers

    def make() -> nn.Module:
        if depth == 0 and len(shape) == 1:
            return Stack(nn.Identity(), shape[0], classes, "plain", bias)
        layers = convolutions() if len(shape) == 3 else linears()
        return Stack(nn.Sequential(*layers), width, classes, kind, bias)

    return (
        make,
        f"{'conv' if len(shape) == 3 else 'mlp'} depth {depth} {kind} {act} norm={norm} drop={drop} width={width}",
    )


def draw_optimizer(rng: random.Random) -> tuple[str, str]:
    """Names of an optimizer and of a schedule."""
    return rng.choice(["sgd"] * 5 + ["adam", "adam", "adamw", "rmsprop", "lbfgs"]), rng.choice(
        ["none", "none", "step", "one cycle", "plateau", "restarts"]
    )


def optimizer_of(module: L.LightningModule, optimizer: str, schedule: str) -> Any:
    parameters = [p for p in module.parameters() if p.requires_grad]
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
        "adam": partial(torch.optim.Adam, lr=0.01),
        "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        "rmsprop": partial(torch.optim.RMSprop, lr=0.003, momentum=0.5),
        "lbfgs": partial(torch.optim.LBFGS, lr=0.05, max_iter=2),
    }
    made = make[optimizer](parameters)
    if schedule == "step":
        return {"optimizer": made, "lr_scheduler": lr_scheduler.StepLR(made, 1, gamma=0.5)}
    if schedule == "one cycle":
        steps = int(module.trainer.estimated_stepping_batches)
        cycle = lr_scheduler.OneCycleLR(made, max_lr=0.05, total_steps=max(2, steps), cycle_momentum=False)
        return {"optimizer": made, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
    if schedule == "plateau":
        plateau = lr_scheduler.ReduceLROnPlateau(made, patience=0)
        return {"optimizer": made, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}
    if schedule == "restarts":
        restarts = lr_scheduler.CosineAnnealingWarmRestarts(made, T_0=2)
        return {"optimizer": made, "lr_scheduler": {"scheduler": restarts, "interval": "step"}}
    return made


class Model(L.LightningModule):
    """A classifier as users write it."""

    def __init__(self, case: Case, bomb: Bomb) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            self.net = case.net()
        if case.frozen:
            for parameter in self.net.stem.parameters():
                parameter.requires_grad_(False)
        if case.eval_part:
            self.net.stem.eval()
        self.case, self.bomb = case, bomb
        self.automatic_optimization = not case.manual

    def forward(self, x: Tensor) -> Any:
        self.bomb.tick("forward")
        logits = self.net(x)
        return {"logits": logits} if self.case.returns_dict else logits

    def _loss(self, batch: Any) -> Tensor:
        x, y = xy(batch)
        logits = self(x)["logits"] if self.case.returns_dict else self(x)
        if self.case.kind in ("binary", "multi-label"):
            return binary_cross_entropy_with_logits(logits, y)
        return cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.bomb.tick("training step")
        loss = self._loss(batch)
        self.log("train_loss", loss.detach(), on_epoch=True)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.bomb.tick("validation step")
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return optimizer_of(self, self.case.optimizer, self.case.schedule)


class Data(L.LightningDataModule):
    def __init__(self, train: DataLoader[Any], val: DataLoader[Any] | None) -> None:
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train

    def val_dataloader(self) -> Any:
        return [] if self.val is None else self.val


class Halves(BatchSampler):
    """A batch sampler of the user's own."""


@dataclass
class Case:
    """One fit."""

    seed: int
    classes: int = 0
    present: list[int] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    size: int = 0
    noise: float = 0.0
    augments: bool = False
    kind: str = "index"
    plain_int: bool = False
    batch: str = "tuple"
    wrap: str = "plain"
    loader: dict[str, Any] = field(default_factory=dict)
    sampler: str = "plain"
    has_validation: bool = True
    as_module: bool = False
    net: Any = field(default=None, repr=False)
    net_is: str = ""
    frozen: bool = False
    eval_part: bool = False
    returns_dict: bool = False
    manual: bool = False
    optimizer: str = ""
    schedule: str = ""
    partition: dict[str, Any] = field(default_factory=dict)
    prune: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    bomb: tuple[str, int] = ("", 0)
    compares: bool = False

    def datasets(self, bomb: Bomb) -> tuple[Dataset[Any], Tensor, Tensor]:
        """The training set, and (N, ...) what its samples are and (N,) or (N, L) their labels."""
        whole = Samples(self, self.size, self.seed, bomb)
        if self.wrap == "concat":
            half = Samples(self, max(1, self.size // 2), self.seed + 1, bomb)
            return ConcatDataset([whole, half]), torch.cat([whole.x, half.x]), torch.cat([whole.label, half.label])
        if self.wrap == "subset":
            some = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed))[: self.size - 2]
            return Subset(whole, some.tolist()), whole.x[some], whole.label[some]
        return whole, whole.x, whole.label

    def train_loader(self, dataset: Any) -> DataLoader[Any]:
        size = self.loader["batch_size"]
        if self.sampler == "distributed":
            sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=self.seed)
            return DataLoader(dataset, batch_size=size, sampler=sampler, drop_last=self.loader.get("drop_last", False))
        if self.sampler == "own batches":
            return DataLoader(dataset, batch_sampler=Halves(RandomSampler(dataset), size, False))
        return DataLoader(dataset, **self.loader)

    def val_loader(self) -> DataLoader[Any] | None:
        return DataLoader(Samples(self, 12, self.seed + 2), batch_size=8) if self.has_validation else None

    def callbacks(self) -> tuple[Any, Any, Any]:
        """The three; None for one that is left out."""
        return (
            partition_callback(**self.partition),
            None if self.prune is None else SensitivityPruneCallback(**self.prune),
            None if self.finetune is None else finetune_callback(**self.finetune),
        )

    def others(self) -> list[L.Callback]:
        """Callbacks of Lightning's own."""
        made: list[L.Callback] = []
        if "early stopping" in self.beside:
            made.append(EarlyStopping("train_loss", patience=1, check_on_train_epoch_end=True))
        if "swa" in self.beside:
            made.append(StochasticWeightAveraging(0.01, swa_epoch_start=1))
        if "lr monitor" in self.beside:
            made.append(LearningRateMonitor())
        return made


def draw_layer(rng: random.Random, case: Case) -> str:
    """A dotted path that a user may name; rarely one that does not exist, or is nothing that can be asked for."""
    modules = dict(case.net().named_modules())
    if rng.random() < 0.1:
        return f"net.{rng.choice([name for name in modules if name] + ['missing'])}"
    usual = [name for name, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d)) and name != "unused"]
    return f"net.{rng.choice([name for name in usual if name != 'head'] or ['head'])}"


def some(rng: random.Random, options: dict[str, Callable[[], Any]], share: float) -> dict[str, Any]:
    """Some of the options, each with a value."""
    return {name: draw() for name, draw in options.items() if rng.random() < share}


def draw_partition(rng: random.Random, case: Case) -> dict[str, Any]:
    drawn: dict[str, Any] = {"at_epoch": rng.choice([1, 1, 2])}
    drawn |= some(
        rng,
        {
            "recipe": lambda: rng.choice([*RECIPES, by_margin, by_margin, by_margin]),
            "evidence_from": lambda: rng.choice(["train_steps", "eval_passes", "eval_passes"]),
            "every_n_epochs": lambda: rng.choice([1, 2]),
            "min_change": lambda: rng.choice([0.0, 0.3]),
            "suspect_precision": lambda: rng.choice([0.5, 0.85, 0.99]),
            "min_class_fraction": lambda: rng.choice([0.0, 0.1, 0.5]),
        },
        0.5,
    )
    drawn |= some(
        rng,
        {
            "dry_run": lambda: True,
            "layer": lambda: draw_layer(rng, case),
            "input_layer": lambda: draw_layer(rng, case),
            "attribution_method": lambda: rng.choice(list(ATTRIBUTION_METHODS)),
        },
        0.1,
    )
    if rng.random() < 0.3:
        drawn["data"] = {"batch_to_xy": xy}
    if case.kind == "multi-label":
        # The first batch may have a single 1 in each row, as one-hot labels have.
        drawn["data"] = {**drawn.get("data", {}), "task": "multilabel"}
    return drawn


def draw_prune(rng: random.Random, case: Case) -> dict[str, Any]:
    drawn = some(
        rng,
        {
            "criterion": lambda: rng.choice([*CRITERIA, Sensitivity(None, 0.1), Sensitivity(0.5, 0.0)]),
            "max_val_drop": lambda: rng.choice([None, None, None, None, 0.01]),
        },
        0.7,
    )
    drawn |= some(
        rng,
        {
            "amount": lambda: rng.choice([0.15, 0.3, 0.3, 0.9]),
            "max_val_drop": lambda: rng.choice([0.0, 0.5]),
        },
        0.4,
    )
    if rng.random() < 0.3:
        one, other = draw_layer(rng, case), draw_layer(rng, case)
        drawn["layer"] = [one, other] if one != other and rng.random() < 0.5 else one
    return drawn


def draw_finetune(rng: random.Random, case: Case) -> dict[str, Any]:
    drawn: dict[str, Any] = {"on_noisy": rng.choice(["drop", "drop", "reweight", "relabel"])}
    if rng.random() < 0.3:
        drawn["mode"] = "layers"
        if case.prune is None or rng.random() < 0.5:
            drawn["layers"] = sorted({draw_layer(rng, case), "net.head"})
    drawn |= some(rng, {"relabel_threshold": lambda: rng.choice([0.1, 1.0])}, 0.2)
    optimizers: list[dict[str, Any]] = [
        {},
        {},
        {"lr": 0.01},
        {"optimizer": "restart"},
        {"optimizer": partial(torch.optim.Adam, lr=0.01)},
        {"lr": 0.1, "lr_scheduler": partial(lr_scheduler.ExponentialLR, gamma=0.9)},
    ]
    return drawn | rng.choice(optimizers)


def draw_trainer(rng: random.Random, case: Case) -> dict[str, Any]:
    epochs = case.partition["at_epoch"] + rng.choice([1, 1, 2])
    drawn: dict[str, Any] = {"max_epochs": epochs if rng.random() < 0.97 else 1}
    drawn |= some(
        rng,
        {
            "accumulate_grad_batches": lambda: rng.choice([2, 3]),
            "gradient_clip_val": lambda: 0.5,
            "gradient_clip_algorithm": lambda: rng.choice(["norm", "value"]),
            "precision": lambda: rng.choice(["bf16-mixed", "bf16-true", "64-true"]),
            "limit_train_batches": lambda: rng.choice([1, 2, 3, 0.5, 0.9]),
            "limit_val_batches": lambda: rng.choice([0, 1, 0.5]),
            "val_check_interval": lambda: rng.choice([1, 2, 0.5]),
            "check_val_every_n_epoch": lambda: rng.choice([1, 2]),
            "num_sanity_val_steps": lambda: rng.choice([0, -1]),
            "max_steps": lambda: rng.choice([3, 7, 20]),
            "reload_dataloaders_every_n_epochs": lambda: 1,
            "fast_dev_run": lambda: rng.choice([False, False, True, 2]),
            "detect_anomaly": lambda: True,
            "deterministic": lambda: True,
            "barebones": lambda: rng.random() < 0.2,
        },
        0.13,
    )
    if case.manual:
        for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
            drawn.pop(name, None)
    return drawn


def draw_data(rng: random.Random, case: Case) -> None:
    case.classes = rng.choice([2, 2, 3, 4, 6])
    every = list(range(case.classes))
    case.present = (
        every if rng.random() < 0.8 else sorted(rng.sample(every, rng.randint(min(2, case.classes), case.classes)))
    )
    if rng.random() < 0.02:
        case.present = every[-1:]
    case.shape = rng.choice([(8,), (8,), (1, 6, 6)])
    case.size = rng.choice([12, 13, 17, 32, 33, 64, 65, 120]) if rng.random() < 0.97 else 5
    case.noise = rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])
    case.augments = rng.random() < 0.15
    case.plain_int = rng.random() < 0.2
    case.batch = rng.choice(["tuple", "tuple", "list", "named tuple", "dict"])
    case.wrap = rng.choice(["plain", "plain", "subset", "concat"])
    case.loader = {"batch_size": rng.choice([1, 4, 8, 16, 32, 500]), "shuffle": rng.random() < 0.8}
    if case.loader["batch_size"] == 1:
        case.size = min(case.size, 17)
    if rng.random() < 0.2:
        case.loader["drop_last"] = True
    if rng.random() < 0.01:
        case.loader |= {"num_workers": 1, "persistent_workers": rng.random() < 0.5}
    case.sampler = rng.choice(["plain"] * 8 + ["distributed", "own batches"])
    case.has_validation = rng.random() < 0.7
    case.as_module = rng.random() < 0.5


def draw_labels(rng: random.Random, case: Case) -> None:
    case.kind = rng.choice(["index"] * 7 + ["one-hot", "binary", "multi-label", "ignored"])
    if case.kind == "binary":
        case.classes, case.present = 2, [0, 1]
    elif case.kind == "ignored":
        # The loss of a batch without a label is no number.
        case.loader["batch_size"] = 500


def draw_case(seed: int) -> Case:
    """The fit of this seed."""
    rng = random.Random(seed)
    case = Case(seed)
    draw_data(rng, case)
    draw_labels(rng, case)
    case.net, case.net_is = draw_net(rng, case.shape, 1 if case.kind == "binary" else case.classes)
    case.frozen, case.eval_part = rng.random() < 0.1, rng.random() < 0.1
    case.returns_dict = rng.random() < 0.1
    case.manual = rng.random() < 0.1
    case.optimizer, case.schedule = draw_optimizer(rng)
    if case.manual or case.optimizer == "lbfgs":
        case.schedule = "none"
    case.partition = draw_partition(rng, case)
    case.prune = draw_prune(rng, case) if rng.random() < 0.7 else None
    case.finetune = draw_finetune(rng, case) if rng.random() < 0.8 else None
    case.trainer = draw_trainer(rng, case)
    case.beside = [name for name in ("early stopping", "swa") if rng.random() < 0.08]
    if rng.random() < 0.2:
        places = ["dataset", "forward", "training step", "validation step", "epoch start", "batch end"]
        case.bomb = (rng.choice(places), rng.choice([0, 1, 5, 20, 60, 150]))
    case.compares = rng.random() < 0.3
    return case
