from __future__ import annotations

import pytest
import torch

from common.losses import TokenLoss
from step1_sft.loss import TokenSums
from step1_sft.train import Counters, StepOutcome, advance, is_due


def result(losses: list[float], correct: int, entropy: float) -> TokenLoss:
    values = torch.tensor(losses)
    return TokenLoss(values.sum(), torch.tensor(correct), torch.tensor(entropy), values)


def test_sums_of_micro_batches_are_divided_once_by_all_tokens() -> None:
    sums = TokenSums()
    sums.add(result([1.0, 2.0, 3.0], 1, 6.0))
    sums.add(result([8.0], 1, 2.0))
    # a mean of the two means would be 5
    assert sums.means(4) == {"loss": 3.5, "mean_token_accuracy": 0.5, "entropy": 2.0}


def test_sums_keep_no_graph() -> None:
    loss = torch.ones(2, requires_grad=True)
    sums = TokenSums()
    sums.add(TokenLoss(loss.sum(), torch.tensor(0), torch.tensor(0.0), loss.detach()))
    assert isinstance(sums.loss, torch.Tensor) and not sums.loss.requires_grad


def test_a_skipped_step_consumes_its_rows_and_moves_no_schedule() -> None:
    counters = Counters(step=4, applied=4, num_tokens=100, num_trained_tokens=40, best_step=2, best_loss=1.5)
    skipped = advance(counters, StepOutcome(False, float("nan")), 10, 5)
    assert skipped == Counters(5, 4, 1, 110, 45, 2, 1.5)
    again = advance(skipped, StepOutcome(False, float("nan")), 10, 5)
    assert again.skipped_in_a_row == 2
    assert advance(again, StepOutcome(True, 1.0), 10, 5) == Counters(7, 5, 0, 130, 55, 2, 1.5)


@pytest.mark.parametrize(
    ("step", "every", "due"), [(4, 2, True), (5, 2, False), (5, 0, False), (3, 1, True), (0, 5, True)]
)
def test_what_happens_every_few_steps_never_happens_every_zero(step: int, every: int, due: bool) -> None:
    assert is_due(step, every) is due
