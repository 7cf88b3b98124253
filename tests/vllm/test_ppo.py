"""PPO's recipe with vLLM as what samples, as it is with the builtin decoder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import kill_resume
from common.artifacts import verify
from common.config import Dtype, LoraConfig
from common.runtime.distributed import STOPPED_EXIT_CODE
from common.vllm_fit import SamplingEngine
from step3_ppo.config import PPOJob
from tests.runs import finish, write_job
from tests.step3_ppo.runs import (
    Artifacts,
    lines_of,
    make_job,
    ppo,
    ppo_interrupted,
    run_job,
    series,
    watched,
)

pytestmark = pytest.mark.vllm

TEMPERATURE = 0.8
CLOSE = 1e-5
"""Nats: sums in fp32 in another order."""
UPDATES = 2
"""Of an iteration."""


def job_of(folder: Path, artifacts: Artifacts, engine: SamplingEngine = SamplingEngine.vllm) -> PPOJob:
    job = make_job(folder, artifacts, eval_every=2, save_every=1)
    job.ppo.rollout.temperature, job.ppo.rollout.engine = TEMPERATURE, engine
    return job


@pytest.fixture(scope="module")
def whole(folder: Path, artifacts: Artifacts) -> Path:
    """A run that nobody touched."""
    run_job(job_of(folder, artifacts), folder / "runs" / "whole")
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def builtin(folder: Path, artifacts: Artifacts) -> Path:
    run_job(job_of(folder, artifacts, SamplingEngine.builtin), folder / "runs" / "builtin")
    return folder / "runs" / "builtin"


def test_it_ends_with_a_policy_and_measures_what_the_builtin_decoder_does(whole: Path, builtin: Path) -> None:
    verify(whole / "ppo" / "export")
    for name in ("objective/scores", "eval/reward"):
        for one, other in zip(lines_of(whole, name), lines_of(builtin, name), strict=True):
            assert one.keys() == other.keys()


def test_what_it_samples_is_of_the_weights_that_are_trained(whole: Path) -> None:
    """In every iteration, after all updates before it, by the actor's own forward pass."""
    assert max(series(whole, "rollout/logprob_drift_max")) < CLOSE
    assert [line["val/first_ratio_error"] for line in lines_of(whole)] == [0.0] * 3
    assert abs(series(whole, "objective/kl")[-1]) > 1e-3  # it learned
    for experience in watched(whole)["experiences"]:
        assert experience.importance is None
        for response in experience.responses:
            assert response.stopped or len(response.tokens) == 8


def test_samples_of_a_prompt_differ_and_greedy_ones_are_those_of_the_builtin_decoder(
    whole: Path, builtin: Path
) -> None:
    pairs = [
        e.responses[first : first + 2] for e in watched(whole)["experiences"] for first in range(0, 8, 2)
    ]
    assert sum(not np.array_equal(one.tokens, other.tokens) for one, other in pairs) >= 6
    of_each = [series_of_greedy(run) for run in (whole, builtin)]
    assert of_each[0] == of_each[1]


def series_of_greedy(run_dir: Path) -> list[float]:
    """Before training, of the same policy on the same prompts."""
    first = lines_of(run_dir, "eval/greedy/length")[0]
    return [first["eval/greedy/length"], first["eval/greedy/stop_rate"]]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_sample_what_one_rank_samples(
    stage: int, folder: Path, artifacts: Artifacts, whole: Path
) -> None:
    job = job_of(folder, artifacts)
    job.deepspeed.stage = stage
    run_job(job, folder / "runs" / f"stage {stage}", ranks=2)
    both = [watched(run)["experiences"] for run in (whole, folder / "runs" / f"stage {stage}")]
    for one, other in zip(*both, strict=True):
        for ours, theirs in zip(one.responses, other.responses, strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)


@pytest.mark.parametrize(("moment", "number"), [("roll-out", 1), ("update", 3)])
def test_a_run_told_to_stop_asks_again_for_the_same_samples(
    moment: str, number: int, folder: Path, artifacts: Artifacts, whole: Path
) -> None:
    run_dir = write_job(job_of(folder, artifacts), folder / "runs" / f"told {moment}")
    told = (moment, number, 0, signal.SIGTERM)
    printed = finish(run_dir, 1, ppo_interrupted, *told, code=STOPPED_EXIT_CODE)
    assert "told to stop: saved in iteration 2" in printed and "Traceback" not in printed
    finish(run_dir, 1, ppo)
    assert kill_resume.state_differences(whole, run_dir, 3 * UPDATES, step_name="ppo") == []
    assert kill_resume.metric_differences(whole, run_dir, step_name="ppo") == []


def test_adapters_are_swapped_in_and_their_drift_is_as_small(folder: Path, artifacts: Artifacts) -> None:
    job = job_of(folder, artifacts)
    job.model.lora = LoraConfig(enabled=True, r=4)
    job.ppo.optim.lr = 1e-2
    run_job(job, folder / "runs" / "lora")
    assert max(series(folder / "runs" / "lora", "rollout/logprob_drift_max")) < CLOSE
    assert abs(series(folder / "runs" / "lora", "objective/kl")[-1]) > 1e-3


def test_in_half_precision_it_drifts_and_tokens_get_weights(folder: Path, artifacts: Artifacts) -> None:
    job = job_of(folder, artifacts)
    job.model.dtype = Dtype.bf16
    job.ppo.rollout.vllm.drift_bound = 1e-6
    run_dir = folder / "runs" / "half"
    run_job(job, run_dir)
    for line, experience in zip(lines_of(run_dir), watched(run_dir)["experiences"], strict=True):
        assert 1e-6 < line["rollout/logprob_drift"] < 2e-2
        assert experience.importance.mean() == pytest.approx(line["rollout/importance_mean"])
        expected = torch.from_numpy(experience.old_logprobs - sampled(experience)).exp().clamp(max=2.0)
        assert experience.importance == pytest.approx(expected.numpy())


def sampled(experience: Any) -> np.ndarray:
    return np.concatenate([response.logprobs for response in experience.responses])
