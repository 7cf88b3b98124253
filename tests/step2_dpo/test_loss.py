"""The losses by hand, their gradients' signs, and what a step divides by."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.data.types import Batch, PairBatch
from common.model.fused_loss import TokenLoss
from step2_dpo.config import LossType
from step2_dpo.loss import (
    ChosenRejected,
    Objective,
    PairSums,
    StepCounts,
    answer_sums,
    count_answers,
    pair_losses,
    step_loss,
)

HALF = Objective(beta=0.5)
LENGTHS = ChosenRejected(torch.tensor([4.0]), torch.tensor([2.0]))


def ratios(chosen: float, rejected: float) -> ChosenRejected:
    made = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected))
    return ChosenRejected(*made)


def pair_batch(response_lengths: list[int]) -> PairBatch:
    """Pairs of which only what the loss reads is true: the document of each target."""
    documents = torch.repeat_interleave(
        torch.arange(len(response_lengths)), torch.tensor(response_lengths, dtype=torch.int64)
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(nothing[None], nothing[None], nothing, nothing, nothing, nothing, 0, ())
    pairs = len(response_lengths) // 2
    return PairBatch(batch, nothing, documents, torch.zeros(pairs), nothing, nothing, tuple(range(pairs)))


def token_loss(losses: list[float], correct: int = 0, entropy: float = 0.0) -> TokenLoss:
    values = torch.tensor(losses, requires_grad=True)
    return TokenLoss(values.detach().sum(), torch.tensor(correct), torch.tensor(entropy), values)


# log 9 = 2.1972...: with β 1/2, βΔ is log 3 and σ(βΔ) is 3/4
NINE = math.log(9)


def test_sigmoid_is_minus_the_log_of_the_probability_that_the_chosen_one_wins() -> None:
    assert HALF.losses(ratios(NINE, 0.0), LENGTHS).item() == pytest.approx(-math.log(3 / 4))
    assert HALF.losses(ratios(0.0, NINE), LENGTHS).item() == pytest.approx(-math.log(1 / 4))
    # only the difference counts
    assert HALF.losses(ratios(NINE - 5, -5.0), LENGTHS).item() == pytest.approx(-math.log(3 / 4))


def test_label_smoothing_takes_a_share_of_the_labels_to_be_wrong() -> None:
    smoothed = replace(HALF, label_smoothing=0.1)
    expected = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)
    assert smoothed.losses(ratios(NINE, 0.0), LENGTHS).item() == pytest.approx(expected)
    assert abs(expected + math.log(3 / 4)) > 0.1


def test_label_smoothing_pulls_back_a_policy_that_is_too_sure() -> None:
    sure = ratios(100.0, 0.0)
    replace(HALF, label_smoothing=0.1).losses(sure, LENGTHS).backward()
    # of βΔ the derivative is σ(βΔ) − (1 − ε), here 0.1: descent lowers the chosen answer
    assert sure.chosen.grad is not None and sure.chosen.grad.item() == pytest.approx(0.5 * 0.1)


def test_ipo_is_the_squared_distance_of_the_ratios_per_token_from_half_over_beta() -> None:
    ipo = Objective(LossType.ipo, beta=0.5)
    # 6 nats over 4 tokens and 2 over 2: Δ̄ = 1.5 − 1, and 1/(2β) = 1
    assert ipo.losses(ratios(6.0, 2.0), LENGTHS).item() == pytest.approx(0.25)
    assert replace(ipo, length_normalized=True).losses(ratios(6.0, 2.0), LENGTHS).item() == 0.25


def test_ipo_pulls_back_once_the_margin_is_reached() -> None:
    ipo, beyond = Objective(LossType.ipo, beta=0.5), ratios(12.0, 2.0)
    ipo.losses(beyond, LENGTHS).backward()  # Δ̄ = 3 − 1 = 2, one too far
    assert beyond.chosen.grad is not None and beyond.chosen.grad.item() == pytest.approx(2 * 1 / 4)


def test_hinge_is_linear_up_to_a_margin_of_one_and_flat_after_it() -> None:
    hinge = Objective(LossType.hinge, beta=0.5)
    short, enough = ratios(1.0, 0.0), ratios(3.0, 0.0)
    assert hinge.losses(short, LENGTHS).item() == 0.5
    assert hinge.losses(enough, LENGTHS).item() == 0.0
    (hinge.losses(short, LENGTHS) + hinge.losses(enough, LENGTHS)).backward()
    assert short.chosen.grad is not None and short.chosen.grad.item() == -0.5
    assert enough.chosen.grad is not None and enough.chosen.grad.item() == 0.0


@pytest.mark.parametrize("loss_type", [LossType.sigmoid, LossType.hinge])
def test_length_normalisation_divides_each_answer_by_its_own_tokens(loss_type: LossType) -> None:
    plain = Objective(loss_type, beta=0.5)
    normalized = replace(plain, length_normalized=True)
    # 4 nats over 4 tokens, 3 over 2: per token the rejected answer gained more
    assert normalized.losses(ratios(4.0, 3.0), LENGTHS).item() == pytest.approx(
        plain.of_difference(torch.tensor(-0.5)).item()
    )
    assert normalized.losses(ratios(4.0, 3.0), LENGTHS) > plain.losses(ratios(4.0, 3.0), LENGTHS)


@pytest.mark.parametrize(
    "objective",
    [HALF, replace(HALF, label_smoothing=0.2), Objective(LossType.ipo), Objective(LossType.hinge)],
    ids=lambda objective: f"{objective.loss_type.value}-{objective.label_smoothing}",
)
def test_near_the_reference_descent_raises_the_chosen_answer_and_lowers_the_rejected_one(
    objective: Objective,
) -> None:
    at = ratios(0.0, 0.0)
    objective.losses(at, LENGTHS).backward()
    assert at.chosen.grad is not None and at.chosen.grad.item() < 0
    assert at.rejected.grad is not None and at.rejected.grad.item() > 0


def test_tokens_are_summed_by_document() -> None:
    sums = answer_sums(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 1, 2, 3]), 2)
    assert sums.chosen.tolist() == [3.0, 8.0] and sums.rejected.tolist() == [4.0, 16.0]
    assert sums.chosen.dtype is torch.float64
    counts = count_answers(pair_batch([2, 1, 1, 3]))
    assert counts.chosen.tolist() == [2, 1] and counts.rejected.tolist() == [1, 3]


def test_a_batch_without_pairs_has_a_loss_of_zero_that_still_has_a_gradient() -> None:
    tokens = token_loss([])
    empty = torch.zeros(0, dtype=torch.float64)
    result = pair_losses(tokens, pair_batch([]), ChosenRejected(empty, empty), HALF)
    loss = step_loss(result, replace(HALF, sft_weight=1.0), StepCounts(1, 1, 1))
    loss.backward()
    assert loss.item() == 0.0 and tokens.token_losses.grad is not None


def reference(chosen: list[float], rejected: list[float]) -> ChosenRejected:
    return ChosenRejected(
        torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)
    )


def test_every_token_of_the_chosen_answer_is_pushed_up_and_of_the_rejected_one_down() -> None:
    tokens = token_loss([1.0, 2.0, 4.0])
    result = pair_losses(tokens, pair_batch([2, 1]), reference([-3.0], [-4.0]), HALF)
    assert result.logps.chosen.tolist() == [-3.0] and result.logps.rejected.tolist() == [-4.0]
    step_loss(result, HALF, StepCounts(1, 3, 2)).backward()
    # Δ = 0: the derivative by Δ is −β/2, and a log-probability is minus its tokens' losses
    assert tokens.token_losses.grad is not None and tokens.token_losses.grad.tolist() == [0.25, 0.25, -0.25]


def test_the_sft_term_is_a_mean_over_chosen_tokens_and_the_rest_a_mean_over_pairs() -> None:
    objective = replace(HALF, sft_weight=0.5)
    one = pair_losses(token_loss([1.0, 2.0, 4.0]), pair_batch([2, 1]), reference([-3.0], [-4.0]), objective)
    two = pair_losses(token_loss([9.0, 5.0]), pair_batch([1, 1]), reference([-9.0], [-5.0]), objective)
    counts = StepCounts(pairs=2, response_tokens=5, chosen_tokens=3)
    loss = sum(step_loss(result, objective, counts).item() for result in (one, two))
    # a mean of the pairs' own means would be (1.5 + 9) / 2 instead of 12 / 3
    assert loss == pytest.approx(math.log(2) + 0.5 * 4.0)
    sums = PairSums()
    sums.add(one, objective)
    sums.add(two, objective)
    assert sums.metrics(objective, counts, with_entropy=True)["loss"] == pytest.approx(loss)


def test_metrics_by_hand() -> None:
    tokens = token_loss([1.0, 2.0, 4.0, 9.0, 5.0], correct=2, entropy=10.0)
    # the first pair has gained 2 on the chosen side; the second lost 1 there and as much on the other
    result = pair_losses(tokens, pair_batch([2, 1, 1, 1]), reference([-5.0, -8.0], [-4.0, -4.0]), HALF)
    sums = PairSums()
    sums.add(result, HALF)
    metrics = sums.metrics(HALF, StepCounts(2, 5, 3), with_entropy=True)
    assert metrics == pytest.approx(
        {
            "loss": (-math.log(1 / (1 + math.exp(-1))) + math.log(2)) / 2,
            "rewards/chosen": 0.5 * (2 - 1) / 2,
            "rewards/rejected": 0.5 * (0 - 1) / 2,
            "rewards/accuracies": 0.75,  # one in order, one tie
            "rewards/margins": 0.5,
            "logps/chosen": -6.0,
            "logps/rejected": -4.5,
            "entropy": 2.0,
            "mean_token_accuracy": 0.4,
        }
    )
    assert isinstance(sums.above_reference, torch.Tensor) and not sums.above_reference.requires_grad
    without = sums.metrics(HALF, StepCounts(2, 5, 3), with_entropy=False)
    assert without == {name: value for name, value in metrics.items() if name != "entropy"}


@pytest.mark.parametrize("pairs", [1, 3, 29, 128, 599])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_policy_that_is_its_reference_has_a_loss_of_exactly_log_2(
    pairs: int, label_smoothing: float
) -> None:
    objective, losses = Objective(label_smoothing=label_smoothing), np.random.default_rng(0).random(2 * pairs)
    logps = -torch.from_numpy(losses).float().double()
    result = pair_losses(
        token_loss(losses.tolist()),
        pair_batch([1] * 2 * pairs),
        ChosenRejected(logps[0::2], logps[1::2]),
        objective,
    )
    sums = PairSums()
    sums.add(result, objective)
    metrics = sums.metrics(objective, StepCounts(pairs, 2 * pairs, pairs), with_entropy=False)
    # (1 − ε) log 2 + ε log 2 may be rounded; without smoothing nothing is
    rounding = 1e-15 if label_smoothing else 0.0
    assert abs(metrics["loss"] - math.log(2)) <= rounding
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/accuracies"] == 0.5
