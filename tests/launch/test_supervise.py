"""Restarts: who is started again, how often, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.local import Job
from launch.supervise import Outcome, died, supervise

PROGRAM = """
import os, signal, sys
from pathlib import Path
folder, end, times, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), os.environ["RANK"]
starts = folder / f"starts_{rank}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if int(rank) == int(os.environ["WORLD_SIZE"]) - 1 and len(starts.read_text()) <= times:
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(end))
"""
"""The last rank ends as it is told, so many times; then it and the others end well."""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_module.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def go(end: str, times: int, restarts: int, ranks: int = 1) -> tuple[int, int, list[str]]:
    """Exit status, how often the last rank was started, and what was said."""
    lines: list[str] = []
    job = Job("some_module", (".", end, str(times)), ranks)
    status, stopped = supervise(job, name="sft", restarts=restarts, say=lines.append)
    assert not stopped
    return status, len(Path(f"starts_{ranks - 1}").read_text()), lines


def test_a_rank_that_was_killed_is_started_again_and_each_restart_is_said() -> None:
    status, starts, lines = go("killed", 2, restarts=3)
    assert (status, starts) == (0, 3)
    assert lines == [
        f"sft: rank 0 died (SIGKILL); starting again from the last checkpoint, restart {number} of 3"
        for number in (1, 2)
    ]


def test_all_ranks_are_started_again_when_one_of_several_was_killed() -> None:
    status, starts, lines = go("killed", 1, restarts=1, ranks=2)
    assert (status, starts, len(Path("starts_0").read_text())) == (0, 2, 2)
    assert lines == ["sft: rank 1 died (SIGKILL); starting again from the last checkpoint, restart 1 of 1"]


def test_after_the_last_restart_the_status_is_that_of_the_failure() -> None:
    assert go("killed", 9, restarts=2)[:2] == (137, 3)
    Path("starts_0").unlink()
    assert go("killed", 9, restarts=0)[:2] == (137, 1)


@pytest.mark.parametrize("status", [2, 143])
def test_what_a_person_has_to_fix_or_asked_for_is_not_started_again(status: int) -> None:
    assert go(str(status), 9, restarts=3) == (status, 1, [])


def test_a_machine_that_is_lost_is_the_cause_and_no_restart_brings_it_back() -> None:
    lost = Outcome(1, lost="machine 1 (b) is gone")
    assert not lost.is_restartable and Outcome(1).is_restartable
    assert min([Outcome(137, (0, -9)), lost, Outcome(0)], key=lambda outcome: outcome.gravity) is lost


def test_of_several_machines_the_one_whose_rank_was_killed_explains_the_others() -> None:
    killed = Outcome(137, (1, -9), where="machine 1 (b)")
    outcomes = [Outcome(143, (2, 143)), Outcome(1, (0, 1)), Outcome(0), killed]
    assert min(outcomes, key=lambda outcome: outcome.gravity) is killed
    assert died(killed) == "rank 1 on machine 1 (b) died (SIGKILL)"
    assert died(Outcome(1, (0, 1))) == "rank 0 failed (exit status 1)"
    hanging = Outcome(75, (0, 75))  # its message names the rank, which the agent has killed meanwhile
    assert min([killed, hanging], key=lambda outcome: outcome.gravity) is hanging
    assert died(hanging) == "a rank hangs" and hanging.is_restartable
    agent = Outcome(137, where="machine 1 (b)")
    assert died(agent) == "torchrun's agent on machine 1 (b) died (SIGKILL)"
