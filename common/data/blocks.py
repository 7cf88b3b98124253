"""A block of rows as read -> its records, with everything that is to be noted about its rows.

Parses, understands and tokenizes rows, and fits each record into `data.max_length`. What a block gives
depends on nothing but the block and the rows of `data.eval_path`, so blocks are made in any order and in any
process; what depends on other blocks (whether a prompt was there before, how many bad rows there are) is
noted for `writer.py`, which takes the blocks in their order. `Made` can be kept in a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import OnBadRow, SourceConfig, SpecialTokens
from common.data import control
from common.data.outcomes import Drop, RowRecords
from common.data.reader import Reader, Understanding
from common.data.sources import Block
from common.data.splits import prompt_hash, split_hash
from common.data.stored import Layout
from common.data.types import Place, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IN_EVAL = "also in data.eval_path"

BECAME = {
    SpecialTokens.keep: "taken as the real token (data.special_tokens_in_content=keep)",
    SpecialTokens.text: "encoded as ordinary text",
    SpecialTokens.refuse: "refused",
}
"""The treatment of a control token inside a content, in words."""

COLUMNS = {
    "hashes": "Q", "source_ids": "i", "lengths": "i", "trained": "i", "numbers": "i", "truncated": "b",
    "for_eval": "b", "first": "b", "control": "b",
}  # fmt: skip
"""Numbers of each record, with their `array` type codes. first: whether it is the first of its row. control:
whether the row's contents hold control tokens."""

DTYPES = {"Q": np.uint64, "i": np.int32, "b": np.int8, "f": np.float32}

CLAIM, WHO = ".claim", socket.gethostname()
"""Suffix of the file that says who makes a block, and who is on this machine."""

Event = list[Any]
"""The name of what happened and what it happened to, as JSON values."""


@dataclass(frozen=True)
class Made:
    """What a block gives: R records of T tokens, end to end.

    events: in the order of the rows. input_ids, labels: int32 [T]. columns: [R], by name. texts: of each
    record, for the columns of text that its data set has.
    """

    events: list[Event]
    input_ids: np.ndarray
    labels: np.ndarray
    columns: Mapping[str, np.ndarray]
    texts: list[Sequence[str]]

    def save(self, path: Path) -> None:
        """Into a file that is there whole or not at all."""
        told = np.frombuffer(json.dumps([self.events, self.texts]).encode(), np.uint8)
        unfinished = path.with_name(f".{path.name}.{WHO}-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            parts = {"told": told, "input_ids": self.input_ids, "labels": self.labels, **self.columns}
            np.savez(file, allow_pickle=False, **parts)
        unfinished.rename(path)

    @classmethod
    def load(cls, path: Path) -> Made | None:
        """None where there is none, or a damaged one: every part of the file has a checksum."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                parts = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
            return None
        events, texts = json.loads(parts.pop("told").tobytes())
        return cls(events, parts.pop("input_ids"), parts.pop("labels"), parts, texts)


def is_ours(path: Path) -> bool:
    """Claim a block for this process: builders of several machines that share a cache share the blocks, too.

    False where another one has claimed it, unless that ran on this machine and is gone.
    """
    claim = path.with_suffix(CLAIM)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(claim, "x") as file:
            file.write(f"{WHO} {os.getpid()}")
        return True
    except FileExistsError:
        with contextlib.suppress(OSError, ValueError):
            host, pid = claim.read_text().split()
            return host == WHO and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists())
        return False


class _StopAtBadRow(Exception):
    """Nothing behind this row is wanted."""


class _Notes:
    """Stands in for the ledger's entry of a source and for its bad rows: writes down what these are told."""

    split, untrained, control = "split", "untrained", "control"

    def __init__(self, name: str, stops: bool) -> None:
        self.name, self._stops = name, stops
        self.format = ""
        self.further_pairs = self.further_documents = 0
        self.events: list[Event] = []

    def drop(self, reason: str, place: Place) -> None:
        self.events.append(["drop", reason, place.file, place.row])

    def note(self, counted: str, reasons: Iterable[str], place: Place) -> None:
        self.events += [["note", counted, reason, place.file, place.row] for reason in reasons]

    def not_used(self, columns: Sequence[str]) -> None:
        self.events.append(["not_used", list(columns)])

    def say(self, line: str) -> None:
        self.events.append(["say", line])

    def add(self, entry: Any, place: Place, reason: str) -> None:
        """A bad row."""
        self.events.append(["bad", place.file, place.row, reason])
        if self._stops:
            raise _StopAtBadRow

    def all_events(self) -> list[Event]:
        """Also what is only counted."""
        counted = {name: getattr(self, name) for name in ("further_pairs", "further_documents")}
        return [*self.events, *(["more", name, count] for name, count in counted.items() if count)]


@dataclass
class Maker:
    """Makes the blocks of one source. eval_hashes: `split_hash` of the rows of data.eval_path."""

    reader: Reader
    tokenizer: PreTrainedTokenizerFast
    number: int  # of the source in the ledger
    source: SourceConfig
    for_eval: bool
    eval_hashes: Collection[int] = ()
    known: Understanding = field(default_factory=Understanding)

    def __post_init__(self) -> None:
        self._opened = self.reader.kind.opened

    def kept(self, task: tuple[Block, Path]) -> Path:
        """Make a block and keep it in a file, unless it is there or another process makes it; the file."""
        block, path = task
        if Made.load(path) is None and is_ours(path):
            self.make(block).save(path)
        return path

    def make(self, block: Block) -> Made:
        """What the block gives. Where bad rows are errors, it ends with the first."""
        data = self.reader.data
        notes = _Notes(str(self.source.name), data.on_bad_row is OnBadRow.error)
        reader = dataclasses.replace(self.reader, report=notes.say)
        reader.bad_rows = notes  # type: ignore[assignment]
        layouts: list[Layout] = []
        columns: dict[str, list[float]] = {name: [] for name in (*COLUMNS, *self._opened.numbers)}
        try:
            raws = block.examples(partial(notes.add, notes))
            entry: Any = notes
            rows = list(reader.understood(raws, self.source, entry, self.for_eval, self.known))
            for row, (result, tokens) in zip(rows, self._tokenized(rows), strict=True):
                for layout, numbers in self._of_row(row, result, tokens, notes):
                    layouts.append(layout)
                    for name, value in numbers.items():
                        columns[name].append(value)
        except _StopAtBadRow:
            pass
        documents = [document for layout in layouts for document in layout.documents]
        nothing, codes = np.empty(0, np.int32), {**COLUMNS, **self._opened.numbers}
        return Made(
            notes.all_events(),
            np.concatenate([nothing, *(document.input_ids for document in documents)]),
            np.concatenate([nothing, *(document.labels for document in documents)]),
            {name: np.array(values, DTYPES[codes[name]]) for name, values in columns.items()},
            [layout.texts for layout in layouts],
        )

    def _tokenized(self, rows: Sequence[Any]) -> Iterator[tuple[Any, list[str]]]:
        """One result per row, and the control tokens inside its contents, treated as the run asks."""
        known, mode = control.control_tokens(self.tokenizer), self.reader.data.special_tokens_in_content
        found = [known.found(row) for row in rows]
        refuse = bool if mode is SpecialTokens.refuse else known.is_reserved
        refused = [next(filter(refuse, tokens), None) for tokens in found]
        guarded = [
            known.guarded(row) if tokens and mode is SpecialTokens.text else row
            for row, tokens, token in zip(rows, found, refused, strict=True)
            if token is None
        ]
        results = iter(self.reader.kind.tokenize(guarded, self.tokenizer))
        for row, tokens, token in zip(rows, found, refused, strict=True):
            reason = f"a content holds the control token {token}"
            yield (next(results) if token is None else Drop(reason, row.place, faulty=True)), tokens

    def _of_row(
        self, row: Any, result: Any, tokens: list[str], notes: _Notes
    ) -> Iterator[tuple[Layout, dict[str, float]]]:
        """The records of one row that are kept, with their numbers. result: the row's outcome; tokens: its
        control tokens."""
        data = self.reader.data
        row_hash = split_hash(row, self.reader.seed)
        if self.for_eval:
            notes.events.append(["eval", row_hash])
        elif row_hash in self.eval_hashes:
            result = Drop(IN_EVAL, row.place)
        if isinstance(result, Drop):
            self._drop(result, notes)
            return
        made = result if isinstance(result, RowRecords) else RowRecords((result,))
        notes.note(notes.split, filter(None, [made.split]), row.place)
        notes.note(notes.untrained, made.untrained, row.place)
        became = BECAME[data.special_tokens_in_content]
        notes.note(notes.control, (f"{token} {became}" for token in tokens), row.place)
        notes.further_documents += len(made.records) - 1
        first, bos_id = True, self.tokenizer.bos_token_id
        for whole in made.records:
            record = self.reader.kind.fit(whole, row.place, data.max_length, data.truncation, bos_id)
            if isinstance(record, Drop):
                self._drop(record, notes)
                continue
            layout = self._opened.layout(record)
            numbers = {
                "hashes": row_hash, "source_ids": self.number, "for_eval": self.for_eval, "first": first,
                "truncated": record is not whole, "control": bool(tokens), "numbers": row.place.row,
                "lengths": sum(len(document.input_ids) for document in layout.documents),
                "trained": sum(document.trained for document in layout.documents),
                **dict(zip(self._opened.numbers, layout.numbers, strict=True)),
            }  # fmt: skip
            if isinstance(row, Prompt):
                said = prompt_hash(row, self.reader.seed)
                notes.events.append(["prompt", said, row.place.file, row.place.row])
            first = False
            yield layout, numbers

    def _drop(self, drop: Drop, notes: _Notes) -> None:
        if drop.faulty:
            notes.add(notes, drop.place, drop.reason)
        else:
            notes.drop(drop.reason, drop.place)
