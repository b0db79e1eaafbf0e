"""What a model costs: parameters, MACs, latency."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_unlearn.shrinking.equivalence import ExampleInput, call_model

_WARMUPS = 3


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers all parameters have."""
    return sum(parameter.numel() for parameter in model.parameters())


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
    """Return parameters, MACs and latency of a model, which is left as it was.

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
    """Return a table of what two models cost; their timed calls take turns, so that other work hits both alike.

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
            ModelCost(parameter_count(model), _macs(model, example_input), 1e3 * median(seconds))
            for model, seconds in zip(models, zip(*times, strict=True), strict=True)
        ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the context."""
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
    call_model(model, example_input)
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
            call_model(model, example_input)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2
