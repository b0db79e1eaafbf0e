"""Recipes, their results, and when a result is inconclusive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_unlearn.functional.suspects import longest_list
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.utilities.calls import fault_of_call
from lightning_unlearn.utilities.checks import check_choice, check_flag, check_number, check_text, shown
from lightning_unlearn.utilities.reduce import Reduce

# Standard errors by which the components' means must differ before one is called clean.
_DECISIVE = 3.0
_HALF = 0.5
_SELDOM = 0.05
_FEWEST = 2
LONE = 1.5

# What is left of the doubt where nothing can be told: nothing is suspect, and the order stays.
NO_DOUBT = 0.01

NAMED_Z = 3.0
"""Minimum z score of the evidence for wrong labels at which samples are listed for review."""

ACTED_Z = 5.0
"""Minimum z score at which suspects are acted on."""

_ONE = 0.5  # expected number of wrong samples below which there is no list, whatever the z score


def noise_status(z: float, wrong: float, *, is_open: bool = False) -> Literal["found", "weak", "none"]:
    """Return the status of a noise estimate; see :class:`NoiseEstimate`.

    Args:
        z: z score of the evidence for wrong labels.
        wrong: expected number of wrong samples.
        is_open: whether wrong labels cannot be distinguished from samples that are hard to learn, so that none is acted
            on.

    Example:
        >>> noise_status(9.0, 40), noise_status(9.0, 40, is_open=True), noise_status(9.0, 0.2), noise_status(2.0, 40)
        ('found', 'weak', 'none', 'none')
    """
    if wrong < _ONE:
        return "none"
    if z >= ACTED_Z and not is_open:
        return "found"
    return "weak" if z >= NAMED_Z else "none"


@dataclass(frozen=True)
class NoiseEstimate:
    """Estimate of the noise rate of the labels, and of its certainty.

    Args:
        status: ``"found"``: suspects are acted on; ``"weak"``: samples are only listed for review; ``"none"``: there is
            no list.
        rate: share of wrong labels.
        interval: its 95 % interval; the upper end is 1 if the rate is only a lower bound.
        z_score: z score of the evidence for wrong labels.
        sampled: whether samples are only listed because a sampler draws some classes more often.
        names: ``(class, label, share)`` of pairs where the class is often labeled as another.
    """

    status: str
    rate: float
    interval: tuple[float, float]
    z_score: float
    sampled: bool = False
    names: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class RecipeResult:
    """What a recipe returns for one rank's shard.

    Args:
        clean_probability: (n,) float32, probability that the sample is clean.
        suggested_label: (n,) int64, label to use if the sample is not clean.
        suggested_probability: (n,) float32, probability that the suggested label is correct and the input intact; None
            stands for ``1 - clean_probability``.
        label_probability: (n,) float32, probability that the given label is correct; None if not estimated.
        input_probability: (n,) float32, probability that the input is intact; None if not estimated.
        noise_matrix: (C, C) float32, estimated noise transition matrix: row k holds the probabilities of each label for
            true class k. None if not estimated, for example with more than 2,048 classes. The same on every rank.
        notes: lines for the log. The same on every rank.
        warning: why the result should not be acted on; empty if it can be. The same on every rank.
        unusable: (n,) bool, samples that must never be trained on; None if there are none.
        noise: noise estimate for all labels, with which p(clean) is calibrated; None if not estimated. The same on
            every rank.
    """

    clean_probability: Tensor
    suggested_label: Tensor
    suggested_probability: Tensor | None = None
    label_probability: Tensor | None = None
    input_probability: Tensor | None = None
    noise_matrix: Tensor | None = None
    notes: tuple[str, ...] = ()
    warning: str = ""
    unusable: Tensor | None = None
    noise: NoiseEstimate | None = None

    def suspects(self, weight: Tensor, reduce: Reduce, precision: float) -> Tensor:
        """Return (n,) bool, the samples that are not clean.

        With a noise estimate, suspect labels are the longest list with the expected ``precision``, or none if its
        status is not ``"found"``. Without one, and for inputs, suspects have a probability below one half.

        Args:
            weight: (n,), 0 for a row that does not count.
            reduce: sums over the ranks; every rank must call it.
            precision: expected share of wrong samples in the list.
        """
        if self.noise is None:
            return self.clean_probability < _HALF
        of_label = self.clean_probability if self.label_probability is None else self.label_probability
        broken = torch.zeros_like(of_label, dtype=torch.bool)
        if self.input_probability is not None:
            broken = self.input_probability < _HALF
        if self.noise.status != "found":
            return broken
        wrong = 1 - of_label.double()
        return broken | longest_list(wrong, weight * ~broken, precision, reduce=reduce)[0]


EvidenceFrom = Literal["train_steps", "eval_passes"]
RecipeFn = Callable[[Evidence, Reduce], RecipeResult]


@dataclass(frozen=True)
class Recipe:
    """A method that estimates p(clean), and the evidence that it needs.

    Args:
        name: the name in configurations and messages.
        function: takes this rank's :class:`~lightning_unlearn.recipes.evidence.Evidence` and the function that sums
            over ranks, and returns a :class:`RecipeResult`.
        needs_neuron_attribution: compute the per-neuron attributions ``Evidence.neuron_attribution``.
        needs_input_statistics: compute ``Evidence.input_statistics``, activation statistics of an early layer.
        needs_out_of_sample: collect ``Evidence.out_of_sample``, an early epoch and the validation accuracy.
        uses_history: collect evidence of earlier epochs; if False, the last pass alone.
        soft_targets: regress neurons on p(clean); if False, on the two clusters, as in the paper.
        evidence_from: ``"train_steps"`` reads evidence from the training steps, and falls back to evaluation passes
            where that is not possible; ``"eval_passes"`` runs one pass over the training set after each epoch.
        attribution_method: name of a layer method of Captum, one of
            ``lightning_unlearn.attribution.ATTRIBUTION_METHODS``.
        input_layer: dotted path of the early layer whose output shows corrupted inputs; by default the first block.
        min_class_fraction: fraction of each class that is always kept, in [0, 1), rounded up: its samples most likely
            to be clean.

    Raises:
        ValueError: for an argument out of range.
    """

    name: str
    function: RecipeFn
    needs_neuron_attribution: bool = False
    needs_input_statistics: bool = False
    needs_out_of_sample: bool = False
    uses_history: bool = True
    soft_targets: bool = True
    evidence_from: EvidenceFrom = "train_steps"
    attribution_method: str = "gradient_x_activation"
    input_layer: str | None = None
    min_class_fraction: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_text("name", self.name, "a text, the name of the recipe"))
        function: Any = self.function
        if fault := fault_of_call(function, 2) if callable(function) else "is not a function":
            raise ValueError(
                f"Expected function of recipe '{self.name}' to take the evidence and the function that sums over ranks,"
                f" but {shown(self.function)} {fault}."
            )
        for name in (
            "needs_neuron_attribution",
            "needs_input_statistics",
            "needs_out_of_sample",
            "uses_history",
            "soft_targets",
        ):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        allowed = get_args(EvidenceFrom)
        object.__setattr__(self, "evidence_from", check_choice("evidence_from", self.evidence_from, allowed))
        fraction = check_number("min_class_fraction", self.min_class_fraction, least=0, below=1)
        object.__setattr__(self, "min_class_fraction", fraction)
        method = check_text("attribution_method", self.attribution_method, "the name of a layer method of Captum")
        object.__setattr__(self, "attribution_method", method)
        if self.input_layer is not None:
            layer = check_text("input_layer", self.input_layer, "the dotted path of a layer, or None")
            object.__setattr__(self, "input_layer", layer)


def cleaner_component(score: Tensor, share: Tensor, weight: Tensor, reduce: Reduce) -> int | None:
    """Return the component with the higher mean score; None if too close to tell, or if one holds a lone sample.

    Args:
        score: (n,), higher is cleaner.
        share: (n, 2), probability of each component.
        weight: (n,).
        reduce: sums over the ranks.
    """
    s, w = score.double().unsqueeze(1), share * weight.double().unsqueeze(1)
    count, first, second = reduce(torch.stack([w.sum(0), (w * s).sum(0), (w * s * s).sum(0)]))
    # A sample that is far from all others, by an overflow say, draws a component to itself.
    if (count < LONE).any():
        return None
    mean = first / count
    standard_error = ((second / count - mean**2).clamp(min=0) / count).sum().sqrt()
    gap = (mean[1] - mean[0]).item()
    if not math.isfinite(gap) or abs(gap) <= _DECISIVE * standard_error.item():
        return None
    return int(gap > 0)


def undecided(evidence: Evidence, what: str) -> RecipeResult:
    """Call every sample clean, with a warning that says why nothing can be told."""
    return RecipeResult(
        torch.ones_like(evidence.weight),
        evidence.label,
        warning=(
            f"cannot tell which group is clean: the two do not differ in {what}, or one of them is a single sample"
        ),
    )


def single_class_prediction(evidence: Evidence, reduce: Reduce) -> RecipeResult | None:
    """Return a result that must not be acted on if the last pass predicts the same class for all samples, else None.

    Scores of a dead network, or of one that always predicts the largest class, depend on nothing but the given label.
    """
    zeros = evidence.weight.new_zeros(evidence.num_classes).double()
    counts = reduce(zeros.index_add(0, evidence.prediction, evidence.weight.double()))
    if int((counts > 0).sum()) > 1:
        return None
    return RecipeResult(
        torch.ones_like(evidence.weight),
        evidence.label,
        warning="the model predicts the same class for all samples",
    )


def judged_labels(given: Tensor, said: Tensor) -> Tensor:
    """Return which labels can be evaluated: none, all, or those of the classes that the network has learned.

    A class counts as learned if the number of samples predicted as it is at least a twentieth of the number labeled as
    it. At least two classes must be learned, and they must hold half of the samples. If fewer than half of the classes
    are learned, samples labeled as the others all look wrong, so these are not evaluated.

    Args:
        given: (C,), number of samples labeled as each class.
        said: (C,), number of samples predicted as each class.

    Returns:
        (C,) bool.

    Example:
        >>> judged_labels(torch.tensor([50.0, 50, 5, 5, 5]), torch.tensor([65.0, 50, 0, 0, 0]))
        tensor([ True,  True, False, False, False])
    """
    known, present = (given > 0) & (said >= _SELDOM * given), int((given > 0).sum())
    is_enough = int(known.sum()) >= _FEWEST and bool(given[known].sum() >= given.sum() / 2)
    if not is_enough:
        return torch.zeros_like(known)
    return known if 2 * int(known.sum()) < present else torch.ones_like(known)
