"""Files of results: archives of arrays and tables, of which nothing can run, each written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

_Record = TypeVar("_Record")
_ABOUT = "about"
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection"), the wide signs in some languages.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|inf)|nan")


def target_file(path: str | PathLike[str]) -> Path:
    """Where a file is to be written; folders are made, and ``~`` is the user's.

    Raises:
        ValueError: for a folder.
    """
    target = Path(path).expanduser()
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
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"Expected a folder to write to, but {error.filename} is a file; give another.") from error
    return folder


def source_file(path: str | PathLike[str]) -> Path:
    """A file to read; ``~`` is the user's.

    Raises:
        ValueError: for a folder.
        FileNotFoundError: where there is none.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        raise ValueError(f"Expected a file to read, but {source} is a folder; give the file in it.")
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
    try:
        with part.open("xb") as file:
            yield file
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
            raise ValueError(f"{wanted} it cannot be read ({error}); {advice}.") from error
    if about.get("format") != _format(kind):
        raise ValueError(f"{wanted} it holds {about.get('format')!r}; {advice}.")
    if about.get("version") != version:
        raise ValueError(
            f"{wanted} it has format version {about.get('version')} where this version of lightning_unlearn has"
            f" {version}; make it again."
        )
    values = {**about["values"], **tensors}
    if faults := list(_faults(kind, values)):
        raise ValueError(f"{wanted} {'; '.join(faults[:5])}; {advice}.")
    try:
        return kind(**{name: _tuples(value) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{wanted} {error}") from error


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
        arrays = {}
        for name, member in zip(found, members, strict=True):
            with archive.open(member) as content:
                arrays[name] = np.lib.format.read_array(content, allow_pickle=False)
    about = json.loads(str(arrays.pop(_ABOUT)))
    if not isinstance(about, dict) or not isinstance(about.get("values"), dict):
        raise ValueError("its description is another")
    return about, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _faults(kind: type[Any], values: Mapping[str, Any]) -> Iterator[str]:
    """What is missing, and what has another type than the field of the class."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values.keys() - fields.keys():
        yield f"it has a field {name!r} too many"
    for name, field in fields.items():
        if name in values:
            if not _fits(values[name], hints[name]):
                yield f"its {name} is a {type(values[name]).__name__}"
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"its {name} is missing"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON or an array may stand where a field is annotated so."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is tuple:
        return isinstance(value, list)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (Tensor, str, bool, NoneType):
        return isinstance(value, hint)
    return True


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
