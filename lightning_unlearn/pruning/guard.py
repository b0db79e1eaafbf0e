"""Pruning in steps, with a rollback if the model gets worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_unlearn.pruning.masking import PrunedParameters, snapshot
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.results.labels import indices_by_class
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.validation import Score, score_samples, score_validation

HELD_SHARE = 0.1
HELD_MOST = 2000
STEPS = 4
"""In how many a proposal is pruned; each costs a pass over the validation data."""
# A fall of exactly the tolerance is allowed; 0.81 - 0.8 is 0.010000000000000009.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class ScoreMonitor:
    """Scores the model.

    Args:
        known: the score before pruning, if it was measured.
        measure: returns the current score; None if it cannot be computed.
        held: (H,) int64, the training samples to score on; empty with validation data.
        tolerance: maximum drop of validation accuracy, or rise of the loss on held-out samples in nats.
    """

    known: Score | None
    measure: Callable[[], Score | None]
    held: Tensor
    tolerance: float

    @cached_property
    def before(self) -> Score:
        """The score before pruning; read it before anything is pruned."""
        score = self.measure() if self.known is None else self.known
        if score is None:
            raise RuntimeError("There is no score to compare with; this is an error in lightning_unlearn.")
        return score

    def is_worse(self, after: Score | None) -> bool:
        """Return whether the model does worse than before by more than the tolerance. What is not known is worse."""
        if after is None:
            return True
        if len(self.held):
            # Not `>`, which NaN never is.
            return not after.loss <= self.before.loss + self.tolerance + _ROUNDING
        return after.accuracy < self.before.accuracy - self.tolerance - _ROUNDING

    def between(self, after: Score | None) -> str:
        """Return what became of the score, in words."""
        if after is None:
            return "the score could no longer be computed"
        what, before, now = (
            ("loss on held-back clean samples", f"{self.before.loss:.3f}", f"{after.loss:.3f}")
            if len(self.held)
            else ("validation accuracy", _share(self.before.accuracy), _share(after.accuracy))
        )
        verb = "rose" if len(self.held) else "fell"
        return f"{what} {verb if self.is_worse(after) else 'went'} from {before} to {now}"


def make_gauge(fit: FitContext, partition: Partition, tolerance: float) -> ScoreMonitor:
    """Measure on the validation data of the fit or, without any, on confident clean samples of the training set."""
    before = score_validation(fit)
    if before is not None:
        nothing = torch.zeros(0, dtype=torch.int64)
        return ScoreMonitor(before, lambda: score_validation(fit), nothing, tolerance)
    held = held_back(partition)

    def measure() -> Score:
        return score_samples(fit, held)

    # Not measured before there is a neuron to prune.
    return ScoreMonitor(None, measure, held, tolerance)


def held_back(partition: Partition) -> Tensor:
    """Return (H,) int64, a tenth of the clean samples of each class, the likeliest, and 2,000 in all at most."""
    clean = partition.clean_indices()
    share = min(HELD_SHARE, HELD_MOST / max(len(clean), 1))
    held = []
    for _, members in indices_by_class(partition.label[clean]):
        of_class = clean[members]
        likeliest = of_class[partition.clean_probability[of_class].argsort(descending=True, stable=True)]
        held.append(likeliest[: max(1, int(share * len(of_class)))])
    chosen = torch.zeros(len(partition), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return chosen.nonzero().flatten()[:HELD_MOST]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is left of a proposal.

    Args:
        kept: for each layer, (K,) int64, the neurons to prune.
        after: the score with these pruned; None where nothing was measured.
        rolled_back: how many of the proposed neurons are not pruned.
        reason: why not.
    """

    kept: list[Tensor]
    after: Score | None = None
    rolled_back: int = 0
    reason: str = ""


def prune_in_steps(
    model: nn.Module, sites: Sequence[PruneSite], proposal: Sequence[Tensor], gauge: ScoreMonitor
) -> Outcome:
    """Zero the proposed neurons, the worst of each layer first, as long as the model does not get worse.

    The parameters are restored afterwards, bit for bit; the caller zeroes the accepted neurons permanently.

    Args:
        model: the model.
        sites: the layers.
        proposal: for each layer, (K,) int64, neurons in order, worst first.
        gauge: scores the model.
    """
    steps = min(STEPS, max(len(neurons) for neurons in proposal))
    chunks = list(zip(*(neurons.tensor_split(steps) for neurons in proposal), strict=True))
    kept = [neurons[:0] for neurons in proposal]
    restore = snapshot([entry for site, n in zip(sites, proposal, strict=True) for entry in site.entries(model, n)])
    last: Score | None = gauge.before
    try:
        for chunk in chunks:
            for site, neurons in zip(sites, chunk, strict=True):
                PrunedParameters(site.entries(model, neurons)).zero_parameters()
            after = gauge.measure()
            if gauge.is_worse(after):
                left = sum(len(p) - len(k) for p, k in zip(proposal, kept, strict=True))
                return Outcome(kept, last, left, gauge.between(after))
            kept = [torch.cat(pair) for pair in zip(kept, chunk, strict=True)]
            last = after
    finally:
        restore()
    return Outcome(kept, last)


def _share(value: float) -> str:
    """Return an accuracy: ``.812``."""
    return f"{value:.3f}".removeprefix("0")
