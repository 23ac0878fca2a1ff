"""Read rows from files: JSON, JSON Lines, CSV, Parquet. A file that cannot be read is refused with file and row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mel_lite.errors import DataError, ModelError
from mel_lite.text import first_line, shorten

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]
PROMPT_COLUMNS = ("prompt", "question", "problem")
_MAX_CELL_CHARS = 2**31 - 1
"""Longest CSV cell. Python's own limit of 131,072 characters would refuse the file; large rows are skipped later."""
_WIDE = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks of other encodings than UTF-8, the longer ones first."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
"""First bytes of compressed files."""
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one source, numbered from 1."""

    name: str
    rows: Rows
    unit: str = "row"
    """Unit of the row numbers: `row`, or `line` of a JSON Lines file."""
    repaired: list[str] = field(default_factory=list)
    """Places, among the rows read so far, where half of a character was replaced by U+FFFD."""


def open_file(path: Path) -> Source:
    """Open a file of rows. Its columns and row numbers are those of the file.

    Raises: DataError when the file cannot be read, here or during iteration.
    """
    _check_unpacked(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        with _reading(path):
            return _open_json(path)
    return Source(path.name, _readable(path, _TABLES[path.suffix.lower()](path)))


def read_lines(path: Path) -> Source:
    """Open a JSON Lines file, whatever its name."""
    repaired: list[str] = []
    return Source(path.name, _readable(path, _json_lines(path, repaired)), "line", repaired)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"dataset = {str(path)!r} cannot be read: {first_line(error)}.") from error


def _readable(path: Path, rows: Rows) -> Rows:
    with _reading(path):
        yield from rows


def _check_unpacked(path: Path) -> None:
    """Raises: DataError for a compressed file."""
    with _reading(path), path.open("rb") as file:
        start = file.read(8)
    if packed := next((name for mark, name in _PACKED.items() if start.startswith(mark)), None):
        raise DataError(f"{path.name}: is compressed ({packed}). Unpack it first.")


# ---- JSON and JSON Lines ----


def _open_json(path: Path) -> Source:
    """Open a JSON file by its content: one object per line, or one document with a list of objects.

    Both forms are found under both names: `Dataset.to_json("tasks.json")` writes lines.
    """
    filled = (line for line in _lines(path) if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    value = _parsed(first)
    one_document = isinstance(value, dict) and not second and (_list_inside(value) is not None or _has_columns(value))
    if isinstance(value, dict) and not one_document:
        return read_lines(path)
    repaired: list[str] = []
    try:
        content = _from_json(path, "line", 1, b"\n".join(_lines(path))) if first else []
    except DataError:
        if path.suffix.lower() == ".jsonl":
            return read_lines(path)  # reports its first line
        raise
    if isinstance(content, dict):
        inside = _list_inside(content)
        if inside is None and _has_columns(content):
            raise DataError(
                f"{path.name}: is one object with a list for each column. Write one object for each row instead, such "
                "as pandas' to_json(..., orient='records')."
            )
        content = [content] if inside is None else inside
    if not isinstance(content, list):
        raise DataError(f"{path.name}: holds a {type(content).__name__}; a JSON file must be a list of objects.")
    return Source(path.name, _json_items(path, content, repaired), "row", repaired)


def _list_inside(value: Row) -> list[Any] | None:
    """Return the rows of a document such as `{"version": 1, "data": [...]}`. None when `value` is itself a row."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or any(name in value for name in PROMPT_COLUMNS):
        return None
    return lists[0] if all(isinstance(item, dict) and "role" not in item for item in lists[0]) else None


def _has_columns(value: Row) -> bool:
    """Return True for a document of columns: its prompts are a list of texts or conversations, or an indexed dict."""
    prompts = next((value[name] for name in PROMPT_COLUMNS if name in value), None)
    if isinstance(prompts, dict):
        return "role" not in prompts
    return isinstance(prompts, list) and bool(prompts) and all(isinstance(item, str | list) for item in prompts)


def _json_items(path: Path, content: list[Any], repaired: list[str]) -> Rows:
    for number, value in enumerate(content, 1):
        yield number, _object(path, "row", number, value, repaired)


def _json_lines(path: Path, repaired: list[str]) -> Rows:
    for number, line in enumerate(_lines(path), 1):
        if line.strip(b" \t\xef\xbb\xbf"):
            value = _from_json(path, "line", number, line)
            yield number, _object(path, "line", number, value, repaired if _ESCAPED_SURROGATE.search(line) else None)


def _lines(path: Path) -> Iterator[bytes]:
    r"""Yield the lines in UTF-8 without their ends: \n, \r\n or \r. Only these end a line; U+2028 and NEL do not."""
    with path.open("rb") as file:
        start = file.read(4)
        encoding = next((name for mark, name in _WIDE.items() if start.startswith(mark)), None)
        file.seek(0)
        if encoding is None:
            for line in file:
                yield from line.splitlines()
            return
        try:
            text = file.read().decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name}: is not readable as {encoding.upper()} ({first_line(error)}).") from error
    yield from text.encode().splitlines()


def _parsed(line: bytes) -> Any:
    """Return the JSON value of a line; None when it is not JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _from_json(path: Path, unit: str, number: int, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            number += error.lineno - 1
        elif isinstance(error, UnicodeDecodeError):
            number += content.count(b"\n", 0, error.start)
        shown = (content.splitlines() or [b""])[0][:60] if unit == "line" else content[:60]
        text = shown.decode("utf-8", errors="replace").strip()
        fault = f"is not JSON ({first_line(error)})"
        if isinstance(error, UnicodeDecodeError):
            fault = f"is not UTF-8 (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8"
        elif "integer string conversion" in str(error):
            fault = "has an integer of more than 4,300 digits. Write it as text"
        raise DataError(f"{path.name}, {unit} {number}: {text!r} {fault}.") from error


def _object(path: Path, unit: str, number: int, value: Any, repaired: list[str] | None) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path.name}, {unit} {number}: {str(value)[:60]!r} is not an object with columns.")
    if repaired is None:
        return value
    row = {}
    for name, item in value.items():
        row[_whole(name)] = whole = _whole(item)
        if whole != item:
            repaired.append(f"{unit} {number}, column {_whole(name)!r}")
    return row


def _whole(value: Any) -> Any:
    """Replace every lone surrogate (half of a character, such as a cut emoji) by U+FFFD, at any depth."""
    if isinstance(value, str):
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value


# ---- tables ----


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL_CHARS))
    with path.open("rb") as raw:
        start = raw.read(4)
    encoding = next((name for mark, name in _WIDE.items() if start.startswith(mark)), "utf-8-sig")
    number = 0
    # Bytes that are no UTF-8 become lone surrogates, which show the cell they are in.
    with path.open(
        encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict", newline=""
    ) as f:
        try:
            reader = csv.DictReader(f, strict=True)
            _check_header(path, list(reader.fieldnames or ()))
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise DataError(f"{path.name}, row {number}: has more cells than the header has columns.")
                for name, cell in row.items():
                    if cell and (found := _SURROGATE.search(cell)):
                        raise DataError(
                            f"{path.name}, row {number}, column {name!r}: is not readable as UTF-8 CSV "
                            f"(byte 0x{ord(found[0]) & 0xFF:02x}). Save the file as UTF-8."
                        )
                yield number, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}, row {number + 1}: is not readable as UTF-8 CSV ({error}).") from error


def _check_header(path: Path, columns: list[str]) -> None:
    for separator in (";", "\t", "|"):
        if len(columns) == 1 and separator in columns[0]:
            raise DataError(f"{path.name}: its columns are separated by {separator!r}. Separate them by commas.")
    for name in columns:
        if _SURROGATE.search(name):
            shown = _whole(name)
            raise DataError(f"{path.name}: the header's column {shown!r} is not UTF-8. Save the file as UTF-8.")
        if columns.count(name) > 1:
            raise DataError(f"{path.name}: the header has the column {name!r} twice. Rename one of them.")


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1_000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path.name}, row {number + 1}: is not readable as Parquet ({first_line(error)}).") from error


_TABLES: dict[str, Callable[[Path], Rows]] = {".csv": _read_csv, ".parquet": _read_parquet}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def repair_note(source: Source) -> str:
    """Return the warning about the characters that were replaced."""
    count, first = len(source.repaired), source.repaired[0]
    return f"{source.name}: replaced half of a character by U+FFFD {count} times, first in {first}."


def row_error(source: Source, number: int, column: str, value: Any, fault: str) -> DataError:
    """Return the error for one value: `tasks.jsonl, line 3, column 'prompt': '' is empty.`"""
    return DataError(f"{source.name}, {source.unit} {number}, column {column!r}: {shorten(repr(value))} {fault}.")


@contextmanager
def placed(source: Source, number: int, column: str) -> Iterator[None]:
    """Raise a ModelError of the block again with the row and column whose conversation it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{source.name}, {source.unit} {number}, column {column!r}: {error}") from error


__all__ = [
    "PROMPT_COLUMNS",
    "SUFFIXES",
    "Row",
    "Source",
    "open_file",
    "placed",
    "read_lines",
    "repair_note",
    "row_error",
]
