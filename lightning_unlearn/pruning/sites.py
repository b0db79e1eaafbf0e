"""Where neurons are read and what belongs to them: the layer, the norm after it, or the columns that listen to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import (
    ForwardTrace,
    ModuleCall,
    check_reached,
    named_layers,
    neuron_count,
    resolve_layer,
)
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional.selection import check_amount
from lightning_unlearn.pruning.masking import (
    PrunedEntries,
    as_in_eval,
    consumer_entries,
    modules_sharing_parameters,
    neuron_entries,
    temporarily_zeroed,
)
from lightning_unlearn.utilities.sharding import whole

Trace = Callable[[], ForwardTrace]
"""Runs the model on the first samples."""

# To see whether entries could be zeroed, without zeroing any.
_NO_NEURON = torch.zeros(0, dtype=torch.int64)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class PruneSite:
    """The neurons of one layer, and the parameters that belong to them.

    Args:
        name: dotted path of the layer whose activations are read.
        at: whether the neurons are its outputs or its inputs.
        layer: dotted path of the layer whose weight rows and biases are pruned, if any.
        norm: dotted path of the norm whose scale and shift belong to the neurons.
        consumer: dotted path of the Linear that takes the neurons as input.
        samples: the batch dimension of the activations.
    """

    name: str
    at: Literal["input", "output"] = "output"
    layer: str | None = None
    norm: str | None = None
    consumer: str | None = None
    samples: int = 0

    @property
    def point(self) -> LayerPoint:
        """Where their activations are read."""
        return LayerPoint(self.name, self.at, self.samples)

    @property
    def target(self) -> str:
        """The first layer whose parameters are touched."""
        return self.layer or self.consumer or self.name

    def entries(self, model: nn.Module, neurons: Tensor) -> list[PrunedEntries]:
        """Return what to zero so that these neurons are silent."""
        entries: list[PrunedEntries] = []
        if self.layer is not None:
            norm = None if self.norm is None else resolve_layer(model, self.norm)
            entries += neuron_entries(resolve_layer(model, self.layer), norm, neurons)
        if self.consumer is not None:
            head = resolve_layer(model, self.consumer)
            if isinstance(head, nn.Linear):
                entries += consumer_entries(head, neurons)
        return entries

    def width(self, model: nn.Module) -> int:
        """Return the number of neurons; 0 if the consuming layer is no longer a Linear."""
        layer: Any = resolve_layer(model, self.target)
        return neuron_count(layer) if self.layer is not None else int(getattr(layer, "in_features", 0))

    def weight(self, model: nn.Module) -> tuple[Tensor, int]:
        """Return the weight that neurons are measured by, and its dimension that counts them."""
        module: Any = resolve_layer(model, self.target)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        with as_in_eval(module):
            weight = whole(module.weight)
        return weight, int(self.layer is None or transposed)


def check_layer(model: nn.Module, name: str, amount: float) -> None:
    """Refuse, before anything has run, a layer whose neurons cannot be pruned.

    Raises:
        ValueError: naming the layer, and what to name instead.
    """
    module = resolve_layer(model, name)
    with _naming(name):
        try:
            neurons = neuron_count(module)
        except ValueError as error:
            raise ValueError(f"{error}{_instead(name, module)}") from None
        check_amount(amount, neurons)
        neuron_entries(module, None, _NO_NEURON)
        _check_not_tied(model, module)


def named_site(model: nn.Module, name: str, trace: Trace, first: ForwardTrace) -> PruneSite:
    """Return the outputs of a layer.

    For a layer in a residual branch these are the contribution of the branch to the sum.

    Args:
        model: holds the layer.
        name: dotted path of a Linear or convolution.
        trace: runs the model again.
        first: what it has shown already.

    Raises:
        ValueError: for a layer whose output is something else by the time that it is used; naming it.
    """
    check_reached(first, LayerPoint(name, "output"))
    _check_not_the_classes(first, name)
    module = resolve_layer(model, name)
    call = first.calls_of(name)[0]
    with _naming(name):
        norm, near = first.norm_after(name), _norm_further_on(first, call)
        if call.is_changed or (norm is None and near is not None):
            every = torch.arange(neuron_count(module))
            with temporarily_zeroed(neuron_entries(module, None, every)):
                silent = trace()
            if call.is_changed and not _is_constant(silent.calls_of(name)[0].output):
                raise ValueError(_ADDED.format(before=_before(first, name)))
            if norm is None and near is not None and _is_constant(silent.calls_of(near)[0].inputs[0]):
                norm = near
        site = PruneSite(name, layer=name, norm=norm)
        if norm is not None:
            check_reached(first, LayerPoint(norm, "output"))
            _check_not_tied(model, resolve_layer(model, norm))
        site.entries(model, _NO_NEURON)
    return site


_ADDED = (
    "Something is added to its output in place (a residual connection) before it is used, so that its rows are not the"
    " neurons; {before}, or write `h = h + x` in place of `h += x` to prune what this layer contributes to the sum."
)


def default_site(model: nn.Module, amount: float, first: ForwardTrace) -> PruneSite:
    """Return the inputs of the last Linear with an output per class, with the layer that feeds it as far as sizes tell.

    Whether nothing but element-wise functions and pooling lies between the two is for the caller to check, by its
    effect.

    Raises:
        ValueError: if there is no such Linear, or it has too few inputs, or shares its weight.
    """
    head = first.last_linear(first.output.shape[1])
    check_reached(first, LayerPoint(head, "input"))
    linear = first.linear(head)
    check_amount(amount, linear.in_features)
    with _naming(head):
        _check_not_tied(model, linear)
        consumer_entries(linear, _NO_NEURON)
    alone = PruneSite(head, "input", consumer=head)
    layer = first.producer_of(head)
    if layer is None or len(first.calls_of(layer)) != 1:
        return alone
    site = PruneSite(head, "input", layer=layer, norm=first.norm_after(layer), consumer=head)
    try:
        site.entries(model, _NO_NEURON)
        for name in (site.layer, site.norm):
            if name is not None:
                _check_not_tied(model, resolve_layer(model, name))
    except ValueError:
        return alone
    return site


def check_trained(sites: Sequence[PruneSite], averages: Sequence[str]) -> None:
    """Refuse layers of an average that the module keeps of others of its layers and runs in eval mode.

    Args:
        sites: the layers.
        averages: dotted paths of the module's submodules that are averages of others.

    Raises:
        ValueError: naming the layer.
    """
    parts = tuple(f"{name}." for name in averages)
    for site in sites:
        if site.target.startswith(parts):
            raise ValueError(
                f"SensitivityPruneCallback cannot prune layer '{site.target}'. It is an average of other layers,"
                " which would restore its neurons. Let forward call the trained layers, in eval mode too."
            )


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Name the layer in errors raised inside the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"SensitivityPruneCallback cannot prune layer '{layer}'. {error}") from None


def _instead(name: str, module: nn.Module) -> str:
    inside = [f"'{name}.{inner}'" for inner, part in named_layers(module).items() if isinstance(part, _LAYERS)]
    if not inside:
        return " Name the Linear or convolution that feeds it."
    return f" Name one inside it: {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}."


def _before(trace: ForwardTrace, name: str) -> str:
    before = [c.name for c in trace.calls if isinstance(c.module, _LAYERS) and c.name != name]
    before = [other for other in before if other in trace.modules_before(name)]
    return f"name the layer before it, '{before[-1]}'" if before else "name another layer"


def _check_not_tied(model: nn.Module, module: nn.Module) -> None:
    if others := modules_sharing_parameters(model, module):
        raise ValueError(
            f"Its parameters are shared with '{others[0]}' (tied weights), whose neurons would be pruned too; untie"
            " them or name another layer."
        )


def _check_not_the_classes(trace: ForwardTrace, layer: str) -> None:
    classes = trace.output.shape[1]
    if trace.calls_of(layer)[0].output is trace.output or layer in trace.heads(classes)[-1:]:
        raise ValueError(
            f"SensitivityPruneCallback cannot prune layer '{layer}': its {classes} outputs are the classes. Leave layer"
            " out to prune the neurons that it takes as input."
        )


def _norm_further_on(trace: ForwardTrace, call: ModuleCall) -> str | None:
    """Return the norm entered next, if it has as many neurons and no layer with neurons of its own precedes it."""
    after = trace.calls[trace.calls.index(call) + 1 :]
    for later in after:
        if isinstance(later.module, _NORMS) and later.inputs:
            weight: Any = later.module.weight
            size = 0 if weight is None else weight.shape[-1 if isinstance(call.module, nn.Linear) else 0]
            return later.name if size == neuron_count(call.module) else None
        if isinstance(later.module, _LAYERS):
            return None
    return None


def _is_constant(value: Tensor) -> bool:
    """Return whether samples do not differ in it."""
    return bool(((value - value[:1]).abs() <= 1e-6 * value.abs().max()).all())
