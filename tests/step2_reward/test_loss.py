from __future__ import annotations

import math

import pytest
import torch

from step2_reward.loss import ScoredPairs, correlation, in_order, pair_losses, step_metrics


def pairs(
    scores: list[list[float]],
    margins: list[float] | None = None,
    lengths: list[list[int]] | None = None,
    sources: list[int] | None = None,
    ids: list[int] | None = None,
) -> ScoredPairs:
    count = len(scores)
    return ScoredPairs(
        torch.tensor(scores).view(-1, 2),
        torch.tensor(margins or [0.0] * count),
        torch.tensor(lengths or [[5, 5]] * count).view(-1, 2),
        torch.tensor(sources or [0] * count, dtype=torch.int64),
        torch.tensor(ids or list(range(count)), dtype=torch.int64),
    )


def losses(scores: list[list[float]], margins: list[float], centering: float = 0.0) -> list[float]:
    return pair_losses(torch.tensor(scores).double(), torch.tensor(margins).double(), centering).tolist()


def test_the_loss_is_minus_the_log_of_the_probability_that_the_chosen_answer_wins() -> None:
    # σ(log 3) = 3/4 and σ(0) = 1/2
    assert losses([[1.0 + math.log(3), 1.0], [2.0, 2.0]], [0.0, 0.0]) == pytest.approx(
        [math.log(4 / 3), math.log(2)], rel=1e-6
    )


def test_a_margin_is_what_the_difference_has_to_exceed() -> None:
    assert losses([[2.0, 0.5]], [1.5]) == pytest.approx([math.log(2)])
    assert losses([[2.0, 0.5]], [0.0])[0] < math.log(2) < losses([[2.0, 0.5]], [3.0])[0]


def test_centering_adds_the_weighted_square_of_the_sum() -> None:
    # (3 + 1)² = 16, and a sum of 0 costs nothing
    plain = losses([[3.0, 1.0], [1.0, -1.0]], [0.0, 0.0])
    centred = losses([[3.0, 1.0], [1.0, -1.0]], [0.0, 0.0], 0.25)
    assert [a - b for a, b in zip(centred, plain, strict=True)] == pytest.approx([4.0, 0.0])


def test_a_hopeless_pair_has_a_finite_loss_and_a_gradient_of_one() -> None:
    scores = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    loss = pair_losses(scores, torch.zeros(1), 0.0).sum()
    loss.backward()
    assert float(loss.detach()) == 1000.0 and scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 1.0]]


def test_the_metrics_of_a_step_are_means_over_pairs_or_over_answers() -> None:
    found = step_metrics(pairs([[2.0, 0.0], [1.0, 1.0], [-1.0, 2.0]], lengths=[[4, 2], [3, 3], [1, 4]]), 0.0)
    assert found["loss"] == pytest.approx(
        (math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.exp(3))) / 3
    )
    assert found["accuracy"] == pytest.approx(1.5 / 3)  # a tie counts half
    assert found["margin"] == pytest.approx(-1 / 3)
    assert (found["chosen_reward"], found["rejected_reward"]) == (pytest.approx(2 / 3), pytest.approx(1.0))
    assert (found["mean_reward"], found["min_reward"], found["max_reward"]) == (
        pytest.approx(5 / 6),
        -1.0,
        2.0,
    )
    assert set(found) == {
        "loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "chosen_reward",
        "rejected_reward", "reward_length_correlation",
    }  # fmt: skip


def test_correlation_is_pearsons_and_zero_where_something_does_not_vary() -> None:
    series = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(series, 5 - 2 * series) == pytest.approx(-1.0)
    # deviations (-1, 0, 1) and (-1, 2, -1): their product sums to 0
    assert correlation(series, torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(0.0)
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / (√2 √6)
    assert correlation(series, torch.tensor([0.0, 3.0, 3.0])) == pytest.approx(3 / 12**0.5)
    assert correlation(series, torch.ones(3)) == 0.0
    assert correlation(torch.ones(1), torch.ones(1)) == 0.0


def test_a_score_that_is_no_number_is_not_in_order() -> None:
    assert in_order(torch.tensor([[math.nan, 0.0], [1.0, math.nan], [1.0, 0.0]])).tolist() == [0.0, 0.0, 1.0]
    assert math.isnan(step_metrics(pairs([[math.nan, 0.0]]), 0.0)["loss"])


def test_parts_are_joined_in_the_order_of_their_pairs_whoever_scored_them() -> None:
    one = pairs([[1.0, 0.0], [3.0, 0.0]], [0.1, 0.3], ids=[1, 3], sources=[0, 1])
    other = pairs([[2.0, 0.0]], [0.2], [[7, 8]], ids=[2])
    nothing = pairs([])
    joined = ScoredPairs.joined([other, nothing, one])
    assert joined.pair_ids.tolist() == [1, 2, 3]
    assert joined.scores[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert joined.margins.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert joined.lengths.tolist() == [[5, 5], [7, 8], [5, 5]] and joined.source_ids.tolist() == [0, 0, 1]
