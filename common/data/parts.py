"""Which parts of a row a chat template leaves out: words, reasoning, calls, results, definitions of tools.

A part is left out when a mark in its place is missing from the rendered text (looked up once for each shape
of conversation), or when its own words are missing from its trained turn. Reasoning of earlier turns may be
left out: a template may take it out of history, and then the model in use does not see it either. Does not
decide about the row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.chat_template import RenderError
from common.data.canonical import REASONING_KEYS
from common.data.render import ChatTemplate, render
from common.data.types import Message, TemplateContext

START_OF_REASONING, END_OF_REASONING = "<think>", "</think>"

WAY_OUT = "; model.chat_template=chatml writes every part"


def left_out_of_turn(turn: Message, text: str) -> str | None:
    """Which part of an assistant turn is missing from `text`: "words", "reasoning", or None."""
    inside, words = split_reasoning(turn.content)
    for name, part in (("words", words), ("reasoning", inside), ("reasoning", reasoning_of(turn))):
        if not _says(text, part):
            return name
    return None


def left_out_by_template(
    messages: Sequence[Message],
    context: TemplateContext,
    template: ChatTemplate,
    *,
    prompt: bool = False,
    apart: bool = False,
) -> str | None:
    """The first part of these turns, or of the tools, that the template leaves out; None when it writes all.

    prompt: render through the generation prompt; otherwise the last turn is a trained one. apart: check that
    turn alone, because it is put behind its prompt without the template.
    """
    parts: list[_Part] = []
    shape = [_marked(message, number, parts) for number, message in enumerate(messages)]
    last = len(messages) - 1
    trained = None if prompt or apart else last
    parts = [part for part in parts if part.must_stay or part.turn == trained]
    tools = [_marked_tool(tool, number, parts) for number, tool in enumerate(context.tools)]
    if apart:
        parts = [part for part in parts if part.turn == last]
    turns = [[message.role, message.content, message.extra] for message in shape]
    key = json.dumps([turns, tools, context.variables], default=str)
    return _left_out_of_shape(key, tuple(parts), template, prompt)


def headers_of_turn(
    messages: Sequence[Message], context: TemplateContext, template: ChatTemplate, header: str, written: str
) -> int:
    """How often the template writes a header for the last turn; 0 when it does not begin with one.

    written: all of the turns as rendered. Also 0 when it has fewer or more headers than the same turns with
    marks: then nothing tells which headers belong to the last turn.
    """
    parts: list[_Part] = []
    shape = [_marked(message, number, parts) for number, message in enumerate(messages)]
    try:
        text, _ = render(shape, template, context)
    except RenderError:
        return 0
    if text.count(header) != written.count(header):
        return 0
    marks = [at for part in parts if part.turn == len(messages) - 1 and (at := text.find(part.mark)) >= 0]
    begin = text.rfind(header, 0, min(marks, default=0))
    return text.count(header, begin) if begin >= 0 else 0


@functools.lru_cache(maxsize=4096)
def _left_out_of_shape(
    key: str, parts: tuple[_Part, ...], template: ChatTemplate, prompt: bool
) -> str | None:
    turns, tools, variables = json.loads(key)
    messages = [Message(*turn) for turn in turns]
    try:
        text, _ = render(messages, template, TemplateContext(tuple(tools), variables), prompt=prompt)
    except RenderError:
        return None  # the marks are to blame: the row itself was rendered
    return next((part.name for part in parts if part.mark not in text), None)


def split_reasoning(content: str) -> tuple[str, str]:
    """Reasoning inside a content, without its tags, and the words behind it."""
    inside, end, words = content.rpartition(END_OF_REASONING)
    return (
        (inside.replace(START_OF_REASONING, "").replace(END_OF_REASONING, ""), words)
        if end
        else ("", content)
    )


def reasoning_of(turn: Message) -> str:
    """A turn's reasoning in a field of its own; empty when there is none."""
    found = (turn.extra.get(name) for name in REASONING_KEYS)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")


def joined(reasoning: str, words: str) -> str:
    """Reasoning and words as one content."""
    inside = f"{START_OF_REASONING}\n{reasoning.strip()}\n{END_OF_REASONING}"
    return f"{inside}\n\n{words}"


def _says(text: str, part: str) -> bool:
    """Whether the part stands in the text: as it is, as JSON writes it, or word for word in this order."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    at = 0
    for word in part.split():
        at = text.find(word, at) + len(word)
        if at < len(word):
            return False
    return True


# marks


class _Part(NamedTuple):
    """A mark and the part that it replaces.

    turn: index of the turn; -1 for tools. must_stay: whether the template must also write it in history.
    """

    mark: str
    name: str
    turn: int
    must_stay: bool = True


def _marked(message: Message, turn: int, parts: list[_Part]) -> Message:
    """The message with a mark in place of each part; each replaced part is added to `parts`."""
    if message.role != "assistant":
        name = "a tool's result" if message.role == "tool" else f"the words of a {message.role} turn"
        content = _mark(parts, name, turn) if message.content.strip() else ""
        return Message(message.role, content, message.extra)
    extra = dict(message.extra)
    calls = extra.get("tool_calls")
    inside, words = split_reasoning(message.content)
    content = _mark(parts, "an assistant turn's words", turn, not calls) if words.strip() else ""
    if inside.strip():
        inner = _mark(parts, "an assistant turn's reasoning", turn, False)
        content = joined(inner, content)
    if reasoning_of(message):
        made = _mark(parts, "an assistant turn's reasoning", turn, False)
        extra |= {name: made for name in REASONING_KEYS if extra.get(name)}
    if isinstance(calls, list | tuple):
        extra["tool_calls"] = [_marked_call(call, turn, parts) for call in calls]
    return Message("assistant", content, extra)


def _marked_call(call: Any, turn: int, parts: list[_Part]) -> Any:
    """A call with a mark for its name and for each argument."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], turn, parts)}
    marked = dict(call)
    if "name" in call:
        marked["name"] = _mark(parts, "an assistant turn's tool calls", turn)
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        marked["arguments"] = {name: _mark(parts, _ARGUMENTS, turn) for name in arguments}
    elif isinstance(arguments, str) and arguments.strip(" {}"):
        marked["arguments"] = json.dumps({"a": _mark(parts, _ARGUMENTS, turn)})
    return marked


_ARGUMENTS = "the arguments of an assistant turn's tool calls"


def _marked_tool(tool: Mapping[str, Any], number: int, parts: list[_Part]) -> Mapping[str, Any]:
    inner = tool.get("function")
    if isinstance(inner, Mapping):
        return {**tool, "function": _marked_tool(inner, number, parts)}
    return {**tool, "name": _mark(parts, "the definitions of tools", -1)}


def _mark(parts: list[_Part], name: str, turn: int, must_stay: bool = True) -> str:
    """A word that nobody writes, and that no template has to escape."""
    mark = f"zqx{len(parts)}xqz"
    parts.append(_Part(mark, name, turn, must_stay))
    return mark
