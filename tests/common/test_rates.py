"""Whether a learning rate depends on the length of the run is known without torch, as the schedule has it."""

from __future__ import annotations

import pytest

from common.rates import few_steps, same_until
from common.training.optim import build_schedule
from common.training_config import OptimConfig, SchedulerName, TrainConfig

LENGTHS = ((10, 20), (20, 10), (10, 11), (40, 50), (7, 8), (100, 103), (5, 5), (1, 2), (33, 34))


@pytest.mark.parametrize("scheduler", SchedulerName)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.2, 1.0])
def test_the_first_other_rate_is_that_of_the_schedules(scheduler: SchedulerName, warmup_ratio: float) -> None:
    optim = OptimConfig(scheduler=scheduler, warmup_ratio=warmup_ratio)
    for before, after in LENGTHS:
        ours, theirs = build_schedule(optim, before), build_schedule(optim, after)
        both = min(before, after)
        differing = [step for step in range(both) if ours(step) != theirs(step)]
        said = same_until(optim, before, after)
        if said is None or said >= both:
            assert not differing, (before, after, said)
        elif differing:  # never later than the truth; a floor of 1 makes a falling rate constant
            assert said == differing[0], (before, after)


def test_a_run_of_few_steps_that_nobody_asked_for_is_said() -> None:
    train = TrainConfig(global_batch_size=128)
    assert few_steps(train, 1, "sft") == (
        "1 optimizer step(s) in all: a lower sft.train.global_batch_size (128) makes more"
    )
    assert few_steps(train, 10, "sft") is None
    assert few_steps(TrainConfig(max_steps=2), 2, "sft") is None
