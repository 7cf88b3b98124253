"""Files, folders and hub names -> RawExample, one at a time and in order.

Takes a `SourceConfig`, gives its rows with the place each came from. Finds what a source consists of and
samples it; `files.py` reads a file, `saved.py` a saved data set. Does not look at what the columns mean; that
is `formats.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.config import SourceConfig
from common.data.files import (
    COLUMNAR_SUFFIXES,
    JSONL_SUFFIXES,
    SUFFIXES,
    Records,
    check_row,
    file_records,
    line_records,
    opened,
)
from common.data.outcomes import RowError
from common.data.saved import load_hub, load_saved, saved_records, streamed_records
from common.data.types import Place, RawExample
from common.errors import UserError
from common.hub_data import commit_of, is_name
from common.listing import Listed, is_listing, listed
from common.paths import check_pattern, files_of, is_glob, name_of
from common.text import nearest

BLOCK_ROWS, BLOCK_BYTES = 1024, 2**23
"""Of a `Block`."""


def rows_of(
    source: SourceConfig, bad_row: Callable[[Place, str], None], *, seed: int = 0
) -> Iterator[RawExample]:
    """The rows of a source in order; with `max_rows` a seeded sample. bad_row: is told place and reason."""
    name = source_name(source)
    for records, place, row, _ in _unparsed(source, seed):
        example = _parsed(records.parse, RawExample({}, name, place, records.columnar), row, bad_row)
        if example is not None:
            yield example


@dataclass(frozen=True)
class Block:
    """Rows of one file, in order, not parsed yet.

    name: of the source. numbers: of the rows in the file. rows: as `parse` takes them. done: share of the
    source that comes before them; None where its length is not known.
    """

    name: str
    file: str
    parse: Callable[[Any], Mapping[str, object]]
    columnar: bool
    numbers: list[int]
    rows: list[Any]
    done: float | None

    def examples(self, bad_row: Callable[[Place, str], None]) -> Iterator[RawExample]:
        """The rows. bad_row: is told place and reason."""
        for number, row in zip(self.numbers, self.rows, strict=True):
            bare = RawExample({}, self.name, Place(self.file, number), self.columnar)
            if (example := _parsed(self.parse, bare, row, bad_row)) is not None:
                yield example


def blocks_of(source: SourceConfig, *, seed: int = 0) -> Iterator[Block]:
    """What `rows_of` reads, in blocks of at most `BLOCK_ROWS` rows and, of lines, about `BLOCK_BYTES`."""
    name, size = source_name(source), 0
    block: Block | None = None
    for records, place, row, share in _unparsed(source, seed):
        if block is not None and block.file != place.file:
            yield block
            block = None
        if block is None:
            block, size = Block(name, place.file, records.parse, records.columnar, [], [], share), 0
        block.numbers.append(place.row)
        block.rows.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if len(block.rows) == BLOCK_ROWS or size > BLOCK_BYTES:
            yield block  # at once: the next row may be long in coming
            block = None
    if block is not None:
        yield block


def _parsed(
    parse: Callable[[Any], Mapping[str, object]],
    bare: RawExample,
    row: Any,
    bad_row: Callable[[Place, str], None],
) -> RawExample | None:
    try:
        return replace(bare, columns=parse(row))
    except RowError as error:
        bad_row(bare.place, str(error))
        return None


def _unparsed(source: SourceConfig, seed: int) -> Iterator[tuple[Records, Place, Any, float | None]]:
    """Rows with what reads them, and the share of the source that comes before them, if that is known."""
    index, read = -1, 0
    try:
        keep = _sampled_rows(source, seed)
        every = open_source(source)
        total = sum(records.size for records in every) if all(records.size for records in every) else 0
        for records in every:
            for place, row in records.rows():
                index += 1
                if keep is None or index in keep:
                    yield records, place, row, read / total if total else None
                read += len(row) if isinstance(row, bytes) else 0
                if isinstance(source, StreamedSource) and index + 1 == source.max_rows:
                    return
    except OSError as error:  # of a disk or a server; it must not be taken for one of what is being written
        raise UserError(f"data.path={source.path} cannot be read: {error}") from error
    if index < 0:
        raise UserError(f"{source.path}: no rows", hint="name a file with at least one row")


def source_name(source: SourceConfig) -> str:
    """What the source is called in logs: its `name`, else its path's last part without suffix."""
    return source.name or name_of(source.path)


@dataclass
class StreamedSource(SourceConfig):
    """A hub data set, or a listing of files elsewhere: fetched while it is read. With `max_rows` its first
    rows."""


def streamed(source: SourceConfig) -> SourceConfig:
    """The source, to be fetched while it is read if it is on the hub or elsewhere."""
    is_here = not _is_on_hub(source) and not is_listing(Path(source.path))
    return source if is_here else StreamedSource(**vars(source))


def _is_on_hub(source: SourceConfig) -> bool:
    return not Path(source.path).exists() and is_hub_name(source.path)


def content_hash(source: SourceConfig) -> str:
    """Hash of everything the rows are read from: file bytes, or the hub data set's fingerprint; of one
    that is streamed the commit."""
    if isinstance(source, StreamedSource) and not is_listing(Path(source.path)):
        commit = commit_of(source.path, source.revision)
        return f"hub:{source.path}@{commit}:{source.split}:streamed by {version('datasets')}"
    if _is_on_hub(source):
        dataset = load_hub(source)
        return f"hub:{source.path}@{source.revision}:{source.split}:{dataset._fingerprint}"
    total = hashlib.blake2b(digest_size=16)
    _check_is_there(source.path)
    for path in files_of(source.path):
        total.update(path.name.encode())
        with opened(path) as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be a hub data set: `name` or `owner/name`, and no such file or folder."""
    return not path.endswith(SUFFIXES) and is_name(path)


def open_source(source: SourceConfig) -> list[Records]:
    """The files of a source, each ready to be read; nothing is read yet except what says what they are."""
    path = Path(source.path)
    if is_listing(path):
        return [_listed_records(file) for file in listed(path)]
    if isinstance(source, StreamedSource):
        at = replace(source, revision=commit_of(source.path, source.revision))
        return [streamed_records(at)]
    if _is_on_hub(source):
        return [saved_records(load_hub(source), source.path)]
    _check_is_there(source.path)
    if path.is_file() or is_glob(source.path):
        return [file_records(file) for file in files_of(source.path)]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [saved_records(load_saved(path, source.split), str(path))]
    files = [file for file in files_of(source.path) if file.name.endswith(SUFFIXES)]
    if not files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"data.path={path}: no data files in this folder (found {found})",
            hint=f"expected files ending in {', '.join(SUFFIXES)}, or a data set saved with save_to_disk",
        )
    return [file_records(file) for file in files]


def _listed_records(file: Listed) -> Records:
    """The rows of a file elsewhere: of one of lines as they come, of another when it is here."""
    if file.path.endswith(JSONL_SUFFIXES):
        return line_records(file.path, file.opened, file.version.size)

    def rows() -> Iterator[tuple[Place, object]]:
        for place, row in file_records(file.fetched()).rows():
            yield replace(place, file=file.path), row

    return Records(rows, check_row, file.path.endswith(COLUMNAR_SUFFIXES))


def count_rows(source: SourceConfig) -> int:
    """All rows of a source, whatever its `max_rows`; reads it once."""
    return sum(1 for records in open_source(source) for _ in records.rows())


def _sampled_rows(source: SourceConfig, seed: int) -> set[int] | None:
    """Indices of the rows that `max_rows` keeps; None keeps all. Costs a counting pass."""
    if source.max_rows is None:
        return None
    if isinstance(source, StreamedSource):
        return set(range(source.max_rows))
    import numpy as np

    count = count_rows(source)
    if count <= source.max_rows:
        return None
    name = int.from_bytes(hashlib.blake2b(source_name(source).encode(), digest_size=8).digest(), "big")
    chosen = np.random.default_rng([seed, name]).choice(count, source.max_rows, replace=False)
    return set(chosen.tolist())


def _check_is_there(path: str) -> None:
    """UserError where a path, or a pattern of paths, names nothing."""
    found = Path(path)
    if is_glob(path):
        return check_pattern(path, "data.path")
    if found.exists():
        return None
    folder = found.parent
    near: list[str] = []
    if folder.is_dir():
        near = nearest(found.name, sorted(entry.name for entry in folder.iterdir()), count=3)
        what = f"no such file or folder; nearest names in {folder}: {', '.join(near) or 'none'}"
    else:
        what = f"no such file or folder; the folder {folder} does not exist either"
    hint = f"did you mean {folder / near[0]}?" if near else "correct data.path"
    raise UserError(f"data.path={path}: {what}", hint=hint)
