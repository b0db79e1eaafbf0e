"""Activations and attributions of a layer. The only file that knows Captum and forward hooks; it leaves none behind."""

from __future__ import annotations

import difflib
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from captum.attr import (
    InternalInfluence,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_unlearn.functional.attribution import logit_difference, neuron_magnitude, strongest_other
from lightning_unlearn.sharding import whole
from lightning_unlearn.types import LayerPoint

Forward = Callable[[Any], Tensor]
"""From the model's input, as the batch holds it, to logits (B, C)."""

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
# Gradients of so many elements (64 MB in float32) are held at a time; with more classes they are taken in turns.
_GRADIENT_ELEMENTS = 2**24
# Rows on which the fast path is compared with Captum before it is used.
_REHEARSAL_ROWS = 4

# True in passes that are not the plain pass over the batch, which taps do not look at.
_unwatched: ContextVar[bool] = ContextVar("_unwatched", default=False)
# True where every rank must take as many passes as the others.
_whole: ContextVar[bool] = ContextVar("_whole", default=False)

Result = TypeVar("Result")

# Convolutions and their norms have the neuron (channel) in dimension 1, everything else in the last one.
_CONV = nn.modules.conv._ConvNd
_CHANNEL_FIRST = (_CONV, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NORM = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


# What torch.compile, and torch's wrapper for activation checkpointing, put into dotted paths.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A dotted path as the model's author writes it, without what wrappers put in.

    Example:
        >>> plain_name("net._orig_mod.fc.weight")
        'net.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules by :func:`plain_name`; of a wrapper and what it wraps, what it wraps."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    modules.pop("", None)
    return modules


def resolve_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path, with or without what wrappers put into it.

    Raises:
        ValueError: if there is none; the message lists the nearest names.
    """
    modules = named_layers(model)
    if plain_name(name) in modules:
        return modules[plain_name(name)]
    near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4) or list(modules)[:10]
    raise ValueError(
        f"Expected layer to be the dotted path of a module of {type(model).__name__}, but got '{name}'."
        f" The nearest names are: {', '.join(near) or 'none, it has no submodules'}."
    )


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module in a forward pass.

    Args:
        name: dotted path of the module, see :func:`plain_name`.
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

    @property
    def is_changed(self) -> bool:
        """Whether the output has been changed in place since the module returned it."""
        return _version(self.output) != self.output_version


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
        """Dotted path of the head: the last Linear with as many outputs as classes, of those that make the logits.

        Raises:
            ValueError: if ``forward`` calls none, or one that is only a part of the head, as with an adapter beside it.
        """
        head = self.head(num_classes)
        if head not in self.heads(num_classes):
            module = self.calls_of(head)[0].module
            raise ValueError(
                f"Expected the head to be a torch.nn.Linear, but '{head}', which makes the logits, is a"
                f" {type(module).__name__} around one; name the layer with layer='...'."
            )
        return head

    def head(self, num_classes: int) -> str:
        """Dotted path of what makes class logits of features.

        It is the last Linear with as many outputs as classes, of those that make the logits; or the module around it
        that takes the Linear's input and makes the logits with an adapter's help, as LoRA does.

        Raises:
            ValueError: if ``forward`` calls no such Linear.
        """
        names = self.heads(num_classes)
        if not names:
            raise ValueError(
                f"Expected a model that calls a torch.nn.Linear with {num_classes} outputs, one for each class, but"
                " forward calls none; name the layer with layer='...'."
            )
        made = [name for name in names if self.makes_logits(name)]
        around = [call.name for call in self.calls if self._is_around(call, names) and self.makes_logits(call.name)]
        return (made or around or names)[-1]

    def _is_around(self, call: ModuleCall, names: Sequence[str]) -> bool:
        """Whether a module gives its own input to one of these that it holds."""
        inside = [name for name in names if name.startswith(f"{call.name}.")]
        taken = [inner.inputs[0] for name in inside for inner in self.calls_of(name) if inner.inputs]
        return bool(call.inputs) and any(value is call.inputs[0] for value in taken)

    def logit_maker(self, num_classes: int) -> str | None:
        """Dotted path of the module whose output is what ``forward`` returns as logits; None if there is none.

        Args:
            num_classes: C.
        """
        made = [call for call in self.calls if self.makes_logits(call.name)]
        # Of those within each other only such as pass on what the outermost returns, not what it casts or adds to.
        names = [call.name for call in made if _is_same(call.output, made[0].output)]
        heads = [name for name in self.heads(num_classes) if name in names]
        candidates = heads or names
        return candidates[-1] if candidates else None

    def first_block(self, batch: int) -> LayerPoint | None:
        """Where the first block of the model has seen the input.

        It is the input of the second convolution, which is what the first convolution, its norm, activation and pooling
        make of the input; without two convolutions at the start, the output of the first Linear or convolution.

        Args:
            batch: number of samples in this pass.

        Returns:
            None where ``forward`` calls no such layer just once on a floating-point row for each sample.
        """
        layers = [call for call in self.calls if isinstance(call.module, (nn.Linear, _CONV)) and call.inputs]
        found = [(LayerPoint(call.name, "output"), call.output) for call in layers[:1]]
        if all(isinstance(call.module, _CONV) for call in layers[:2]):
            found = [(LayerPoint(call.name, "input"), call.inputs[0]) for call in layers[1:2]] + found
        for point, value in found:
            is_rows = isinstance(value, Tensor) and value.is_floating_point() and len(value) == batch
            if is_rows and len(self.calls_of(point.name)) == 1:
                return point
        return None

    def makes_logits(self, name: str) -> bool:
        """Whether what this layer returns is what ``forward`` returns as logits: the tensor itself, or a cast of it.

        Equal numbers do not suffice: what is added later may be zero now, as an adapter is when it is new.
        """
        calls = self.calls_of(name)
        # What is changed in place afterwards is another thing than what a hook on the layer sees.
        if len(calls) != 1 or _version(calls[0].output) != calls[0].output_version:
            return False
        made = calls[0].output
        if not isinstance(made, Tensor) or made.shape not in (self.output.shape, self.output.squeeze(1).shape):
            return False
        if _is_same(made, self.output):
            return True
        if made.dtype == self.output.dtype:
            return False
        made = made.reshape(self.output.shape)
        # A broken sample makes both NaN, which is equal to nothing.
        broken = made.isnan() & self.output.isnan()
        return bool(((made == self.output) | broken).all()) and not bool(broken.all())

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


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, perhaps in another shape."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.numel() == other.numel() and one.dtype == other.dtype


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
        for name, module in named_layers(model).items():
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


def response(model: nn.Module, point: LayerPoint, activation: Tensor) -> Tensor:
    """How strongly a layer responds: the norms, over its neurons, of their means and of their spreads over positions.

    Noise on an input raises or lowers a rectified channel's mean, and its spread, alike in every place; these two
    numbers tell corrupted images apart at an early layer, where deeper ones, trained to ignore it, do not.

    Args:
        model: holds the layer.
        point: which.
        activation: (B, ...), what the layer took or returned.

    Returns:
        (B, 2) float32; (B, 1), the norm, of a layer without positions.
    """
    by_neuron = activation.float().movedim(neuron_dimension(resolve_layer(model, point.name), activation.ndim), 1)
    if by_neuron.ndim == 2:
        return by_neuron.square().sum(dim=1, keepdim=True).sqrt()
    spread, mean = torch.std_mean(by_neuron, dim=tuple(range(2, by_neuron.ndim)), correction=0)
    return torch.stack([mean, spread], dim=1).square().sum(dim=2).sqrt()


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

    Around :meth:`Attributor.margin` it sees one pass, however many the method makes; only where memory made it take the
    batch in parts, there are more, which ``Attributor(watch=...)`` joins.

    Yields:
        a function that hands over the activation of the last pass, as the layer had it, and forgets it.
    """
    module = resolve_layer(model, point.name)
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        # A copy, since an in-place function may follow the layer.
        if not _unwatched.get():
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


# Batches that do not fit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU (CUDA, ROCm, XPU), on Apple's (MPS), or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def take_rows(x: Any, rows: slice, total: int) -> Any:
    """Some rows of a batch.

    Args:
        x: a tensor whose first dimension counts the samples, a list of a number or string for each sample, or a tuple,
            list or dict of such; single numbers and strings, None and tensors without dimensions belong to all samples
            and stay as they are.
        rows: which.
        total: B, the number of samples.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(x, Tensor) and x.ndim > 0 and len(x) == total:
        return x[rows]
    if isinstance(x, (list, tuple)):
        return _take_rows_of_sequence(x, rows, total)
    if isinstance(x, dict):
        return {name: take_rows(value, rows, total) for name, value in x.items()}
    if x is None or isinstance(x, (int, float, str)) or (isinstance(x, Tensor) and x.ndim == 0):
        return x
    found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise ValueError(f"Expected tensors with {total} rows, or a tuple, list or dict of them, but got {found}.")


def _take_rows_of_sequence(x: Any, rows: slice, total: int) -> Any:
    if len(x) == total and all(isinstance(value, (int, float, str)) for value in x):
        return x[rows]
    if len(x) == total and isinstance(x, list):
        raise ValueError(f"Expected tensors with {total} rows, but got a list of as many, perhaps one for each sample.")
    parts = [take_rows(value, rows, total) for value in x]
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


@contextmanager
def whole_batches() -> Iterator[None]:
    """Inside, no batch is taken in parts: where memory does not suffice, that is an error."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


class SmallerBatches:
    """Calls a function on a batch, in parts where memory does not suffice for the whole of it.

    When memory runs out the rows are halved until they fit; the size that fits is kept for the batches that follow.

    Attributes:
        rows: the most rows that are tried at a time; None as long as memory has sufficed for every batch.

    Example:
        >>> def mean(x, label):
        ...     if len(x) > 2:
        ...         raise torch.OutOfMemoryError("out of memory")
        ...     return x.mean().item()
        >>> in_parts = SmallerBatches()
        >>> in_parts(mean, torch.arange(6.0), torch.zeros(6))
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        >>> in_parts.rows
        1
    """

    def __init__(self) -> None:
        self.rows: int | None = None

    def __call__(self, function: Callable[[Any, Tensor], Result], x: Any, label: Tensor) -> list[Result]:
        """What the function returns for each part, in the order of the rows.

        Args:
            function: of a part of ``x`` and the same part of ``label``; its result must not depend on the other rows.
            x: see :func:`take_rows`; anything at all where memory suffices.
            label: (B,), or anything with B rows.
        """
        results: list[Result] = []
        start, total = 0, len(label)
        while start < total:
            size = min(self.rows or total, total - start)
            # A batch that fits is handed over as it is, whatever it is made of.
            part = x if size == total else take_rows(x, slice(start, start + size), total)
            try:
                results.append(function(part, label[start : start + size]))
            except Exception as error:
                if not is_out_of_memory(error) or size == 1 or _whole.get():
                    raise
                _refuse_to_split(x, total, error)
                self.rows = size // 2
            else:
                start += size
                continue
            # Here and not above: the error held the frames, and they what filled the memory.
            _free()
        return results


def _refuse_to_split(x: Any, total: int, error: Exception) -> None:
    """Lets the error pass, with a reason, where smaller batches cannot be made."""
    try:
        take_rows(x, slice(0, 1), total)
    except ValueError as reason:
        error.args = (f"{error}\nSmaller batches cannot be made of this one: {reason}",)
        raise error from reason


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


# Attribution


@dataclass(frozen=True, eq=False)
class MarginAttribution:
    """Attribution of the label margin in one batch.

    Args:
        per_neuron: like the layer's activation, attribution of the margin.
        logits: (B, C) float32, from the same forward pass.
        class_max: (B, D) float32, the paper's attribution, where it was asked for.
        watched: the activations of the other layers that were asked for, from the same forward pass.
    """

    per_neuron: Tensor
    logits: Tensor
    class_max: Tensor | None = None
    watched: tuple[Tensor, ...] = ()

    def total(self) -> Tensor:
        """(B,) float32, the sum over all neurons: how strongly the layer supports the given label."""
        return self.per_neuron.float().flatten(1).sum(dim=1)


class Attributor:
    """Attributes the logits of a model at one of its layers.

    Gradient x activation takes a fast path: one forward pass that is recorded from the layer on only. Before the first
    batch it is compared with Captum on a few rows, and where the two differ (the layer's input goes elsewhere too, or
    ``forward`` switches recording itself) Captum is used throughout. All other methods are Captum's own; those that
    compare with a baseline compare with an input of zeros. Nothing of a batch is kept; a batch that does not fit into
    memory is taken in parts.

    Args:
        model: holds the layer; call in eval mode, since samples of a batch must not influence each other.
        point: where to attribute.
        forward: from a batch's input to logits.
        method: one of :data:`ATTRIBUTION_METHODS`. Integrated gradients, conductance and internal influence take 16
            forward and backward passes (for ``class_max``: for every class), DeepLift one of twice the size.
        fast: False for Captum in every case.
        watch: other layers whose activations are read in the same forward pass.
        agree: from whether the fast path may be taken here to whether it may on every rank, where ranks meet in the
            passes and must take as many.

    Raises:
        ValueError: for an unknown method or layer.
    """

    def __init__(
        self,
        model: nn.Module,
        point: LayerPoint,
        forward: Forward,
        method: str = GRADIENT_X_ACTIVATION,
        *,
        fast: bool = True,
        watch: Sequence[LayerPoint] = (),
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._point = point
        self._layer = _CaptumLayer(model, point, forward, check_method(method))
        self._fast_path = _FastPath(resolve_layer(model, point.name), point, forward)
        self._watch = tuple(watch)
        for watched in self._watch:
            resolve_layer(model, watched.name)
        # None: to be seen at the first batch.
        self._is_fast: bool | None = None if fast and method == GRADIENT_X_ACTIVATION else False
        self._in_parts = SmallerBatches()
        self._agree = agree

    @property
    def is_fast(self) -> bool | None:
        """Whether the fast path is taken; None before the first batch, where that is still to be seen."""
        return self._is_fast

    def margin(self, x: Any, label: Tensor) -> MarginAttribution:
        """Attribution of the given label's logit minus the strongest other logit.

        The strongest other class is that of the plain forward pass, also where a method looks at other inputs than x.

        Args:
            x: the model's input for B samples; a float tensor, or a tuple or dict of them, for the methods with a
                baseline.
            label: (B,) int64.

        Raises:
            TypeError: for an input without a baseline.
            ValueError: for a layer with several tensors, or one that is not called exactly once, or a model that
                DeepLift cannot attribute.
        """
        return self.attribute(x, label)

    def class_max(self, x: Any, label: Tensor, num_classes: int) -> Tensor:
        """The paper's attribution (step 2): the largest over the classes.

        For gradient x activation the maximum is taken on the gradient, as in the paper, for the other methods on the
        attribution.

        Args:
            x: the model's input for B samples.
            label: (B,) int64; only its length and device are used.
            num_classes: C, as many as the model has logits.

        Returns:
            (B, D) float32.
        """
        found = self.attribute(x, label, rows=True)
        if found.class_max is None or found.logits.shape[1] != num_classes:
            raise ValueError(f"Expected logits of {num_classes} classes, but got {found.logits.shape[1]}.")
        return found.class_max

    def attribute(self, x: Any, label: Tensor, *, rows: bool = False) -> MarginAttribution:
        """The margin's attribution and, with ``rows``, the paper's, from the same forward pass.

        Args:
            x: as in :meth:`margin`.
            label: (B,) int64.
            rows: whether to add ``class_max``.
        """

        def of_part(part: Any, of_label: Tensor) -> MarginAttribution:
            return self._attribute(part, of_label, rows)

        # Nothing is recorded in inference mode, not even where recording is asked for.
        with torch.inference_mode(False), _without_recomputation():
            if self._is_fast is None:
                self._is_fast = self._rehearse(x, label)
            return _join(self._in_parts(of_part, x, label))

    def rehearse(self, x: Any, label: Tensor, *, rows: bool = False) -> None:
        """Attributes the first rows of a batch, to refuse what cannot be attributed before hours of training.

        Args:
            x: as in :meth:`margin`.
            label: (B,) int64.
            rows: whether ``class_max`` will be asked for.
        """
        self.attribute(*_first_rows(x, label), rows=rows)

    def _attribute(self, x: Any, label: Tensor, rows: bool) -> MarginAttribution:
        with ExitStack() as stack:
            takes = [stack.enter_context(tap(self._layer.model, watched)) for watched in self._watch]
            path = self._fast_path if self._is_fast else self._layer
            per_neuron, logits, class_max = path.attribute(x, label, rows)
            return MarginAttribution(per_neuron, logits, class_max, tuple(take() for take in takes))

    def _rehearse(self, x: Any, label: Tensor) -> bool:
        """Whether the fast path says the same as Captum of the first rows."""
        with _not_watched():
            agrees = self._agree(all(self._in_parts(self._agrees, *_first_rows(x, label))))
        if not agrees:
            warnings.warn(
                f"Every batch is recorded from end to end, which takes longer: a recording from the {self._point} on"
                " does not hold all that Captum sees (it goes elsewhere too, or forward switches recording itself).",
                stacklevel=4,
            )
        return agrees

    def _agrees(self, x: Any, label: Tensor) -> bool:
        try:
            found, _, _ = self._fast_path.attribute(x, label, rows=False)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False  # if the fault lies elsewhere, Captum's pass over the batch will say so
        expected, _, _ = self._layer.attribute(x, label, rows=False)
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 2e-2
        # Of a sample that is broken, or a model that has diverged, both say the same nothing.
        finite = expected.flatten(1).isfinite().all(dim=1)
        difference = (found[finite].float() - expected[finite].float()).norm()
        return bool(difference <= tolerance * expected[finite].float().norm())


def _first_rows(x: Any, label: Tensor) -> tuple[Any, Tensor]:
    """A few samples of a batch; all of one that cannot be taken apart."""
    first = slice(0, _REHEARSAL_ROWS)
    try:
        return take_rows(x, first, len(label)), label[first]
    except ValueError:
        return x, label


class _FastPath:
    """Gradient x activation from one forward pass that is recorded from the layer on.

    Args:
        module: the layer.
        point: where to attribute.
        forward: from a batch's input to logits.
    """

    def __init__(self, module: nn.Module, point: LayerPoint, forward: Forward) -> None:
        self._module = module
        self._point = point
        self._forward = forward
        self._batched = True

    def attribute(self, x: Any, label: Tensor, rows: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The margin's attribution, the logits, and, if asked for, the largest attribution over the classes."""
        with _recorded_from(self._module, self._point) as recording:
            out = self._forward(x)
            activation = recording.activation(self._point)
            with torch.enable_grad():
                logits = out.float()
                margin = logit_difference(logits, label, strongest_other(logits, label)).sum()
            # In eval mode samples do not influence each other: the sum's gradient holds each sample's own.
            (gradient,) = torch.autograd.grad(margin, activation, retain_graph=rows)
            largest = self._largest_gradient(logits, activation, recording.is_head(out)) if rows else None
        activation = activation.detach()
        class_max = None if largest is None else per_neuron_magnitude(self._module, largest * activation.float())
        return gradient * activation, logits.detach(), class_max

    def _largest_gradient(self, logits: Tensor, activation: Tensor, is_head: bool) -> Tensor:
        """The largest gradient over the classes, like the activation; float32."""
        if is_head and isinstance(self._module, nn.Linear):
            # The gradient of every sample's logits is the weight.
            return whole(self._module.weight).float().amax(dim=0).expand(activation.shape)
        with torch.enable_grad():
            summed = logits.sum(dim=0)
        largest = torch.tensor(-torch.inf, device=summed.device)
        for one_hot in torch.split(torch.eye(len(summed), device=summed.device), self._classes_at_once(activation)):
            found = self._class_gradients(summed, activation, one_hot).amax(dim=0)
            largest = torch.maximum(largest, found.float())
        return largest

    def _classes_at_once(self, activation: Tensor) -> int:
        return max(1, _GRADIENT_ELEMENTS // activation.numel()) if self._batched else 1

    def _class_gradients(self, summed: Tensor, activation: Tensor, one_hot: Tensor) -> Tensor:
        """(c, B, ...), for each row of ``one_hot`` (c, C), in one batched product if all operations allow it."""
        if self._batched:
            try:
                with warnings.catch_warnings():
                    # vmap's notice that an operation has no batching rule and is looped over: slower, not wrong.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return torch.autograd.grad(summed, activation, one_hot, retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._batched = False  # a user's own operation that vmap cannot batch
        gradients = [torch.autograd.grad(summed, activation, row, retain_graph=True)[0] for row in one_hot]
        return torch.stack(gradients)


class _Recording:
    """What the hooks of :func:`_recorded_from` saw.

    Attributes:
        leaves: the layer's activation, for each call of it.
        linear_output: of a Linear whose input is attributed, before other hooks see it; and its version.
    """

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self.linear_output: tuple[Tensor, int] | None = None

    def activation(self, point: LayerPoint) -> Tensor:
        """The one activation."""
        if len(self.leaves) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(self.leaves)}."
            )
        return self.leaves[0]

    def is_head(self, logits: Tensor) -> bool:
        """Whether the Linear's output, as it was, is the logits."""
        if self.linear_output is None:
            return False
        output, version = self.linear_output
        return output is logits and version == _version(logits)


@contextmanager
def _recorded_from(module: nn.Module, point: LayerPoint) -> Iterator[_Recording]:
    """In the forward passes inside, nothing is recorded up to the layer, everything from it on.

    The layer's activation becomes a leaf of the graph, so that the gradient with respect to it is all that is computed:
    not that of the layers before, nor that of any weight.
    """
    recording = _Recording()

    def start(value: Any) -> Any:
        tensor = _single(value, point)
        # What was made in inference mode can take no part in a graph.
        leaf = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
        recording.leaves.append(leaf)
        # The pass runs inside no_grad, which puts back what it found, also after an exception.
        torch.set_grad_enabled(True)
        # A copy: a function in place may follow, which a leaf forbids, and which would change the activation.
        copy = leaf.clone()
        return (copy,) if isinstance(value, tuple) else copy

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        recording.linear_output = output, _version(output)

    if point.at == "input":
        handles = [module.register_forward_pre_hook(lambda _, inputs: start(inputs))]
        if type(module) is nn.Linear:
            handles.append(module.register_forward_hook(keep, prepend=True))
    else:
        handles = [module.register_forward_hook(lambda _, __, output: start(output))]
    try:
        with torch.no_grad():
            yield recording
    finally:
        for handle in handles:
            handle.remove()


class _CaptumLayer:
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
        """As :meth:`_FastPath.attribute`; a plain pass first, which fixes the strongest other class."""
        # Of gradient x activation the paper takes the maximum before it multiplies.
        reads = tap(self.model, self._point) if rows and self._method == GRADIENT_X_ACTIVATION else nullcontext()
        with reads as take, torch.no_grad():
            logits = self._forward(x).float()
            activation = None if take is None else take().float()
        with _not_watched(), _fresh_leaves(self._module), _naming_what_is_not_recorded(self._point):
            per_neuron = self._run(x, label, strongest_other(logits, label))
            class_max = self._class_max(x, logits, activation) if rows else None
        return per_neuron, logits, class_max

    def _class_max(self, x: Any, logits: Tensor, activation: Tensor | None) -> Tensor:
        """(B, D) float32, class after class."""
        largest = torch.tensor(-torch.inf, device=logits.device)
        for c in range(logits.shape[1]):
            label = torch.full((len(logits),), c, device=logits.device)
            largest = torch.maximum(largest, self._run(x, label, multiply=activation is None).float())
        return per_neuron_magnitude(self._module, largest if activation is None else largest * activation)

    def _run(self, x: Any, label: Tensor, rival: Tensor | None = None, *, multiply: bool = True) -> Tensor:
        """Captum's attribution of a class's logit minus that of its rival, if it has one."""
        classes = (label,) if rival is None else (label, rival)
        if self._method == GRADIENT_X_ACTIVATION:
            found = self._gradient_x_activation(x, classes, multiply)
        elif self._method == "deeplift":
            found = self._deeplift(x, classes)
        else:
            found = self._integrate(x, classes)
        attribution: Tensor | tuple[Tensor, ...] = found
        if isinstance(attribution, tuple):
            raise ValueError(_several(self._point))
        return attribution.detach()

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
                    f" call, or set method='integrated_gradients'. Captum says: {error}"
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
    """The name of an attribution method, as it came.

    Raises:
        ValueError: if there is none of this name; the message lists all.
    """
    if method not in ATTRIBUTION_METHODS:
        near = difflib.get_close_matches(str(method), ATTRIBUTION_METHODS, n=1, cutoff=0.4)
        raise ValueError(
            f"Expected method to be one of {', '.join(map(repr, ATTRIBUTION_METHODS))}, but got {method!r}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    return method


def per_neuron_magnitude(module: nn.Module, attribution: Tensor) -> Tensor:
    """(B, D), the magnitude of an attribution that is shaped like the input or output of a layer."""
    return neuron_magnitude(attribution.movedim(neuron_dimension(module, attribution.ndim), 1))


def _join(parts: list[MarginAttribution]) -> MarginAttribution:
    if len(parts) == 1:
        return parts[0]
    rows = [part.class_max for part in parts if part.class_max is not None]
    return MarginAttribution(
        torch.cat([part.per_neuron for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat(rows) if rows else None,
        tuple(torch.cat(values) for values in zip(*(part.watched for part in parts), strict=True)),
    )


def _several(point: LayerPoint) -> str:
    return f"Layer '{point.name}' has several tensors as its {point.at}; name a layer with one."


def _single(value: Any, point: LayerPoint) -> Tensor:
    """The one tensor of a layer's positional arguments or output."""
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise ValueError(_several(point))
    return values[0]


def _with_baseline(x: Any, method: str) -> tuple[Tensor, ...]:
    """The tensors of an input for which zeros are an input too."""
    values = x if isinstance(x, tuple) else tuple(x.values()) if isinstance(x, dict) else (x,)
    wrong = [value for value in values if not (isinstance(value, Tensor) and value.is_floating_point())]
    if wrong or not values:
        found = wrong[0] if wrong else x
        kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(
            f"Expected x to be a float tensor, or a tuple or dict of them, since method='{method}' compares it with"
            f" zeros, but got {kind}; set method='{GRADIENT_X_ACTIVATION}', which takes any input."
        )
    return values


def _as_given(x: Any, values: tuple[Tensor, ...]) -> Any:
    if isinstance(x, dict):
        return dict(zip(x, values, strict=True))
    return values if isinstance(x, tuple) else values[0]


@contextmanager
def _not_watched() -> Iterator[None]:
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


@contextmanager
def _naming_what_is_not_recorded(point: LayerPoint) -> Iterator[None]:
    """Says what to do where the logits do not depend, as far as is recorded, on the layer."""
    try:
        yield
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error) and "does not require grad" not in str(error):
            raise
        raise ValueError(_not_recorded(point)) from error


def _not_recorded(point: LayerPoint) -> str:
    return (
        f"Expected gradients of the logits to reach layer '{point.name}', but forward does not record how they depend"
        f" on its {point.at}: it is called inside torch.no_grad(), or something between is detached. Name a later layer"
        " with layer='...', or let forward record."
    )


@contextmanager
def _without_recomputation() -> Iterator[None]:
    """Has ``torch.utils.checkpoint`` keep what a backward pass needs, in place of computing it a second time.

    The second time it would not meet the hooks that were there the first time, and give gradients at another point; and
    its reentrant variant cannot be differentiated from the middle. There is no public switch, so the two private names
    that it goes by are replaced (torch 2.6 to 2.11 have them, a test fails when one goes missing).
    """

    class Called:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return function(*args)

    def generator(function: Any, preserve: bool, context_fn: Any, *_: Any, **__: Any) -> Iterator[None]:
        with context_fn()[0]:
            yield

    names = {"CheckpointFunction": Called, "_checkpoint_without_reentrant_generator": generator}
    before = {name: vars(torch.utils.checkpoint)[name] for name in names if name in vars(torch.utils.checkpoint)}
    for name in before:
        setattr(torch.utils.checkpoint, name, names[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.utils.checkpoint, name, value)


@contextmanager
def _fresh_leaves(module: nn.Module) -> Iterator[None]:
    """Lets Captum, which has the layer's activation require grad, mark an alias of it where it is the user's input."""

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
    """Copies the leaf that Captum puts in place of the layer's activation, since functions in place refuse leaves.

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
    """Takes away the tensors that Captum's DeepLift notes on the modules, and forgets there where it fails."""
    names = ("input", "output", "input_ref")
    before = {module: {name for name in names if name in vars(module)} for module in model.modules()}
    try:
        yield
    finally:
        for module, own in before.items():
            for name in names:
                if name in vars(module) and name not in own:
                    delattr(module, name)


# Gradients of the loss


def loss_gradients(
    model: nn.Module, points: Sequence[LayerPoint], forward: Forward, x: Any, label: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Activations of some layers, and the gradient there of each sample's cross-entropy of its given label.

    Call in eval mode, since samples of a batch must not influence each other. No ``.grad`` is touched.

    Args:
        model: holds the layers.
        points: which; each is called once in a forward pass.
        forward: from a batch's input to logits.
        x: the model's input for B samples.
        label: (B,) int64, -1 for one that does not count.

    Returns:
        for each layer its activation and the gradient, both shaped like what the layer took or returned.

    Raises:
        ValueError: for a layer with several tensors, or one that is not called exactly once, or whose effect on the
            logits is not recorded.
    """
    seen: list[list[Tensor]] = [[] for _ in points]

    def mark(at: int, value: Any) -> Any:
        tensor = _single(value, points[at])
        if not tensor.requires_grad:
            # Of what lies before, nothing is recorded: its parameters are frozen.
            tensor = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
        seen[at].append(tensor)
        # A copy, since a function in place may follow.
        copy = tensor.clone()
        return (copy,) if isinstance(value, tuple) else copy

    with ExitStack() as stack:
        for at, point in enumerate(points):
            module = resolve_layer(model, point.name)
            if point.at == "input":
                handle = module.register_forward_pre_hook(lambda _, inputs, at=at: mark(at, inputs))
            else:
                handle = module.register_forward_hook(lambda _, __, output, at=at: mark(at, output))
            stack.callback(handle.remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_recomputation())
        loss = cross_entropy(forward(x).float(), label, reduction="sum", ignore_index=-1)
    for point, calls in zip(points, seen, strict=True):
        if len(calls) != 1:
            raise ValueError(
                f"Expected layer '{point.name}' to be called once in a forward pass, but it was {len(calls)}."
            )
    if not loss.requires_grad:
        raise ValueError("Expected a forward that can be differentiated, but it switches recording off.")
    activations = [calls[0] for calls in seen]
    gradients = torch.autograd.grad(loss, activations, allow_unused=True)
    return [_reached(point, a.detach(), g) for point, a, g in zip(points, activations, gradients, strict=True)]


def _reached(point: LayerPoint, activation: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    if gradient is None:
        raise ValueError(_not_recorded(point))
    return activation, gradient
