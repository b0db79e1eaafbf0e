"""The mathematics: tensors in, tensors out; no module, trainer, rank, file or global random state."""

from lightning_unlearn.functional.attribution import class_max_attribution, label_margin, strongest_other
from lightning_unlearn.functional.evidence import confident_disagreement, label_support, shift_to_rate
from lightning_unlearn.functional.latent import LatentClasses, fit_latent_classes, fit_transition, given_posterior
from lightning_unlearn.functional.mixture import GaussianMixture, fit_mixture, standardise
from lightning_unlearn.functional.sensitivity import (
    RegressionSums,
    regression_sums,
    select_neurons,
    solve_sensitivity,
)

__all__ = [
    "GaussianMixture",
    "LatentClasses",
    "RegressionSums",
    "class_max_attribution",
    "confident_disagreement",
    "fit_latent_classes",
    "fit_mixture",
    "fit_transition",
    "given_posterior",
    "label_margin",
    "label_support",
    "regression_sums",
    "select_neurons",
    "shift_to_rate",
    "solve_sensitivity",
    "standardise",
    "strongest_other",
]
