"""Several ranks through the elastic agent: their environment, and what is said when one fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.agent import STOPPED, as_told, exit_status, first_failure
from launch.local import Job
from launch.supervise import Outcome, supervise

PROGRAM = """
import os, sys
from pathlib import Path
rank = os.environ["RANK"]
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
Path(sys.argv[1], rank).write_text(" ".join(os.environ[name] for name in names))
assert int(os.environ["MASTER_PORT"]) > 0
print("printed by rank", rank)
if rank == "1" and len(sys.argv) > 2:
    raise RuntimeError("rank one crashed")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_module.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "some_module"


def test_two_ranks_get_torchruns_environment_and_the_first_one_the_terminal(
    module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise(Job(module, (str(tmp_path),), 2, tmp_path / "logs")) == Outcome(0)
    assert (tmp_path / "0").read_text() == "2 0 2 127.0.0.1"
    assert (tmp_path / "1").read_text() == "2 1 2 127.0.0.1"
    assert capfd.readouterr().out == "printed by rank 0\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "printed by rank 1\n"


def test_a_crash_of_another_rank_ends_with_its_status_and_the_end_of_its_log(
    module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervise(Job(module, (str(tmp_path), "crash"), 2, tmp_path / "logs")) == Outcome(1, (1, 1))
    shown = capfd.readouterr().err
    assert "rank 1 failed first (exit status 1)" in shown
    assert "RuntimeError: rank one crashed" in shown
    assert "ChildFailedError" not in shown and "torch/distributed" not in shown


def test_the_cause_is_preferred_to_ranks_that_were_only_told_to_stop() -> None:
    assert first_failure([]) is None
    assert first_failure([(0, as_told(-15, stopping=True)), (1, 1)]) == (1, 1)
    assert first_failure([(1, 143), (0, 143)]) == (1, 143)
    assert first_failure([(2, -9), (1, 1)]) == (2, -9)


def test_a_rank_that_died_is_preferred_to_those_that_failed_without_it_and_a_message_to_both() -> None:
    assert first_failure([(0, 1), (3, 1)]) == (0, 1)
    assert first_failure([(0, 1), (1, -9)]) == (1, -9)
    assert first_failure([(0, 1), (1, -9), (2, 2)]) == (2, 2)


def test_death_by_a_signal_to_stop_counts_as_stopped() -> None:
    assert exit_status(2) == 2
    assert exit_status(-signal.SIGTERM) == exit_status(-signal.SIGUSR1) == STOPPED == 143
    assert exit_status(-signal.SIGKILL) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_told_by_others_before_it_could_hear_explains_those_that_fail_without_it(number: int) -> None:
    assert first_failure([(0, 1), (1, as_told(-number, stopping=False))]) == (1, -number)
    assert first_failure([(0, as_told(-number, stopping=True)), (1, 1)]) == (1, 1)
    here, there = Outcome(exit_status(-number), (1, -number)), Outcome(1, (2, 1), where="machine 1 (b)")
    halted = Outcome(STOPPED, (2, as_told(-number, stopping=True)), where="machine 1 (b)")
    assert min([there, here], key=lambda outcome: outcome.gravity) is here and here.status == STOPPED
    assert min([halted, Outcome(1, (0, 1))], key=lambda outcome: outcome.gravity).status == 1


DEAF = """
import os, signal
import torch.distributed as dist
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGTERM)
dist.init_process_group("gloo")
"""


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_was_told_to_stop_before_it_could_hear_end_as_stopped(
    tmp_path: Path, module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{module}.py").write_text(DEAF)
    assert supervise(Job(module, (), 2, tmp_path / "logs")) == Outcome(STOPPED, (1, -signal.SIGTERM))
    assert capfd.readouterr().err == ""


CRASHED = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(1)
time.sleep(60)
"""


def test_a_rank_that_torch_ends_because_another_one_crashed_is_not_taken_for_the_cause(
    tmp_path: Path, module: str
) -> None:
    (tmp_path / f"{module}.py").write_text(CRASHED)
    assert supervise(Job(module, (), 2, tmp_path / "logs")) == Outcome(1, (1, 1))
