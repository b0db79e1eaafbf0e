"""Activations and attributions of a layer. The only file that knows Captum and forward hooks; it leaves none behind."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from lightning_unlearn.functional.attribution import class_max_attribution, label_margin
from lightning_unlearn.types import LayerPoint

Forward = Callable[[Any], Tensor]
"""From the model's input, as the batch holds it, to logits (B, C)."""

# Convolutions and their norms have the neuron (channel) in dimension 1, everything else in the last one.
_CONV = nn.modules.conv._ConvNd
_CHANNEL_FIRST = (_CONV, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NORM = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def resolve_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ValueError: if there is none; the message lists the nearest names.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    modules.pop("", None)
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or list(modules)[:10]
    raise ValueError(
        f"Expected layer to be the dotted path of a module of {type(model).__name__}, but got '{name}'."
        f" The nearest names are: {', '.join(near) or 'none, it has no submodules'}."
    )


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module in a forward pass.

    Args:
        name: dotted path of the module.
        module: the module.
        inputs: its positional arguments.
        output: what it returned.
        versions: of each input, how often it had been changed in place when the module was entered.
        output_version: the same of the output when the module was left.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    versions: tuple[int, ...]
    output_version: int


class ForwardTrace:
    """The order in which a model's modules are called, seen in one forward pass.

    Args:
        calls: in the order in which the modules were *entered*. Holds the tensors, so that identity tells what feeds
            what: keep a trace only for as long as it is asked.
        output: what the model returned.
    """

    def __init__(self, calls: list[ModuleCall], output: Any) -> None:
        self.calls = calls
        self.output = output

    def calls_of(self, name: str) -> list[ModuleCall]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]

    def linear(self, name: str) -> nn.Linear:
        """The Linear of this name."""
        module = self.calls_of(name)[0].module
        if not isinstance(module, nn.Linear):
            raise TypeError(f"Expected '{name}' to be a Linear, but it is a {type(module).__name__}.")
        return module

    def heads(self, num_classes: int) -> list[str]:
        """Dotted paths of the Linears with as many outputs as classes, in the order of the calls."""
        linears = [call for call in self.calls if isinstance(call.module, nn.Linear)]
        return [call.name for call in linears if call.module.out_features == num_classes]

    def last_linear(self, num_classes: int) -> str:
        """Dotted path of the last Linear with as many outputs as classes that ``forward`` calls: the head.

        Raises:
            ValueError: if it calls none.
        """
        names = self.heads(num_classes)
        if not names:
            raise ValueError(
                f"Expected a model that calls a torch.nn.Linear with {num_classes} outputs, one for each class, but"
                " forward calls none; name the layer with layer='...'."
            )
        return names[-1]

    def feeder(self, head: str) -> str | None:
        """The layer whose neurons are, one to one, the input features of ``head``.

        It is the nearest Linear or convolution before it if that has as many outputs as the head has inputs. Whether
        nothing but element-wise functions and pooling lies between is for the caller to check by its effect.
        """
        features = self.linear(head).in_features
        before = [call for call in self._before(head) if isinstance(call.module, (nn.Linear, _CONV))]
        return before[-1].name if before and neuron_count(before[-1].module) == features else None

    def norm_after(self, name: str) -> str | None:
        """The norm that takes the output of this layer directly, if there is one.

        An addition in place between the two, as in a residual block, keeps the tensor but is not direct.
        """
        layer = self.calls_of(name)[0]
        for call in self.calls:
            if isinstance(call.module, _NORM) and any(
                value is layer.output and version == layer.output_version
                for value, version in zip(call.inputs, call.versions, strict=True)
            ):
                return call.name
        return None

    def modules_before(self, name: str) -> list[str]:
        """Modules that were entered before this one, without those that contain it."""
        return [call.name for call in self._before(name) if not name.startswith(f"{call.name}.")]

    def _before(self, name: str) -> list[ModuleCall]:
        first = next(i for i, call in enumerate(self.calls) if call.name == name)
        return self.calls[:first]


def _version(value: Any) -> int:
    """How often a tensor has been changed in place; tensors of inference mode do not count it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def trace_forward(model: nn.Module, forward: Forward, x: Any) -> ForwardTrace:
    """Runs the model once and records which of its submodules are called, in what order, with what."""
    calls: list[ModuleCall | None] = []
    entered: dict[nn.Module, list[tuple[int, tuple[int, ...]]]] = {}
    handles = []

    def enter(module: nn.Module, inputs: Any) -> None:
        entered.setdefault(module, []).append((len(calls), tuple(_version(value) for value in inputs)))
        calls.append(None)

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            position, versions = entered[module].pop()
            calls[position] = ModuleCall(name, module, tuple(inputs), output, versions, _version(output))

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave(name)))
        with torch.no_grad():
            output = forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return ForwardTrace([call for call in calls if call is not None], output)


def check_reached(trace: ForwardTrace, point: LayerPoint) -> None:
    """Refuses a layer that ``forward`` does not call exactly once, or whose input it hands over by keyword.

    Raises:
        ValueError: naming the layer and how often it was called.
    """
    name, at = point.name, point.at
    count = len(trace.calls_of(name))
    if count == 0:
        called = [call.name for call in trace.calls]
        near = difflib.get_close_matches(name, called, n=5, cutoff=0.3) or called[-5:]
        raise ValueError(
            f"Layer '{name}' exists but is never reached in forward, so it has no activations to read."
            f" Layers that are reached: {', '.join(near)}."
        )
    if at == "input" and not trace.calls_of(name)[0].inputs:
        raise ValueError(
            f"Layer '{name}' is called with keyword arguments, so its input cannot be read; name the layer before it,"
            " whose output is the same, with layer='...'."
        )
    if count > 1:
        raise ValueError(
            f"Layer '{name}' is called {count} times in one forward pass, so its activations do not belong to one"
            " place; name a layer that is called once."
        )


def neuron_count(module: nn.Module) -> int:
    """Number of neurons of a Linear or convolution.

    Raises:
        ValueError: for any other module, whose outputs are not rows of one parameter.
    """
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, _CONV):
        return module.out_channels
    raise ValueError(f"Expected a Linear or a convolution, but got a {type(module).__name__}.")


def neuron_dimension(module: nn.Module, ndim: int) -> int:
    """The dimension of a layer's input or output, of ``ndim`` dimensions, that counts neurons."""
    if isinstance(module, _CHANNEL_FIRST):
        return 1
    return ndim - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) or ndim < 4 else 1


def neuron_means(activation: Tensor, dimension: int) -> Tensor:
    """One number per neuron: the mean over positions (pixels, tokens).

    Args:
        activation: (B, ..., D, ...).
        dimension: the one that counts neurons.

    Returns:
        (B, D)
    """
    return activation.movedim(dimension, 1).reshape(len(activation), activation.shape[dimension], -1).mean(dim=2)


@contextmanager
def tap(model: nn.Module, point: LayerPoint) -> Iterator[Callable[[], Tensor]]:
    """Reads a layer's activation in every forward pass inside the context.

    Yields:
        a function that hands over the activation of the last pass, as the layer had it, and forgets it.
    """
    module = resolve_layer(model, point.name)
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        # A copy, since an in-place function may follow the layer.
        seen.append((value[0] if isinstance(value, tuple) else value).detach().clone())

    def take() -> Tensor:
        if len(seen) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(seen)}."
            )
        return seen.pop()

    if point.at == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: keep(inputs))
    else:
        handle = module.register_forward_hook(lambda _, __, output: keep(output))
    try:
        yield take
    finally:
        handle.remove()


@contextmanager
def _fresh_leaves(module: nn.Module) -> Iterator[None]:
    """Lets Captum, which has the layer's activation require grad, mark an alias of it where it is the user's input."""

    def alias(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.is_leaf else value

    handles = [
        module.register_forward_pre_hook(lambda _, inputs: tuple(alias(value) for value in inputs)),
        module.register_forward_hook(lambda _, __, output: alias(output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class MarginAttribution:
    """Attribution of the label margin in one batch.

    Args:
        per_neuron: like the layer's activation, gradient x activation of the margin.
        logits: (B, C) float32, from the same forward pass.
    """

    per_neuron: Tensor
    logits: Tensor

    def total(self) -> Tensor:
        """(B,) float32, the sum over all neurons: how strongly the layer supports the given label."""
        return self.per_neuron.float().flatten(1).sum(dim=1)


class Attributor:
    """Captum's gradient x activation at one layer of a model.

    Args:
        model: holds the layer; call in eval mode, since samples of a batch must not influence each other.
        point: where to attribute.
        forward: from a batch's input to logits.
    """

    def __init__(self, model: nn.Module, point: LayerPoint, forward: Forward) -> None:
        self._model = model
        self._point = point
        self._forward = forward
        self._module = resolve_layer(model, point.name)

    def margin(self, x: Any, label: Tensor) -> MarginAttribution:
        """Attribution of the given label's logit minus the strongest other logit.

        Args:
            x: the model's input for B samples.
            label: (B,) int64.
        """
        logits: list[Tensor] = []

        def margin_of_batch(_: Tensor) -> Tensor:
            out = self._forward(x).float()
            logits.append(out.detach())
            return label_margin(out, label)

        return MarginAttribution(self._captum(margin_of_batch, label, multiply=True).detach(), logits[0])

    def class_max(self, x: Any, label: Tensor, num_classes: int) -> Tensor:
        """The paper's attribution (step 2), for all classes from one forward pass.

        In eval mode samples do not influence each other, so the gradient of the batch's summed logit of a class holds
        each sample's own gradient; Captum takes those C sums, and autograd differentiates them in one batched product.

        Args:
            x: the model's input for B samples.
            label: (B,) int64; only its length and device are used.
            num_classes: C.

        Returns:
            (B, D) float32.
        """
        one_hot = tuple(torch.eye(num_classes, device=label.device))

        def summed_logits(_: Tensor) -> Tensor:
            return self._forward(x).float().sum(dim=0)

        with tap(self._model, self._point) as take:
            gradients = self._captum(
                summed_logits,
                label,
                multiply=False,
                grad_kwargs={"grad_outputs": one_hot, "is_grads_batched": True},
            )
            activation = take()
        dimension = neuron_dimension(self._module, activation.ndim)
        return class_max_attribution(
            gradients.float().movedim(dimension + 1, 2), activation.float().movedim(dimension, 1)
        )

    def _captum(
        self,
        forward: Callable[[Tensor], Tensor],
        batch: Tensor,
        multiply: bool,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        method = LayerGradientXActivation(forward, self._module, multiply_by_inputs=multiply)
        with _fresh_leaves(self._module), warnings.catch_warnings():
            # vmap's notice that an operation has no batching rule and is looped over: slower, not wrong.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            attribution: Tensor | tuple[Tensor, ...] = method.attribute(
                batch.float(), attribute_to_layer_input=self._point.at == "input", grad_kwargs=grad_kwargs
            )
        if isinstance(attribution, tuple):
            raise ValueError(
                f"Layer '{self._point.name}' has several tensors as its {self._point.at}; name a layer with one."
            )
        return attribution
