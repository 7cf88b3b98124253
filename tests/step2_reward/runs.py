"""Tiny runs of the reward model for tests: the job, and its start on one rank or several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from common.config import Dtype, SourceConfig
from common.runtime.tracking import read_metrics
from common.tracking_config import WandbMode
from step2_reward.config import RewardJob
from tests.programs.live_logits import keep_live
from tests.runs import finish, write_job
from tests.step2_dpo.runs import pairs, write_rows


def make_job(folder: Path, policy: Path, **train: Any) -> RewardJob:
    """The smallest job that does everything. `train`: fields of `reward.train`."""
    job = RewardJob(run_name="tiny", output_dir=str(folder / "runs"), seed=3)
    job.model.dtype = Dtype.fp32
    job.reward.policy = str(policy)
    rows = folder / "pairs.jsonl"
    job.reward.data.sources = [SourceConfig(path=str(rows if rows.exists() else write_rows(rows, pairs())))]
    job.reward.data.max_length, job.reward.data.eval_fraction = 96, 0.2
    job.reward.data.cache_dir = str(folder / "cache")
    job.reward.optim.lr = 3e-3
    job.tracking.wandb = WandbMode.off
    defaults = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": 5}
    for name, value in {**defaults, **train}.items():
        setattr(job.reward.train, name, value)
    return job


def run_job(job: RewardJob, run_dir: Path, ranks: int = 1, *, code: int = 0, program: Any = None) -> str:
    """Run the job to its end; returns what was printed."""
    return finish(write_job(job, run_dir), ranks, program or reward, code=code)


def lines_of(run_dir: Path, name: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have this metric."""
    return [line for line in read_metrics(run_dir / "reward" / "metrics.jsonl") if name in line]


def series(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in lines_of(run_dir, name)]


# programs of a rank


def reward(config: str, *extra: str) -> int:
    """`python -m step2_reward --config CONFIG ...` in this process."""
    from step2_reward.__main__ import main

    sys.argv = ["step2_reward", "--config", config, *extra]
    return main()


def reward_with_live_scores(config: str) -> int:
    """The same; saves live_scores.pt."""
    keep_live(config, "scores")
    return reward(config)


def reward_killed(config: str, moment: str, rank: int) -> int:
    """The same, of which this rank does not survive `moment` (see tests/programs/killed.py)."""
    from tests.programs import killed

    if int(os.environ["RANK"]) == rank:
        killed._prepare(moment)
    return reward(config)
