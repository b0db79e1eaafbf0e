"""What the partition is judged on: the fits of the three modules of cases, in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from benchmarks.cases import CASES, Case, make
from benchmarks.detection_cases import (
    GROUPS,
    DetectionCase,
    load,
    loss_of,
    network_of,
    noisy_labels,
    noisy_validation,
)
from benchmarks.runs import fast_precision
from benchmarks.scratch_cases import scratch_cases
from benchmarks.sources import Rows, as_it_is


@dataclass(frozen=True, eq=False)
class Problem:
    """A training set with noise, and the fit that meets it.

    Args:
        name: of the case.
        noise: its kind, ``"clean"`` for none.
        rate: share of wrong labels that the case is named for.
        x: (N, ...) inputs.
        label: (N,) int64, as given.
        bad: (N,) bool, the truth: whose label is wrong or whose input is corrupted.
        validation: inputs and labels as noisy as those of training, or None.
        network: makes the LightningModule.
        epochs: of the fit.
        batch: samples of a step.
        is_balanced: whether classes are drawn alike often.
        is_slow: whether a fit takes minutes: a convolutional network from scratch, in bfloat16 if the processor can.
    """

    name: str
    noise: str
    rate: float
    x: Tensor
    label: Tensor
    bad: Tensor
    validation: tuple[Tensor, Tensor] | None
    network: Callable[[], L.LightningModule]
    epochs: int
    batch: int
    is_balanced: bool = False
    is_slow: bool = False

    def loader(self, *, kept: Tensor | None = None, sampler: Any = None) -> DataLoader[Any]:
        """The training loader, of the kept samples only if there is a mask."""
        x, label = (self.x, self.label) if kept is None else (self.x[kept], self.label[kept])
        return DataLoader(Rows(x, label), self.batch, sampler=sampler or self.sampler(label), collate_fn=as_it_is)

    def sampler(self, label: Tensor, plain: Any = RandomSampler, weighted: Any = WeightedRandomSampler) -> Any:
        """How samples with these labels are drawn."""
        if not self.is_balanced:
            return plain(label)
        return weighted(1 / torch.bincount(label)[label].double(), len(label), replacement=True)

    def fit(self, model: L.LightningModule, loader: DataLoader[Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Trains, with validation if there is any."""
        loaders = [loader]
        if self.validation is not None:
            loaders.append(DataLoader(Rows(*self.validation), 500, collate_fn=as_it_is))
        trainer = L.Trainer(
            max_epochs=self.epochs,
            accelerator="cpu",
            precision=fast_precision("bf16-mixed" if self.is_slow else "32-true"),
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, *loaders)
        return trainer


class Classifier(L.LightningModule):
    """A network of :mod:`benchmarks.detection_cases`.

    Args:
        case: which.
        label: (N,) the given labels, which class weights follow.
        inputs: columns of the data.
        outputs: of the network.
    """

    def __init__(self, case: DetectionCase, label: Tensor, inputs: int, outputs: int) -> None:
        super().__init__()
        self.learning_rate = case.learning_rate
        self.network = network_of(case.network, inputs, outputs)
        self.loss = loss_of(case, label, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of the given labels."""
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Logs the cross-entropy."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam at a constant rate."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def _quick(case: DetectionCase, seed: int, folder: Path) -> Problem:
    source = load(case.data, folder, seed)
    label = noisy_labels(source, case, seed)
    return Problem(
        name=case.name,
        noise=case.noise,
        rate=case.rate,
        x=source.x,
        label=label,
        bad=label != source.truth,
        validation=noisy_validation(source, case, seed),
        network=partial(Classifier, case, label, source.x.shape[1], case.outputs or source.classes),
        epochs=case.epochs,
        batch=case.batch,
        is_balanced=case.loss == "sampler",
    )


def _slow(case: Case, seed: int, folder: Path) -> Problem:
    data = make(case, seed, folder)
    noise = "input" if case.labels == "clean" and case.sigma else case.labels
    return Problem(
        name=case.name,
        noise="next" if noise == "asymmetric" else noise,
        rate=case.rate,
        x=data.train,
        label=data.given_label,
        bad=data.wrong_label | data.corrupted,
        validation=None,
        network=lambda: case.network().to(memory_format=torch.channels_last),
        epochs=case.epochs,
        batch=case.batch,
        is_slow=True,
    )


def _scratch(name: str, make_fields: Callable[[int], dict[str, Any]], seed: int, _: Path) -> Problem:
    return Problem(name=name, **make_fields(seed))


def problems() -> dict[str, Callable[[int, Path], Problem]]:
    """From the name of a case to what makes it, with a seed and the folder of the data."""
    quick = {case.name: partial(_quick, case) for group in GROUPS.values() for case in group()}
    scratch = {name: partial(_scratch, name, make_fields) for name, make_fields in scratch_cases().items()}
    slow = {name: partial(_slow, case) for name, case in CASES.items() if not case.large}
    return {**quick, **scratch, **slow}
