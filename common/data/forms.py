"""Which form of contents and calls a chat template takes, found by rendering made-up turns.

Rows are held in one form (`canonical.py`). Some templates want arguments of calls as text, calls without
their wrapper, or contents as a list of parts. Given another form they silently write something else, or
nothing. A form is taken when a mark in the field appears in the text as it should. (Reasoning has three
names; transformers passes it under the names that a template reads.) Does not render itself, and does not
decide about a row that no form fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.data.types import Message

Turn = dict[str, Any]
Render = Callable[[list[Turn]], str]
"""Turns to text; the empty string when the template refuses them."""

MARK, NAME, KEY = "zqvalueqz", "zqnameqz", "zqkeyqz"


@dataclass(frozen=True)
class Forms:
    """What a template takes; the fields' values are the canonical form.

    parts: contents as `[{"type": "text", "text": ...}]`. bare_calls: calls without the wrapper `function`.
    text_arguments: arguments of calls as JSON text.
    """

    parts: bool = False
    bare_calls: bool = False
    text_arguments: bool = False

    def turn(self, message: Message) -> Turn:
        """The turn as the template is given it."""
        extra = dict(message.extra)
        content = [{"type": "text", "text": message.content}] if self.parts else message.content
        if isinstance(calls := extra.get("tool_calls"), list | tuple):
            extra["tool_calls"] = [self._call(call) for call in calls]
        return {**extra, "role": message.role, "content": content}

    def _call(self, call: Any) -> Any:
        if not (self.bare_calls or self.text_arguments):
            return call
        function = dict(call["function"])
        if self.text_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, **function} if self.bare_calls else {**call, "function": function}


def find(render: Render) -> Forms:
    """The forms that a template takes; the canonical one of a field that it does not write in any."""
    contents = [Forms(parts) for parts in (False, True)]
    found = _first(contents, _shows_content, render)
    calls = [replace(found, bare_calls=bare, text_arguments=text) for bare in _EITHER for text in _EITHER]
    return _first(calls, _shows_call, render)


def a_call(forms: Forms) -> list[Turn]:
    """A question and a turn that says nothing and calls, as the template is given them."""
    function = {"name": NAME, "arguments": {KEY: MARK}}
    call = {"id": "zqcallqz1", "type": "function", "function": function}
    return [forms.turn(Message("user", "b")), forms.turn(Message("assistant", "", {"tool_calls": [call]}))]


_EITHER = (False, True)


def _first(candidates: Sequence[Forms], shows: Callable[[Forms, Render], bool], render: Render) -> Forms:
    return next((forms for forms in candidates if shows(forms, render)), candidates[0])


def _shows_content(forms: Forms, render: Render) -> bool:
    return MARK in render([forms.turn(Message("user", "b")), forms.turn(Message("assistant", MARK))])


def _shows_call(forms: Forms, render: Render) -> bool:
    """Neither as Python would print the arguments, nor encoded twice."""
    arguments = {KEY: MARK}
    text = render(a_call(forms))
    twice = json.dumps(json.dumps(arguments))[1:-1]
    return NAME in text and MARK in text and str(arguments) not in text and twice not in text
