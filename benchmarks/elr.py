"""Early-learning regularization, the strongest training of a single network on wrong labels that is a loss alone.

S. Liu, J. Niles-Weed, N. Razavian, C. Fernandez-Granda: "Early-Learning Regularization Prevents Memorization of Noisy
Labels", NeurIPS 2020, arXiv 2007.00151. Written here from its formulas, with its settings for CIFAR-10 with symmetric
noise. The two-network variant, ELR+, is not compared.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

STRENGTH = 3.0  # the paper's lambda
MEMORY = 0.7  # the paper's beta
_LEAST = 1e-4  # probabilities are kept so far from 0 and 1, as the authors do


class EarlyLearning:
    """The regularizer: ``strength * mean(log(1 - <t, p>))``.

    ``t`` is the average of what the network has predicted for the sample, ``t = memory * t + (1 - memory) * p``, and
    does not carry gradients. To lower it is to stay with one's early predictions.

    Args:
        total: N.
        classes: C.
        strength: lambda.
        memory: beta.

    Attributes:
        target: (N, C), the averages.
    """

    def __init__(self, total: int, classes: int, strength: float = STRENGTH, memory: float = MEMORY) -> None:
        self.strength = strength
        self.memory = memory
        self.target = torch.zeros(total, classes)

    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        """Updates the averages and returns what to add to the cross-entropy, a scalar.

        Args:
            logits: (B, C).
            index: (B,) int64, dataset indices.
        """
        self.target = self.target.to(logits.device)
        p = logits.float().softmax(dim=1).clamp(_LEAST, 1 - _LEAST)
        now = p.detach()
        average = self.memory * self.target[index] + (1 - self.memory) * now / now.sum(dim=1, keepdim=True)
        self.target[index] = average
        return self.strength * (1 - (average * p).sum(dim=1)).log().mean()


def regularize_early_learning(model: L.LightningModule, total: int, classes: int) -> EarlyLearning:
    """Adds the regularizer to what ``training_step`` returns.

    From then on a batch is ``(x, (B, 2) int64)``, of given label and dataset index.

    Args:
        model: whose ``head`` returns the logits.
        total: N.
        classes: C.
    """
    regularizer, plain_step = EarlyLearning(total, classes), model.training_step
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def training_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, pair = batch
        label, index = pair.unbind(dim=1)
        seen.clear()
        loss = plain_step((x, label), batch_idx)
        return loss + regularizer(seen[-1], index)

    model.training_step = training_step
    return regularizer
