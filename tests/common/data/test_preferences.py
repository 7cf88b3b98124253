"""How a row with several answers becomes pairs, and each way it can be wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.data.outcomes import RowError
from common.data.preferences import RowUnused, recognise, to_preferences
from common.data.types import Message, Place, Preference, RawExample
from common.errors import UserError

PLACE = Place("rows.jsonl", 3)
Turns = list[tuple[str, str]]


def read(columns: dict[str, Any], names: dict[str, str] | None = None) -> list[Preference]:
    renamed = {ours: columns.get(theirs) for ours, theirs in (names or {}).items()}
    return to_preferences(RawExample(columns, "s", PLACE), recognise({**columns, **renamed}), names)


def sides(columns: dict[str, Any]) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen and rejected of a row that gives one pair, as (role, content)."""
    (pair,) = read(columns)
    prompt, chosen, rejected = (
        [(message.role, message.content) for message in part]
        for part in (pair.prompt, pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "s"}
Q, A, B = ("user", "q"), ("assistant", "a"), ("assistant", "b")


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [Q]),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, [Q]),
        ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [Q]),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, [Q]),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, [("system", "s"), Q]),
        # sides that repeat the prompt
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [Q],
        ),
        (
            {
                "prompt": "q",
                "system": "s",
                "chosen": [SYSTEM, user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [("system", "s"), Q],
        ),
        # transcripts, the prompt with and without its cue
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, [Q]),
        ({"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, [Q]),
        (
            {
                "prompt": "Human: q\n\nAssistant:",
                "chosen": "Human: q\n\nAssistant: a",
                "rejected": "Human: q\n\nAssistant: b",
            },
            [Q],
        ),
        # no prompt of its own
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, [Q]),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, [Q]),
        (
            {
                "prompt": None,
                "system": "s",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [("system", "s"), Q],
        ),
    ],
)
def test_every_way_to_write_a_pair_says_the_same(columns: dict[str, Any], prompt: Turns) -> None:
    assert recognise(columns).name == "preference"
    assert sides(columns) == (prompt, [A], [B])


def test_the_implicit_prompt_is_what_both_sides_begin_with_turn_by_turn() -> None:
    begin = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "
    prompt, chosen, rejected = sides({"chosen": begin + "same word", "rejected": begin + "same words"})
    assert prompt == [("user", "one"), ("assistant", "two"), ("user", "three")]
    # characters in common do not belong to the prompt
    assert chosen == [("assistant", "same word")] and rejected == [("assistant", "same words")]


def test_an_implicit_prompt_never_ends_with_an_assistant_turn() -> None:
    begin = [user("q"), assistant("yes")]
    prompt, chosen, rejected = sides(
        {"chosen": [*begin, user("r"), assistant("a")], "rejected": [*begin, user("t"), assistant("b")]}
    )
    assert prompt == [Q]
    assert chosen == [("assistant", "yes"), ("user", "r"), A]
    assert rejected == [("assistant", "yes"), ("user", "t"), B]


def test_a_side_that_goes_on_where_the_other_ends_keeps_its_answer() -> None:
    chosen = [user("q"), assistant("a")]
    prompt, shorter, longer = sides({"chosen": chosen, "rejected": [*chosen, user("r"), assistant("b")]})
    assert (prompt, shorter, longer) == ([Q], [A], [A, ("user", "r"), B])


def test_a_name_in_the_middle_of_a_line_is_something_that_was_said() -> None:
    said = "He said\nHuman: no. Assistant: yes"
    prompt, chosen, _ = sides(
        {"chosen": f"\n\nHuman: q\n\nAssistant: {said}", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    )
    assert prompt == [Q] and chosen == [("assistant", said)]


def test_two_answers_in_a_row_stay_two_turns() -> None:
    _, chosen, rejected = sides(
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: more",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        }
    )
    assert chosen == [A, ("assistant", "more")] and rejected == [B]


def test_plain_strings_are_kept_to_the_letter() -> None:
    prompt, chosen, _ = sides({"prompt": " q\n", "chosen": " a ", "rejected": "b"})
    assert prompt == [("user", " q\n")] and chosen == [("assistant", " a ")]


@pytest.mark.parametrize("between", [" ", "\n\n", ""])
def test_plain_strings_that_both_repeat_the_prompt_are_read_without_it(between: str) -> None:
    asked = "What is 2+2?"
    row = {"prompt": asked, "chosen": f"{asked}{between}4", "rejected": f"{asked}{between}5"}
    assert sides(row) == ([("user", asked)], [("assistant", "4")], [("assistant", "5")])
    # nothing behind the prompt is no answer: counted later
    assert sides({**row, "rejected": asked})[2] == [("assistant", "")]


def test_one_plain_string_that_repeats_the_prompt_is_an_answer_that_quotes_it() -> None:
    prompt, chosen, rejected = sides({"prompt": "why?", "chosen": "why? because", "rejected": "why not"})
    assert prompt == [("user", "why?")]
    assert chosen == [("assistant", "why? because")] and rejected == [("assistant", "why not")]


def test_empty_answers_are_read_and_left_to_be_counted_later() -> None:
    assert sides({"prompt": "q", "chosen": "", "rejected": "b"})[1] == [("assistant", "")]
    begin = "\n\nHuman: q\n\nAssistant:"
    assert sides({"chosen": begin, "rejected": f"{begin} b"})[1] == [("assistant", "")]


def test_columns_with_other_names_are_mapped() -> None:
    names = {"prompt": "query", "chosen": "better", "rejected": "worse"}
    (pair,) = read({"query": "q", "better": "a", "worse": "b"}, names)
    assert pair.prompt == (Message("user", "q"),) and pair.chosen == (Message("assistant", "a"),)
    assert pair.source == "s" and pair.place == PLACE


@pytest.mark.parametrize(("cell", "margin"), [(0.5, 0.5), (2, 2.0), ("1.5", 1.5)])
def test_a_margin_comes_from_its_column(cell: Any, margin: float) -> None:
    assert read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": cell})[0].margin == margin


def test_a_margin_below_nothing_says_that_the_sides_are_the_wrong_way_round() -> None:
    with pytest.raises(RowError, match="margin is -2: chosen is the better answer"):
        read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -2})


def test_without_a_column_the_margin_is_nothing() -> None:
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"})[0].margin == 0.0


@pytest.mark.parametrize("cell", [None, ""])
def test_an_empty_cell_is_no_margin(cell: Any) -> None:
    assert read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": cell})[0].margin == 0.0


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({**PAIR, "margin": "wide"}, "margin is not a finite number ('wide')"),
        ({**PAIR, "margin": math.inf}, "margin is not a finite number (inf)"),
        ({**PAIR, "margin": True}, "margin is not a finite number (a boolean)"),
        ({**PAIR, "margin": []}, "margin is not a finite number (an array)"),
        ({**PAIR, "prompt": " "}, "prompt is empty"),
        ({**PAIR, "prompt": []}, "prompt has no turns"),
        ({**PAIR, "prompt": 3}, "prompt is not a string (a number)"),
        ({**PAIR, "chosen": 3}, "chosen is not a string (a number)"),
        ({**PAIR, "chosen": None}, "no chosen (the source's format is preference)"),
        ({**PAIR, "prompt": [user("q"), assistant("x")]}, "the prompt ends with an assistant turn"),
        ({**PAIR, "prompt": [SYSTEM]}, "chosen and rejected share no question, only the system turn"),
        ({**PAIR, "chosen": [user("other"), assistant("a")]}, "prompt is not a prefix of chosen"),
        ({**PAIR, "rejected": [SYSTEM, user("q"), assistant("b")]}, "prompt is not a prefix of rejected"),
        (
            {**PAIR, "prompt": "Human: q", "rejected": "Human: r\n\nAssistant: b"},
            "prompt is not a prefix of rejected",
        ),
        ({**PAIR, "chosen": [user("q")]}, "chosen does not end with an assistant turn"),
        ({**PAIR, "chosen": []}, "chosen does not end with an assistant turn"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a plain string, so a column prompt is needed"),
        (
            {"chosen": "Human: q\n\nAssistant: a", "rejected": "b"},
            "rejected is a plain string, so a column prompt is needed",
        ),
        (
            {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: r\n\nAssistant: b"},
            "chosen and rejected share nothing",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("a")]}, "chosen and rejected share nothing"),
        (
            {
                "chosen": [SYSTEM, user("q"), assistant("a")],
                "rejected": [SYSTEM, user("r"), assistant("b")],
            },
            "chosen and rejected share no question, only the system turn",
        ),
        (
            {
                "chosen": [user("q"), user("r"), assistant("a")],
                "rejected": [user("q"), user("t"), assistant("b")],
            },
            "chosen goes on with a user turn after the prompt, not with an answer",
        ),
        (
            {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b\n\nHuman: r"},
            "rejected does not end with an assistant turn",
        ),
        (
            {"prompt": [user("q"), assistant(""), user("r")], "chosen": "a", "rejected": "b"},
            "turn 2: the assistant turn is empty",
        ),
        (
            {"prompt": "q", "chosen": [assistant("a"), SYSTEM, assistant("c")], "rejected": "b"},
            "turn 3: a system turn can only be the first",
        ),
        (
            {"prompt": "q", "chosen": [{"role": "alien", "content": "a"}], "rejected": "b"},
            "chosen, turn 1: unknown role 'alien'",
        ),
    ],
)
def test_a_wrong_row_says_what_is_wrong(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        read(columns)
    assert str(error.value).startswith(reason)


def test_demonstrations_are_refused_with_the_columns_found_and_what_is_needed() -> None:
    with pytest.raises(
        UserError, match=r"r.jsonl:1: this step needs preferences.*answer, question\n.*chosen"
    ):
        recognise({"question": "q", "answer": "a"}, origin="r.jsonl:1")
    with pytest.raises(UserError, match=r"format=messages is not a format of preferences\n.*graded answers"):
        recognise({"messages": []}, name="messages")


# graded answers


def graded(is_correct: Any, solution: Any) -> dict[str, Any]:
    return {"is_correct": is_correct, "solution": solution}


def test_each_right_answer_is_preferred_to_each_wrong_one_in_column_order() -> None:
    row = {
        "question": "q",
        "ground_truth": "not a model's",
        "w": graded(False, "1"),
        "x": graded(True, "2"),
        "y": graded(False, "3"),
        "z": graded(True, "4"),
    }
    assert recognise(row).name == "graded answers"
    pairs = read(row)
    assert all(pair.prompt == (Message("user", "q"),) and pair.place == PLACE for pair in pairs)
    found = [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]
    assert found == [("2", "1"), ("2", "3"), ("4", "1"), ("4", "3")]


def test_a_row_of_graded_answers_gives_four_pairs_at_the_most() -> None:
    wrong = {f"w{number}": graded(False, str(number)) for number in range(6)}
    pairs = read({"question": "q", **wrong, "r": graded(True, "yes")})
    assert [pair.rejected[0].content for pair in pairs] == ["0", "1", "2", "3"]


def test_equal_answers_give_no_pair_and_no_second_one() -> None:
    row = {"question": "q", "u": graded(True, "1"), "v": graded(False, "1"), "w": graded(False, "2")}
    assert [pair.rejected[0].content for pair in read(row)] == ["2"]
    again = {"question": "q", "u": graded(True, "1"), "v": graded(True, "1"), "w": graded(False, "2")}
    assert len(read(again)) == 1


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (graded(True, "1"), graded(True, "2"), "no wrong answer"),
        (graded(False, "1"), graded(False, "2"), "no right answer"),
        (graded(True, "1"), graded(False, "1"), "right and wrong answers are the same"),
    ],
)
def test_a_row_that_compares_nothing_is_unused_and_not_bad(first: Any, second: Any, reason: str) -> None:
    with pytest.raises(RowUnused, match=reason):
        read({"question": "q", "u": first, "v": second})


def test_a_grade_that_is_not_yes_or_no_is_a_bad_row() -> None:
    format = recognise({"question": "q", "u": graded(True, "1"), "v": graded(False, "2")})

    def later(**columns: Any) -> list[Preference]:
        return to_preferences(RawExample({"question": "q", **columns}, "s", PLACE), format)

    with pytest.raises(RowError, match=r"v: is_correct is not a boolean \(a number\)"):
        later(u=graded(True, "1"), v=graded(0, "2"))
    with pytest.raises(RowError, match=r"v is not a string \(null\)"):
        later(u=graded(True, "1"), v=graded(False, None))
    with pytest.raises(RowError, match="fewer than two graded answers"):
        later(u=graded(True, "1"))


def test_a_greeting_that_both_answers_return_is_not_a_repeated_prompt() -> None:
    (pair,) = read({"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."})
    assert [side[0].content for side in (pair.chosen, pair.rejected)] == ["Hi there!", "Hi."]
