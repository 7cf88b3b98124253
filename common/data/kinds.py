"""What differs between a data set of demonstrations and one of preferences.

`dataset.py` has one way from sources to files for both; a `Kind` says how a row is read, tokenized and
fitted into `data.max_length`, and what two rows must share to stay on one side of the held-out split:
everything for demonstrations, what is asked first for preferences. Keeps no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from common.config import DataConfig
from common.data import chat, formats, pairs, preferences
from common.data.chat import Drop
from common.data.columns import Columns
from common.data.stored import PairDataset, StoredRecords, TokenizedDataset
from common.data.types import (
    Conversation,
    Message,
    Place,
    Preference,
    RawExample,
    TokenizedExample,
    TokenizedPair,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = TypeVar("Row", bound=Conversation | Preference)
Record = TypeVar("Record", bound=TokenizedExample | TokenizedPair)
Opened = TypeVar("Opened", bound=StoredRecords)


class Kind(ABC, Generic[Row, Record, Opened]):
    """How rows of one kind become records on disk. A record has one document or two."""

    name: ClassVar[str]
    numbers: ClassVar[Mapping[str, str]]
    """Columns of the index beside the common ones, with their `array` type codes."""
    opened: type[Opened]
    """What reads the records."""

    @abstractmethod
    def recognise(self, columns: Columns, *, name: str | None, origin: str) -> Any:
        """The format of a source, from the (renamed) columns of its first row; UserError if none fits."""

    @abstractmethod
    def read(self, raw: RawExample, format: Any, columns_map: Mapping[str, str]) -> Sequence[Row]:
        """What the row says, at least one thing; RowError, or RowUnused with the reason.

        format: what `recognise` gave.
        """

    @abstractmethod
    def tokenize(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Record | Drop]:
        """One result per row, in order."""

    @abstractmethod
    def fit(self, record: Record, place: Place, data: DataConfig, bos_id: int | None) -> Record | Drop:
        """The record within `data.max_length`: itself when it is short enough."""

    @abstractmethod
    def documents(self, record: Record) -> tuple[TokenizedExample, ...]:
        """Its documents, in the order in which they are stored."""

    @abstractmethod
    def numbers_of(self, record: Record) -> tuple[float, ...]:
        """Values for the columns `numbers`."""

    @abstractmethod
    def identity(self, row: Row) -> tuple[str | None, Sequence[Message]]:
        """What rows have in common that must stay on one side: plain text, or turns."""

    @abstractmethod
    def question(self, row: Row) -> str:
        """What the user asks first; all of the text when nobody asks anything. White space around it says
        nothing."""


class Demonstrations(Kind[Conversation, TokenizedExample, TokenizedDataset]):
    """Conversations or plain text, each a document."""

    name = "demonstrations"
    numbers: ClassVar[Mapping[str, str]] = {}
    opened = TokenizedDataset

    def recognise(self, columns: Columns, *, name: str | None, origin: str) -> formats.Format:
        return formats.recognise(columns, name=name, origin=origin)

    def read(
        self, raw: RawExample, format: formats.Format, columns_map: Mapping[str, str]
    ) -> Sequence[Conversation]:
        return (formats.to_conversation(raw, format, columns_map),)

    def tokenize(
        self, rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast
    ) -> list[TokenizedExample | Drop]:
        return chat.tokenize(rows, tokenizer)

    def fit(
        self, record: TokenizedExample, place: Place, data: DataConfig, bos_id: int | None
    ) -> TokenizedExample | Drop:
        return chat.fit(record, place, data.max_length, data.truncation, bos_id)

    def documents(self, record: TokenizedExample) -> tuple[TokenizedExample, ...]:
        return (record,)

    def numbers_of(self, record: TokenizedExample) -> tuple[float, ...]:
        return ()

    def identity(self, row: Conversation) -> tuple[str | None, Sequence[Message]]:
        return row.text, row.messages

    def question(self, row: Conversation) -> str:
        return row.text if row.text is not None else _asked_first(row.messages)


class Preferences(Kind[Preference, TokenizedPair, PairDataset]):
    """Pairs of answers to one prompt, each pair one record: the chosen document, then the rejected one."""

    name = "preferences"
    numbers: ClassVar[Mapping[str, str]] = {"chosen_lengths": "i", "margins": "f"}
    opened = PairDataset

    def recognise(self, columns: Columns, *, name: str | None, origin: str) -> preferences.PreferenceFormat:
        return preferences.recognise(columns, name=name, origin=origin)

    def read(
        self, raw: RawExample, format: preferences.PreferenceFormat, columns_map: Mapping[str, str]
    ) -> Sequence[Preference]:
        return preferences.to_preferences(raw, format, columns_map)

    def tokenize(
        self, rows: Sequence[Preference], tokenizer: PreTrainedTokenizerFast
    ) -> list[TokenizedPair | Drop]:
        return pairs.tokenize_pairs(rows, tokenizer)

    def fit(
        self, record: TokenizedPair, place: Place, data: DataConfig, bos_id: int | None
    ) -> TokenizedPair | Drop:
        return pairs.fit_pair(record, place, data.max_length, data.truncation, bos_id)

    def documents(self, record: TokenizedPair) -> tuple[TokenizedExample, ...]:
        return record.chosen, record.rejected

    def numbers_of(self, record: TokenizedPair) -> tuple[float, ...]:
        return len(record.chosen.input_ids), record.margin

    def identity(self, row: Preference) -> tuple[str | None, Sequence[Message]]:
        # transcripts that go on in different ways from one question are not independent of each other
        return None, (Message("user", self.question(row).strip()),)

    def question(self, row: Preference) -> str:
        return _asked_first(row.prompt)


def _asked_first(turns: Sequence[Message]) -> str:
    asked = (message.content for message in turns if message.role == "user")
    return next(asked, "\n".join(message.content for message in turns))


DEMONSTRATIONS = Demonstrations()
PREFERENCES = Preferences()
