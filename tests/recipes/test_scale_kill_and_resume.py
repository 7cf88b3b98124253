"""Runs that use what scale needs end with the same bits after kills as those that nobody touched.

Ranks that share rows (PPO's are in test_ppo_kill_and_resume.py), routers that are balanced, and loading in
parts: of each step, on 1, 2 and 4 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_resume
from tests import forked, runs
from tests.programs import killed
from tests.recipes.test_mixture_run import MIXTURE
from tests.runs import LLAMA, Base, finish, start, wait_while, write_job
from tests.step2_dpo import runs as dpo_runs
from tests.step2_dpo.runs import make_policy
from tests.step2_reward import runs as reward_runs

pytestmark = pytest.mark.slow  # whole runs, each several times

STEPS = 6
WHOLE = {"sft": forked.sft, "reward": reward_runs.reward, "dpo": dpo_runs.dpo}
KILLED = {
    "sft": killed.sft_killed,
    "reward": reward_runs.reward_killed,
    "dpo": dpo_runs.dpo_killed,
}


@dataclass(frozen=True)
class Case:
    """One way to run a step."""

    step: str
    ranks: int
    stage: int
    shared: int = 1
    hpz: int = 1
    routers: bool = False
    beside: bool = False

    @property
    def name(self) -> str:
        words = [self.step, f"ranks{self.ranks}", f"zero{self.stage}"]
        words += [f"shared{self.shared}"] * (self.shared > 1) + [f"hpz{self.hpz}"] * (self.hpz > 1)
        return "-".join(words + ["routers"] * self.routers + ["beside"] * self.beside)


CASES = [
    Case("sft", 2, 2, shared=2),
    Case("sft", 4, 3, shared=2, hpz=2),
    Case("sft", 4, 1, shared=4, beside=True),
    Case("reward", 2, 3, shared=2),
    Case("reward", 4, 2, shared=4),
    Case("dpo", 2, 2, shared=2),
    Case("dpo", 4, 3, shared=2),
    Case("sft", 1, 1, routers=True, beside=True),
    Case("sft", 2, 3, routers=True),
    Case("sft", 2, 2, shared=2, routers=True),
    Case("dpo", 2, 3, routers=True),
]


def job_of(base: Base, case: Case, folder: Path) -> Any:
    """Whatever is drawn must be drawn again: attention has dropout."""
    network = {**(MIXTURE if case.routers else LLAMA), "attention_dropout": 0.1}
    train = {"max_steps": STEPS, "save_every": 2, "eval_every": 3}
    if case.step == "sft":
        job: Any = base.job(global_batch_size=8, **train)
        job.model.config = network
        job.sft.sampling.num_prompts = 2
    else:
        policy = folder / ("mixture" if case.routers else "policy")
        if not policy.exists():
            make_policy(policy, base.tokenizer, **network)
        module = reward_runs if case.step == "reward" else dpo_runs
        job = module.make_job(folder, policy, global_batch_size=8, **train)
    job.deepspeed.stage, job.deepspeed.hpz_partition_size = case.stage, case.hpz
    job.launch.sequence_parallel = case.shared
    job.model.router_aux_loss_coef = 0.5 if case.routers else 0.0
    getattr(job, case.step).train.async_save = case.beside
    return job


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_that_was_killed_ends_with_the_same_bits(base: Base, folder: Path, case: Case) -> None:
    whole, run_dir = (
        write_job(job_of(base, case, folder), folder / "runs" / f"{kind} {case.name}")
        for kind in ("whole", "killed")
    )
    finish(whole, case.ranks, WHOLE[case.step])
    # beside training a thread writes, and rank 0 commits when all have written
    moment, victim = ("before the rename", 0) if case.beside else ("writing", case.ranks - 1)
    runs.dies(run_dir, case.ranks, victim, KILLED[case.step], moment, victim)
    started = start(run_dir, case.ranks, WHOLE[case.step])
    wait_while(started, lambda: kill_resume.last_step(run_dir / case.step) < STEPS - 1)
    started.kill()  # in the middle of a step, or of what follows it
    assert "resuming from" in finish(run_dir, case.ranks, WHOLE[case.step])
    assert kill_resume.state_differences(whole, run_dir, STEPS, case.step) == []
    assert kill_resume.metric_differences(whole, run_dir, case.step) == []
    if case.routers:
        (*_, line) = [
            each for each in runs.read_metrics(whole / case.step / "metrics.jsonl") if "loss" in each
        ]
        assert line["aux_loss"] > 0
