"""conf/chat_template/chatml.jinja writes every part of a row, and plain conversations as it always did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.parts import left_out_by_template
from common.data.render import read_template
from common.data.types import Message, TemplateContext
from tests.tiny import tiny_tokenizer

CHATML = (Path(__file__).parents[3] / "conf" / "chat_template" / "chatml.jinja").read_text()
SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": " a\n"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Århus"}}}
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Århus"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city"}}


def rendered(messages: list[dict[str, Any]], *, prompt: bool = False, **given: Any) -> tuple[str, list[str]]:
    """The text, and the parts of it that the assistant wrote."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [messages],
        chat_template=CHATML,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=True,
        **given,
    )
    return texts[0], [texts[0][start:end] for start, end in spans[0]]


@pytest.mark.parametrize("more", [{}, {"tools": None}, {"tools": []}])
def test_a_plain_conversation_is_written_turn_by_turn_as_it_is(more: dict[str, Any]) -> None:
    text, written = rendered([SYSTEM, USER, ANSWER, USER], prompt=True, **more)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n a\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert written == [" a\n<|im_end|>"]


def test_a_bos_token_is_written_once_unless_it_is_the_eos_token_too() -> None:
    assert rendered([USER], bos_token="<s>", eos_token="</s>")[0].startswith("<s><|im_start|>user")
    assert rendered([USER], bos_token="<s>", eos_token="<s>")[0].startswith("<|im_start|>user")


@pytest.mark.parametrize("system", [[SYSTEM], []])
def test_tools_stand_in_the_system_turn(system: list[dict[str, Any]]) -> None:
    text, _ = rendered([*system, USER], tools=[TOOL, TOOL], prompt=True)
    first, _, rest = text.partition("<|im_end|>\n")
    assert rest == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert first.startswith("<|im_start|>system\ns\n\nYou" if system else "<|im_start|>system\nYou")
    assert f"<tools>\n{json.dumps(TOOL)}\n{json.dumps(TOOL)}\n</tools>" in first


def test_words_reasoning_and_every_call_are_the_assistants() -> None:
    turn = {**ANSWER, "content": "Wait.", "reasoning_content": "hm", "tool_calls": [CALL, CALL]}
    whole = f"<think>\nhm\n</think>\n\nWait.\n{WRITTEN_CALL}\n{WRITTEN_CALL}<|im_end|>"
    assert rendered([USER, turn])[1] == [whole]
    assert rendered([USER, turn, USER, ANSWER])[1] == [whole, " a\n<|im_end|>"]  # history keeps its reasoning
    assert rendered([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}])[1] == [
        f"{WRITTEN_CALL}<|im_end|>"
    ]


def test_what_a_tool_said_is_marked_once() -> None:
    result = "<|im_start|>tool\n<tool_response>\n3 degrees\n</tool_response><|im_end|>\n"
    for content in ("3 degrees", "<tool_response>\n3 degrees\n</tool_response>"):
        turns = [USER, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": content}, ANSWER]
        assert f"{result}<|im_start|>assistant" in rendered(turns)[0]


def test_arguments_that_are_text_are_not_quoted_again() -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Århus"}'}}
    assert rendered([USER, {**ANSWER, "content": "", "tool_calls": [call]}])[1] == [
        f"{WRITTEN_CALL}<|im_end|>"
    ]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("words", ["", "a", "<think>\nhm\n</think>\n\na"])
@pytest.mark.parametrize("more", [{}, {"reasoning_content": "hm"}])
@pytest.mark.parametrize("calls", [[], [CALL], [CALL, CALL]])
def test_no_part_of_a_row_is_left_out_so_that_a_hint_may_name_it(
    prompt: bool, words: str, more: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    said = Message("assistant", words, {**more, **({"tool_calls": calls} if calls else {})})
    turns = [Message("system", "s"), Message("user", "q"), said, Message("tool", "r")]
    template = read_template(tiny_tokenizer(CHATML))
    context = TemplateContext((TOOL,))
    assert left_out_by_template(turns[: 4 if prompt else 3], context, template, prompt=prompt) is None
