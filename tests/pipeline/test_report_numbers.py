"""Intervals by hand, and how numbers are written."""

from __future__ import annotations

import math

import pytest

from common.estimates import Estimate, of_change, of_mean, of_share, student_quantile
from pipeline.report import shown


def test_wilsons_interval_is_the_textbooks() -> None:
    # 8 of 10: (0.8 + 1.9207/10 ± 1.96·sqrt(0.16/10 + 3.8415/400)) / 1.38415
    found = of_share(0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)


def test_a_share_of_everything_still_has_an_interval() -> None:
    found = of_share(1.0, 50)
    assert found.low == pytest.approx(50 / (50 + 1.959964**2), abs=1e-6)
    assert found.high == 1.0


@pytest.mark.parametrize(
    ("freedom", "known"), [(1, 12.706), (5, 2.5706), (10, 2.2281), (30, 2.0423), (10**6, 1.96)]
)
def test_quantiles_are_those_of_students_table(freedom: int, known: float) -> None:
    # the expansion is good to 0.11 % at 5 degrees of freedom, and better beyond
    assert student_quantile(freedom) == pytest.approx(known, rel=1.5e-3)


def test_a_means_interval_is_students() -> None:
    # 1..5: mean 3, standard deviation sqrt(2.5), 4 degrees of freedom
    found = of_mean({str(v): [v] for v in (1.0, 2.0, 3.0, 4.0, 5.0)})
    half = 2.776 * math.sqrt(2.5 / 5)
    assert found is not None and found.count == 5
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))


def test_responses_to_one_prompt_are_counted_once() -> None:
    apart = of_mean({"a": [0.0], "b": [1.0], "c": [0.0], "d": [1.0], "e": [0.5]})
    repeated = of_mean({"a": [0.0] * 9, "b": [1.0] * 9, "c": [0.0] * 9, "d": [1.0] * 9, "e": [0.5] * 9})
    assert apart == repeated


def test_a_kl_of_zero_everywhere_is_no_share() -> None:
    zeros = {str(index): [0.0] for index in range(20)}
    assert of_mean(zeros) == Estimate(0.0, count=20)
    share = of_mean(zeros, may_be_share=True)
    assert share is not None and share.high == pytest.approx(0.161, abs=1e-3)


def test_the_interval_is_laid_around_what_was_logged() -> None:
    found = of_mean({"a": [1.0], "b": [2.0]}, 1.6)
    assert found is not None
    assert found.value == 1.6 and (found.low + found.high) / 2 == pytest.approx(1.6)


def test_changes_are_paired_by_prompt() -> None:
    before = {"a": [0.0], "b": [10.0], "c": [20.0]}
    after = {"a": [1.0], "b": [11.1], "c": [20.9]}
    found = of_change(before, after)
    assert found is not None
    assert found.value == pytest.approx(1.0)
    # unpaired, the spread between prompts (10) would drown a change of 1
    assert found.high - found.low < 0.6 and found.is_clear
    assert of_change(before, {"a": [1.0]}) is None


def test_values_that_are_no_numbers_do_not_enter_a_mean() -> None:
    found = of_mean({"a": [1.0], "b": [math.nan], "c": [3.0], "d": [math.inf]})
    assert found is not None and (found.value, found.count) == (2.0, 2)
    assert of_mean({"a": [math.nan]}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.46714, "0.467"), (-0.159, "−0.159"), (5.234, "5.23"), (55.43, "55.4"),
        (0.0123, "0.0123"), (12848.2, "12,848"), (999.7, "1,000"), (0.9999, "1.00"),
        (3e-4, "3e-4"), (1.25e-7, "1.25e-7"),
        (math.nan, "not a number"), (-math.inf, "−∞"), (1e300, "1e300"), (5e-324, "4.94e-324"),
    ],
)  # fmt: skip
def test_figures_are_rounded_to_what_they_say(value: float, text: str) -> None:
    assert shown.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100%"), (0.0, "0%"), (0.972, "97.2%"), (0.99999, "99.999%"), (1e-5, "0.001%")]
)
def test_a_share_is_not_rounded_to_all_or_nothing(value: float, text: str) -> None:
    assert shown.share(value) == text


def test_differences_of_shares_carry_their_sign() -> None:
    assert [shown.points(value) for value in (0.051, -0.009, -1e-5)] == ["+5.1", "−0.9", "0"]


def test_ticks_are_written_as_exactly_as_they_lie() -> None:
    assert [shown.tick(value, 2.5e-4) for value in (0.0, 1e-3, 1.25e-3)] == ["0", "1e-3", "1.25e-3"]
    assert [shown.tick(value, 0.25) for value in (0.25, 0.5)] == ["0.25", "0.50"]
    assert [shown.tick(value, 0.2) for value in (-0.2, 1.0)] == ["−0.2", "1.0"]
    assert [shown.tick(value, 2500) for value in (2500, 10_000)] == ["2.5k", "10k"]


def test_numbers_of_one_measure_have_the_same_decimals() -> None:
    assert [shown.decimals_for(size, 3) for size in (0.3, 2.26, 21.0, 0.0834, 1e-5)] == [3, 2, 1, 4, None]
    assert [shown.fixed(v, 3, signed=True) for v in (0.0043, -0.0189, 1e-6, 0.0)] == [
        "+0.004",
        "−0.019",
        "0.000",
        "0",
    ]


def test_times_are_said_in_words() -> None:
    begin = "2026-11-21T13:18:09+00:00"
    assert [shown.duration(text) for text in ("42", "120", "3720", "", "-3", "1.5", "9" * 5000)] == [
        "42 s",
        "2 min 00 s",
        "1 h 02 min",
        *4 * [None],
    ]
    assert shown.moment(begin) == "2026-11-21 13:18:09 UTC"
