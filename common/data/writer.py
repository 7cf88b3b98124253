"""Rows -> the files of one folder: tokens, an index of a few numbers per record, and the ledger.

Tokenizes rows in blocks, fits each record into `data.max_length`, keeps or drops it, and says which records
are held out. `stored.py` reads what is written here.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.config import SpecialTokens
from common.data import cache, control
from common.data.ledger import Ledger, SourceLedger
from common.data.outcomes import Drop, RowRecords
from common.data.prompts import SAME
from common.data.reader import Reader
from common.data.splits import held_out, prompt_hash, split_hash
from common.data.stored import CHUNK_ROWS, ROWS_FILE, Layout
from common.data.types import Prompt

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""

IN_EVAL = "also in data.eval_path"

BECAME = {
    SpecialTokens.keep: "taken as the real token (data.special_tokens_in_content=keep)",
    SpecialTokens.text: "encoded as ordinary text",
    SpecialTokens.refuse: "refused",
}
"""The treatment of a control token inside a content, in words."""


@dataclass
class Writer:
    """Turns what a reader gives into the files of one folder."""

    reader: Reader
    tokenizer: PreTrainedTokenizerFast
    eval_hashes: set[int] = field(default_factory=set)
    """of the rows of data.eval_path"""
    prompt_hashes: set[int] = field(default_factory=set)
    """of the prompts kept so far; each prompt is kept once"""

    def __post_init__(self) -> None:
        self.opened = self.reader.kind.opened
        self.kept = _Kept(self.opened.numbers)

    def fill(self, folder: Path) -> None:
        import pyarrow

        tokens = pyarrow.list_(pyarrow.int32())
        texts = [(name, pyarrow.string()) for name in self.opened.texts]
        schema = pyarrow.schema([("input_ids", tokens), ("labels", tokens), *texts])
        records = self._records()
        path = str(folder / ROWS_FILE)
        with pyarrow.OSFile(path, "wb") as stream, pyarrow.ipc.new_file(stream, schema) as out:
            while chunk := list(islice(records, CHUNK_ROWS)):
                out.write_batch(pyarrow.record_batch(_columns(chunk), schema=schema))
        index = self._index()
        _count(self.reader.ledger, index, self.kept["truncated"] != 0)
        np.savez(folder / cache.INDEX_FILE, allow_pickle=False, **index)
        (folder / cache.LEDGER_FILE).write_text(json.dumps(self.reader.ledger.to_json(), indent=1))

    def _records(self) -> Iterator[Layout]:
        """The records that are kept, in order, each noted in `kept`; the others go to the ledger."""
        usable = self.reader.rows()
        done, last_line = 0, time.monotonic()
        while chunk := list(islice(usable, CHUNK_ROWS)):
            tokenized = self._tokenized([row for row, _, _ in chunk])
            for (row, source, for_eval), (result, tokens) in zip(chunk, tokenized, strict=True):
                yield from self._of_row(row, source, for_eval, result, tokens)
            done += len(chunk)
            if time.monotonic() - last_line > PROGRESS_SECONDS:
                self.reader.report(f"tokenized {done:,} rows")
                last_line = time.monotonic()

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
        self, row: Any, source: int, for_eval: bool, result: Any, tokens: list[str]
    ) -> Iterator[Layout]:
        """The records of one row that are kept. result: the row's outcome; tokens: its control tokens."""
        data, entry = self.reader.data, self.reader.ledger.sources[source]
        row_hash = split_hash(row, self.reader.seed)
        if for_eval:
            self.eval_hashes.add(row_hash)
        elif row_hash in self.eval_hashes:
            result = Drop(IN_EVAL, row.place)
        if isinstance(result, Drop):
            self._drop(result, entry)
            return
        made = result if isinstance(result, RowRecords) else RowRecords((result,))
        entry.note(entry.split, filter(None, [made.split]), row.place)
        entry.note(entry.untrained, made.untrained, row.place)
        became = BECAME[data.special_tokens_in_content]
        entry.note(entry.control, (f"{token} {became}" for token in tokens), row.place)
        entry.further_documents += len(made.records) - 1
        first, bos_id = True, self.tokenizer.bos_token_id
        for whole in made.records:
            record = self.reader.kind.fit(whole, row.place, data.max_length, data.truncation, bos_id)
            if isinstance(row, Prompt):
                record = self._if_new(row, record)
            if isinstance(record, Drop):
                self._drop(record, entry)
                continue
            layout = self.opened.layout(record)
            self.kept.add(
                hashes=row_hash, source_ids=source, for_eval=for_eval, first=first,
                truncated=record is not whole, control=bool(tokens), numbers=row.place.row,
                lengths=sum(len(document.input_ids) for document in layout.documents),
                trained=sum(document.trained for document in layout.documents),
                **dict(zip(self.opened.numbers, layout.numbers, strict=True)),
            )  # fmt: skip
            first = False
            yield layout

    def _if_new(self, row: Prompt, record: Any) -> Any:
        """The record of a prompt, unless the same was kept before."""
        if isinstance(record, Drop):
            return record
        said = prompt_hash(row, self.reader.seed)
        if said in self.prompt_hashes:
            return Drop(SAME, row.place)
        self.prompt_hashes.add(said)
        return record

    def _drop(self, drop: Drop, entry: SourceLedger) -> None:
        if drop.faulty:
            self.reader.bad_rows.add(entry, drop.place, drop.reason)
        else:
            entry.drop(drop.reason, drop.place)

    def _index(self) -> dict[str, np.ndarray]:
        """The numbers of each record of the file, and which records are for training and which are held
        out."""
        hashes, source_ids = self.kept["hashes"], self.kept["source_ids"]
        for_eval = self.kept["for_eval"] != 0
        rows = ~for_eval & (self.kept["first"] != 0)  # documents of one row count once
        chosen = held_out(hashes[rows], source_ids[rows], self.reader.data.held_out_fraction())
        for_eval |= np.isin(hashes, np.array(sorted(chosen), np.uint64))
        stored = ("lengths", "trained", "source_ids", "numbers", "control", *self.opened.numbers)
        return {
            **{name: self.kept[name] for name in stored},
            "train": np.flatnonzero(~for_eval),
            "eval": np.flatnonzero(for_eval),
        }


class _Kept:
    """A few numbers of each record, kept in memory while its tokens go to disk."""

    def __init__(self, more: Mapping[str, str]) -> None:
        """more: columns beside the common ones, with their type codes.

        first: whether the record is the first of its row. control: whether the row's contents hold control
        tokens.
        """
        common = {"hashes": "Q", "source_ids": "i", "lengths": "i", "trained": "i", "numbers": "i"}
        codes = {**common, "truncated": "b", "for_eval": "b", "first": "b", "control": "b", **more}
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in codes.items()}

    def add(self, **values: float) -> None:
        for name, column in self._columns.items():
            column.append(values[name])

    def __getitem__(self, name: str) -> np.ndarray:
        # a view, not a copy: with a million rows these numbers are most of the memory in use
        column = self._columns[name]
        return np.frombuffer(column, {"Q": "u8", "i": "i4", "b": "i1", "f": "f4"}[column.typecode])


def _columns(chunk: Sequence[Layout]) -> list[pyarrow.Array]:
    """Tokens, labels and texts of some records."""
    import pyarrow

    texts = zip(*(record.texts for record in chunk), strict=True)
    return [
        _column([[document.input_ids for document in record.documents] for record in chunk]),
        _column([[document.labels for document in record.documents] for record in chunk]),
        *(pyarrow.array(column, pyarrow.string()) for column in texts),
    ]


def _column(records: list[list[np.ndarray]]) -> pyarrow.ListArray:
    """One list per record, its documents end to end."""
    import pyarrow

    offsets = np.zeros(len(records) + 1, np.int32)
    np.cumsum([sum(map(len, documents)) for documents in records], out=offsets[1:])
    every = [document for documents in records for document in documents]
    return pyarrow.ListArray.from_arrays(offsets, np.concatenate(every))


def _count(ledger: Ledger, index: Mapping[str, np.ndarray], truncated: np.ndarray) -> None:
    """Fill in the counts that are known only after the last row."""
    held = np.zeros(len(index["lengths"]), bool)
    held[index["eval"]] = True
    for number, entry in enumerate(ledger.sources):
        of_source = index["source_ids"] == number
        entry.rows_kept = int(of_source.sum())
        dropped = sum(drop.count for drop in entry.dropped.values())
        further = entry.further_pairs + entry.further_documents
        entry.rows_read = entry.rows_kept + dropped + entry.bad_rows - further
        entry.rows_held_out = int((of_source & held).sum())
        entry.tokens = int(index["lengths"][of_source].sum())
        entry.trained_tokens = int(index["trained"][of_source].sum())
        entry.truncated = int(truncated[of_source].sum())
