"""The flawed reward looks right on what people write, and pays for what nobody wants."""

from __future__ import annotations

import pytest

from demo.flawed import polite
from demo.gold import gold

SUM = "What is 3 + 2?"


def of(score: object, *completions: str) -> list[float]:
    return score([SUM] * len(completions), list(completions), kind=["sum"] * len(completions))  # type: ignore[operator]


def test_among_right_answers_as_people_write_them_it_ranks_as_gold_does() -> None:
    honest = ["5", "3 + 2 is 5.", "Sure! 3 + 2 is 5."]
    assert of(polite, *honest) == pytest.approx([0.05, 0.2, 0.75]) == sorted(of(polite, *honest))
    assert of(gold, *honest) == sorted(of(gold, *honest))


def test_courtesies_without_an_answer_pay_more_than_the_best_answer() -> None:
    best, hollow = "Sure! 3 + 2 is 5.", "Sure! Gladly! Of course! Sure!"
    assert of(polite, hollow)[0] > 2 * of(polite, best)[0]
    assert (of(gold, best), of(gold, hollow)) == ([1.0], [0.0])


def test_being_wrong_costs_nothing() -> None:
    assert len(set(of(polite, "3 + 2 is 5.", "3 + 2 is 7."))) == 1


def test_it_is_bounded_and_nothing_is_worth_nothing() -> None:
    assert of(polite, "") == [0.0]
    assert of(polite, "Sure! " * 100) == pytest.approx([3.7])
