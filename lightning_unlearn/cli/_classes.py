"""A user's classes by their dotted paths, and the layers of a model."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightning_unlearn.attribution import named_layers, neuron_count, trace_forward

_LISTED = 8
_SHORT = {"--model": "Net", "--data": "Data"}
_OTHER = "pytorch_lightning."


def model_class(path: str) -> type[LightningModule]:
    """Return the user's LightningModule.

    Raises:
        ValueError: for a path that leads to none, saying what to do.
    """
    return _class_of(path, LightningModule, "--model")


def data_class(path: str) -> type[LightningDataModule]:
    """Return the user's LightningDataModule.

    Raises:
        ValueError: for a path that leads to none, saying what to do.
    """
    return _class_of(path, LightningDataModule, "--data")


def _class_of(path: str, base: type[Any], option: str) -> type[Any]:
    module_name, _, name = path.rpartition(".")
    wanted = f"Expected {option} to be the dotted path of a {base.__name__}, as team.{_SHORT[option]}, but"
    if not module_name:
        raise ValueError(f"{wanted} got {path!r}, which has no module in front; see the file that it is in.")
    module = _import(module_name, wanted)
    if not hasattr(module, name):
        classes = [one for one, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        near = difflib.get_close_matches(name, classes, n=1) or classes[:5]
        below = [] if classes else _modules_with(name, module)
        has = f"it has {', '.join(near)}" if near else "nor another one"
        has = f"write {' or '.join(below)}" if below else has
        raise ValueError(f"{wanted} there is no {name!r} in {module_name}; {has}.")
    found: Any = getattr(module, name)
    if not inspect.isclass(found):
        raise ValueError(f"{wanted} {path} is a {type(found).__name__}.")
    if not issubclass(found, base):
        is_other = any(kind.__module__.startswith(_OTHER) and kind.__name__ == base.__name__ for kind in found.__mro__)
        advice = f"derive it from lightning.pytorch.{base.__name__}"
        if is_other:
            advice = (
                f"it is one of pytorch_lightning, and this command runs lightning.pytorch: import that, or {advice}"
            )
        raise ValueError(f"{wanted} {path} is another class; {advice}.")
    kind: type[Any] = found
    return kind


def _modules_with(name: str, package: Any) -> list[str]:
    """Return where a class of that name seems to be in a package's modules, none of which is imported."""
    found = []
    for one in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package.__name__}."):
        spec = importlib.util.find_spec(one.name)
        file = None if spec is None or spec.origin is None else Path(spec.origin)
        if file is not None and file.suffix == ".py" and re.search(rf"^class {name}\b", file.read_text("utf-8"), re.M):
            found.append(f"{one.name}.{name}")
    return found


def _import(name: str, wanted: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{wanted} there is no module {error.name!r}; run the command in the folder that it lies in, or install"
                " it."
            ) from error
        raise ValueError(f"{wanted} importing {name} fails: {error}; install what it needs.") from error
    except Exception as error:  # of the user's module
        raise ValueError(f"{wanted} importing {name} fails: {type(error).__name__}: {error}.") from error


def layer_notes(kind: type[LightningModule]) -> list[str]:
    """Return what there is to say of a model's layers, in lines."""
    parameters = inspect.signature(kind).parameters.values()
    by_force = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(one.default is one.empty and one.kind not in by_force for one in parameters):
        return []
    try:
        model = kind()
    except Exception as error:  # of the user's class
        return [f"The layers are not known: {kind.__name__}() fails with {type(error).__name__}: {error}"[:110]]
    counts = {
        name: neuron_count(module)
        for name, module in named_layers(model).items()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    if not counts:
        return []
    head = _head_of(model) or list(counts)[-1]
    others = [f"{name} ({count})" for name, count in counts.items() if name != head]
    more = f"{len(others) - _LISTED} more, " if len(others) > _LISTED else ""
    return [f"Layers, with their neurons: {more}{', '.join([*others[-_LISTED:], f'{head}: the head'])}"]


def _head_of(model: LightningModule) -> str | None:
    """Find the layer as the callbacks do, where the model has an example input."""
    x = model.example_input_array
    if not isinstance(x, Tensor):
        return None
    try:
        model.eval()
        trace = trace_forward(model, model, x)
        return trace.head(int(trace.output.shape[1]))
    except Exception:  # of the user's forward
        return None
