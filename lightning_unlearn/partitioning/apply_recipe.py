"""Applies the recipe to the evidence of this rank's shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.data.task_format import IGNORED
from lightning_unlearn.evidence.rank_share import RankShare
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.identity import copies, mixed
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.partitioning.non_finite import apply_to_finite_rows
from lightning_unlearn.recipes import Recipe, RecipeResult
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.results.duplicates import InputHashes
from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.divergence import first_not_finite
from lightning_unlearn.trainer.validation import score_validation
from lightning_unlearn.utilities.distributed import gather_by_index
from lightning_unlearn.utilities.reduce import Reduce

# Validation samples: of fewer the accuracy says too little.
_FEWEST = 200


def apply_recipe(
    fit: FitContext,
    share: dict[str, Tensor],
    trajectory: TrainingDynamics,
    of_rank: RankShare,
    recipe: Recipe,
    out_of_sample: Callable[[Evidence], Evidence],
) -> tuple[list[ShardResult], Tensor]:
    """Return the recipe's result for each label, and the given labels of the whole training set, (N,) or (N, L).

    Args:
        fit: the running fit.
        share: evidence of the last pass for this rank's rows.
        trajectory: training dynamics of the samples that this rank owns.
        of_rank: the samples of this rank.
        recipe: the recipe.
        out_of_sample: adds the evidence from labels that were not learned yet, for recipes that need it.

    Raises:
        ValueError: if all samples have the same label, or none.
    """
    reduce, task_format = fit.reduce, fit.task_format
    rows = task_format.rows_per_sample
    index, weight, total = of_rank.index, of_rank.weight, of_rank.total
    device = fit.device
    trajectory.merge(None, reduce)
    label = gather_by_index(index, weight, share["label"].reshape(-1, rows), total, reduce)
    identity = gather_by_index(index, weight, share["identity"][::rows], total, reduce)
    judged, fault = [], first_not_finite(fit.model)
    for at, given in enumerate(label.unbind(dim=1)):
        known = given[given >= 0]
        is_one_sided = len(known) == 0 or bool(known.min() == known.max())
        if is_one_sided and rows == 1:
            raise ValueError(
                (
                    f"Expected training labels of at least two classes, but all {len(known)} samples have label"
                    f" {int(known[0])}."
                )
                if len(known)
                else (
                    f"Expected at least one labeled sample, but all {total} samples have"
                    f" ignore_index={task_format.data.ignore_index}."
                )
            )
        of_label = {name: value[at::rows] for name, value in share.items()}
        # Copies of a sample, with the same label, are one for whatever is estimated.
        counts = weight / copies(mixed(identity + given))[index]
        evidence = _evidence(trajectory, of_label, index, counts, of_rank.local * rows + at, device)
        evidence = out_of_sample(evidence)
        verdict = None if is_one_sided else apply_to_finite_rows(recipe, evidence, reduce, fault)
        if verdict is not None:
            verdict = _suggests_only(verdict, torch.unique(known), evidence)
        judged.append(ShardResult(evidence, weight, verdict))
    return judged, label if task_format.task == "multilabel" else label.flatten()


def hashes_of_inputs(share: dict[str, Tensor], one: ShardResult, total: int, reduce: Reduce) -> InputHashes:
    """Return the hashes of every sample's input, by dataset index. Every rank must call it.

    Args:
        share: what the last pass showed of this rank's rows.
        one: of the first label of these.
        total: N.
        reduce: sums over the ranks.
    """
    rows = len(share["identity"]) // len(one.weight)
    # Eight bytes in one number, as sums over ranks know few types.
    packed = share["perceptual"].contiguous().view(torch.int64)
    own = torch.cat([share["identity"][::rows].unsqueeze(1), packed], dim=1)
    every = gather_by_index(one.evidence.index.cpu(), one.weight.cpu(), own, total, reduce)
    return InputHashes(every[:, 0].contiguous(), every[:, 1:].contiguous().view(torch.int8))


def weight_of_copies(judged: Sequence[ShardResult], total: int) -> Tensor:
    """Return (N,) float32, 1/k for each of k copies among this rank's samples, 1 for all others.

    Args:
        judged: results for this rank's shard; with several labels the first is used.
        total: N.
    """
    evidence, weight = judged[0].evidence, torch.ones(total)
    # Neither padding nor a label to be ignored says how many copies there are.
    counts = (judged[0].weight > 0) & (evidence.weight.cpu() > 0)
    weight[evidence.index[counts]] = evidence.weight.cpu()[counts]
    return weight


def validation_accuracy(fit: FitContext) -> float | None:
    """Return the validation accuracy; None with too few validation samples.

    Every rank must call it. None also in a fit without validation, and if ranks synchronize in every forward pass,
    since validation data that cannot be read would then end the fit.
    """
    if fit.is_sharded or not fit.has_validation_data:
        return None
    score = score_validation(fit, say=False)
    return None if score is None or score.samples < _FEWEST else score.accuracy


def _suggests_only(verdict: RecipeResult, occurring: Tensor, evidence: Evidence) -> RecipeResult:
    """Return the result without suggested classes that no sample is labeled as."""
    occurs = torch.isin(verdict.suggested_label, occurring.to(verdict.suggested_label.device))
    if occurs.all():
        return verdict
    share = verdict.suggested_probability
    share = 1 - verdict.clean_probability if share is None else share
    return replace(
        verdict,
        suggested_label=verdict.suggested_label.where(occurs, evidence.label),
        suggested_probability=share.where(occurs, 0),
    )


def _evidence(
    trajectory: TrainingDynamics,
    share: dict[str, Tensor],
    index: Tensor,
    weight: Tensor,
    rows: Tensor,
    device: torch.device,
) -> Evidence:
    """Return this rank's evidence.

    Args:
        trajectory: what training and the passes showed.
        share: what the last pass showed of one label of each of this rank's samples.
        index: (n,) int64, the samples.
        weight: (n,), 0 for one that only pads, 1/k for each of k copies.
        rows: (n,) int64, their rows in the trajectory.
        device: where the recipe computes.
    """
    # A sample that was not drawn in one phase of training is as it was in the last pass.
    blocks = _filled(trajectory.phases(rows), share["last"])
    scores = trajectory.scores(rows)
    counts = weight * (share["label"] != IGNORED)
    many = trajectory.has_margins and trajectory.knows_classes
    return Evidence(
        index=index,
        weight=counts.to(device),
        label=share["label"].clamp(min=0).to(device),
        attribution=blocks.to(device),
        basis=trajectory.basis.to(device),
        margin=share["margin"].to(device),
        aum=scores["margin"].to(device),
        label_confidence=scores["label_confidence"].to(device),
        uncertainty=scores["uncertainty"].to(device),
        loss=share["loss"].to(device),
        prediction=share["prediction"].to(device),
        input_statistics=share["input_statistics"].to(device) if "input_statistics" in share else None,
        neuron_attribution=share["neuron_attribution"].to(device) if "neuron_attribution" in share else None,
        soft_margins=_filled(trajectory.soft_margins(rows), share["soft_margins"]).to(device) if many else None,
        runner_up=share["runner_up"].to(device) if many else None,
        runner_up_probability=share["runner_up_probability"].to(device) if many else None,
    )


def _filled(phases: Sequence[Tensor], last: Tensor) -> Tensor:
    return torch.stack([*(phase.where(phase.isfinite(), last) for phase in phases), last], dim=1)


def memorized_fraction(judged: Sequence[ShardResult], partition: Partition, reduce: Reduce) -> float | None:
    """Return the share of suspect labels that the network predicts; None if no label is suspect."""
    sums = torch.zeros(2)
    by_label = partition.reason.eq(REASONS.index("label"))
    for at, one in enumerate(judged):
        evidence, wrong = one.evidence, by_label
        if partition.is_multilabel:
            wrong = wrong & (partition.suggested_label != partition.label)[:, at]
        counted = (evidence.weight * wrong[evidence.index].to(evidence.weight.device)).cpu()
        sums += torch.stack([counted.sum(), counted[(evidence.prediction == evidence.label).cpu()].sum()])
    suspects, memorized = reduce(sums).tolist()
    return memorized / suspects if suspects else None


def share_predicted(judged: Sequence[ShardResult], reduce: Reduce) -> float:
    """Return how many of the given labels the network predicts; of copies of a sample each counts in part."""
    sums = torch.zeros(2, dtype=torch.float64)
    for one in judged:
        weight = one.evidence.weight.cpu().double()
        right = (one.evidence.prediction == one.evidence.label).cpu()
        sums += torch.stack([weight[right].sum(), weight.sum()])
    right_of_all, all_of_them = reduce(sums).tolist()
    return right_of_all / all_of_them if all_of_them else 0.0
