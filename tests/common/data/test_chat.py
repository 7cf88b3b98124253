"""Which tokens are trained, pinned by hand for chat templates of many families.

Trained tokens are written as text: what the labels decode to, one string per unbroken run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.config import Truncation
from common.data.chat import check_template, find_terminators, fit, tokenize
from common.data.outcomes import Drop, RowRecords
from common.data.render import read_template, render
from common.data.types import IGNORE, Conversation, Message, Place, TemplateContext, TokenizedExample
from common.errors import UserError
from tests.common.data.conversations import (
    CHATML_WITHOUT_TAGS,
    GEMMA,
    HERE,
    LLAMA3,
    MISTRAL,
    REASONING,
    SYSTEM_DEFAULT,
    TEMPLATES,
    TWO_TURNS,
    WITH_SYSTEM,
    conversation,
    documents,
    example,
    made,
    runs,
    trained,
)
from tests.field_templates import CALLS_END_APART, DROPS_EARLIER_REASONING
from tests.tiny import CHATML, tiny_tokenizer


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
        ("tulu", ["hello</s>", "ok</s>"]),
        ("zephyr", ["hello</s>", "ok</s>"]),
        ("transcript", [" hello</s>", " ok</s>"]),
        ("user_assistant", [" hello</s>", " ok</s>"]),
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
    assert text("tulu") == "<s><|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA</s>\n"
    assert text("zephyr") == "<s><|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n"
    assert text("transcript") == "<s>S\n\nHuman: Q\n\nAssistant: A</s>"
    assert text("user_assistant") == "<s>S\nUser: Q\nAssistant: A</s>\n"


@pytest.mark.parametrize("name", ["transcript", "user_assistant"])
def test_an_answer_that_was_sampled_with_a_space_before_it_is_written_with_one(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    once, sampled = (conversation(("user", "Q"), ("assistant", said)) for said in ("ok", " ok"))
    assert trained(once, template) == trained(sampled, template) == [" ok</s>"]


def test_the_shipped_templates_write_no_bos_that_is_also_the_eos() -> None:
    tokenizer = tiny_tokenizer((TEMPLATES / "chatml.jinja").read_text())
    tokenizer.bos_token = tokenizer.eos_token
    result = tokenize([TWO_TURNS], tokenizer)[0]
    assert isinstance(result, RowRecords)
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
    assert isinstance(first, RowRecords) and isinstance(second, RowRecords)
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
