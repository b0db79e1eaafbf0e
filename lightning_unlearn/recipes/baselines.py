"""The paper's recipe and what it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.functional.gaussian import GaussianMixture
from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.standardization import standardize
from lightning_unlearn.recipes.base import LONE, RecipeResult, cleaner_component, single_class_prediction, undecided
from lightning_unlearn.recipes.classes import class_scores, runner_up, with_coordinates
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.utilities.reduce import Reduce, reduce_together


def rlap_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Return the paper's steps 2-3 on ``Evidence.neuron_attribution``, without its noise mask.

    The reference code takes from the true noise mask which of the two clusters is the clean one. Here it is the one
    whose given labels the model fits better: the lower mean cross-entropy.

    Raises:
        ValueError: without rows; where the samples are too few for the neurons, on every rank alike.
    """
    if evidence.neuron_attribution is None:
        raise ValueError(
            "The recipe 'rlap' needs Evidence.neuron_attribution, per-neuron attributions (n, D), but got None."
        )
    rows = standardize(evidence.neuron_attribution, evidence.weight, reduce)
    counted = (evidence.weight > 0).sum(dtype=torch.float64)
    number, spread = reduce_together(reduce, counted, rows.abs().sum(dim=0, dtype=torch.float64))
    samples = int(number.item())
    # Whether a factorization of what is singular fails is up to rounding, and so to the processor.
    if samples <= int((spread > 0).sum()):
        raise ValueError(_too_few(samples, rows.shape[1]))
    try:
        share = fit_mixture(rows, evidence.weight, reduce=reduce).posterior(rows)
    # Of moments that are summed over the ranks, so on all of them. It is documented, but not in __all__.
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(_too_few(samples, rows.shape[1])) from error
    clean = cleaner_component(-evidence.loss, share, evidence.weight, reduce)
    if clean is None:
        return undecided(evidence, "the model's loss on them")
    probability = share[:, clean].float()
    # The paper's clusters speak of the sample and not of its label: the model's word is all there is.
    return RecipeResult(probability, evidence.prediction, (1 - probability) * confidence(evidence))


def _too_few(samples: int, neurons: int) -> str:
    return (
        f"The recipe 'rlap' fits two Gaussians to the attributions of {neurons:,} neurons and needs more"
        f" samples than neurons, but got {samples:,}: the covariance of a cluster is singular. Use more"
        " samples, a layer with fewer neurons (layer=), or recipe='auto', which has no such limit."
    )


def _judge_score(score: Tensor, evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Return a mixture on one number per sample, the component with the higher mean being clean."""
    if blind := single_class_prediction(evidence, reduce):
        return blind
    rows = standardize(score.double().unsqueeze(1), evidence.weight, reduce)
    mixture: GaussianMixture = fit_mixture(rows, evidence.weight, reduce=reduce)
    mean = mixture.mean.squeeze(1)
    count = reduce(mixture.posterior(rows).double().T @ evidence.weight.double())
    if mean[0] == mean[1] or bool((count < LONE).any()):
        return undecided(evidence, "the score")
    probability = mixture.posterior_monotone(rows, int(mean[1] > mean[0])).float()
    rival, share = runner_up(evidence)
    return RecipeResult(probability, rival, (1 - probability) * share, label_probability=probability)


def confidence(evidence: Evidence) -> Tensor:
    """Return (n,) in [0, 1], the probability of the model's own prediction in the last pass; 0 without coordinates."""
    if not bool(with_coordinates(evidence.basis).any()):
        return torch.zeros_like(evidence.weight)
    return class_scores(evidence, evidence.attribution[:, -1]).softmax(dim=1).amax(dim=1)


def loss_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Fit a mixture to the last pass's loss, the lower being clean (Arazo et al. 2019, DivideMix): a baseline."""
    return _judge_score(-evidence.loss, evidence, reduce)


def aum_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Fit a mixture to the margin averaged over training, higher is clean (AUM, Pleiss et al. 2020): a baseline."""
    return _judge_score(evidence.aum, evidence, reduce)


def argmax_recipe(evidence: Evidence, reduce: Reduce) -> RecipeResult:
    """Call a sample clean if the model predicts its label; its probability is that against the rival: a baseline."""
    if blind := single_class_prediction(evidence, reduce):
        return blind
    probability = evidence.margin.sigmoid().float()
    return RecipeResult(
        probability, evidence.prediction, (1 - probability) * confidence(evidence), label_probability=probability
    )
