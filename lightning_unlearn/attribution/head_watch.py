"""What the head returns in a training step, and the gradient that the loss sends there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_unlearn.attribution import watch_output


@dataclass(eq=False)
class Step:
    """One training step, from its batch to its gradient; all as it came, as a window of steps is read at once.

    Args:
        batch: of B dataset indices, as the batch sampler drew it.
        label: as the batch holds it.
        columns: K, of an output.
        position: in [0, 1), how much of the epoch had passed.
        calls: how often the head was called with gradients.
        output: (B, K), or (B,) of a binary task, of the first call.
        gradient: like the output, what the loss sent to it; None before a backward pass.
        fault: why the first call's output cannot be used.
    """

    batch: Any
    label: Any
    columns: int
    position: float = 0.0
    calls: int = 0
    output: Tensor | None = None
    gradient: Tensor | None = None
    fault: str = ""

    def look(self, output: Any) -> None:
        """Take what the head returned, but of a call without gradients: a teacher's, or that of a metric."""
        if not isinstance(output, Tensor) or output.requires_grad:
            self._take(output)

    def _take(self, output: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            return
        samples, columns = len(self.batch), self.columns
        expected = [(samples, columns), (samples,)] if columns == 1 else [(samples, columns)]
        if not isinstance(output, Tensor) or tuple(output.shape) not in expected:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            self.fault = f"its output {shape} does not have one row for each of the batch's {samples} labels"
            return
        try:
            output.register_hook(self.add_gradient)  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # within transforms of torch.func
            self.fault = f"its output cannot be watched ({error})"
            return
        # A copy, since a function in place may follow.
        self.output = output.detach().clone()

    def add_gradient(self, gradient: Tensor) -> None:
        """Add what one backward pass sent; there may be one for each term of the loss."""
        gradient = gradient.detach()
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def gradient_rows(self) -> Tensor | None:
        """Return (B, K) float, the gradient of a step that called the head once; None where it cannot be read."""
        if self.calls != 1 or self.fault or self.gradient is None:
            return None
        return as_columns(self.gradient.float())


class HeadWatch:
    """Looks at the head in one training step after the other; nothing of the fit is changed."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._end_watch: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at nothing.
        return vars(HeadWatch())

    def start(self, module: nn.Module, step: Step) -> None:
        """Look at what a module returns until :meth:`end`: between steps others find the model as it is."""
        self.end()
        self._step = step
        self._end_watch = watch_output(module, step.look)

    def end(self) -> Step | None:
        """Return the step that was looked at, if there was one. May be called at any time, and again."""
        step, self._step = self._step, None
        if self._end_watch is not None:
            self._end_watch()
        self._end_watch = None
        return step


def as_columns(output: Tensor) -> Tensor:
    """Return (B, K), of an output (B, K), or (B,) of a binary task."""
    return output.unsqueeze(1) if output.ndim == 1 else output
