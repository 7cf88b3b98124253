"""The one form in which rows' structured fields are held: contents, tool calls, tool definitions, variables.

Rows write them in several ways (JSON text or objects, with or without a wrapper, a content in parts), and
files of columns fill what a row does not have with null. Which form a chat template takes is found out where
it is rendered (`forms.py`). Raises `RowError`, which names the place in the row. Knows no columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.data.outcomes import RowError
from common.data.strict_json import strict_json

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What rows and templates call the reasoning before an answer; here it is the first."""

RESERVED_VARIABLES = (
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)
"""What a template is given by the renderer, so that a row cannot set it."""


def kind(value: object) -> str:
    """The JSON type of a value, in words for a message."""
    kinds = {type(None): "null", dict: "an object", list: "an array", bool: "a boolean"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth; elements of arrays stay."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def words(content: object, where: str) -> str:
    """The text of a content: a string, or an array of parts of type text, which are joined."""
    if isinstance(content, list):
        return "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1))
    if not isinstance(content, str):
        raise RowError(f"{where} is not a string ({kind(content)})")
    return content


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise RowError(f"{where} is not an object ({kind(part)})")
    if part.get("type") != "text":
        raise RowError(f"{where} is of type {part.get('type')}: only parts of type text can be trained on")
    return words(part.get("text"), f"{where}: text")


def calls(value: object, where: str) -> list[dict[str, Any]]:
    """Tool calls as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with ids as given.

    value: an array of calls or one call, each with or without the wrapper, as objects or JSON text.
    """
    found = parsed(value, where)
    listed = found if isinstance(found, list) else [found]
    return [_call(call, f"{where}, call {number}") for number, call in enumerate(listed, start=1)]


def _call(value: object, where: str) -> dict[str, Any]:
    call = _object(value, where)
    wrapped = isinstance(call.get("function"), dict | str)
    function = _object(call["function"], where) if wrapped else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"{where} has no name (keys: {', '.join(function) or 'none'})")
    if "arguments" not in function and set(function) - {"name", "id", "type"}:
        raise RowError(f"{where} has no arguments (keys: {', '.join(function)})")
    # null and nothing are how a call without arguments is written
    arguments = function.get("arguments") or {}
    around = {key: call[key] for key in call if key not in ("name", "arguments", "type", "function")}
    around = {key: inner for key, inner in around.items() if inner is not None}
    inside = {"name": name, "arguments": _object(arguments, f"{where}: arguments")}
    return {**around, "type": "function", "function": inside}


def tools(value: object) -> tuple[Mapping[str, object], ...]:
    """Tool definitions as `{"type": "function", "function": {...}}`.

    value: an array of definitions or one, each with or without the wrapper, as objects or JSON text; null and
    nothing mean none.
    """
    found = parsed(value, "tools") if value != "" else None
    if found in (None, []):
        return ()
    listed = found if isinstance(found, list) else [found]
    return tuple(_tool(tool, f"tools, number {number}") for number, tool in enumerate(listed, start=1))


def _tool(value: object, where: str) -> Mapping[str, object]:
    tool = _object(value, where)
    if isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool.get("name"), str):
        raise RowError(f"{where} is no tool definition: it has no name (keys: {', '.join(tool) or 'none'})")
    return {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}


def variables(value: object) -> Mapping[str, object]:
    """The template's variables of a row: an object or its JSON text; null and nothing mean none."""
    if value in (None, ""):
        return {}
    found = _object(value, "chat_template_kwargs")
    for name in RESERVED_VARIABLES:
        if name in found:
            raise RowError(f"chat_template_kwargs sets {name}, which is set by what the row says")
    return found


def reasoning(extra: Mapping[str, object], where: str) -> dict[str, object]:
    """A turn's fields other than role and content, with its reasoning under one name."""
    said = {key: words(extra[key], f"{where}: {key}") for key in REASONING_KEYS if extra.get(key) is not None}
    if len(set(said.values())) > 1:
        raise RowError(f"{where}: {' and '.join(said)} say different things")
    others = {key: value for key, value in extra.items() if key not in said}
    text = next(iter(said.values()), "")
    # templates ask whether the key is there, so an empty text is none
    return {**others, REASONING_KEYS[0]: text} if text else others


def parsed(value: object, where: str) -> Any:
    """The value; of a string the JSON that it holds."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RowError as error:
        raise RowError(f"{where}: {error}") from error


def _object(value: object, where: str) -> dict[str, Any]:
    found = parsed(value, where)
    if not isinstance(found, dict):
        raise RowError(f"{where} is not an object ({kind(found)})")
    return found
