"""A checkpoint that is due by the clock is made by all ranks alike, and changes no number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_resume
from tests.programs import fake_clock
from tests.runs import Base, finish, write_job
from tests.step2_dpo import runs as dpo_runs
from tests.step2_reward import runs as reward_runs
from tests.step3_ppo import runs as ppo_runs

pytestmark = pytest.mark.slow

EVERY, KEEP = 2.5, 20
"""Minutes, of which an update takes one: three updates go by before a step sees that a save is due, and the
save follows that step. KEEP: all of them."""


@pytest.fixture(scope="module")
def policy(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by the clock")
    dpo_runs.make_policy(folder / "policy", base.tokenizer)
    return folder / "policy"


def checkpoints(run_dir: Path, step: str) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / step / "checkpoints").glob("step_*"))


def with_and_without(
    write: Callable[[str, float], Path], program: Callable[..., int], ranks: int
) -> list[Path]:
    runs = [write(name, minutes) for name, minutes in (("without", 0.0), ("with", EVERY))]
    for run_dir in runs:
        finish(run_dir, ranks, program)
    return runs


def assert_same(runs: list[Path], step: str, last: int) -> None:
    assert kill_resume.state_differences(*runs, last, step) == []
    assert kill_resume.metric_differences(*runs, step) == []


def test_the_first_rank_s_clock_has_all_ranks_save_and_no_number_changes(base: Base) -> None:
    def write(name: str, minutes: float) -> Path:
        job = base.job(max_steps=10, keep_checkpoints=KEEP, save_minutes=minutes)
        job.deepspeed.stage = 3
        return base.write(f"clock {name}", job)

    runs = with_and_without(write, fake_clock.sft, 2)
    assert [checkpoints(run_dir, "sft") for run_dir in runs] == [[10], [4, 8, 10]]
    assert_same(runs, "sft", 10)


@pytest.mark.parametrize(
    ("step", "tools", "program"),
    [("reward", reward_runs, fake_clock.reward), ("dpo", dpo_runs, fake_clock.dpo)],
)
def test_runs_on_pairs_save_by_the_clock(
    policy: Path, step: str, tools: Any, program: Callable[..., int]
) -> None:
    def write(name: str, minutes: float) -> Path:
        job = tools.make_job(
            policy.parent, policy, max_steps=7, save_every=6, keep_checkpoints=KEEP, save_minutes=minutes
        )
        return write_job(job, policy.parent / f"{step} {name}")

    runs = with_and_without(write, program, 1)
    # what was saved at step 6 anyway starts the clock again
    assert [checkpoints(run_dir, step) for run_dir in runs] == [[6, 7], [4, 6, 7]]
    assert_same(runs, step, 7)


def test_ppo_saves_by_the_clock_between_two_updates(base: Base, policy: Path) -> None:
    artifacts = ppo_runs.make_artifacts(policy.parent / "ppo", base.tokenizer)

    def write(name: str, minutes: float) -> Path:
        job = ppo_runs.make_job(
            policy.parent, artifacts, max_steps=3, keep_checkpoints=KEEP, save_minutes=minutes
        )
        return write_job(job, policy.parent / f"ppo {name}")

    runs = with_and_without(write, fake_clock.ppo, 1)
    # two updates an iteration; what is due after three is saved before the fourth, with its responses
    assert [checkpoints(run_dir, "ppo") for run_dir in runs] == [[6], [3, 6]]
    assert (runs[1] / "ppo/checkpoints/step_00000003/experience/experience.npz").exists()
    assert_same(runs, "ppo", 6)
