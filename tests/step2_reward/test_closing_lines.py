"""What a user is told of the finished model."""

from __future__ import annotations

import pytest

from step2_reward.config import RewardConfig
from step2_reward.train import closing_lines


def lines(
    accuracy: float, margin: float, *, least: float = 0.6, on_held_out: bool = True, pairs: int = 100
) -> list[str]:
    metrics = {"eval/accuracy": accuracy, "eval/margin": margin}
    return closing_lines(metrics, RewardConfig(warn_below_accuracy=least), pairs, on_held_out=on_held_out)


def test_nothing_is_said_of_a_model_that_orders_enough_held_out_pairs() -> None:
    assert lines(0.6, 0.1) == [] and lines(0.0, 0.1, least=0.0) == []


def test_a_model_under_the_set_accuracy_is_warned_of() -> None:
    (line,) = lines(0.85, 0.1, least=0.9)
    assert line.startswith(
        "warning: the reward model orders 85.0% of 100 held-out pairs (95% interval 76.7% to 90.7%)"
    )
    assert "less than reward.warn_below_accuracy=0.9" in line


def test_swapped_columns_are_suspected_where_most_pairs_and_their_mean_are_the_wrong_way_round() -> None:
    (swapped,) = lines(0.2, -1.5)
    assert "are the columns chosen and rejected swapped" in swapped
    (poor,) = lines(0.45, 0.1)  # a few large margins the right way: not swapped, only poor
    assert "orders 45.0%" in poor and "swapped" not in poor
    assert len(lines(0.55, -0.1)) == 1


@pytest.mark.parametrize(
    ("accuracy", "pairs", "suspected"),
    [
        (0.0, 1, False),
        (0.0, 6, False),
        (0.0, 7, True),
        (0.25, 12, False),
        (1 / 12, 12, True),
        (0.4, 100, False),
    ],
)
def test_few_pairs_in_the_wrong_order_are_no_evidence_of_swapped_columns(
    accuracy: float, pairs: int, suspected: bool
) -> None:
    """By chance 6 of 6 are wrong in 1.6 % of cases, 7 of 7 in 0.8 %, 9 of 12 in 7.3 %, 11 of 12 in 0.3 %."""
    (line,) = lines(accuracy, -1.5, pairs=pairs)
    assert ("swapped" in line) is suspected


def test_numbers_of_training_pairs_are_called_that() -> None:
    said, wrong = lines(0.5, 0.1, on_held_out=False)
    assert said.startswith("no pairs are held out: accuracy (50.0%) and calibration")
    assert "orders 50.0% of 100 training pairs" in wrong
