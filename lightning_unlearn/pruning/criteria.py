"""By what neurons are ranked: the regression on p(clean), and what it is compared with.

A criterion of your own is a subclass of :class:`Criterion` with a ``score``:

    >>> class Frequency(Criterion):
    ...     '''Prunes the neurons that are seldom active for clean samples.'''
    ...
    ...     def score(self, neurons):
    ...         return -neurons.clean.positive / neurons.clean.count
    >>> Frequency().name
    'Frequency'
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unlearn.functional.importance import NeuronSums, importance_ratio, magnitude
from lightning_unlearn.functional.selection import in_order, noise_neurons
from lightning_unlearn.functional.sensitivity import Sensitivity as Regression
from lightning_unlearn.utilities.checks import check_choice, check_number, check_seed

L2_PENALTY = 1e-3
"""On standardized coefficients. It shrinks a direction in which neurons hardly differ, with a thousandth of the
variance of one neuron, to half: what collinear neurons have in common stays, what tells them apart is noise."""


@dataclass(frozen=True, eq=False)
class NeuronStatistics:
    """Statistics of the D neurons of one layer, as received by a criterion.

    Args:
        layer: dotted path of the layer whose activations are read.
        epoch: epoch of the partition.
        noisy: sums of activations over the suspect samples.
        clean: sums of activations over the clean samples.
        noisy_gradient: sums of gradient x activation over the suspect samples, if the criterion sets
            ``needs_gradients``.
        clean_gradient: the same over the clean samples.
        weight: weight of the layer, if the criterion sets ``needs_weight``.
        dimension: the dimension of the neurons in ``weight``.
    """

    layer: str
    epoch: int
    noisy: NeuronSums
    clean: NeuronSums
    noisy_gradient: NeuronSums | None = None
    clean_gradient: NeuronSums | None = None
    weight: Tensor | None = None
    dimension: int = 0


class Criterion:
    """Ranks the neurons of a layer; those of the largest score are pruned first, always ``amount`` of them.

    A sample counts by its mean activation over positions, and with ``per_position`` by its activation at each. The sums
    are over all ranks, and ``score`` must be the same on each of them.
    """

    needs_gradients: ClassVar[bool] = False
    needs_weight: ClassVar[bool] = False
    per_position: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For the log."""
        return type(self).__name__

    def __repr__(self) -> str:
        """Return the criterion as the summary of a fit records it."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Return (D,), larger for a neuron that is to be pruned sooner."""
        raise NotImplementedError(f"Expected {type(self).__name__} to implement score(neurons).")


@dataclass(frozen=True)
class Sensitivity(Criterion):
    """Linear regression of p(clean) on the activations, in one pass from sums (RLAP, step 4).

    Neurons that are significantly more active on noisy samples are pruned, the most harmful first. With the recipe
    ``"rlap"`` it follows the paper: least squares of the two clusters, neurons of largest magnitude of either sign,
    without a test.

    Args:
        fdr_level: false discovery rate of the test (Benjamini and Hochberg), the expected share of false positives
            among the significant neurons. None disables the test: all neurons of the harmful sign may be pruned.
        l2_penalty: L2 penalty on standardized coefficients, per sample; by default 0.001, and 0 with the recipe
            ``"rlap"``.
    """

    fdr_level: float | None = 0.05
    l2_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.fdr_level is not None:
            level = check_number("fdr_level", self.fdr_level, above=0, below=1, meaning="or None for no test")
            object.__setattr__(self, "fdr_level", level)
        if self.l2_penalty is not None:
            object.__setattr__(self, "l2_penalty", check_number("l2_penalty", self.l2_penalty, least=0))

    @property
    def name(self) -> str:
        """For the log."""
        return "sensitivity"

    def order(self, found: Regression, *, soft: bool) -> Tensor:
        """Return (K,) int64, the neurons that may be pruned, the worst first.

        Args:
            found: the regression.
            soft: whether it is of probabilities; else of the two clusters, as the paper has it.
        """
        if soft:
            return noise_neurons(found, self.fdr_level)
        return in_order(found.coefficient.abs(), found.is_live & (found.coefficient != 0))


@dataclass(frozen=True)
class Random(Criterion):
    """Neurons at random, of each layer and in each round by themselves.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed("seed", self.seed))

    @property
    def name(self) -> str:
        """For the log."""
        return "random"

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Return a uniform number in [0, 1), the same in every process."""
        drawn_from = repr((self.seed, neurons.epoch, neurons.layer)).encode()
        seed = int.from_bytes(hashlib.sha256(drawn_from).digest()[:8], "big") >> 1
        return torch.rand(len(neurons.clean.total), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Neurons whose weights have the smallest norm."""

    needs_weight: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """For the log."""
        return "magnitude"

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Return the negative norm of the weights of each neuron."""
        if neurons.weight is None:
            raise ValueError("Expected the weight of the layer, but got None.")
        return -magnitude(neurons.weight, neurons.dimension).cpu()


@dataclass(frozen=True)
class ActivationRatio(Criterion):
    """An importance of activations for suspect samples over that for clean ones.

    Args:
        statistic: ``"mean_abs"``, ``"rms"``, ``"std"`` or ``"frequency"``.
    """

    statistic: str = "mean_abs"
    per_position: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("statistic", self.statistic, ("mean_abs", "rms", "std", "frequency"))

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.statistic}_ratio"

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Return the ratio."""
        return importance_ratio(neurons.noisy, neurons.clean, self.statistic)


@dataclass(frozen=True)
class GradientRatio(Criterion):
    """An importance by gradients of the loss of the given labels, for suspect samples over that for clean ones.

    Args:
        statistic: ``"taylor"`` or ``"hessian"``.
    """

    statistic: str = "taylor"
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("statistic", self.statistic, ("taylor", "hessian"))

    @property
    def name(self) -> str:
        """For the log."""
        return self.statistic

    def score(self, neurons: NeuronStatistics) -> Tensor:
        """Return the ratio."""
        if neurons.noisy_gradient is None or neurons.clean_gradient is None:
            raise ValueError("Expected sums of gradient x activation, but got None.")
        return importance_ratio(neurons.noisy_gradient, neurons.clean_gradient, self.statistic)


_NAMED: tuple[Criterion, ...] = (
    *(Sensitivity(), Random(), Magnitude()),
    *(ActivationRatio(statistic) for statistic in ("mean_abs", "rms", "std", "frequency")),
    *(GradientRatio(statistic) for statistic in ("taylor", "hessian")),
)
CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in _NAMED}
"""By name, with their defaults."""


def find_criterion(criterion: Any) -> Criterion:
    """Return the criterion of a name, or the one that is given.

    Raises:
        ValueError: for another name, or something else.

    Example:
        >>> find_criterion("magnitude"), find_criterion(Random(seed=3))
        (Magnitude(), Random(seed=3))
    """
    if isinstance(criterion, Criterion):
        return criterion
    return CRITERIA[check_choice("criterion", criterion, tuple(CRITERIA))]


def check_score(criterion: Criterion, score: Any, neurons: int, layer: str) -> Tensor:
    """Return (D,) float64, what a criterion has given, if it can be ranked.

    Raises:
        ValueError: if it cannot.
    """
    if not isinstance(score, Tensor) or score.shape != (neurons,) or not bool(score.isfinite().all()):
        got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {type(score).__name__}"
        if isinstance(score, Tensor) and score.shape == (neurons,):
            got = "NaN or infinity"
        raise ValueError(
            f"Expected the score of criterion {criterion.name} to be a tensor of {neurons} finite numbers, one for each"
            f" neuron of '{layer}', but got {got}."
        )
    return score.detach().double().cpu()
