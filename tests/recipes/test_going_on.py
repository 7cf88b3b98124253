"""A run that is made longer ends with the same bits as one that was as long from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.artifacts import CARD, verify
from common.stage import Step
from common.training_config import SchedulerName, StopWhenConfig
from step1_sft.config import SFTJob
from step2_dpo.config import DPOJob
from step2_reward.config import RewardJob
from step3_ppo.config import PPOJob
from tests.runs import Base, evaluation_lines, finish, training_lines
from tests.step2_dpo import runs as dpo_runs
from tests.step2_reward import runs as reward_runs
from tests.step3_ppo import runs as ppo_runs


def job_of(base: Base, **train: object) -> SFTJob:
    job = base.job(**train)
    job.sft.optim.scheduler = SchedulerName.constant
    job.sft.sampling.num_prompts = 0
    return job


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_steps_and_ten_more_are_twenty(base: Base, ranks: int) -> None:
    whole = base.run(f"twenty-{ranks}", job_of(base, max_steps=20), ranks)
    run_dir = base.run(f"ten-{ranks}", job_of(base, max_steps=10), ranks)
    base.write(f"ten-{ranks}", job_of(base, max_steps=20))
    assert "resuming from" in finish(run_dir, ranks)
    ours, theirs = (dict(verify(folder / "sft" / "export").files) for folder in (run_dir, whole))
    assert ours.pop(CARD) and theirs.pop(CARD) and ours == theirs
    own, other = (verify(folder / "sft/checkpoints/step_00000020").files for folder in (run_dir, whole))
    assert {n: r for n, r in own.items() if n.endswith(".pt")} == {
        n: r for n, r in other.items() if n.endswith(".pt")
    }
    for line, expected in zip(training_lines(run_dir), training_lines(whole), strict=True):
        assert {n: v for n, v in line.items() if "perf/" not in n} == {
            n: v for n, v in expected.items() if "perf/" not in n
        }
    assert verify(run_dir / "sft" / "export.old-1").details["progress"]["step"] == 10


def test_another_micro_batch_changes_the_order_of_sums_alone(base: Base) -> None:
    whole = base.run("four-whole", job_of(base, max_steps=4))
    run_dir = base.run("two-by-two", job_of(base, max_steps=2))
    base.write("two-by-two", job_of(base, max_steps=4, micro_batch_size=1))
    finish(run_dir, 1)
    ours, theirs = ([line["loss"] for line in training_lines(folder)] for folder in (run_dir, whole))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=2e-5)  # fp32, in another order


def test_a_shorter_run_than_what_is_done_is_refused_by_the_step_too(base: Base) -> None:
    run_dir = base.run("four", job_of(base, max_steps=4))
    base.write("four", job_of(base, max_steps=2))
    assert "4 steps of sft are done, and 2 are asked for" in finish(run_dir, 1, code=2)


def test_a_step_stops_when_its_metric_is_no_longer_better_and_goes_on_with_more_patience(base: Base) -> None:
    job = job_of(base, max_steps=12, eval_every=1, stop_when=StopWhenConfig("eval/loss", 2))
    job.sft.optim.lr = 1e-30  # which changes no weight
    run_dir = base.run("stopping", job)
    last = training_lines(run_dir)[-1]["step"]
    assert last == 2 and verify(run_dir / "sft/export").details["progress"]["step"] == last
    assert len({line["eval/loss"] for line in evaluation_lines(run_dir)}) == 1
    assert (
        f"stopping after step {last}: eval/loss was not better in 2 evaluation(s)"
        in (run_dir / "output.txt").read_text()
    )
    finish(run_dir, 1)  # the same again trains nothing
    assert training_lines(run_dir)[-1]["step"] == last
    job.sft.train.stop_when = StopWhenConfig("eval/loss", 4)
    base.write("stopping", job)
    finish(run_dir, 1)
    assert training_lines(run_dir)[-1]["step"] == 4


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(base: Base) -> None:
    run_dir = base.write("unknown", job_of(base, eval_every=1, stop_when=StopWhenConfig("eval/los")))
    printed = finish(run_dir, 1, code=2)
    assert (
        "train.stop_when.metric=eval/los is not measured" in printed and "did you mean eval/loss?" in printed
    )
    assert not (run_dir / "sft" / "metrics.jsonl").exists()


def weights_of(run_dir: Path, step: str) -> str:
    return verify(run_dir / step / "export").files["model.safetensors"]["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [Step.reward, Step.dpo, Step.ppo])
def test_every_step_made_longer_is_as_one_that_was_as_long_from_the_start(
    step: Step, base: Base, tmp_path: Path
) -> None:
    artifacts = ppo_runs.make_artifacts(tmp_path, base.tokenizer)

    def job(steps: int) -> RewardJob | DPOJob | PPOJob:
        train = {"max_steps": steps, "eval_every": 0, "save_every": 0}
        if step is Step.ppo:
            made: Any = ppo_runs.make_job(tmp_path, artifacts, **train)
            made.ppo.critic.optim.scheduler = SchedulerName.constant
        else:
            runs = dpo_runs if step is Step.dpo else reward_runs
            made = runs.make_job(tmp_path, artifacts.policy, **train)
        getattr(made, step.value).optim.scheduler = SchedulerName.constant
        return made

    program: Any = {Step.reward: reward_runs.reward, Step.dpo: dpo_runs.dpo, Step.ppo: ppo_runs.ppo}[step]
    whole = dpo_runs.write_job(job(4), tmp_path / "whole")
    finish(whole, 1, program)
    run_dir = dpo_runs.write_job(job(2), tmp_path / "parts")
    finish(run_dir, 1, program)
    short = weights_of(run_dir, step.value)
    dpo_runs.write_job(job(4), tmp_path / "parts")
    finish(run_dir, 1, program)
    assert short != weights_of(run_dir, step.value) == weights_of(whole, step.value)


@pytest.mark.slow
def test_ppo_stops_when_its_evaluations_get_no_better(base: Base, tmp_path: Path) -> None:
    job = ppo_runs.make_job(tmp_path, ppo_runs.make_artifacts(tmp_path, base.tokenizer), max_steps=6)
    job.ppo.train.eval_every, job.ppo.train.stop_when = 1, StopWhenConfig("eval/greedy/reward", 1)
    for optim in (job.ppo.optim, job.ppo.critic.optim):
        optim.lr = 1e-30  # which changes no weight: greedy responses stay the same
    run_dir = dpo_runs.write_job(job, tmp_path / "stops")
    printed = finish(run_dir, 1, ppo_runs.ppo)
    assert "stopping after iteration 1: eval/greedy/reward was not better in 1 evaluation(s)" in printed
    assert verify(run_dir / "ppo" / "export").details["progress"]["step"] == 1
