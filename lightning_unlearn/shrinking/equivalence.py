"""Whether two models return the same, on an example and on disturbed copies of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ExampleInput = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What ``forward`` takes: a tensor, a tuple of arguments, or a dict of keyword arguments."""
_T = TypeVar("_T")
# Of float64; where the model does not run in it, that of its own type is compared as float32 would be.
_EXACT, _CLOSE = 1e-9, 1e-5
_NOISE = (0.1, 1.0, 3.0)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the types of all parameters and buffers, by name."""
    return {name: tensor.dtype for name, tensor in _tensors_of(model).items()}


def set_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Set the types one by one: a LightningModule would remember a call of ``to``."""
    for name, tensor in _tensors_of(model).items():
        tensor.data = tensor.data.to(dtypes[name])


@dataclass(frozen=True, eq=False)
class Probe:
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
        """Return whether another model makes the same of them."""
        return all(self._same(tried(_outputs, model, x), y) for x, y in zip(self.inputs, self.expected, strict=True))

    def _same(self, outputs: Sequence[Tensor] | None, expected: Sequence[Tensor]) -> bool:
        if outputs is None or [x.shape for x in outputs] != [x.shape for x in expected]:
            return False
        return all(
            torch.allclose(x.double(), y.double(), rtol=0, atol=self.tolerance * _scale(y))
            for x, y in zip(outputs, expected, strict=True)
        )


def _scale(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def make_probe(model: nn.Module, example_input: ExampleInput) -> Probe:
    """Return a probe, in float64 if the model runs in it; the model keeps the types that were taken."""
    dtypes = dtypes_of(model)
    # A forward that makes tensors of its own type does not run in it, nor does a device that has none.
    if (exact := tried(_probe_in_float64, model, example_input)) is not None:
        return exact
    set_dtypes(model, dtypes)
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes.values() if dtype.is_floating_point), default=0.0)
    return _probe_as_is(model, example_input, max(_CLOSE, 4 * coarsest))


def _probe_in_float64(model: nn.Module, example_input: ExampleInput) -> Probe:
    set_dtypes(model, {name: torch.float64 if t.is_floating_point else t for name, t in dtypes_of(model).items()})
    return _probe_as_is(model, _mapped(_widened, example_input), _EXACT)


def _probe_as_is(model: nn.Module, example_input: Any, tolerance: float) -> Probe:
    inputs, expected = [example_input], [_outputs(model, example_input)]
    if not expected[0] or not _finite(expected[0]):
        raise ValueError(
            "Expected a forward that returns tensors of finite numbers for example_input, but it returned"
            f" {'NaN or infinity' if expected[0] else 'no tensor'}; check the model and the example."
        )
    for strength in _NOISE:
        disturbed = _mapped(_Disturbance(strength), example_input)
        outputs = tried(_outputs, model, disturbed)
        # Not every model takes every input.
        if outputs is not None and _finite(outputs):
            inputs.append(disturbed)
            expected.append(outputs)
    return Probe(inputs, expected, tolerance)


def _finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    with torch.no_grad():
        return traced_outputs(model, example_input)


def traced_outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    """Return all tensors that a model returns, with what autograd remembers of them."""
    # Each from the same random state, for a forward that draws random numbers.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return list(_tensors_in(call_model(model, example_input)))


def call_model(model: nn.Module, example_input: Any) -> Any:
    """Call a model with an example.

    Raises:
        ValueError: for an example that is neither a tensor, a tuple nor a mapping.
    """
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


def tried(function: Callable[..., _T], *args: Any) -> _T | None:
    """Return what a function returns, or None where it raises: models and torch-pruning raise what they like."""
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
