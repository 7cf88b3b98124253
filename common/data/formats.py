"""RawExample -> Conversation: what the columns of a row with one answer mean.

A format is a name, the columns it needs and a function; `FORMATS` lists them in the order in which they are
tried. A source's format is recognised once, from its first row; a later row without the columns is a bad row.
Raises `RowError` for what is wrong with one row, `UserError` for a source that cannot be understood at all.
Rows with two answers are read in `preferences.py`, prompts alone in `prompts.py`. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from common.data import columns as cells
from common.data import preferences
from common.data.columns import Columns
from common.data.outcomes import RowError
from common.data.types import Conversation, Message, RawExample
from common.errors import UserError
from common.text import did_you_mean

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Format:
    """A way to write a row: columns it needs, columns it may have, and how it is read.

    read: all turns, and how many of the first are a prompt, whose assistant turns are not trained. Not called
    for plain text.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Columns], tuple[Turns, int]]

    def unused(self, columns: Columns) -> list[str]:
        """Columns of a row (already renamed) that say nothing to this format."""
        read = {*self.required, *self.optional, *(() if self.name == "text" else cells.CONTEXT_COLUMNS)}
        return [name for name in columns if name not in read]


def recognise(columns: Iterable[str], *, name: str | None = None, origin: str = "data") -> Format:
    """The format of rows with these columns (already renamed), or the one asked for by `name`.

    Raises UserError naming `origin` and the columns found when none fits.
    """
    found = set(columns)
    listed = ", ".join(sorted(found)) or "none"
    if name is not None:
        return by_name(name, (*FORMATS, CHOSEN), found, origin)
    for candidate in FORMATS:
        if found.issuperset(candidate.required):
            return candidate
    if {"chosen", "rejected"} <= found:
        raise UserError(
            f"{origin}: preference rows (columns {listed}), but supervised fine-tuning needs demonstrations",
            hint="name rows with one answer each, e.g. prompt and completion; or train on the preferred side"
            " alone: data.sources.format=chosen",
        )
    known = "; ".join(f"{candidate.name}: {', '.join(candidate.required)}" for candidate in FORMATS)
    raise UserError(
        f"{origin}: no known format has the columns {listed}",
        hint=f"known formats: {known}. Map other names with data.sources.columns, e.g. {{prompt: query}}",
    )


class Named(Protocol):
    """A way to write a row, by its name and the columns that it needs."""

    @property
    def name(self) -> str: ...
    @property
    def required(self) -> tuple[str, ...]: ...


Candidate = TypeVar("Candidate", bound=Named)


def by_name(
    name: str, candidates: Sequence[Candidate], columns: Collection[str], origin: str, purpose: str = ""
) -> Candidate:
    """The format that `data.sources.format` asks for. purpose: what it needs its columns for.

    Raises UserError for a name that no candidate has, and for columns that are not there.
    """
    known = {candidate.name: candidate for candidate in candidates}
    if name not in known:
        raise UserError(
            f"data.sources.format={name} is not known",
            hint=did_you_mean(name, known, f"one of {', '.join(known)}"),
        )
    missing = [column for column in known[name].required if column not in columns]
    if missing:
        raise UserError(
            f"{origin}: format {name} needs the columns {', '.join(missing)}{purpose}; "
            f"found {', '.join(sorted(columns)) or 'none'}",
            hint="map them with data.sources.columns, e.g. {prompt: query}",
        )
    return known[name]


def to_conversation(
    raw: RawExample, format: Format, columns_map: Mapping[str, str] | None = None
) -> Conversation:
    """The row as turns, or as plain text.

    Raises RowError: a missing column, an unknown role, no assistant turn, a content that is not a
    string, an empty assistant turn, a system turn that is not the first.
    """
    columns = cells.of_row(raw, columns_map or {})
    cells.require(columns, format.required, format.name)
    if format.name == "text":
        return Conversation((), cells.text(columns, "text", empty=False), raw.source, raw.place)
    turns, first_trained = format.read(columns)
    cells.check_turns(turns)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no assistant turn")
    return Conversation(turns, None, raw.source, raw.place, first_trained, cells.context(columns))


def messages(columns: Columns) -> tuple[Message, ...]:
    """The turns of OpenAI's `messages`."""
    return cells.behind_system(columns, cells.messages(columns, "messages"))


def sharegpt(columns: Columns) -> tuple[Message, ...]:
    """The turns of ShareGPT's `conversations`."""
    return cells.behind_system(columns, cells.messages(columns, "conversations"))


def instruction(columns: Columns) -> tuple[Message, ...]:
    """Alpaca's `instruction` and `input`, behind its `history`."""
    prompt = cells.text(columns, "instruction")
    if columns.get("input") not in (None, ""):
        prompt += "\n\n" + cells.text(columns, "input")
    return cells.behind_system(columns, (*cells.history(columns), Message("user", prompt)))


def _all_trained(read: Callable[[Columns], Turns]) -> Callable[[Columns], tuple[Turns, int]]:
    return lambda columns: (read(columns), 0)


def _alpaca(columns: Columns) -> tuple[Turns, int]:
    prompt = instruction(columns)
    return (*prompt, Message("assistant", cells.text(columns, "output"))), len(prompt)


def _pair(prompt: str, answer: str) -> Callable[[Columns], tuple[Turns, int]]:
    """Two columns: a prompt, and a string or an array of messages that continues it."""

    def read(columns: Columns) -> tuple[Turns, int]:
        before = cells.asked(columns, prompt)
        if before[-1].role == "assistant":
            raise RowError("the prompt ends with an assistant turn")
        if isinstance(columns[answer], list):
            return before + cells.messages(columns, answer), len(before)
        said = cells.text(columns, answer)
        in_transcript = isinstance(columns[prompt], str) and cells.is_transcript(str(columns[prompt]))
        return (*before, Message("assistant", said.strip() if in_transcript else said)), len(before)

    return read


def _no_turns(columns: Columns) -> tuple[Turns, int]:
    return (), 0


FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), ("system",), _all_trained(messages)),
    Format("conversations", ("conversations",), ("system",), _all_trained(sharegpt)),
    Format("instruction", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Format("prompt/completion", ("prompt", "completion"), ("system",), _pair("prompt", "completion")),
    Format("prompt/response", ("prompt", "response"), ("system",), _pair("prompt", "response")),
    Format("question/answer", ("question", "answer"), ("system",), _pair("question", "answer")),
    Format("text", ("text",), (), _no_turns),
)
"""Tried in this order; a row with both `messages` and `prompt` is read as messages."""

CHOSEN = Format("chosen", ("chosen", "rejected"), ("prompt", "system"), preferences.chosen_side)
"""The preferred side of preferences. Only ever asked for by name, never recognised."""
