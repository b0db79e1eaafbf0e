"""Messages about pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_unlearn.functional.selection import share_of
from lightning_unlearn.pruning.criteria import Criterion
from lightning_unlearn.pruning.guard import Outcome, ScoreMonitor
from lightning_unlearn.pruning.ranking import Ranking
from lightning_unlearn.pruning.state import PruneState
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn

NOT_SILENT = (
    "Zeroing the weights of its neurons would not zero their outputs, since forward computes them"
    " from more than the layer's weight and bias (an adapter such as LoRA, a quantized weight). Merge"
    " or remove it, or name another layer to prune."
)
OTHER_WEIGHTS = (
    "The weights in use are not those that SensitivityPruneCallback pruned (a checkpoint from before the partition, for"
    " example), so its masks do not describe them."
)


def summary_clause(state: PruneState) -> str:
    """Return what was done in one clause; empty if no neuron was to be pruned."""
    if not state.count and not state.note:
        return ""
    verb = "would prune" if state.is_proposal else "pruned"
    counts = [f"{len(mask.pruned_indices())} of {len(mask.keep)} neurons of '{mask.layer}'" for mask in state.masks]
    return f"{verb} {' and '.join(counts)}{f' ({state.note})' if state.note else ''}"


def guard_note(proposal: Sequence[Tensor], outcome: Outcome, gauge: ScoreMonitor | None) -> str:
    """Return what the guard found; empty without one, or without a neuron to prune."""
    proposed = sum(len(neurons) for neurons in proposal)
    if outcome.rolled_back:
        return f"{outcome.rolled_back} of {proposed} proposed were rolled back: {outcome.reason}"
    return gauge.between(outcome.after) if gauge is not None and proposed else ""


def say_layers(
    state: PruneState, rankings: Sequence[Ranking], proposal: Sequence[Tensor], criterion: Criterion, amount: float
) -> None:
    """Log a line for each layer: how many neurons may be pruned, or why none is."""
    for mask, ranking, proposed, live in zip(state.masks, rankings, proposal, state.live, strict=True):
        if share_of(amount, live) == 0:
            rank_zero_warn(
                f"No neurons pruned: amount={amount} of {live} active neurons in '{mask.layer}' rounds to zero."
            )
        elif len(ranking.order) == 0:
            level = getattr(criterion, "fdr_level", None)
            rank_zero_info(
                f"No neurons pruned in '{mask.layer}': none of {ranking.live} active neurons is"
                f" {'' if level is None else 'significantly '}more active on noisy samples"
                f"{'' if level is None else f' (FDR {level})'}."
            )
        elif len(proposed):
            rank_zero_info(
                f"{len(ranking.order)} of {ranking.live} active neurons in '{mask.layer}' are candidates"
                f" ({criterion.name}); pruning up to {len(proposed)} (amount={amount})."
            )


def warn_of_revived(state: PruneState) -> None:
    """Say that something else writes to pruned neurons."""
    names = " and ".join(f"'{mask.layer}'" for mask in state.masks)
    rank_zero_warn(
        f"Pruned neurons of {names} became nonzero: something else writes to their weights, such as a"
        " callback that loads or averages weights. They are zeroed again, now and whenever this happens"
        " during the fit."
    )
