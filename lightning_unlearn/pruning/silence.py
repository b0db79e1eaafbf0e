"""Whether pruned neurons are silent in the module as it runs, whatever its weights are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import neuron_dimension, resolve_layer
from lightning_unlearn.pruning.masking import temporarily_zeroed
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.utilities.sharding import local_part


def find_silent(
    model: nn.Module, sites: Sequence[PruneSite], neurons: Sequence[Tensor], run: Callable[[], Any]
) -> list[bool]:
    """Return, for each site, whether zero entries make its neurons output zero; everything is restored afterwards.

    This holds if the layer (or the following norm, or the input of the consuming Linear) outputs zero for these rows,
    or if the output of a Linear does not depend on these inputs. Other parameters of such a layer are perturbed during
    the check, since an adapter that is zero at first does not stay so.

    Args:
        model: the model.
        sites: the layers.
        neurons: for each layer, (K,) int64.
        run: runs the model on the first samples.
    """
    heard: list[list[bool]] = [[] for _ in sites]
    with ExitStack() as stack:
        stack.enter_context(_disturbed(_parts(model, sites)))
        entries = [entry for site, n in zip(sites, neurons, strict=True) for entry in site.entries(model, n)]
        stack.enter_context(temporarily_zeroed(entries))
        for site, n, found in zip(sites, neurons, heard, strict=True):
            stack.callback(_listen(model, site, n, found).remove)
        run()
    return [not any(found) for found in heard]


def _parts(model: nn.Module, sites: Sequence[PruneSite]) -> list[nn.Module]:
    names = {name for site in sites for name in (site.layer, site.consumer) if name is not None}
    return [resolve_layer(model, name) for name in sorted(names)]


@contextmanager
def _disturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give all floating-point parameters of these modules other values inside the context."""
    parameters = {p for module in modules for p in module.parameters() if p.is_floating_point()}
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                local_part(parameter).add_(1)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _listen(model: nn.Module, site: PruneSite, neurons: Tensor, heard: list[bool]) -> Any:
    """Return a hook that notes whether something is heard of these neurons."""
    if site.layer is None:
        return resolve_layer(model, site.name).register_forward_pre_hook(
            lambda module, inputs: heard.append(_depends(module, inputs[0], neurons))
        )
    # Channels are where the layer has them, also behind a norm.
    layer = resolve_layer(model, site.layer if site.at == "output" else site.name)
    if site.at == "input":
        return layer.register_forward_pre_hook(lambda _, inputs: heard.append(_sounds(layer, inputs[0], neurons)))
    return resolve_layer(model, site.norm or site.layer).register_forward_hook(
        lambda _, __, output: heard.append(_sounds(layer, output, neurons))
    )


@torch.no_grad()
def _sounds(layer: nn.Module, value: Any, neurons: Tensor) -> bool:
    activation = (value[0] if isinstance(value, tuple) else value).detach().float()
    by_neuron = activation.movedim(neuron_dimension(layer, activation.ndim), 1)
    rows = by_neuron.reshape(*by_neuron.shape[:2], -1).abs().amax(dim=2)
    # Nothing silences a neuron whose input is NaN.
    finite = rows[rows.isfinite().all(dim=1)]
    return bool((finite[:, neurons.to(finite.device)] != 0).any())


@torch.no_grad()
def _depends(module: nn.Module, value: Tensor, neurons: Tensor) -> bool:
    """Return whether the output of a Linear depends on some of its inputs."""
    places = neurons.to(value.device)
    silent = value.detach().index_fill(-1, places, 0)
    loud = silent.index_copy(-1, places, _numbers(silent, len(places)))
    # Not by a call, in which this hook would be called again.
    one, other = module.forward(silent), module.forward(loud)
    return not bool(((one == other) | (one.isnan() & other.isnan())).all())


def _numbers(like: Tensor, count: int) -> Tensor:
    """Return numbers that do not cancel out."""
    return torch.arange(1, count + 1, device=like.device).to(like.dtype).expand(*like.shape[:-1], count)
