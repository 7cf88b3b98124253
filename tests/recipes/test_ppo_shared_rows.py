"""PPO on rows that two ranks share: every way to do it gives what one rank gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import LoraConfig
from step3_ppo.config import Estimator, PPOJob
from tests.step3_ppo.runs import Artifacts, lines_of, make_job, run_job, watched, without_reward_model

pytestmark = pytest.mark.slow  # two whole runs of each

# of the change of the weights: fp32 sums in another order, grown by four Adam steps that divide small numbers
# by small ones
TOLERANCE = 1e-5
# of what is logged; see test_ppo_numerics.py
LOGGED_TOLERANCE = 1e-4
TIMED = ("time/", "perf/")
SLICES = 2


def gae_with_adapters(job: PPOJob) -> None:
    """The reference is the actor without its adapter."""
    job.model.lora = LoraConfig(enabled=True, r=4, alpha=8)
    job.ppo.offload_frozen = True  # the reward model


def grpo(job: PPOJob) -> None:
    """Four samples of a prompt, whose prefix is computed once; the KL is in the loss; two micro-batches."""
    job.ppo.rollout.prompts, job.ppo.rollout.samples_per_prompt = 2, 4
    job.ppo.entropy_coef, job.deepspeed.stage = 0.1, 3
    without_reward_model(job, Estimator.grpo)


def rloo_with_checkpoints(job: PPOJob) -> None:
    job.model.gradient_checkpointing, job.ppo.data.packing = True, False
    without_reward_model(job, Estimator.rloo)


@pytest.mark.parametrize("change", [gae_with_adapters, grpo, rloo_with_checkpoints])
def test_it_is_what_one_rank_learns(
    folder: Path, artifacts: Artifacts, change: Callable[[PPOJob], None]
) -> None:
    runs: list[Path] = []
    for ranks in (1, SLICES):
        job = make_job(folder, artifacts, max_steps=2, micro_batch_size=2)
        change(job)
        job.launch.sequence_parallel = ranks
        runs.append(folder / "runs" / f"{change.__name__} {ranks}")
        run_job(job, runs[-1], ranks)
    alone, shared = map(watched, runs)
    for one, other in zip(alone["experiences"], shared["experiences"], strict=True):
        for expected, found in zip(one.responses, other.responses, strict=True):
            assert np.array_equal(expected.tokens, found.tokens)
        assert other.rewards == pytest.approx(one.rewards, abs=1e-5)
    # both ranks have the rows, which are one rank's
    assert shared["scored"] == alone["scored"] and shared["learned"] == alone["learned"]
    assert any(len(row_ids) > 1 for batches in shared["learned"] for row_ids in batches)
    logged = [[without_times(line) for line in lines_of(run_dir)] for run_dir in runs]
    for line, expected in zip(logged[1], logged[0], strict=True):
        assert line == pytest.approx(expected, rel=LOGGED_TOLERANCE, abs=1e-6)
    moved, difference = change_and_difference(runs, artifacts)
    assert moved > 1e-2 and difference < TOLERANCE * moved


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(TIMED)}


def change_and_difference(runs: list[Path], artifacts: Artifacts) -> tuple[float, float]:
    """How far the first run moved the policy's weights, and how far the second ended from there."""
    from safetensors.torch import load_file

    before = load_file(artifacts.policy / "model.safetensors")
    one, other = (load_file(run_dir / "ppo" / "export" / "model.safetensors") for run_dir in runs)

    def norm(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
        return float(sum((first[name].double() - second[name].double()).norm() ** 2 for name in first) ** 0.5)

    return norm(before, one), norm(one, other)
