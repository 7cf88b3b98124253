"""Entropy on every n-th step: its number decides which lines have it, and no bit of a run changes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_resume
from common.runtime.distributed import STOPPED_EXIT_CODE
from tests import runs
from tests.programs import killed
from tests.runs import Base, finish, training_lines, write_job
from tests.step2_dpo import runs as dpo
from tests.step3_ppo import runs as ppo


def assert_measured_at(
    due: Sequence[int], lines: list[dict[str, Any]], of_each_step: list[dict[str, Any]], name: str = "entropy"
) -> None:
    """Only the due steps' lines have the entropy, and it is that of a run that measures it in each step."""
    assert [line["step"] for line in lines] == [line["step"] for line in of_each_step]
    assert {line["step"]: line[name] for line in lines if name in line} == {
        line["step"]: line[name] for line in of_each_step if line["step"] in due
    }
    for line, whole in zip(lines, of_each_step, strict=True):
        assert line.keys() - {name} == whole.keys() - {name}


@pytest.fixture(scope="module")
def each_step(base: Base) -> Path:
    """A run that measures the entropy in each step."""
    return base.run("entropy-each-step", base.job(save_every=2))


def test_sft_measures_it_at_the_same_steps_after_a_kill(base: Base, each_step: Path) -> None:
    run_dir = base.write("entropy-killed", base.job(save_every=2, entropy_every=3))
    runs.dies(run_dir, 1, 0, killed.sft_killed, "writing", 0)
    assert [line["step"] for line in training_lines(run_dir) if "entropy" in line] == [3]
    assert "resuming from" in finish(run_dir, 1)  # from step 2: the third is the first of this process
    assert_measured_at([3, 6], training_lines(run_dir), training_lines(each_step))
    assert kill_resume.state_differences(each_step, run_dir, 6) == []


def test_sft_on_two_ranks_in_other_micro_batches_measures_it_at_the_same_steps(
    base: Base, each_step: Path
) -> None:
    run_dir = base.run("entropy-two", base.job(micro_batch_size=1, entropy_every=4), ranks=2)
    (line,) = (line for line in training_lines(run_dir) if "entropy" in line)
    whole = training_lines(each_step)[3]
    assert line["step"] == whole["step"] == 4
    # sums in another order, and what three updates made of that
    assert line["entropy"] == pytest.approx(whole["entropy"], rel=1e-4)


@pytest.mark.slow
def test_never_is_never_and_dpo_still_measures_it_in_evaluations(
    base: Base, tmp_path: Path, each_step: Path
) -> None:
    never = base.run("entropy-never", base.job(save_every=2, entropy_every=0))
    assert_measured_at([], training_lines(never), training_lines(each_step))
    assert kill_resume.state_differences(each_step, never, 6) == []
    dpo.make_policy(tmp_path / "policy", base.tokenizer)
    found = {}
    for every in (1, 2):
        job = dpo.make_job(tmp_path, tmp_path / "policy", eval_every=2, entropy_every=every)
        found[every] = tmp_path / "runs" / str(every)
        dpo.run_job(job, found[every])
    assert_measured_at([2, 4], dpo.lines_of(found[2]), dpo.lines_of(found[1]))
    evaluations = [dpo.lines_of(run_dir, "eval/entropy") for run_dir in found.values()]
    assert evaluations[0] == evaluations[1] and [line["step"] for line in evaluations[1]] == [0, 2, 4, 5]
    assert kill_resume.state_differences(found[1], found[2], 5, step_name="dpo") == []


@pytest.mark.slow
def test_ppo_measures_it_in_all_updates_of_the_same_iterations_after_a_stop(
    base: Base, tmp_path: Path
) -> None:
    artifacts = ppo.make_artifacts(tmp_path, base.tokenizer)
    found = {}
    for every in (1, 2):
        job = ppo.make_job(tmp_path, artifacts, entropy_every=every)
        found[every] = write_job(job, tmp_path / "runs" / str(every))
    finish(found[1], 1, ppo.ppo)
    # two updates an iteration: the second iteration is left between them, and gone on with
    told = ("update", 3, 0, signal.SIGTERM)
    finish(found[2], 1, ppo.ppo_interrupted, *told, code=STOPPED_EXIT_CODE)
    assert "in iteration 2 after 1 of its updates" in finish(found[2], 1, ppo.ppo)
    name, timed = "policy/entropy_avg", ("time/", "perf/")
    lines, of_each = (
        [{key: x for key, x in line.items() if not key.startswith(timed)} for line in ppo.lines_of(run_dir)]
        for run_dir in (found[2], found[1])
    )
    assert_measured_at([2], lines, of_each, name)
    remembered = {f"counters.json/watchdogs/{part}/{name}" for part in ("first", "counted")}
    assert {*kill_resume.state_differences(found[1], found[2], 6, step_name="ppo")} == remembered
