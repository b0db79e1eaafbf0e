"""Tables of decisions as spreadsheets, or Label Studio, leave them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lightning_unlearn.data.fingerprint import is_short_fingerprint
from lightning_unlearn.results.label_studio import read_label_studio
from lightning_unlearn.results.labels import DECISIONS, RELABEL
from lightning_unlearn.utilities.checks import reason_of
from lightning_unlearn.utilities.files import source_file

_SEPARATORS = ",;\t|"
# What Excel's own first line may name besides.
_NAMED_SEPARATORS = (*_SEPARATORS, ":", "^", "~", "#")
# One of the first two, and the last.
_NEEDED = ({"index", "decision"}, {"key", "decision"})
# A number that pandas has read beside an empty cell is written with a decimal place, before which some languages set a
# comma: then values are separated by something else. Not "1,000", which may be a thousand.
_WHOLE = re.compile(r"(\d{1,18})(?:[.]0)?")
_DECIMAL_COMMA = re.compile(r"^(\d{1,18}),0$")
UNKNOWN = -2


@dataclass(frozen=True)
class Row:
    """One decision, as it stands in the file.

    Args:
        line: of the file, counted from 1; in an export of Label Studio the task.
        index: of the sample; -1 where it is known by its key alone.
        decision: position in ``DECISIONS``.
        new: the classes to train with where it is re-labeled, else empty.
        given: the classes that the file says it was given; None if it does not say.
        key: of the sample; empty where it is known by its index.
    """

    line: int
    index: int
    decision: int
    new: tuple[int, ...]
    given: tuple[int, ...] | None
    key: str = ""


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Args:
        path: of the file.
        mark: of the data set that it is of (see :func:`~lightning_unlearn.data.fingerprint.short_fingerprint`); empty
            if not known.
        rows: those with a decision.
        place: what they are counted by: ``"line"``, or ``"task"``.
    """

    path: str
    mark: str
    rows: tuple[Row, ...]
    place: str = "line"


def read_review(path: str | PathLike[str]) -> Table:
    """Read the decisions of a file, and refuse what can be seen to be wrong without the data.

    Args:
        path: a file of separated values (comma, semicolon, tab or bar), UTF-8 with or without a mark, UTF-16, or of
            another encoding that has ASCII in it; or an export of Label Studio as JSON.

    Raises:
        ValueError: with the line, saying what is expected there.
        FileNotFoundError: where there is no such file.
    """
    source = source_file(path)
    try:
        raw = source.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Expected review to be a file of decisions, as written by Partition.to_csv, but {source} does not"
            " exist. Give its path, or leave review out (checkpoints keep their decisions)."
        ) from None
    if raw.startswith(b"PK"):
        raise ValueError(f"Expected {source} to be a CSV file, but it is a workbook; save it as CSV.")
    try:
        text = _decoded(raw)
        if text.lstrip()[:1] in ("[", "{"):
            return _table(source, list(read_label_studio(source, text)), "task")
        return _table(source, list(_cells(source, text)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected {source} to be a table of decisions, as written by Partition.to_csv, but it cannot be"
            f" read ({reason_of(error)}); save it as CSV again."
        ) from error


def check_undecided(path: str | PathLike[str], remedy: str = "write to another place, or rename it") -> None:
    """Refuse to write over a table in which a person has decided something.

    Args:
        path: of the table that is to be written.
        remedy: what to do.

    Raises:
        ValueError: with the name of the file.
    """
    target = Path(path).expanduser()
    try:
        raw = target.read_bytes()
    except OSError:
        return  # there is none
    if not raw.strip():
        return
    try:
        cells = list(_cells(target, _decoded(raw)))
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"Expected to write a new table, but {target} exists and cannot be read as one ({reason_of(error)}); it may"
            f" contain decisions: {remedy}."
        ) from error
    if decided := sum(bool(row.get("decision", "").strip()) for _, row in cells):
        raise ValueError(
            f"Expected to write a new table, but {target} contains {decided:,}"
            f" decision{'s' if decided > 1 else ''}, which would be lost; {remedy}."
        )


def _table(source: Path, found: list[tuple[int, Mapping[str, str]]], place: str = "line") -> Table:
    """Return the rows in which something is decided."""
    rows, marks = [], {}
    lines: dict[int | str, int] = {}
    names = _names(found)
    for line, cells in found:
        # Also of a row in which nothing is decided.
        marks[cells.get("dataset", "")] = line
        row = _row(f"{source}, {place} {line}", line, cells)
        if row is None:
            continue
        title, known = ("key", row.key) if row.key else ("index", row.index)
        if first := lines.get(known):
            raise ValueError(
                f"{source}, line {line}: expected each {title} once, but {known} is in line {first} too; delete one."
            )
        lines[known] = line
        _check_names(source, row, cells, names)
        rows.append(row)
    return Table(str(source), _one_mark(f"{source}, {place}", place, marks), tuple(rows), place)


def _names(found: list[tuple[int, Mapping[str, str]]]) -> dict[int, tuple[str, int]]:
    """Return the name of each class and a line that has it, of the rows that were not edited before the others."""
    names: dict[int, tuple[str, int]] = {}
    untouched = [pair for pair in found if not pair[1].get("decision", "")]
    for title, rows in (("given", untouched), ("suggested", untouched), ("given", found)):
        for line, cells in rows:
            classes, name = _classes(cells.get(f"{title}_label", "")), cells.get(f"{title}_class", "")
            if name and classes is not None and len(classes) == 1:
                names.setdefault(classes[0], (name, line))
    return names


def _decoded(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # What is read of it is ASCII, but for the names of classes, which are only compared with each other.
        return raw.decode("latin-1")


def _cells(source: Path, text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the rows with anything in them, by title in small letters, and where they end."""
    skipped, separators = 0, _SEPARATORS
    if text[:4].lower() == "sep=":
        # What Excel writes for itself.
        skipped, separators = 1, text[4:5] if text[4:5] in _NAMED_SEPARATORS else _SEPARATORS
    for separator in separators:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        for _ in range(skipped):
            next(reader, None)
        titles = [title.strip().lower() for title in next(reader, [])]
        if any(set(titles) >= needed for needed in _NEEDED):
            break
    else:
        found = (text.splitlines()[skipped : skipped + 1] or [""])[0][:80]
        raise ValueError(
            f"{source}, line {skipped + 1}: expected titles with 'index' and 'decision' (or 'key' and 'decision') among"
            f" them, as Partition.to_csv writes them, but found {found!r}."
        )
    if twice := [title for title in titles if title and titles.count(title) > 1]:
        raise ValueError(f"{source}, line {skipped + 1}: expected each title once, but {twice[0]!r} is there twice.")
    for row in reader:
        cells = dict(
            zip(titles, _values(row, len(titles), separator, f"{source}, line {reader.line_num}"), strict=False)
        )
        if any(cells.values()):
            yield reader.line_num, cells


def _values(row: list[str], titles: int, separator: str, where: str) -> list[str]:
    """Return the cells of a row, and refuse those without a title."""
    values = [cell.strip() for cell in row]
    if more := [value for value in values[titles:] if value]:
        raise ValueError(
            f"{where}: expected {titles} cells, one for each title, but {more[0]!r} comes after the last one; move it"
            " to its column, or quote the cell that contains a separator."
        )
    return values if separator == "," else [_DECIMAL_COMMA.sub(r"\1.0", value) for value in values]


def _row(where: str, line: int, cells: Mapping[str, str]) -> Row | None:
    """Return a row, or None where nothing is decided in it."""
    word = cells.get("decision", "").lower()
    if not word:
        return None
    if word not in DECISIONS:
        raise ValueError(f"{where}: expected decision to be keep, drop or relabel, but it is {word!r}.")
    key, index = _who(where, cells)
    decision, given = DECISIONS.index(word), None
    if "given_label" in cells:
        given = _classes(cells["given_label"])
    if decision != RELABEL:
        return Row(line, index, decision, (), given, key)
    new = _classes(cells["suggested_label"]) if "suggested_label" in cells else None
    if new is None:
        found = cells.get("suggested_label", "no such column")
        raise ValueError(
            f"{where}: expected suggested_label to be the class to train with (a number; in a multi-label task, numbers"
            f" separated by spaces), but it is {found!r}."
        )
    if new == given:
        raise ValueError(
            f"{where}: expected another suggested_label than the given one, {cells['given_label']!r}, for a sample that"
            " is re-labeled; write keep, or give another."
        )
    return Row(line, index, decision, new, given, key)


def _who(where: str, cells: Mapping[str, str]) -> tuple[str, int]:
    """Return the key of the sample, and its index; -1 where the file has keys alone."""
    key, index = cells.get("key", ""), _whole(cells.get("index", ""))
    if index is None and "index" not in cells:
        if not key:
            raise ValueError(f"{where}: expected a key of a sample, but its cell is empty.")
        return key, -1
    if index is None:
        raise ValueError(f"{where}: expected index to be the number of a sample, but it is {cells['index']!r}.")
    return key, index


def _whole(text: str) -> int | None:
    found = _WHOLE.fullmatch(text)
    return int(found[1]) if found else None


def _classes(text: str) -> tuple[int, ...] | None:
    """Return the classes that a cell names; None where it names something else."""
    found = [-1 if part == "-1" else _whole(part) for part in text.split()]
    return None if None in found else tuple(sorted({one for one in found if one is not None}))


def _check_names(source: Path, row: Row, cells: Mapping[str, str], names: dict[int, tuple[str, int]]) -> None:
    """Notice where only one of a class's number and name has been edited."""
    for title, classes in (("given", row.given), ("suggested", row.new)):
        name = cells.get(f"{title}_class", "")
        if not name or classes is None or len(classes) != 1:
            continue
        known, line = names.setdefault(classes[0], (name, row.line))
        if known != name:
            raise ValueError(
                f"{source}, line {row.line}: expected {title}_class to be {known!r}, the name of class"
                f" {classes[0]} in line {line}, but it is {name!r}. Only {title}_label counts: correct it, and"
                " make the name agree or empty its cell."
            )


def _one_mark(where: str, place: str, marks: Mapping[str, int]) -> str:
    """Return the mark in the column ``dataset``, which rows that were added by hand may lack."""
    for mark, line in marks.items():
        if not is_short_fingerprint(mark):
            raise ValueError(
                f"{where} {line}: expected dataset as written by Partition.to_csv, but it is {mark!r}; empty the"
                " cell if the value is lost."
            )
    known = [mark for mark in marks if mark]
    if len(known) > 1:
        raise ValueError(
            f"{where} {marks[known[1]]}: expected all rows to belong to one dataset, but dataset is"
            f" {known[1]!r} here and {known[0]!r} in other {place}s; use the rows of one file."
        )
    return known[0] if known else ""
