"""Freezing of layers during fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_unlearn.attribution import ForwardTrace, named_layers, plain_name
from lightning_unlearn.trainer.running_fit import RunningFit
from lightning_unlearn.utilities.checks import check_names, check_text, shown


class LayersFrom:
    """The modules that ``forward`` calls from one layer on, with all that they hold.

    Args:
        trace: of a forward pass.
        layer: dotted path.
    """

    def __init__(self, trace: ForwardTrace, layer: str) -> None:
        called = [call.name for call in trace.calls]
        self._called = set(called)
        self._from_here = set(called[called.index(layer) :]) - set(trace.modules_before(layer))

    def has(self, name: str) -> bool:
        """Return whether a module is among them; one that is not called itself goes with the nearest that holds it."""
        while name and name not in self._called:
            name = name.rpartition(".")[0]
        return name in self._from_here


class FrozenLayers:
    """Parameters that are not trained, and batch norms whose statistics stay.

    Attributes:
        parameters: their names.
        norms: dotted paths.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Select nothing to freeze; layers that are frozen stay so until :meth:`thaw`."""
        self.parameters: list[str] = []
        self.norms: list[str] = []
        if not hasattr(self, "_thawed"):
            self._thawed: list[tuple[nn.Parameter, bool]] = []
            # Frozen by having no gradient, where requires_grad is not looked at.
            self._unmoved: list[nn.Parameter] = []
            self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def names(self) -> set[str]:
        """Of parameters and norms."""
        return {*self.parameters, *self.norms}

    def choose_outside(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Choose everything outside of some layers."""
        parameters, norms = _names(model)
        inside = _inside_of(layers)
        self.parameters = [name for name in parameters if not name.startswith(inside)]
        self.norms = [name for name in norms if not f"{name}.".startswith(inside)]

    def choose_before(self, model: nn.Module, trace: ForwardTrace, layer: str) -> None:
        """Choose everything that ``forward`` calls before a layer."""
        parameters, norms = _names(model)
        trained = LayersFrom(trace, layer)
        self.parameters = [name for name in parameters if not trained.has(name.rpartition(".")[0])]
        self.norms = [name for name in norms if not trained.has(name)]

    def freeze(self, fit: RunningFit) -> None:
        """Freeze the selected layers from now on."""
        named = {plain_name(name): parameter for name, parameter in fit.model.named_parameters()}
        for name in self.parameters:
            named[name].grad = None
            if fit.is_sharded:
                # FSDP2 has seen requires_grad when it sharded the weights, and does not look again.
                self._unmoved.append(named[name])
            else:
                self._thawed.append((named[name], named[name].requires_grad))
                named[name].requires_grad_(False)
        modules = named_layers(fit.model)
        self._modes += [(modules[name], modules[name].training) for name in self.norms]
        self.hold_modes()
        if self.parameters:
            fit.rewrap_ddp()

    def hold_modes(self) -> None:
        """Keep frozen batch norms in eval mode; modes are not in a checkpoint, and Lightning sets them at its will."""
        for module, _ in self._modes:
            module.eval()

    def drop_gradients(self) -> None:
        """Set the gradients of frozen parameters to None, so that optimizers skip them (weight decay, momentum)."""
        for parameter in self._unmoved:
            parameter.grad = None

    def thaw(self) -> None:
        """Restore everything as it was before :meth:`freeze`."""
        # The first entry of each is the oldest, and has the last word.
        for parameter, requires_grad in reversed(self._thawed):
            parameter.requires_grad_(requires_grad)
        for module, training in reversed(self._modes):
            module.training = training
        self._thawed, self._unmoved, self._modes = [], [], []

    def state_dict(self) -> dict[str, list[str]]:
        """Return the state as names."""
        return {"parameters": list(self.parameters), "norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take over the names; :meth:`freeze` holds them."""
        self.parameters, self.norms = list(state["parameters"]), list(state["norms"])


def _names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of all parameters and of all batch norms."""
    norms = (name for name, one in named_layers(model).items() if isinstance(one, nn.modules.batchnorm._NormBase))
    return [plain_name(name) for name, _ in model.named_parameters()], list(norms)


def _inside_of(layers: Sequence[str]) -> tuple[str, ...]:
    """Return what the names of all that these modules hold begin with."""
    return tuple(f"{plain_name(name)}." for name in layers)


def check_layer_names(mode: str, layers: Any) -> list[str] | None:
    """Return the names of the layers to train, of one as of several.

    Raises:
        ValueError: for names that are none, or without ``mode="layers"``.
    """
    if mode == "full" and layers is not None:
        raise ValueError(f"Expected layers only with mode='layers', but got mode='full' and layers={shown(layers)}.")
    if layers is None:
        return None
    names = [layers] if isinstance(layers, str) else check_names("layers", layers, "dotted paths of modules")
    if not names:
        raise ValueError("Expected layers to name at least one module, but got an empty list.")
    return [check_text("layers", name, "a list of dotted paths of modules") for name in names]
