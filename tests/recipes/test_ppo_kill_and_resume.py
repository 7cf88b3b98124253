"""A PPO run that was stopped or killed, wherever, ends with the same bits as one that nobody touched."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_resume
from common.config import Dtype, LoraConfig
from common.runtime.distributed import STOPPED_EXIT_CODE
from step3_ppo.config import KLController, PPOJob
from tests import runs
from tests.programs import killed
from tests.runs import finish, write_job
from tests.step3_ppo.runs import Artifacts, lines_of, make_job, ppo, ppo_interrupted

pytestmark = pytest.mark.slow  # SFT's are in the suite

ITERATIONS, UPDATES = 3, 4
LAST = ITERATIONS * UPDATES
"""Number of the last checkpoint: updates are counted."""


def job_of(folder: Path, artifacts: Artifacts, ranks: int, shared: int = 1) -> PPOJob:
    """Everything that has a state: both optimizers, a coefficient that moves, an average, dropout."""
    job = make_job(folder, artifacts, max_steps=ITERATIONS, eval_every=2, save_every=1)
    job.model.lora = LoraConfig(enabled=True, r=4, dropout=0.2)
    job.model.dtype, job.deepspeed.stage = (Dtype.bf16, 2) if ranks == 1 else (Dtype.fp32, 3)
    job.launch.sequence_parallel = shared
    job.ppo.optim.lr = job.ppo.critic.optim.lr = 1e-2
    job.ppo.ppo_epochs, job.ppo.ema_decay = 2, 0.5
    job.ppo.kl.controller, job.ppo.kl.target, job.ppo.kl.horizon = KLController.adaptive, 0.05, 40.0
    return job


def prepare(folder: Path, artifacts: Artifacts, name: str, ranks: int, shared: int = 1) -> Path:
    return write_job(job_of(folder, artifacts, ranks, shared), folder / "runs" / name)


@pytest.fixture(scope="module")
def whole(folder: Path, artifacts: Artifacts) -> dict[int, Path]:
    """By the number of ranks, a run that nobody touched."""
    made = {ranks: prepare(folder, artifacts, f"whole {ranks}", ranks) for ranks in (1, 2)}
    for ranks, run_dir in made.items():
        finish(run_dir, ranks, ppo)
        assert len({line["kl_coef"] for line in lines_of(run_dir)}) == ITERATIONS
    return made


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "ppo" / "checkpoints").glob("step_*"))


def counters_of(run_dir: Path, update: int) -> dict[str, Any]:
    path = run_dir / "ppo" / "checkpoints" / f"step_{update:08d}" / "counters.json"
    counters: dict[str, Any] = json.loads(path.read_text())
    return counters


def assert_same_end(whole: Path, other: Path) -> None:
    assert kill_resume.state_differences(whole, other, LAST, step_name="ppo") == []
    assert kill_resume.metric_differences(whole, other, step_name="ppo") == []
    assert [line["step"] for line in lines_of(other)] == [*range(1, ITERATIONS + 1)]
    samples = [(folder / "ppo" / "samples.jsonl").read_text() for folder in (whole, other)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 3 * 6


def stop(run_dir: Path, ranks: int, moment: str, number: int) -> None:
    """Start the run, of which the last rank is told to stop."""
    printed = finish(
        run_dir, ranks, ppo_interrupted, moment, number, ranks - 1, signal.SIGTERM, code=STOPPED_EXIT_CODE
    )
    assert printed.count("told to stop: saved in iteration") == 1 and "Traceback" not in printed


def test_a_run_told_to_stop_between_two_updates_goes_on_with_the_next_one(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, artifacts, "between updates", 1)
    for update in (3, 5, 6):  # the last but one of iteration 1; the first and the second of iteration 2
        stop(run_dir, 1, "update", update)
        assert checkpoints(run_dir)[-1] == update
        saved = run_dir / "ppo" / "checkpoints" / f"step_{update:08d}" / "experience" / "experience.npz"
        assert saved.exists() and counters_of(run_dir, update)["update"] == update % UPDATES
    printed = finish(run_dir, 1, ppo)
    assert "step_00000006, in iteration 2 after 2 of its updates\n" in printed
    assert_same_end(whole[1], run_dir)
    # seconds that are not known are not divided by: iterations 1 and 2 were interrupted
    speeds = ("perf/tokens_per_second", "perf/rollout_tokens_per_second", "time/rollout")
    for name in speeds:
        assert [name in line for line in lines_of(run_dir)] == [False, False, True]
        assert all(name in line for line in lines_of(whole[1]))


def test_a_run_told_to_stop_while_it_samples_samples_the_same_again(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, artifacts, "while sampling", 1)
    for iteration in (0, 2):
        stop(run_dir, 1, "roll-out", iteration)
        assert checkpoints(run_dir)[-1] == iteration * UPDATES
        assert counters_of(run_dir, iteration * UPDATES)["step"] == iteration
    finish(run_dir, 1, ppo)
    assert_same_end(whole[1], run_dir)


@pytest.mark.parametrize(("ranks", "iteration"), [(1, 0), (2, 2), (1, 3)])
def test_a_run_told_to_stop_while_it_evaluates_keeps_the_whole_evaluation(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path], ranks: int, iteration: int
) -> None:
    run_dir = prepare(folder, artifacts, f"evaluating {ranks} {iteration}", ranks)
    code = STOPPED_EXIT_CODE if iteration < ITERATIONS else 0  # after the last one nothing is left to stop
    told = ("evaluation", iteration, ranks - 1, signal.SIGTERM)
    printed = finish(run_dir, ranks, ppo_interrupted, *told, code=code)
    assert "Traceback" not in printed
    assert [line["step"] for line in lines_of(run_dir, "eval/reward")][-1] == iteration
    finish(run_dir, ranks, ppo)
    assert_same_end(whole[ranks], run_dir)


def dies(run_dir: Path, ranks: int, moment: str, number: int, victim: int) -> None:
    """Start the run, whose rank `victim` kills itself; the other is then killed by its launcher."""
    runs.dies(run_dir, ranks, victim, ppo_interrupted, moment, number, victim, signal.SIGKILL)


def test_a_run_killed_in_every_part_of_an_iteration_ends_with_the_same_bits(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, artifacts, "killed", 1)
    dies(run_dir, 1, "update", 3, 0)
    assert checkpoints(run_dir) == []
    dies(run_dir, 1, "roll-out", 1, 0)
    dies(run_dir, 1, "scoring", 1, 0)
    stop(run_dir, 1, "update", 6)
    dies(run_dir, 1, "update", 7, 0)  # after it went on in the middle of an iteration
    assert checkpoints(run_dir)[-1] == 6
    finish(run_dir, 1, ppo)
    assert_same_end(whole[1], run_dir)


def test_two_ranks_of_which_either_is_stopped_or_killed_end_with_the_same_bits(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, artifacts, "two", 2)
    stop(run_dir, 2, "update", 3)
    dies(run_dir, 2, "update", 6, 0)
    stop(run_dir, 2, "roll-out", 1)
    dies(run_dir, 2, "scoring", 2, 1)
    stop(run_dir, 2, "update", 10)
    assert checkpoints(run_dir) == [8, 10] and counters_of(run_dir, 10)["update"] == 2
    finish(run_dir, 2, ppo)
    assert_same_end(whole[2], run_dir)


def test_ranks_that_share_rows_end_with_the_same_bits_after_a_stop_and_a_kill(
    folder: Path, artifacts: Artifacts
) -> None:
    untouched, run_dir = (prepare(folder, artifacts, name, 2, shared=2) for name in ("shared", "broken"))
    finish(untouched, 2, ppo)
    stop(run_dir, 2, "update", 6)
    dies(run_dir, 2, "update", 7, 0)
    dies(run_dir, 2, "scoring", 2, 1)
    assert checkpoints(run_dir)[-1] == 8
    finish(run_dir, 2, ppo)
    assert_same_end(untouched, run_dir)


def test_a_run_killed_at_each_moment_of_a_save_ends_with_the_same_bits(
    folder: Path, artifacts: Artifacts, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, artifacts, "saving", 1)
    for moment in ("writing", "before the rename", killed.EXPORTING):
        dies(run_dir, 1, moment, 0, 0)
    finish(run_dir, 1, ppo)
    assert_same_end(whole[1], run_dir)
