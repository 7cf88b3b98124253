"""How much a share of few trials says."""

from __future__ import annotations

import pytest

from common.evidence import chance_of_so_few, share_in_words, share_interval, swapped_warning
from common.stage import Step


def test_the_chance_of_so_few_heads_is_the_binomials() -> None:
    assert chance_of_so_few(0.0, 7) == 1 / 128
    assert chance_of_so_few(0.25, 4) == (1 + 4) / 16
    assert chance_of_so_few(1.0, 9) == 1.0
    assert chance_of_so_few(0.5, 0) == 1.0  # no pair says nothing
    assert chance_of_so_few(5 / 12, 12) == pytest.approx(1586 / 4096)
    assert chance_of_so_few(1.5 / 3, 3) == 4 / 8  # a tie: one whole head


def test_many_throws_are_taken_to_be_normal() -> None:
    exact = chance_of_so_few(0.48, 1_000)
    assert exact == pytest.approx(0.1087, abs=1e-4)
    assert chance_of_so_few(0.48 * 1_000 / 1_001, 1_001) == pytest.approx(exact, abs=0.01)
    assert chance_of_so_few(0.0, 100_000) == 0.0


def test_an_interval_is_wilsons_and_ends_at_the_bounds() -> None:
    low, high = share_interval(0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert share_interval(1.0, 3)[1] == 1.0 and share_interval(0.0, 3)[0] == 0.0


def test_a_share_is_said_with_what_it_is_of() -> None:
    assert share_in_words(11 / 12, 12, "pairs") == "91.7% of 12 pairs (95% interval 64.6% to 98.5%)"
    assert share_in_words(0.5, 0, "pairs") == "50.0% of pairs"


def swapped(accuracy: float, margin: float, pairs: int) -> str | None:
    metrics = {"eval/accuracy": accuracy, "eval/margin": margin}
    return swapped_warning(metrics, "eval/accuracy", "eval/margin", step=Step.dpo, pairs=pairs)


def test_swapped_columns_are_suspected_when_margins_and_order_are_both_wrong() -> None:
    line = swapped(0.02, -1.5, 50)
    assert line is not None and "-1.5" in line and "2.0%" in line
    assert "swapped, in dpo.data.eval_path or in one of dpo.data.sources?" in line
    assert swapped(0.9, -0.1, 50) is None and swapped(0.1, 0.2, 50) is None


def test_what_chance_may_do_is_not_taken_for_swapped_columns() -> None:
    # of 25 pairs a coin has 7 or fewer in order in 2.2 % of all cases, 6 or fewer in 0.7 %
    assert swapped(7 / 25, -0.1, 25) is None and swapped(6 / 25, -0.1, 25) is not None
    assert swapped(0.44, -0.1, 400) is not None
    # all of a handful in the wrong order: once in 64, once in 128
    assert swapped(0.0, -0.1, 6) is None and swapped(0.0, -0.1, 7) is not None
    assert swapped(0.0, -0.1, 1) is None and swapped(0.0, -0.1, 0) is None
