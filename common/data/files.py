"""One file -> its rows, in order, each with its place: JSONL, JSON, CSV, Parquet, Arrow.

JSONL is read strictly: a line that is not one object is a bad row, named by line and reason. Memory stays
flat, but for a `.json` array, which is read whole, as its form asks. `sources.py` says which files a source
has.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.data.outcomes import RowError
from common.data.strict_json import strict_json
from common.data.types import Place
from common.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
COLUMNAR_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*JSONL_SUFFIXES, ".json", ".csv", *COLUMNAR_SUFFIXES)
READ_ROWS = 1024
"""Rows read from a columnar file at once."""


@dataclass(frozen=True)
class Records:
    """One file's rows before they are checked: `rows()` gives (place, row), `parse` makes it a mapping."""

    rows: Callable[[], Iterator[tuple[Place, Any]]]
    parse: Callable[[Any], Mapping[str, object]]
    columnar: bool = False  # a file of columns, which fills what a row does not have with null


def file_records(path: Path) -> Records:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty", hint="expected at least one row")
    name = path.name
    if name.endswith(JSONL_SUFFIXES):
        return Records(lambda: _jsonl_rows(path), _parse_json_row)
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows}
    for suffix, reader in readers.items():
        if name.endswith(suffix):
            return Records(functools.partial(reader, path), check_row, suffix in COLUMNAR_SUFFIXES)
    raise UserError(f"{path}: not a known kind of file", hint=f"expected one of {', '.join(SUFFIXES)}")


def opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


# JSONL


def _jsonl_rows(path: Path) -> Iterator[tuple[Place, bytes]]:
    """Lines that are not blank, numbered from 1 as an editor does."""
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Place(str(path), number), line
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read after line {number}: {error}", hint="the file is damaged or cut off"
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    with opened(path) as stream:
        if path.name.endswith(".gz"):
            with gzip.open(stream) as unpacked:
                yield from unpacked
        elif path.name.endswith(".zst"):
            yield from io.BufferedReader(_ZstdStream(stream), 1 << 16)
        else:
            yield from stream


class _ZstdStream(io.RawIOBase):
    """Unpacks a zstd file, one frame after another; unlike the library's own reader a cut-off
    file is an error here and not a short one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._unpacker: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._stream.read(1 << 16)
            if not packed:
                if self._unpacker is not None:
                    raise EOFError("compressed file ended before its end marker")
                return 0
            self._ready = self._unpack(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        import zstandard

        parts = []
        while packed:
            if self._unpacker is None:
                self._unpacker = zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(self._unpacker.decompress(packed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            packed = b""
            if self._unpacker.eof:
                packed, self._unpacker = self._unpacker.unused_data, None
        return b"".join(parts)


def _parse_json_row(line: bytes) -> Mapping[str, object]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {error.start + 1} of the line") from error
    try:
        row = strict_json(text)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip())
        what = "truncated JSON" if at_end or "Unterminated" in error.msg else "not valid JSON"
        raise RowError(f"{what}: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    return check_row(row)


@dataclass(frozen=True)
class _Faulty:
    """A row that its reader found wrong, carried to where bad rows are decided on."""

    reason: str


def check_row(row: object) -> Mapping[str, object]:
    if isinstance(row, _Faulty):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(row), "a number")
        raise RowError(f"expected an object with columns, found {kind}")
    return row


# the other kinds of files


def _json_rows(path: Path) -> Iterator[tuple[Place, object]]:
    """Rows of an array, or of an object's only array such as {"data": [...]}."""
    with opened(path) as stream:
        raw = stream.read()
    try:
        value = strict_json(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            hint="if it has one object per line, name it .jsonl",
        ) from error
    except (RowError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", hint="correct the file") from error
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise UserError(
            f"{path}: expected an array of rows", hint='either [...], or {"data": [...]} with one array'
        )
    for index, row in enumerate(value, start=1):
        yield Place(str(path), index), row


def _csv_rows(path: Path) -> Iterator[tuple[Place, object]]:
    csv.field_size_limit(sys.maxsize)  # the library's 128 KiB is shorter than many documents
    number = 1
    with opened(path) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(
                    f"{path}:1: a column name appears twice", hint=f"columns: {', '.join(header)}"
                )
            number = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield Place(str(path), number), _csv_row(header, cells)
                number = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number}: not valid CSV: {error}", hint="correct the file") from error


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return _Faulty(f"{len(cells)} cells in a table of {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[Place, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(READ_ROWS)
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}", hint="correct data.path") from error


def _arrow_rows(path: Path) -> Iterator[tuple[Place, object]]:
    import pyarrow

    try:
        mapped = pyarrow.memory_map(str(path))
        try:
            opened = pyarrow.ipc.open_file(mapped)
            batches: Any = (opened.get_batch(index) for index in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            batches = pyarrow.ipc.open_stream(mapped)
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Arrow file: {error}", hint="correct data.path") from error


def _numbered(path: Path, rows: Iterator[object]) -> Iterator[tuple[Place, object]]:
    for index, row in enumerate(rows, start=1):
        yield Place(str(path), index), row
