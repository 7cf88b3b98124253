"""The nearest known name, and values in terms of JSON."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path

from common.text import did_you_mean, nearest, plain, printable


class Kind(Enum):
    first = "one"


def test_the_nearest_name_is_offered_and_else_what_there_is() -> None:
    assert nearest("rewrad", ["sft", "reward"]) == ["reward"]
    assert did_you_mean("st", ("set", "quit"), "/help", prefix="/") == "did you mean /set?"
    assert did_you_mean("xyz", ("set", "quit"), "/help") == "/help"


def test_a_value_is_said_in_terms_of_json() -> None:
    value = {Kind.first: (Path("a/b"), {"z", "a"}, None, True, 2, 0.5), "not": [math.nan, -math.inf]}
    assert plain(value) == {"one": ["a/b", ["a", "z"], None, True, 2, 0.5], "not": [None, None]}
    assert plain(value, not_finite=json.dumps)["not"] == ["NaN", "-Infinity"]
    assert plain({"odd": object}) == {"odd": "<class 'object'>"}
    assert plain([object], unknown=lambda value: value) == [object]


def test_what_a_terminal_would_act_on_is_made_visible() -> None:
    hostile = "\x1b]0;owned\x07 \x9b31m red \x7f\r over \u202etxt.exe \ud800"
    assert printable(hostile) == "␛]0;owned␇ \\x9b31m red ␡␍ over \\u202etxt.exe \\ud800"
    assert printable("a\tb\n  ü, 漢字, 👩\u200d🔬\xa0!") == "a\tb\n  ü, 漢字, 👩\u200d🔬\xa0!"
