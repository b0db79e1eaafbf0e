"""Fits for the study of label errors: data sets, noise, networks, and what each fit said, kept once in a cache.

A fit is trained in plain PyTorch and leaves the logits of its training steps, epoch by epoch, as the callback would
read them, and those of a pass in eval mode after the epochs at which it is judged. Detectors are then compared on the
same logits, again and again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_blobs
from torch import Tensor, nn

from benchmarks.sources import DATA

CIFAR_CLASSES = 10
# Of the classifier that says which images are confusable, as a share of the mean eigenvalue.
_RIDGE = 1e-2


@dataclass(frozen=True)
class DetectionCase:
    """A fit.

    Args:
        data: a name that :func:`load` knows.
        noise: ``"clean"``, ``"symmetric"``, ``"next"``, ``"confusable"``, ``"human"`` or ``"given"``, as published.
        rate: share of wrong labels.
        network: ``"linear"``, ``"mlp"``, ``"wide"`` or ``"text"``.
        epochs: of the fit.
        judged_after: epochs.
        loss: ``"plain"``, ``"weights"``, ``"sampler"``, ``"smoothing"`` or ``"focal"``.
        batch: samples of a step.
        learning_rate: of Adam.
        outputs: of the network, if more than there are classes.
    """

    data: str
    noise: str = "clean"
    rate: float = 0.0
    network: str = "mlp"
    epochs: int = 10
    judged_after: tuple[int, ...] = (2, 5, 10)
    loss: str = "plain"
    batch: int = 128
    learning_rate: float = 1e-3
    outputs: int = 0

    @property
    def name(self) -> str:
        """For files and tables."""
        noise = self.noise if self.noise in {"clean", "given"} else f"{self.noise} {self.rate:g}"
        loss = "" if self.loss == "plain" else f" {self.loss}"
        outputs = f" {self.outputs} outputs" if self.outputs else ""
        return f"{self.data} {self.network} {noise}{loss}{outputs} {self.epochs}ep"


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit said.

    Args:
        training: of each epoch (N, C), the logits of the training steps, NaN for samples that were not drawn.
        position: of each epoch (N,) in [0, 1), how much of the epoch had passed.
        last: from epochs to the logits (N, C) of a pass in eval mode after them.
        label: (N,) int64, the given labels.
        truth: (N,) int64.
        inputs: (N, D) of the network; None for texts.
        seconds: of training, for each epoch.
        accuracy: after each epoch, on validation samples, labels as given and true.
    """

    training: list[Tensor]
    position: list[Tensor]
    last: dict[int, Tensor]
    label: Tensor
    truth: Tensor
    inputs: Tensor | None
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Source:
    """Inputs, true labels, given labels where they are published, and validation samples with labels as noisy."""

    x: Tensor
    truth: Tensor
    given: Tensor | None = None
    human: Tensor | None = None
    val_x: Tensor | None = None
    val_y: Tensor | None = None
    classes: int = 0


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _standardized(x: np.ndarray) -> Tensor:
    rows = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return (rows - rows.mean(dim=0)) / rows.std(dim=0).clamp(min=1e-6)


@cache
def _cifar(folder: Path) -> Source:
    features, labels = np.load(folder / "cifar_features.npz"), np.load(folder / "cifar10n.npz")
    train, test = features["train_index"], features["test_index"]
    return Source(
        x=torch.from_numpy(features["train"].astype(np.float32)),
        truth=_long(labels["train_label"][train]),
        human=_long(labels["train_human_label"][train]),
        val_x=torch.from_numpy(features["test"].astype(np.float32)),
        val_y=_long(labels["test_label"][test]),
        classes=CIFAR_CLASSES,
    )


def _published(folder: Path, name: str, seed: int) -> Source:
    file = np.load(folder / "realnoise.npz")
    of_case = json.loads(str(file["meta"]))[name]
    cast = np.int64 if of_case["kind"] == "text" else np.float32
    x, val_x = (torch.from_numpy(file[f"{name}/{part}"].astype(cast)) for part in ("x", "xv"))
    given, val_y = _long(file[f"{name}/given{seed % 3}"]), _long(file[f"{name}/yv{seed % 3}"])
    return Source(x, _long(file[f"{name}/ref"]), given, None, val_x, val_y, of_case["classes"])


def test_part(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Inputs, and the better labels, on which what was published is tested."""
    file = np.load(folder / "realnoise.npz")
    is_text = json.loads(str(file["meta"]))[name]["kind"] == "text"
    return torch.from_numpy(file[f"{name}/xt"].astype(np.int64 if is_text else np.float32)), _long(file[f"{name}/yt"])


def _table(load: Callable[..., tuple[np.ndarray, np.ndarray]], seed: int) -> Source:
    x, y = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    return Source(_standardized(x[order]), _long(y[order]), classes=int(y.max()) + 1)


def _drawn(classes: int, each: int, seed: int) -> Source:
    """Gaussian classes, about a tenth of which lie where another class is likelier."""
    x, y = make_blobs(
        classes * each,
        n_features=32,
        centers=np.random.default_rng(seed).normal(0, 1.35, (classes, 32)),
        cluster_std=1.0 + 0.25 * math.log10(100),
        random_state=seed,
    )
    return Source(_standardized(x), _long(y), classes=classes)


def load(data: str, folder: Path, seed: int) -> Source:
    """A data set by its name."""
    if data == "cifar":
        return _cifar(folder)
    if data.startswith("drawn"):
        classes = int(data.removeprefix("drawn"))
        return _drawn(classes, 100 if classes < 1000 else 20, seed)
    tables = {"digits": load_digits, "breast": load_breast_cancer, "wine": load_wine, "iris": load_iris}
    return _table(tables[data], seed) if data in tables else _published(folder, data, seed)


def _runner_up(x: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(N,) each: how far the true class leads, out of sample, and the class that comes second."""
    rows = torch.cat([x - x.mean(dim=0), torch.ones(len(x), 1)], dim=1).double()
    gram, target = rows.T @ rows, nn.functional.one_hot(truth, classes).double()
    gram.diagonal().add_(_RIDGE * gram.trace() / len(gram))
    solved = torch.linalg.solve(gram, rows.T)
    leverage = (rows * solved.T).sum(dim=1, keepdim=True).clamp(max=0.999)
    score = target - (target - rows @ (solved @ target)) / (1 - leverage)
    column = truth.unsqueeze(1)
    second, which = score.scatter(1, column, -torch.inf).max(dim=1)
    return score.gather(1, column).squeeze(1) - second, which


def _needed(labels: Tensor | None, case: DetectionCase) -> Tensor:
    if labels is None:
        raise ValueError(f"Expected a data set with labels of people for {case.name!r}, but {case.data!r} has none.")
    return labels


def noisy_labels(source: Source, case: DetectionCase, seed: int) -> Tensor:
    """The given labels (N,) of a case."""
    generator, truth, n = torch.Generator().manual_seed(1000 + seed), source.truth, len(source.truth)
    if case.noise == "clean":
        return truth.clone()
    if case.noise == "given":
        return _needed(source.given, case).clone()
    wanted = round(case.rate * n)
    if case.noise == "human":
        human = _needed(source.human, case)
        wrong = (human != truth).nonzero().squeeze(1)
        chosen = wrong[torch.randperm(len(wrong), generator=generator)[:wanted]]
        return truth.index_put((chosen,), human[chosen])
    if case.noise == "confusable":
        lead, second = _runner_up(source.x, truth, source.classes)
        # Half of those whose true class leads by the least, so that they are not told by their margin alone.
        pool = lead.where(lead > 0, torch.inf).argsort()[: 2 * wanted]
        chosen = pool[torch.randperm(len(pool), generator=generator)[:wanted]]
        return truth.index_put((chosen,), second[chosen])
    chosen = torch.randperm(n, generator=generator)[:wanted]
    step = torch.randint(1, source.classes, (wanted,), generator=generator) if case.noise == "symmetric" else 1
    return truth.index_put((chosen,), (truth[chosen] + step) % source.classes)


def noisy_validation(source: Source, case: DetectionCase, seed: int) -> tuple[Tensor, Tensor] | None:
    """Validation samples with labels as noisy as those of training; None where there are none."""
    if source.val_x is None or source.val_y is None:
        return None
    if case.noise in {"clean", "given"}:
        return source.val_x, source.val_y
    human = None
    if source.human is not None:
        # What people called a training sample of the same class.
        generator = torch.Generator().manual_seed(2000 + seed)
        human = source.val_y.clone()
        for c in range(source.classes):
            members, known = (source.val_y == c).nonzero().squeeze(1), source.human[source.truth == c]
            human[members] = known[torch.randint(len(known), (len(members),), generator=generator)]
    held_out = Source(source.val_x, source.val_y, human=human, classes=source.classes)
    return source.val_x, noisy_labels(held_out, case, 3000 + seed)


class _Text(nn.Module):
    """The mean of the words' vectors, then a hidden layer."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, 64, mode="mean", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


def network_of(kind: str, inputs: int, outputs: int) -> nn.Module:
    """The network of a case."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": partial(nn.Linear, inputs, outputs),
        "mlp": lambda: nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, outputs)),
        "wide": lambda: nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
        ),
        "text": lambda: _Text(16_384, outputs),
    }
    return makers[kind]()


def loss_of(case: DetectionCase, label: Tensor, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a case, whose weights follow the given labels."""
    if case.loss == "weights":
        count = torch.bincount(label, minlength=classes).clamp(min=1)
        return nn.CrossEntropyLoss(weight=len(label) / (classes * count.float()))
    if case.loss == "smoothing":
        return nn.CrossEntropyLoss(label_smoothing=0.1)
    if case.loss == "focal":

        def focal(output: Tensor, target: Tensor) -> Tensor:
            surprise = nn.functional.cross_entropy(output, target, reduction="none")
            return ((1 - (-surprise).exp()) ** 2 * surprise).mean()

        return focal
    return nn.CrossEntropyLoss()


def _order(case: DetectionCase, label: Tensor) -> Tensor:
    if case.loss != "sampler":
        return torch.randperm(len(label))
    return torch.multinomial(1 / torch.bincount(label)[label].double(), len(label), replacement=True)


def train(case: DetectionCase, folder: Path, seed: int) -> Fit:  # noqa: PLR0915  (a training loop)
    """Trains a case and keeps what it said."""
    source = load(case.data, folder, seed)
    label, outputs = noisy_labels(source, case, seed), case.outputs or source.classes
    torch.manual_seed(seed)
    network = network_of(case.network, source.x.shape[1], outputs)
    optimizer = torch.optim.Adam(network.parameters(), lr=case.learning_rate)
    criterion, last, position, training = loss_of(case, label, outputs), {}, [], []
    seconds, accuracy = [], []
    for epoch in range(1, case.epochs + 1):
        started = time.perf_counter()
        said, when = torch.full((len(label), outputs), torch.nan), torch.full((len(label),), torch.nan)
        network.train()
        steps = _order(case, label).split(case.batch)
        for step, rows in enumerate(steps):
            output = network(source.x[rows])
            said[rows], when[rows] = output.detach(), step / len(steps)
            optimizer.zero_grad()
            criterion(output, label[rows]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
        training.append(said.half() if outputs > CIFAR_CLASSES else said)
        position.append(when)
        network.eval()
        with torch.no_grad():
            if epoch in case.judged_after:
                last[epoch] = network(source.x)
            if source.val_x is not None and source.val_y is not None:
                accuracy.append(float((network(source.val_x).argmax(1) == source.val_y).double().mean()))
    inputs = None if case.network == "text" else source.x.half()
    return Fit(training, position, last, label, source.truth, inputs, seconds, accuracy)


def fit_of(case: DetectionCase, cache_folder: Path, seed: int, data: Path = DATA) -> Fit:
    """What a case said; trained now if it is not in the cache."""
    file = cache_folder / f"{case.name.replace(' ', '_')}_{seed}.pt"
    if not file.exists():
        cache_folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(vars(train(case, data, seed)), part)
        part.rename(file)
    return Fit(**torch.load(file, weights_only=True))


def _vision() -> list[DetectionCase]:
    kinds = [("clean", (0.0,)), ("symmetric", (0.01, 0.03, 0.05, 0.1)), ("confusable", (0.03, 0.05, 0.1))]
    kinds += [("human", (0.03, 0.09, 0.17, 0.4)), ("next", (0.1, 0.2, 0.4))]
    return [
        DetectionCase("cifar", noise, rate, network)
        for network in ("linear", "mlp")
        for noise, rates in kinds
        for rate in rates
    ]


def _real() -> list[DetectionCase]:
    hate = partial(DetectionCase, "hate", "given", 0.1, "text", 8, (2, 4, 8), learning_rate=3e-3)
    music = {"network": "wide", "epochs": 20, "judged_after": (5, 10, 20), "batch": 32}
    phoneme = {"network": "wide", "epochs": 30, "judged_after": (5, 10, 30), "batch": 32}
    intents = {"network": "wide", "epochs": 8, "judged_after": (2, 4, 8)}
    cases = [hate(loss=loss) for loss in ("plain", "weights", "sampler", "smoothing", "focal")]
    cases += [DetectionCase(name, "given", 0.3, **music) for name in ("music-mv", "music-one")]
    cases += [DetectionCase(name, "given", 0.1, **phoneme) for name in ("phon-5", "phon-15")]
    cases += [DetectionCase(name, "given", 0.1, **intents) for name in ("bank77", "bank77-10")]
    cases += [DetectionCase("music-mv", **music), DetectionCase("phon-5", **phoneme)]
    return [*cases, DetectionCase("hate", network="text", epochs=8, judged_after=(2, 4, 8), learning_rate=3e-3)]


def _small() -> list[DetectionCase]:
    digits = {"network": "wide", "epochs": 40, "judged_after": (5, 10, 40), "batch": 64}
    cases = [DetectionCase("digits", **digits), DetectionCase("digits", outputs=1000, **digits)]
    cases += [DetectionCase("digits", "symmetric", rate, **digits) for rate in (0.02, 0.05, 0.1, 0.2, 0.4)]
    cases += [DetectionCase("digits", "next", rate, **digits) for rate in (0.1, 0.3, 0.4)]
    cases += [DetectionCase("digits", "symmetric", 0.1, outputs=1000, **digits)]
    for name in ("breast", "wine", "iris"):
        small = {"network": "wide", "epochs": 30, "judged_after": (5, 10, 30), "batch": 32}
        cases += [DetectionCase(name, **small), DetectionCase(name, "symmetric", 0.1, **small)]
    return cases


def _drawn_cases() -> list[DetectionCase]:
    drawn = {"network": "wide", "epochs": 10, "judged_after": (3, 6, 10)}
    return [
        DetectionCase(f"drawn{classes}", noise, rate, **drawn)
        for classes in (66, 200, 1000)
        for noise, rate in (("clean", 0.0), ("symmetric", 0.05), ("next", 0.2))
    ]


GROUPS: dict[str, Callable[[], list[DetectionCase]]] = {
    "small": _small,
    "real": _real,
    "vision": _vision,
    "drawn": _drawn_cases,
}
