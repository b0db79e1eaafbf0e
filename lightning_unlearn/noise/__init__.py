"""Noise for experiments: labels that are wrong and dataset wrappers that corrupt inputs, and remember where.

Everything is drawn once, from a seed and the dataset index: the same sample is noisy, in the same way, in every epoch,
on every worker and on every rank. The masks say which samples were changed. They are for evaluation: nothing in the
package reads them. The wrappers nest in either order, for wrong labels and corrupted inputs at once.
"""

from lightning_unlearn.noise.human import human_labels
from lightning_unlearn.noise.inputs import GaussianInputs, NoiseAtSnr, PaperImageNoise, PaperMfccNoise
from lightning_unlearn.noise.labels import (
    CIFAR10_ASYMMETRIC,
    NoisyLabels,
    asymmetric_labels,
    flip_labels,
    matrix_labels,
    symmetric_labels,
)

__all__ = [
    "CIFAR10_ASYMMETRIC",
    "GaussianInputs",
    "NoiseAtSnr",
    "NoisyLabels",
    "PaperImageNoise",
    "PaperMfccNoise",
    "asymmetric_labels",
    "flip_labels",
    "human_labels",
    "matrix_labels",
    "symmetric_labels",
]
