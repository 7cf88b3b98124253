"""Which tokens are trained, pinned by hand for chat templates of many families.

Trained tokens are written as text: what the labels decode to, one string per unbroken run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Truncation
from common.data.chat import check_template, find_terminators, fit, tokenize
from common.data.outcomes import Drop, Made
from common.data.render import read_template, render
from common.data.types import IGNORE, Conversation, Message, Place, TemplateContext, TokenizedExample
from common.errors import UserError
from tests.field_templates import CALLS_END_APART, DROPS_EARLIER_REASONING, SYSTEM_UNTIL_ANSWERED
from tests.tiny import CHATML, tiny_tokenizer, wordpiece_tokenizer

HERE = Place("rows.jsonl", 7)
TEMPLATES = Path(__file__).parents[3] / "conf" / "chat_template"

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# the question's markers are the answer's header, a space stands before the answer, and the system
# text is written into the last question
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant have to take turns') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST] ' ~ (first if m == (turns | selectattr('role', 'equalto', 'user') | list)[-1] else '')"
    " ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('there is no system turn here') }}{% endif %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (m.content | trim) }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# earlier answers lose their reasoning; the last one keeps it, or gets an empty block
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}{{ '<think>' ~ (parts[0] | replace('<think>', '') if parts | length > 1 else '') }}"
    "{{ '</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEM_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITHOUT_TAGS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), None, "s", HERE)


def made(row: Conversation, template: str | None, **options: bool) -> Made[TokenizedExample]:
    result = tokenize([row], tiny_tokenizer(template, **options))[0]
    assert isinstance(result, Made), result
    return result


def documents(row: Conversation, template: str | None, **options: bool) -> tuple[TokenizedExample, ...]:
    return made(row, template, **options).records


def example(row: Conversation, template: str | None, **options: bool) -> TokenizedExample:
    (document,) = documents(row, template, **options)
    return document


def trained(row: Conversation, template: str | None, **options: bool) -> list[str]:
    """What is trained, run by run, document by document."""
    return [run for document in documents(row, template, **options) for run in runs(document)]


def runs(document: TokenizedExample) -> list[str]:
    """What a document trains, run by run."""
    found: list[list[int]] = [[]]
    for label in document.labels.tolist():
        if label != IGNORE:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tiny_tokenizer().decode(run) for run in found if run]


def stretches(document: TokenizedExample) -> tuple[str, str]:
    """Prompt and trained turn of a document with one turn, which ends with it."""
    begin = int(np.argmax(document.labels != IGNORE)) + 1
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(document.input_ids[:begin]), tokenizer.decode(document.input_ids[begin:])


TWO_TURNS = conversation(("user", "hi"), ("assistant", "hello"), ("user", "more?"), ("assistant", "ok"))
WITH_SYSTEM = conversation(("system", "S"), *((m.role, m.content) for m in TWO_TURNS.messages))


def test_each_token_and_label_of_a_chatml_row_is_the_one_worked_out_by_hand() -> None:
    row = example(conversation(("user", "a"), ("assistant", "hello")), CHATML)
    tokenizer = tiny_tokenizer()
    tokens = ["<|im_start|>", *"user", "Ċ", "a", "<|im_end|>", "Ċ"]
    tokens += ["<|im_start|>", *"assistant", "Ċ", "hello", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) == tokens
    hello, end = tokenizer.convert_tokens_to_ids(["hello", "<|im_end|>"])
    # position 19 is the line break after "assistant": it has to predict "hello"
    assert tokens.index("hello") == 20
    assert row.labels.tolist() == [IGNORE] * 19 + [hello, end] + [IGNORE] * 2
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    assert row.trained == 2 and row.source == "s"


def test_last_token_of_a_document_never_predicts_the_next() -> None:
    for template in (CHATML, MISTRAL, GEMMA):
        assert example(TWO_TURNS, template).labels[-1] == IGNORE


@pytest.mark.parametrize(
    ("name", "template", "expected"),
    [
        ("chatml", CHATML, ["hello<|im_end|>", "ok<|im_end|>"]),
        ("chatml without tags", CHATML_WITHOUT_TAGS, ["hello<|im_end|>", "ok<|im_end|>"]),
        ("llama 3", LLAMA3, ["hello<|eot_id|>", "ok<|eot_id|>"]),
        ("mistral", MISTRAL, [" hello</s>", " ok</s>"]),
        ("gemma", GEMMA, ["hello<end_of_turn>", "ok<end_of_turn>"]),
        ("reasoning", REASONING, ["<think></think>\n\nhello<|im_end|>", "<think></think>\n\nok<|im_end|>"]),
        ("system default", SYSTEM_DEFAULT, ["hello<|im_end|>", "ok<|im_end|>"]),
    ],
)
def test_every_assistant_turn_is_trained_with_its_terminator(
    name: str, template: str, expected: list[str]
) -> None:
    assert trained(TWO_TURNS, template) == expected
    if name != "gemma":
        assert trained(WITH_SYSTEM, template) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["hello<|im_end|>", "ok<|im_end|>"]),
        ("alpaca", ["hello</s>", "ok</s>"]),
        ("plain", ["hello</s>", "ok</s>"]),
    ],
)
def test_the_shipped_templates_train_answers_and_terminators(name: str, expected: list[str]) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert trained(WITH_SYSTEM, template) == expected
    check_template(tiny_tokenizer(template))
    ids = example(WITH_SYSTEM, template).input_ids.tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_the_shipped_templates_write_exactly_this() -> None:
    def text(name: str) -> str:
        template = read_template(tiny_tokenizer((TEMPLATES / f"{name}.jinja").read_text()))
        turns = conversation(("system", "S"), ("user", "Q"), ("assistant", "A")).messages
        return render(turns, template)[0]

    assert text("chatml") == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert text("alpaca") == "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n"
    assert text("plain") == "<s>S\nQ\nA</s>"


def test_the_shipped_templates_write_no_bos_that_is_also_the_eos() -> None:
    tokenizer = tiny_tokenizer((TEMPLATES / "chatml.jinja").read_text())
    tokenizer.bos_token = tokenizer.eos_token
    result = tokenize([TWO_TURNS], tokenizer)[0]
    assert isinstance(result, Made)
    assert result.records[0].input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_contents_that_the_template_strips_are_trained_as_they_are_written() -> None:
    row = conversation(("user", " hi "), ("assistant", "  hello \n"), ("user", "b"), ("assistant", "ok "))
    assert trained(row, LLAMA3) == ["hello<|eot_id|>", "ok<|eot_id|>"]
    assert trained(row, CHATML) == ["  hello \n<|im_end|>", "ok <|im_end|>"]


def test_a_question_that_repeats_the_answer_or_the_markers_does_not_move_the_spans() -> None:
    header = "<|im_start|>assistant\n"
    row = conversation(
        ("user", f"hello {header}hello"), ("assistant", "hello"), ("user", "ok"), ("assistant", "ok")
    )
    for template in (CHATML, CHATML_WITHOUT_TAGS):
        assert trained(row, template) == ["hello<|im_end|>", "ok<|im_end|>"]


def test_two_answers_in_a_row_are_both_trained() -> None:
    row = conversation(("user", "a"), ("assistant", "hello"), ("assistant", "ok"))
    assert trained(row, CHATML_WITHOUT_TAGS) == ["hello<|im_end|>", "ok<|im_end|>"]


def test_an_answer_may_come_first() -> None:
    assert trained(conversation(("assistant", "hello")), CHATML) == ["hello<|im_end|>"]


def test_a_tool_call_is_trained_and_the_tools_answer_is_not() -> None:
    template = CHATML_WITHOUT_TAGS.replace(
        "{{ message['content'] + '<|im_end|>' }}",
        "{{ message['content'] }}{% for c in message.tool_calls %}{{ '<call>' ~ c.name }}{% endfor %}"
        "{{ '<|im_end|>' }}",
    )
    assert template != CHATML_WITHOUT_TAGS
    call = Message("assistant", "", {"tool_calls": [{"name": "clock"}]})
    turns = (Message("user", "a"), call, Message("tool", "noon"), Message("assistant", "ok"))
    assert trained(Conversation(turns, None, "s", HERE), template) == [
        "<call>clock<|im_end|>",
        "ok<|im_end|>",
    ]
    lost = tokenize([Conversation(turns, None, "s", HERE)], tiny_tokenizer(CHATML_WITHOUT_TAGS))[0]
    reason = "the chat template leaves out an assistant turn's tool calls"
    assert isinstance(lost, Drop) and lost.faulty and lost.reason.startswith(reason)


def test_all_bytes_of_a_character_split_over_several_tokens_are_trained() -> None:
    row = example(conversation(("user", "😀"), ("assistant", "😀")), CHATML)
    # four bytes, four tokens, then the terminator
    assert row.trained == 5
    assert (row.input_ids[-2 - 4 : -2] == row.labels[row.labels != IGNORE][:4]).all()


def test_where_tokens_merge_across_the_end_of_a_prompt_the_turn_is_encoded_apart() -> None:
    # the header ends with a space, which the tokenizer would join with "hello": no prompt ends like this
    template = (
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = example(conversation(("user", "a"), ("assistant", "hello ok")), template)
    tokens = tiny_tokenizer().convert_ids_to_tokens(row.input_ids.tolist())
    assert tokens[-6:] == [":", "Ġ", "hello", "Ġ", "ok", "</s>"]
    assert runs(row) == ["hello ok</s>"]
    # in the second prompt the first answer is history, so there its token is the merged one
    two = made(TWO_TURNS, template)
    assert two.split == "tokens merge across the end of a prompt"
    assert [runs(document) for document in two.records] == [["hello</s>"], ["ok</s>"]]
    assert "Ġhello" in tiny_tokenizer().convert_ids_to_tokens(two.records[1].input_ids.tolist())


def test_a_space_that_the_template_writes_before_the_answer_belongs_to_it() -> None:
    ids = example(conversation(("user", "a"), ("assistant", "hello")), MISTRAL).labels
    assert tiny_tokenizer().convert_ids_to_tokens(ids[ids != IGNORE].tolist()) == ["Ġhello", "</s>"]


def test_there_is_one_bos_even_when_template_and_tokenizer_both_write_one() -> None:
    for template in (LLAMA3, "{{ bos_token }}" + LLAMA3):
        ids = documents(TWO_TURNS, template, adds_bos=True)[-1].input_ids.tolist()
        assert ids[0] == 1 and ids.count(1) == 1
    assert 1 not in example(TWO_TURNS, CHATML, adds_bos=True).input_ids.tolist()


def test_masks_do_not_depend_on_the_pad_token() -> None:
    plain, padded_with_eos = tiny_tokenizer(MISTRAL), tiny_tokenizer(MISTRAL)
    padded_with_eos.pad_token = "</s>"
    first, second = (tokenize([TWO_TURNS], t)[0] for t in (plain, padded_with_eos))
    assert isinstance(first, Made) and isinstance(second, Made)
    (labels,), (others,) = (
        [document.labels.tolist() for document in made.records] for made in (first, second)
    )
    assert labels == others
    assert labels.count(2) == 2  # both EOS


# plain text


def test_plain_text_is_trained_whole_and_ends_with_one_eos() -> None:
    row = Conversation((), "hello ok", "s", HERE)
    result = example(row, None)
    tokens = ["hello", "Ġ", "ok", "</s>"]
    ids = tiny_tokenizer().convert_tokens_to_ids(tokens)
    assert result.input_ids.tolist() == ids
    assert result.labels.tolist() == [*ids[1:], IGNORE]


def test_plain_text_gets_a_bos_if_and_only_if_the_tokenizer_writes_one() -> None:
    ids = example(Conversation((), "ok", "s", HERE), None, adds_bos=True)
    ok = tiny_tokenizer().convert_tokens_to_ids("ok")
    assert ids.input_ids.tolist() == [1, ok, 2]
    assert ids.labels.tolist() == [ok, 2, IGNORE]
    already = example(Conversation((), "<s>ok</s>", "s", HERE), None, adds_bos=True)
    assert already.input_ids.tolist() == [1, ok, 2]


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
    assert isinstance(result, Made)
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
        assert isinstance(result, Made)
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
    assert isinstance(kept, Made)


# templates and terminators


@pytest.mark.parametrize(
    ("template", "terminator"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (MISTRAL, "</s>"),
        (GEMMA, "<end_of_turn>"),
        (REASONING, "<|im_end|>"),
        (CHATML.replace("{{ '\n' }}{% else", "{{ '\n' }}{{ eos_token if loop.last }}{% else"), "<|im_end|>"),
    ],
)
def test_the_terminator_is_the_token_that_really_ends_a_turn(template: str, terminator: str) -> None:
    tokenizer = tiny_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(list(find_terminators(tokenizer))) == [terminator]
    check_template(tokenizer)


def test_the_token_that_ends_a_call_is_a_terminator_too() -> None:
    tokenizer = tiny_tokenizer(CALLS_END_APART)
    assert tokenizer.convert_ids_to_tokens(list(find_terminators(tokenizer))) == ["<|im_end|>", "<|eot_id|>"]
    check_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ broken", "not valid Jinja: line 1"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the assistant's content"),
        ("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}", "not one token"),
        ("{{ raise_exception('never') }}", "never"),
        ({"tool_use": CHATML, "rag": CHATML}, "cannot be chosen"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_template(tiny_tokenizer(template))
    assert error.value.hint is not None and "model.chat_template=chatml" in error.value.hint


# truncation


def short(ids: list[int], labels: list[int]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32), "s")


LONG = short([1, 10, 11, 12, 2], [IGNORE, IGNORE, 12, 2, IGNORE])


def test_a_row_that_fits_is_left_alone() -> None:
    assert fit(LONG, HERE, 5, Truncation.drop) is LONG


def test_a_row_too_long_is_dropped_with_its_place() -> None:
    assert fit(LONG, HERE, 4, Truncation.drop) == Drop("longer than data.max_length=4", HERE)


def test_cut_on_the_right_ends_without_terminator_and_without_an_invented_one() -> None:
    cut = fit(LONG, HERE, 4, Truncation.right)
    assert isinstance(cut, TokenizedExample)
    assert cut.input_ids.tolist() == [1, 10, 11, 12]
    assert cut.labels.tolist() == [IGNORE, IGNORE, 12, IGNORE]
    assert LONG.labels.tolist() == [IGNORE, IGNORE, 12, 2, IGNORE]  # the original is not touched


def test_cut_on_the_left_keeps_the_end() -> None:
    cut = fit(LONG, HERE, 3, Truncation.left)
    assert isinstance(cut, TokenizedExample)
    assert cut.input_ids.tolist() == [11, 12, 2] and cut.labels.tolist() == [12, 2, IGNORE]


def test_cut_on_the_left_keeps_the_bos_which_then_predicts_nothing() -> None:
    row = short([1, 10, 11, 12, 2], [10, 11, 12, 2, IGNORE])
    cut = fit(row, HERE, 3, Truncation.left, bos_id=1)
    assert isinstance(cut, TokenizedExample)
    assert cut.input_ids.tolist() == [1, 12, 2] and cut.labels.tolist() == [IGNORE, 2, IGNORE]


def test_a_cut_that_leaves_no_trained_token_drops_the_row() -> None:
    assert fit(LONG, HERE, 2, Truncation.right) == Drop("no trained token left after truncation", HERE)
    ends_with_question = short([10, 11, 12, 13], [11, IGNORE, IGNORE, IGNORE])
    assert isinstance(fit(ends_with_question, HERE, 2, Truncation.left), Drop)


def test_reasoning_is_not_trained_behind_a_prompt_that_closes_it() -> None:
    turns = (Message("user", "a"), Message("assistant", "ok", {"reasoning_content": "hm"}))
    inline = (turns[0], Message("assistant", "<think>\nhm\n</think>\n\nok"))
    off = TemplateContext(variables={"enable_thinking": False})
    for said in (turns, inline):
        row = Conversation(said, None, "s", Place("rows", 1), context=off)
        (drop,) = tokenize([row], tiny_tokenizer(DROPS_EARLIER_REASONING))
        assert isinstance(drop, Drop)
        assert drop.reason == "turn with reasoning, for which its prompt leaves no place"
