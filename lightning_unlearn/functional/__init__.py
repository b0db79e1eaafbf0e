"""The mathematics: tensors in, tensors out; no module, trainer, rank, file or global random state."""

from lightning_unlearn.functional.attribution import class_max_attribution, label_margin, runner_up_class
from lightning_unlearn.functional.evidence import confident_disagreement, label_confidence
from lightning_unlearn.functional.gaussian import GaussianMixture
from lightning_unlearn.functional.importance import NeuronSums, importance_ratio, magnitude, neuron_sums
from lightning_unlearn.functional.latent_classes import LatentClasses, fit_latent_classes
from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.selection import benjamini_hochberg, noise_neurons, select_neurons
from lightning_unlearn.functional.sensitivity import RegressionSums, Sensitivity, regression_sums, solve_sensitivity
from lightning_unlearn.functional.standardization import standardize
from lightning_unlearn.functional.transition import LogTransition, fit_transition, given_posterior

__all__ = [
    "GaussianMixture",
    "LatentClasses",
    "LogTransition",
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
    "importance_ratio",
    "label_confidence",
    "label_margin",
    "magnitude",
    "neuron_sums",
    "noise_neurons",
    "regression_sums",
    "runner_up_class",
    "select_neurons",
    "solve_sensitivity",
    "standardize",
]
