"""Captum's layer methods. The only file that knows Captum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from captum.attr import (
    InternalInfluence,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor, nn

from lightning_unlearn.attribution.checkpointing import naming_what_is_not_recorded
from lightning_unlearn.attribution.hooks import record_activation, recording_paused, several_tensors
from lightning_unlearn.attribution.layers import LayerPoint, per_neuron_magnitude, resolve_layer, samples_first
from lightning_unlearn.attribution.trace import Forward
from lightning_unlearn.functional.attribution import logit_difference, runner_up_class
from lightning_unlearn.utilities.checks import check_choice

GRADIENT_X_ACTIVATION = "gradient_x_activation"
ATTRIBUTION_METHODS: Mapping[str, type] = MappingProxyType(
    {
        GRADIENT_X_ACTIVATION: LayerGradientXActivation,
        "integrated_gradients": LayerIntegratedGradients,
        "deeplift": LayerDeepLift,
        "conductance": LayerConductance,
        "internal_influence": InternalInfluence,
    }
)
"""Captum's layer methods, by the names that users give."""

# The integral from the baseline to the input: in how many steps, and how many of them lie in memory at a time.
_STEPS = 16
_STEPS_AT_ONCE = 4


class CaptumLayer:
    """Captum's layer methods, for the margin and for every class.

    Args:
        model: holds the layer.
        point: where to attribute.
        forward: from a batch's input to logits.
        method: one of :data:`ATTRIBUTION_METHODS`.
    """

    def __init__(self, model: nn.Module, point: LayerPoint, forward: Forward, method: str) -> None:
        self.model = model
        self._module = resolve_layer(model, point.name)
        self._point = point
        self._forward = forward
        self._method = method

    def attribute(self, x: Any, label: Tensor, rows: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Do as :meth:`FastPath.attribute` does, after a plain pass that fixes the strongest other class."""
        # Of gradient x activation the paper takes the maximum before it multiplies.
        reads = (
            record_activation(self.model, self._point)
            if rows and self._method == GRADIENT_X_ACTIVATION
            else nullcontext()
        )
        with reads as take, torch.no_grad():
            logits = self._forward(x).float()
            activation = None if take is None else take().float()
        with recording_paused(), _fresh_leaves(self._module), naming_what_is_not_recorded(self._point):
            per_neuron = self._run(x, label, runner_up_class(logits, label))
            class_max = self._class_max(x, logits, activation) if rows else None
        return per_neuron, logits, class_max

    def _class_max(self, x: Any, logits: Tensor, activation: Tensor | None) -> Tensor:
        """Return (B, D) float32, class after class."""
        largest = torch.tensor(-torch.inf, device=logits.device)
        for c in range(logits.shape[1]):
            label = torch.full((len(logits),), c, device=logits.device)
            largest = torch.maximum(largest, self._run(x, label, multiply=activation is None).float())
        return per_neuron_magnitude(self._module, largest if activation is None else largest * activation)

    def _run(self, x: Any, label: Tensor, rival: Tensor | None = None, *, multiply: bool = True) -> Tensor:
        """Return Captum's attribution of a class's logit minus that of its rival, if it has one."""
        classes = (label,) if rival is None else (label, rival)
        if self._method == GRADIENT_X_ACTIVATION:
            found = self._gradient_x_activation(x, classes, multiply)
        elif self._method == "deeplift":
            found = self._deeplift(x, classes)
        else:
            found = self._integrate(x, classes)
        attribution: Tensor | tuple[Tensor, ...] = found
        if isinstance(attribution, tuple):
            raise ValueError(several_tensors(self._point))
        return samples_first(attribution.detach(), self._point)

    def _score(self, x: Any, classes: tuple[Tensor, ...]) -> Tensor:
        with _no_leaf_handed_on(self._module, self._point):
            return logit_difference(self._forward(x).float(), *classes)

    def _gradient_x_activation(self, x: Any, classes: tuple[Tensor, ...], multiply: bool) -> Any:
        method = LayerGradientXActivation(lambda _: self._score(x, classes), self._module, multiply_by_inputs=multiply)
        return method.attribute(classes[0].float(), attribute_to_layer_input=self._point.at == "input")

    def _integrate(self, x: Any, classes: tuple[Tensor, ...]) -> Any:
        inputs = _with_baseline(x, self._method)

        def score(*values: Tensor) -> Tensor:
            return self._score(_as_given(x, values[: len(inputs)]), values[len(inputs) :])

        return ATTRIBUTION_METHODS[self._method](score, self._module).attribute(
            inputs,
            additional_forward_args=classes,
            n_steps=_STEPS,
            internal_batch_size=_STEPS_AT_ONCE * len(classes[0]),
            attribute_to_layer_input=self._point.at == "input",
        )

    def _deeplift(self, x: Any, classes: tuple[Tensor, ...]) -> Any:
        # Its hooks on activations ask for a gradient there, also behind layers whose parameters are frozen.
        inputs = tuple(value.detach().requires_grad_() for value in _with_baseline(x, self._method))

        def score(*values: Tensor) -> Tensor:
            return self._score(_as_given(x, values[: len(inputs)]), values[len(inputs) :])

        with _deeplift_leaves_no_attributes(self.model):
            try:
                return LayerDeepLift(_Scored(self.model, score), self._module).attribute(
                    inputs, additional_forward_args=classes, attribute_to_layer_input=self._point.at == "input"
                )
            except RuntimeError as error:
                if "used more than once" not in str(error):
                    raise
                raise ValueError(
                    "Expected a model that calls each of its activation modules (such as torch.nn.ReLU) once in a"
                    " forward pass, which DeepLift needs, but one is called several times; make a module for each"
                    f" call, or use get_recipe(..., attribution_method='integrated_gradients'). Captum reports: {error}"
                ) from error


class _Scored(nn.Module):
    """A model with a number per sample, since DeepLift hooks into modules."""

    def __init__(self, model: nn.Module, score: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._score = score

    def forward(self, *values: Tensor) -> Tensor:
        return self._score(*values)


def check_method(method: str) -> str:
    """Return the name of an attribution method, as it came.

    Raises:
        ValueError: if there is none of this name; the message lists all.
    """
    return check_choice("method", method, tuple(ATTRIBUTION_METHODS))  # type: ignore[no-any-return]  # one of them


def _with_baseline(x: Any, method: str) -> tuple[Tensor, ...]:
    """Return the tensors of an input for which zeros are an input too."""
    values = x if isinstance(x, tuple) else tuple(x.values()) if isinstance(x, dict) else (x,)
    wrong = [value for value in values if not (isinstance(value, Tensor) and value.is_floating_point())]
    if wrong or not values:
        found = wrong[0] if wrong else x
        kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(
            f"Expected x to be a float tensor, or a tuple or dict of them, since attribution_method='{method}'"
            f" compares it with zeros, but got {kind}; use '{GRADIENT_X_ACTIVATION}', the default, for any input."
        )
    return values


def _as_given(x: Any, values: tuple[Tensor, ...]) -> Any:
    if isinstance(x, dict):
        return dict(zip(x, values, strict=True))
    return values if isinstance(x, tuple) else values[0]


@contextmanager
def _fresh_leaves(module: nn.Module) -> Iterator[None]:
    """Let Captum, which has the layer's activation require grad, mark an alias of it where it is the user's input."""

    def alias(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_leaf:
            return value
        return value.clone() if value.is_inference() else value.detach()

    handles = [
        module.register_forward_pre_hook(lambda _, inputs: tuple(alias(value) for value in inputs)),
        module.register_forward_hook(lambda _, __, output: alias(output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_leaf_handed_on(module: nn.Module, point: LayerPoint) -> Iterator[None]:
    """Copy the leaf that Captum puts in place of the layer's activation, since functions in place refuse leaves.

    To be entered in the forward pass: hooks run in the order in which they were registered.
    """

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copy(part) for part in value)
        return value.clone() if isinstance(value, Tensor) and value.is_leaf and value.requires_grad else value

    if point.at == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: copy(inputs))
    else:
        handle = module.register_forward_hook(lambda _, __, output: copy(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _deeplift_leaves_no_attributes(model: nn.Module) -> Iterator[None]:
    """Take away the tensors that Captum's DeepLift notes on the modules, and leaves there where it fails."""
    names = ("input", "output", "input_ref")
    before = {module: {name for name in names if name in vars(module)} for module in model.modules()}
    try:
        yield
    finally:
        for module, own in before.items():
            for name in names:
                if name in vars(module) and name not in own:
                    delattr(module, name)
