"""One pass over the training set that ranks the neurons of some layers, by the criterion of a given name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import (
    OOMBatchSplitter,
    loss_gradients,
    neuron_dimension,
    record_activation,
    resolve_layer,
)
from lightning_unlearn.functional.importance import NeuronSums, neuron_sums
from lightning_unlearn.functional.selection import in_order
from lightning_unlearn.functional.sensitivity import RegressionSums, regression_sums, solve_sensitivity
from lightning_unlearn.pruning.criteria import L2_PENALTY, Criterion, NeuronStatistics, Sensitivity, check_score
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.progress import rank_zero_warn
from lightning_unlearn.utilities.reduce import Reduce


@dataclass(frozen=True, eq=False)
class Ranking:
    """The ranking of the neurons of one layer by a criterion.

    Args:
        score: (D,) float32, the standardized coefficient, or the score of another criterion, whose largest values are
            pruned first.
        standard_error: (D,) float32, standard error of a coefficient.
        order: (K,) int64, candidate neurons, worst first.
        live: number of neurons whose activation varies.
    """

    score: Tensor
    standard_error: Tensor | None
    order: Tensor
    live: int


@dataclass(frozen=True, eq=False)
class RankingTarget:
    """What neurons are ranked for.

    Args:
        partition: which samples are noise.
        weight: (N,) float32, of each sample; 0 for one that is left out.
        gone: for each layer, (D,) bool, neurons that have been pruned before; None where none has.
    """

    partition: Partition
    weight: Tensor
    gone: Sequence[Tensor | None]


class _Reader(Protocol):
    """Gathers, over the batches of one rank, what its criterion needs of one layer."""

    def add(self, values: Tensor, product: Tensor | None, batch: IndexedBatch) -> None:
        """Take the activations (B, P, D) of a batch, and the sum over positions of gradient x activation (B, D)."""

    def rank(self, reduce: Reduce) -> Ranking:
        """Return what all ranks have seen; every rank must ask."""


def rank_neurons(
    fit: FitContext, sites: Sequence[PruneSite], criterion: Criterion, subject: RankingTarget
) -> list[Ranking]:
    """Return the neurons of each layer, ranked in one pass over the training set. Every rank must call it."""

    def reader_of(site: PruneSite) -> _Reader:
        if isinstance(criterion, Sensitivity):
            soft = fit.source.uses_soft_targets
            target = subject.partition.clean_probability if soft else subject.partition.is_clean.float()
            return _RegressionReader(criterion, target, subject.weight, soft=soft)
        return _StatisticReader(criterion, site, fit.model, subject)

    readers = [reader_of(site) for site in sites]
    watch = _gradients if criterion.needs_gradients else _activations
    # Ratios are of what a neuron does at each position; the rest is of its mean over them.
    reads = _Reads(fit, sites, by_position=criterion.per_position)
    left_out = torch.zeros(2, dtype=torch.float64)
    with fit.isolated_eval():
        for whole, part in watch(reads, fit.batches(fit.scoring_loader, "Neurons")):
            batch, seen = _finite_only(whole, part)
            left_out += torch.stack([(whole.weight - batch.weight).sum(), whole.weight.sum()]).cpu()
            for reader, gone, (values, product) in zip(readers, subject.gone, seen, strict=True):
                # What only the head's columns silence is still active, and must not be told apart by.
                active = values if gone is None else values.masked_fill(gone.to(values.device), 0)
                reader.add(active.cpu(), None if product is None else product.cpu(), batch)
    reduce = fit.reduce
    broken, total = (int(x) for x in reduce(left_out).tolist())
    if broken:
        rank_zero_warn(
            f"Excluding {broken:,} of {total:,} training samples with NaN or infinite activations"
            f"{' or gradients' if criterion.needs_gradients else ''} from the neuron ranking."
        )
    return [reader.rank(reduce) for reader in readers]


@dataclass(frozen=True, eq=False)
class _Reads:
    """Of which layers activations are read, and whether at each position or their mean."""

    fit: FitContext
    sites: Sequence[PruneSite]
    by_position: bool

    def values(self, site: PruneSite, activation: Tensor) -> Tensor:
        """Return (B, P, D) float32, with P = 1 for the mean over positions."""
        rows = self._rows(site, activation)
        return rows if self.by_position else rows.mean(dim=1, keepdim=True)

    def total(self, site: PruneSite, product: Tensor) -> Tensor:
        """Return (B, D) float32, the sum over positions."""
        return self._rows(site, product).sum(dim=1)

    def _rows(self, site: PruneSite, activation: Tensor) -> Tensor:
        dimension = neuron_dimension(resolve_layer(self.fit.model, site.name), activation.ndim)
        rows = activation.float().movedim(dimension, -1)
        return rows.reshape(len(rows), -1, rows.shape[-1])


Seen = list[tuple[Tensor, Tensor | None]]


def _finite_only(batch: IndexedBatch, seen: Seen) -> tuple[IndexedBatch, Seen]:
    """Zero, without weight, the samples for which a neuron of any layer is not finite."""
    found = [tensor for pair in seen for tensor in pair if tensor is not None]
    finite = torch.stack([tensor.isfinite().flatten(1).all(dim=1) for tensor in found]).all(dim=0)
    if finite.all():
        return batch, seen

    def cleared(tensor: Tensor) -> Tensor:
        return tensor.where(finite.reshape(-1, *(1,) * (tensor.ndim - 1)), 0)

    cleaned: Seen = [(cleared(values), None if product is None else cleared(product)) for values, product in seen]
    return replace(batch, weight=batch.weight * finite.to(batch.weight.device)), cleaned


def _activations(reads: _Reads, batches: Iterator[IndexedBatch]) -> Iterator[tuple[IndexedBatch, Seen]]:
    with ExitStack() as stack:
        takes = [stack.enter_context(record_activation(reads.fit.model, site.point)) for site in reads.sites]
        for batch in batches:
            with torch.no_grad():
                reads.fit.output(batch.x)
            yield batch, [(reads.values(s, take()), None) for s, take in zip(reads.sites, takes, strict=True)]


def _gradients(reads: _Reads, batches: Iterator[IndexedBatch]) -> Iterator[tuple[IndexedBatch, Seen]]:
    in_parts, points = OOMBatchSplitter(), [site.point for site in reads.sites]

    rows = reads.fit.task_format.rows_per_sample

    def of_part(x: Any, label: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = loss_gradients(reads.fit.model, points, reads.fit.logits, x, label.flatten())
        return [
            (reads.values(site, a), reads.total(site, a.float() * g.float()))
            for site, (a, g) in zip(reads.sites, found, strict=True)
        ]

    for batch in batches:
        by_site = zip(*in_parts(of_part, batch.x, batch.label.reshape(-1, rows)), strict=True)
        yield batch, [(torch.cat([v for v, _ in parts]), torch.cat([p for _, p in parts])) for parts in by_site]


class _RegressionReader:
    """Sums of the regression of being clean on what a neuron does on average."""

    def __init__(self, criterion: Sensitivity, target: Tensor, weight: Tensor, *, soft: bool) -> None:
        self._criterion, self._target, self._weight, self._soft = criterion, target, weight, soft
        self._sums: RegressionSums | None = None

    def add(self, values: Tensor, product: Tensor | None, batch: IndexedBatch) -> None:
        weight = self._weight[batch.index] * batch.weight.cpu()
        part = regression_sums(values.mean(dim=1), self._target[batch.index], weight)
        self._sums = part if self._sums is None else self._sums + part

    def rank(self, reduce: Reduce) -> Ranking:
        if self._sums is None:
            raise RuntimeError("The training set yielded no batch; this is an error in lightning_unlearn.")
        sums = RegressionSums(reduce(self._sums.xtx), reduce(self._sums.xty), reduce(self._sums.yty))
        penalty = self._criterion.l2_penalty
        if penalty is None:
            penalty = L2_PENALTY if self._soft else 0.0  # the paper has none
        found = solve_sensitivity(sums, penalty)
        order = self._criterion.order(found, soft=self._soft)
        return Ranking(found.coefficient.float(), found.standard_error.float(), order, int(found.is_live.sum()))


class _StatisticReader:
    """Sums over the suspect and over the clean samples; a score that needs none still needs to know who is live."""

    def __init__(self, criterion: Criterion, site: PruneSite, model: nn.Module, subject: RankingTarget) -> None:
        self._criterion, self._layer, self._epoch = criterion, site.name, subject.partition.epoch
        # Looked at by every rank, whatever batches it has: of weights in parts, all give theirs.
        self._weight: tuple[Tensor | None, int] = site.weight(model) if criterion.needs_weight else (None, 0)
        is_clean, weight = subject.partition.is_clean, subject.weight
        self._groups = (weight * ~is_clean, weight * is_clean)
        self._values: list[NeuronSums] = []
        self._products: list[NeuronSums] = []

    def add(self, values: Tensor, product: Tensor | None, batch: IndexedBatch) -> None:
        weights = [group[batch.index] * batch.weight.cpu() for group in self._groups]
        self._values = _added(self._values, [neuron_sums(values, weight) for weight in weights])
        if product is not None:
            self._products = _added(self._products, [neuron_sums(product, weight) for weight in weights])

    def rank(self, reduce: Reduce) -> Ranking:
        noisy, clean = (sums.reduced(reduce) for sums in self._values)
        products = [sums.reduced(reduce) for sums in self._products]
        noisy_product, clean_product = products or (None, None)
        seen = NeuronStatistics(self._layer, self._epoch, noisy, clean, noisy_product, clean_product, *self._weight)
        score = check_score(self._criterion, self._criterion.score(seen), len(clean.total), self._layer)
        live = (noisy + clean).is_live()
        return Ranking(score.float(), None, in_order(score, live), int(live.sum()))


def _added(sums: list[NeuronSums], parts: list[NeuronSums]) -> list[NeuronSums]:
    return [one + part for one, part in zip(sums, parts, strict=True)] if sums else parts
