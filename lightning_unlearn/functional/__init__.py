"""The mathematics: tensors in, tensors out; no module, trainer, rank, file or global random state."""

from lightning_unlearn.functional.attribution import class_max_attribution, label_margin, strongest_other
from lightning_unlearn.functional.evidence import label_support, support_log_odds, update_majority
from lightning_unlearn.functional.mixture import GaussianMixture, fit_mixture, standardise
from lightning_unlearn.functional.sensitivity import (
    RegressionSums,
    regression_sums,
    select_neurons,
    solve_sensitivity,
)

__all__ = [
    "GaussianMixture",
    "RegressionSums",
    "class_max_attribution",
    "fit_mixture",
    "label_margin",
    "label_support",
    "regression_sums",
    "select_neurons",
    "solve_sensitivity",
    "standardise",
    "strongest_other",
    "support_log_odds",
    "update_majority",
]
