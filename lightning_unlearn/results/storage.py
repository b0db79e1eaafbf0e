"""Files of results: archives of arrays and tables, of which nothing can run, each written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from enum import Enum
from os import PathLike
from types import UnionType
from typing import Any, BinaryIO, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import reason_of, shown
from lightning_unlearn.utilities.files import replacing, source_file

_Record = TypeVar("_Record")
_ABOUT = "about"


def save_record(record: Any, version: int, path: str | PathLike[str]) -> None:
    """Write a dataclass of tensors and primitives as an npz archive, which ``numpy.load`` reads too.

    Tensors are its arrays; the rest is JSON in the array ``about``, with the name of the class and the version.

    Args:
        record: an instance of a dataclass.
        version: of the format.
        path: file to write, under this very name; folders are made.
    """
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    arrays = {name: value.detach().cpu().numpy() for name, value in values.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in values.items() if name not in arrays}
    about = json.dumps({"format": _format(type(record)), "version": version, "values": others})
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in {_ABOUT: np.array(about), **arrays}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_record(kind: type[_Record], version: int, path: str | PathLike[str]) -> _Record:
    """Read what :func:`save_record` wrote. No code is unpickled, and nothing but the fields of the class is read.

    Args:
        kind: the dataclass.
        version: of the format.
        path: file to read.

    Raises:
        ValueError: for any other file, saying what it is and what to do.
    """
    source = source_file(path)
    wanted = f"Expected {source} to be a file that {kind.__name__}.save wrote, but"
    advice = "check the path, or save it again"
    with source.open("rb") as file:
        try:
            about, tensors = _read(file, {field.name for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
        except _PickledError:
            raise ValueError(
                f"{wanted} it contains a pickle (written by an earlier version?), which is not loaded for safety;"
                " save it again."
            ) from None
        except Exception as error:  # broken in one of many ways
            raise ValueError(f"{wanted} it cannot be read ({reason_of(error)}); {advice}.") from error
    if about.get("format") != _format(kind):
        raise ValueError(f"{wanted} it holds {shown(about.get('format'))}; {advice}.")
    if about.get("version") != version:
        raise ValueError(
            f"{wanted} it has format version {shown(about.get('version'))} where this version of lightning_unlearn"
            f" has {version}; save it again."
        )
    values = {**about["values"], **tensors}
    if faults := list(faults_of(kind, values)):
        raise ValueError(f"{wanted} {'; '.join(faults[:5])}; {advice}.")
    try:
        return kind(**{name: _tuples(value) for name, value in values.items()})
    except Exception as error:  # what a field holds may be anything
        raise ValueError(f"{wanted} {reason_of(error)}") from error


def _format(kind: type[Any]) -> str:
    return f"lightning_unlearn.{kind.__name__}"


class _PickledError(Exception):
    """A file holds a pickle."""


def _read(file: BinaryIO, names: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an archive that holds no other."""
    if file.read(1) == b"\x80":
        raise _PickledError
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.filename.endswith(".pkl") for member in members):
            raise _PickledError
        found = [member.filename.removesuffix(".npy") for member in members]
        if strangers := [name for name in found if name not in {_ABOUT, *names}]:
            raise ValueError(f"there is {strangers[0]!r} in it")
        if _ABOUT not in found or len(set(found)) < len(found):
            raise ValueError("it has no description, or two of a name")
        # So that what is read is never more than the file: ours is not compressed.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        size = file.seek(0, os.SEEK_END)
        if any(member.file_size != member.compress_size or member.file_size > size for member in members):
            raise ValueError("a part of it claims to be larger than it is")
        arrays = {name: _array(archive, member) for name, member in zip(found, members, strict=True)}
    about = json.loads(str(arrays.pop(_ABOUT)))
    if not isinstance(about, dict) or not isinstance(about.get("values"), dict):
        raise ValueError("its description is another")
    return about, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """Return an array of as many numbers as its part of the archive holds: memory is taken by what its header says."""
    with archive.open(member) as content:
        version = np.lib.format.read_magic(content)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in headers:
            raise ValueError(f"{member.filename!r} has format version {version}")
        shape, _, dtype = headers[version](content)
        held = member.file_size - content.tell()
    if not dtype.hasobject and (not dtype.itemsize or math.prod(shape) * dtype.itemsize != held):
        raise ValueError(f"{member.filename!r} claims to have shape {shown(shape)}, and holds {held:,} bytes")
    with archive.open(member) as content:
        return np.lib.format.read_array(content, allow_pickle=False)


def faults_of(kind: type[Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is missing, and what has another type than the field of the class."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values.keys() - fields.keys():
        yield f"it has a field {shown(name)} too many"
    for name, field in fields.items():
        if name in values:
            if not fits(values[name], hints[name]):
                yield f"its {name} is a {type(values[name]).__name__}"
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"its {name} is missing"


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON or an array may stand where a field is annotated so.

    Example:
        >>> fits([[0, 1.5]], list[list[float]]), fits({"a": 1}, dict[str, str])
        (True, False)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list)
    if origin is list:
        return isinstance(value, list) and all(fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return any(value == one.value for one in hint)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
