"""A device that is not there: its tensors lie on the CPU, but refuse what a GPU's would, and waits for it are counted.

Refused: an operation on tensors of both devices, a draw on the device with a generator of the CPU, ``numpy()``.
Counted, by the line of the package that asks: values that are read (``.item()``, ``.tolist()``, ``bool``), shapes that
depend on values (``nonzero``), and copies between the devices. It patches torch: only for a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lightning_unlearn.attribution.trace as tracing
from lightning_unlearn.attribution.trace import is_same

IS_SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
PACKAGE = Path(tracing.__file__).parents[1]
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense.default, aten.equal.default}
COUNTING = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}

waits: Counter[str] = Counter()
"""How often the device was waited for, by what for and the line of the package that asked."""


def device() -> torch.device:
    return torch.device("simulated:0")


class OnDevice(Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=device(), layout=inner.layout
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})

    def tolist(self):
        _count("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any):
        raise TypeError("can't convert simulated:0 device type tensor to numpy")


class _EverywhereInside(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _count(what: str) -> None:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            waits[f"{what} {path.relative_to(PACKAGE)}:{frame.lineno}"] += 1
            return


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    target = kwargs.get("device")
    is_result_ours = bool(ours) if target is None else torch.device(target).type == "simulated"
    if function in COPIES:
        is_result_ours = _copied(function, args, kwargs, is_result_ours=is_result_ours)
    elif ours:
        _check_and_count(function, args, leaves)
    generator = kwargs.get("generator")
    if is_result_ours and generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'simulated' device type for generator but found 'cpu'")
    on_cpu = {**kwargs, **({} if target is None else {"device": torch.device("cpu")})}
    found = function(*_unwrapped(args), **_unwrapped(on_cpu))
    if function in READING:
        return found
    known = {id(tensor.inner): tensor for tensor in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice) or not is_result_ours:
            return value
        return known.get(id(value)) if id(value) in known else OnDevice(value)

    return tree_map(wrapped, found)


def _unwrapped(values: Any) -> Any:
    return tree_map(lambda value: value.inner if isinstance(value, OnDevice) else value, values)


def _copied(function: Any, args: Any, kwargs: Any, *, is_result_ours: bool) -> bool:
    """Counts a copy from one device to the other; returns whether the result is the device's."""
    source, is_waited_for = args[0], not kwargs.get("non_blocking", False)
    if function is aten.copy_.default:
        is_result_ours, source = isinstance(args[0], OnDevice), args[1]
        is_waited_for = not (len(args) > 2 and args[2]) and source.ndim > 0
    if isinstance(source, OnDevice) and not is_result_ours:
        _count("to the CPU")
    elif is_result_ours and not isinstance(source, OnDevice) and is_waited_for:
        _count("from the CPU")
    return is_result_ours


def _check_and_count(function: Any, args: Any, leaves: list[Any]) -> None:
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim]
    if function in INDEXING and isinstance(args[0], OnDevice):
        # An index may lie on the CPU, but has to be brought.
        index = [one for one in args[1] if isinstance(one, Tensor)]
        for one in index:
            if not isinstance(one, OnDevice):
                _count("an index from the CPU")
            elif one.dtype == torch.bool:
                _count("an index of booleans")
        others = [other for other in others if all(other is not one for one in index)]
    if others:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} has some of both")
    if function in READING or function in COUNTING:
        _count(str(function))


def on_device(value: Any) -> Any:
    return OnDevice(value.detach()) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


def _move(module: nn.Module, move: Any) -> None:
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(move(parameter.data), requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            part._buffers[name] = move(buffer)


class SimulatedAccelerator(Accelerator):
    def setup_device(self, device): ...
    def teardown(self): ...
    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [device()]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "simulated"


class SimulatedStrategy(SingleDeviceStrategy):
    def __init__(self):
        super().__init__(device=device(), accelerator=SimulatedAccelerator())

    def model_to_device(self):
        _move(self.model, on_device)

    def teardown(self):
        _move(self.lightning_module, _unwrapped)
        self.precision_plugin.teardown()


def install() -> TorchDispatchMode:
    """Makes the device, once in a process; operations on it work inside the mode that is returned."""

    class Backend(backend_registration._DummyBackendModule):
        """What torch asks a backend for when there are states of random numbers to save."""

        _is_in_bad_fork = staticmethod(lambda: False)
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        manual_seed_all = staticmethod(lambda seed: None)
        get_rng_state = staticmethod(lambda device=None: torch.zeros(1))
        set_rng_state = staticmethod(lambda state, device=None: None)

    backend_registration._setup_privateuseone_for_python_backend("simulated", backend_module=Backend())
    install.library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    install.library.fallback(torch.library.fallthrough_kernel)
    # These make a tensor where no mode sees it.
    torch.tensor, torch.as_tensor = _made_on_cpu(torch.tensor), _made_on_cpu(torch.as_tensor)
    # Its tensors have no memory of their own, which tells whether two are the same.
    tracing.is_same = lambda one, other: is_same(_unwrapped(one), _unwrapped(other))
    return _EverywhereInside()


def _made_on_cpu(make: Any) -> Any:
    def made(value: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = value if isinstance(value, OnDevice) else make(value, *args, **kwargs)
        return found if device is None else found.to(device)

    return made
