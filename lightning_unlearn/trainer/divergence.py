"""Whether training has diverged, on any rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_unlearn.utilities.sharding import local_part

ADVICE = "use a smaller learning rate or gradient_clip_val, and resume from an earlier checkpoint"


def not_finite(trainer: Trainer, pl_module: LightningModule) -> str:
    """The first weights, or statistics of a norm, that are NaN or infinite, in words; empty where all are finite.

    Of all ranks. Other buffers may hold infinity, as masks of attention do.

    Every rank must call it.
    """
    weights = ((f"the weights of '{name}'", weight) for name, weight in pl_module.named_parameters())
    here = next((words for words, value in (*weights, *_statistics(pl_module)) if not _is_finite(value)), "")
    if not trainer.strategy.reduce_boolean_decision(bool(here), all=False):
        return ""
    return here or "weights on another rank"


def _statistics(pl_module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What norms have seen, which stays NaN once it is, even where the step was left out."""
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    yield f"the running statistics of '{name}'", buffer


@torch.no_grad()
def _is_finite(weight: Tensor) -> bool:
    part = local_part(weight.detach())
    return not (part.is_floating_point() or part.is_complex()) or bool(part.isfinite().all())


class LossWatch:
    """Whether the loss of an epoch's steps was finite, without waiting for the device at any of them."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, outputs: object) -> None:
        """Takes what Lightning hands to ``on_train_batch_end`` as outputs."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            value = loss.detach().float()
            self._total = value if self._total is None else self._total + value

    def was_finite(self, trainer: Trainer) -> bool:
        """Of all that was added since the last call, on every rank, each of which must call it."""
        total, self._total = self._total, None
        is_finite = total is None or bool(total.isfinite().all())
        return trainer.strategy.reduce_boolean_decision(is_finite, all=True)
