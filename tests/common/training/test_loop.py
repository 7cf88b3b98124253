from __future__ import annotations

import math

import pytest

from common.config import Dtype
from common.stage import Step
from common.training.engine import StepOutcome
from common.training.loop import (
    Counters,
    advance,
    is_due,
    skipped_warning,
    with_best,
)


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


def test_the_best_step_is_the_one_with_the_smallest_held_out_loss() -> None:
    first = with_best(Counters(step=2), 1.5)
    assert (first.best_step, first.best_loss) == (2, 1.5)
    later = Counters(step=4, best_step=2, best_loss=1.5)
    assert with_best(later, 1.5) is later and with_best(later, math.nan) is later
    assert with_best(later, 1.25).best_step == 4
    assert with_best(Counters(step=2), math.nan).best_step is None


def test_skipped_steps_are_said_at_the_end_but_for_fp16() -> None:
    line = skipped_warning(Counters(step=10, applied=8), Dtype.bf16, Step.reward)
    assert line is not None and "2 of 10 steps" in line and "reward.optim.lr" in line
    assert skipped_warning(Counters(step=10, applied=10), Dtype.bf16, Step.reward) is None
    assert skipped_warning(Counters(step=10, applied=8), Dtype.fp16, Step.reward) is None
