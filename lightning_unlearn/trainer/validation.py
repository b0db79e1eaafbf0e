"""How good the model is right now: on the fit's own validation data, or on some of the training samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.attribution import OOMBatchSplitter
from lightning_unlearn.data.loaders import batch_count, detached_copy, iterate_indices
from lightning_unlearn.data.task_format import IGNORED
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import rank_zero_info, shown

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Score:
    """How well the model does on some samples.

    Args:
        accuracy: share of the samples whose strongest class is the given label.
        loss: mean cross-entropy of the given label, in nats.
        samples: how many samples, each counted once.
    """

    accuracy: float
    loss: float
    samples: int

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f}, loss {self.loss:.3f} on {self.samples:,} samples"


class _ScoreAccumulator:
    """Sums over samples that make a :class:`Score`: right ones, losses, samples, ranks that could not go on."""

    def __init__(self, fit: FitContext) -> None:
        self._fit = fit
        self._in_parts = OOMBatchSplitter()
        self.sums = torch.zeros(4, dtype=torch.float64)

    def check(self, label: Tensor) -> Tensor:
        """Return the targets of a batch's rows; raises for labels that cannot be read."""
        return self._fit.task_format.labels(label, len(label))

    def add(self, x: Any, label: Tensor, weight: Tensor) -> None:
        """Count a batch; a row of weight 0 does not count."""
        task_format, target = self._fit.task_format, self.check(label)
        counts = task_format.repeat_per_row(weight.to(target.device)) * (target >= 0) / task_format.rows_per_sample
        done = 0
        for logits in self._in_parts(lambda part, _: self._fit.logits(part).float(), x, label):
            rows = slice(done, done + len(logits))
            done += len(logits)
            losses = cross_entropy(logits, target[rows], reduction="none", ignore_index=IGNORED)
            # The largest of numbers that are not numbers is the first, which for some labels would be right. A logit of
            # -inf rules a class out.
            right = (logits.argmax(dim=1) == target[rows]) & ~(logits.isnan() | logits.isposinf()).any(dim=1)
            columns = torch.stack([right, losses, torch.ones_like(losses)], dim=1)
            self.sums[:3] += (columns.double().cpu() * counts[rows].double().cpu().unsqueeze(1)).sum(dim=0)

    def disable(self) -> None:
        """Note that a score would mean nothing."""
        self.sums[3] = 1

    def score(self) -> Score | None:
        """Return the score over all ranks, each of which must ask; None where one gave up or there are no samples."""
        right, loss, samples, failed = self._fit.reduce(self.sums).tolist()
        return None if failed or samples == 0 else Score(right / samples, loss / samples, round(samples))


def score_validation(fit: FitContext, *, say: bool = True) -> Score | None:
    """Return how well the model does on the fit's own validation loaders, within ``limit_val_batches``.

    Every rank must call it. Where a DistributedSampler repeats samples to make the ranks' shares equal, they are
    counted once; a sampler of the user's own that does so may have a few counted twice.

    Args:
        fit: that is running.
        say: whether a line in the log is to say why there is no score, if there is none.

    Returns:
        None where there is no loader, a batch cannot be split into input and
        labels, or labels are not class indices.
    """
    moment = _moment(fit)
    score: Score | None
    known_at, score, reason = fit.memory.score
    is_known = moment is not None and moment == known_at
    # Who measures next finds the score of the same weights; every rank, or none. Shards do not count their changes.
    if fit.is_sharded or not fit.agree(is_known, of_all=True):
        score, reason = _measure_validation(fit)
        fit.memory.score = moment, score, reason
    if score is None and say and reason not in fit.memory.said:
        fit.memory.said.add(reason)
        rank_zero_info(f"No validation score available: {reason}.")
    return score


def _moment(fit: FitContext) -> tuple[Any, ...] | None:
    """Return what changes whenever weights or buffers do; None where that is not counted."""
    tensors = [*fit.model.parameters(), *fit.model.buffers()]
    if fit.is_sharded or any(tensor.is_inference() for tensor in tensors):
        return None
    try:
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except (RuntimeError, NotImplementedError):  # of a kind without memory of its own
        return None
    return id(fit.model), fit.epoch, fit.step, versions


def _measure_validation(fit: FitContext) -> tuple[Score | None, str]:
    """Return the score, and why there is none on this rank."""
    tally, reason = _ScoreAccumulator(fit), ""
    with fit.isolated_eval(keep=False):
        loaders = fit.validation_loaders()
    with fit.isolated_eval(), torch.no_grad():
        # Anything may be in a validation loader, and not to know a score must not end the fit.
        try:
            for loader, limit in loaders:
                with _as_it_was(loader) as batches:
                    total, drawn = _length(loader, limit), itertools.islice(batches, limit)
                    _count(fit, tally, shown(fit, "Score", total, drawn))
        except Exception as error:
            if fit.is_sharded and not isinstance(error, _RanksOutOfSync):
                # Others wait in the forward pass in which this rank has failed, and not for its score.
                raise
            reason = f"{type(error).__name__}: {error}"
            tally.disable()
    return tally.score(), reason or "the fit has no validation batches"


def score_samples(fit: FitContext, index: Tensor) -> Score:
    """Return how well the model does on samples of the training set, against their given labels.

    Every rank must call it. Two calls in a row see the same augmentation.

    Args:
        fit: that is running.
        index: (K,) int64, dataset indices, the same on every rank.

    Raises:
        ValueError: without a sample, or for labels that are not class indices.
    """
    if len(index) == 0:
        raise ValueError("Expected at least one sample to score, but got none.")
    tally, loader = _ScoreAccumulator(fit), fit.scoring_loader
    place, weight = fit.shard(len(index))
    done, absent = 0, set[int]()
    with fit.isolated_eval(), torch.no_grad():
        batches = batch_count(loader, len(place))
        drawn = iterate_indices(loader, index.cpu()[place], absent=absent)
        for rows, batch in shown(fit, "Score", batches, drawn):
            x, label = fit.task_format.split(fit.to_device(batch))
            there = torch.tensor([row not in absent for row in rows.tolist()])
            tally.add(x, label, weight[done : done + len(rows)] * there)
            done += len(rows)
    score = tally.score()
    if score is None:
        raise RuntimeError("The samples yielded no batch; this is an error in lightning_unlearn.")
    return score


def _length(loader: Any, limit: int | None) -> int | None:
    """Return how many batches are drawn, where that is known."""
    length = limit
    # Anything may be in a validation loader, and its length is wanted for nothing but a progress bar.
    with suppress(Exception):
        length = len(loader) if limit is None else min(len(loader), limit)
    return length


def _count(fit: FitContext, tally: _ScoreAccumulator, batches: Iterable[Any]) -> None:
    def split() -> Iterator[tuple[Any, Tensor, Tensor]]:
        for batch, weigh in batches:
            x, label = fit.task_format.split(fit.to_device(batch))
            tally.check(label)
            yield x, label, weigh(len(label))

    for x, label, weight in _in_step(fit, split()) if fit.is_sharded else split():
        tally.add(x, label, weight)


class _RanksOutOfSync(ValueError):
    """A rank has no batch where another has one."""


def _in_step(fit: FitContext, batches: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the batches, where ranks meet in each forward pass, so that every rank takes as many.

    Raises:
        _RanksOutOfSync: on every rank, where one cannot go on with the others.
    """
    while True:
        item, error = None, None
        try:
            item = next(batches, None)
        except Exception as failure:
            error = failure
        one_has, all_have = (fit.agree(item is not None, of_all=of_all) for of_all in (False, True))
        if error is not None:
            raise _RanksOutOfSync(f"{type(error).__name__}: {error}") from error
        if one_has and not all_have:
            raise _RanksOutOfSync("another rank has more or fewer batches, or failed")
        if item is None:
            return
        yield item


@contextmanager
def _as_it_was(loader: Any) -> Iterator[Iterator[tuple[Any, Callable[[int], Tensor]]]]:
    """Draw from a loader and leave it, its workers and the generators that it draws from as they were.

    Yields:
        each batch with a function from its number of rows to their weights.
    """
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    generators = [
        value for holder in holders if isinstance(value := getattr(holder, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    if isinstance(loader, DataLoader):
        # In order, since what a batch counts depends on its place; its workers end with the iteration.
        loader = detached_copy(loader)
    try:
        yield _weighed(loader)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _weighed(loader: Any) -> Iterator[tuple[Any, Callable[[int], Tensor]]]:
    sampler = getattr(loader, "sampler", None)
    plain = type(getattr(loader, "batch_sampler", None)) is BatchSampler
    done = 0

    def weigh(rows: int) -> Tensor:
        nonlocal done
        position = torch.arange(done, done + rows)
        done += rows
        if not (plain and isinstance(sampler, DistributedSampler)):
            return torch.ones(rows)
        # What is drawn beyond the data set's length is drawn only to make the ranks' shares equal.
        total: Any = sampler.dataset
        return (position * sampler.num_replicas + sampler.rank < len(total)).float()

    for batch in loader:
        yield batch, weigh
