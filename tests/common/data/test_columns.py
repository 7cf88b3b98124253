"""Columns and keys beside the turns: what is read, what is told apart, and what is named as not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig, SourceConfig
from common.data import formats, preferences, prompts
from common.data.dataset import build
from common.data.dataset_types import DEMONSTRATIONS, PREFERENCES, PROMPTS
from common.data.outcomes import RowError
from common.data.types import Conversation, Message, Place, Preference, Prompt, RawExample
from tests.common.data.reading import read_source
from tests.tiny import CHATML, tiny_tokenizer

HERE = Place("rows.jsonl", 3)
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def demonstration(columns: dict[str, Any], *, columnar: bool = False) -> Conversation:
    format = formats.recognise(columns)
    return formats.to_conversation(RawExample(columns, "s", HERE, columnar), format)


def preference(columns: dict[str, Any]) -> Preference:
    return preferences.to_preferences(RawExample(columns, "s", HERE), preferences.recognise(columns))[0]


def prompt(columns: dict[str, Any]) -> Prompt:
    return prompts.to_prompt(RawExample(columns, "s", HERE), prompts.recognise(columns))


def said(turns: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


EVERY_DEMONSTRATION: list[dict[str, Any]] = [
    {"messages": [ASKED, ANSWERED]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [ASKED], "completion": [ANSWERED]},
    {"prompt": [ASKED], "completion": "a"},
    {"question": "q", "answer": "a"},
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [OTHER]},
    {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, OTHER]},
    {
        "question": "q",
        "x": {"is_correct": True, "solution": "a"},
        "y": {"is_correct": False, "solution": "b"},
    },
]


# columns that change the prompt


@pytest.mark.parametrize(
    "written",
    [[TOOL], [WEATHER], json.dumps([TOOL]), json.dumps([WEATHER]), json.dumps(TOOL), [json.dumps(TOOL)]],
)
def test_tools_are_read_as_objects_or_as_json_with_or_without_a_wrapper(written: Any) -> None:
    for row in EVERY_DEMONSTRATION:
        assert demonstration({**row, "tools": written}).context.tools == (TOOL,)
        assert prompt({**row, "tools": written}).context.tools == (TOOL,)
    for row in PAIRS:
        assert preference({**row, "tools": written}).context.tools == (TOOL,)


@pytest.mark.parametrize("none", [None, "", [], "[]", "null"])
def test_a_row_without_tools_gives_the_template_none(none: Any) -> None:
    assert demonstration({"prompt": "q", "completion": "a", "tools": none}).context.tools == ()


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("[{", "tools: not valid JSON: "),
        (["hammer"], "tools, number 1: not valid JSON: "),
        ([TOOL, 3], "tools, number 2 is not an object (a number)"),
        ([{"description": "x"}], "tools, number 1 is no tool definition: it has no name (keys: description)"),
    ],
)
def test_tools_that_are_no_definitions_are_an_error_of_the_row(written: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        demonstration({"messages": [ASKED, ANSWERED], "tools": written})
    assert str(error.value).startswith(reason)


def test_a_system_column_is_the_first_turn_of_every_format() -> None:
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    for row in EVERY_DEMONSTRATION:
        assert said(demonstration({**row, "system": "s"}).messages) == expected
        assert said(prompt({**row, "system": "s"}).messages) == expected[:2]
    for row in PAIRS:
        assert said(preference({**row, "system": "s"}).prompt) == expected[:2]


def test_a_system_column_may_repeat_the_system_turn_but_not_contradict_it() -> None:
    row = {"messages": [SYSTEM, ASKED, ANSWERED]}
    assert said(demonstration({**row, "system": "s"}).messages)[0] == ("system", "s")
    for read in (demonstration, prompt):
        with pytest.raises(RowError, match="the column system and the first turn.* say different things"):
            read({**row, "system": "t"})
    with pytest.raises(RowError, match="say different things"):
        preference({"prompt": [SYSTEM, ASKED], "chosen": "a", "rejected": "b", "system": "t"})


def test_history_is_read_as_turns_before_whose_answers_are_not_trained() -> None:
    row = {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "s"}
    read = demonstration(row)
    turns = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert said(read.messages) == turns and read.first_trained == 4
    assert said(prompt(row).messages) == turns[:-1]
    nothing: list[Any] = [None, [], ""]
    for none in nothing:
        assert said(demonstration({**row, "history": none}).messages) == [turns[0], *turns[3:]]
    unreadable: list[Any] = [[["q1"]], ["q1", "a1"], [["q1", None]], 4]
    for wrong in unreadable:
        with pytest.raises(RowError, match="history"):
            demonstration({**row, "history": wrong})


@pytest.mark.parametrize("written", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_a_row_gives_the_template_variables(written: Any) -> None:
    for row in EVERY_DEMONSTRATION:
        assert demonstration({**row, "chat_template_kwargs": written}).context.variables == {
            "enable_thinking": False
        }
    assert preference({**PAIRS[0], "chat_template_kwargs": written}).context.variables
    assert prompt({"prompt": "q", "chat_template_kwargs": written}).context.variables
    assert demonstration({**EVERY_DEMONSTRATION[0], "chat_template_kwargs": None}).context.variables == {}


def test_a_row_cannot_set_what_the_renderer_gives_the_template() -> None:
    with pytest.raises(RowError, match="chat_template_kwargs sets add_generation_prompt"):
        demonstration(
            {"prompt": "q", "completion": "a", "chat_template_kwargs": {"add_generation_prompt": 1}}
        )


# which turns are trained


@pytest.mark.parametrize(
    "key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}]
)
def test_a_turn_of_weight_zero_is_not_trained_and_the_key_is_no_part_of_the_turn(key: dict[str, Any]) -> None:
    read = demonstration({"messages": [ASKED, {**ANSWERED, **key}, ASKED, {**ANSWERED, "weight": 1}]})
    assert [turn.trained for turn in read.messages] == [True, False, True, True]
    assert all(turn.extra == {} for turn in read.messages)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**ANSWERED, "weight": 0.5}, "turn 2: weight is 0.5: a turn is trained (1) or not (0)"),
        ({**ANSWERED, "weight": True}, "turn 2: weight is True"),
        ({**ANSWERED, "train": "no"}, "turn 2: train is not a boolean (str)"),
        ({**ASKED, "train": True}, "turn 2: train is true, and only assistant turns are trained"),
    ],
)
def test_other_weights_are_an_error_of_the_row(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        demonstration({"messages": [ASKED, turn, ANSWERED]})
    assert reason in str(error.value)


def test_assistant_turns_inside_a_prompt_are_not_trained() -> None:
    row = {"prompt": [ASKED, OTHER, ASKED], "completion": [ANSWERED]}
    assert demonstration(row).first_trained == 3
    with pytest.raises(RowError, match="the prompt ends with an assistant turn"):
        demonstration({"prompt": [ASKED, OTHER], "completion": [ANSWERED]})


def test_a_transcript_is_the_same_prompt_in_demonstrations_preferences_and_prompts() -> None:
    asked = "\n\nHuman: a\n\nAssistant: ok\n\nHuman: b\n\nAssistant:"
    turns = [("user", "a"), ("assistant", "ok"), ("user", "b")]
    read = demonstration({"prompt": asked, "completion": " c"})
    assert said(read.messages) == [*turns, ("assistant", "c")] and read.first_trained == 3
    assert said(preference({"prompt": asked, "chosen": " c", "rejected": " d"}).prompt) == turns
    assert said(prompt({"prompt": asked}).messages) == turns


# structured fields


@pytest.mark.parametrize(
    "written",
    [
        [CALL],
        [{"name": "weather", "arguments": {"city": "Oslo"}}],
        [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        json.dumps([CALL]),
        CALL,
    ],
)
def test_calls_have_one_form_whose_arguments_are_an_object(written: Any) -> None:
    read = demonstration({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": written}]})
    assert read.messages[1] == Message("assistant", "", {"tool_calls": [CALL]})


def test_older_ways_to_write_a_call_are_read() -> None:
    arguments = '{"city": "Oslo"}'
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": arguments},
    }
    assert demonstration({"messages": [ASKED, legacy]}).messages[1].extra == {"tool_calls": [CALL]}
    shared = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "a"},
    ]
    turns = demonstration({"conversations": shared}).messages
    assert turns[1] == Message("assistant", "", {"tool_calls": [CALL]})
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]


def test_a_call_keeps_its_id_and_may_lack_content_and_arguments() -> None:
    turn = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "now", "arguments": ""}}]}
    calls = [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}]
    assert demonstration({"messages": [ASKED, turn]}).messages[1].extra == {"tool_calls": calls}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"name": "f", "arguments": "x = 1"}, "call 1: arguments: not valid JSON"),
        ({"name": "f", "arguments": '{"x": "\\ud800"}'}, "call 1: arguments: lone surrogate \\ud800"),
        ({"name": "f", "arguments": [1]}, "call 1: arguments is not an object (an array)"),
        ({"arguments": {}}, "call 1 has no name (keys: arguments)"),
        ({"name": "f", "parameters": {}}, "call 1 has no arguments (keys: name, parameters)"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(call: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        demonstration({"messages": [ASKED, {**ANSWERED, "tool_calls": [call]}]})
    assert reason in str(error.value)


def test_nulls_of_files_of_columns_are_dropped_at_any_depth_and_those_of_json_lines_are_kept() -> None:
    arguments = {"city": "Oslo", "day": None, "at": {"x": 1, "y": None}}
    call = {"id": None, "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"name": "weather", "parameters": {"properties": {"city": {"enum": ["Oslo", None]}, "day": None}}}
    row = {"messages": [{**ASKED, "tool_calls": None}, turn], "tools": [tool]}

    def arguments_of(read: Conversation) -> Any:
        return read.messages[1].extra["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]

    columnar, lines = demonstration(row, columnar=True), demonstration(row)
    assert arguments_of(columnar) == {"city": "Oslo", "at": {"x": 1}}
    assert arguments_of(lines) == arguments
    properties = {"city": {"enum": ["Oslo", None]}}  # an element of an array is nothing that was filled in
    assert columnar.context.tools[0]["function"] == {
        "name": "weather",
        "parameters": {"properties": properties},
    }
    assert lines.context.tools[0]["function"] == tool


def test_parts_of_type_text_are_joined_and_others_refused_by_name() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert said(demonstration({"messages": [{**ASKED, "content": parts}, ANSWERED]}).messages)[0] == (
        "user",
        "a b",
    )
    image = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(
        RowError, match="turn 1: content, part 2 is of type image_url: only parts of type text"
    ):
        demonstration({"messages": [{**ASKED, "content": image}, ANSWERED]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key: str) -> None:
    read = demonstration({"messages": [ASKED, {**ANSWERED, key: "hm"}]})
    assert read.messages[1].extra == {"reasoning_content": "hm"}
    with pytest.raises(RowError, match="reasoning_content and thinking say different things"):
        demonstration({"messages": [ASKED, {**ANSWERED, "reasoning_content": "x", "thinking": "y"}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_text_or_parts_of_type_text(key: str) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]
    (_, turn) = demonstration({"messages": [ASKED, {**ANSWERED, key: parts}]}).messages
    assert turn.extra == {"reasoning_content": "hm"}
    with pytest.raises(RowError, match=f"messages, turn 2: {key} is not a string .an object."):
        demonstration({"messages": [ASKED, {**ANSWERED, key: {"steps": 2}}]})


@pytest.mark.parametrize(
    "nothing", [{"tool_calls": []}, {"tool_calls": "[]"}, {"thinking": ""}, {"tool_calls": None}]
)
def test_no_calls_and_no_reasoning_leave_no_key_that_a_template_could_see(nothing: dict[str, Any]) -> None:
    assert demonstration({"messages": [ASKED, {**ANSWERED, **nothing}]}).messages[1] == Message(
        "assistant", "a"
    )


def test_turns_may_have_either_pair_of_keys_in_either_column() -> None:
    turns = [("user", "q"), ("assistant", "a")]
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert said(demonstration({"conversations": [ASKED, ANSWERED]}).messages) == turns
    assert said(demonstration({"messages": shared}).messages) == turns
    sides = {"chosen": shared[1], "rejected": {**OTHER}}
    pair = preference({"prompt": shared[:1], **sides})
    assert said(pair.prompt + pair.chosen) == turns and said(pair.rejected) == [("assistant", "b")]


def test_a_list_of_turns_may_be_json_text() -> None:
    for written in (json.dumps([ASKED, ANSWERED]), [json.dumps(ASKED), json.dumps(ANSWERED)]):
        assert said(demonstration({"messages": written}).messages)[1] == ("assistant", "a")


# what is not used


WRITES_TOOLS = "{{ tools | tojson if tools }}" + CHATML


def built(rows: list[dict[str, Any]], folder: Path, kind: Any) -> tuple[list[str], Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(folder / "rows.jsonl"), eval_fraction=0.0)
    lines: list[str] = []
    train, _, ledger = build(
        data, tiny_tokenizer(WRITES_TOOLS), kind=kind, seed=0, cache_dir=folder / "cache", report=lines.append
    )
    assert not any("not used" in line for line in lines)  # the ledger says it, once
    return [line for line in ledger.lines() if "not used" in line], train


def test_a_column_that_nothing_reads_is_named_once(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b", "id": 1, "tools": [], "system_prompt": "s"},
        {"prompt": "b", "completion": "b", "id": 2},
        {"prompt": "c", "completion": "b", "id": 3, "score": 1.0},
    ]
    lines, _ = built(rows, tmp_path, DEMONSTRATIONS)
    way_out = "; to read them: data.sources.columns={system: system_prompt}"
    assert lines == [f"columns of rows that are not used: id, system_prompt, score{way_out}"]


def test_columns_of_pairs_are_named_too_and_graded_answers_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "score_chosen": 5}]
    assert built(rows, tmp_path / "a", PREFERENCES)[0] == ["columns of rows that are not used: score_chosen"]
    assert built([{**PAIRS[3], "level": 1}], tmp_path, PREFERENCES)[0] == [
        "columns of rows that are not used: level"
    ]


def test_columns_of_prompts_go_to_reward_functions_so_that_none_is_unused(tmp_path: Path) -> None:
    lines, train = built([{"prompt": "a", "gold": "4", "tools": [TOOL]}], tmp_path, PROMPTS)
    assert lines == [] and train[0].columns == {"gold": "4", "tools": [TOOL]}


@pytest.mark.parametrize("kind", [DEMONSTRATIONS, PROMPTS])
def test_a_column_of_pictures_is_named_as_not_used(tmp_path: Path, kind: Any) -> None:
    import datasets
    import pyarrow

    picture = datasets.Image()
    features = {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "image": picture}
    stored = pyarrow.array([{"bytes": b"\x89PNG", "path": None}] * 2, picture.pa_type)
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "image": stored})
    info = datasets.DatasetInfo(features=datasets.Features(features))
    datasets.Dataset(datasets.table.InMemoryTable(table), info=info).save_to_disk(str(tmp_path / "rows"))
    data = DataConfig(path=str(tmp_path / "rows"), eval_fraction=0.0)
    train, _, ledger = build(data, tiny_tokenizer(CHATML), kind=kind, seed=0, cache_dir=tmp_path / "cache")
    assert ledger.sources[0].unused_columns == ["image"]
    assert kind is DEMONSTRATIONS or train[0].columns == {"completion": "c"}


def test_a_data_set_on_disk_fills_rows_with_nulls_that_are_dropped(tmp_path: Path) -> None:
    import datasets

    def asks(**arguments: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}

    datasets.Dataset.from_list([asks(city="Oslo"), asks(day="Monday")]).save_to_disk(str(tmp_path / "rows"))
    read = [
        formats.to_conversation(row, formats.recognise(row.columns))
        for row in read_source(SourceConfig(path=str(tmp_path / "rows")))
    ]
    assert [turns.messages[1].extra["tool_calls"][0]["function"]["arguments"] for turns in read] == [  # type: ignore[index]
        {"city": "Oslo"},
        {"day": "Monday"},
    ]
    assert read[0].messages[0].extra == {}
