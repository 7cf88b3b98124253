"""A reward model's run that was killed ends with the same bits as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kill_resume
from common.artifacts import read_manifest
from tests import runs
from tests.programs import killed
from tests.runs import Base, finish, start, wait_while, write_job
from tests.step2_dpo.runs import make_policy
from tests.step2_reward.runs import make_job, reward, reward_killed, run_job, series

pytestmark = pytest.mark.slow  # SFT's are in the suite

STEPS = 8


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    make_policy(folder / "policy", base.tokenizer)
    return folder


def prepare(folder: Path, name: str, stage: int) -> Path:
    job = make_job(folder, folder / "policy", max_steps=STEPS, save_every=2, eval_every=4)
    job.deepspeed.stage = stage
    return write_job(job, folder / "runs" / name)


def whole_run(folder: Path, ranks: int, stage: int) -> Path:
    run_dir = prepare(folder, f"whole-{ranks}", stage)
    finish(run_dir, ranks, reward)
    return run_dir


def dies(run_dir: Path, ranks: int, moment: str, victim: int = 0) -> None:
    """Start the run, whose rank `victim` dies at `moment`; the other is then killed by its launcher."""
    runs.dies(run_dir, ranks, victim, reward_killed, moment, victim)


def assert_same_end(whole: Path, other: Path) -> None:
    assert kill_resume.state_differences(whole, other, STEPS, "reward") == []
    assert kill_resume.metric_differences(whole, other, "reward") == []
    exports = [read_manifest(run_dir / "reward" / "export") for run_dir in (whole, other)]
    calibrations = [export.details["calibration"] for export in exports]
    assert calibrations[0] == calibrations[1]


def test_a_run_killed_in_saves_and_at_its_export_ends_with_the_same_bits(folder: Path) -> None:
    run_dir = prepare(folder, "killed-1", 2)
    for moment in ("writing", "before the rename", "before retention", killed.EXPORTING):
        dies(run_dir, 1, moment)
    printed = finish(run_dir, 1, reward)
    assert "resuming from" in printed and f"step_{STEPS:08d}" in printed
    assert_same_end(whole_run(folder, 1, 2), run_dir)


def test_two_ranks_of_which_either_is_killed_end_with_the_same_bits(folder: Path) -> None:
    run_dir = prepare(folder, "killed-2", 3)
    dies(run_dir, 2, "writing", victim=1)
    started = start(run_dir, 2, reward)
    wait_while(started, lambda: kill_resume.last_step(run_dir / "reward") < 5)
    started.kill()  # in the middle of a step, or of what follows it
    finish(run_dir, 2, reward)
    assert_same_end(whole_run(folder, 2, 3), run_dir)


def test_a_run_with_another_seed_ends_elsewhere(folder: Path) -> None:
    """Guards the comparison itself."""
    job = make_job(folder, folder / "policy", max_steps=2)
    run_job(job, folder / "runs" / "one seed")
    job.seed = 4
    run_job(job, folder / "runs" / "another")
    runs = [folder / "runs" / name for name in ("one seed", "another")]
    assert series(runs[0], "loss") != series(runs[1], "loss")
    assert len(kill_resume.state_differences(*runs, 2, "reward")) > 10
