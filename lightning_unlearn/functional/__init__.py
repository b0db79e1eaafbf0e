"""The mathematics: tensors in, tensors out; no module, trainer, rank, file or global random state."""

from lightning_unlearn.functional.attribution import class_max_attribution, label_margin, strongest_other
from lightning_unlearn.functional.evidence import confident_disagreement, label_support
from lightning_unlearn.functional.gaussian import GaussianMixture
from lightning_unlearn.functional.importance import NeuronSums, importance_ratio, magnitude, neuron_sums
from lightning_unlearn.functional.latent_classes import LatentClasses, fit_latent_classes
from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.selection import benjamini_hochberg, harmful_neurons, select_neurons
from lightning_unlearn.functional.sensitivity import RegressionSums, Sensitivity, regression_sums, solve_sensitivity
from lightning_unlearn.functional.standardize import standardise
from lightning_unlearn.functional.transition import LogNames, fit_transition, given_posterior

__all__ = [
    "GaussianMixture",
    "LatentClasses",
    "LogNames",
    "NeuronSums",
    "RegressionSums",
    "Sensitivity",
    "benjamini_hochberg",
    "class_max_attribution",
    "confident_disagreement",
    "fit_latent_classes",
    "fit_mixture",
    "fit_transition",
    "given_posterior",
    "harmful_neurons",
    "importance_ratio",
    "label_margin",
    "label_support",
    "magnitude",
    "neuron_sums",
    "regression_sums",
    "select_neurons",
    "solve_sensitivity",
    "standardise",
    "strongest_other",
]
