"""Detection of diverged training, on any rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_unlearn.utilities.reduce import Reduce
from lightning_unlearn.utilities.sharding import local_part

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

ADVICE = "use a smaller learning rate or gradient_clip_val, and resume from an earlier checkpoint"


def not_finite(fit: RunningFit) -> str:
    """Return the name of the first non-finite weight or norm statistic on any rank; empty if all are finite.

    Other buffers are not checked, since they may hold infinity, for example attention masks. Every rank must call it.
    """
    weights = ((f"the weights of '{name}'", weight) for name, weight in fit.model.named_parameters())
    here = next((words for words, value in (*weights, *_statistics(fit.model)) if not _is_finite(value)), "")
    if not fit.agree(bool(here), of_all=False):
        return ""
    return here or "weights on another rank"


def _statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what norms have seen, which stays NaN once it is, even where the step was left out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    yield f"the running statistics of '{name}'", buffer


@torch.no_grad()
def _is_finite(weight: Tensor) -> bool:
    part = local_part(weight.detach())
    return not (part.is_floating_point() or part.is_complex()) or bool(part.isfinite().all())


class LossWatch:
    """Track whether the losses of an epoch were finite, without synchronizing with the device in each step."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, outputs: object) -> None:
        """Add the outputs that Lightning passes to ``on_train_batch_end``."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            value = loss.detach().float()
            self._total = value if self._total is None else self._total + value

    def was_finite(self, fit: RunningFit) -> bool:
        """Return whether everything added since the last call, on any rank, was finite. Every rank must call it."""
        total, self._total = self._total, None
        is_finite = total is None or bool(total.isfinite().all())
        return fit.agree(is_finite, of_all=True)


# Above this fraction of non-finite rows, the cause is the model and not single samples.
MOST_LEFT_OUT = 0.5


def check_rows_left_out(model: nn.Module, left_out: int, total: int, epoch: int, reduce: Reduce) -> str:
    """Return a warning about non-finite rows of an epoch; empty if there is nothing to warn of.

    A few such rows are normal in 16-bit training while the loss scale settles. Every rank must call it.

    Args:
        model: the model whose weights are checked if most rows were not finite.
        left_out: number of non-finite rows over all ranks.
        total: number of rows over all ranks.
        epoch: number of complete epochs.
        reduce: sums over the ranks.

    Raises:
        ValueError: if most rows and some weights are not finite, from which training cannot recover.
    """
    if not left_out:
        return ""
    if left_out > MOST_LEFT_OUT * total:
        fault = first_not_finite(model)
        if reduce(torch.tensor(float(bool(fault)))).item() > 0:
            raise ValueError(too_many_left_out(left_out, total, fault or "weights on another rank"))
    return (
        f"The logits or attributions of {left_out:,} of {total:,} training samples were NaN or infinite in"
        f" epoch {epoch}; these rows are excluded from the evidence."
    )


def first_not_finite(model: nn.Module) -> str:
    """Return the name of the first parameter or buffer that holds NaN or infinity; empty if none does."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not bool(value.detach().isfinite().all()):
            return name
    return ""


def too_many_left_out(bad: int, total: int, model_fault: str) -> str:
    """Return the error message for mostly non-finite rows."""
    found = (
        f"Expected finite logits and attributions, but those of {bad:,} of {total:,} training samples are NaN or"
        " infinite"
    )
    if model_fault:
        return (
            f"{found}, and so is the model's {model_fault}: training has diverged. Lower the learning rate, set"
            " gradient_clip_val, check the inputs for NaN (which BatchNorm keeps), and resume from an earlier"
            " checkpoint."
        )
    return (
        f"{found}, though the model's weights are finite. Check the inputs for NaN, forward for overflow (try"
        " precision='bf16-mixed' or 32), and that it returns no logits of -inf for classes that it rules out."
    )
