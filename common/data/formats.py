"""RawExample -> Conversation: what the columns of a row mean.

A format is a name, the columns it needs and a function; `FORMATS` lists them in the order in which
they are tried. A source's format is recognised once, from its first row; a later row without the
columns is a bad row. Raises `RowError` for what is wrong with one row, `UserError` for a source
that cannot be understood at all. Knows nothing of tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.data.sources import RowError
from common.data.types import Conversation, Message, RawExample
from common.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

OPENAI_ROLES = {role: role for role in ROLES} | {"developer": "system"}

SHAREGPT_ROLES = OPENAI_ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

Columns = Mapping[str, object]


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
            hint="name rows with one answer each, e.g. prompt and completion",
        )
    known = "; ".join(f"{candidate.name}: {', '.join(candidate.required)}" for candidate in FORMATS)
    raise UserError(
        f"{origin}: no known format has the columns {listed}",
        hint=f"known formats: {known}. Map other names with data.sources.columns, e.g. {{prompt: query}}",
    )


def _named(name: str, found: set[str], listed: str, origin: str) -> Format:
    by_name = {candidate.name: candidate for candidate in FORMATS}
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


def rename(columns: Columns, columns_map: Mapping[str, str]) -> Columns:
    """The row under our names, as `columns` of the source says ({ours: theirs}); the rest unchanged."""
    if not columns_map:
        return columns
    theirs = set(columns_map.values())
    renamed = {name: value for name, value in columns.items() if name not in theirs}
    for ours, name in columns_map.items():
        if name not in columns:
            raise RowError(f"no column {name} (columns: {', '.join(columns) or 'none'})")
        renamed[ours] = columns[name]
    return renamed


def to_conversation(
    raw: RawExample, format: Format, columns_map: Mapping[str, str] | None = None
) -> Conversation:
    """The row as turns, or as plain text.

    Raises RowError: a missing column, an unknown role, no assistant turn, a content that is not a
    string, an empty assistant turn, a system turn that is not the first.
    """
    columns = rename(raw.columns, columns_map or {})
    for column in format.required:
        if column not in columns or columns[column] is None:
            raise RowError(f"no {column} (the source's format is {format.name})")
    if format.name == "text":
        return Conversation((), _text(columns, "text", empty=False), raw.source, raw.place)
    messages = format.read(columns)
    _check_turns(messages)
    return Conversation(messages, None, raw.source, raw.place)


def _check_turns(messages: tuple[Message, ...]) -> None:
    for number, message in enumerate(messages, start=1):
        if message.role == "system" and number > 1:
            raise RowError(f"turn {number}: a system turn can only be the first")
        has_other = any(message.extra.get(key) for key in ("tool_calls", "reasoning_content"))
        if message.role == "assistant" and not message.content.strip() and not has_other:
            raise RowError(f"turn {number}: the assistant turn is empty")
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no assistant turn")


def _text(columns: Columns, name: str, *, empty: bool = True) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string ({_kind(value)})")
    if not empty and not value.strip():
        raise RowError(f"{name} is empty")
    return value


def _kind(value: object) -> str:
    kinds = {type(None): "null", dict: "an object", list: "an array", bool: "a boolean"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _turns(
    columns: Columns, column: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[Message, ...]:
    turns = columns[column]
    if not isinstance(turns, list):
        raise RowError(f"{column} is not an array ({_kind(turns)})")
    return tuple(
        _turn(turn, f"{column}, turn {number}", role_key, content_key, roles)
        for number, turn in enumerate(turns, start=1)
    )


def _turn(turn: object, where: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is not an object ({_kind(turn)})")
    for key in (role_key, content_key):
        if key not in turn:
            raise RowError(f"{where} has no {key} (keys: {', '.join(turn) or 'none'})")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"{where}: unknown role {role!r} (known: {', '.join(roles)})")
    # columnar files fill what a turn does not have with null
    extra = {
        key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None
    }
    content = turn[content_key]
    if content is None and extra.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where}: {content_key} is not a string ({_kind(content)})")
    return Message(roles[role], content, extra)


def _messages(columns: Columns) -> tuple[Message, ...]:
    return _turns(columns, "messages", "role", "content", OPENAI_ROLES)


def _sharegpt(columns: Columns) -> tuple[Message, ...]:
    turns = _turns(columns, "conversations", "from", "value", SHAREGPT_ROLES)
    return _system(columns) + turns


def _system(columns: Columns) -> tuple[Message, ...]:
    if columns.get("system") in (None, ""):
        return ()
    return (Message("system", _text(columns, "system")),)


def _alpaca(columns: Columns) -> tuple[Message, ...]:
    prompt = _text(columns, "instruction")
    if columns.get("input") not in (None, ""):
        prompt += "\n\n" + _text(columns, "input")
    return (*_system(columns), Message("user", prompt), Message("assistant", _text(columns, "output")))


def _pair(prompt: str, answer: str) -> Callable[[Columns], tuple[Message, ...]]:
    """Two columns; both strings, or both arrays of messages."""

    def read(columns: Columns) -> tuple[Message, ...]:
        if isinstance(columns[prompt], list) and isinstance(columns[answer], list):
            first = _turns(columns, prompt, "role", "content", OPENAI_ROLES)
            return first + _turns(columns, answer, "role", "content", OPENAI_ROLES)
        asked = Message("user", _text(columns, prompt))
        return (*_system(columns), asked, Message("assistant", _text(columns, answer)))

    return read


def _no_turns(columns: Columns) -> tuple[Message, ...]:
    return ()


FORMATS: tuple[Format, ...] = (
    Format("messages", ("messages",), (), _messages),
    Format("conversations", ("conversations",), ("system",), _sharegpt),
    Format("instruction", ("instruction", "output"), ("input", "system"), _alpaca),
    Format("prompt/completion", ("prompt", "completion"), ("system",), _pair("prompt", "completion")),
    Format("prompt/response", ("prompt", "response"), ("system",), _pair("prompt", "response")),
    Format("question/answer", ("question", "answer"), ("system",), _pair("question", "answer")),
    Format("text", ("text",), (), _no_turns),
)
"""Tried in this order; a row with both `messages` and `prompt` is read as messages."""
