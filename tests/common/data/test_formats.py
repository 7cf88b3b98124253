"""Each format by its columns, and each way a row can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from common.data.formats import FORMATS, recognise, to_conversation
from common.data.outcomes import RowError
from common.data.types import Conversation, Message, Place, RawExample
from common.errors import UserError

PLACE = Place("rows.jsonl", 3)


def understood(columns: dict[str, Any], names: dict[str, str] | None = None) -> Conversation:
    renamed = {ours: ours for ours in columns} if names is None else names
    format = recognise([*columns, *renamed])
    return to_conversation(RawExample(columns, "s", PLACE), format, names)


def turns(columns: dict[str, Any], names: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in understood(columns, names).messages]


QA = [("user", "q"), ("assistant", "a")]
ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("messages", {"messages": [ASKED, ANSWERED]}, QA),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, ASKED, ANSWERED]},
            [("system", "s"), *QA],
        ),
        (
            "conversations",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            QA,
        ),
        (
            "conversations",
            {
                "system": "s",
                "conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}],
            },
            [("system", "s"), *QA],
        ),
        ("instruction", {"instruction": "q", "output": "a"}, QA),
        ("instruction", {"instruction": "q", "input": "", "output": "a"}, QA),
        (
            "instruction",
            {"instruction": "q", "input": "i", "output": "a"},
            [("user", "q\n\ni"), ("assistant", "a")],
        ),
        ("prompt/completion", {"prompt": "q", "completion": "a"}, QA),
        ("prompt/completion", {"prompt": [ASKED], "completion": [ANSWERED]}, QA),
        ("prompt/response", {"prompt": "q", "response": "a", "system": "s"}, [("system", "s"), *QA]),
        ("question/answer", {"question": "q", "answer": "a", "id": 5}, QA),
    ],
)
def test_a_format_is_recognised_by_its_columns(
    name: str, columns: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert recognise(columns).name == name
    assert turns(columns) == expected


def test_plain_text_has_no_turns() -> None:
    row = understood({"text": "once upon a time"})
    assert row.text == "once upon a time" and row.messages == () and row.place == PLACE


def test_every_format_is_covered_here() -> None:
    assert {format.name for format in FORMATS} == {
        "messages",
        "conversations",
        "instruction",
        "prompt/completion",
        "prompt/response",
        "question/answer",
        "text",
    }


def test_columns_with_other_names_are_mapped() -> None:
    columns = {"query": "q", "reply": "a", "prompt": "something else"}
    assert turns(columns, {"prompt": "query", "completion": "reply"}) == QA
    with pytest.raises(RowError, match="no column reply"):
        raw = RawExample({"query": "q"}, "s", PLACE)
        to_conversation(raw, recognise(["prompt", "completion"]), {"prompt": "query", "completion": "reply"})


def test_what_else_a_turn_holds_is_kept_for_the_template() -> None:
    calls = [{"name": "clock"}]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    row = understood({"messages": [ASKED, turn]})
    canonical = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    assert row.messages[1] == Message("assistant", "", {"tool_calls": canonical})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": "q"}, "messages is not an array (str)"),
        ({"messages": ["q"]}, "messages, turn 1 is not an object (str)"),
        ({"messages": [{"role": "user"}]}, "messages, turn 1 has no content (keys: role)"),
        (
            {"messages": [ASKED, {"role": "bot", "content": "a"}]},
            "messages, turn 2: unknown role 'bot' (known: system",
        ),
        ({"messages": [{"role": None, "content": "a"}]}, "messages, turn 1: unknown role None"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": 5}]},
            "messages, turn 2: content is not a string (a number)",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            "messages, turn 2: content is not a string (null)",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": " \n"}]},
            "turn 2: the assistant turn is empty",
        ),
        (
            {"messages": [ASKED, {"role": "system", "content": "s"}, ANSWERED]},
            "turn 2: a system turn can only be the first",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}] * 2 + [ANSWERED]},
            "turn 2: a system turn can only be",
        ),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations, turn 1: unknown role 'alien'"),
        ({"prompt": "q", "completion": 7}, "completion is not a string (a number)"),
        ({"prompt": "q", "completion": True}, "completion is not a string (a boolean)"),
        ({"prompt": "q", "completion": None}, "no completion (the source's format is prompt/completion)"),
        ({"prompt": {"a": 1}, "completion": "a"}, "prompt is not a string (an object)"),
        ({"question": "q", "answer": ""}, "turn 2: the assistant turn is empty"),
        ({"text": ""}, "text is empty"),
        ({"text": 4}, "text is not a string (a number)"),
    ],
)
def test_a_wrong_row_says_which_turn_and_why(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        understood(columns)
    assert str(error.value).startswith(reason)


def test_a_later_row_without_the_columns_is_a_bad_row() -> None:
    format = recognise(["prompt", "completion"])
    with pytest.raises(RowError, match="no completion"):
        to_conversation(RawExample({"prompt": "q", "text": "a"}, "s", PLACE), format)


def test_an_answer_may_come_first() -> None:
    assert turns({"messages": [ANSWERED, ASKED, ANSWERED]})[0] == ("assistant", "a")


def test_unknown_columns_list_what_was_found_and_what_is_known() -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: no known format has the columns body, title") as error:
        recognise(["title", "body"], origin="rows.jsonl:1")
    assert error.value.hint is not None and "question/answer: question, answer" in error.value.hint


def test_preference_rows_are_named_as_such() -> None:
    with pytest.raises(UserError, match=r"preference rows[^\n]*\n.*data.sources.format=chosen"):
        recognise(["chosen", "rejected"])


def test_the_preferred_side_is_a_demonstration_when_asked_for() -> None:
    whole = [ASKED, {"role": "assistant", "content": "once"}, ASKED]
    columns = {"chosen": [*whole, ANSWERED], "rejected": [*whole, {"role": "assistant", "content": "b"}]}
    row = to_conversation(RawExample(columns, "s", PLACE), recognise(columns, name="chosen"))
    assert [message.content for message in row.messages] == ["q", "once", "q", "a"]
    assert row.first_trained == 3  # the answer that both sides share was not preferred to anything


def test_an_empty_preferred_side_is_no_demonstration() -> None:
    columns = {"prompt": "q", "chosen": " ", "rejected": "b"}
    with pytest.raises(RowError, match="turn 2: the assistant turn is empty"):
        to_conversation(RawExample(columns, "s", PLACE), recognise(columns, name="chosen"))


def test_a_format_asked_for_must_exist_and_have_its_columns() -> None:
    assert recognise(["text", "prompt", "completion"], name="text").name == "text"
    with pytest.raises(UserError, match=r"format=mesages is not known\n.*did you mean messages"):
        recognise(["messages"], name="mesages")
    with pytest.raises(UserError, match="format instruction needs the columns output; found instruction"):
        recognise(["instruction"], name="instruction")
