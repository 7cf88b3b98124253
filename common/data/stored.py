"""Tokenized rows on disk, as data sets: documents, pairs of them, or prompts.

Reads what `writer.py` wrote and says how a record is laid out: an Arrow file mapped into memory with the
tokens of each record, and an index of a few numbers per record. Memory stays flat, and ranks of one machine
share the pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from common.data.types import IGNORE, TokenizedExample, TokenizedPair, TokenizedPrompt

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS = 1024
"""Records in one block of the file (the last may have fewer)."""

ROWS_FILE = "rows.arrow"

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
        # a record of the file belongs to one part; `rows` says which are this part's
        rows = index[part]
        self.sources = names
        self.lengths = index["lengths"][rows]
        self.trained = index["trained"][rows]
        self.source_ids = index["source_ids"][rows]
        self.control = index["control"][rows]
        self.fingerprint = f"{folder.name}-{part}"
        self._numbers = index["numbers"]
        self._sources_of_file = index["source_ids"]
        self._rows = rows
        self.folder = folder
        self._opened: _Columns | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def head(self, index: int) -> str:
        """A note to show before the record itself; usually empty."""
        return CONTROL_HEAD if self.control[index] else ""

    def place(self, index: int) -> str:
        """Where the record came from: source and row (line of a JSONL file), for messages."""
        return f"{self.sources[int(self.source_ids[index])]}:{self._numbers[self._rows[index]]}"

    def part_of_row(self, index: int) -> tuple[int, int]:
        """The record's number among the records of its row, from 1, and how many there are."""
        row = self._row(index)
        of_row = np.flatnonzero(self._numbers == self._numbers[row])
        of_row = of_row[self._sources_of_file[of_row] == self._sources_of_file[row]]
        return int(np.searchsorted(of_row, row)) + 1, len(of_row)

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
        self.chosen_lengths = index["chosen_lengths"][self._rows]
        self.margins = index["margins"][self._rows]

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
    """The columns of the file, mapped into memory; tokens and labels are views, without a copy."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = [reader.get_batch(number).columns for number in range(reader.num_record_batches)]
        self._batches = [
            tuple((_numbers(column.offsets), _numbers(column.values)) for column in columns[:TOKEN_COLUMNS])
            for columns in batches
        ]
        self._texts = [columns[TOKEN_COLUMNS:] for columns in batches]

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        batch, within = divmod(row, CHUNK_ROWS)
        ids, labels = (
            values[offsets[within] : offsets[within + 1]] for offsets, values in self._batches[batch]
        )
        return ids, labels

    def texts(self, row: int) -> list[str]:
        """The values of a record's text columns."""
        batch, within = divmod(row, CHUNK_ROWS)
        return [column[within].as_py() for column in self._texts[batch]]


def _numbers(array: pyarrow.Array) -> np.ndarray:
    """An int32 array as a view; pyarrow's own `to_numpy` imports pandas, half a second of every start."""
    return np.frombuffer(array.buffers()[1], np.int32, len(array), 4 * array.offset)
