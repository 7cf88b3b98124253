"""A run goes on with another number of ranks and another ZeRO stage, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import verify
from common.runtime.distributed import STOPPED_EXIT_CODE
from step1_sft.config import SFTJob
from tests.programs.divided import sft_recorded
from tests.runs import Base, finish, training_lines, write_job
from tests.step2_dpo import runs as dpo_runs
from tests.step2_dpo.runs import make_policy
from tests.step2_reward import runs as reward_runs
from tests.step3_ppo.runs import lines_of, make_artifacts, make_job, ppo, ppo_interrupted

pytestmark = pytest.mark.slow

# fp32 on fewer ranks sums in another order; what is asked for is 1e-4
TOLERANCE = 2e-5


def job_of(base: Base, stage: int, **train: Any) -> SFTJob:
    job = base.job(micro_batch_size=2, max_steps=6, **train)
    job.deepspeed.stage = stage
    job.sft.sampling.num_prompts = 1
    return job


def rows_of(run_dir: Path) -> list[list[int]]:
    """By step, the rows that the ranks of all starts learned from."""
    seen: dict[int, list[int]] = {}
    for path in run_dir.glob("rows_*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(line["step"], []).extend(line["rows"])
    return [sorted(rows) for _, rows in sorted(seen.items())]


def test_sft_goes_from_two_ranks_to_one_to_two_and_from_zero2_to_zero3(base: Base) -> None:
    whole = base.write("elastic-whole", job_of(base, 2))
    finish(whole, 2, sft_recorded, 0)
    for number, (stage, ranks, stop_after) in enumerate([(2, 2, 2), (3, 1, 4), (1, 2, 0)]):
        run_dir = base.write("elastic", job_of(base, stage))
        code = STOPPED_EXIT_CODE if stop_after else 0
        printed = finish(run_dir, ranks, sft_recorded, stop_after, code=code)
        changed = ["", "ZeRO-2 on 2 ranks -> ZeRO-3 on 1 rank", "ZeRO-3 on 1 rank -> ZeRO-1 on 2 ranks"][
            number
        ]
        assert printed.count("resharded") == bool(number) and changed in printed
    rows = rows_of(whole)
    assert rows_of(run_dir) == rows and len(rows) == 6 and len(set(map(tuple, rows))) > 1
    assert close(training_lines(whole), training_lines(run_dir), ("loss", "grad_norm", "num_trained_tokens"))
    verify(run_dir / "sft" / "export")


def test_ranks_begin_and_cease_to_share_rows(base: Base) -> None:
    whole = base.write("shared-whole", job_of(base, 2))
    finish(whole, 1, sft_recorded, 0)
    for ranks, shared, stop_after in [(2, 2, 2), (4, 2, 4), (2, 1, 0)]:
        job = job_of(base, 2)
        job.launch.sequence_parallel = shared
        run_dir = base.write("shared", job)
        printed = finish(
            run_dir, ranks, sft_recorded, stop_after, code=STOPPED_EXIT_CODE if stop_after else 0
        )
        # the state is of all ranks, whichever rows they have
        assert ("resuming from" in printed) == (stop_after != 2)
    assert close(training_lines(whole), training_lines(run_dir), ("loss", "grad_norm", "num_trained_tokens"))
    verify(run_dir / "sft" / "export")


def test_ranks_that_share_rows_resume_with_the_same_bits(base: Base) -> None:
    job = job_of(base, 3)
    job.launch.sequence_parallel = 2
    whole, run_dir = base.write("bits-whole", job), base.write("bits", job)
    finish(whole, 2, sft_recorded, 0)
    finish(run_dir, 2, sft_recorded, 3, code=STOPPED_EXIT_CODE)
    finish(run_dir, 2, sft_recorded, 0)
    weights = [(at / "sft" / "export" / "model.safetensors").read_bytes() for at in (whole, run_dir)]
    assert weights[0] == weights[1]
    assert [line["loss"] for line in training_lines(whole)] == [
        line["loss"] for line in training_lines(run_dir)
    ]


def test_a_start_that_dies_while_it_divides_leaves_everything_as_it_was(base: Base) -> None:
    run_dir = base.write("elastic-dies", job_of(base, 2))
    finish(run_dir, 1, sft_recorded, 2, code=STOPPED_EXIT_CODE)
    folder = run_dir / "sft" / "checkpoints"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    base.write("elastic-dies", job_of(base, 3))
    finish(run_dir, 1, sft_recorded, -1, code=-signal.SIGKILL)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert "ZeRO-2 on 1 rank -> ZeRO-3 on 1 rank" in finish(run_dir, 1, sft_recorded, 0)
    assert [line["step"] for line in training_lines(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_ppo_goes_on_within_an_iteration_with_other_ranks_and_another_stage(
    base: Base, tmp_path: Path
) -> None:
    artifacts = make_artifacts(tmp_path, base.tokenizer)

    def write(name: str, stage: int) -> Path:
        job = make_job(tmp_path, artifacts, max_steps=3, eval_every=0)
        job.deepspeed.stage, job.ppo.ema_decay = stage, 0.5
        return write_job(job, tmp_path / "runs" / name)

    whole = write("whole", 2)
    finish(whole, 2, ppo)
    run_dir = write("divided", 2)
    stopped = ("update", 3, 0, signal.SIGTERM)  # the first of two in the second iteration
    finish(run_dir, 2, ppo_interrupted, *stopped, code=STOPPED_EXIT_CODE)
    printed = finish(write("divided", 3), 1, ppo)
    assert printed.count("resharded: ZeRO-2 on 2 ranks -> ZeRO-3 on 1 rank\n") == 1
    assert "in iteration 2 after 1 of its updates" in printed
    names = ("objective/scores", "loss/policy_avg", "loss/value_avg", "objective/kl", "num_tokens")
    assert close(lines_of(whole), lines_of(run_dir), names)
    verify(run_dir / "ppo" / "export")


def test_ppo_ranks_begin_and_cease_to_share_rows_within_an_iteration(base: Base, tmp_path: Path) -> None:
    artifacts = make_artifacts(tmp_path, base.tokenizer)

    def write(name: str, shared: int) -> Path:
        job = make_job(tmp_path, artifacts, max_steps=3, eval_every=0)
        job.deepspeed.stage, job.launch.sequence_parallel = 2, shared
        return write_job(job, tmp_path / "runs" / name)

    whole = write("whole", 1)
    finish(whole, 1, ppo)
    for ranks, shared, update in [(2, 2, 1), (4, 2, 3), (4, 4, 5)]:  # the first of each iteration's two
        stopped = ("update", update, 0, signal.SIGTERM)
        printed = finish(write("shared", shared), ranks, ppo_interrupted, *stopped, code=STOPPED_EXIT_CODE)
        assert ("after 1 of its updates" in printed) == (update > 1)
    run_dir = write("shared", 1)
    finish(run_dir, 2, ppo)
    names = ("objective/scores", "loss/policy_avg", "loss/value_avg", "objective/kl", "num_tokens")
    assert close(lines_of(whole), lines_of(run_dir), names)
    verify(run_dir / "ppo" / "export")


def close(whole: list[dict[str, Any]], other: list[dict[str, Any]], names: Sequence[str]) -> bool:
    assert [line["step"] for line in whole] == [line["step"] for line in other] and len(whole) > 2
    for one, two in zip(whole, other, strict=True):
        for name in names:
            assert abs(one[name] - two[name]) <= TOLERANCE * max(1.0, abs(one[name])), (one["step"], name)
    return True


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_a_step_on_pairs_goes_on_with_one_rank_and_another_stage(
    base: Base, tmp_path: Path, name: str
) -> None:
    runs = {"reward": reward_runs, "dpo": dpo_runs}[name]
    make_policy(tmp_path / "policy", base.tokenizer)

    def write(run: str, stage: int) -> Path:
        job: Any = runs.make_job(tmp_path, tmp_path / "policy", max_steps=4, save_every=2, eval_every=0)
        job.deepspeed.stage = stage
        return write_job(job, tmp_path / "runs" / run)

    whole = write("whole", 2)
    finish(whole, 2, getattr(runs, name))
    shutil.copytree(whole, tmp_path / "runs" / "divided")
    run_dir = write("divided", 3)
    shutil.rmtree(run_dir / name / "export")
    shutil.rmtree(run_dir / name / "checkpoints" / "step_00000004")
    printed = finish(run_dir, 1, getattr(runs, name))
    assert "step_00000002\nits state was resharded: ZeRO-2 on 2 ranks -> ZeRO-3 on 1 rank\n" in printed
    assert close(runs.lines_of(whole), runs.lines_of(run_dir), ("loss", "grad_norm", "num_tokens"))
