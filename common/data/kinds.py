"""What differs between data sets of demonstrations, of preferences and of prompts alone.

`dataset.py` has one way from sources to files for all; a `Kind` says how a row is read, tokenized and
fitted into `data.max_length`, and what two rows must share to stay on one side of the held-out split:
everything for demonstrations, what is asked first for preferences and prompts. Keeps no state.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np

from common.config import DataConfig, TrainOn
from common.data import chat, formats, pairs, preferences, prompts
from common.data.chat import Drop, Made
from common.data.columns import Columns
from common.data.stored import PairDataset, PromptDataset, StoredRecords, TokenizedDataset
from common.data.types import (
    IGNORE,
    NO_CONTEXT,
    Conversation,
    Message,
    Place,
    Preference,
    Prompt,
    RawExample,
    TokenizedExample,
    TokenizedPair,
    TokenizedPrompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = TypeVar("Row", bound=Conversation | Preference | Prompt)
Record = TypeVar("Record", bound=TokenizedExample | TokenizedPair | TokenizedPrompt)
Opened = TypeVar("Opened", bound=StoredRecords)


def with_options(row: Row, data: DataConfig) -> Row:
    """The row with what the run says of it: variables of the template, below the row's own, and which of its
    turns are trained."""
    if not data.chat_template_kwargs and data.train_on is TrainOn.all_turns:
        return row
    variables = {**data.chat_template_kwargs, **row.context.variables}
    changed: dict[str, Any] = {"context": replace(row.context, variables=variables)}
    if data.train_on is TrainOn.last_turn:
        if isinstance(row, Conversation):
            changed["messages"] = _last_alone(row.messages)
        elif isinstance(row, Preference):
            changed |= {"chosen": _last_alone(row.chosen), "rejected": _last_alone(row.rejected)}
    return replace(row, **changed)


def _last_alone(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns, of whose assistant turns only the last one is trained."""
    last = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return tuple(
        replace(message, trained=message.trained and at == last) for at, message in enumerate(messages)
    )


class Kind(ABC, Generic[Row, Record, Opened]):
    """How rows of one kind become records on disk. A record has one document or two."""

    name: ClassVar[str]
    numbers: ClassVar[Mapping[str, str]]
    """Columns of the index beside the common ones, with their `array` type codes."""
    texts: ClassVar[tuple[str, ...]] = ()
    """Columns of text beside the tokens."""
    opened: type[Opened]
    """What reads the records."""
    room: int = 0
    """Tokens of `data.max_length` that a record leaves free."""

    @abstractmethod
    def recognise(self, columns: Columns, *, name: str | None, origin: str) -> Any:
        """The format of a source, from the (renamed) columns of its first row; UserError if none fits."""

    @abstractmethod
    def read(self, raw: RawExample, format: Any, columns_map: Mapping[str, str]) -> Sequence[Row]:
        """What the row says, at least one thing; RowError, or RowUnused with the reason.

        format: what `recognise` gave.
        """

    @abstractmethod
    def tokenize(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Made[Record] | Drop]:
        """One result per row, in order: what became of it, one record or several."""

    @abstractmethod
    def fit(self, record: Record, place: Place, data: DataConfig, bos_id: int | None) -> Record | Drop:
        """The record within `data.max_length`: itself when it is short enough."""

    @abstractmethod
    def documents(self, record: Record) -> tuple[TokenizedExample, ...]:
        """Its documents, in the order in which they are stored."""

    @abstractmethod
    def numbers_of(self, record: Record) -> tuple[float, ...]:
        """Values for the columns `numbers`."""

    def texts_of(self, record: Record) -> tuple[str, ...]:
        """Values for the columns `texts`."""
        return ()

    @abstractmethod
    def identity(self, row: Row) -> tuple[str | None, Sequence[Message]]:
        """What rows have in common that must stay on one side: plain text, or turns."""

    @abstractmethod
    def question(self, row: Row) -> str:
        """What the user asks first; all of the text when nobody asks anything. White space around it says
        nothing."""

    def kept_once(self, row: Row) -> Sequence[Message] | None:
        """What only the first row that says it is kept for; None: all are."""
        return None


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
    ) -> list[Made[TokenizedExample] | Drop]:
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
    ) -> list[Made[TokenizedPair] | Drop]:
        return _one_each(pairs.tokenize_pairs(rows, tokenizer))

    def fit(
        self, record: TokenizedPair, place: Place, data: DataConfig, bos_id: int | None
    ) -> TokenizedPair | Drop:
        return pairs.fit_pair(record, place, data.max_length, data.truncation, bos_id)

    def documents(self, record: TokenizedPair) -> tuple[TokenizedExample, ...]:
        return record.chosen, record.rejected

    def numbers_of(self, record: TokenizedPair) -> tuple[float, ...]:
        return len(record.chosen.input_ids), record.margin

    def identity(self, row: Preference) -> tuple[str | None, Sequence[Message]]:
        return None, _question_alone(self.question(row))

    def question(self, row: Preference) -> str:
        return _asked_first(row.prompt)


class Prompts(Kind[Prompt, TokenizedPrompt, PromptDataset]):
    """Prompts alone, each once, with the row's other columns as text beside the tokens."""

    name = "prompts"
    numbers: ClassVar[Mapping[str, str]] = {}
    texts = ("prompts", "columns")
    opened = PromptDataset

    def __init__(self, room: int = 0) -> None:
        """room: tokens of `data.max_length` that are kept for the response."""
        self.room = room

    def recognise(self, columns: Columns, *, name: str | None, origin: str) -> prompts.PromptFormat:
        return prompts.recognise(columns, name=name, origin=origin)

    def read(
        self, raw: RawExample, format: prompts.PromptFormat, columns_map: Mapping[str, str]
    ) -> Sequence[Prompt]:
        return (prompts.to_prompt(raw, format, columns_map),)

    def tokenize(
        self, rows: Sequence[Prompt], tokenizer: PreTrainedTokenizerFast
    ) -> list[Made[TokenizedPrompt] | Drop]:
        return _one_each(prompts.tokenize_prompts(rows, tokenizer))

    def fit(
        self, record: TokenizedPrompt, place: Place, data: DataConfig, bos_id: int | None
    ) -> TokenizedPrompt | Drop:
        return prompts.fit_prompt(record, place, data.max_length, data.truncation, bos_id, room=self.room)

    def documents(self, record: TokenizedPrompt) -> tuple[TokenizedExample, ...]:
        labels = np.full(len(record.input_ids), IGNORE, np.int32)
        return (TokenizedExample(record.input_ids, labels, record.source),)

    def numbers_of(self, record: TokenizedPrompt) -> tuple[float, ...]:
        return ()

    def texts_of(self, record: TokenizedPrompt) -> tuple[str, ...]:
        return tuple(json.dumps(value, ensure_ascii=False) for value in (record.prompt, record.columns))

    def identity(self, row: Prompt) -> tuple[str | None, Sequence[Message]]:
        return None, _question_alone(self.question(row))

    def question(self, row: Prompt) -> str:
        return _asked_first(row.messages)

    def kept_once(self, row: Prompt) -> Sequence[Message]:
        given = {"tools": row.context.tools, "variables": row.context.variables}
        return (*row.messages, Message("", "", given)) if row.context != NO_CONTEXT else row.messages


def _one_each(results: Sequence[Record | Drop]) -> list[Made[Record] | Drop]:
    """Rows that each became one record."""
    return [result if isinstance(result, Drop) else Made((result,)) for result in results]


def _question_alone(question: str) -> Sequence[Message]:
    """Transcripts that go on in different ways from one question are not independent of each other."""
    return (Message("user", question.strip()),)


def _asked_first(turns: Sequence[Message]) -> str:
    asked = (message.content for message in turns if message.role == "user")
    return next(asked, "\n".join(message.content for message in turns))


DEMONSTRATIONS = Demonstrations()
PREFERENCES = Preferences()
PROMPTS = Prompts()
