"""SAP: weights projected on the activations of samples that are surely clean (Kodge et al. 2024, arXiv 2403.08618)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_unlearn import AttributionPartitionCallback, Partition

ALPHAS = (1e5, 1e4, 3e3, 1e3, 3e2)
_SAMPLES, _COLUMNS = 1000, 5_000


class Project(L.Callback):
    """Once the partition is computed, projects the inputs of every layer; ``alpha`` is that of the best validation.

    Args:
        partition: the callback that draws it, before this one in the list.
        x: of the samples that validate.
        label: their labels.
    """

    def __init__(self, partition: AttributionPartitionCallback, x: Tensor, label: Tensor) -> None:
        self.partition, self.validation = partition, (x, label)
        self.alpha: float | None = None
        self.is_done = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Acts once, before the fine-tuning does."""
        found = self.partition.get_partition(trainer, pl_module)
        if self.is_done or found is None or not found.is_actionable:
            return
        self.is_done = True
        rows = trainer.train_dataloader.dataset
        self.alpha = project(pl_module, rows.x[surest(found)], self._score)

    def _score(self, model: nn.Module) -> float:
        x, label = self.validation
        return (model(x).argmax(dim=1) == label).float().mean().item()


def surest(partition: Partition) -> Tensor:
    """(K,) int64, the likeliest clean samples, as many of each class."""
    clean = partition.clean_indices()
    classes = partition.label[clean].unique()
    each = _SAMPLES // len(classes)
    of_class = [clean[partition.label[clean] == c] for c in classes]
    likeliest = [i[partition.clean_probability[i].argsort(descending=True, stable=True)[:each]] for i in of_class]
    return torch.cat(likeliest)


@torch.no_grad()
def project(model: nn.Module, x: Tensor, score: Callable[[nn.Module], float]) -> float | None:
    """Projects the weights in place by the alpha of the best score; None where none is better than leaving them.

    Args:
        model: holds Linears and convolutions, each called once.
        x: of the sure samples.
        score: of the model, larger is better.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    before = copy.deepcopy(model.state_dict())
    model.eval()
    best: tuple[float, float | None, Any] = (score(model), None, before)
    for alpha in ALPHAS:
        model.load_state_dict(before)
        for layer in layers:
            _project_layer(layer, _inputs(model, layer, x), alpha)
        _estimate_norms(model, x)
        if (found := score(model)) > best[0]:
            best = (found, alpha, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[2])
    for module, mode in modes.items():
        module.training = mode
    return best[1]


def _estimate_norms(model: nn.Module, x: Tensor) -> None:
    """Lets batch norms see what comes out of the projected weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean of all batches
    for part in x.split(100) if norms else ():
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _inputs(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """(n, d), what a layer multiplies its weight with; of a convolution a part of the patches."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        hook: Any = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        stack.callback(hook.remove)
        model(x)
    if isinstance(layer, nn.Linear):
        return seen[0].flatten(0, -2)
    columns = nn.functional.unfold(seen[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    rows = columns.movedim(1, 2).flatten(0, 1)
    return rows[torch.linspace(0, len(rows) - 1, min(_COLUMNS, len(rows))).long()]


def _project_layer(layer: nn.Linear | nn.Conv2d, x: Tensor, alpha: float) -> None:
    values, directions = torch.linalg.eigh(x.double().T @ x.double())
    share = values.clamp(min=0) / values.clamp(min=0).sum()
    kept = alpha * share / ((alpha - 1) * share + 1)
    onto = (directions * kept) @ directions.T
    layer.weight.copy_((layer.weight.flatten(1).double() @ onto).reshape(layer.weight.shape).to(layer.weight.dtype))
