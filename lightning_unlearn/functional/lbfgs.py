"""L-BFGS on sums that ranks can add: each rank sees the same loss and gradient, and takes the same steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HISTORY = 10
# The loss is a mean per sample: a thousandth of a nat in all of 10,000.
_LOSS, _GRADIENT = 1e-7, 1e-5


def minimize(loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, steps: int) -> Tensor:
    """Return where a function is smallest, near ``start``.

    Args:
        loss_and_gradient: from (P,) to the loss and its gradient (P,), the same on every rank.
        start: (P,) float64.
        steps: at most.

    Returns:
        (P,) float64.

    Example:
        >>> minimize(lambda x: (float(((x - 3) ** 2).sum()), 2 * (x - 3)), torch.zeros(2).double(), 20).round()
        tensor([3., 3.], dtype=torch.float64)
    """
    at = start.clone().requires_grad_()

    def closure() -> float:
        with torch.no_grad():
            loss, gradient = loss_and_gradient(at.detach())
        at.grad = gradient
        return loss

    optimizer = torch.optim.LBFGS(
        [at],
        max_iter=steps,
        history_size=_HISTORY,
        tolerance_change=_LOSS,
        tolerance_grad=_GRADIENT,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return at.detach()
