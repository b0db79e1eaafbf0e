"""A pruned model made smaller for real: silent neurons are cut out of it, and what is left says the same."""

from __future__ import annotations

import copy
import operator
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_unlearn.arguments import check_names
from lightning_unlearn.masking import is_computed, neuron_entries
from lightning_unlearn.storage import replacing, source_file

FORMAT = "lightning_unlearn.shrunk.1"

ExampleInput = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments."""

_Model = TypeVar("_Model", bound=nn.Module)
_T = TypeVar("_T")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NO_NEURON = torch.zeros(0, dtype=torch.int64)
# torch-pruning's types of what leaves each channel to itself; a LayerNorm or an attention does not.
_BY_CHANNEL = (
    *("LINEAR", "CONV", "DEPTHWISE_CONV", "BN", "IN", "PRELU"),
    *("ELEMENTWISE", "RESHAPE", "CONCAT", "SPLIT", "SLICE", "UNBIND", "EXPAND"),
)
# Of float64; where the model does not run in it, that of its own type is compared as float32 would be.
_EXACT, _CLOSE = 1e-9, 1e-5
_NOISE = (0.1, 1.0, 3.0)
_WARMUPS = 3
# The attributes by which layers know their sizes.
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels"),
    *("num_parameters", "normalized_shape"),
)


def shrink(model: _Model, example_input: ExampleInput, *, layers: Sequence[str] | None = None) -> _Model:
    """A copy of a model without its silent neurons, that returns the same outputs.

    A neuron is silent where its weight row and bias are exactly zero, or scale and shift of the norm behind it, or the
    columns of every layer that takes it as input. It is cut only where no layer would miss it, through all that is
    added to it or made of it; every cut is checked on the example and on disturbed copies of it, in float64 where the
    model runs in that. A layer where the outputs would change stays whole, the outputs themselves are never cut, and
    of every layer at least one neuron stays. Make a new optimizer: the copy has parameters of its own.

    Args:
        model: any module, a LightningModule too; it stays as it is.
        example_input: what ``forward`` takes, on the model's device: a tensor, a tuple of arguments, or a dict of
            keyword arguments. A few samples check more than one.
        layers: dotted paths of the Linears and convolutions to cut neurons out of; by default all.

    Raises:
        ImportError: without the package torch-pruning.
        ValueError: for a model that cannot be copied or traced, or whose outputs are not finite; for a layer that there
            is not.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:3].zero_(), net[0].bias[:3].zero_()
        >>> shrink(net, torch.randn(5, 4))
        Sequential( (0): Linear(in_features=4, out_features=5, bias=True) (1): ReLU()
            (2): Linear(in_features=5, out_features=2, bias=True) )
    """
    _torch_pruning()
    wanted = _chosen(model, layers)
    with torch.inference_mode(False), torch.enable_grad():
        small = _copied(model).eval()
        for parameter in small.parameters():
            # What needs no gradient leaves no trace.
            parameter.requires_grad_(parameter.is_floating_point())
        probe = _probe(small, example_input)
        before = _size(small)
        # From the last layer to the first: what only a cut neuron listened to is silent too.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            small = _cut_exactly(small, wanted[::-1], probe)
    _restore(small, model)
    _warn_of_whole_layers(small, nothing_cut=_size(small) == before)
    return small


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """The layers to look at, in the order in which the model has them."""
    known = [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    if layers is not None:
        layers = [layers] if isinstance(layers, str) else check_names("layers", layers, "dotted paths of layers")
    if strangers := [name for name in layers or () if name not in known]:
        raise ValueError(
            f"Expected layers to be among the Linears and convolutions of {type(model).__name__}"
            f" ({', '.join(known[:10])}), but got {strangers[0]!r}."
        )
    return known if layers is None else [name for name in known if name in layers]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "shrink expects the package torch-pruning, which is not installed; pip install 'lightning-unlearn[shrink]'."
        ) from error
    return torch_pruning


def _copied(model: _Model) -> _Model:
    try:
        # A LightningModule lets go of its Trainer in this.
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"Expected a {type(model).__name__} that copy.deepcopy can copy, but it cannot ({error}); remove weight"
            " norms and torch.nn.utils.prune, and attributes that hold activations."
        ) from error


def _restore(small: nn.Module, model: nn.Module) -> None:
    """Modes, types and flags as in the model."""
    for (_, module), (_, original) in zip(small.named_modules(), model.named_modules(), strict=True):
        module.training = original.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _set_dtypes(small, _dtypes(model))
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(flags[name])


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in _tensors_of(model).items()}


def _set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Not by ``to``: a LightningModule would remember it."""
    for name, tensor in _tensors_of(model).items():
        tensor.data = tensor.data.to(dtypes[name])


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _warn_of_whole_layers(small: nn.Module, *, nothing_cut: bool) -> None:
    layers = [name for name, module in small.named_modules() if bool(_silent_rows(module).any())]
    if layers:
        warnings.warn(
            f"shrink left silent neurons in {', '.join(map(repr, layers))}: they are outputs, or the last of their"
            " layer, or something else is added to them or computed from them (a residual sum, LayerNorm, a function"
            " that is not 0 at 0), so that the outputs would not stay the same.",
            stacklevel=3,
        )
    elif nothing_cut:
        warnings.warn(
            "shrink found no neuron to cut, so the copy is as large as the model. A neuron is silent where its weight"
            " row and bias are exactly zero, or scale and shift of the norm behind it, or the columns of every layer"
            " that takes it as input; SensitivityPruneCallback makes neurons so.",
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class _Probe:
    """Inputs of a model and what it makes of them.

    Args:
        inputs: the example, and disturbed copies of it.
        expected: the outputs for each.
        tolerance: of outputs, relative to the largest.
    """

    inputs: Sequence[Any]
    expected: Sequence[Sequence[Tensor]]
    tolerance: float

    def agrees(self, model: nn.Module) -> bool:
        """Whether another model makes the same of them."""
        return all(self._same(_tried(_outputs, model, x), y) for x, y in zip(self.inputs, self.expected, strict=True))

    def _same(self, outputs: Sequence[Tensor] | None, expected: Sequence[Tensor]) -> bool:
        if outputs is None or [x.shape for x in outputs] != [x.shape for x in expected]:
            return False
        return all(
            torch.allclose(x.double(), y.double(), rtol=0, atol=self.tolerance * _scale(y))
            for x, y in zip(outputs, expected, strict=True)
        )


def _scale(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def _probe(model: nn.Module, example_input: ExampleInput) -> _Probe:
    """In float64 if the model runs in it; the model is left in the types that were taken."""
    dtypes = _dtypes(model)
    # A forward that makes tensors of its own type does not run in it, nor does a device that has none.
    if (exact := _tried(_probe_in_float64, model, example_input)) is not None:
        return exact
    _set_dtypes(model, dtypes)
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes.values() if dtype.is_floating_point), default=0.0)
    return _probe_as_is(model, example_input, max(_CLOSE, 4 * coarsest))


def _probe_in_float64(model: nn.Module, example_input: ExampleInput) -> _Probe:
    _set_dtypes(model, {name: torch.float64 if t.is_floating_point else t for name, t in _dtypes(model).items()})
    return _probe_as_is(model, _mapped(_widened, example_input), _EXACT)


def _probe_as_is(model: nn.Module, example_input: Any, tolerance: float) -> _Probe:
    inputs, expected = [example_input], [_outputs(model, example_input)]
    if not expected[0] or not _finite(expected[0]):
        raise ValueError(
            "Expected a forward that returns tensors of finite numbers for example_input, but it returned"
            f" {'NaN or infinity' if expected[0] else 'no tensor'}; check the model and the example."
        )
    for strength in _NOISE:
        disturbed = _mapped(_Disturbance(strength), example_input)
        outputs = _tried(_outputs, model, disturbed)
        # Not every model takes every input.
        if outputs is not None and _finite(outputs):
            inputs.append(disturbed)
            expected.append(outputs)
    return _Probe(inputs, expected, tolerance)


def _finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    with torch.no_grad():
        return _traced_outputs(model, example_input)


def _traced_outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    # Each from the same random state, for a forward that draws random numbers.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return list(_tensors_in(_call(model, example_input)))


def _call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, Tensor):
        return model(example_input)
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    raise ValueError(
        "Expected example_input to be a tensor, a tuple of arguments or a dict of keyword arguments, but got a"
        f" {type(example_input).__name__}; pass what forward takes."
    )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for x in value:
            yield from _tensors_in(x)


def _tried(function: Callable[..., _T], *args: Any) -> _T | None:
    """What a function returns, or None where it raises: models and torch-pruning raise what they like."""
    try:
        return function(*args)
    except Exception:
        return None


class _Disturbance:
    """Adds noise to floating-point tensors; others are shuffled, so that indices and flags stay valid."""

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.flatten()[torch.randperm(x.numel(), generator=self._generator).to(x.device)].view(x.shape)
        noise = torch.randn(x.shape, generator=self._generator, dtype=torch.float64).to(x.device, x.dtype)
        spread = float(x.std(correction=0)) if x.numel() else 0.0
        return x + noise * (self._strength * (spread or 1.0))


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _mapped(function, x) for name, x in value.items()}
    return type(value)(_mapped(function, x) for x in value) if type(value) in (list, tuple) else value


def _cut_exactly(model: _Model, layers: Sequence[str], probe: _Probe) -> _Model:
    """The model less the silent neurons of layers: of all together, or where that is not exact, of each half."""
    trial = copy.deepcopy(model)
    graph, tied = _dependency_graph(trial, probe.inputs[0]), _tied_parameters(trial)
    cut = [name for name in layers if _cut_layer(graph, trial.get_submodule(name), tied)]
    if not cut or probe.agrees(trial):
        return trial
    if len(cut) == 1:
        return model
    half = len(cut) // 2
    return _cut_exactly(_cut_exactly(model, cut[:half], probe), cut[half:], probe)


def _dependency_graph(model: nn.Module, example_input: Any) -> Any:
    def forward(*_: Any) -> list[Tensor]:
        outputs = [x for x in _traced_outputs(model, example_input) if x.grad_fn is not None]
        if not outputs:
            raise ValueError("its outputs carry no gradient")
        return outputs

    try:
        return _torch_pruning().DependencyGraph().build_dependency(model, None, forward_fn=forward, verbose=False)
    except Exception as error:
        raise ValueError(
            f"Expected a {type(model).__name__} that torch-pruning can trace, but it cannot ({error!r}); shrink the"
            " part of it that holds the pruned layers."
        ) from error


def _tied_parameters(model: nn.Module) -> set[Tensor]:
    """Parameters of several names, which would not be one any more if a part were cut out of each."""
    counts = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in counts.items() if count > 1}


def _cut_layer(graph: Any, layer: nn.Module, tied: set[Tensor]) -> bool:
    """Cuts the neurons that no layer would miss, and says whether there are any."""
    if layer not in graph.module2node or not _promises(graph.module2node[layer]):
        return False
    cut, count = graph.get_pruner_of_module(layer).prune_out_channels, graph.get_out_channels(layer)
    group = _tried(graph.get_pruning_group, layer, cut, list(range(count)))
    if group is None or not all(_can_be_cut(item, tied) for item in group.items):
        return False
    neurons: list[int] = _Channels(graph, group, count).missed_by_none().nonzero().flatten().tolist()
    # One stays, so that the layer is still one.
    neurons = neurons[count == len(neurons) :]
    group = _tried(graph.get_pruning_group, layer, cut, neurons) if neurons else None
    # Others would come along where parts of a layer are added to each other.
    if group is None or sorted(group[0].idxs) != neurons or not graph.check_pruning_group(group):
        return False
    # What it leaves half done does not agree with the model.
    _tried(group.prune)
    return True


def _promises(node: Any) -> bool:
    """Whether something about a layer or what its channels reach is zero, and all of that is by channel.

    The group of a layer, which tells for certain, can take torch-pruning for ever: with a Swin Transformer it does.
    """
    met = list(_reached(node))
    hint = bool(_silent_rows(node.module).any()) or any(map(_hints, met))
    return hint and all(x.type.name in _BY_CHANNEL for x in met)


def _reached(node: Any) -> Iterator[Any]:
    """The nodes that a layer's channels come to, up to the layers that take them."""
    stack, seen = list(node.outputs), set()
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            yield node
            stack.extend([] if _mixes(node.module) else node.outputs)


def _hints(node: Any) -> bool:
    silent = _unheard(node.module) if _mixes(node.module) else _response(node.module)[0]
    return bool(torch.as_tensor(silent).any())


def _can_be_cut(item: Any, tied: set[Tensor]) -> bool:
    """Whether a member of a group treats each channel for itself, and is made for being cut."""
    node, module = item.dep.target, item.dep.target.module
    if None in item.root_idxs or node.type.name not in _BY_CHANNEL:
        return False
    return _is_plain(module) and tied.isdisjoint(module.parameters(recurse=False))


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, _LAYERS):
        return True
    if getattr(module, "groups", 1) > 1 and not _is_depthwise(module):
        return False
    return not is_computed(module) and _tried(neuron_entries, module, None, _NO_NEURON) is not None


def _is_depthwise(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return bool(groups > 1 and not module.transposed and module.in_channels == module.out_channels == groups)


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and not _is_depthwise(module)


class _Channels:
    """The channels of a layer, wherever they go.

    Masks are (D,) bool over the layer's channels.

    Args:
        graph: torch-pruning's graph of dependencies.
        group: what would be cut with all channels of the layer.
        count: D.
    """

    def __init__(self, graph: Any, group: Any, count: int) -> None:
        self._count = count
        # Of every node: positions of its own channels, and the layer's channels that they are.
        self._out: dict[Any, tuple[Tensor, Tensor]] = {}
        self._in: dict[Any, tuple[Tensor, Tensor]] = {}
        for item in group.items:
            places = self._out if graph.is_out_channel_pruning_fn(item.dep.handler) else self._in
            places[item.dep.target] = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        self._zero: dict[Any, Tensor] = {}

    def missed_by_none(self) -> Tensor:
        """The channels that arrive as zero at every layer that takes them, or that it does not listen to."""
        missed, taken = self._none(), self._none()
        for node, (own, channels) in self._in.items():
            heard = ~_unheard(node.module)[own]
            missed[channels[heard]] |= ~self._arrives_as_zero(node)[channels[heard]]
            taken[channels] = True
        return taken & ~missed

    def _none(self) -> Tensor:
        return torch.zeros(self._count, dtype=torch.bool)

    def _leaves_as_zero(self, node: Any) -> Tensor:
        if node not in self._zero:
            # A module that is called twice may come round to itself.
            self._zero[node] = self._none()
            mute, keeps_zero = _response(node.module)
            through = self._arrives_as_zero(node) & self._where(node, keeps_zero)
            self._zero[node] = self._where(node, mute) | through
        return self._zero[node]

    def _arrives_as_zero(self, node: Any) -> Tensor:
        inputs = [x for x in node.inputs if x in self._out and not _is_weight(x)]
        there = [self._where(x, True) for x in inputs]
        zero = [self._leaves_as_zero(x) for x in inputs]
        if not inputs:
            return self._none()
        if node.grad_fn.name().startswith("MulBackward"):
            # One factor is enough.
            return torch.stack(zero).any(0)
        return torch.stack(there).any(0) & torch.stack([z | ~t for z, t in zip(zero, there, strict=True)]).all(0)

    def _where(self, node: Any, mask: Tensor | bool) -> Tensor:
        """The channels of the layer that are in a node, all of its own channels for them in a mask."""
        own, channels = self._out[node]
        holds = mask[own] if isinstance(mask, Tensor) else torch.full(own.shape, mask)
        result = self._none()
        result[channels] = True
        result[channels[~holds]] = False
        return result


def _is_weight(node: Any) -> bool:
    """Whether a node only turns the weight of a layer about, as Linear does."""
    module = node.module
    if isinstance(module, nn.Parameter) or next(module.parameters(), None) is not None:
        return False
    return all(map(_is_weight, node.inputs))


def _response(module: Any) -> tuple[Tensor | bool, Tensor | bool]:
    """Which channels leave a module as zero whatever comes, and which do if they come as zero."""
    if isinstance(module, _LAYERS):
        return _silent_rows(module), _is_depthwise(module) and (module.bias is None or _is_zero(module.bias))
    if isinstance(module, nn.modules.batchnorm._NormBase):
        # A norm without scale multiplies by 1; without shift or running mean it adds or takes 0.
        scale = _is_zero(x) if (x := getattr(module, "weight", None)) is not None else False
        shift, mean = (
            _is_zero(x) if (x := getattr(module, name, None)) is not None else True for name in ("bias", "running_mean")
        )
        return scale & shift, shift & (scale | mean)
    return False, True


def _silent_rows(module: nn.Module) -> Tensor:
    """(D,) bool, the neurons of a layer whose weights and bias are zero."""
    is_plain = isinstance(module, _LAYERS) and not is_computed(module)
    entries = _tried(neuron_entries, module, None, _NO_NEURON) if is_plain else None
    if not entries:
        return torch.zeros(0, dtype=torch.bool)
    return torch.stack([_is_zero(entry.parameter, entry.dimension) for entry in entries]).all(0)


def _unheard(module: Any) -> Tensor:
    """Which inputs of a layer it does not listen to."""
    return _is_zero(module.weight, 0 if getattr(module, "transposed", False) else 1)


def _is_zero(parameter: Tensor, dimension: int = 0) -> Tensor:
    """Which slices of a parameter are all zero, on the CPU."""
    slices = parameter.detach().movedim(dimension, 0)
    return (slices.reshape(len(slices), -1) == 0).all(1).cpu()


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Args:
        parameters: how many numbers are trained or could be.
        macs: multiply-accumulate operations of matrix products and convolutions, in one call.
        latency: milliseconds of one call in eval mode, the median of repeats.

    Example:
        >>> print(ModelCost(parameters=11_173_962, macs=37_220_352, latency=4.25))
        11,173,962 parameters, 37,220,352 MACs, 4.25 ms
    """

    parameters: int
    macs: int
    latency: float

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.macs:,} MACs, {self.latency:.3g} ms"


def measure(model: nn.Module, example_input: ExampleInput, *, repeats: int = 30) -> ModelCost:
    """Parameters, MACs and latency of a model, which is left as it was.

    Args:
        model: any module.
        example_input: as for :func:`shrink`; its batch size is that of the call.
        repeats: timed calls, of which the median counts.

    Example:
        >>> cost = measure(torch.nn.Linear(4, 8), torch.zeros(5, 4))
        >>> cost.parameters, cost.macs, cost.latency > 0
        (40, 160, True)
    """
    return _measured([model], example_input, repeats)[0]


def compare(before: nn.Module, after: nn.Module, example_input: ExampleInput, *, repeats: int = 30) -> str:
    """A table of what two models cost; their timed calls take turns, so that other work hits both alike.

    Args:
        before: the full model.
        after: the shrunk one.
        example_input: as for :func:`shrink`.
        repeats: timed calls of each.

    Example:
        >>> print(compare(torch.nn.Linear(4, 8), torch.nn.Linear(4, 6), torch.zeros(5, 4)))
                              before          after    change
        parameters                40             30    -25.0%
        MACs                     160            120    -25.0%
        latency / ms ...
    """
    old, new = _measured([before, after], example_input, repeats)
    rows = [
        ("parameters", old.parameters, new.parameters, ",d"),
        ("MACs", old.macs, new.macs, ",d"),
        ("latency / ms", old.latency, new.latency, ".3f"),
    ]
    lines = [f"{'':12}{'before':>16}{'after':>15}{'change':>10}"]
    for name, a, b, form in rows:
        lines.append(f"{name:12}{a:>16{form}}{b:>15{form}}{b / a - 1 if a else 0.0:>+10.1%}")
    return "\n".join(lines)


def _measured(models: Sequence[nn.Module], example_input: ExampleInput, repeats: int) -> list[ModelCost]:
    if repeats < 1:
        raise ValueError(f"Expected repeats to be at least 1, but got {repeats}.")
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            stack.enter_context(_evaluating(model))
        times = [[_seconds(model, example_input) for model in models] for _ in range(_WARMUPS + repeats)][_WARMUPS:]
        return [
            ModelCost(_size(model), _macs(model, example_input), 1e3 * median(seconds))
            for model, seconds in zip(models, zip(*times, strict=True), strict=True)
        ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _seconds(model: nn.Module, example_input: ExampleInput) -> float:
    _synchronize()
    start = time.perf_counter()
    _call(model, example_input)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _macs(model: nn.Module, example_input: ExampleInput) -> int:
    # The counter does not know the fused Transformer layer, nor the fused attention of the CPU.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _call(model, example_input)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2


def save_shrunk(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes a shrunk model to a file that :func:`load_shrunk` reads: tensors and numbers, and no class.

    Args:
        model: what :func:`shrink` returned, trained further or not.
        path: file to write; folders are made.

    Raises:
        ValueError: if the state of the model holds what is not a tensor.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"Expected a state of tensors, but '{key}' is a {type(value).__name__}; leave it out.")
    sizes = {name: own for name, module in model.named_modules() if (own := _sizes(module))}
    with replacing(path) as file:
        torch.save({"format": FORMAT, "state": dict(state), "sizes": sizes}, file)


def _sizes(module: nn.Module) -> dict[str, Any]:
    """The attributes that say how large a layer is; a module of the user's own may mean other things by the names."""
    attributes = {name: vars(module)[name] for name in _SIZES if name in vars(module)}
    return {name: x for name, x in attributes.items() if _is_size(name, x)}


def load_shrunk(model: _Model, path: str | PathLike[str]) -> _Model:
    """Makes a full-size model as small as a saved one, and loads that; no code is unpickled.

    The file is read with ``torch.load(weights_only=True)``, which makes tensors and plain values and refuses all else;
    of the model, only tensors and the numbers that say how large a layer is are set.

    Args:
        model: a new instance of the class that was shrunk, made with the same arguments; it is changed in place, and
            keeps its device, types and ``requires_grad``.
        path: a file that :func:`save_shrunk` wrote.

    Returns:
        The model.

    Raises:
        ValueError: for another file, or one of another model; then nothing was changed.
    """
    path = source_file(path)
    content = _content(path)
    state, own = content["state"], model.state_dict(keep_vars=True)
    modules = dict(model.named_modules())
    strangers = [f"the model has no layer '{name}'" for name in content["sizes"].keys() - modules.keys()]
    if problems := [*strangers, *_mismatches(own, state)]:
        raise ValueError(
            f"Expected {path} to hold a shrunk {type(model).__name__}, but {'; '.join(problems[:5])}. Make the model"
            " with the arguments that it had when it was shrunk."
        )
    for key, tensor in state.items():
        own[key].data = own[key].data.new_empty(tensor.shape)
    for name, sizes in content["sizes"].items():
        for attribute, size in sizes.items():
            setattr(modules[name], attribute, size)
    model.load_state_dict(state)
    return model


def _content(path: Path) -> dict[str, Any]:
    """What :func:`save_shrunk` wrote, if it was that."""
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # broken, or more than tensors and plain values, in one of many ways
            raise ValueError(
                f"Expected a file that save_shrunk wrote, but {path} cannot be read as one; check the path, or save it"
                " again."
            ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"Expected a file that save_shrunk wrote, but {path} is another; check the path.")
    state, sizes = content.get("state"), content.get("sizes")
    if not (
        isinstance(state, dict)
        and all(isinstance(value, Tensor) for value in state.values())
        and isinstance(sizes, dict)
        and all(isinstance(own, dict) and all(map(_is_size, own, own.values())) for own in sizes.values())
    ):
        raise ValueError(f"Expected {path} to hold tensors and sizes of layers only, but it holds more; save it again.")
    return content


def _is_size(name: Any, value: Any) -> bool:
    numbers = value if isinstance(value, (tuple, list)) else (value,)
    return name in _SIZES and all(type(number) is int for number in numbers)


def _mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"'{key}' is missing in the file" for key in own.keys() - state.keys())
    for key, tensor in state.items():
        if key not in own:
            yield f"the model has no '{key}'"
        elif tensor.ndim != own[key].ndim or any(map(operator.gt, tensor.shape, own[key].shape)):
            yield f"'{key}' has shape {tuple(tensor.shape)} where the full model has {tuple(own[key].shape)}"
