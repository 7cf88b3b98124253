"""A disk that breaks for one of two ranks, or a folder that is removed, ends both with one error."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import verify
from tests.programs.faulted import sft_faulted
from tests.runs import Base, finish, start, training_lines, wait_while


def job_of(base: Base, name: str, steps: int = 3, **train: Any) -> Path:
    job = base.job(max_steps=steps, save_every=1, eval_every=3, **train)
    job.deepspeed.stage, job.sft.sampling.num_prompts = 3, 0
    return base.write(name, job)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("point=commit.write,step=2,rank=1,do=eio", "step_00000002.tmp: the disk does not work"),
        ("point=commit.hash,step=2,rank=1,do=eio", "step_00000002.tmp: the disk does not work"),
        ("point=commit.write,step=2,rank=1,do=emfile", "rank 1: [Errno 24] Too many open files"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_what_one_rank_of_two_meets_in_a_save_ends_both_with_one_error(
    base: Base, fault: str, said: str, beside: bool
) -> None:
    run_dir = job_of(base, "broken", async_save=beside)
    if beside:
        fault = fault.replace("step=2", "nth=2")  # meanwhile the rank may be in another step
    printed = finish(run_dir, 2, sft_faulted, {"RLHF_FAULT": fault}, code=2)
    assert printed.count("error: ") == 1 and said in printed and "Traceback" not in printed
    assert "the disk" not in printed or "do=eio" in fault
    checkpoints = run_dir / "sft" / "checkpoints"
    assert verify(checkpoints / "step_00000001").kind == "checkpoint"
    shutil.rmtree(run_dir)


def test_a_folder_that_is_taken_away_beneath_two_ranks_ends_both_with_that_reason(base: Base) -> None:
    run_dir = job_of(base, "removed", steps=10_000)
    started = start(run_dir, 2, sft_faulted, {})
    wait_while(
        started, lambda: not (run_dir / "sft" / "metrics.jsonl").exists() or not training_lines(run_dir)
    )
    (run_dir / "sft").rename(base.folder / "taken away")
    assert started.finish() == [2, 2]
    printed = (run_dir / "output.txt").read_text()
    assert printed.count("error: ") == 1 and "Traceback" not in printed, printed
    # which of them depends on what it was doing: counting on, or writing into the folder or one in it
    reasons = rf"error: {run_dir}/sft was removed while|the folder {run_dir}/sft(/checkpoints)? is gone"
    assert re.search(reasons, printed), printed
    assert not (run_dir / "sft").exists()
