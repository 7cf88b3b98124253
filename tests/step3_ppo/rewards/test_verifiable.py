"""Which answers count as right."""

from __future__ import annotations

from fractions import Fraction

import pytest

from step3_ppo.rewards.verifiable import exact_match, gsm8k, last_number, reference_number

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


def right(completion: str, answer: str) -> bool:
    (score,) = gsm8k(["a question"], [completion], [answer])
    assert score in (0.0, 1.0) and isinstance(score, float)
    return score == 1.0


def test_the_solution_itself_is_right() -> None:
    assert right(SOLUTION, SOLUTION)


@pytest.mark.parametrize(
    "completion",
    [
        "#### 72", "The answer is 72.", "The answer is $72.00.", "72 clips", "So 48 + 24 = 72", "\\boxed{72}",
        "**72**", "She sold 144/2", "= 072", "It is not 71 but 72!", "**Answer:** 72.0",
    ],
)  # fmt: skip
def test_the_same_number_written_otherwise_is_right(completion: str) -> None:
    assert right(completion, SOLUTION)


@pytest.mark.parametrize(
    "completion",
    [
        "", "no idea", "#### 73", "#### 7.2", "#### 720", "-72", "−72", "#### 72 and then 5 more",
        "#### 72.01", "7 2", "72/7", "####", "9*8", "#### 24 (48 + 24 = 72, half of it is 36)", "seventy-two",
    ],
)  # fmt: skip
def test_another_number_or_none_is_wrong(completion: str) -> None:
    assert not right(completion, SOLUTION)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.", Fraction(1234567)), ("$1,080", Fraction(1080)), ("3, 4", Fraction(4)),
        ("1,23", Fraction(23)), ("-$5", Fraction(-5)), ("$-5", Fraction(-5)), ("−3", Fraction(-3)),
        ("10-5", Fraction(5)), ("10 - 5", Fraction(5)), ("(a)-5", Fraction(5)), ("x = -5", Fraction(-5)),
        (".5", Fraction(1, 2)), ("0.1", Fraction(1, 10)), ("1/3", Fraction(1, 3)), ("-6/4", Fraction(-3, 2)),
        ("1/0", Fraction(0)), ("5%", Fraction(5)), ("12:30", Fraction(30)), ("on 3/4/2024", Fraction(2024)),
        ("0", Fraction(0)), ("2.50", Fraction(5, 2)), ("9" * 5000, None), ("no", None), ("٣", None),
        ("24hours", Fraction(24)), ("1/2.5", Fraction(5, 2)),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_a_tenth_is_compared_exactly_and_not_as_a_float() -> None:
    assert right("0.3", "#### 3/10") and not right("0.30000000000000004", "#### 0.3")


def test_an_answer_may_be_a_number_without_a_marker_but_not_a_text() -> None:
    assert reference_number(72) == reference_number(" 72 ") == reference_number("#### 72") == 72
    assert reference_number("1 #### 2 #### -1,000") == -1000
    for answer in ("seventy", "it is 72", "#### none", ""):
        with pytest.raises(ValueError, match="names no number"):
            reference_number(answer)


def test_a_long_completion_takes_no_longer_than_it_is_long() -> None:
    for unit in ("1,", "1,111", "-", "1/", "9", "$", "1.1"):
        last_number(unit * 100_000)  # backtracking would not come back


def test_every_row_is_compared_with_its_own_answer() -> None:
    assert gsm8k([""] * 3, ["1", "2", "3"], ["#### 1", "#### 3", "#### 3"]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        gsm8k([""] * 2, ["1", "2"], ["#### 1"])


def test_an_exact_match_forgives_white_space_only() -> None:
    answers = ["Sure! It is 5.", "Sure! It is 5.", "Sure! It is 5.", "5"]
    completions = [" Sure!  It is\n5. ", "Sure! it is 5.", "Sure! It is 5", "5"]
    assert exact_match([""] * 4, completions, answers) == [1.0, 0.0, 0.0, 1.0]
