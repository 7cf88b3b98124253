"""Each template is given contents, calls and reasoning in the form that it writes."""

from __future__ import annotations

from typing import Any

import pytest

from common.data import forms
from common.data.forms import Forms, find
from common.data.types import Message
from tests import field_templates
from tests.tiny import CHATML

CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Århus"}}}


def rendering(template: str) -> forms.Render:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(turns: list[dict[str, Any]]) -> str:
        try:
            return render_jinja_template([turns], chat_template=template, bos_token="<s>", eos_token="</s>")[
                0
            ][0]
        except (jinja2.TemplateError, TypeError):
            return ""

    return render


TO_JSON = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "taken"),
    [
        (CHATML, Forms()),
        (TO_JSON, Forms()),
        (field_templates.TEXT_ARGUMENTS, Forms(text_arguments=True)),
        (field_templates.PYTHON_ARGUMENTS, Forms(bare_calls=True, text_arguments=True)),
        (field_templates.PARTS, Forms(parts=True)),
        (field_templates.CHANNELS, Forms()),
        (field_templates.DROPS_EARLIER_REASONING, Forms()),
    ],
)
def test_a_template_tells_by_a_mark_which_form_it_takes(template: str, taken: Forms) -> None:
    assert find(rendering(template)) == taken


def test_a_turn_is_written_in_the_form_taken() -> None:
    message = Message("assistant", "a", {"tool_calls": [CALL], "reasoning_content": "hm", "name": "x"})
    canonical = {
        "role": "assistant",
        "content": "a",
        "tool_calls": [CALL],
        "reasoning_content": "hm",
        "name": "x",
    }
    assert Forms().turn(message) == canonical
    arguments = '{"city": "Århus"}'
    assert Forms(True, False, True).turn(message) == {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}],
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        ],
        "reasoning_content": "hm",
        "name": "x",
    }
    (bare,) = Forms(bare_calls=True).turn(message)["tool_calls"]
    assert bare["name"] == "weather" and bare["arguments"] == {"city": "Århus"} and bare["id"] == "c"
