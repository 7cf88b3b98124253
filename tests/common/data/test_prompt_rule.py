"""The prompt rule: which turns are trained, behind which prompt, and what a template leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.data.chat import tokenize
from common.data.outcomes import Drop, RowRecords
from common.data.types import IGNORE, Conversation, Message, TemplateContext
from common.errors import UserError
from tests.common.data.conversations import (
    CHATML_WITHOUT_TAGS,
    HERE,
    LLAMA3,
    MISTRAL,
    REASONING,
    TWO_TURNS,
    WITH_SYSTEM,
    conversation,
    documents,
    example,
    made,
    runs,
    stretches,
    trained,
)
from tests.field_templates import SYSTEM_UNTIL_ANSWERED
from tests.tiny import CHATML, tiny_tokenizer, wordpiece_tokenizer

# tags and turns must agree


def test_tags_that_leave_out_the_terminator_are_refused_naming_the_difference() -> None:
    template = CHATML.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert template != CHATML
    with pytest.raises(UserError) as error:
        tokenize([TWO_TURNS], tiny_tokenizer(template))
    assert "rows.jsonl:7" in str(error.value)
    assert "trained turn 1: the tags train 'hello', the turn is 'hello<|im_end|>'" in str(error.value)


def test_tags_that_leave_out_a_turn_are_refused() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if loop.last %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(
        UserError,
        match="turn 1: the tags train '', the turn is 'hello<|im_end|>'".replace("|", r"\|"),
    ):
        tokenize([TWO_TURNS], tiny_tokenizer(template))


def test_a_line_break_inside_the_tags_is_not_trained() -> None:
    template = CHATML.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
    assert template != CHATML
    assert trained(TWO_TURNS, template) == ["hello<|im_end|>", "ok<|im_end|>"]


COUNT = "{{ messages | map(attribute='content') | join | length }}\n"
"""The text begins with a number that changes with every turn."""


def test_turns_of_a_template_that_rewrites_everything_stand_behind_their_own_prompts() -> None:
    for template in (COUNT + CHATML_WITHOUT_TAGS, COUNT + CHATML):
        first, second = made(TWO_TURNS, template).records
        assert stretches(first) == (
            "2\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "hello<|im_end|>",
        )
        assert stretches(second)[0].startswith("12\n<|im_start|>user\nhi") and runs(second) == [
            "ok<|im_end|>"
        ]


def test_the_end_of_a_question_is_the_header_where_a_prompt_has_none() -> None:
    row = made(TWO_TURNS, COUNT + "{% for m in messages %}{{ m.content ~ '<|im_end|>' }}{% endfor %}")
    assert [stretches(document) for document in row.records] == [
        ("2\nhi<|im_end|>", "hello<|im_end|>"),
        ("12\nhi<|im_end|>hello<|im_end|>more?<|im_end|>", "ok<|im_end|>"),
    ]


def test_turns_that_cannot_be_told_from_their_prompt_are_not_trained() -> None:
    # what ends a question that is not answered yet stands nowhere else
    template = "{% for m in messages %}{{ m.content ~ ('<|im_end|>' if loop.last else ',') }}{% endfor %}"
    assert tokenize([TWO_TURNS], tiny_tokenizer(template)) == [
        Drop("turn that the chat template does not write behind its own prompt", HERE)
    ]


def test_what_the_template_writes_twice_is_trained_twice() -> None:
    template = CHATML.replace("+ '<|im_end|>' }}{% endgen", "+ message['content'] + '<|im_end|>' }}{% endgen")
    assert template != CHATML
    assert trained(TWO_TURNS, template) == ["hellohello<|im_end|>", "okok<|im_end|>"]


# the prompt rule

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '[/INST]' ~ m.content.split('</think>')[-1] ~ eos_token }}"
    "{% else %}{{ '[INST]' ~ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[/INST]<think>\n' }}{% endif %}"
)
"""Takes reasoning out of every turn, and ends its prompt with the beginning of it."""

THINKING = conversation(
    ("user", "hi"),
    ("assistant", "<think>\nwhy\n</think>\n\nhello"),
    ("user", "more?"),
    ("assistant", "<think>\nhm\n</think>\n\nok"),
)


def test_reasoning_that_the_template_takes_out_of_history_is_trained_in_a_document_of_its_own() -> None:
    row = made(THINKING, REASONING)
    assert (
        row.split
        == "the chat template writes earlier turns in another way than it wrote them as the last ones"
    )
    assert [stretches(document) for document in row.records] == [
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nwhy\n</think>\n\nhello<|im_end|>",
        ),
        (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
            "<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nhm\n</think>\n\nok<|im_end|>",
        ),
    ]


def test_reasoning_is_said_behind_a_prompt_that_opens_it() -> None:
    row = made(THINKING, R1)
    assert [stretches(document) for document in row.records] == [
        ("<s>[INST]hi[/INST]<think>\n", "why\n</think>\n\nhello</s>"),
        ("<s>[INST]hi[/INST]\n\nhello</s>[INST]more?[/INST]<think>\n", "hm\n</think>\n\nok</s>"),
    ]


def test_reasoning_in_a_field_is_said_behind_a_prompt_that_opens_it() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        turns = (Message("user", "hi"), Message("assistant", "hello", {name: "why"}))
        row = example(Conversation(turns, None, "s", HERE), R1)
        assert stretches(row) == ("<s>[INST]hi[/INST]<think>\n", "why\n</think>\n\nhello</s>")


def test_a_turn_without_the_reasoning_that_its_prompt_opens_is_not_trained_and_counted() -> None:
    reason = "turn that does not begin with '<think>\\n', in which its prompt ends"
    assert tokenize([TWO_TURNS], tiny_tokenizer(R1)) == [Drop(reason, HERE)]
    one = conversation(
        ("user", "hi"), ("assistant", "hello"), *((m.role, m.content) for m in THINKING.messages)
    )
    row = made(one, R1)
    assert row.untrained == (reason,)
    assert [runs(document) for document in row.records] == [
        ["why\n</think>\n\nhello</s>"],
        ["hm\n</think>\n\nok</s>"],
    ]


def test_a_system_text_that_moves_to_the_last_question_stands_in_every_prompt() -> None:
    row = made(WITH_SYSTEM, MISTRAL)
    assert [stretches(document) for document in row.records] == [
        ("<s>[INST] S\n\nhi [/INST]", " hello</s>"),
        ("<s>[INST] hi [/INST] hello</s>[INST] S\n\nmore? [/INST]", " ok</s>"),
    ]


@pytest.mark.parametrize("end", ["", " "])
def test_a_system_text_that_stands_in_prompts_alone_stands_in_every_prompt(end: str) -> None:
    row = conversation(
        ("system", "S"), ("user", "hi" + end), ("assistant", "hello"), ("user", "ok"), ("assistant", "ok")
    )
    result = made(row, SYSTEM_UNTIL_ANSWERED)
    assert [stretches(document) for document in result.records] == [
        (f"<s>[INST] S\n\nhi{end}[/INST]", " hello</s>"),
        (f"<s>[INST] hi{end}[/INST] hello</s>[INST] S\n\nok[/INST]", " ok</s>"),
    ]
    assert not result.untrained


@pytest.mark.parametrize("before", [(), (("user", "hi"), ("assistant", "<think>\nhm\n</think>\n\nok"))])
def test_a_turn_without_its_prompts_header_is_not_taken_for_what_stands_behind_another(
    before: tuple[tuple[str, str], ...],
) -> None:
    # the prompt opens reasoning; contents bring their tags along, or get an empty pair
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ '<think></think>' if m.role == 'assistant' and '</think>' not in m.content }}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    row = conversation(*before, ("user", "hi"), ("assistant", "hm</think>ok"))
    row = replace(row, first_trained=len(before))
    (result,) = tokenize([row], tiny_tokenizer(template))
    assert isinstance(result, Drop) and result.reason.startswith("turn that"), result


def test_words_that_no_prompt_has_are_lost_though_a_turn_is_found_behind_its_header() -> None:
    row = conversation(("system", "S"), ("user", "hi"), ("assistant", "hello"), ("assistant", "ok"))
    (result,) = tokenize([row], tiny_tokenizer(SYSTEM_UNTIL_ANSWERED))
    assert isinstance(result, Drop) and "leaves out the words of a system turn" in result.reason


def test_a_terminator_that_only_the_last_turn_gets_ends_every_trained_turn() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last and not add_generation_prompt }}"
    )
    row = made(TWO_TURNS, template + "{% endfor %}")
    assert [stretches(document) for document in row.records] == [
        ("hi", "hello</s>"),
        ("hihellomore?", "ok</s>"),
    ]


def test_headers_that_the_generation_prompt_leaves_to_the_model_are_trained() -> None:
    harmony = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking and loop.last %}{{ '[analysis]' ~ m.thinking ~ '<|im_end|><|im_start|>assistant' }}"
        "{% endif %}{{ '[final]' ~ m.content ~ (eos_token if loop.last else '<|im_end|>') }}"
        "{% else %}{{ ':' ~ m.content ~ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    turns = (*TWO_TURNS.messages[:3], Message("assistant", "ok", {"reasoning_content": "hm"}))
    row = made(Conversation(turns, None, "s", HERE), harmony)
    assert [stretches(document) for document in row.records] == [
        ("<|im_start|>user:hi<|im_end|><|im_start|>assistant", "[final]hello</s>"),
        (
            "<|im_start|>user:hi<|im_end|><|im_start|>assistant[final]hello<|im_end|>"
            "<|im_start|>user:more?<|im_end|><|im_start|>assistant",
            "[analysis]hm<|im_end|><|im_start|>assistant[final]ok</s>",
        ),
    ]


def test_a_turn_is_found_behind_its_header_where_its_prompt_keeps_more_of_earlier_turns() -> None:
    # reasoning of a call stays in the text until an answer is written
    keeps = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ':' }}"
        "{% if m.thinking and (loop.last or m.tool_calls and messages[-1].role != 'assistant') %}"
        "{{ m.thinking ~ '<|im_end|><|im_start|>assistant:' }}{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name ~ c.function.arguments.zone }}"
        "{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    call, answer = (
        Message("assistant", "", CALL | {"thinking": "look"}),
        Message("assistant", "noon", {"thinking": "so"}),
    )
    turns = (Message("user", "a"), call, Message("tool", "12"), answer)
    row = made(Conversation(turns, None, "s", HERE), keeps)
    asked = "<|im_start|>user:a<|im_end|><|im_start|>assistant:"
    called = "look<|im_end|><|im_start|>assistant:clockhere<|im_end|>"
    assert [stretches(document) for document in row.records] == [
        (asked, called),
        (
            f"{asked}{called}<|im_start|>tool:12<|im_end|><|im_start|>assistant:",
            "so<|im_end|><|im_start|>assistant:noon<|im_end|>",
        ),
    ]


def test_tags_may_begin_in_the_header_that_the_prompt_already_has() -> None:
    template = (
        CHATML.replace("{{ '<|im_start|>' + message['role'] + '\n' }}", "")
        .replace("{% generation %}{{ ", "{% generation %}{{ '<|im_start|>assistant\n' + ")
        .replace("{% else %}{{ ", "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + ")
    )
    assert template.count("<|im_start|>") == 3
    assert trained(TWO_TURNS, template) == ["hello<|im_end|>", "ok<|im_end|>"]


def test_a_variable_of_the_template_reaches_prompt_and_turn() -> None:
    template = CHATML_WITHOUT_TAGS.replace(
        "assistant\n' }}{% endif %}", "assistant\n' }}{% if quiet %}{{ 'hush ' }}{% endif %}{% endif %}"
    ).replace(
        "{{ message['content']",
        "{{ ('hush ' if quiet and loop.last and loop.index > 1) }}{{ message['content']",
    )
    row = conversation(("user", "hi"), ("assistant", "hello"))
    assert trained(row, template) == ["hello<|im_end|>"]
    quiet = replace(row, context=TemplateContext(variables={"quiet": True}))
    assert stretches(example(quiet, template))[0].endswith("assistant\nhush ")


def test_a_turn_that_the_row_leaves_out_stands_untrained_in_the_document() -> None:
    turns = (TWO_TURNS.messages[0], replace(TWO_TURNS.messages[1], trained=False), *TWO_TURNS.messages[2:])
    row = replace(TWO_TURNS, messages=turns)
    for template in (CHATML, CHATML_WITHOUT_TAGS, MISTRAL):
        assert example(row, template).input_ids.tolist() == example(TWO_TURNS, template).input_ids.tolist()
        assert [run.strip()[:2] for run in trained(row, template)] == ["ok"]


def test_an_answers_first_token_is_trained_by_a_tokenizer_that_drops_spaces() -> None:
    tokenizer = wordpiece_tokenizer()
    result = tokenize([conversation(("user", "name a river"), ("assistant", "the elbe"))], tokenizer)[0]
    assert isinstance(result, RowRecords)
    (row,) = result.records
    labels = row.labels[row.labels != IGNORE].tolist()
    assert tokenizer.convert_ids_to_tokens(labels) == ["the", "elbe", "[SEP]"]


# parts that the template leaves out


CALL = {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "here"}}}]}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ((Message("assistant", "words", CALL),), "an assistant turn's tool calls"),
        ((Message("assistant", "clock here", CALL),), "an assistant turn's tool calls"),
        ((Message("assistant", "hello", {"reasoning_content": "why"}),), "an assistant turn's reasoning"),
        ((Message("assistant", "hello", {"reasoning": "hello"}),), "an assistant turn's reasoning"),
        ((Message("assistant", "<think>why</think>hello"), Message("user", "hi")), None),
    ],
)
def test_a_row_that_loses_a_part_is_refused_naming_it(turns: tuple[Message, ...], part: str | None) -> None:
    row = Conversation((Message("user", "a"), *turns), None, "s", HERE)
    result = tokenize([row], tiny_tokenizer(CHATML))[0]
    if part is None:
        assert isinstance(result, RowRecords)
    else:
        assert isinstance(result, Drop) and result.faulty
        assert result.reason.startswith(f"the chat template leaves out {part}")


@pytest.mark.parametrize(
    ("rendered", "part"),
    [
        ("m.tool_calls[0].function.arguments if m.tool_calls else m.content", "an assistant turn's words"),
        ("m.content ~ (m.tool_calls[0].function.name if m.tool_calls)", "the arguments of"),
        ("m.content.split('</think>')[-1]", "an assistant turn's reasoning"),
        ("m.content if m.role != 'system'", "the words of a system turn"),
        ("m.content ~ (m.tool_calls | tojson if m.tool_calls) if m.role != 'tool'", "a tool's result"),
    ],
)
def test_whatever_part_is_lost_has_its_name(rendered: str, part: str) -> None:
    template = "{% for m in messages %}{{ m.role ~ ':' ~ (" + rendered + ") ~ '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    turns = (
        Message("system", "S"),
        Message("user", "a"),
        *((Message("assistant", "words", CALL), Message("tool", "noon")) if "reason" not in part else ()),
        Message("assistant", "<think>why</think>hello" if "reason" in part else "ok"),
    )
    calls_first = Conversation(turns, None, "s", HERE)
    result = tokenize([calls_first], tiny_tokenizer(template))[0]
    assert isinstance(result, Drop) and part in result.reason


def test_definitions_of_tools_must_be_written() -> None:
    row = replace(TWO_TURNS, context=TemplateContext(tools=(TOOL,)))
    lost = tokenize([row], tiny_tokenizer(CHATML))[0]
    assert isinstance(lost, Drop) and "the definitions of tools" in lost.reason
    template = "{% for tool in tools or [] %}{{ tool.function.name ~ '\n' }}{% endfor %}" + CHATML
    assert tiny_tokenizer().decode(example(row, template).input_ids).startswith("clock\n")


# turns of a prompt


def answering(row: Conversation) -> Conversation:
    """The conversation with everything before its last turn as the prompt."""
    return replace(row, first_trained=len(row.messages) - 1)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_TAGS, LLAMA3, MISTRAL])
def test_an_assistant_turn_of_the_prompt_is_not_trained(template: str) -> None:
    whole, answer = documents(TWO_TURNS, template)[-1], example(answering(TWO_TURNS), template)
    assert answer.input_ids.tolist() == whole.input_ids.tolist()
    last = answer.trained
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(answer.labels[answer.labels != IGNORE]).strip().startswith("ok<")
    # what is trained is the last run of what the whole conversation trains
    assert whole.labels[whole.labels != IGNORE][-last:].tolist() == [
        label for label in answer.labels.tolist() if label != IGNORE
    ]


def test_two_answers_in_a_row_are_told_apart_when_the_first_is_prompt() -> None:
    touching = "{% for m in messages %}{{ m.content ~ '<|im_end|>' }}{% endfor %}"
    row = conversation(("user", "a"), ("assistant", "hello"), ("assistant", "ok"))
    assert trained(row, touching) == ["hello<|im_end|>ok<|im_end|>"]
    assert trained(answering(row), touching) == ["ok<|im_end|>"]


def test_a_row_that_the_template_refuses_is_a_bad_row_with_its_place() -> None:
    rows = [conversation(("user", "a"), ("user", "b"), ("assistant", "c")), TWO_TURNS]
    refused, kept = tokenize(rows, tiny_tokenizer(MISTRAL))
    assert isinstance(refused, Drop) and refused.faulty and refused.place == HERE
    assert "user and assistant have to take turns" in refused.reason
    assert isinstance(kept, RowRecords)
