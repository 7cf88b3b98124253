"""What the cells of a row hold: strings, lists of turns, transcripts, numbers.

The formats of demonstrations (`formats.py`) and of preferences (`preferences.py`) are put together from
these. Every function takes a row and a column's name and raises `RowError` for a cell that holds
something else. Does not know which columns make a format.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence

from common.data.sources import RowError
from common.data.types import Message

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

TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}

_TRANSCRIPT_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
"""What begins a turn of a transcript: a name at its very beginning, or below an empty line. A name in
the middle of a line is something that was said."""

Columns = Mapping[str, object]


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


def require(columns: Columns, required: Sequence[str], format_name: str) -> None:
    """RowError when one of the columns that the source's format needs is missing or null."""
    for column in required:
        if columns.get(column) is None:
            raise RowError(f"no {column} (the source's format is {format_name})")


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    kinds = {type(None): "null", dict: "an object", list: "an array", bool: "a boolean"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def text(columns: Columns, name: str, *, empty: bool = True) -> str:
    """The string in a column; with `empty=False` it must say something."""
    value = columns[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is not a string ({kind(value)})")
    if not empty and not value.strip():
        raise RowError(f"{name} is empty")
    return value


def number(columns: Columns, name: str) -> float:
    """The finite number in a column; CSV files write it as a string."""
    value = columns[name]
    found = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            found = float(value)
    if not math.isfinite(found):
        shown = f"{value!r:.40}" if isinstance(value, str | float) else kind(value)
        raise RowError(f"{name} is not a finite number ({shown})")
    return found


def turns(
    columns: Columns, column: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[Message, ...]:
    """The list of turns in a column. `roles`: what the roles found there are called here."""
    value = columns[column]
    if not isinstance(value, list):
        raise RowError(f"{column} is not an array ({kind(value)})")
    return tuple(
        _turn(turn, f"{column}, turn {number}", role_key, content_key, roles)
        for number, turn in enumerate(value, start=1)
    )


def messages(columns: Columns, column: str) -> tuple[Message, ...]:
    """The list of turns in a column, written as OpenAI's `role` and `content`."""
    return turns(columns, column, "role", "content", OPENAI_ROLES)


def _turn(turn: object, where: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is not an object ({kind(turn)})")
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
        raise RowError(f"{where}: {content_key} is not a string ({kind(content)})")
    return Message(roles[role], content, extra)


def system(columns: Columns) -> tuple[Message, ...]:
    """The system turn in the column of that name; none when it is missing or empty."""
    if columns.get("system") in (None, ""):
        return ()
    return (Message("system", text(columns, "system")),)


def is_transcript(value: str) -> bool:
    """Whether a string begins with "Human:" or "Assistant:", behind white space at the most."""
    return re.match(r"\s*(Human|Assistant):", value) is not None


def transcript(value: str) -> tuple[Message, ...]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", without the white space around each."""
    _, *parts = _TRANSCRIPT_TURN.split(value)
    return tuple(
        Message(TRANSCRIPT_ROLES[name], said.strip())
        for name, said in zip(parts[0::2], parts[1::2], strict=True)
    )


def says_nothing(message: Message) -> bool:
    """Whether a turn has neither words nor anything else a template would write."""
    has_other = any(message.extra.get(key) for key in ("tool_calls", "reasoning_content"))
    return not message.content.strip() and not has_other


def check_turns(turns: Sequence[Message], *, may_be_empty: int | None = None) -> None:
    """RowError for a system turn that is not the first and for an assistant turn that says nothing.

    may_be_empty: index of the one turn that is allowed to say nothing.
    """
    for index, message in enumerate(turns):
        if message.role == "system" and index > 0:
            raise RowError(f"turn {index + 1}: a system turn can only be the first")
        if message.role == "assistant" and says_nothing(message) and index != may_be_empty:
            raise RowError(f"turn {index + 1}: the assistant turn is empty")
