"""RawExample -> Conversation: what the columns of a row with one answer mean.

A format is a name, the columns it needs and a function; `FORMATS` lists them in the order in which
they are tried. A source's format is recognised once, from its first row; a later row without the
columns is a bad row. Raises `RowError` for what is wrong with one row, `UserError` for a source
that cannot be understood at all. Rows with two answers are read in `preferences.py`, prompts
alone in `prompts.py`. Knows nothing of
tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.data import columns as cells
from common.data import preferences
from common.data.columns import SHAREGPT_ROLES, Columns
from common.data.sources import RowError
from common.data.types import Conversation, Message, RawExample
from common.errors import UserError


@dataclass(frozen=True)
class Format:
    """A way to write a row: columns it needs, columns it may have, and how it is read."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Columns], tuple[Message, ...]]  # not called for plain text


def recognise(columns: Iterable[str], *, name: str | None = None, origin: str = "data") -> Format:
    """The format of rows with these columns (already renamed), or the one asked for by `name`.

    Raises UserError naming `origin` and the columns found when none fits.
    """
    found = set(columns)
    listed = ", ".join(sorted(found)) or "none"
    if name is not None:
        return _named(name, found, listed, origin)
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


def _named(name: str, found: set[str], listed: str, origin: str) -> Format:
    by_name = {candidate.name: candidate for candidate in (*FORMATS, CHOSEN)}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        raise UserError(
            f"data.sources.format={name} is not known",
            hint=f"did you mean {near[0]}?" if near else f"one of {', '.join(by_name)}",
        )
    missing = [column for column in by_name[name].required if column not in found]
    if missing:
        raise UserError(
            f"{origin}: format {name} needs the columns {', '.join(missing)}; found {listed}",
            hint="map them with data.sources.columns, e.g. {prompt: query}",
        )
    return by_name[name]


def to_conversation(
    raw: RawExample, format: Format, columns_map: Mapping[str, str] | None = None
) -> Conversation:
    """The row as turns, or as plain text.

    Raises RowError: a missing column, an unknown role, no assistant turn, a content that is not a
    string, an empty assistant turn, a system turn that is not the first.
    """
    columns = cells.rename(raw.columns, columns_map or {})
    cells.require(columns, format.required, format.name)
    if format.name == "text":
        return Conversation((), cells.text(columns, "text", empty=False), raw.source, raw.place)
    first_trained = 0
    if format is CHOSEN:
        turns, first_trained = preferences.chosen_side(columns)
    else:
        turns = format.read(columns)
    cells.check_turns(turns)
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError("no assistant turn")
    return Conversation(turns, None, raw.source, raw.place, first_trained)


def messages(columns: Columns) -> tuple[Message, ...]:
    """The turns of OpenAI's `messages`."""
    return cells.messages(columns, "messages")


def sharegpt(columns: Columns) -> tuple[Message, ...]:
    """The turns of ShareGPT's `conversations`, behind the column `system` if there is one."""
    turns = cells.turns(columns, "conversations", "from", "value", SHAREGPT_ROLES)
    return cells.system(columns) + turns


def instruction(columns: Columns) -> tuple[Message, ...]:
    """What Alpaca's `instruction` and `input` ask."""
    prompt = cells.text(columns, "instruction")
    if columns.get("input") not in (None, ""):
        prompt += "\n\n" + cells.text(columns, "input")
    return (*cells.system(columns), Message("user", prompt))


def question(columns: Columns, name: str) -> tuple[Message, ...]:
    """What a column asks: a string, or an array of messages, which has its own system turn if any."""
    if isinstance(columns[name], list):
        return cells.messages(columns, name)
    return (*cells.system(columns), Message("user", cells.text(columns, name)))


def _alpaca(columns: Columns) -> tuple[Message, ...]:
    return (*instruction(columns), Message("assistant", cells.text(columns, "output")))


def _pair(prompt: str, answer: str) -> Callable[[Columns], tuple[Message, ...]]:
    """Two columns; both strings, or both arrays of messages."""

    def read(columns: Columns) -> tuple[Message, ...]:
        if isinstance(columns[prompt], list) and isinstance(columns[answer], list):
            return question(columns, prompt) + cells.messages(columns, answer)
        asked = Message("user", cells.text(columns, prompt))
        return (*cells.system(columns), asked, Message("assistant", cells.text(columns, answer)))

    return read


def _no_turns(columns: Columns) -> tuple[Message, ...]:
    return ()


FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), (), messages),
    Format("conversations", ("conversations",), ("system",), sharegpt),
    Format("instruction", ("instruction", "output"), ("input", "system"), _alpaca),
    Format("prompt/completion", ("prompt", "completion"), ("system",), _pair("prompt", "completion")),
    Format("prompt/response", ("prompt", "response"), ("system",), _pair("prompt", "response")),
    Format("question/answer", ("question", "answer"), ("system",), _pair("question", "answer")),
    Format("text", ("text",), (), _no_turns),
)
"""Tried in this order; a row with both `messages` and `prompt` is read as messages."""

CHOSEN = Format("chosen", ("chosen", "rejected"), ("prompt", "system"), _no_turns)
"""The preferred side of preferences. Only ever asked for by name, never recognised."""
