"""A run that is told to stop saves its state, and the same command goes on to the same end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import pytest

from benchmarks.kill_resume import metric_differences, state_differences
from common.runtime.distributed import STOPPED_EXIT_CODE
from step1_sft.config import SFTJob
from tests.programs.told_to_stop import sft_told_to_stop
from tests.runs import Base, finish, training_lines

STEPS = 6


def job_of(base: Base, ranks: int) -> SFTJob:
    job = base.job(max_steps=STEPS, eval_every=4)
    job.model.config["attention_dropout"] = 0.2  # whatever is drawn must be drawn again
    job.deepspeed.stage = 2 if ranks == 1 else 3
    return job


@pytest.fixture(scope="module")
def whole(base: Base) -> Callable[[int], Path]:
    """The run that nobody stopped, by number of ranks."""
    return functools.cache(lambda ranks: base.run(f"unstopped-{ranks}", job_of(base, ranks), ranks))


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "sft" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_twice_ends_like_one_that_nobody_stopped(
    base: Base, whole: Callable[[int], Path], ranks: int
) -> None:
    unstopped = whole(ranks)
    run_dir, told = base.write(f"stopped-{ranks}", job_of(base, ranks)), ranks - 1  # one rank of all
    printed = finish(run_dir, ranks, sft_told_to_stop, 2, told, [SIGTERM], code=STOPPED_EXIT_CODE)
    assert "told to stop: saved at step 2; the same command goes on from there" in printed
    assert printed.count("told to stop") == 1 and "Traceback" not in printed
    assert saved_steps(run_dir) == [2] and not (run_dir / "sft" / "export").exists()

    finish(run_dir, ranks, sft_told_to_stop, 3, told, [SIGUSR1, SIGTERM, SIGUSR1], code=STOPPED_EXIT_CODE)
    assert saved_steps(run_dir) == [2, 3]
    assert [line["step"] for line in training_lines(run_dir)] == [1, 2, 3]

    printed = finish(run_dir, ranks)
    assert f"resuming from {run_dir / 'sft' / 'checkpoints' / 'step_00000003'}" in printed
    assert state_differences(unstopped, run_dir, STEPS) == []
    assert metric_differences(unstopped, run_dir) == []
    assert len(training_lines(run_dir)) == STEPS


def test_a_signal_during_the_last_step_lets_the_run_end(base: Base, whole: Callable[[int], Path]) -> None:
    run_dir = base.write("stopped-last", job_of(base, 1))
    finish(run_dir, 1, sft_told_to_stop, STEPS, 0, [SIGTERM])
    assert state_differences(whole(1), run_dir, STEPS) == []
