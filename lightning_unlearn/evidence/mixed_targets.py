"""Whether a step's targets are mixed (MixUp, CutMix), seen in its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# A pull on another class counts from this share of the row's largest gradient on,
_CLEAR_PULL = 0.1
# With two classes: rows whose label has a smaller probability than any usual smoothing asks for.
_UNSURE = 0.7


def has_mixed_target(logits: Tensor, gradient: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows whose loss raises the logit of a class that is not the given label, as a mixed target does.

    A loss of the given label alone treats all other classes alike: whatever it is (cross-entropy with class weights or
    label smoothing, focal, binary, squared error), of two other classes the one with the smaller logit is never pushed
    down harder. So a row counts if its most negative gradient among the other classes is clearly negative *and* clearly
    below that of the other class with the smallest logit. Both are relative to the row's largest gradient, so that no
    scale matters (reduction, accumulation, mixed precision, weights of samples).

    With two classes there is only one other: there a row counts if the loss raises it above the label although the
    label's probability is below 0.7. What leaves the label at least 0.7 of the target is not seen then.

    Args:
        logits: (B, C).
        gradient: (B, C), of the loss with respect to the logits.
        label: (B,) int64.

    Returns:
        (B,) bool, the rows that can be judged, since their gradient is finite and not zero; (B,) bool, those of them
        that are pulled elsewhere.

    Example:
        >>> logits, label = torch.tensor([[0.5, 0.3, -1.0]]), torch.tensor([0])
        >>> alone = logits.softmax(dim=1) - torch.tensor([[1.0, 0.0, 0.0]])
        >>> mixed = logits.softmax(dim=1) - torch.tensor([[0.5, 0.5, 0.0]])
        >>> has_mixed_target(logits, alone, label)[1], has_mixed_target(logits, mixed, label)[1]
        (tensor([False]), tensor([True]))
    """
    gradient = gradient.float()
    largest = gradient.abs().amax(dim=1)
    judged = largest.isfinite() & (largest > 0)
    given = label.unsqueeze(1)
    others = gradient.scatter(1, given, torch.inf)
    lowest = others.amin(dim=1)
    if logits.shape[1] == 2:
        probability, at_label = (x.gather(1, given).squeeze(1) for x in (logits.softmax(dim=1), gradient))
        return judged, judged & (probability < _UNSURE) & (lowest <= at_label)
    at_smallest = others.gather(1, logits.scatter(1, given, torch.inf).argmin(dim=1, keepdim=True)).squeeze(1)
    clear = _CLEAR_PULL * largest
    return judged, judged & (lowest < -clear) & (at_smallest - lowest > clear)
