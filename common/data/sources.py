"""Files, folders and hub names -> RawExample, one at a time and in order.

Takes a `SourceConfig`, gives its rows with the place each came from. Reads JSONL strictly: what the
usual loaders let pass (duplicate keys, NaN, lone surrogates, rows that are not objects) is a bad
row, named by file, line and reason. Does not look at what the columns mean; that is `formats.py`.
Memory stays flat for JSONL, CSV, Parquet and Arrow; a `.json` array is read whole, as its form asks.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.config import OnBadRow, SourceConfig
from common.data.types import Place, RawExample
from common.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
COLUMNAR_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*JSONL_SUFFIXES, ".json", ".csv", *COLUMNAR_SUFFIXES)
READ_ROWS = 1024
"""Rows read from a columnar file at once."""


EXAMPLES_KEPT = 5
"""Bad rows of a source that are remembered with place and reason."""


class RowError(ValueError):
    """One row cannot be used; the text says why. `BadRows` decides what happens."""


@dataclass
class BadRows:
    """What to do about bad rows, and what was found so far.

    With `error` the first one ends the program with its place and reason; with `skip` each is
    reported and counted per source, until there are more than `limit` of them.
    """

    on_bad_row: OnBadRow = OnBadRow.error
    limit: int = 100
    report: Callable[[str], None] = print
    count: dict[str, int] = field(default_factory=dict)
    """bad rows by source name"""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """the first few of them, each as place and reason"""

    def add(self, source: str, place: Place, reason: str) -> None:
        """Record one; raises UserError when it is one too many."""
        if self.on_bad_row is OnBadRow.error:
            raise UserError(
                f"{place}: {reason}", hint="correct the row, or skip bad rows with data.on_bad_row=skip"
            )
        self.count[source] = self.count.get(source, 0) + 1
        examples = self.examples.setdefault(source, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(f"{place}: {reason}")
        self.report(f"skipped {place}: {reason}")
        if sum(self.count.values()) > self.limit:
            raise UserError(
                f"{place}: {reason} (more than data.max_bad_rows={self.limit} bad rows)",
                hint="correct the data, or raise data.max_bad_rows",
            )


@dataclass(frozen=True)
class Records:
    """One file's rows before they are checked: `rows()` gives (place, row), `parse` makes it a mapping."""

    rows: Callable[[], Iterator[tuple[Place, Any]]]
    parse: Callable[[Any], Mapping[str, object]]
    columnar: bool = False  # a file of columns, which fills what a row does not have with null


def rows_of(source: SourceConfig, bad_rows: BadRows, *, seed: int = 0) -> Iterator[RawExample]:
    """The rows of a source in order; with `max_rows` a seeded sample. bad_rows: counts skipped ones."""
    name = source_name(source)
    keep = _sampled_rows(source, seed)
    index = -1
    for records in open_source(source):
        for place, row in records.rows():
            index += 1
            if keep is not None and index not in keep:
                continue
            try:
                columns = records.parse(row)
            except RowError as error:
                bad_rows.add(name, place, str(error))
                continue
            yield RawExample(columns, name, place, records.columnar)
    if index < 0:
        raise UserError(f"{source.path}: no rows", hint="name a file with at least one row")


def source_name(source: SourceConfig) -> str:
    """What the source is called in logs: its `name`, else its path's last part without suffix."""
    if source.name:
        return source.name
    last = source.path.rstrip("/").rsplit("/", 1)[-1]
    return last.split(".", 1)[0] or last


def content_hash(source: SourceConfig) -> str:
    """Hash of everything the rows are read from: file bytes, or the hub data set's fingerprint."""
    if not Path(source.path).exists() and is_hub_name(source.path):
        dataset = _load_hub(source)
        return f"hub:{source.path}@{source.revision}:{source.split}:{dataset._fingerprint}"
    total = hashlib.blake2b(digest_size=16)
    root = _existing(source.path)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        total.update(path.name.encode())
        with _opened(path) as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be a hub data set: `name` or `owner/name`, and no such file or folder."""
    if path.endswith(SUFFIXES) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return False
    # `demo/data` with a folder `demo` here is a misspelt folder, not somebody's data set
    return "/" not in path or not Path(path).parent.exists()


def open_source(source: SourceConfig) -> list[Records]:
    """The files of a source, each ready to be read; nothing is read yet except what says what they are."""
    path = Path(source.path)
    if not path.exists() and is_hub_name(source.path):
        return [_saved_records(_load_hub(source), source.path)]
    path = _existing(source.path)
    if path.is_file():
        return [_file_records(path)]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_saved_records(_load_saved(path, source.split), str(path))]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"data.path={path}: no data files in this folder (found {found})",
            hint=f"expected files ending in {', '.join(SUFFIXES)}, or a data set saved with save_to_disk",
        )
    return [_file_records(file) for file in files]


def _sampled_rows(source: SourceConfig, seed: int) -> set[int] | None:
    """Indices of the rows that `max_rows` keeps; None keeps all. Costs a counting pass."""
    if source.max_rows is None:
        return None
    import numpy as np

    count = sum(1 for records in open_source(source) for _ in records.rows())
    if count <= source.max_rows:
        return None
    name = int.from_bytes(hashlib.blake2b(source_name(source).encode(), digest_size=8).digest(), "big")
    chosen = np.random.default_rng([seed, name]).choice(count, source.max_rows, replace=False)
    return set(chosen.tolist())


def _existing(path: str) -> Path:
    found = Path(path)
    if found.exists():
        return found
    folder = found.parent
    near: list[str] = []
    if folder.is_dir():
        near = difflib.get_close_matches(found.name, sorted(entry.name for entry in folder.iterdir()))
        what = f"no such file or folder; nearest names in {folder}: {', '.join(near) or 'none'}"
    else:
        what = f"no such file or folder; the folder {folder} does not exist either"
    hint = f"did you mean {folder / near[0]}?" if near else "correct data.path"
    raise UserError(f"data.path={path}: {what}", hint=hint)


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


def _file_records(path: Path) -> Records:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty", hint="expected at least one row")
    name = path.name
    if name.endswith(JSONL_SUFFIXES):
        return Records(lambda: _jsonl_rows(path), _parse_json_row)
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows}
    for suffix, reader in readers.items():
        if name.endswith(suffix):
            return Records(functools.partial(reader, path), _check_row, suffix in COLUMNAR_SUFFIXES)
    raise UserError(f"{path}: not a known kind of file", hint=f"expected one of {', '.join(SUFFIXES)}")


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
    with _opened(path) as stream:
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
    return _check_row(row)


MAX_DEPTH = 100
"""Of objects and arrays inside each other: what reads and renders rows descends as deep."""


def strict_json(text: str) -> Any:
    """The value of a JSON text. RowError for what JSON does not know (NaN, a key twice), for lone surrogates
    and for values nested too deep, JSONDecodeError."""
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
        )
    except json.JSONDecodeError:
        raise
    except RowError:
        raise
    except (RecursionError, ValueError) as error:
        raise RowError(f"not valid JSON: {error}") from error
    if "\\u" in text:  # only an escape can bring a lone surrogate into text
        _refuse_surrogates(value)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(value)
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"duplicate key {json.dumps(double)}")
    return row


def _refuse_constant(name: str) -> object:
    raise RowError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RowError(f"number {text} is out of range")
    return number


def _refuse_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level if _is_nested(each)]
        level = [each for values in inside for each in values]  # type: ignore[attr-defined]
    if any(map(_is_nested, level)):
        raise RowError(f"values are nested deeper than {MAX_DEPTH}")


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _refuse_surrogates(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise RowError(f"lone surrogate {code} (half of a character, no text)") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner)


@dataclass(frozen=True)
class _Faulty:
    """A row that its reader found wrong, carried to where bad rows are decided on."""

    reason: str


def _check_row(row: object) -> Mapping[str, object]:
    if isinstance(row, _Faulty):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(row), "a number")
        raise RowError(f"expected an object with columns, found {kind}")
    return row


# the other kinds of files


def _json_rows(path: Path) -> Iterator[tuple[Place, object]]:
    """Rows of an array, or of an object's only array such as {"data": [...]}."""
    with _opened(path) as stream:
        raw = stream.read()
    try:
        value = strict_json(raw.decode("utf-8-sig"))
        _refuse_surrogates(value)
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
    with _opened(path) as stream:
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


# data sets saved to disk or on the hub


def _saved_records(dataset: Any, name: str) -> Records:
    def rows() -> Iterator[tuple[Place, object]]:
        for index, row in enumerate(_undecoded(dataset), start=1):
            yield Place(name, index), row

    return Records(rows, _check_row, columnar=True)


def _undecoded(dataset: Any) -> Any:
    """The data set with pictures, sound and the like left as stored: no text is made from them, and to decode
    them takes further libraries. JSON is decoded."""
    import datasets

    def stored(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: stored(inner) for name, inner in feature.items()}
        if isinstance(feature, list):
            return [stored(inner) for inner in feature]
        if (of_list := getattr(feature, "feature", None)) is not None:
            return dataclasses.replace(feature, feature=stored(of_list))
        if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
            return dataclasses.replace(feature, decode=False)
        return feature

    for name, feature in dataset.features.items():
        if stored(feature) != feature:
            dataset = dataset.cast_column(name, stored(feature))
    return dataset


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(
            f"{path}: not a readable saved data set: {error}", hint="correct data.path"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{path}: no split {split}", hint=f"data.sources.split is one of {', '.join(loaded)}")
    return loaded[split]


def _load_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path={source.path}: no such file here, and the hub data set could not be loaded: {reason}",
            hint="check the name, revision and split; without a network, download it first and give data.path"
            " its folder",
        ) from error
