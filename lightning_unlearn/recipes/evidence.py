"""The evidence that a recipe receives: one rank's shard of what the model shows of the training set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

NOT_BY_SAMPLE = ("basis", "out_of_sample")
"""Fields of :class:`Evidence` without a row per sample."""


@dataclass(frozen=True, eq=False)
class OutOfSample:
    """Evidence from predictions on labels that the model had not learned; the same on every rank.

    Args:
        early: a ``PrequentialRate`` of the training steps of one early epoch, with a bias of shape (C,); None if no
            such epoch was read.
        drawn: (C,) float64, number of samples of each class that were drawn in that epoch; None if there is none.
        accuracy: fraction of the validation samples whose given label is predicted; None with too few of them.
        left_out: a ``PrequentialRate`` of leave-one-out scores of features that training has not changed, with a bias
            of shape (C,); None if there are no such features, or if they cannot tell right from wrong labels.
    """

    early: Any = None
    drawn: Tensor | None = None
    accuracy: float | None = None
    left_out: Any = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the model shows of one rank's shard of the training set, one row per sample.

    Args:
        index: (n,) int64, position of the sample in the dataset.
        weight: (n,), 1 for a row that counts, 1/k for each of k copies of a sample with the same label, 0 for a row
            that only pads the shard to the length of the other ranks'.
        label: (n,) int64, the given label.
        attribution: (n, P, r), class attributions in the coordinates ``basis``: the mean over each quarter of training,
            then the last pass in eval mode. P is less than five after few epochs.
        basis: (C, r), orthonormal columns; ``attribution @ basis.T`` are the class attributions minus their mean.
        margin: (n,), attribution of the given label's logit minus that of the largest other logit, in the last pass.
        aum: (n,), the same margin averaged over all passes, the area under the margin (AUM).
        label_confidence: (n,) in [0, 1], sigmoid of the margin, averaged over all passes
            (see :func:`~lightning_unlearn.functional.label_confidence`).
        uncertainty: (n,), entropy of the predicted classes, averaged over all passes, in nats.
        loss: (n,), cross-entropy of the given label in the last pass, in nats.
        prediction: (n,) int64, class with the largest logit in the last pass.
        input_statistics: (n, 2), activation statistics of an early layer in the last pass: the norms, over its neurons,
            of the mean and of the standard deviation over positions; (n, 1) for a layer without positions. None without
            such a layer.
        neuron_attribution: (n, D), per-neuron attributions of the last pass; None unless the recipe sets
            ``needs_neuron_attribution``.
        out_of_sample: evidence from labels that were not learned yet; None unless the recipe sets
            ``needs_out_of_sample``.
        left_out: (n, r), leave-one-out logits of features that training has not changed, in the coordinates ``basis``;
            None without ``out_of_sample.left_out``, or if they were not computed for all samples.
        soft_margins: (n, P, K), soft margins of the same P parts as ``attribution``, if more classes occur than have
            coordinates; else None (see ``lightning_unlearn.functional.soft_margin``). ``basis`` is then (C, 0) or, for
            a user's recipe, a random projection of the class differences.
        runner_up: (n,) int64, the class with the largest logit in the last pass other than the given label; None
            without ``soft_margins``.
        runner_up_probability: (n,), its probability among the classes other than the given label; None likewise.
    """

    index: Tensor
    weight: Tensor
    label: Tensor
    attribution: Tensor
    basis: Tensor
    margin: Tensor
    aum: Tensor
    label_confidence: Tensor
    uncertainty: Tensor
    loss: Tensor
    prediction: Tensor
    input_statistics: Tensor | None = None
    neuron_attribution: Tensor | None = None
    out_of_sample: OutOfSample | None = None
    left_out: Tensor | None = None
    soft_margins: Tensor | None = None
    runner_up: Tensor | None = None
    runner_up_probability: Tensor | None = None

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
