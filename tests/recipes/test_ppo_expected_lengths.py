"""The second pass over the prompts is shared out by the lengths of the first, also after an interruption."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from common.runtime.distributed import STOPPED_EXIT_CODE
from step3_ppo.config import PPOJob
from tests.runs import finish, write_job
from tests.step3_ppo.runs import Artifacts, lines_of, make_job, ppo, ppo_interrupted

pytestmark = pytest.mark.slow

RANKS, PROMPTS = 2, 24
LAST = 9
"""Updates: three in each of three iterations, of which two are a pass over the prompts."""


def job_of(folder: Path, artifacts: Artifacts) -> PPOJob:
    job = make_job(folder, artifacts, max_steps=3, save_every=3)
    job.ppo.rollout.prompts, job.ppo.rollout.samples_per_prompt = PROMPTS // 2, 1
    job.ppo.rollout.max_new_tokens, job.ppo.evaluation.num_prompts = 24, 0
    return job


def expected_by(run_dir: Path) -> np.ndarray:
    means: np.ndarray = np.load(run_dir / f"ppo/checkpoints/step_{LAST:08d}/lengths/lengths.npy")
    return means


def balance_of(run_dir: Path) -> float:
    """Of the iteration that is shared out by the lengths of the first pass."""
    (line,) = (line for line in lines_of(run_dir) if line["step"] == 3)
    return float(line["perf/rollout_balance"])


def test_a_resumed_run_shares_out_as_one_that_was_not_interrupted(folder: Path, artifacts: Artifacts) -> None:
    whole, stopped = (write_job(job_of(folder, artifacts), folder / "runs" / name) for name in ("a", "b"))
    finish(whole, RANKS, ppo)
    finish(stopped, RANKS, ppo_interrupted, "update", 5, 1, signal.SIGTERM, code=STOPPED_EXIT_CODE)
    finish(stopped, RANKS, ppo)
    assert len(expected_by(whole)) == PROMPTS and (expected_by(whole) >= 1).all()
    assert np.array_equal(expected_by(stopped), expected_by(whole))
    assert balance_of(stopped) == balance_of(whole) < 1
