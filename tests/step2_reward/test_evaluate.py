from __future__ import annotations

import math

import pytest
import torch

from step2_reward.evaluate import calibration, expected_calibration_error, held_out_metrics
from tests.step2_reward.test_loss import pairs


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_error_weighs_each_bins_gap_by_its_pairs() -> None:
    # confidences 0.72, 0.73 (one of two in order: gap 0.225) and 0.97 (in order: gap 0.03)
    scores = [[logit(0.72), 0.0], [0.0, logit(0.73)], [logit(0.97), 0.0]]
    found = expected_calibration_error(torch.tensor(scores, dtype=torch.float64))
    assert found == pytest.approx((2 * 0.225 + 1 * 0.03) / 3)


def test_confidences_of_different_bins_do_not_make_up_for_each_other() -> None:
    # bins of width 0.05 from 0.5: 0.54 is sure and right (gap 0.46), 0.56 is wrong (gap 0.56)
    scores = torch.tensor([[logit(0.54), 0.0], [0.0, logit(0.56)]], dtype=torch.float64)
    assert expected_calibration_error(scores) == pytest.approx((0.46 + 0.56) / 2)


def test_ties_are_half_right_with_confidence_one_half_and_certainty_falls_into_the_last_bin() -> None:
    assert expected_calibration_error(torch.tensor([[1.0, 1.0]])) == 0.0
    assert expected_calibration_error(torch.tensor([[1000.0, 0.0]])) == 0.0
    assert expected_calibration_error(torch.tensor([[0.0, 1000.0]])) == 1.0


def test_held_out_metrics_of_four_pairs_worked_by_hand() -> None:
    found = held_out_metrics(
        pairs(
            [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, -1.0]],
            lengths=[[9, 4], [9, 4], [4, 9], [6, 6]],
            sources=[0, 1, 1, 0],
        ),
        ["sums", "words"],
        0.0,
    )
    assert found["eval/loss"] == pytest.approx(
        (math.log1p(math.exp(-2)) + math.log1p(math.exp(2)) + math.log(2) + math.log1p(math.exp(-4))) / 4
    )
    assert (found["eval/accuracy"], found["eval/margin"]) == (2.5 / 4, 1.0)
    assert found["eval/mean_reward"] == 1.0
    # rewards less their mean: 1 -1 -1 1 0 0 2 -2
    assert found["eval/std_reward"] == pytest.approx((12 / 8) ** 0.5)
    assert found["eval/accuracy_chosen_longer"] == 0.5
    assert found["eval/accuracy_chosen_shorter"] == 0.5
    assert found["eval/accuracy_same_length"] == 1.0
    assert (found["eval/sums/accuracy"], found["eval/words/accuracy"]) == (1.0, 0.25)


def test_accuracies_of_pairs_that_there_are_none_of_are_left_out() -> None:
    found = held_out_metrics(pairs([[1.0, 0.0], [2.0, 0.0]], lengths=[[3, 2], [5, 2]]), ["a", "b"], 0.0)
    names = {name for name in found if "accuracy" in name}
    assert names == {"eval/accuracy", "eval/accuracy_chosen_longer"}


def test_the_calibration_of_a_manifest_is_that_of_all_rewards() -> None:
    found = held_out_metrics(pairs([[1.0, -1.0], [3.0, 1.0]]), ["a"], 0.0)
    kept = calibration(found, 2)
    assert kept["mean"] == 1.0 and kept["std"] == pytest.approx(2**0.5) and kept["pairs"] == 2
    assert kept["accuracy"] == 1.0
    assert kept["expected_calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-2)))
