"""One file -> its rows, in order, each with its place: JSONL, JSON, CSV, Parquet, Arrow.

JSONL is read strictly: a line that is not one object is a bad row, named by line and reason. Memory stays
flat: a row has a longest length, whatever it is packed or written in. `sources.py` says which files a source
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from common.data.json_document import elements_of
from common.data.outcomes import LONGEST_ROW, TOO_LONG, RowError
from common.data.strict_json import strict_json
from common.data.types import Place
from common.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
COLUMNAR_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*JSONL_SUFFIXES, ".json", ".csv", *COLUMNAR_SUFFIXES)
READ_ROWS = 64
"""Rows read from a columnar file at once, at the most."""
MOST_UNPACKED = 200
"""How many times larger than packed a group of rows of a Parquet file may be, if it is larger than the
longest row."""
PACKED_BYTES = 2**9
"""Bytes of a zstd file unpacked at once: they may come to 16 MiB, since a block of 4 holds up to 128 KiB."""


@dataclass(frozen=True)
class Records:
    """One file's rows before they are checked: `rows()` gives (place, row), `parse` makes it a mapping."""

    rows: Callable[[], Iterator[tuple[Place, Any]]]
    parse: Callable[[Any], Mapping[str, object]]
    columnar: bool = False  # a file of columns, which fills what a row does not have with null
    size: int = 0  # bytes of all rows, of a file of which a row is its bytes; 0: not known


def file_records(path: Path) -> Records:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty", hint="expected at least one row")
    name = path.name
    if name.endswith(JSONL_SUFFIXES):
        return line_records(str(path), functools.partial(opened, path), path.stat().st_size)
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


def line_records(name: str, open_it: Callable[[], BinaryIO], size: int) -> Records:
    """The lines of a file, which is read as its bytes come. name: with its suffix, by which it is unpacked;
    stands in the places. size: its bytes."""
    return Records(
        lambda: _jsonl_rows(name, open_it), _parse_json_row, size=size if name.endswith(".jsonl") else 0
    )


def _jsonl_rows(name: str, open_it: Callable[[], BinaryIO]) -> Iterator[tuple[Place, object]]:
    """Lines that are not blank, numbered from 1 as an editor does."""
    number = 0
    try:
        for number, line in enumerate(_lines(name, open_it), start=1):
            if number == 1 and isinstance(line, bytes):
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not (isinstance(line, bytes) and line.isspace()):
                yield Place(name, number), line
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{name}: cannot be read after line {number}: {error}", hint="the file is damaged or cut off"
        ) from error


def _lines(name: str, open_it: Callable[[], BinaryIO]) -> Iterator[object]:
    """The lines as bytes. A line that is too long is reported first; the rest of it is then read and
    dropped."""
    with open_it() as stream, _unpacked(name, stream) as text:
        while line := text.readline(LONGEST_ROW):
            yield line if len(line) < LONGEST_ROW else Faulty(f"the line is {TOO_LONG}")
            while len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                line = text.readline(LONGEST_ROW)


def _unpacked(name: str, stream: BinaryIO) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(stream))
    return (
        cast(BinaryIO, io.BufferedReader(_ZstdStream(stream), 1 << 16)) if name.endswith(".zst") else stream
    )


class _ZstdStream(io.RawIOBase):
    """Unpacks a zstd file, one frame after another; unlike the library's own reader a cut-off
    file is an error here and not a short one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._unpacker: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._stream.read(PACKED_BYTES)
            if not packed:
                if self._unpacker is not None:
                    raise EOFError("compressed file ended before its end marker")
                return 0
            self._ready = memoryview(self._unpack(packed))
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


def _parse_json_row(line: object) -> Mapping[str, object]:
    if not isinstance(line, bytes):
        return check_row(line)
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
class Faulty:
    """A bad row, carried from its reader to the code that decides about bad rows."""

    reason: str


def check_row(row: object) -> Mapping[str, object]:
    if isinstance(row, Faulty):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(row), "a number")
        raise RowError(f"expected an object with columns, found {kind}")
    return row


# the other kinds of files


def _json_rows(path: Path) -> Iterator[tuple[Place, object]]:
    with opened(path) as stream:
        yield from _numbered(path, elements_of(path, stream))


def _csv_rows(path: Path) -> Iterator[tuple[Place, object]]:
    csv.field_size_limit(sys.maxsize)  # the library's 128 KiB is shorter than many documents
    number, length = 1, 0

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal length
        while line := text.readline(LONGEST_ROW + 1 - length):
            length += len(line)
            if length > LONGEST_ROW:
                raise csv.Error(f"the row is {TOO_LONG}: is a quote not closed?")
            yield line

    with opened(path) as stream:
        reader = csv.reader(lines(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(
                    f"{path}:1: a column name appears twice", hint=f"columns: {', '.join(header)}"
                )
            number, length = reader.line_num + 1, 0
            for cells in reader:
                if cells:
                    yield Place(str(path), number), _csv_row(header, cells)
                number, length = reader.line_num + 1, 0
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number}: not valid CSV: {error}", hint="correct the file") from error


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return Faulty(f"{len(cells)} cells in a table of {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[Place, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _numbered(path, _rows_of_batches(_parquet_batches(path, file)))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}", hint="correct data.path") from error


def _parquet_batches(path: Path, file: Any) -> Iterator[Any]:
    """Batches of a file, of as many rows as come to the longest on average. UserError for a group of rows
    that unpacks to much more than text does."""
    packed = path.stat().st_size  # not by column: of a damaged one the library ends the process when asked
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        size, average = group.total_byte_size, group.total_byte_size / max(1, group.num_rows)
        if average > LONGEST_ROW or size > max(LONGEST_ROW, MOST_UNPACKED * packed):
            raise UserError(
                f"{path}: group {number + 1} of its rows comes to {size} bytes, of a file of {packed}",
                hint=f"expected: at most {LONGEST_ROW // 2**20} MiB for a row, packed {MOST_UNPACKED} to 1",
            )
        rows = min(READ_ROWS, int(LONGEST_ROW / max(1, average)))
        yield from file.iter_batches(rows, row_groups=[number])


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
        yield from _numbered(path, _rows_of_batches(batches))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Arrow file: {error}", hint="correct data.path") from error


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[object]:
    for batch in batches:
        yield from in_blocks(batch.num_rows, functools.partial(_rows_of_batch, batch))


def _rows_of_batch(batch: Any, start: int, count: int) -> list[object]:
    return list(checked_columns(batch.slice(start, count)).to_pylist())


def checked_columns(rows: Any) -> Any:
    """Rows of an Arrow table. ArrowInvalid for invalid UTF-8 and for what points out of its file. RowError
    for rows that are too long together."""
    import pyarrow

    rows.validate()  # cheap; sizes are computed from offsets, which are trusted there
    # the words of a dictionary column are those of all rows
    columns = [column for column in rows.columns if not pyarrow.types.is_dictionary(column.type)]
    if sum(column.nbytes for column in columns) > LONGEST_ROW:
        raise RowError(f"the row is {TOO_LONG}")
    rows.validate(full=True)
    return rows


def in_blocks(count: int, read: Callable[[int, int], Sequence[object]]) -> Iterator[object]:
    """The first `count` rows by `read(first, count)`, in blocks; a block with a faulty row one by one."""
    for start in range(0, count, READ_ROWS):
        yield from _block(start, min(READ_ROWS, count - start), read)


def _block(start: int, count: int, read: Callable[[int, int], Sequence[object]]) -> Iterator[object]:
    import pyarrow

    try:
        rows = read(start, count)
    except (pyarrow.ArrowException, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        if count > 1:
            for index in range(start, start + count):
                yield from _block(index, 1, read)
        else:
            said = " ".join(str(error).split())
            yield Faulty(said if isinstance(error, RowError) else f"not readable: {said}")
    else:
        yield from rows


def _numbered(path: Path, rows: Iterator[object]) -> Iterator[tuple[Place, object]]:
    for index, row in enumerate(rows, start=1):
        yield Place(str(path), index), row
