from __future__ import annotations

import math

import pytest
import torch

from step2_reward.evaluate import by_pair, calibration, expected_calibration_error, held_out_metrics
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


def test_every_metric_is_the_mean_of_what_each_pair_has_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 2, generator=generator) * 2
    lengths = torch.randint(3, 50, (40, 2), generator=generator)
    scored = pairs(scores.tolist(), lengths=lengths.tolist())
    scored.scores[3] = scored.scores[3, 0]  # a tie
    found, parts = held_out_metrics(scored, ["a"], 0.1), by_pair(scored, 0.1)
    assert {name: float(each.mean()) for name, each in parts.items()} == pytest.approx(
        {name: found[f"eval/{name}"] for name in parts}
    )


def test_a_pairs_part_in_the_correlation_is_what_leaving_it_out_changes() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(300, 2, generator=generator)
    lengths = (20 + 4 * scores + 5 * torch.randn(300, 2, generator=generator)).round().long()
    scored = pairs(scores.tolist(), lengths=lengths.tolist())
    parts = by_pair(scored)["reward_length_correlation"]
    r = held_out_metrics(scored, ["a"], 0.0)["eval/reward_length_correlation"]
    for left_out in (0, 7, 100):
        kept = [index for index in range(300) if index != left_out]
        without = held_out_metrics(pairs(scores[kept].tolist(), lengths=lengths[kept].tolist()), ["a"], 0.0)[
            "eval/reward_length_correlation"
        ]
        # to first order in 1/P: of a step of 1/300, an error of the order of (1/300)²
        assert float(parts[left_out]) - r == pytest.approx(299 * (r - without), abs=0.05)


def test_where_nothing_varies_the_correlation_is_zero_in_every_pair() -> None:
    parts = by_pair(pairs([[1.0, 1.0], [1.0, 1.0]]))
    assert parts["reward_length_correlation"].tolist() == [0.0, 0.0]
