"""What the cells of a row hold: strings, turns, transcripts, numbers, and what a template is given besides.

The formats of demonstrations (`formats.py`) and of preferences (`preferences.py`) are put together from
these. Every function takes a row and a column's name and raises `RowError` for a cell that holds
something else. Does not know which columns make a format.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from common.data import canonical
from common.data.canonical import kind
from common.data.outcomes import RowError
from common.data.types import Message, RawExample, TemplateContext

ROLES = ("system", "user", "assistant", "tool")

CALL_ROLE = "function_call"
"""ShareGPT's turn that holds a tool call and nothing else."""

ROLE_NAMES = {role: role for role in ROLES} | {
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    CALL_ROLE: "assistant",
    "observation": "tool",
    "function_response": "tool",
}

TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}

_TRANSCRIPT_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
"""What begins a turn of a transcript: a name at its very beginning, or below an empty line. A name in
the middle of a line is something that was said."""

CONTEXT_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that every format reads: what a template is given besides turns."""

STRUCTURED_COLUMNS = (
    *CONTEXT_COLUMNS,
    "messages",
    "conversations",
    "prompt",
    "question",
    "completion",
    "response",
    "answer",
    "chosen",
    "rejected",
)
"""Columns in which a null is a key that the row does not have, when a file of columns says it."""

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


def of_row(raw: RawExample, columns_map: Mapping[str, str]) -> Columns:
    """The row under our names, without the nulls that a file of columns made inside turns and tools."""
    columns = rename(raw.columns, columns_map)
    if not raw.columnar:
        return columns
    return {
        name: canonical.without_nulls(value) if name in STRUCTURED_COLUMNS else value
        for name, value in columns.items()
    }


def require(columns: Columns, required: Sequence[str], format_name: str) -> None:
    """RowError when one of the columns that the source's format needs is missing or null."""
    for column in required:
        if columns.get(column) is None:
            raise RowError(f"no {column} (the source's format is {format_name})")


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


def messages(columns: Columns, column: str) -> tuple[Message, ...]:
    """The list of turns in a column, or its JSON text: `role` and `content`, or `from` and `value` each."""
    value = columns[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = canonical.parsed(value, column)
    if not isinstance(value, list):
        raise RowError(f"{column} is not an array ({kind(value)})")
    return tuple(_turn(turn, f"{column}, turn {number}") for number, turn in enumerate(value, start=1))


def _turn(turn: object, where: str) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):  # so Parquet holds objects of any form
        turn = canonical.parsed(turn, where)
    if not isinstance(turn, dict):
        raise RowError(f"{where} is not an object ({kind(turn)})")
    role_key, content_key = (
        ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    )
    if role_key not in turn:
        raise RowError(f"{where} has no role (keys: {', '.join(turn) or 'none'})")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise RowError(f"{where}: unknown role {role!r} (known: {', '.join(ROLE_NAMES)})")
    # what a turn does not have is often written as null, in files of columns always
    extra: dict[str, Any] = {
        key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None
    }
    trained = _is_trained(extra, ROLE_NAMES[role], where)
    content = turn.get(content_key)
    if role == CALL_ROLE:
        content, extra["tool_calls"] = None, content
    if legacy := extra.pop("function_call", None):
        extra["tool_calls"] = legacy
    # templates ask whether the key is there, so an empty list is none
    if calls := canonical.calls(extra.pop("tool_calls", None) or [], f"{where}: tool_calls"):
        extra["tool_calls"] = calls
        content = "" if content is None else content
    elif content_key not in turn:
        raise RowError(f"{where} has no {content_key} (keys: {', '.join(turn) or 'none'})")
    said = canonical.words(content, f"{where}: {content_key}")
    return Message(ROLE_NAMES[role], said, canonical.reasoning(extra, where), trained)


def _is_trained(extra: dict[str, Any], role: str, where: str) -> bool:
    """Whether the turn is trained, by its `weight` and `train`. Removes both: no template may read them."""
    weight, train = extra.pop("weight", 1), extra.pop("train", role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{where}: weight is {weight!r}: a turn is trained (1) or not (0)")
    if not isinstance(train, bool):
        raise RowError(f"{where}: train is not a boolean ({kind(train)})")
    if train and role != "assistant":
        raise RowError(f"{where}: train is true, and only assistant turns are trained, not a {role} turn")
    return bool(weight) and (train or role != "assistant")


def asked(columns: Columns, name: str, *, empty: bool = True) -> tuple[Message, ...]:
    """The prompt in a column, at least one turn: a list of messages, a transcript, or the user's text.

    The column `system` is the first turn.
    """
    if isinstance(columns[name], list):
        found = messages(columns, name)
    elif is_transcript(said := text(columns, name, empty=empty)):
        found = _without_cue(transcript(said))
    else:
        found = (Message("user", said),)
    if not found:
        raise RowError(f"{name} has no turns")
    return behind_system(columns, found)


def _without_cue(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """A transcript's prompt often ends with "Assistant:", for the model to go on from there."""
    return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns


def behind_system(columns: Columns, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns behind the turn of the column `system`, if any; they may begin with that turn already."""
    if columns.get("system") in (None, ""):
        return turns
    said = text(columns, "system")
    if turns and turns[0].role == "system":
        if turns[0].content.strip() != said.strip():
            raise RowError("the column system and the first turn, a system turn too, say different things")
        return turns
    return (Message("system", said), *turns)


def history(columns: Columns) -> tuple[Message, ...]:
    """Alpaca's `history`: earlier questions with their answers, as pairs."""
    found = canonical.parsed(columns.get("history") or [], "history")
    if not isinstance(found, list):
        raise RowError(f"history is not an array ({kind(found)})")
    before: list[Message] = []
    for number, pair in enumerate(found, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise RowError(f"history, number {number}, is not a pair of a question and an answer")
        before += (Message("user", pair[0]), Message("assistant", pair[1]))
    return tuple(before)


def context(columns: Columns) -> TemplateContext:
    """What the row gives a template besides its turns."""
    return TemplateContext(
        canonical.tools(columns.get("tools")), canonical.variables(columns.get("chat_template_kwargs"))
    )


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
