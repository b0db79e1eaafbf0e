"""What a recipe is given: one rank's share of what the model says about the training set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

NOT_BY_SAMPLE = ("basis", "unseen")
"""Fields of :class:`Evidence` that have no row per sample."""


@dataclass(frozen=True, eq=False)
class OutOfSample:
    """What a fit has shown that does not depend on labels it had learned already; the same on every rank.

    Args:
        early: a ``PrequentialRate`` of the training steps of one early
            epoch, its bias (C,); None where no such epoch was read.
        drawn: (C,) float64, how often samples of each class were drawn in that epoch; None likewise.
        accuracy: share of the validation samples whose given label is predicted; None without enough of them.
        left_out: a ``PrequentialRate`` of leave-one-out scores of features that training has not changed, its bias
            (C,); None where there are none, or where they do not tell.
    """

    early: Any = None
    drawn: Tensor | None = None
    accuracy: float | None = None
    left_out: Any = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model says about one rank's share of the training set, a row per sample.

    Args:
        index: (n,) int64, position of the sample in the dataset.
        weight: (n,) 1 for a row that counts, 1/k for each of k copies of a sample with the same label, 0 for one that
            only pads the share to the length of the other ranks'.
        label: (n,) int64, the given label.
        attribution: (n, P, r) class attributions in the coordinates ``basis``: the mean over each quarter of training,
            then the last pass, in eval mode; P is less than five where there were too few epochs.
        basis: (C, r), orthonormal columns; ``attribution @ basis.T`` are attributions of the classes, less their mean.
        margin: (n,) attribution of the given label's logit less the strongest other, in the last pass.
        mean_margin: (n,) the same, averaged over all passes: the area under the margin (AUM).
        support: (n,) in [0, 1], how strongly the layer supports the given label against the strongest other, averaged
            over all passes (see :func:`~lightning_unlearn.functional.label_confidence`).
        uncertainty: (n,) entropy of the predicted classes, averaged over all passes, in nats.
        loss: (n,) cross-entropy of the given label in the last pass, in nats.
        prediction: (n,) int64, strongest class of the last pass.
        response: (n, 2) how strongly an early layer responds to the input in the last pass: the norms, over its
            neurons, of their means and of their spreads over positions; (n, 1) for a layer without positions; None
            where there is no such layer.
        rows: (n, D) per-neuron attributions of the last pass, for the recipes that ask for them, else None.
        unseen: what was said of labels that were not learned yet, for the recipes that ask for it, else None.
        left_out: (n, r) leave-one-out logits of features that training has not changed, in the coordinates ``basis``;
            None without ``unseen.left_out``, and where not all samples were taken for it.
        soft_margins: (n, P, K) of the same parts as ``attribution``, where more classes occur than have coordinates,
            else None; see ``lightning_unlearn.functional.soft_margin``. ``basis`` is (C, 0) then, or, for recipes
            of users, a random part of the classes' differences.
        rival: (n,) int64, the strongest class of the last pass other than the given label, where there are soft
            margins, else None.
        rival_share: (n,) its probability among the classes other than the given label; None likewise.
    """

    index: Tensor
    weight: Tensor
    label: Tensor
    attribution: Tensor
    basis: Tensor
    margin: Tensor
    mean_margin: Tensor
    support: Tensor
    uncertainty: Tensor
    loss: Tensor
    prediction: Tensor
    response: Tensor | None = None
    rows: Tensor | None = None
    unseen: OutOfSample | None = None
    left_out: Tensor | None = None
    soft_margins: Tensor | None = None
    rival: Tensor | None = None
    rival_share: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.basis)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in NOT_BY_SAMPLE and value is not None and value.shape[:1] != self.index.shape:
                raise ValueError(
                    f"Evidence.{field.name} must have one row per sample ({len(self.index)}), but has shape"
                    f" {tuple(value.shape)}."
                )
