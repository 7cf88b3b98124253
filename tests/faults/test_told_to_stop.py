"""SIGTERM to one rank or to both, once or twice, anywhere, or a disk that is full: no bit is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kill_resume import last_checkpoint, metric_differences, state_differences
from common.config import Dtype
from common.runtime.distributed import STOPPED_EXIT_CODE
from pipeline.verify import verify_path
from tests.programs.faulted import ppo_faulted, sft_faulted
from tests.runs import Base, finish, write_job
from tests.step3_ppo.runs import make_artifacts, make_job

pytestmark = pytest.mark.slow

TWICE = "{0};{0}"
SFT = {
    "both, in a step": ("point=backward,step=1,do=term", 1),
    "one, while evaluating, twice": (TWICE.format("point=evaluate,step=2,rank=1,do=term"), 2),
    "one, while writing": ("point=commit.write,step=3,rank=1,do=term", 3),
    "both, at two moments of a save": (
        "point=commit.rename,step=4,rank=0,do=term;point=commit.end,step=4,rank=1,do=term",
        4,
    ),
}
PPO = {
    "both, while evaluating": ("point=evaluate,do=term", 0),
    "one, while sampling, twice": (TWICE.format("point=rollout,step=1,rank=1,do=term"), 0),
    "both, while scoring, twice": (TWICE.format("point=score,step=1,do=term"), 0),
    "one, while writing": ("point=commit.write,step=1,rank=0,do=term", 4),
    "both, in an update": ("point=update,step=2,nth=5,do=term", 7),
}
"""Where they are told, and the number of the checkpoint that there is then."""


def stop_and_go_on(whole: Path, run_dir: Path, step: str, program: Callable[..., int], cases: dict) -> None:
    """Stop the run at each place in turn; at the end it must equal the one that nobody stopped."""
    newest = 0
    for where, (fault, number) in cases.items():
        printed = finish(run_dir, 2, program, {"RLHF_FAULT": fault}, code=STOPPED_EXIT_CODE)
        assert printed.count("told to stop: saved") == 1 and "Traceback" not in printed, where
        assert printed.count("injected fault: term") == fault.count("do=term") * (
            1 if "rank=" in fault else 2
        )
        before, newest = newest, last_checkpoint(run_dir / step)
        assert newest >= before and newest == number, (where, newest)
    finish(run_dir, 2, program, {})
    assert differences(whole, run_dir, step) == []


def differences(whole: Path, run_dir: Path, step: str) -> list[str]:
    """Of the last checkpoints and of the metrics."""
    last = last_checkpoint(whole / step)
    return state_differences(whole, run_dir, last, step) + metric_differences(whole, run_dir, step)


def test_sft_told_to_stop_anywhere_ends_with_the_same_bits(base: Base) -> None:
    job = base.job(max_steps=5, save_every=1, eval_every=2, keep_checkpoints=2)
    job.deepspeed.stage = 3
    job.model.config["attention_dropout"] = 0.2  # whatever is drawn must be drawn again
    whole, run_dir = base.write("never told", job), base.write("told", job)
    finish(whole, 2, sft_faulted, {})
    stop_and_go_on(whole, run_dir, "sft", sft_faulted, SFT)


def test_sft_that_saves_beside_training_ends_with_the_same_bits_however_it_is_told_to_stop(
    base: Base,
) -> None:
    # the save of step 6, in which it is told last, is waited for by that of step 8: not the end
    job = base.job(max_steps=10, save_every=2, eval_every=4, keep_checkpoints=2)
    job.deepspeed.stage = 2
    whole = base.write("never told, waits for its saves", job)
    job.sft.train.async_save = True
    run_dir = base.write("told, saves beside", job)
    finish(whole, 2, sft_faulted, {})
    newest = 0
    for fault in (
        "point=backward,step=1,do=term",  # nothing is being written
        "point=commit.write,rank=1,do=term",
        "point=commit.hash,nth=2,rank=0,do=term",
    ):
        printed = finish(run_dir, 2, sft_faulted, {"RLHF_FAULT": fault}, code=STOPPED_EXIT_CODE)
        assert printed.count("told to stop: saved") == 1 and "Traceback" not in printed, fault
        before, newest = newest, last_checkpoint(run_dir / "sft")
        assert newest > before and not list((run_dir / "sft" / "checkpoints").glob("*.tmp")), fault
    finish(run_dir, 2, sft_faulted, {})
    assert differences(whole, run_dir, "sft") == []


@pytest.fixture(scope="module")
def ppo_runs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for a PPO run on two ranks, by name."""
    folder = tmp_path_factory.mktemp("told_ppo")
    artifacts = make_artifacts(folder, base.tokenizer)

    def prepare(name: str) -> Path:
        job = make_job(folder, artifacts, max_steps=2, eval_every=1, save_every=1)
        job.model.dtype, job.deepspeed.stage, job.ppo.ppo_epochs, job.ppo.ema_decay = Dtype.fp32, 3, 2, 0.5
        return write_job(job, folder / "runs" / name)

    return prepare


@pytest.fixture(scope="module")
def whole_ppo(ppo_runs: Callable[[str], Path]) -> Path:
    """A run to its end that nobody disturbed."""
    whole = ppo_runs("undisturbed")
    finish(whole, 2, ppo_faulted, {})
    return whole


def test_ppo_told_to_stop_anywhere_ends_with_the_same_bits(
    ppo_runs: Callable[[str], Path], whole_ppo: Path
) -> None:
    stop_and_go_on(whole_ppo, ppo_runs("told"), "ppo", ppo_faulted, PPO)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_costs_ppo_nothing_that_was_saved(
    rank: int, ppo_runs: Callable[[str], Path], whole_ppo: Path
) -> None:
    run_dir = ppo_runs(f"full for rank {rank}")
    fault = f"point=commit.write,step=2,rank={rank},do=enospc"
    printed = finish(run_dir, 2, ppo_faulted, {"RLHF_FAULT": fault}, code=2)
    assert "the disk is full" in printed and str(run_dir) in printed and "Traceback" not in printed
    checkpoints = run_dir / "ppo" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000004"]  # of the first iteration
    assert verify_path(checkpoints, say=lambda line: None) == 0
    finish(run_dir, 2, ppo_faulted, {})
    assert differences(whole_ppo, run_dir, "ppo") == []


def test_a_loss_that_is_not_a_number_on_one_rank_skips_that_update_of_ppo_on_all(
    ppo_runs: Callable[[str], Path],
) -> None:
    run_dir = ppo_runs("nan")
    fault = "point=backward,step=2,rank=1,do=nan"  # the first of the iteration: of the actor
    printed = finish(run_dir, 2, ppo_faulted, {"RLHF_FAULT": fault})
    assert printed.count("its gradient is not finite; skipped on all ranks") == 1
    assert "warning: 1 of " in printed and "updates" in printed and "Traceback" not in printed
