"""Files of shrunk models, which hold tensors and numbers and no class."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_unlearn.utilities.files import replacing, source_file

_Model = TypeVar("_Model", bound=nn.Module)

FORMAT = "lightning_unlearn.shrunk.1"
# The attributes by which layers know their sizes.
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels"),
    *("num_parameters", "normalized_shape"),
)


def save_shrunk(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a shrunk model to a file that :func:`load_shrunk` reads: tensors and numbers, and no class.

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
    """Return the attributes that say how large a layer is; in a user's own module the names may mean other things."""
    attributes = {name: vars(module)[name] for name in _SIZES if name in vars(module)}
    return {name: x for name, x in attributes.items() if _is_size(name, x)}


def load_shrunk(model: _Model, path: str | PathLike[str]) -> _Model:
    """Make a full-size model as small as a saved one, and load that; no code is unpickled.

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
    """Return what :func:`save_shrunk` wrote, if it was that."""
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
