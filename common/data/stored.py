"""Tokenized rows on disk, as data sets: documents, pairs of them, or prompts.

Reads what `writer.py` wrote and says how a record is laid out: an Arrow file mapped into memory with the
tokens of each record, and an index of a few numbers per record. Memory stays flat, and ranks of one machine
share the pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from common.data.index import ROWS
from common.data.types import IGNORE, TokenizedExample, TokenizedPair, TokenizedPrompt

CHUNK_ROWS = 1024
"""Records in one block of the file (the last may have fewer)."""

ROWS_FILE = "rows.arrow"
INT32 = 4
"""Bytes."""

TOKEN_COLUMNS = 2
"""input_ids and labels, the first columns of the file; those behind them are text."""


CONTROL_HEAD = "[contents of this row hold control tokens; every real one is shown as *token*] "


class Layout(NamedTuple):
    """A record as it is stored: documents end to end, and values for the columns of its data set."""

    documents: tuple[TokenizedExample, ...]
    numbers: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()


class StoredRecords:
    """Records of one part of a folder.

    numbers: columns of the index that only this kind has, with their `array` type codes. texts: columns of
    text beside the tokens.

    lengths: int32 [R] tokens. trained: int32 [R] trained tokens. source_ids: int32 [R], indices into
    `sources`. control: int8 [R], 1 where the row's contents hold control tokens. fingerprint: hash of
    everything that decided the records, and of which part this is. folder: where they lie.
    """

    numbers: ClassVar[Mapping[str, str]] = {}
    texts: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def layout(record: Any) -> Layout:
        """How a record of this kind is stored."""
        raise NotImplementedError

    def __init__(self, folder: Path, index: Mapping[str, np.ndarray], names: list[str], part: str) -> None:
        """index: columns of this part's records, as `read_index` gives them."""
        self.sources = names
        self.lengths = index["lengths"]
        self.trained = index["trained"]
        self.source_ids = index["source_ids"]
        self.control = index["control"]
        self.fingerprint = f"{folder.name}-{part}"
        self._numbers = index["numbers"]
        self._rows = index[ROWS]
        self.folder = folder
        self._opened: _Columns | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def head(self, index: int) -> str:
        """A note to show before the record itself; usually empty."""
        return CONTROL_HEAD if self.control[index] else ""

    def place(self, index: int) -> str:
        """Where the record came from: source and row (line of a JSONL file), for messages."""
        return f"{self.sources[int(self.source_ids[index])]}:{self._numbers[index]}"

    def part_of_row(self, index: int) -> tuple[int, int]:
        """The record's number among the records of its row, from 1, and how many there are."""
        # those of a row are all of one part: a row is held out as a whole
        of_row = np.flatnonzero(self._numbers == self._numbers[index])
        of_row = of_row[self.source_ids[of_row] == self.source_ids[index]]
        return int(np.searchsorted(of_row, index)) + 1, len(of_row)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Tokens, labels and source of a record."""
        ids, labels = self._columns()[self._row(index)]
        return ids, labels, self.sources[int(self.source_ids[index])]

    def _row(self, index: int) -> int:
        """Which record of the file it is."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return int(self._rows[index])

    def _columns(self) -> _Columns:
        if self._opened is None:
            self._opened = _Columns(self.folder / ROWS_FILE)
        return self._opened


class TokenizedDataset(StoredRecords):
    """Documents read from a memory-mapped file."""

    @staticmethod
    def layout(record: TokenizedExample) -> Layout:
        return Layout((record,))

    def __getitem__(self, index: int) -> TokenizedExample:
        return TokenizedExample(*self._read(index))


class PairDataset(StoredRecords):
    """Pairs of documents; `lengths` and `trained` count both sides together.

    chosen_lengths: int32 [P], tokens of the chosen sides. margins: float32 [P].
    """

    numbers: ClassVar[Mapping[str, str]] = {"chosen_lengths": "i", "margins": "f"}

    @staticmethod
    def layout(record: TokenizedPair) -> Layout:
        return Layout((record.chosen, record.rejected), (len(record.chosen.input_ids), record.margin))

    def __init__(self, folder: Path, index: Mapping[str, np.ndarray], names: list[str], part: str) -> None:
        super().__init__(folder, index, names, part)
        self.chosen_lengths = index["chosen_lengths"]
        self.margins = index["margins"]

    def __getitem__(self, index: int) -> TokenizedPair:
        ids, labels, source = self._read(index)
        end = int(self.chosen_lengths[index])
        return TokenizedPair(
            TokenizedExample(ids[:end], labels[:end], source),
            TokenizedExample(ids[end:], labels[end:], source),
            float(self.margins[index]),
        )


class PromptDataset(StoredRecords):
    """Prompts with the other columns of their rows. Nothing is trained."""

    texts = ("prompts", "columns")

    @staticmethod
    def layout(record: TokenizedPrompt) -> Layout:
        labels = np.full(len(record.input_ids), IGNORE, np.int32)
        prompt, columns = (json.dumps(said, ensure_ascii=False) for said in (record.prompt, record.columns))
        document = TokenizedExample(record.input_ids, labels, record.source)
        return Layout((document,), texts=(prompt, columns))

    def __getitem__(self, index: int) -> TokenizedPrompt:
        ids, _, source = self._read(index)
        prompt, columns = map(json.loads, self._columns().texts(self._row(index)))
        return TokenizedPrompt(ids, prompt, columns, source)


class _Columns:
    """The columns of the file, mapped into memory; tokens and labels are views, without a copy.

    Only where the columns of a block lie is remembered: objects for each of them would be the largest part of
    what a rank holds of ten million records.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._file = pyarrow.memory_map(str(path))
        self._reader = pyarrow.ipc.open_file(self._file)
        self._all = np.frombuffer(self._file.read_buffer(), np.uint8)
        self._places = np.zeros((self._reader.num_record_batches, TOKEN_COLUMNS, 2), np.int64)
        """byte in the file at which offsets and values of each column of tokens begin; 0: not looked up"""

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        batch, within = divmod(row, CHUNK_ROWS)
        if not self._places[batch].all():
            self._places[batch] = self._places_of(batch)
        ids, labels = (self._tokens(offsets, values, within) for offsets, values in self._places[batch])
        return ids, labels

    def texts(self, row: int) -> list[str]:
        """The values of a record's text columns."""
        batch, within = divmod(row, CHUNK_ROWS)
        return [column[within].as_py() for column in self._reader.get_batch(batch).columns[TOKEN_COLUMNS:]]

    def _tokens(self, offsets: int, values: int, within: int) -> np.ndarray:
        first, last = np.frombuffer(self._all, np.int32, 2, offsets + INT32 * within)
        return np.frombuffer(self._all, np.int32, last - first, values + INT32 * first)

    def _places_of(self, batch: int) -> list[list[int]]:
        begin = self._all.ctypes.data
        columns = self._reader.get_batch(batch).columns[:TOKEN_COLUMNS]
        parts = [(column.offsets, column.values) for column in columns]
        return [[part.buffers()[1].address + INT32 * part.offset - begin for part in pair] for pair in parts]
