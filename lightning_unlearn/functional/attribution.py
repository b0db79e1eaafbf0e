"""From gradients and activations to attributions.

The paper (RLAP, step 2) takes the maximum of the gradient over the classes and never looks at the given label; that is
:func:`class_max_attribution`. The label's own evidence is the *margin*: the logit of the given label minus the
strongest other logit. Its gradient x activation, summed over the neurons of a layer, is what supports the given label
at that layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runner_up_class(logits: Tensor, label: Tensor) -> Tensor:
    """Return the class with the largest logit other than the given one.

    Args:
        logits: (B, C) with C >= 2.
        label: (B,) int64, the given classes.

    Returns:
        (B,) int64.

    Raises:
        ValueError: for fewer than two classes, or if there is not one row per label.

    Example:
        >>> runner_up_class(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([2])
    """
    if logits.shape[1] < 2:
        raise ValueError(f"Expected logits of at least two classes, shape (B, C >= 2), but got {tuple(logits.shape)}.")
    if len(logits) != len(label):
        raise ValueError(f"Expected a row of logits for each of {len(label)} labels, but got {len(logits)}.")
    return logits.detach().scatter(1, label.unsqueeze(1), -torch.inf).argmax(dim=1)


def logit_difference(logits: Tensor, label: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the logit of one class minus that of another.

    Args:
        logits: (B, C).
        label: (B,) int64.
        other: (B,) int64; without it nothing is subtracted.

    Returns:
        (B,).

    Example:
        >>> logit_difference(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1]), torch.tensor([2]))
        tensor([-1.])
    """
    given = logits.gather(1, label.unsqueeze(1)).squeeze(1)
    return given if other is None else given - logits.gather(1, other.unsqueeze(1)).squeeze(1)


def label_margin(logits: Tensor, label: Tensor) -> Tensor:
    """Return the logit of the given label minus the strongest other logit.

    Args:
        logits: (B, C) with C >= 2.
        label: (B,) int64.

    Returns:
        (B,); positive where the model predicts the given label.

    Example:
        >>> label_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1]))
        tensor([-2.])
    """
    return logit_difference(logits, label, runner_up_class(logits, label))


def class_max_attribution(class_gradients: Tensor, activation: Tensor) -> Tensor:
    """Return the paper's attribution (RLAP, step 2): ``|max_c g_c * z|``, the maximum taken on the gradient.

    Args:
        class_gradients: (C, B, D, ...), gradient of each class's logit at the layer.
        activation: (B, D, ...), the layer's activation z.

    Returns:
        (B, D), see :func:`~lightning_unlearn.functional.attribution.neuron_magnitude`.

    Example:
        >>> class_max_attribution(torch.tensor([[[1.0, -3.0]], [[2.0, -1.0]]]), torch.tensor([[5.0, 4.0]]))
        tensor([[10.,  4.]])
    """
    return neuron_magnitude(class_gradients.amax(dim=0) * activation)


def neuron_magnitude(attribution: Tensor) -> Tensor:
    """Return one magnitude per neuron.

    Args:
        attribution: (B, D, ...).

    Returns:
        (B, D); positions beyond the neuron's dimension (the pixels of a feature map) are summed before the magnitude is
        taken, since they belong to one neuron.

    Example:
        >>> neuron_magnitude(torch.tensor([[[1.0, -3.0], [2.0, 2.0]]]))
        tensor([[2., 4.]])
    """
    return attribution.flatten(2).sum(dim=2).abs() if attribution.ndim > 2 else attribution.abs()
