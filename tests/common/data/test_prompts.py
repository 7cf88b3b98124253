"""What a row asks: as turns, as the tokens a policy goes on from, and with the columns that rewards read."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Truncation
from common.data import chat
from common.data.formats import recognise as recognise_demonstrations
from common.data.formats import to_conversation
from common.data.outcomes import Drop, RowError, RowRecords
from common.data.pairs import prompt_length, tokenize_pairs
from common.data.preferences import recognise as recognise_preferences
from common.data.preferences import to_preferences
from common.data.prompts import fit_prompt, recognise, to_prompt, tokenize_prompts
from common.data.types import (
    Place,
    Prompt,
    RawExample,
    TokenizedExample,
    TokenizedPair,
    TokenizedPrompt,
)
from common.errors import UserError
from tests.tiny import CHATML, tiny_tokenizer

HERE = Place("rows.jsonl", 7)
TEMPLATES = Path(__file__).parents[3] / "conf" / "chat_template"
SHIPPED = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}
SYSTEM, AGAIN = {"role": "system", "content": "be"}, {"role": "user", "content": "b"}
THREE = [USER, ANSWER, AGAIN]
HH = "\n\nHuman: a\n\nAssistant: ok\n\nHuman: b\n\nAssistant: "


def raw(columns: dict[str, Any]) -> RawExample:
    return RawExample(columns, "s", HERE)


def read(columns: dict[str, Any], *, name: str | None = None, **columns_map: str) -> Prompt:
    renamed = {ours: columns[theirs] for ours, theirs in columns_map.items()}
    format = recognise({**columns, **renamed}, name=name, origin="rows.jsonl:1")
    return to_prompt(raw(columns), format, columns_map)


def said(prompt: Prompt) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in prompt.messages]


# what a row asks


@pytest.mark.parametrize(
    ("row", "turns", "as_given", "others"),
    [
        ({"prompt": "a"}, ["a"], "a", []),
        ({"prompt": "a", "answer": "4"}, ["a"], "a", ["answer"]),
        ({"prompt": [USER]}, ["a"], [USER], []),
        ({"prompt": "a", "completion": "hello"}, ["a"], "a", ["completion"]),
        ({"prompt": [USER], "completion": [ANSWER]}, ["a"], [USER], ["completion"]),
        ({"prompt": "a", "response": "hello", "kind": 1}, ["a"], "a", ["response", "kind"]),
        ({"question": "a", "answer": "hello"}, ["a"], "a", ["answer"]),
        ({"question": "a"}, ["a"], "a", []),
        ({"question": "a", "one": {"is_correct": False, "solution": "x"}}, ["a"], "a", ["one"]),
        ({"instruction": "a", "input": "b", "output": "hello"}, ["a\n\nb"], "a\n\nb", ["output"]),
        ({"instruction": "a", "input": ""}, ["a"], "a", []),
        ({"messages": [USER, ANSWER]}, ["a"], [USER], ["messages"]),
        ({"messages": [USER]}, ["a"], [USER], ["messages"]),
        ({"messages": [USER, ANSWER, AGAIN, ANSWER]}, ["a", "hello", "b"], THREE, ["messages"]),
        ({"messages": THREE}, ["a", "hello", "b"], THREE, ["messages"]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "hello"}]},
            ["a"],
            [USER],
            ["conversations"],
        ),
        ({"prompt": "a", "chosen": "hello", "rejected": "no"}, ["a"], "a", ["chosen", "rejected"]),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
            ["a"],
            [USER],
            ["chosen", "rejected"],
        ),
        ({"prompt": HH}, ["a", "ok", "b"], HH, []),
    ],
)  # fmt: skip
def test_every_format_gives_what_comes_before_the_answer(
    row: dict[str, Any], turns: list[str], as_given: Any, others: list[str]
) -> None:
    prompt = read(row)
    assert [content for _, content in said(prompt)] == turns
    assert prompt.messages[-1].role == "user"
    assert prompt.as_given == as_given
    assert prompt.columns == {name: row[name] for name in others}


def test_transcripts_of_pairs_give_the_turns_that_both_share() -> None:
    prompt = read({"chosen": HH + "hello", "rejected": HH + "no"})
    assert said(prompt) == [("user", "a"), ("assistant", "ok"), ("user", "b")]
    assert prompt.as_given == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "b"},
    ]


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"question": "a"}, {"instruction": "a"}])
def test_a_system_column_is_the_first_turn_and_stays_a_column(row: dict[str, Any]) -> None:
    prompt = read({**row, "system": "be"})
    assert said(prompt) == [("system", "be"), ("user", "a")]
    assert prompt.as_given == "a" and prompt.columns == {"system": "be"}


def test_a_prompt_may_end_with_what_a_tool_said() -> None:
    made = [{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}]
    call = {"role": "assistant", "content": "", "tool_calls": made}
    prompt = read({"messages": [USER, call, {"role": "tool", "content": "4"}, ANSWER]})
    assert [role for role, _ in said(prompt)] == ["user", "assistant", "tool"]
    assert prompt.as_given[1] == call


def test_mapped_columns_are_read_under_our_names_and_others_keep_theirs() -> None:
    prompt = read({"query": "a", "gold": "4"}, prompt="query")
    assert prompt.as_given == "a" and prompt.columns == {"gold": "4"}


def test_other_columns_become_values_that_json_has() -> None:
    day = datetime.date(2024, 5, 1)
    row = {"prompt": "a", "day": day, "score": float("nan"), "parts": [{"at": day, "n": 1.5}], "none": None}
    columns = read(row).columns
    assert columns == {
        "day": "2024-05-01",
        "score": None,
        "parts": [{"at": "2024-05-01", "n": 1.5}],
        "none": None,
    }
    json.dumps(columns, allow_nan=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"question": " "}, "question is empty"),
        ({"prompt": 3}, "prompt is not a string (a number)"),
        ({"prompt": None}, "no prompt (the source's format is prompt)"),
        ({"prompt": []}, "prompt has no turns"),
        ({"prompt": [SYSTEM]}, "no user turn"),
        ({"prompt": [USER, ANSWER]}, "the prompt ends with an assistant turn"),
        ({"messages": [SYSTEM, ANSWER]}, "no user turn"),
        ({"messages": []}, "no user turn"),
        ({"messages": [USER, SYSTEM, AGAIN]}, "turn 2: a system turn can only be the first"),
        ({"messages": [USER, {**ANSWER, "content": ""}, AGAIN]}, "turn 2: the assistant turn is empty"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen is not a string (a number)"),
    ],
)
def test_a_row_that_asks_nothing_is_bad_and_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row)
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", [None, "text"])
def test_plain_text_is_refused_with_a_way_out(name: str | None) -> None:
    with pytest.raises(UserError, match="plain text has no prompt") as caught:
        read({"text": "once"}, name=name)
    assert "data.sources.columns={prompt: text}" in str(caught.value.hint)
    assert said(read({"text": "once"}, prompt="text")) == [("user", "once")]


def test_unknown_columns_and_formats_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: this step needs prompts; found the columns x, y"):
        read({"x": 1, "y": 2})
    with pytest.raises(UserError, match="format=quastion is not known") as caught:
        read({"question": "a"}, name="quastion")
    assert caught.value.hint == "did you mean question?"
    with pytest.raises(UserError, match="format prompt/completion needs the columns completion"):
        read({"prompt": "a"}, name="prompt/completion")


# tokens


def shipped(template: str) -> Any:
    """A tokenizer with one of the chat templates that ship with the code."""
    return tiny_tokenizer((TEMPLATES / f"{template}.jinja").read_text(), adds_bos=True)


def document_of(row: dict[str, Any], tokenizer: Any) -> TokenizedExample:
    (made,) = chat.tokenize([to_conversation(raw(row), recognise_demonstrations(row))], tokenizer)
    assert isinstance(made, RowRecords)
    (document,) = made.records
    return document


def before_the_answer(row: dict[str, Any], tokenizer: Any) -> np.ndarray:
    """Tokens of the row's training document (of pairs: the chosen side's) before its first trained one."""
    if "chosen" in row:
        (preference,) = to_preferences(raw(row), recognise_preferences(row))
        (pair,) = tokenize_pairs([preference], tokenizer)
        assert isinstance(pair, TokenizedPair)
        return pair.chosen.input_ids[: prompt_length(pair.chosen)]
    document = document_of(row, tokenizer)
    return document.input_ids[: prompt_length(document)]


def tokens(row: dict[str, Any], tokenizer: Any) -> np.ndarray:
    (tokenized,) = tokenize_prompts([read(row)], tokenizer)
    assert isinstance(tokenized, TokenizedPrompt), tokenized
    return tokenized.input_ids


ONE_ANSWER: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "hello"},
    {"prompt": "a hello\n", "response": " hello", "system": "be"},
    {"question": "hello\n\n", "answer": "hello"},
    {"instruction": "a", "input": "b", "output": "hello"},
    {"messages": [USER, ANSWER]},
    {"messages": [SYSTEM, USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "hello"}]},
    {"prompt": "a", "chosen": "hello", "rejected": "no"},
    {"prompt": HH, "chosen": "hello", "rejected": "no"},
    {"chosen": HH + "hello", "rejected": HH + "no"},
    {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, {**ANSWER, "content": "no"}]},
]


@pytest.mark.parametrize("template", SHIPPED)
@pytest.mark.parametrize("row", ONE_ANSWER)
def test_a_prompt_is_what_the_rows_training_document_begins_with(template: str, row: dict[str, Any]) -> None:
    tokenizer = shipped(template)
    found = tokens(row, tokenizer)
    assert found.dtype == np.int32 and len(found) > 2
    assert found.tolist() == before_the_answer(row, tokenizer).tolist()
    assert found.tolist().count(tokenizer.bos_token_id) == 1  # all of them write one


@pytest.mark.parametrize("template", SHIPPED)
def test_of_several_answers_the_prompt_holds_all_but_the_last(template: str) -> None:
    row = {"messages": [USER, ANSWER, AGAIN, {**ANSWER, "content": "ok"}]}
    tokenizer = shipped(template)
    document = document_of(row, tokenizer)
    found = tokens(row, tokenizer)
    assert found.tolist() == document.input_ids[: len(found)].tolist()
    assert document.labels[len(found) - 1] == document.input_ids[len(found)]
    written = tokenizer.decode(document.input_ids[len(found) :], skip_special_tokens=True)
    assert written.strip() == "ok"  # two of the templates write a space before an answer


def test_a_second_bos_is_left_out() -> None:
    twice = tokens({"prompt": "a"}, tiny_tokenizer("<s><s>" + CHATML, adds_bos=True))
    assert twice.tolist() == tokens({"prompt": "a"}, tiny_tokenizer("<s>" + CHATML)).tolist()


def test_without_a_chat_template_there_are_no_prompts() -> None:
    with pytest.raises(UserError, match="no chat template"):
        tokenize_prompts([read({"prompt": "a"})], tiny_tokenizer())


def test_a_prompt_that_the_template_refuses_is_faulty_and_the_others_keep_their_places() -> None:
    picky = "{% if 'bad' in messages[-1].content %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    rows = [read({"prompt": text}) for text in ("a", "bad", "b")]
    first, refused, last = tokenize_prompts(rows, tiny_tokenizer(picky))
    assert refused == Drop("the chat template refuses it: not this", HERE, faulty=True)
    assert isinstance(first, TokenizedPrompt) and isinstance(last, TokenizedPrompt)
    assert (first.prompt, last.prompt) == ("a", "b")
    assert not np.array_equal(first.input_ids, last.input_ids)


# fitting


def fitted(ids: list[int], length: int, how: Truncation, room: int = 0) -> Any:
    prompt = TokenizedPrompt(np.array(ids, np.int32), "a", {}, "s")
    result = fit_prompt(prompt, HERE, length, how, bos_id=1, room=room)
    return result.reason if isinstance(result, Drop) else result.input_ids.tolist()


@pytest.mark.parametrize("how", list(Truncation))
def test_a_prompt_that_leaves_room_for_the_response_is_unchanged(how: Truncation) -> None:
    assert fitted([1, 5, 6, 7], 7, how, room=3) == [1, 5, 6, 7]


def test_a_prompt_too_long_for_its_response_is_dropped_in_words_of_the_settings() -> None:
    assert fitted([1, 5, 6, 7], 6, Truncation.drop, room=3) == (
        "longer than data.max_length=6 less the 3 tokens kept for a response (max_new_tokens)"
    )
    assert fitted([1, 5, 6, 7], 3, Truncation.drop) == "longer than data.max_length=3"


def test_truncation_on_the_left_keeps_the_end_and_the_bos_and_on_the_right_nothing() -> None:
    assert fitted([1, 5, 6, 7], 6, Truncation.left, room=3) == [1, 6, 7]
    assert fitted([4, 5, 6, 7], 6, Truncation.left, room=3) == [5, 6, 7]
    assert fitted([4, 5, 6, 7], 4, Truncation.left, room=3) == [7]
    assert fitted([1, 5, 6, 7], 4, Truncation.left, room=3) == "cut by truncation"  # a BOS asks nothing
    assert fitted([1, 5, 6, 7], 6, Truncation.right, room=3) == "cut by truncation"
