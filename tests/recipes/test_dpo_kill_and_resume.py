"""A DPO run that was killed ends with the same bits as one that was not, reference included."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import kill_resume
from common.config import Dtype
from tests import runs
from tests.programs import killed
from tests.runs import Base, finish, start, wait_while, write_job
from tests.step2_dpo.runs import dpo, dpo_killed, lines_of, make_job, make_policy

pytestmark = pytest.mark.slow  # SFT's are in the suite

STEPS = {1: 16, 2: 8}  # by the number of ranks


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo_killed")
    make_policy(folder / "policy", base.tokenizer, attention_dropout=0.1)
    return folder


def prepare(folder: Path, name: str, ranks: int) -> Path:
    job = make_job(folder, folder / "policy", max_steps=STEPS[ranks], save_every=2, eval_every=8)
    job.model.dtype, job.deepspeed.stage, job.dpo.optim.lr = Dtype.bf16, ranks + 1, 1e-2
    job.dpo.data.cache_dir = str(folder / f"cache of {name}")
    return write_job(job, folder / "runs" / name)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, Path]:
    """By the number of ranks, a run that nobody touched."""
    made = {ranks: prepare(folder, f"whole {ranks}", ranks) for ranks in STEPS}
    for ranks, run_dir in made.items():
        finish(run_dir, ranks, dpo)
        # in bf16, and although the policy's config has dropout
        assert lines_of(run_dir)[0]["loss"] == math.log(2)
    return made


def dies(run_dir: Path, ranks: int, moment: str, victim: int = 0) -> None:
    """Start the run, whose rank `victim` dies at `moment`; the other is then killed by its launcher."""
    runs.dies(run_dir, ranks, victim, dpo_killed, moment, victim)


def assert_same_end(whole: Path, other: Path, steps: int) -> None:
    assert kill_resume.state_differences(whole, other, steps, step_name="dpo") == []
    assert kill_resume.metric_differences(whole, other, step_name="dpo") == []
    assert [line["step"] for line in lines_of(other)] == list(range(1, steps + 1))


def test_a_run_killed_at_each_moment_of_a_save_ends_with_the_same_bits(
    folder: Path, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, "alone", 1)
    dies(run_dir, 1, "before the reference is kept")
    assert not list((folder / "cache of alone" / "reference").glob("*"))
    for moment in killed.MOMENTS:
        dies(run_dir, 1, moment)
    dies(run_dir, 1, killed.EXPORTING)
    printed = finish(run_dir, 1, dpo)
    assert "resuming from" in printed and "reference log-probabilities: from the cache" in printed
    assert_same_end(whole[1], run_dir, STEPS[1])


def test_a_reference_lost_in_between_is_that_of_the_starting_policy(
    folder: Path, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, "lost", 1)
    dies(run_dir, 1, "before retention")
    (kept,) = (folder / "cache of lost" / "reference").glob("*.npz")
    content = kept.read_bytes()
    kept.unlink()
    finish(run_dir, 1, dpo)
    assert kept.read_bytes() == content
    assert_same_end(whole[1], run_dir, STEPS[1])


def test_two_ranks_of_which_either_is_killed_end_with_the_same_bits(
    folder: Path, whole: dict[int, Path]
) -> None:
    run_dir = prepare(folder, "two", 2)
    dies(run_dir, 2, "writing", victim=1)
    dies(run_dir, 2, "before retention", victim=0)
    started = start(run_dir, 2, dpo)
    wait_while(started, lambda: kill_resume.last_step(run_dir / "dpo") < 7)
    started.kill()  # in the middle of a step, or of what follows it
    finish(run_dir, 2, dpo)
    assert_same_end(whole[2], run_dir, STEPS[2])
