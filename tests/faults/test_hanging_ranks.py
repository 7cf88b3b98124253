"""A rank that hangs, however it does, is named, and all ranks end soon with their stacks written."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from common.runtime.heartbeat import STALLED_EXIT_CODE
from tests.programs.faulted import ppo_faulted, sft_faulted
from tests.runs import Base, start, wait_while, write_job
from tests.step3_ppo.runs import make_artifacts, make_job

pytestmark = pytest.mark.cluster

# a busy machine may keep a rank from beating, or from a collective, for some seconds
SILENT = {"RLHF_SILENT_SECONDS": "6", "RLHF_COLLECTIVE_SECONDS": "100"}
STALLED = {"RLHF_SILENT_SECONDS": "60", "RLHF_COLLECTIVE_SECONDS": "12"}
HOST = socket.gethostname()


def hang(base: Base, name: str, fault: str, victim: int, *, leaves: bool) -> tuple[Path, str]:
    """SFT with a fault until the other rank has given up; the victim too, if it `leaves` by itself."""
    job = base.job(max_steps=4, save_every=2)
    job.deepspeed.stage = 3
    run_dir = base.write(name, job)
    return run_dir, run_until_given_up(run_dir, sft_faulted, fault, victim, leaves=leaves)


def run_until_given_up(
    run_dir: Path, program: Callable[..., int], fault: str, victim: int, *, leaves: bool
) -> str:
    """What was printed until then."""
    limits = STALLED if leaves else SILENT
    started = start(run_dir, 2, program, {**limits, "RLHF_FAULT": fault})
    waited_for = [*started.processes] if leaves else [started.processes[1 - victim]]
    wait_while(started, lambda: any(process.is_alive() for process in waited_for))
    codes = [process.exitcode for process in waited_for]
    printed = (run_dir / "output.txt").read_text()
    started.kill()
    assert codes == [STALLED_EXIT_CODE] * len(waited_for), printed[-3000:]
    return printed


def stacks(run_dir: Path, rank: int) -> str:
    """What a rank wrote after it gave up."""
    _, _, after = (run_dir / f"sft/logs/rank_{rank}.log").read_text().rpartition("stacks of all threads:")
    return after


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_process_is_stopped_is_named_by_the_other(base: Base, victim: int) -> None:
    run_dir, printed = hang(
        base, f"stopped {victim}", f"point=update,rank={victim},nth=3,do=stop", victim, leaves=False
    )
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert f"error: rank {victim} on {HOST} has not answered for " in printed
    # what it did when it beat last, a moment before: perhaps "writing a checkpoint's manifest", in <listcomp>
    assert re.search(r"; it was in (step [123], )?[a-z' ]+ \(.+\); the stacks", printed)
    assert "all_reduce" in stacks(run_dir, 1 - victim) or "reduce_scatter" in stacks(run_dir, 1 - victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_in_an_endless_loop_is_told_from_one_that_waits_for_it(base: Base, victim: int) -> None:
    run_dir, printed = hang(
        base, f"loop {victim}", f"point=save,rank={victim},nth=1,do=hang", victim, leaves=True
    )
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert f"error: rank {victim} on {HOST} has kept the others waiting for " in printed
    assert "it is in step 2, saving a checkpoint (common/phases.py:" in printed
    assert "in _happen" in stacks(run_dir, victim) and "all_reduce_sum" in stacks(run_dir, 1 - victim)


def test_a_rank_that_keeps_the_interpreters_lock_still_leaves_its_stacks(base: Base) -> None:
    run_dir, printed = hang(base, "frozen", "point=update,rank=1,step=2,do=freeze", 1, leaves=False)
    assert f"error: rank 1 on {HOST} has not answered for " in printed
    log = (run_dir / "sft/logs/rank_1.log").read_text()
    assert "Timeout (" in log and "phases.py" in log


@pytest.mark.parametrize(
    ("point", "leaves", "said"),
    [
        ("rollout,step=2,rank=1,do=stop", False, "rank 1 on {host} has not answered for "),
        ("score,step=1,rank=0,do=hang", True, "rank 0 on {host} has kept the others waiting for "),
    ],
)
def test_a_rank_that_hangs_in_an_iteration_of_ppo_is_named(
    base: Base, tmp_path: Path, point: str, leaves: bool, said: str
) -> None:
    job = make_job(tmp_path, make_artifacts(tmp_path, base.tokenizer), max_steps=2, save_every=1)
    job.deepspeed.stage = 3
    run_dir = write_job(job, tmp_path / "run")
    victim = 1 if "rank=1" in point else 0
    printed = run_until_given_up(run_dir, ppo_faulted, f"point={point}", victim, leaves=leaves)
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert "error: " + said.format(host=HOST) in printed
