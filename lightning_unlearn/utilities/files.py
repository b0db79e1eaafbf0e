"""Files, each written whole or not at all; tables in which a spreadsheet runs nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from lightning_unlearn.utilities.checks import check_path

_BINARY = getattr(os, "O_BINARY", 0)  # of Windows
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection"), the wide signs in some languages.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"-?(\d+(\.\d*)?(e[+-]?\d+)?|inf)|nan")


def target_file(path: str | PathLike[str]) -> Path:
    """Return where a file is to be written; folders are made, and ``~`` is the user's.

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
    """Return where files are to be written; it is made, and ``~`` is the user's.

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
    """Return a file to read; ``~`` is the user's.

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
    """Open a file that takes its name when it is complete: an exception leaves what was there before.

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


def write_csv(path: str | PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table in which a spreadsheet finds nothing to run.

    A text that a spreadsheet would take for a formula gets a single quote in front; numbers stay what they are. It is
    UTF-8 with a mark in front, by which Excel knows it: read it as ``"utf-8-sig"``, which takes the mark off.

    Args:
        path: file to write; folders are made.
        columns: the cells below each title, as many in each.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "table.csv"
        >>> write_csv(file, {"class": ["cat", "=1+1"], "score": [-0.5, 1]})
        >>> file.read_text(encoding="utf-8-sig").splitlines()
        ['class,score', 'cat,-0.5', "'=1+1,1"]
    """
    rows = [[spreadsheet_cell(value) for value in row] for row in (columns, *zip(*columns.values(), strict=True))]
    # Where another separator is the custom, a cell that holds it would fall into two.
    splits = any(isinstance(value, str) and (";" in value or "\t" in value) for row in rows for value in row)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        csv.writer(text, quoting=csv.QUOTE_ALL if splits else csv.QUOTE_MINIMAL).writerows(rows)
        text.flush()
        text.detach()


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Write primitives as JSON, whole or not at all.

    Args:
        path: file to write; folders are made.
        content: without NaN and infinity, which JSON does not know.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def spreadsheet_cell(value: Any) -> Any:
    """Return a value of a table, in which a spreadsheet finds nothing to run.

    Example:
        >>> spreadsheet_cell("=1+1"), spreadsheet_cell("-1"), spreadsheet_cell(-1)
        ("'=1+1", '-1', -1)
    """
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value
