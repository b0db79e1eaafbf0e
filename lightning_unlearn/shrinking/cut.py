"""Cut silent neurons out of a pruned model, with the same outputs."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_unlearn.shrinking.channels import LAYERS, Channels, may_be_cut, silent_rows, treats_each_alone
from lightning_unlearn.shrinking.cost import parameter_count
from lightning_unlearn.shrinking.equivalence import (
    ExampleInput,
    Probe,
    dtypes_of,
    make_probe,
    set_dtypes,
    traced_outputs,
    tried,
)
from lightning_unlearn.utilities.checks import check_names

_Model = TypeVar("_Model", bound=nn.Module)


def shrink(model: _Model, example_input: ExampleInput, *, layers: Sequence[str] | None = None) -> _Model:
    """Return a copy of a model without its silent neurons, that returns the same outputs.

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
    cut = shrunk_copy(model, example_input, layers=layers)
    if cut.note:
        warnings.warn(cut.note, stacklevel=2)
    return cut.model


@dataclass(frozen=True)
class Cut(Generic[_Model]):
    """A copy of a model without its silent neurons.

    Args:
        model: the copy.
        kept: dotted paths of the layers that keep silent neurons, since the outputs would change without them.
        is_smaller: whether any neuron was cut.
    """

    model: _Model
    kept: tuple[str, ...]
    is_smaller: bool

    @property
    def note(self) -> str:
        """Why silent neurons are left, or that there were none; empty where all were cut."""
        if self.kept:
            return (
                f"shrink kept pruned neurons in {', '.join(map(repr, self.kept))}: removing them would change the"
                " outputs (output layer, the layer's last neuron, residual sum, LayerNorm, or a function that is not 0"
                " at 0)."
            )
        if self.is_smaller:
            return ""
        return (
            "shrink found no neuron to cut, so the copy is as large as the model. A neuron can be cut if its"
            " weight row and bias are exactly zero, or the scale and shift of the following norm, or the"
            " columns of every layer that takes it as input, as after SensitivityPruneCallback."
        )


def shrunk_copy(model: _Model, example_input: ExampleInput, *, layers: Sequence[str] | None = None) -> Cut[_Model]:
    """Do as :func:`shrink` does, and return what is left uncut instead of a warning."""
    require_torch_pruning()
    wanted = _chosen(model, layers)
    with torch.inference_mode(False), torch.enable_grad():
        small = _copied(model).eval()
        for parameter in small.parameters():
            # What needs no gradient leaves no trace.
            parameter.requires_grad_(parameter.is_floating_point())
        probe = make_probe(small, example_input)
        before = parameter_count(small)
        # From the last layer to the first: what only a cut neuron listened to is silent too.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            small = _cut_exactly(small, wanted[::-1], probe)
    _restore(small, model)
    kept = tuple(name for name, module in small.named_modules() if bool(silent_rows(module).any()))
    return Cut(small, kept, is_smaller=parameter_count(small) < before)


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Return the layers to look at, in the order in which the model has them."""
    known = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    if layers is not None:
        layers = [layers] if isinstance(layers, str) else check_names("layers", layers, "dotted paths of layers")
    if strangers := [name for name in layers or () if name not in known]:
        raise ValueError(
            f"Expected layers to be among the Linears and convolutions of {type(model).__name__}"
            f" ({', '.join(known[:10])}), but got {strangers[0]!r}."
        )
    return known if layers is None else [name for name in known if name in layers]


def require_torch_pruning() -> Any:
    """Return the package that knows what else must be cut with a neuron.

    Raises:
        ImportError: without it, naming the extra.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "shrink needs the package torch-pruning, which is not installed: pip install torch-pruning."
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
    """Restore modes, types and flags as in the model."""
    for (_, module), (_, original) in zip(small.named_modules(), model.named_modules(), strict=True):
        module.training = original.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    set_dtypes(small, dtypes_of(model))
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(flags[name])


def _cut_exactly(model: _Model, layers: Sequence[str], probe: Probe) -> _Model:
    """Return the model less the silent neurons of layers: of all together, or where that is not exact, of each half."""
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
        outputs = [x for x in traced_outputs(model, example_input) if x.grad_fn is not None]
        if not outputs:
            raise ValueError("its outputs carry no gradient")
        return outputs

    try:
        graph = require_torch_pruning().DependencyGraph()
        return graph.build_dependency(model, None, forward_fn=forward, verbose=False)
    except Exception as error:
        raise ValueError(
            f"Expected a {type(model).__name__} that torch-pruning can trace, but it cannot ({error!r}); shrink the"
            " part of it that holds the pruned layers."
        ) from error


def _tied_parameters(model: nn.Module) -> set[Tensor]:
    """Return parameters of several names, which would not be one any more if a part were cut out of each."""
    counts = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in counts.items() if count > 1}


def _cut_layer(graph: Any, layer: nn.Module, tied: set[Tensor]) -> bool:
    """Cut the neurons that no layer would miss, and say whether there are any."""
    if layer not in graph.module2node or not may_be_cut(graph.module2node[layer]):
        return False
    cut, count = graph.get_pruner_of_module(layer).prune_out_channels, graph.get_out_channels(layer)
    group = tried(graph.get_pruning_group, layer, cut, list(range(count)))
    if group is None or not all(treats_each_alone(item, tied) for item in group.items):
        return False
    neurons: list[int] = Channels(graph, group, count).missed_by_none().nonzero().flatten().tolist()
    # One stays, so that the layer is still one.
    neurons = neurons[count == len(neurons) :]
    group = tried(graph.get_pruning_group, layer, cut, neurons) if neurons else None
    # Others would come along where parts of a layer are added to each other.
    if group is None or sorted(group[0].idxs) != neurons or not graph.check_pruning_group(group):
        return False
    # What it leaves half done does not agree with the model.
    tried(group.prune)
    return True
