"""Files of results: archives of arrays and tables, of which nothing can run, each written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.arguments import check_path, reason_of, shown

_Record = TypeVar("_Record")
_ABOUT = "about"
_BINARY = getattr(os, "O_BINARY", 0)  # of Windows
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection"), the wide signs in some languages.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|inf)|nan")


def target_file(path: str | PathLike[str]) -> Path:
    """Where a file is to be written; folders are made, and ``~`` is the user's.

    Raises:
        ValueError: for a folder.
    """
    target = Path(check_path("path", path, "a file to write")).expanduser()
    if target.is_dir():
        raise ValueError(
            f"Expected a file to write, but {target} is a folder; give a name in it, as {target / 'name'}."
        )
    target_folder(target.parent)
    return target


def target_folder(path: str | PathLike[str]) -> Path:
    """Where files are to be written; it is made, and ``~`` is the user's.

    Raises:
        ValueError: for a file.
    """
    folder = Path(check_path("path", path, "a folder")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"Expected a folder to write to, but {error.filename} is a file; give another.") from error
    return folder


def source_file(path: str | PathLike[str]) -> Path:
    """A file to read; ``~`` is the user's.

    Raises:
        ValueError: for a folder, and what else is no file.
        FileNotFoundError: where there is none.
    """
    source = Path(check_path("path", path, "a file to read")).expanduser()
    if source.is_dir():
        raise ValueError(f"Expected a file to read, but {source} is a folder; give the file in it.")
    if source.exists() and not source.is_file():
        # Reading would wait for ever, or never end.
        raise ValueError(f"Expected a file to read, but {source} is a device, pipe or socket; save it as a file first.")
    return source


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is complete: an exception leaves what was there before.

    Raises:
        ValueError: for a folder.
    """
    # Behind a link, the file that it leads to.
    target = Path(os.path.realpath(target_file(path)))
    if target.exists() and not target.is_file():
        # A device or a pipe, whose place no file may take.
        with target.open("wb") as file:
            yield file
        return
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    try:
        # Who may not read what is replaced may not read what replaces it, not even while it is written.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666 if mode is None else 0o600)
        with os.fdopen(descriptor, "wb") as file:
            yield file
        if mode is not None:
            part.chmod(mode)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def save_record(record: Any, version: int, path: str | PathLike[str]) -> None:
    """Writes a dataclass of tensors and primitives as an npz archive, which ``numpy.load`` reads too.

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
    """Reads what :func:`save_record` wrote. No code is unpickled, and nothing but the fields of the class is read.

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
                f"{wanted} it holds a pickle, which may run code, as did the files of earlier versions; make it again."
            ) from None
        except Exception as error:  # broken in one of many ways
            raise ValueError(f"{wanted} it cannot be read ({reason_of(error)}); {advice}.") from error
    if about.get("format") != _format(kind):
        raise ValueError(f"{wanted} it holds {shown(about.get('format'))}; {advice}.")
    if about.get("version") != version:
        raise ValueError(
            f"{wanted} it has format version {shown(about.get('version'))} where this version of lightning_unlearn has"
            f" {version}; make it again."
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
    """The description and the tensors of an archive that holds no other."""
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
            raise ValueError("a part of it says to be larger than it is")
        arrays = {name: _array(archive, member) for name, member in zip(found, members, strict=True)}
    about = json.loads(str(arrays.pop(_ABOUT)))
    if not isinstance(about, dict) or not isinstance(about.get("values"), dict):
        raise ValueError("its description is another")
    return about, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """An array of as many numbers as its part of the archive holds: memory is taken by what its header says."""
    with archive.open(member) as content:
        version = np.lib.format.read_magic(content)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in headers:
            raise ValueError(f"{member.filename!r} has format version {version}")
        shape, _, dtype = headers[version](content)
        held = member.file_size - content.tell()
    if not dtype.hasobject and (not dtype.itemsize or math.prod(shape) * dtype.itemsize != held):
        raise ValueError(f"{member.filename!r} says to have shape {shown(shape)}, and holds {held:,} bytes")
    with archive.open(member) as content:
        return np.lib.format.read_array(content, allow_pickle=False)


def faults_of(kind: type[Any], values: Mapping[str, Any]) -> Iterator[str]:
    """What is missing, and what has another type than the field of the class."""
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
    """Whether a value read from JSON or an array may stand where a field is annotated so.

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
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def write_csv(path: str | PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a table in which a spreadsheet finds nothing to run.

    A text that a spreadsheet would take for a formula gets a single quote in front; numbers stay what they are.

    Args:
        path: file to write; folders are made.
        columns: the cells below each title, as many in each.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "table.csv"
        >>> write_csv(file, {"class": ["cat", "=1+1"], "score": [-0.5, 1]})
        >>> file.read_text().splitlines()
        ['class,score', 'cat,-0.5', "'=1+1,1"]
    """
    rows = [[_cell(value) for value in row] for row in (columns, *zip(*columns.values(), strict=True))]
    # Where another separator is the custom, a cell that holds it would fall into two.
    splits = any(isinstance(value, str) and (";" in value or "\t" in value) for row in rows for value in row)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text, quoting=csv.QUOTE_ALL if splits else csv.QUOTE_MINIMAL).writerows(rows)
        text.flush()
        text.detach()


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes primitives as JSON, whole or not at all.

    Args:
        path: file to write; folders are made.
        content: without NaN and infinity, which JSON does not know.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value
