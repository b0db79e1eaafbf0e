"""Averages of the weights (EMA, SWA) that any callback or the module keeps.

A copy that is not called an average is left alone: it may be a teacher, or the best weights so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import plain_name
from lightning_unlearn.trainer.compat import is_lightning_instance

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGES = {"ema", "avg", "average", "averaged", "averaging", "averager", "shadow", "swa", "slow", "polyak"}
# What holds an average may hold it within something else: a wrapper, a dict, an object of the user's.
_DEPTH, _FIRST = 4, 100
_OF_TORCH = frozenset(vars(nn.Module()))
_NO_HOLDER = (str, int, float, type(None))


def is_average(*names: str) -> bool:
    """Return whether one of these names of attributes or classes is that of an average.

    Example:
        >>> is_average("ModelEmaV2"), is_average("swa_model"), is_average("schema", "teacher")
        (True, True, False)
    """
    return any(word.lower() in _AVERAGES for name in names for word in _WORD.findall(name))


def averaged_parts(pl_module: nn.Module) -> list[str]:
    """Return the dotted paths of submodules that average others: named so, and built like another."""
    found: list[str] = []
    for name, module in pl_module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        is_called = bool(name) and is_average(name.rpartition(".")[2], type(module).__name__)
        if is_called and not is_inside and _is_like_another(pl_module, name, module):
            found.append(name)
    return found


def _is_like_another(pl_module: nn.Module, name: str, module: nn.Module) -> bool:
    shapes = _shapes(module)
    others = (other for path, other in pl_module.named_modules() if path and not f"{path}.".startswith(f"{name}."))
    return bool(shapes) and any(_shapes(other) == shapes for other in others if other is not module)


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {_own_name(name): parameter.shape for name, parameter in module.named_parameters()}


def weight_copies(fit: RunningFit) -> list[dict[str, Tensor]]:
    """Return the averages that are kept of all the weights, or of those of a submodule.

    Returns:
        for each, what it has of a parameter, by the parameter's plain name.
    """
    model = fit.model
    parts = tuple(f"{name}." for name in averaged_parts(model))
    named = model.named_parameters(remove_duplicate=False)
    live = {plain_name(name): parameter for name, parameter in named if not name.startswith(parts)}
    search = _Search(live, model)
    for callback in fit.callbacks:
        search.look_into(callback)
    search.look_into(model)
    for name in parts:
        search.look_at(name, model.get_submodule(name[:-1]), is_inside=True)
    return search.found


class _Search:
    """Looks for what has the shapes, and where it has any the names, of the weights.

    Args:
        live: the weights, by name.
        pl_module: that holds them.
    """

    def __init__(self, live: Mapping[str, Tensor], pl_module: nn.Module) -> None:
        self._live = live
        self._seen = {id(pl_module)}
        self._own = {id(parameter) for parameter in live.values()}
        modules = [plain_name(name) for name, _ in pl_module.named_modules()]
        self._prefixes = [f"{name}." if name else "" for name in modules]
        self.found: list[dict[str, Tensor]] = []

    def look_into(self, holder: Any) -> None:
        """Look at the attributes of a callback or of the module."""
        is_inside = is_average(type(holder).__name__)
        for name, value in _attributes(holder):
            self.look_at(name, value, is_inside=is_inside)

    def look_at(self, name: str, value: Any, *, is_inside: bool, depth: int = _DEPTH) -> None:
        """Take a value for an average, or look for one in it, if it is called one or is inside of what is."""
        is_inside = is_inside or is_average(name, type(value).__name__)
        if (
            depth < 1
            or id(value) in self._seen
            or isinstance(value, _NO_HOLDER)
            or is_lightning_instance(value, "Trainer")
        ):
            return
        self._seen.add(id(value))
        if (is_inside and self._take(value)) or isinstance(value, Tensor):
            return
        for inner, part in _parts_of(value, is_inside):
            # Not far where nothing speaks for an average.
            self.look_at(inner, part, is_inside=is_inside, depth=depth - (1 if is_inside else 2))

    def _take(self, value: Any) -> bool:
        named = _named(value)
        if isinstance(value, Tensor):
            copy = self._in_one(value)
        else:
            copy = self._by_name(named) if named else self._by_order(_listed(value))
        if copy is not None:
            self.found.append(copy)
        return copy is not None

    def _by_name(self, named: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        whole = self._below("", named)
        if whole is not None:
            return whole
        fits = [copy for prefix in self._prefixes if (copy := self._below(prefix, named)) is not None]
        # Two parts of a model may be built alike: an average is nearest to what it is an average of.
        return min(fits, key=self._distance, default=None)

    def _below(self, prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        wanted = {name for name, p in self._live.items() if name.startswith(prefix) and p.requires_grad}
        copy = {prefix + name: tensor for name, tensor in named.items() if prefix + name in self._live}
        return copy if wanted and wanted <= copy.keys() and self._is_other(copy) else None

    def _in_one(self, vector: Tensor) -> dict[str, Tensor] | None:
        """View of a vector of all weights, as ``parameters_to_vector`` makes it."""
        for names in self._orders():
            sizes = [self._live[name].numel() for name in names]
            if vector.ndim == 1 and vector.is_contiguous() and len(vector) == sum(sizes) > 0:
                parts = zip(names, torch.split(vector.detach(), sizes), strict=True)
                return {name: part.view(self._live[name].shape) for name, part in parts}
        return None

    def _orders(self) -> list[list[str]]:
        return [list(self._live), [name for name, parameter in self._live.items() if parameter.requires_grad]]

    def _by_order(self, tensors: list[Tensor]) -> dict[str, Tensor] | None:
        for names in self._orders():
            if names and len(names) == len(tensors):
                copy = dict(zip(names, tensors, strict=True))
                if self._is_other(copy):
                    return copy
        return None

    def _is_other(self, copy: Mapping[str, Tensor]) -> bool:
        return all(
            tensor.shape == self._live[name].shape and id(tensor) not in self._own for name, tensor in copy.items()
        )

    def _distance(self, copy: Mapping[str, Tensor]) -> float:
        name, tensor = next(iter(copy.items()))
        return (tensor.detach().cpu().float() - self._live[name].detach().cpu().float()).abs().sum().item()


def _parts_of(value: Any, is_inside: bool) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, by name; of objects that are no container only averages and what holds them."""
    if isinstance(value, nn.Module):
        yield from value.named_children()
    elif isinstance(value, Mapping):
        # What a data set, or all that was ever logged, lies in is not looked through.
        yield from ((str(key), part) for key, part in islice(value.items(), _FIRST))
    elif isinstance(value, (list, tuple)):
        yield from (("", part) for part in value[:_FIRST])
    if is_inside and hasattr(value, "__dict__"):
        yield from _attributes(value)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return what an object holds, without what every torch module has: submodules are looked at by themselves."""
    return [(name, part) for name, part in vars(value).items() if name not in _OF_TORCH]


def _named(value: Any) -> dict[str, Tensor]:
    """Return tensors by the names that the model's author gave the parameters."""
    if isinstance(value, nn.Module):
        items: Iterable[tuple[Any, Any]] = value.named_parameters(remove_duplicate=False)
    elif isinstance(value, Mapping):
        items = list(value.items())
    else:
        return {}
    return {_own_name(key): part for key, part in items if isinstance(key, str) and isinstance(part, Tensor)}


def _own_name(name: str) -> str:
    # AveragedModel and other wrappers put a name of their own in front.
    return plain_name(name).removeprefix("module.")


def _listed(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple, nn.ParameterList)):
        parts = list(value)
    elif isinstance(value, Mapping):
        # Such as one by the parameters themselves.
        parts = list(value.values())
    else:
        return []
    return parts if all(isinstance(part, Tensor) for part in parts) else []
