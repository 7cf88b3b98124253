"""Rows -> the files of one folder: tokens, an index of a few numbers per record, and the ledger.

Takes blocks of rows in order, which are made in `blocks.py`, in several processes where there are several
blocks; says which records are held out. What has been made lies in a folder of its own until all is there, so
a build that was interrupted goes on. The same files come out, whatever the number of processes. `stored.py`
reads what is written here.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import SourceConfig
from common.cores import count_cores
from common.data import cache, sources
from common.data.blocks import COLUMNS, DTYPES, IN_EVAL, Event, Made, Maker, is_ours
from common.data.index import write_index
from common.data.ledger import SourceLedger
from common.data.prompts import SAME
from common.data.reader import Reader
from common.data.splits import held_out
from common.data.stored import CHUNK_ROWS, ROWS_FILE
from common.data.types import Place
from common.errors import UserError
from common.pool import Fetched, WorkerEnded, in_order

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

__all__ = ["IN_EVAL", "Writer"]

Report = Callable[[str], None]
Show = Callable[[float], None]
"""Is told the share of the rows that are tokenized."""

POLL, ELSEWHERE_SECONDS = 0.05, 60.0
"""Between two looks for a block that another machine makes, and how long it may take; also how long a machine
that puts all together may be silent."""

NO_ROWS = np.empty(0, np.int64)

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""


@dataclass
class Writer:
    """Turns what a reader gives into the files of one folder.

    spool: folder in which blocks that are made wait for the others; it may hold some from before. show: used
    in place of lines of progress.
    """

    reader: Reader
    tokenizer: PreTrainedTokenizerFast
    spool: Path
    show: Show | None = None
    streams: bool = False
    """leave out the rows of data.eval_path, which others hold"""
    eval_hashes: set[int] = field(default_factory=set)
    """of the rows of data.eval_path"""
    prompt_hashes: set[int] = field(default_factory=set)
    """of the prompts kept so far; each prompt is kept once"""

    def __post_init__(self) -> None:
        self.opened = self.reader.kind.opened
        self.kept = _Kept(self.opened.numbers)
        self._alone = False  # no other builder answers

    def fill(self, folder: Path) -> None:
        self._write_rows(self._records(), folder)
        parts = self._parts()
        self._add_up(parts["eval"], len(self.kept["lengths"]))
        self._count_read()
        write_index(folder / cache.INDEX_FILE, {name: self.kept[name] for name in self._stored()}, parts)
        (folder / cache.LEDGER_FILE).write_text(json.dumps(self.reader.ledger.to_json(), indent=1))

    def is_first(self) -> bool:
        """Whether no other builder that shares the blocks has said before that it puts them together."""
        return is_ours(self.spool / "all")

    def share(self) -> None:
        """Make the blocks that nobody else has claimed, for the builder that puts all together."""
        for number, source, for_eval in self.reader.each_source():
            maker = Maker(self.reader, self.tokenizer, number, source, for_eval, self.eval_hashes)
            if for_eval:  # the blocks of the other sources depend on its rows
                for _, made in self._made(maker, source):
                    self._noted(made, self.reader.ledger.sources[number])
            else:
                for _ in self._kept_blocks(maker, source):
                    pass

    def windows(self, size: int) -> Iterator[Records]:
        """All records, `size` at a time, as soon as they are there. Of a window that was used nothing is kept
        but what it adds to the ledger."""
        for window in _in_chunks(self._records(), size):
            yield window
            count = len(window.lengths)
            self._add_up(NO_ROWS, count)
            self.kept.drop(count)
        self._count_read()

    def write_window(self, window: Records, folder: Path) -> None:
        """A folder with the window that `windows` gave last."""
        self._write_rows(iter([window]), folder)
        count = len(window.lengths)
        index = {name: self.kept[name][:count] for name in self._stored()}
        write_index(folder / cache.INDEX_FILE, index, {"train": np.arange(count), "eval": NO_ROWS})

    def _add_up(self, held_out: np.ndarray, count: int) -> None:
        """Add the first `count` records to the ledger. held_out: which of them are."""
        held = np.zeros(count, bool)
        held[held_out] = True
        columns = {
            name: self.kept[name][:count] for name in ("source_ids", "lengths", "trained", "truncated")
        }
        for number, entry in enumerate(self.reader.ledger.sources):
            of_source = columns["source_ids"] == number
            entry.rows_kept += int(of_source.sum())
            entry.rows_held_out += int((of_source & held).sum())
            entry.tokens += int(columns["lengths"][of_source].sum())
            entry.trained_tokens += int(columns["trained"][of_source].sum())
            entry.truncated += int(np.count_nonzero(columns["truncated"][of_source]))

    def _count_read(self) -> None:
        """Fill in how many rows were read, when all that became of them is in the ledger."""
        for entry in self.reader.ledger.sources:
            dropped = sum(drop.count for drop in entry.dropped.values())
            further = entry.further_pairs + entry.further_documents
            entry.rows_read = entry.rows_kept + dropped + entry.bad_rows - further

    def _write_rows(self, records: Iterator[Records], folder: Path) -> None:
        import pyarrow

        tokens = pyarrow.list_(pyarrow.int32())
        texts = [(name, pyarrow.string()) for name in self.opened.texts]
        schema = pyarrow.schema([("input_ids", tokens), ("labels", tokens), *texts])
        path = str(folder / ROWS_FILE)
        with pyarrow.OSFile(path, "wb") as stream, pyarrow.ipc.new_file(stream, schema) as out:
            for chunk in _in_chunks(records, CHUNK_ROWS):
                out.write_batch(pyarrow.record_batch(chunk.columns(len(texts)), schema=schema))

    def _records(self) -> Iterator[Records]:
        """The records that are kept, in order, each noted in `kept`; the others go to the ledger."""
        every = list(self.reader.each_source())
        watch = _Watch(self.reader.report, self.show, len(every))
        for place, (number, source, for_eval) in enumerate(every):
            maker = Maker(self.reader, self.tokenizer, number, source, for_eval, self.eval_hashes)
            for block, made in self._made(maker, source):
                kept = self._noted(made, self.reader.ledger.sources[number])
                if self.streams:
                    kept &= made.columns["for_eval"] == 0
                self.kept.add(made.columns, kept)
                yield Records(
                    made.columns["lengths"][kept],
                    _of_records(made.input_ids, made.columns["lengths"], kept),
                    _of_records(made.labels, made.columns["lengths"], kept),
                    [text for text, wanted in zip(made.texts, kept, strict=True) if wanted],
                )
                watch.update(len(block.rows), place, block.done)

    def _made(self, maker: Maker, source: SourceConfig) -> Iterator[tuple[sources.Block, Made]]:
        """The blocks of a source, in order."""
        for block, found in self._kept_blocks(maker, source):
            yield block, found if isinstance(found, Made) else self._there(found) or maker.make(block)

    def _kept_blocks(self, maker: Maker, source: SourceConfig) -> Iterator[tuple[sources.Block, Made | Path]]:
        """The blocks of a source, in order. Those behind the first that tells the format are made in as many
        processes as `data.processes` says, or on another machine, and kept in files."""
        blocks = sources.blocks_of(source, seed=self.reader.seed)
        for block in blocks:
            yield block, maker.make(block)
            if maker.known.format is not None:
                break
        is_there = None
        if isinstance(source, sources.StreamedSource):
            blocks = Fetched(blocks)
            is_there = blocks.is_there
        waiting: list[sources.Block] = []

        def tasks() -> Iterator[tuple[sources.Block, Path]]:
            for at, block in enumerate(blocks):
                waiting.append(block)
                yield block, self.spool / f"{maker.number}_{at:09}.npz"

        count = self.reader.data.processes or count_cores()
        try:
            for path in in_order(maker.kept, tasks(), count, is_there):
                yield waiting.pop(0), path
        except WorkerEnded as error:
            raise UserError(
                f"one of {count} processes that tokenize was ended: {error}",
                hint="where that was for want of memory: fewer, e.g. data.processes=1; what is made is kept",
            ) from error

    def _there(self, path: Path) -> Made | None:
        """A block from its file, for which a builder on another machine is waited for; None where that one is
        silent, or the file is damaged."""
        began = time.monotonic()
        while (made := Made.load(path)) is None and not self._alone and not is_ours(path):
            time.sleep(POLL)
            self._alone = time.monotonic() - began > ELSEWHERE_SECONDS
        return made

    def _noted(self, made: Made, entry: SourceLedger) -> np.ndarray:
        """Tell the ledger what happened in a block; which of its records are kept: bool [R]."""
        kept: list[bool] = []
        for event in made.events:
            self._note(event, entry, kept)
        everything = np.ones(len(made.columns["lengths"]), bool)
        return np.array(kept, bool) if kept else everything

    def _note(self, event: Event, entry: SourceLedger, kept: list[bool]) -> None:
        match event:
            case ["say", line]:
                entry.format = entry.format or str(line).partition(": format ")[2].partition(" ")[0]
                self.reader.report(line)
            case ["drop", reason, file, row]:
                entry.drop(reason, Place(file, row))
            case ["note", counted, reason, file, row]:
                entry.note(getattr(entry, counted), [reason], Place(file, row))
            case ["not_used", columns]:
                entry.not_used(columns)
            case ["more", counted, count]:
                setattr(entry, counted, getattr(entry, counted) + count)
            case ["bad", file, row, reason]:
                self.reader.bad_rows.add(entry, Place(file, row), reason)
            case ["eval", row_hash]:
                self.eval_hashes.add(row_hash)
            case ["prompt", said, file, row]:
                kept.append(said not in self.prompt_hashes)
                self.prompt_hashes.add(said)
                if not kept[-1]:
                    entry.drop(SAME, Place(file, row))
            case _:
                raise AssertionError(event)

    def _parts(self) -> dict[str, np.ndarray]:
        """Which records of the file are for training and which are held out."""
        hashes, source_ids = self.kept["hashes"], self.kept["source_ids"]
        for_eval = self.kept["for_eval"] != 0
        rows = ~for_eval & (self.kept["first"] != 0)  # documents of one row count once
        chosen = held_out(hashes[rows], source_ids[rows], self.reader.data.held_out_fraction())
        for_eval |= np.isin(hashes, np.array(sorted(chosen), np.uint64))
        return {"train": np.flatnonzero(~for_eval), "eval": np.flatnonzero(for_eval)}

    def _stored(self) -> tuple[str, ...]:
        return ("lengths", "trained", "source_ids", "numbers", "control", *self.opened.numbers)


class _Kept:
    """A few numbers of each record, kept in memory while its tokens go to disk."""

    def __init__(self, more: Mapping[str, str]) -> None:
        """more: columns beside the common ones, with their type codes."""
        self._columns: dict[str, array[Any]] = {
            name: array(code) for name, code in {**COLUMNS, **more}.items()
        }

    def add(self, columns: Mapping[str, np.ndarray], kept: np.ndarray) -> None:
        for name, column in self._columns.items():
            column.frombytes(columns[name][kept].tobytes())

    def drop(self, count: int) -> None:
        """Forget the first records."""
        for column in self._columns.values():
            del column[:count]

    def __getitem__(self, name: str) -> np.ndarray:
        # a view, not a copy: with a million rows these numbers are most of the memory in use
        column = self._columns[name]
        return np.frombuffer(column, DTYPES[column.typecode])


@dataclass(frozen=True)
class Records:
    """R records of T tokens, end to end. lengths: int32 [R]. input_ids, labels: int32 [T]."""

    lengths: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    texts: list[Any]

    def columns(self, texts: int) -> list[pyarrow.Array]:
        """As they are stored. texts: number of columns of text."""
        import pyarrow

        offsets = np.zeros(len(self.lengths) + 1, np.int32)
        np.cumsum(self.lengths, out=offsets[1:])
        return [
            pyarrow.ListArray.from_arrays(offsets, self.input_ids),
            pyarrow.ListArray.from_arrays(offsets, self.labels),
            *(pyarrow.array([text[at] for text in self.texts], pyarrow.string()) for at in range(texts)),
        ]

    def split(self, count: int) -> tuple[Records, Records]:
        """The first `count` records, and the others."""
        end = int(self.lengths[:count].sum())
        first = Records(self.lengths[:count], self.input_ids[:end], self.labels[:end], self.texts[:count])
        rest = Records(self.lengths[count:], self.input_ids[end:], self.labels[end:], self.texts[count:])
        return first, rest

    def and_then(self, other: Records) -> Records:
        lengths, ids, labels = (
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("lengths", "input_ids", "labels")
        )
        return Records(lengths, ids, labels, self.texts + other.texts)


def _of_records(tokens: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return tokens if kept.all() else tokens[np.repeat(kept, lengths)]


def _in_chunks(every: Iterator[Records], size: int) -> Iterator[Records]:
    """The same records, `size` at a time."""
    pending = next(every, None)
    while pending is not None:
        if len(pending.lengths) >= size:
            chunk, pending = pending.split(size)
            yield chunk
        elif (more := next(every, None)) is not None:
            pending = pending.and_then(more)
        else:
            break
    if pending is not None and len(pending.lengths):
        yield pending


class _Watch:
    """Says how far the sources are read, and how long the rest will take where that is known."""

    def __init__(self, report: Report, show: Show | None, sources: int) -> None:
        self._report, self._show, self._sources, self._rows = report, show, sources, 0
        self._began = self._last = time.monotonic()

    def update(self, rows: int, source: int, done: float | None) -> None:
        """rows: that have been added. source: its place among them. done: share of it that lies before."""
        self._rows += rows
        share = None if done is None else (source + done) / self._sources
        if self._show is not None and share is not None:
            self._show(share)
        elif time.monotonic() - self._last > PROGRESS_SECONDS:
            self._last = time.monotonic()
            left = round((self._last - self._began) * (1 - share) / share) if share else 0
            more = f", {share:.0%}, {left // 60}:{left % 60:02} left" if share else ""
            self._report(f"tokenized {self._rows:,} rows{more}")
