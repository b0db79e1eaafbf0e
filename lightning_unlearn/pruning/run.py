"""Step 4 from beginning to end: find the layers, rank their neurons, propose, verify, guard, mask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_unlearn.attribution import ForwardTrace
from lightning_unlearn.functional.selection import share_of
from lightning_unlearn.pruning.criteria import Criterion
from lightning_unlearn.pruning.guard import Outcome, ScoreMonitor, make_gauge, prune_in_steps
from lightning_unlearn.pruning.holding import HeldEntries
from lightning_unlearn.pruning.messages import NOT_SILENT, guard_note, say_layers, summary_clause
from lightning_unlearn.pruning.ranking import Ranking, RankingTarget, rank_neurons
from lightning_unlearn.pruning.silence import find_silent
from lightning_unlearn.pruning.sites import PruneSite, check_trained, default_site, named_site
from lightning_unlearn.pruning.state import PruneState
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.loggers import log_masks
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.trainer.sample_rows import locate_samples, no_rows
from lightning_unlearn.trainer.weight_averages import averaged_parts


@dataclass(frozen=True, eq=False)
class PruneSettings:
    """Settings of pruning; see ``SensitivityPruneCallback``.

    Args:
        names: paths of the layers; empty for the inputs of the head.
        amount: maximum share of each layer's active neurons.
        criterion: criterion that ranks the neurons.
        max_val_drop: tolerance of the guard; None for no guard.
    """

    names: Sequence[str]
    amount: float
    criterion: Criterion
    max_val_drop: float | None


@dataclass(frozen=True, eq=False)
class PruneResult:
    """Result of pruning for a partition.

    Args:
        state: state with the new masks.
        rankings: ranking of each layer.
        proposal: for each layer, (K,) int64, the neurons proposed before the guard.
        seconds: duration of pruning and guard, by the names used for logging.
    """

    state: PruneState
    rankings: Sequence[Ranking]
    proposal: Sequence[Tensor]
    seconds: dict[str, float]


def find_sites(fit: FitContext, settings: PruneSettings, probed: tuple[ForwardTrace, IndexedBatch]) -> list[PruneSite]:
    """Return the layers to prune, in the order of ``forward``, seen to fall silent. Every rank must call it.

    Raises:
        ValueError: for a layer that cannot be pruned, naming it.
    """
    model, (first, batch) = fit.model, probed

    def trace() -> ForwardTrace:
        return fit.probe()[0]

    if not settings.names:
        sites = [default_site(model, settings.amount, first)]
    else:
        named = {name: named_site(model, name, trace, first) for name in settings.names}
        sites = [named[call.name] for call in first.calls if call.name in named]
    check_trained(sites, averaged_parts(model))
    points = locate_samples(fit, batch, [site.point for site in sites])
    for site, point in zip(sites, points, strict=True):
        if point is None:
            said = no_rows(site.point, len(batch.index))
            raise ValueError(f"SensitivityPruneCallback cannot prune layer '{site.target}'. {said}")
    sites = [replace(site, samples=point.samples) for site, point in zip(sites, points, strict=True) if point]
    # Every other neuron, so that an operation that mixes neurons shows too.
    every_other = [torch.arange(0, site.width(model), 2) for site in sites]
    found = _verified(fit, sites, every_other)
    for site, verified in zip(sites, found, strict=True):
        if verified is None:
            raise ValueError(
                f"SensitivityPruneCallback cannot prune layer '{site.consumer or site.target}'. {NOT_SILENT}"
            )
    return [site for site in found if site is not None]


def prune(
    fit: FitContext, partition: Partition, state: PruneState, settings: PruneSettings, held: HeldEntries
) -> PruneResult:
    """Prune for a partition. Every rank must call it; after an exception the weights are restored.

    Args:
        fit: the running fit.
        partition: the partition.
        state: state from earlier rounds.
        settings: the settings.
        held: keeps pruned entries at zero; not changed in a dry run.
    """
    gauge, source, started = None, fit.source, time.perf_counter()
    if settings.max_val_drop is not None:
        gauge = make_gauge(fit, partition, settings.max_val_drop)
    guard = time.perf_counter() - started
    gone = [state.pruned_before(at) for at in range(len(state.sites))]
    subject = RankingTarget(partition, _weights(source.sample_weight, partition, gauge), gone)
    rankings = rank_neurons(fit, state.sites, settings.criterion, subject)
    lives = state.live or [ranking.live for ranking in rankings]
    proposal = [
        ranking.order[: max(0, share_of(settings.amount, live) - _count(gone[at]))]
        for at, (ranking, live) in enumerate(zip(rankings, lives, strict=True))
    ]
    sites, proposal = _audible(fit, state.sites, proposal)
    outcome = Outcome(proposal)
    if gauge is not None and any(len(neurons) for neurons in proposal):
        steps_started = time.perf_counter()
        outcome = prune_in_steps(fit.model, sites, proposal, gauge)
        guard += time.perf_counter() - steps_started
    masks = [
        state.mask_of(at, sites[at], ranking, kept)
        for at, (ranking, kept) in enumerate(zip(rankings, outcome.kept, strict=True))
    ]
    note = guard_note(proposal, outcome, gauge) or state.note
    pruned = PruneState(sites, masks, lives, partition.epoch, source.dry_run, note)
    if not source.dry_run:
        held.hold(fit, pruned.entries(fit.model))
    pruning = time.perf_counter() - started - guard
    seconds = {"unlearn/seconds_pruning": pruning, "unlearn/seconds_guard": guard}
    return PruneResult(pruned, rankings, proposal, seconds)


def report_pruning(fit: FitContext, result: PruneResult, settings: PruneSettings) -> None:
    """Log what was done, after the state is stored, so that an error in a logger does not undo it."""
    state = result.state
    say_layers(state, result.rankings, result.proposal, settings.criterion, settings.amount)
    if any(len(neurons) for neurons in result.proposal):
        done = summary_clause(state)
        rank_zero_info(f"Dry run: {done}." if state.is_proposal else f"{done[:1].upper()}{done[1:]}.")
        fit.log({"unlearn/pruned_neurons": 0.0 if state.is_proposal else float(state.count)})
    fit.log(result.seconds)
    log_masks(fit, state.masks)


def _weights(given: Tensor | None, partition: Partition, gauge: ScoreMonitor | None) -> Tensor:
    """Return (N,) float32, of each sample in the ranking: none for those that the guard measures on."""
    weight = torch.ones(len(partition)) if given is None else given.clone()
    if gauge is not None:
        weight[gauge.held] = 0
    return weight


def _count(pruned: Tensor | None) -> int:
    return 0 if pruned is None else int(pruned.sum())


def _audible(
    fit: FitContext, sites: Sequence[PruneSite], proposal: list[Tensor]
) -> tuple[Sequence[PruneSite], list[Tensor]]:
    """Return the sites and the neurons to prune at each; none if later layers would still receive their output.

    This happens, for example, if an adapter was added to a layer during training.
    """
    if not any(len(neurons) for neurons in proposal):
        return sites, proposal
    found = _verified(fit, sites, proposal)
    for site, verified in zip(sites, found, strict=True):
        if verified is None:
            rank_zero_warn(f"No neurons pruned in '{site.target}'. {NOT_SILENT}")
    audible = [verified or site for site, verified in zip(sites, found, strict=True)]
    return audible, [n if verified else n[:0] for n, verified in zip(proposal, found, strict=True)]


def _verified(fit: FitContext, sites: Sequence[PruneSite], neurons: Sequence[Tensor]) -> list[PruneSite | None]:
    """Return the sites at which these neurons fall silent when they are pruned; None for one that does not.

    Where something adds to the head's inputs in between, such as a residual connection, zeros in the rows of the layer
    that feeds it do not silence them; then the columns of the head alone are pruned, which does.
    """

    def silent(those: Sequence[PruneSite], of_each: Sequence[Tensor]) -> list[PruneSite | None]:
        found = find_silent(fit.model, those, of_each, fit.probe)
        # Augmentation may show each rank another batch.
        agreed = [fit.agree(one, of_all=True) for one in found]
        return [site if is_silent else None for site, is_silent in zip(those, agreed, strict=True)]

    found = silent(sites, neurons)
    for at, site in enumerate(sites):
        if found[at] is None and site.consumer is not None and site.layer is not None:
            found[at] = silent([replace(site, layer=None, norm=None)], [neurons[at]])[0]
    return found
