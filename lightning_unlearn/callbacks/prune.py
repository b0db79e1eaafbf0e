"""When to prune, and keeping the pruned neurons silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.callbacks._base import PartitionConsumer, logits_of, probe, training_set
from lightning_unlearn.callbacks._lightning import averaged_models, log_values, undisturbed
from lightning_unlearn.capture import (
    ForwardTrace,
    check_reached,
    neuron_count,
    neuron_dimension,
    neuron_means,
    resolve_layer,
    tap,
)
from lightning_unlearn.distributed import sum_over_ranks
from lightning_unlearn.functional.sensitivity import RegressionSums, regression_sums, select_neurons, solve_sensitivity
from lightning_unlearn.masking import NeuronPruning, PrunedEntries, consumer_entries, neuron_entries
from lightning_unlearn.types import LayerPoint, NeuronMask, Partition

# To see whether entries could be zeroed, without zeroing any.
_NO_NEURON = torch.zeros(0, dtype=torch.int64)


class SensitivityPruneCallback(PartitionConsumer):
    """Prunes the neurons whose activations tell noise from clean samples (RLAP, step 4).

    When the partition has been drawn it streams the layer's activations over the training set, solves the least squares
    of the probability of being clean on them, and prunes the neurons of largest standardised coefficient: weight row,
    bias, and scale and shift of a norm that follows directly. They stay exactly zero through all further training, and
    in every checkpoint, which loads with ``strict=True`` into the plain module.

    Args:
        layer: dotted path of the Linear or convolution to prune, a convolution by channel. By default the neurons are
            the inputs of the last Linear with an output per class that ``forward`` calls: its columns are pruned, and
            with them the neurons of the layer that feeds it, where that is one layer with nothing but element-wise
            functions and pooling between.
        amount: share of the layer's live neurons to prune, in (0, 1); dead ones, which are constant, do not count.
        ridge: L2 penalty of the regression on standardised activations; 0 is the paper's least squares.

    Raises:
        ValueError: for arguments out of range, here; for a layer that is unknown or cannot be pruned, when the fit is
            set up; for one that is not reached, or too small for ``amount``, when training starts.
        MisconfigurationException: without an AttributionPartitionCallback beside it, when the fit is set up.
    """

    def __init__(self, layer: str | None = None, *, amount: float = 0.15, ridge: float = 0.0) -> None:
        if not 0 < amount < 1:
            raise ValueError(f"Expected amount to lie in (0, 1), the share of neurons to prune, but got {amount}.")
        if ridge < 0:
            raise ValueError(f"Expected ridge to be at least 0, but got {ridge}.")
        self.layer = layer
        self.amount = amount
        self.ridge = ridge
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        # Resolved in begin: where activations are read, and the layer, norm and consumer whose entries are zeroed.
        self._point: LayerPoint | None = None
        self._names: dict[str, str | None] = {}
        self._pruning: NeuronPruning | None = None
        self._mask: NeuronMask | None = None
        self._done = False

    @property
    def mask(self) -> NeuronMask:
        """Which neurons are kept.

        Raises:
            RuntimeError: before there is one, saying when there will be, or if the partition was not acted upon.
        """
        if self._mask is None:
            if self._done:
                raise RuntimeError("There is no mask: the partition was not acted upon, so no neuron was pruned.")
            when = "when the partition is drawn" if self._source is None else f"at epoch {self._source.at_epoch}"
            raise RuntimeError(f"There is no mask yet: neurons are pruned {when}.")
        return self._mask

    @property
    def sensitivity(self) -> Tensor:
        """(D,) float32, standardised coefficient of every neuron; raises like :attr:`mask`."""
        return self.mask.sensitivity

    def target_layer(self) -> str:
        """Dotted path of the layer that is or will be pruned: the first whose parameters are touched."""
        name = self._names.get("layer") or self._names.get("consumer")
        if name is None:
            raise RuntimeError("The layer to prune is known when training starts.")
        return name

    def silence(self) -> None:
        """Sets what belongs to pruned neurons to zero again, for who has just changed weights."""
        if self._pruning is not None:
            self._pruning.zero_parameters()

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        if self.layer is not None:
            module = resolve_layer(pl_module, self.layer)
            with _naming(self.layer):
                _check_amount(neuron_count(module), self.amount)
                neuron_entries(module, None, _NO_NEURON)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done:
            return
        trace, _ = probe(trainer, pl_module, self.source)
        if self.layer is not None:
            self._point = LayerPoint(self.layer, "output")
            check_reached(trace, self._point)
            _check_not_the_classes(trace, self.layer)
            self._names = {"layer": self.layer, "norm": trace.norm_after(self.layer), "consumer": None}
            with _naming(self.layer):
                self._entries(pl_module, _NO_NEURON)
            return
        head = trace.last_linear(trace.output.shape[1])
        self._point = LayerPoint(head, "input")
        check_reached(trace, self._point)
        _check_amount(trace.linear(head).in_features, self.amount)
        self._names = {"consumer": head, **_feeder(trace, head)}
        try:
            self._entries(pl_module, _NO_NEURON)
        except ValueError:
            self._leave_feeder()

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pull_mask(trainer, pl_module)

    def pull_mask(self, trainer: Trainer, pl_module: LightningModule) -> NeuronMask | None:
        """The mask, made now if it is due, or None if it is not due yet or nothing was pruned."""
        partition = self.source.pull_partition(trainer, pl_module)
        if not self._done and partition is not None:
            if partition.is_actionable:
                if self._point is None:
                    self.begin(trainer, pl_module)
                self._prune(trainer, pl_module, partition)
            self._done = True
        return self._mask

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After a resume: the weights come from the checkpoint already pruned, and are to stay so.
        if self._mask is not None:
            self._hold(trainer, pl_module, self._mask)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._pruning is not None:
            # Here, so that an optimizer that another callback has made meanwhile is watched too.
            self._pruning.watch(optimizer)
            self._pruning.zero_gradients()

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pruning is not None:
            self._pruning.release()
            self._pruning = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, 5 bytes per neuron."""
        mask = self._mask
        return {
            "done": self._done,
            "names": dict(self._names),
            "mask": None if mask is None else {"layer": mask.layer, "keep": mask.keep, "sensitivity": mask.sensitivity},
        }

    @property
    @override
    def has_acted(self) -> bool:
        return self._mask is not None

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._done = state["done"]
        self._names = dict(state["names"])
        mask = state["mask"]
        self._mask = None if mask is None else NeuronMask(**mask)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        sensitivity = solve_sensitivity(self._regress(trainer, pl_module, partition), self.ridge).float().cpu()
        mask = NeuronMask(self.target_layer(), select_neurons(sensitivity, self.amount), sensitivity)
        self._mask = self._verified(trainer, pl_module, mask)
        self._hold(trainer, pl_module, self._mask)
        pruned = self._mask.pruned_indices()
        if len(pruned) == 0:
            rank_zero_warn(
                f"No neuron was pruned: amount={self.amount} of the {int((sensitivity != 0).sum())} neurons of"
                f" '{self._mask.layer}' whose activation varies is less than one."
            )
            return
        rank_zero_info(
            f"Pruned {len(pruned)} of {len(self._mask.keep)} neurons of '{self._mask.layer}', the most sensitive to"
            f" noise (standardised coefficients up to {self._mask.sensitivity.abs().max():.3f})."
        )
        log_values(pl_module, {"unlearn/pruned_neurons": float(len(pruned))})

    def _regress(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> RegressionSums:
        source, point = self.source, self._read_point()
        target = partition.clean_probability if source.regresses_on_probability else partition.is_clean.float()
        num_classes = int(partition.label.max()) + 1
        sums: RegressionSums | None = None
        with undisturbed(trainer, pl_module), tap(pl_module, point) as take:
            for batch in training_set(trainer, pl_module, source, num_classes):
                with torch.no_grad():
                    logits_of(pl_module, batch.x)
                activation = _neurons(pl_module, point, take())
                part = regression_sums(activation.cpu(), target[batch.index], batch.weight.cpu())
                sums = part if sums is None else sums + part
        if sums is None:
            raise RuntimeError("The training set yielded no batch; this is an error in lightning_unlearn.")
        reduce = sum_over_ranks(trainer.strategy)
        return RegressionSums(reduce(sums.xtx), reduce(sums.xty), reduce(sums.yty))

    def _read_point(self) -> LayerPoint:
        if self._point is None:
            raise RuntimeError("The layer to prune is not resolved; this is an error in lightning_unlearn.")
        return self._point

    def _entries(self, model: nn.Module, neurons: Tensor) -> list[PrunedEntries]:
        entries: list[PrunedEntries] = []
        layer, norm, consumer = (self._names[part] for part in ("layer", "norm", "consumer"))
        if layer is not None:
            module = None if norm is None else resolve_layer(model, norm)
            entries += neuron_entries(resolve_layer(model, layer), module, neurons)
        if consumer is not None:
            head = resolve_layer(model, consumer)
            if isinstance(head, nn.Linear):
                entries += consumer_entries(head, neurons)
        return entries

    def _leave_feeder(self) -> None:
        """Prunes the columns of the head alone."""
        self._names |= {"layer": None, "norm": None}

    def _hold(self, trainer: Trainer, pl_module: LightningModule, mask: NeuronMask) -> None:
        self._pruning = NeuronPruning(self._entries(pl_module, mask.pruned_indices()))
        self._pruning.zero_parameters()
        for average in averaged_models(trainer):
            # Begun before the pruning, it would bring the neurons back.
            NeuronPruning(self._entries(average, mask.pruned_indices())).zero_parameters()

    def _verified(self, trainer: Trainer, pl_module: LightningModule, mask: NeuronMask) -> NeuronMask:
        """The mask, with the feeding layer left alone where zeroing its rows does not silence the head's inputs.

        It does not where something adds to them in between, such as a residual connection; then the columns of the head
        alone are pruned, which silences the neurons for certain.
        """
        if self._names["consumer"] is None or self._names["layer"] is None:
            return mask
        source, point, pruned = self.source, self._read_point(), mask.pruned_indices()
        entries = self._entries(pl_module, pruned)
        before = [entry.parameter.detach().clone() for entry in entries]
        NeuronPruning(entries).zero_parameters()
        try:
            with tap(pl_module, point) as take:
                probe(trainer, pl_module, source)
                silent = bool((_neurons(pl_module, point, take())[:, pruned] == 0).all())
                # Augmentation may show each rank another batch.
                silent = trainer.strategy.reduce_boolean_decision(silent, all=True)
        finally:
            with torch.no_grad():
                for entry, value in zip(entries, before, strict=True):
                    entry.parameter.copy_(value)
        if silent:
            return mask
        self._leave_feeder()
        return replace(mask, layer=self.target_layer())


def _neurons(pl_module: LightningModule, point: LayerPoint, activation: Tensor) -> Tensor:
    """(B, D) float32."""
    dimension = neuron_dimension(resolve_layer(pl_module, point.name), activation.ndim)
    return neuron_means(activation.float(), dimension)


def _feeder(trace: ForwardTrace, head: str) -> dict[str, str | None]:
    """The layer and norm whose neurons are the head's inputs, as far as sizes tell."""
    name = trace.feeder(head)
    if name is None or len(trace.calls_of(name)) != 1:
        return {"layer": None, "norm": None}
    return {"layer": name, "norm": trace.norm_after(name)}


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Says of which layer an error speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"SensitivityPruneCallback cannot prune layer '{layer}'. {error}") from None


def _check_not_the_classes(trace: ForwardTrace, layer: str) -> None:
    classes = trace.output.shape[1]
    if trace.calls_of(layer)[0].output is trace.output or layer in trace.heads(classes)[-1:]:
        raise ValueError(
            f"SensitivityPruneCallback cannot prune layer '{layer}': its {classes} outputs are the classes. Leave layer"
            " out to prune the neurons that it takes as input."
        )


def _check_amount(neurons: int, amount: float) -> None:
    select_neurons(torch.zeros(neurons), amount)
